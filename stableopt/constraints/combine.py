r"""New regularizers from old ones: products over slices, and the rules of proximal calculus.

All of them are data like their parts, so a combination has a spec, travels in parameter groups, and can be combined again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number, check_tensor, combined_step
from stableopt.constraints.base import Constraint, Regularizer
from stableopt.constraints.penalties import L2Squared
from stableopt.constraints.sharding import Sharding, is_sharded, on_whole, part_like

__all__ = ["Product", "Scaled", "SeparableSum", "Translated", "Weighted", "WithRidge"]


@dataclass(frozen=True)
class SeparableSum(Regularizer):
    r"""A penalty for each of several slices of one dimension, :math:`g(x) = \sum_k g_k(x_k)`; its prox is that of each slice.

    Args:
        parts: the regularizers, sets among them or not.
        sizes: how many entries along ``dim`` each of them takes, in order; all :math:`\ge 0`.
        dim: the dimension that is cut.

    Raises:
        TypeError: if a part is not a regularizer, or a size or the dimension is not an int.
        ValueError: if there are none, or not as many sizes as parts, or a size is negative; in use, if the sizes do not add up.

    Examples:
        >>> from stableopt.constraints import L1, NonNegative
        >>> g = SeparableSum((L1(1.0), NonNegative()), (1, 2))
        >>> g.prox(torch.tensor([3.0, -1.0, 5.0]))
        tensor([2., 0., 5.])
    """

    parts: tuple[Regularizer, ...]
    sizes: tuple[int, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        """Check the parts and the sizes."""
        _check_parts(self, Regularizer)

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every part is convex."""
        return all(part.convex for part in self.parts)

    @property
    def diagonal(self) -> bool:
        """Whether every part has an exact prox in a diagonal metric."""
        return all(part.diagonal for part in self.parts)

    def value(self, x: Tensor) -> Tensor:
        """Return the sum of the values of the slices (0-d, float64).

        Raises:
            TypeError: as the parts.
            ValueError: if the sizes do not add up to the dimension, or as the parts.
        """
        if is_sharded(x):
            return self.value(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        return torch.stack([part.value(piece) for part, piece, _ in _slices(self, x)]).sum()

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal points of the slices; the arguments and errors are those of the parts."""
        return _prox_of_slices(self, x, step, metric)


@dataclass(frozen=True)
class Product(Constraint):
    r"""The Cartesian product :math:`C_1 \times \dots \times C_k` of sets, over slices of one dimension.

    Args:
        parts: the sets.
        sizes: how many entries along ``dim`` each of them takes, in order; all :math:`\ge 0`.
        dim: the dimension that is cut.

    Raises:
        TypeError: if a part is not a constraint, or a size or the dimension is not an int.
        ValueError: if there are none, or not as many sizes as parts, or a size is negative; in use, if the sizes do not add up.

    Examples:
        >>> from stableopt.constraints import L2Ball, NonNegative
        >>> Product((L2Ball(1.0), NonNegative()), (2, 1)).project(torch.tensor([0.0, -3.0, -2.0]))
        tensor([ 0.0000, -1.0000,  0.0000])
    """

    parts: tuple[Constraint, ...]
    sizes: tuple[int, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        """Check the parts and the sizes."""
        _check_parts(self, Constraint)

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every part is convex."""
        return all(part.convex for part in self.parts)

    @property
    def diagonal(self) -> bool:
        """Whether every part has an exact projection in a diagonal metric."""
        return all(part.diagonal for part in self.parts)

    def project(self, x: Tensor) -> Tensor:
        """Return the projections of the slices.

        Raises:
            TypeError: as the parts.
            ValueError: if the sizes do not add up to the dimension, or as the parts.
        """
        if is_sharded(x):
            return on_whole("Product", self.project, x)
        pieces = [piece for _, piece, _ in _slices(self, x)]
        return torch.cat([c.project(piece) for c, piece in zip(self.parts, pieces, strict=True)], dim=self.dim)

    def violation(self, x: Tensor) -> float:
        """Return the largest violation of a slice.

        Raises:
            TypeError: as the parts.
            ValueError: if the sizes do not add up to the dimension, or as the parts.
        """
        if is_sharded(x):
            return self.violation(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        pieces = [piece for _, piece, _ in _slices(self, x)]
        return max(c.violation(piece) for c, piece in zip(self.parts, pieces, strict=True))

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projections of the slices, in the metric if every part has that; the errors are those of the parts."""
        return _prox_of_slices(self, x, step, metric)

    def map(self, x: Tensor) -> Tensor:
        """Return the maps of the slices."""
        pieces = [piece for _, piece, _ in _slices(self, x)]
        return torch.cat([c.map(piece) for c, piece in zip(self.parts, pieces, strict=True)], dim=self.dim)


class _Derived(Regularizer):
    """A function made from another one."""

    g: Regularizer

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner one is convex."""
        return self.g.convex

    @property
    def diagonal(self) -> bool:
        """Whether the inner one has an exact prox in a diagonal metric."""
        return self.g.diagonal

    def _check_inner(self) -> None:
        name = type(self).__name__
        if not isinstance(self.g, Regularizer):
            raise TypeError(f"{name} needs a regularizer as g, got {type(self.g).__name__}.")
        if isinstance(self.g, Constraint):
            raise TypeError(
                f"{name} is for penalties, got the set {self.g!r}: rounding would lead out of it. Use AffineImage."
            )

    def _step(self, x: Tensor, step: float | Tensor, metric: Tensor | None) -> float | Tensor:
        name = type(self).__name__
        check_tensor(name, x)
        s = combined_step(name, step, metric, x, diagonal=self.diagonal)
        if isinstance(s, Tensor) and s.numel() > 1 and is_sharded(x):
            layout = Sharding.of(name, x)  # pyright: ignore[reportArgumentType]
            return layout.wrap(part_like(x, s, layout))
        return s


@dataclass(frozen=True)
class Translated(_Derived):
    r"""A penalty around another point, :math:`h(x) = g(x - c)`; the prox is :math:`c + \operatorname{prox}_{sg}(x - c)`.

    Args:
        g: a penalty.
        offset: :math:`c`, the same number for all entries; finite.

    Raises:
        TypeError: if ``g`` is not a penalty, or the offset not a real number.
        ValueError: if the offset is not finite.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 2.2; the same for the other rules.

    Examples:
        >>> from stableopt.constraints import L1
        >>> Translated(L1(1.0), 2.0).prox(torch.tensor([5.0, 2.5]))
        tensor([4., 2.])
    """

    g: Regularizer
    offset: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        self._check_inner()
        object.__setattr__(self, "offset", check_number("Translated", "offset", self.offset))

    def value(self, x: Tensor) -> Tensor:
        """Return :math:`g(x - c)`."""
        check_tensor(type(self).__name__, x)
        return self.g.value(x - self.offset)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point; the errors are those of ``g``."""
        inner = self._step(x, step, metric)
        return self.offset + self.g.prox(x - self.offset, inner)


@dataclass(frozen=True)
class Scaled(_Derived):
    r"""A penalty in other units, :math:`h(x) = g(x / c)`; the prox is :math:`c \operatorname{prox}_{(s / c^2) g}(x / c)`.

    Args:
        g: a penalty.
        scale: :math:`c \ne 0`, finite.

    Raises:
        TypeError: if ``g`` is not a penalty, or the scale not a real number.
        ValueError: if the scale is 0 or not finite.

    Examples:
        >>> from stableopt.constraints import L1
        >>> Scaled(L1(1.0), 0.5).prox(torch.tensor([5.0, 1.0]))
        tensor([3., 0.])
    """

    g: Regularizer
    scale: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        self._check_inner()
        object.__setattr__(self, "scale", check_number("Scaled", "scale", self.scale))
        if self.scale == 0.0:
            raise ValueError("Scaled needs a scale other than 0.")

    def value(self, x: Tensor) -> Tensor:
        """Return :math:`g(x / c)`."""
        check_tensor(type(self).__name__, x)
        return self.g.value(x / self.scale)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point; the errors are those of ``g``."""
        inner = self._step(x, step, metric) / self.scale / self.scale
        return self.scale * self.g.prox(x / self.scale, inner)


@dataclass(frozen=True)
class Weighted(_Derived):
    r"""A penalty times a number, :math:`h = w g`; its prox is that of g with step :math:`sw`.

    Args:
        g: a penalty.
        weight: :math:`w`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if ``g`` is not a penalty, or the weight not a real number.
        ValueError: if the weight is negative or not finite.

    Examples:
        >>> from stableopt.constraints import L1
        >>> Weighted(L1(1.0), 2.0).prox(torch.tensor([5.0, 1.0]))
        tensor([3., 0.])
    """

    g: Regularizer
    weight: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        self._check_inner()
        object.__setattr__(self, "weight", check_number("Weighted", "weight", self.weight, low=0.0))

    def value(self, x: Tensor) -> Tensor:
        """Return :math:`w g(x)`."""
        check_tensor(type(self).__name__, x)
        return self.weight * self.g.value(x)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point; the errors are those of ``g``."""
        return self.g.prox(x, self._step(x, step, metric) * self.weight)


@dataclass(frozen=True)
class WithRidge(_Derived):
    r"""A penalty plus a parabola, :math:`h(x) = g(x) + \tfrac{w}{2} \|x\|^2`.

    .. math:: \operatorname{prox}_{sh}(x) = \operatorname{prox}_{\frac{s}{1 + sw} g}\Bigl(\frac{x}{1 + sw}\Bigr).

    Args:
        g: a penalty.
        weight: :math:`w`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if ``g`` is not a penalty, or the weight not a real number.
        ValueError: if the weight is negative or not finite.

    Examples:
        >>> from stableopt.constraints import L1
        >>> WithRidge(L1(1.0), 1.0).prox(torch.tensor([5.0, 1.0]))
        tensor([2., 0.])
    """

    g: Regularizer
    weight: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        self._check_inner()
        object.__setattr__(self, "weight", check_number("WithRidge", "weight", self.weight, low=0.0))

    def value(self, x: Tensor) -> Tensor:
        """Return the penalty plus the parabola."""
        check_tensor(type(self).__name__, x)
        return self.g.value(x) + L2Squared(self.weight).value(x)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point; the errors are those of ``g``."""
        s = self._step(x, step, metric)
        growth = 1.0 + s * self.weight
        return self.g.prox((x / growth).to(x.dtype), s / growth)


def _check_parts(whole: SeparableSum | Product, kind: type[Regularizer]) -> None:
    name, parts, sizes = type(whole).__name__, whole.parts, whole.sizes
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(p, kind) for p in parts):
        raise TypeError(f"{name} needs a tuple of {kind.__name__} objects as parts, got {parts!r}.")
    counts = [*sizes, whole.dim] if isinstance(sizes, list | tuple) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
        raise TypeError(f"{name} needs a tuple of ints as sizes and an int as dim, got {sizes!r} and {whole.dim!r}.")
    if len(sizes) != len(parts) or any(n < 0 for n in sizes):
        raise ValueError(f"{name} needs one size >= 0 for each of {len(parts)} parts, got {sizes!r}.")
    object.__setattr__(whole, "parts", tuple(parts))
    object.__setattr__(whole, "sizes", tuple(sizes))


def _slices(
    whole: SeparableSum | Product, x: Tensor, step: Tensor | None = None
) -> Iterator[tuple[Regularizer, Tensor, Tensor | None]]:
    """Yield each part with its slice of the point and of the steps."""
    check_tensor(type(whole).__name__, x)
    if not -x.ndim <= whole.dim < x.ndim or x.shape[whole.dim] != sum(whole.sizes):
        raise ValueError(
            f"{type(whole).__name__} with sizes {whole.sizes} along dim {whole.dim} needs {sum(whole.sizes)} entries there, "
            f"got shape {tuple(x.shape)}."
        )
    pieces = x.split(list(whole.sizes), dim=whole.dim)
    steps = [None] * len(pieces) if step is None else step.expand(x.shape).split(list(whole.sizes), dim=whole.dim)
    yield from zip(whole.parts, pieces, steps, strict=True)


def _prox_of_slices(whole: SeparableSum | Product, x: Tensor, step: float | Tensor, metric: Tensor | None) -> Tensor:
    name = type(whole).__name__
    check_tensor(name, x)
    step = combined_step(name, step, metric, x, diagonal=whole.diagonal)
    if is_sharded(x):
        full = step.full_tensor() if is_sharded(step) else step  # pyright: ignore[reportAttributeAccessIssue]
        return on_whole(name, lambda t: _prox_of_slices(whole, t, full, None), x)
    if isinstance(step, Tensor) and step.numel() > 1:
        moved = [part.prox(piece, s) for part, piece, s in _slices(whole, x, step) if s is not None]
    else:
        moved = [part.prox(piece, step) for part, piece, _ in _slices(whole, x)]
    return torch.cat(moved, dim=whole.dim)
