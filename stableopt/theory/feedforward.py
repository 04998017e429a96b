r"""T2, the spectral law of feedforward nets: :math:`h^+ = \sigma(Wh+b)` has Lipschitz constant at most :math:`L_\sigma\|W\|_2`.

Only products matter for the whole net, but the profile holds every partial product :math:`D_{h_k}h_l`, k <= l.
"""

from __future__ import annotations

from collections.abc import Iterable

from stableopt.linalg.bound import Real
from stableopt.theory._arguments import joined, listed, nonnegative, real_log

__all__ = ["depth_exponent", "largest_partial_product", "layer_factor", "partial_products", "product_factor"]


def layer_factor(weight_norm: Real, activation_lipschitz: Real = 1.0) -> Real:
    r"""Bound the Lipschitz constant of one layer :math:`\sigma(Wh+b)`: :math:`L_\sigma\|W\|`.

    Args:
        weight_norm: the operator norm of the linear map. For a convolution this is the norm of the operator on images,
            which depends on stride, dilation, groups and padding, and not the norm of the reshaped kernel.
        activation_lipschitz: :math:`L_\sigma \ge 0`.

    Returns:
        The factor; a Bound if an operand is one.

    Raises:
        ValueError: if a constant is negative or not finite.

    Examples:
        >>> layer_factor(0.5, activation_lipschitz=1.5)
        0.75
    """
    return nonnegative("weight_norm", weight_norm) * nonnegative("activation_lipschitz", activation_lipschitz)


def product_factor(factors: Iterable[Real]) -> Real:
    """Bound the Lipschitz constant of a composition by the product of its factors; 1 for no layer.

    Args:
        factors: one Lipschitz constant per layer, each >= 0.

    Returns:
        The product; a Bound if a factor is one.

    Raises:
        ValueError: if a factor is negative or not finite.

    Examples:
        >>> product_factor([2.0, 0.25, 1.0])
        0.5
    """
    product: Real = 1.0
    for factor in listed("factors", factors):
        product = product * factor
    return product


def depth_exponent(factors: Iterable[Real]) -> Real:
    r"""Return the forward exponent :math:`\Lambda = \frac1L\sum_l \log(L_{\sigma,l}\|W_l\|)`.

    Args:
        factors: one Lipschitz constant per layer, at least one layer.

    Returns:
        The mean growth per layer in nats, ``-inf`` when a factor is zero; the product is at most :math:`e^{L\Lambda}`.

    Raises:
        ValueError: if there is no layer or a factor is negative.

    Note:
        A negative exponent bounds the total product, not the partial ones; see :func:`largest_partial_product`.

    Examples:
        >>> depth_exponent([4.0, 0.25])
        0.0
    """
    checked = listed("factors", factors)
    if not checked:
        raise ValueError("factors must hold at least one layer, got none.")
    total: Real = 0.0
    for factor in checked:
        total = total + real_log(factor)
    return total / len(checked)


def partial_products(factors: Iterable[Real]) -> list[list[Real]]:
    r"""Bound every block :math:`D_{h_k}h_l` of the forward profile.

    Args:
        factors: one Lipschitz constant per layer, each >= 0.

    Returns:
        A triangular table: ``table[l][k]`` bounds the derivative of representation l by representation k, for
        ``0 <= k <= l <= L``; the diagonal is 1.

    Raises:
        ValueError: if a factor is negative or not finite.

    Examples:
        >>> partial_products([0.5, 4.0])
        [[1.0], [0.5, 1.0], [2.0, 4.0, 1.0]]
    """
    table: list[list[Real]] = [[1.0]]
    for factor in listed("factors", factors):
        table.append([factor * earlier for earlier in table[-1]] + [1.0])
    return table


def largest_partial_product(factors: Iterable[Real]) -> Real:
    """Return the bound on the forward profile: the largest product of consecutive factors (at least 1, the empty product).

    Args:
        factors: one Lipschitz constant per layer, each >= 0.

    Returns:
        The largest entry of :func:`partial_products`, in one pass.

    Raises:
        ValueError: if a factor is negative or not finite.

    Examples:
        >>> largest_partial_product([0.01, 10.0, 5.0, 0.1])
        50.0
    """
    ending_here: Real = 1.0
    largest: Real = 1.0
    for factor in listed("factors", factors):
        ending_here = joined(ending_here * factor, 1.0)
        largest = joined(largest, ending_here)
    return largest
