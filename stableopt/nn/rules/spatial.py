r"""The rules of maps that copy pixels: padding, upsampling, and the windows of Unfold and Fold.

A map whose outputs are copies of pixels has the constants :math:`\sqrt m` in l2, :math:`m` in l1 and 1 in linf, where :math:`m` is
the largest number of copies of one pixel. A module does not know the size of its images: :math:`m` is the largest number over all
sizes that it accepts.
"""

from __future__ import annotations

import math
import operator
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.dispatch import lipschitz_rule

__all__ = ["copies_bound", "per_axis", "shared_windows"]

_ConstantPad: TypeAlias = nn.ConstantPad1d | nn.ConstantPad2d | nn.ConstantPad3d
_CopyingPad: TypeAlias = (
    nn.ReplicationPad1d
    | nn.ReplicationPad2d
    | nn.ReplicationPad3d
    | nn.ReflectionPad1d
    | nn.ReflectionPad2d
    | nn.ReflectionPad3d
    | nn.CircularPad1d
    | nn.CircularPad2d
    | nn.CircularPad3d
)


def copies_bound(copies: int, norm: str) -> Bound:
    r"""Return the constant of a map with rows of sum 1 and columns of sum at most ``copies``, all entries non-negative.

    The row sums are the linf norm, the column sums the l1 norm, and the l2 norm is at most the root of their product.

    Args:
        copies: the largest number of copies of one entry.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Examples:
        >>> copies_bound(4, "l2"), copies_bound(4, "linf").upper, copies_bound(4, "l1").upper
        (Bound(lower=0.0, upper=2.0, proved=True), 1.0, 4.0)
    """
    if norm == "linf":
        return Bound(0.0, 1.0)
    return Bound(0.0, Bound.point(copies).sqrt().upper if norm == "l2" else float(copies))


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number per axis of an option that is a number or a sequence.

    Raises:
        ValueError: if it is no integer, also not one of numpy, and no sequence of as many.

    Examples:
        >>> per_axis(2, 3), per_axis((1, 2), 2)
        ((2, 2, 2), (1, 2))
    """
    try:
        values = tuple(operator.index(v) for v in (value if isinstance(value, tuple | list) else [value]))
    except TypeError:
        values = ()
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(f"expected an integer or {dims} of them, got {value!r}.")
    return values


def shared_windows(kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> int:
    r"""Return how many windows share a pixel at most: :math:`\prod \lceil k \gcd(d, s) / s \rceil`.

    The taps :math:`j` that read one pixel are those with the same :math:`jd` modulo :math:`s`.

    Examples:
        >>> shared_windows((3,), (1,), (1,)), shared_windows((4,), (4,), (2,))
        (3, 2)
    """
    sizes = zip(kernel, stride, dilation, strict=True)
    return math.prod(-(-k * math.gcd(d, s) // s) for k, s, d in sizes)


# Padding.


@lipschitz_rule.register(nn.ConstantPad1d)
@lipschitz_rule.register(nn.ConstantPad2d)
@lipschitz_rule.register(nn.ConstantPad3d)
def _constant_pad(module: _ConstantPad, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    """Return 1: the constant drops out of a difference. ZeroPad1d to 3d inherit it; a negative padding crops."""
    value = module.value
    if not math.isfinite(value):
        raise ValueError(f"the value of {type(module).__name__} must be finite, got {value!r}.")
    return Bound(0.0, 1.0)


def _sides(module: _CopyingPad) -> list[tuple[int, int]]:
    """Return the padding per axis as (before, after), a crop counted as 0."""
    flat = [max(0, int(p)) for p in module.padding]
    return list(zip(flat[::2], flat[1::2], strict=True))


@lipschitz_rule.register(nn.ReplicationPad1d)
@lipschitz_rule.register(nn.ReplicationPad2d)
@lipschitz_rule.register(nn.ReplicationPad3d)
def _replication_pad(module: _CopyingPad, norm: str) -> Bound:
    """Count the copies in an image of a single pixel, which has them all."""
    return copies_bound(math.prod(1 + before + after for before, after in _sides(module)), norm)


@lipschitz_rule.register(nn.ReflectionPad1d)
@lipschitz_rule.register(nn.ReflectionPad2d)
@lipschitz_rule.register(nn.ReflectionPad3d)
def _wrapping_pad(module: _CopyingPad, norm: str) -> Bound:
    """Count the pixel and one copy per side: torch refuses paddings so wide that a side would show a pixel twice.

    On the smallest image that torch accepts both sides show a common pixel, or, in a circle of one pixel, the only one.
    """
    return copies_bound(math.prod(1 + (before > 0) + (after > 0) for before, after in _sides(module)), norm)


@lipschitz_rule.register(nn.CircularPad1d)
@lipschitz_rule.register(nn.CircularPad2d)
@lipschitz_rule.register(nn.CircularPad3d)
def _circular_pad(module: _CopyingPad, norm: str) -> Bound:
    """Bound it like a reflection, unless it crops and wraps at once: torch then reads memory that it has not written."""
    if min(module.padding) < 0 < max(module.padding):
        raise UncertifiableError(
            f"{module} crops one side and wraps another, for which torch returns undefined numbers; crop first, then pad by "
            "numbers >= 0."
        )
    return _wrapping_pad(module, norm)


# Upsampling.

_AXES = {"linear": 1, "bilinear": 2, "trilinear": 3}


@lipschitz_rule.register(nn.Upsample)
@lipschitz_rule.register(nn.UpsamplingNearest2d)
@lipschitz_rule.register(nn.UpsamplingBilinear2d)
def _upsample(module: nn.Upsample, norm: str) -> Bound:
    """Bound an interpolation whose weights are non-negative with sum 1 by the total weight of a pixel.

    With a scale of 1 that is 1. A factor ``s`` gives the nearest pixel to ``s`` outputs. Linear weights of an integer factor have
    the total ``s`` too: at half-pixel places they are symmetric, and the edge takes what is cut off. With a fixed output ``size``
    the smallest image has one pixel, which all outputs copy.
    """
    if module.mode not in {"nearest", "nearest-exact", *_AXES}:
        why = "has negative weights and no rule" if module.mode == "bicubic" else "is no mode with a rule"
        raise UncertifiableError(
            f"{module} has the mode {module.mode!r}, which {why}; use mode='nearest' or 'bilinear'."
        )
    if norm == "linf":
        return copies_bound(1, norm)
    axes = 2 if isinstance(module, nn.UpsamplingNearest2d) else _AXES.get(module.mode)
    name, given = ("size", module.size) if module.size is not None else ("scale_factor", module.scale_factor or 1.0)
    if isinstance(given, tuple | list):
        values = tuple(given)
    elif axes is None and given != 1:
        raise UncertifiableError(
            f"{module} has one {name} for a number of axes that it does not know; give a {name} per axis, for example "
            f"{name}={(given, given)}."
        )
    else:
        values = (given,) * (axes or 1)
    if name == "size":
        return copies_bound(math.prod(per_axis(values, axes or len(values))), norm)
    return copies_bound(math.prod(_copies_of_factor(float(f), module) for f in values), norm)


def _copies_of_factor(factor: float, module: nn.Upsample) -> int:
    nearest = module.mode.startswith("nearest")
    whole = factor == int(factor) and factor >= 1
    if not nearest and (module.align_corners or not whole):
        raise UncertifiableError(
            f"{module} has weights that depend on the size of the image; a bound is known for align_corners=False and an integer "
            "scale_factor, or for a fixed size."
        )
    if whole and (not nearest or all(_rounds_up(int(factor), kind) for kind in (np.float32, np.float64))):
        return int(factor)
    return math.ceil(factor) + 1  # an index computed as i * (1 / factor) in floating point may fall one pixel short


def _rounds_up(factor: int, kind: type[np.floating]) -> bool:
    """Return whether 1 / factor is stored as a number that is not too small."""
    return Fraction(float(kind(1.0) / kind(factor))) >= Fraction(1, factor)


# Windows as columns.


def _window_count(module: nn.Unfold | nn.Fold) -> int:
    kernel, stride, dilation = (per_axis(v, 2) for v in (module.kernel_size, module.stride, module.dilation))
    return shared_windows(kernel, stride, dilation)


@lipschitz_rule.register(nn.Unfold)
def _unfold(module: nn.Unfold, norm: str) -> Bound:
    return copies_bound(_window_count(module), norm)


@lipschitz_rule.register(nn.Fold)
def _fold(module: nn.Fold, norm: str) -> Bound:
    """Bound the adjoint of Unfold, which sums what the windows hold: linf and l1 change places."""
    return copies_bound(_window_count(module), {"linf": "l1", "l1": "linf"}.get(norm, norm))
