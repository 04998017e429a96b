r"""T7, attention and normalization: Lipschitz constants where there are any.

Dot-product attention is not Lipschitz on the whole space. With queries, keys and values clipped to balls it is, in the norm
:math:`\max_i\|x_i\|_2` over the tokens, with a constant that does not depend on the length or the mask. Without a mask clipped
logits also bound how often one token can be attended to, and with it the constant in the Euclidean norm of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

from stableopt.linalg.bound import Real, upper
from stableopt.theory._arguments import finite, increasing, nonnegative, positive, real_exp, real_log, real_sqrt

__all__ = ["attention_constant", "attention_head_constant", "attention_weight_sum", "normalization_constant"]


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
    r"""Bound one head of clipped attention in the token-max norm, with :math:`\kappa = sR_vR_q\|W_K\|`.

    .. math:: \tfrac12\bigl(\|W_V\| + \kappa + \sqrt{\|W_V\|^2 + \kappa^2}\bigr) + sR_vR_k\|W_Q\|
        \;\le\; \|W_V\| + sR_v(R_k\|W_Q\| + R_q\|W_K\|) .

    The output of a token is :math:`E v`, the mean under its row P of the softmax. Perturbations :math:`\delta_j` of the tokens and
    :math:`\delta` of the token itself change it by

    .. math:: E[D_jW_V\delta_j] + s\,E[(v_j - E v)\,q^\top D'_jW_K\delta_j] + s\operatorname{Cov}(v, k)\,D''W_Q\,\delta ,

    with Jacobians :math:`0 \preceq D \preceq I` of projections onto balls. As :math:`\|v\| \le R_v`, the spread
    :math:`E\|v - E v\|^2` is at most :math:`R_v^2`; by Cauchy-Schwarz the last term is at most :math:`sR_vR_k\|W_Q\|`. In the
    others write :math:`D = (I + C)/2` with :math:`\|C\| \le 1`. The part of C is at most
    :math:`\tfrac12(\|W_V\| + \kappa)`. The part of I is half of :math:`W_Vm + s\operatorname{Cov}(v, \delta)W_K^\top q` with
    :math:`m = E\delta`, and :math:`E\|\delta - m\|^2 \le 1 - \|m\|^2`: at most :math:`\tfrac12\sqrt{\|W_V\|^2 + \kappa^2}`. Each
    of the three terms alone is attained.

    Note:
        Without the part of C it is false: a projection may turn equal perturbations of two keys into opposite changes of logits.

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
        >>> attention_head_constant(0.0, 1.0, 0.75, query_radius=2.0, key_radius=2.0, value_radius=1.0, logit_scale=0.5)
        1.5
        >>> attention_head_constant(1.0, 1.0, 0.75, query_radius=2.0, key_radius=2.0, value_radius=1.0, logit_scale=0.5)
        2.5
    """
    spread = nonnegative("logit_scale", logit_scale) * nonnegative("value_radius", value_radius)
    q = spread * (nonnegative("key_radius", key_radius) * nonnegative("query_norm", query_norm))
    k = spread * (nonnegative("query_radius", query_radius) * nonnegative("key_norm", key_norm))
    v = nonnegative("value_norm", value_norm)
    return 0.5 * (v + k + real_sqrt(v**2 + k**2)) + q


def attention_constant(
    output_norm: Real, heads: Iterable[Real], *, queries: Real = 0.0, weight_sums: Iterable[Real] | None = None
) -> Real:
    r"""Bound multi-head clipped attention: :math:`\|W_O\|\bigl(\sqrt{\sum_h S_h c_h^2} + c_Q\bigr)`.

    With :math:`S_h = 1` in the token-max norm. In the Euclidean norm of the whole sequence :math:`S_h` bounds the sum of the
    attention weights that a token gets, see :func:`attention_weight_sum`: the first two terms of a head change output i by at
    most :math:`c_h\sqrt{\sum_j P_{ij}\|\delta_j\|^2}`, and the squares add up to :math:`S_h c_h^2\|\delta\|^2`.

    Args:
        output_norm: :math:`\|W_O\|_2`.
        heads: the constants :math:`c_h` of :func:`attention_head_constant`.
        queries: :math:`c_Q`, the norm of all matrices :math:`s_hR_vR_kW_Q^h` stacked, if the constants of the heads leave them out
            (``query_norm=0``). All heads have the same perturbation of the query, so this is smaller for many heads.
        weight_sums: :math:`S_h`, one per head; None for 1.

    Returns:
        The constant; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is negative or not finite, or there is not one weight sum per head.

    Examples:
        >>> attention_constant(0.5, heads=[3.0, 4.0])
        2.5
        >>> attention_constant(0.5, heads=[3.0, 4.0], queries=1.0, weight_sums=[4.0, 4.0])
        5.5
    """
    constants = [nonnegative(f"heads[{i}]", c) for i, c in enumerate(heads)]
    sums = [1.0] * len(constants) if weight_sums is None else list(weight_sums)
    if len(sums) != len(constants):
        raise ValueError(f"weight_sums must have one number per head, got {len(sums)} for {len(constants)} heads.")
    squares: Real = 0.0
    for i, (c, S) in enumerate(zip(constants, sums, strict=True)):
        squares = squares + nonnegative(f"weight_sums[{i}]", S) * c**2
    return nonnegative("output_norm", output_norm) * (real_sqrt(squares) + nonnegative("queries", queries))


def attention_weight_sum(logit_limit: Real, length: int | None = None, *, causal: bool = False) -> Real:
    r"""Bound the sum :math:`\sum_i P_{ij}` of the weights that one token gets if no logit exceeds B in modulus.

    One of n allowed tokens has a weight of at most :math:`1/(1+(n-1)\epsilon)`, :math:`\epsilon = e^{-2B}`. Without a mask n is the
    length N and the sum is at most :math:`N/(1+(N-1)\epsilon) < e^{2B}`, for any length. With a causal mask token i has n = i, and
    the sum is at most :math:`1+\epsilon^{-1}\log(1+(N-1)\epsilon)`. For any other mask only N is known.

    Args:
        logit_limit: :math:`B \ge 0`, for clipped attention :math:`sR_qR_k`.
        length: the largest number N of tokens; None for any.
        causal: whether a token attends only to itself and to those before it.

    Returns:
        The bound, at least 1; a Bound if the limit is one.

    Raises:
        ValueError: if the limit is negative or not finite, the length is no positive integer, or it is None for a causal mask,
            whose sums grow with the logarithm of the length.

    Examples:
        >>> round(attention_weight_sum(1.0), 3), round(attention_weight_sum(1.0, 4), 3)
        (7.389, 2.845)
        >>> attention_weight_sum(0.0, 4, causal=False)
        1.0
    """
    B = nonnegative("logit_limit", logit_limit)
    if length is None:
        if causal:
            raise ValueError("the weight sums of causal attention grow with the length; give the largest length.")
        return real_exp(2 * B)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length must be an integer >= 1 or None, got {length!r}.")
    return increasing(lambda B: _causal_sum(B, length) if causal else _sum(B, length), B)


def _sum(B: Real, N: int) -> Real:
    return N / (1.0 + (N - 1) * real_exp(-2 * B))


def _causal_sum(B: Real, N: int) -> Real:
    epsilon = real_exp(-2 * B)
    others = (N - 1) * epsilon
    if upper(others) < 1e-6:  # log(1 + x) <= x loses nothing here
        return N + 0.0 * epsilon
    return 1.0 + real_log(1.0 + others) / epsilon


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
