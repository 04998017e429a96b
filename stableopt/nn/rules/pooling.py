r"""The rules of pooling.

A pixel is read by several windows where they overlap. The l2 constant of a maximum is the root of the largest number of windows
that share a pixel, its l1 constant that number, its linf constant 1; a single bright pixel attains the first two.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TypeAlias

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, round_up
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.rules.spatial import copies_bound, per_axis, shared_windows

__all__: list[str] = []

_Adaptive: TypeAlias = (
    nn.AdaptiveAvgPool1d
    | nn.AdaptiveAvgPool2d
    | nn.AdaptiveAvgPool3d
    | nn.AdaptiveMaxPool1d
    | nn.AdaptiveMaxPool2d
    | nn.AdaptiveMaxPool3d
)

_DIMS: dict[type[nn.Module], int] = {
    kind: dims
    for dims, kinds in enumerate(
        (
            (nn.AvgPool1d, nn.MaxPool1d, nn.LPPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
            (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
            (nn.AvgPool3d, nn.MaxPool3d, nn.LPPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
        ),
        start=1,
    )
    for kind in kinds
}


def _dims(module: nn.Module) -> int:
    return next(dims for kind, dims in _DIMS.items() if isinstance(module, kind))


# Averages.


@lipschitz_rule.register(nn.AvgPool1d)
@lipschitz_rule.register(nn.AvgPool2d)
@lipschitz_rule.register(nn.AvgPool3d)
def _avg_pool(module: nn.AvgPool2d, norm: str) -> Bound:
    r"""Bound an average over windows, the Kronecker product of one matrix per axis.

    With a fixed divisor it is a sum over windows of :math:`k` pixels at distance :math:`s`, divided by :math:`k`; see
    ``_window_sum``. Otherwise (``ceil_mode``, or padding that is not counted) a window at the edge has a larger weight: rows have
    the sum 1, or less with counted padding, and the largest column sum is found exactly by listing small images.
    """
    dims, divisor = _dims(module), getattr(module, "divisor_override", None)
    kernel, stride, padding = (per_axis(v, dims) for v in (module.kernel_size, module.stride, module.padding))
    if divisor is None and (module.ceil_mode or (any(padding) and not module.count_include_pad)):
        columns = math.prod(
            _largest_column(k, s, p, counted=module.count_include_pad, ceil=module.ceil_mode)
            for k, s, p in zip(kernel, stride, padding, strict=True)
        )
        sums = {"linf": Bound.point(1.0), "l1": Bound(0.0, round_up(Fraction(columns)))}
        return Bound(0.0, sums[norm].upper if norm in sums else Bound.point(sums["l1"].upper).sqrt().upper)
    return Bound(0.0, (_window_sum(kernel, stride, norm) / abs(divisor or math.prod(kernel))).upper)


def _window_sum(kernel: tuple[int, ...], stride: tuple[int, ...], norm: str) -> Bound:
    r"""Bound the sum over windows of :math:`k` pixels at distance :math:`s`, per axis.

    Split the taps by their place modulo s: with k = qs + r, r classes have q + 1 taps and s - r have q. An output reads one pixel
    of each class, so in l2 its symbol is a row of s polynomials with coefficients 1, whose length is largest at frequency 0:
    :math:`\sqrt{r(q+1)^2 + (s-r)q^2}`, which large images attain. In linf it is :math:`k`, in l1 the number of windows that share a
    pixel.
    """
    if norm == "linf":
        return Bound.point(math.prod(kernel))
    if norm == "l1":
        return Bound.point(shared_windows(kernel, stride, (1,) * len(kernel)))
    product = Bound.point(1.0)
    for k, s in zip(kernel, stride, strict=True):
        q, r = divmod(k, s)
        product = product * Bound.point(r * (q + 1) ** 2 + (s - r) * q**2).sqrt()
    return product


def _largest_column(kernel: int, stride: int, padding: int, *, counted: bool, ceil: bool) -> Fraction:
    """Return the largest column sum of an average along one axis, over all sizes of the image.

    Once an image is longer than twice all of it, only its size modulo the stride changes the edges.
    """
    longest = 2 * (kernel + padding + stride) + stride
    return max(
        _column_of_size(n, kernel, stride, padding, counted=counted, ceil=ceil)
        for n in range(max(1, kernel - 2 * padding if not ceil else 1), longest + 1)
    )


def _column_of_size(n: int, kernel: int, stride: int, padding: int, *, counted: bool, ceil: bool) -> Fraction:
    room = n + 2 * padding - kernel
    outputs = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (outputs - 1) * stride >= n + padding:  # as torch: no window starts in the padding on the right
        outputs -= 1
    columns = [Fraction(0)] * n
    for start in range(-padding, -padding + outputs * stride, stride):
        end = min(start + kernel, n + padding)
        first, last = max(start, 0), min(end, n)
        for pixel in range(first, last):
            columns[pixel] += Fraction(1, end - start if counted else last - first)
    return max(columns)


@lipschitz_rule.register(nn.AdaptiveAvgPool1d)
@lipschitz_rule.register(nn.AdaptiveAvgPool2d)
@lipschitz_rule.register(nn.AdaptiveAvgPool3d)
@lipschitz_rule.register(nn.AdaptiveMaxPool1d)
@lipschitz_rule.register(nn.AdaptiveMaxPool2d)
@lipschitz_rule.register(nn.AdaptiveMaxPool3d)
def _adaptive_pool(module: _Adaptive, norm: str) -> Bound:
    """Bound the pool on its smallest image, one pixel, which all outputs copy; an axis with output size None is kept.

    On any image a pixel has weight at most 1 in each output, so no image is worse.
    """
    if getattr(module, "return_indices", False):
        raise UncertifiableError(f"{module} also returns indices; a bound is known for return_indices=False.")
    size = module.output_size
    sizes = size if isinstance(size, tuple | list) else (size,) * _dims(module)
    return copies_bound(math.prod(1 if n is None else int(n) for n in sizes), norm)


# Maxima and means of powers.


@lipschitz_rule.register(nn.MaxPool1d)
@lipschitz_rule.register(nn.MaxPool2d)
@lipschitz_rule.register(nn.MaxPool3d)
def _max_pool(module: nn.MaxPool2d, norm: str) -> Bound:
    if module.return_indices:
        raise UncertifiableError(f"{module} also returns indices; a bound is known for return_indices=False.")
    dims = _dims(module)
    kernel, stride, dilation = (per_axis(v, dims) for v in (module.kernel_size, module.stride, module.dilation))
    return copies_bound(shared_windows(kernel, stride, dilation), norm)


@lipschitz_rule.register(nn.LPPool1d)
@lipschitz_rule.register(nn.LPPool2d)
@lipschitz_rule.register(nn.LPPool3d)
def _lp_pool(module: nn.LPPool2d, norm: str) -> Bound:
    r"""Bound :math:`\|x_w\|_p` over windows :math:`w` of :math:`K` pixels, :math:`p` even, by the norm that it does not exceed.

    :math:`|\|x_w\|_p - \|y_w\|_p| \le \|x_w - y_w\|_p`, which is at most the l2 norm, at most the l1 norm, and at most
    :math:`K^{1/p}` times the largest entry. For :math:`p = 1` torch sums the entries with their signs: a linear map.
    """
    dims, p = _dims(module), float(module.norm_type)
    kernel = per_axis(module.kernel_size, dims)
    stride = kernel if module.stride is None else per_axis(module.stride, dims)
    if module.ceil_mode:
        raise UncertifiableError(
            f"{module} gives windows at the edge another weight; a bound is known for ceil_mode=False."
        )
    if p == 1:
        return Bound(0.0, _window_sum(kernel, stride, norm).upper)
    if not (2 <= p <= 64 and p % 2 == 0):
        raise UncertifiableError(
            f"{module} takes powers with exponent {p} of entries that may be negative, which are undefined or cancel; a bound is "
            "known for norm_type 1 and even numbers up to 64."
        )
    if norm == "linf":
        return Bound(0.0, _root_up(math.prod(kernel), int(p)))
    return copies_bound(shared_windows(kernel, stride, (1,) * dims), norm)


def _root_up(value: int, p: int) -> float:
    root = value ** (1.0 / p)
    while Fraction(root) ** p < value:
        root = math.nextafter(root, math.inf)
    return root


@lipschitz_rule.register(nn.FractionalMaxPool2d)
@lipschitz_rule.register(nn.FractionalMaxPool3d)
def _fractional_max_pool(module: nn.Module, norm: str) -> Bound:
    raise UncertifiableError(
        f"no {norm} Lipschitz rule is known for {type(module).__name__}: it draws its windows at random, in evaluation mode too, "
        "so two runs differ on the same input. Use nn.MaxPool2d, nn.MaxPool3d or adaptive pooling."
    )
