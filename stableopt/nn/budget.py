r"""How a Lipschitz limit of a whole model is shared among its layers.

A chain of layers with constants :math:`L_1, \dots, L_n` has the constant :math:`\prod L_l`, so a limit :math:`L` is a budget for
the sum of the logarithms, :math:`\sum \log L_l \le \log L`. A share is a log-radius :math:`\log L_l`; the fixed ones are rounded
so that the product of the *stored* radii obeys the limit in exact rational arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stableopt.constraints.sharding import is_sharded
from stableopt.linalg import Bound
from stableopt.nn.precision import full_precision
from stableopt.nn.weights.base import grain
from stableopt.nn.weights.isometry import HALF, stored

__all__ = ["Budgeted", "LearnedBudget", "fixed_radii", "product_within"]

_STEEPEST = 300.0
"""Largest deviation of a learned log-radius from the mean, so that no radius overflows float64."""


def product_within(radii: Sequence[float], counts: Sequence[int], constants: Sequence[float], limit: float) -> bool:
    r"""Return whether :math:`\prod_l r_l^{n_l} \prod_i C_i \le L`, in exact rational arithmetic.

    Args:
        radii: :math:`r_l`, the limits of the layers.
        counts: :math:`n_l`, how often each occurs in the chain.
        constants: :math:`C_i`, the constants of the other layers.
        limit: :math:`L`.

    Examples:
        >>> product_within([0.1] * 2, [1, 1], [100.0], 1.0)  # the float 0.1 lies above one tenth
        False
    """
    product = math.prod((Fraction(c) for c in constants), start=Fraction(1))
    product *= math.prod((Fraction(r) ** n for r, n in zip(radii, counts, strict=True)), start=Fraction(1))
    return product <= Fraction(limit)


def fixed_radii(
    limit: float, factors: Sequence[float], counts: Sequence[int] | None = None, constants: Sequence[float] = ()
) -> list[float]:
    r"""Return radii in given proportions whose product obeys a limit and, up to rounding, attains it.

    .. math:: r_l = g f_l, \qquad \prod_l r_l^{n_l} \prod_i C_i \le L .

    Args:
        limit: :math:`L > 0`, finite.
        factors: :math:`f_l > 0`; ones for the same radius everywhere.
        counts: :math:`n_l`, how often each layer occurs; ``None`` for once.
        constants: :math:`C_i > 0` of the layers without a limit.

    Returns:
        The radii. The inequality holds for them in exact arithmetic; equality is missed by a few units in the last place.

    Raises:
        ValueError: if a radius would leave the range of float64.

    Examples:
        >>> fixed_radii(8.0, [1.0, 1.0, 1.0])
        [2.0, 2.0, 2.0]
        >>> fixed_radii(1.0, [2.0, 1.0], constants=[0.5])
        [2.0, 1.0]
    """
    counts = [1] * len(factors) if counts is None else list(counts)
    logs = [n * math.log(f) for f, n in zip(factors, counts, strict=True)] + [math.log(c) for c in constants]
    log_scale = (math.log(limit) - math.fsum(logs)) / sum(counts)
    try:
        radii = [math.exp(log_scale + math.log(f)) for f in factors]
    except OverflowError:
        radii = [math.inf]
    if not all(0.0 < r < math.inf for r in radii):
        raise ValueError(f"no finite radii reach the limit {limit} beside layers with the constants {list(constants)}.")
    for _ in range(8):  # logarithms are off by some units in the last place, on either side
        up = [math.nextafter(r, math.inf) for r in radii]
        if not _visibly_within(up, counts, constants, limit):
            break
        radii = up
    while not _visibly_within(radii, counts, constants, limit):
        radii = [math.nextafter(r, 0.0) for r in radii]
    return radii


def _visibly_within(radii: Sequence[float], counts: Sequence[int], constants: Sequence[float], limit: float) -> bool:
    """Return whether the product obeys the limit also where it is computed in float64, rounded outwards factor by factor."""
    factors = [r for r, n in zip(radii, counts, strict=True) for _ in range(n)] + list(constants)
    product = Bound.point(1.0)
    for factor in factors:
        product = product * factor
    if product.upper <= limit:
        return True
    outwards = (1.0 + 2.0**-52) ** len(factors) * limit if math.isinf(product.upper) else math.inf
    return math.isfinite(outwards) and product_within(radii, counts, constants, 2.0 * limit - outwards)


class LearnedBudget(nn.Module):
    r"""Radii that are trained, while their product keeps a limit.

    .. math::
        \log r_l = \frac{\log L - \sum_i \log C_i}{N} + a_l - \frac1N \sum_k n_k a_k, \qquad N = \sum_k n_k,

    so that :math:`\sum_l n_l \log r_l + \sum_i \log C_i = \log L` for every value of the parameters :math:`a`: they move the
    budget between layers. Each radius is then shrunk by more than the rounding of this formula in float64.

    Args:
        limit: :math:`L > 0`.
        counts: :math:`n_l`, how often each layer occurs.
        constants: :math:`C_i` of the other layers.
        start: radii to start from, in proportion; ``None`` for equal ones.

    Note:
        Shares :math:`\log r_l = s_l \log L` with softmax weights :math:`s_l` would be dead for :math:`L = 1`, where all
        logarithms vanish, and could not raise one layer by lowering another.

    Examples:
        >>> budget = LearnedBudget(4.0, [1, 1])
        >>> [round(r, 9) for r in budget.radii()]
        [2.0, 2.0]
        >>> with torch.no_grad():
        ...     budget.shares.copy_(torch.tensor([3.0, 1.0])).shape
        torch.Size([2])
        >>> product_within(budget.radii(), [1, 1], [], 4.0)
        True
    """

    dependencies: ClassVar[tuple[nn.Module, ...]] = ()

    def __init__(
        self, limit: float, counts: Sequence[int], constants: Sequence[float] = (), start: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"limit must be positive and finite, got {limit!r}.")
        self.limit, self.counts, self.constants = float(limit), tuple(counts), tuple(constants)
        first = [1.0] * len(self.counts) if start is None else list(start)
        self.shares = nn.Parameter(torch.tensor([math.log(r) for r in first]))
        total = sum(self.counts)
        self.log_mean = (math.log(limit) - math.fsum(math.log(c) for c in self.constants)) / total

    def forward(self) -> Tensor:
        """Return the radii, a float64 tensor with one entry for each layer."""
        shares = self.shares
        if is_sharded(shares):  # the parameter of another part of the model, between its own uses
            from torch.distributed.tensor import Partial

            shares = shares.full_tensor(grad_placements=[Partial("avg")] * shares.device_mesh.ndim)  # pyright: ignore[reportAttributeAccessIssue]
        a = shares.double()
        weights = torch.tensor([n / sum(self.counts) for n in self.counts], dtype=torch.float64, device=a.device)
        deviation = (a - (weights * a).sum()).clamp_max(_STEEPEST)  # lowering a radius keeps the limit
        # n + 8 roundings of numbers up to max|a| + |log L|, each of relative size 2^-53, and as many in the exponential
        size = 1.0 + abs(self.log_mean) * 2.0 + 2.0 * a.detach().abs().amax()
        slack = (sum(self.counts) + len(self.constants) + 8) * 2.0**-50 * size
        return (self.log_mean + deviation - slack).exp()

    @torch.no_grad()
    def radii(self) -> list[float]:
        """Return the radii of this moment.

        Examples:
            >>> LearnedBudget(1.0, [1]).radii()
            [0.99999...]
        """
        return [float(r) for r in self.forward()]

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"limit={self.limit}, layers={len(self.counts)}"


def _product(W: Tensor, radius: Tensor, dtype: torch.dtype, limit: Any) -> Tensor:
    """Return a weight of norm at most 1 times a radius, rounded to a dtype such that its norm is at most the radius.

    Args:
        W: the weight in the dtype of the computation.
        radius: 0-d, float64.
        dtype: what is stored.
        limit: the weight map that the weight comes from.
    """
    computed, geometry, norm = torch.finfo(W.dtype), limit.geometry, limit.norm
    # rounding each entry by eps/2 relative changes the norm by at most eps/2 ||W||_F <= eps/2 sqrt(rank * taps) ||W||
    rank = min(W.shape[0], W[0].numel()) * math.prod(W.shape[2:])
    spread = geometry.spread(W, norm)
    rounding = (0.51 * math.sqrt(rank) + 1.0) * computed.eps
    least = radius * (1.0 - rounding) - grain(W.dtype, W.numel(), 1.0, spread)
    if dtype in HALF and norm == "l2":
        return stored(W * least.clamp_min(0.0).to(W.dtype), dtype, radius.detach().to(W.dtype), geometry.folded)
    if dtype in HALF:  # sums of absolute values: they grow by what each of them grows
        least = least * (1.0 - 0.51 * torch.finfo(dtype).eps) - grain(dtype, W.numel(), 1.0, spread)
    return (W * least.clamp_min(0.0).to(W.dtype)).to(dtype)


class Budgeted(nn.Module):
    r"""A weight whose radius is an entry of a :class:`LearnedBudget`: :math:`V \mapsto r\,M(V)` with a map :math:`M` to radius 1.

    Args:
        unit: the weight map :math:`M`, of radius 1, or maps of the parts of a weight.
        budget: the budget, shared by all layers.
        index: which of its radii.
        owner: whether the parameters of the budget are listed here; exactly one layer does.

    Examples:
        >>> from stableopt.nn.weights import Geometry, METHODS
        >>> unit = METHODS["gram"](Geometry("linear"), 1.0, "l2")
        >>> W = Budgeted(unit, LearnedBudget(4.0, [1, 1]), 0, owner=True)(9.0 * torch.ones(3, 3))
        >>> bool(1.9 < torch.linalg.matrix_norm(W, 2) <= 2.0)
        True
    """

    unit: Any  # a module with right_inverse

    def __init__(self, unit: nn.Module, budget: LearnedBudget, index: int, *, owner: bool) -> None:
        super().__init__()
        self.unit = unit
        self.index = index
        if owner:
            self.budget = budget
        else:  # in a tuple, so that torch lists the parameters once
            self._elsewhere = (budget,)

    @property
    def shared(self) -> LearnedBudget:
        """The budget."""
        return self.budget if "budget" in self._modules else self._elsewhere[0]

    @property
    def dependencies(self) -> tuple[nn.Module, ...]:
        """What the weight depends on beside the own parameters: the budget."""
        return (self.shared,)

    @property
    def radius(self) -> float:
        """The radius of this moment."""
        return self.shared.radii()[self.index]

    def forward(self, V: Tensor) -> Tensor:
        """Return the weight, computed in at least float32 and rounded once."""
        wide = V.float() if V.dtype in HALF else V
        W, radius = self.unit(wide), self.shared()[self.index].to(V.device)
        if not W.numel():
            return W.to(V.dtype)
        maps, flat = list(getattr(self.unit, "maps", [self.unit])), getattr(self.unit, "flat", False)
        parts = W.chunk(len(maps)) if len(maps) > 1 else (W,)
        with full_precision(wide):
            parts = [
                _product(part.flatten(1) if flat else part, radius, V.dtype, limit)
                for part, limit in zip(parts, maps, strict=True)
            ]
        return torch.cat(parts).view(W.shape) if len(parts) > 1 else parts[0].view(W.shape)

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return an original that is mapped to ``W``, or to the nearest reachable weight."""
        if W.is_meta:
            return W
        wide = W.float() if W.dtype in {torch.float16, torch.bfloat16} else W
        return self.unit.right_inverse(wide / self.radius).to(W.dtype)
