"""Casts and scalings whose rounding goes one known way, so that a set that holds before the cast holds after it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["COMPLEX_DTYPES", "STORAGE_DTYPES", "round_down_to", "round_up_to", "toward_zero", "unit_scale"]

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
STORAGE_DTYPES = tuple(_BITS)
"""The dtypes in which a constraint can promise feasibility of the stored numbers."""
COMPLEX_DTYPES = (torch.complex128, torch.complex64)
"""The complex ones, for what depends on the moduli of the entries only."""


def toward_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Cast float64 numbers to ``dtype``, rounding toward zero: :math:`|\mathrm{cast}(x_i)| \le |x_i|` for every entry.

    Complex numbers are cast part by part.

    A finite number that is too large for ``dtype`` becomes the largest finite one; infinity and NaN stay what they are.

    Args:
        x: float64 or complex128 tensor of any shape.
        dtype: float64, float32, bfloat16 or float16; complex128 or complex64 for a complex tensor.

    Returns:
        New tensor without gradient, except that a float64 ``x`` asked for as float64 is returned as it is.

    Raises:
        TypeError: if ``x`` has another dtype, or ``dtype`` is another one.

    Examples:
        >>> third = torch.tensor(2 / 3, dtype=torch.float64)
        >>> third.to(torch.bfloat16).item() > 2 / 3 > toward_zero(third, torch.bfloat16).item()
        True
    """
    if x.dtype == torch.complex128 and dtype in COMPLEX_DTYPES:
        return torch.view_as_complex(toward_zero(torch.view_as_real(x.detach().resolve_conj()), dtype.to_real()))
    if x.dtype != torch.float64 or dtype not in _BITS:
        raise TypeError(
            f"toward_zero casts float64 to one of {[str(d) for d in STORAGE_DTYPES]}, got {x.dtype} to {dtype}."
        )
    if dtype == torch.float64:
        return x.detach()
    near = x.detach().to(dtype)
    # A nearest cast gives one of the two neighbors. The outer one has the larger bit pattern, in either sign.
    inner = (near.view(_BITS[dtype]) - 1).view(dtype)
    return torch.where(near.double().abs() > x.detach().abs(), inner, near)


def round_down_to(value: float, dtype: torch.dtype) -> float:
    r"""Return the largest number of ``dtype`` that is not above ``value``.

    Args:
        value: any float but NaN; infinities pass through.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        A float that ``dtype`` represents exactly, or :math:`-\infty` below its range.

    Examples:
        >>> round_down_to(0.1, torch.float16)
        0.0999755859375
        >>> round_down_to(1e6, torch.float16), round_down_to(-1e6, torch.float16)
        (65504.0, -inf)
    """
    info = torch.finfo(dtype)
    if dtype == torch.float64 or math.isinf(value):
        return value
    if abs(value) > info.max:
        return info.max if value > 0 else -math.inf
    exponent = math.frexp(value)[1]  # 2^(e-1) <= |value| < 2^e
    unit = max(2.0**exponent * info.eps / 2, info.smallest_normal * info.eps)
    return math.floor(value / unit) * unit  # all three are exact: a power of two only moves the exponent


def round_up_to(value: float, dtype: torch.dtype) -> float:
    r"""Return the smallest number of ``dtype`` that is not below ``value``.

    Args:
        value: any float but NaN; infinities pass through.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        A float that ``dtype`` represents exactly, or :math:`\infty` above its range.

    Examples:
        >>> round_up_to(0.1, torch.float16)
        0.10003662109375
    """
    return 0.0 - round_down_to(-value, dtype)  # not unary minus: it would make -0.0 of 0.0


def unit_scale(top: Tensor) -> Tensor:
    r"""Return the power of two that brings a number :math:`t \ge 0` to size about 1.

    Multiplying by it is exact, and :math:`t \cdot 2^{-e} < 4`, so sums of squares neither overflow nor lose the largest entry.
    The power is built from its bits, because no library promises that its ``pow`` or ``exp2`` is exact.

    Args:
        top: float64 tensor of any shape, entries not negative, such as the largest magnitude of a tensor.

    Returns:
        Float64 tensor of the same shape, every entry in :math:`[2^{-1022}, 2^{1022}]`, also for 0, infinity and NaN.

    Examples:
        >>> unit_scale(torch.tensor(10.0, dtype=torch.float64)).item()
        0.125
    """
    biased = top.detach().view(torch.int64) >> 52
    return ((2046 - biased).clamp(1, 2045) << 52).view(torch.float64)
