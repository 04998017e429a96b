r"""A set somewhere else and in another size: translations and scalings of sets, feasible as stored.

The projection on :math:`c + \alpha C` is :math:`c + \alpha P_C((x - c) / \alpha)`, for any metric as well. Sum and product round,
and a rounding may lead out of the set; then the point is pulled towards the center c, in steps that start at the rounding error and
double, until it is found inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number, check_numbers, check_tensor
from stableopt.constraints.base import Constraint
from stableopt.constraints.layout import substitute
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.errors import InfeasibleError

__all__ = ["AffineImage"]


@dataclass(frozen=True)
class AffineImage(Constraint):
    r"""A set translated and scaled, :math:`\{c + \alpha y : y \in C\}`.

    .. math:: P(x) = c + \alpha\, P_C\Bigl(\frac{x - c}{\alpha}\Bigr).

    Args:
        constraint: :math:`C`, a set around 0: it holds 0, and with a point all shorter ones in its direction.
        scale: :math:`\alpha \ne 0`, finite.
        offset: :math:`c`, one finite number for all entries, or a tuple with one for each, in the order of ``x.flatten()``.

    Raises:
        TypeError: if ``constraint`` is no set, or a number is not real.
        ValueError: if the scale is 0 or a number is not finite; in use, if there are not as many offsets as entries.
        InfeasibleError: from ``project``, if pulling a point towards c does not lead inside: 0 is not in C, or the dtype has no
            number near c that belongs.

    Note:
        A stored x belongs if :math:`(x - c)/\alpha`, computed in float64, belongs to C. For float32 and shorter dtypes the
        difference is exact unless the exponents are far apart; in float64, and for a scale that is no power of two, membership is
        meant up to this one rounding. All batches of a tensor are pulled by the same factor, a few units of the last place for
        solid sets such as balls. A set without interior, such as a simplex, does not survive the rounding of a translation: its
        own total or radius sets its size.

    References:
        Bauschke and Combettes, *Convex Analysis and Monotone Operator Theory*, 2017, proposition 29.1.

    Examples:
        >>> from stableopt.constraints import L2Ball
        >>> near_one = AffineImage(L2Ball(1.0), offset=1.0)
        >>> near_one.project(torch.tensor([1.0, 3.0], dtype=torch.float64)).round(decimals=6)
        tensor([1., 2.], dtype=torch.float64)
        >>> AffineImage(L2Ball(1.0), scale=0.5, offset=(0.0, 4.0)).violation(torch.tensor([0.0, 4.25]))
        0.0
    """

    constraint: Constraint
    scale: float = 1.0
    offset: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.constraint, Constraint):
            raise TypeError(f"AffineImage needs a set as constraint, got {type(self.constraint).__name__}.")
        object.__setattr__(self, "scale", check_number("AffineImage", "scale", self.scale))
        if self.scale == 0.0:
            raise ValueError("AffineImage needs a scale other than 0.")
        check = check_numbers if isinstance(self.offset, list | tuple) else check_number
        object.__setattr__(self, "offset", check("AffineImage", "offset", self.offset))

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the set itself is convex."""
        return self.constraint.convex

    @property
    def diagonal(self) -> bool:
        """Whether the set itself has an exact projection in a diagonal metric."""
        return self.constraint.diagonal

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest point that belongs as stored, ``x`` itself if it does.

        Raises:
            TypeError: as the set itself.
            ValueError: as the set itself, or if there are not as many offsets as entries.
            InfeasibleError: see the class.
        """
        return self.prox(x)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection, in the metric if there is one; the errors are those of :meth:`project`."""
        check_tensor("AffineImage", x)
        if is_sharded(x):
            full = metric.full_tensor() if is_sharded(metric) else metric  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            return on_whole("AffineImage", lambda t: self.prox(t, step, full), x)
        c = self._center(x)
        inner, most = (x.double() - c) / self.scale, torch.finfo(torch.float64).max
        inner = torch.where(x.isfinite(), inner.clamp(-most, most), inner)  # the division may overflow
        y = self.constraint.prox(inner, step, metric)
        if x.is_meta or self.violation(x) == 0.0:
            return x
        moved = c + self.scale * y
        return substitute(moved.to(x.dtype), self._inside(y.detach(), c, x.dtype))

    def violation(self, x: Tensor) -> float:
        r"""Return the violation of the set by :math:`(x - c)/\alpha`, times the scale; the errors are those of :meth:`project`."""
        check_tensor("AffineImage", x)
        if is_sharded(x):
            return self.violation(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        inner = (x.detach().double() - self._center(x)) / self.scale
        return abs(self.scale) * self.constraint.violation(inner)

    def _center(self, x: Tensor) -> float | Tensor:
        if not isinstance(self.offset, tuple):
            return self.offset
        if len(self.offset) != x.numel():
            raise ValueError(
                f"AffineImage needs one offset or as many as entries, got {len(self.offset)} for shape {tuple(x.shape)}."
            )
        return torch.tensor(self.offset, dtype=torch.float64, device=x.device).reshape(x.shape)

    def _inside(self, y: Tensor, c: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``c + scale * y`` as stored, pulled towards ``c`` as little as is found to lead inside."""
        if not bool(y.isfinite().all()):
            return (c + self.scale * y).to(dtype)
        unit, pull = torch.finfo(dtype).eps, 0.0
        while pull <= 1.0:
            candidate = (c + self.scale * ((1.0 - pull) * y)).to(dtype)
            if self.violation(candidate) == 0.0:
                return candidate
            pull = max(unit / 4, 2.0 * pull)
        raise InfeasibleError(
            f"{self!r} found no number of dtype {dtype} inside near its center; it needs a set that holds 0 and an interior "
            "that is wide beside the rounding of the offset."
        )
