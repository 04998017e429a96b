r"""T7, attention and normalization: Lipschitz constants where there are any.

Dot-product attention is not Lipschitz on the whole space. With queries, keys and values clipped to balls it is, in the norm
:math:`\max_i\|x_i\|_2` over the tokens, with a constant that does not depend on the length or the mask.
"""

from __future__ import annotations

from collections.abc import Iterable

from stableopt.linalg.bound import Real
from stableopt.theory._arguments import finite, nonnegative, positive, real_sqrt

__all__ = ["attention_constant", "attention_head_constant", "normalization_constant"]


def attention_head_constant(
    query_norm: Real,
    key_norm: Real,
    value_norm: Real,
    *,
    query_radius: Real,
    key_radius: Real,
    value_radius: Real,
    logit_scale: Real,
) -> Real:
    r"""Bound one head of clipped attention: :math:`\|W_V\|+sR_v(R_k\|W_Q\|+R_q\|W_K\|)` in the token-max norm.

    Args:
        query_norm: :math:`\|W_Q\|_2`.
        key_norm: :math:`\|W_K\|_2`.
        value_norm: :math:`\|W_V\|_2`.
        query_radius: :math:`R_q`, the ball to which queries are clipped.
        key_radius: :math:`R_k`.
        value_radius: :math:`R_v`.
        logit_scale: s >= 0, commonly one over the root of the head dimension.

    Returns:
        The constant, for any length and any mask; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> attention_head_constant(1.0, 1.0, 1.0, query_radius=2.0, key_radius=2.0, value_radius=1.0, logit_scale=0.5)
        3.0
    """
    q = nonnegative("key_radius", key_radius) * nonnegative("query_norm", query_norm)
    k = nonnegative("query_radius", query_radius) * nonnegative("key_norm", key_norm)
    logits = nonnegative("logit_scale", logit_scale) * (q + k)
    return nonnegative("value_norm", value_norm) + nonnegative("value_radius", value_radius) * logits


def attention_constant(output_norm: Real, heads: Iterable[Real]) -> Real:
    r"""Bound multi-head clipped attention in the token-max norm: :math:`\|W_O\|\sqrt{\sum_h c_h^2}`.

    Args:
        output_norm: :math:`\|W_O\|_2`.
        heads: the constants :math:`c_h` of :func:`attention_head_constant`.

    Returns:
        The constant; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite.

    Examples:
        >>> attention_constant(0.5, heads=[3.0, 4.0])
        2.5
    """
    squares: Real = 0.0
    for i, head in enumerate(heads):
        squares = squares + nonnegative(f"heads[{i}]", head) ** 2
    return nonnegative("output_norm", output_norm) * real_sqrt(squares)


def normalization_constant(scale: Real, eps: Real = 1e-5) -> Real:
    r"""Bound LayerNorm and RMSNorm: :math:`\|\gamma\|_\infty/\sqrt\varepsilon`, attained by RMSNorm at zero; 316 at 1e-5.

    Args:
        scale: the largest modulus of a gain :math:`\gamma_i`.
        eps: :math:`\varepsilon > 0`, as it is added to the variance.

    Returns:
        The constant in the Euclidean norm; a Bound if an operand is one.

    Raises:
        ValueError: if the scale is negative or eps is not positive.

    Examples:
        >>> normalization_constant(1.0, eps=0.25)
        2.0
        >>> round(normalization_constant(1.0, eps=1e-5))
        316
    """
    finite("eps", eps)
    return nonnegative("scale", scale) / real_sqrt(positive("eps", eps))
