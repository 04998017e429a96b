r"""How much of its linear stability limit an optimizer uses: the top eigenvalue of the Hessian in the metric of the optimizer.

With the metric P of the rule and its limit :math:`\ell_g` in each group, the update is linearly stable iff :math:`H \prec D`,
:math:`D = \ell P`. So the number to watch is

.. math:: \text{edge} = \lambda_{\max}(D^{-1/2} H D^{-1/2}), \qquad \text{stable iff edge} < 1,

exact for one group, and for several that have the same momentum. It is measured by products with H. Every value here is a Rayleigh
quotient: an *estimate from below*, which no number of products turns into a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.optim.ascent import Direction, ascend
from stableopt.optim.curvature import Choice, Curvature, Method, dot
from stableopt.optim.limits import known_limits
from stableopt.optim.rules.base import real_view, unviewed

__all__ = ["Method", "Sharpness", "SharpnessReading"]


@dataclass(frozen=True)
class SharpnessReading:
    r"""One measurement, along the direction v that was found to be the sharpest.

    Args:
        edge: :math:`v^\top H v / \|v\|_D^2`, the fraction of the limit in use, estimated from below; NaN if not measured, infinite
            if a group is unstable at any curvature, negative if no positive curvature was found.
        sharpness: :math:`v^\top H v / \|v\|_P^2`, to compare with the limit of a single group.
        plain: :math:`v^\top H v / \|v\|^2`, at most the largest eigenvalue of H.
        curvature: :math:`v^\top H v`, in the scale of the weights.
        weights: :math:`\|v\|_P^2` of each group, scaled so that :math:`\|v\|_D = 1`; 0 for a group that does not move.
        residual: :math:`\|D^{-1/2}HD^{-1/2}u-\text{edge}\,u\|`: some eigenvalue lies that near to ``edge``, not always the largest.
        products: how many products with H it took.
        method: how the products were made: ``graph``, ``exact``, ``forward`` or ``difference``.
        reason: one sentence if something is not measured, or not as asked for; else empty.

    Examples:
        >>> SharpnessReading.missing("no step has been taken").measured
        False
    """

    edge: float
    sharpness: float
    plain: float
    curvature: float
    weights: tuple[float, ...]
    residual: float
    products: int
    method: str
    reason: str

    @classmethod
    def missing(cls, reason: str, edge: float = math.nan, products: int = 0) -> SharpnessReading:
        """Return the reading of something that was not measured.

        Examples:
            >>> SharpnessReading.missing("no step has been taken").edge
            nan
        """
        nan = math.nan
        return cls(edge, nan, nan, nan, (), nan, products, "none", reason)

    @property
    def measured(self) -> bool:
        """Whether a direction was measured."""
        return bool(self.weights)

    def edge_at(self, limits: Sequence[float]) -> float:
        """Return the edge along the same direction for other limits of the groups, for instance at other learning rates.

        Args:
            limits: of each group, as :func:`stableopt.optim.sharpness_limit` gives them.

        Returns:
            The curvature over the weighted sum of the limits; infinite if a limit is not positive, NaN if nothing was measured.

        Examples:
            >>> reading = SharpnessReading(0.5, 2.0, 2.0, 0.5, (0.25,), 0.0, 1, "exact", "")
            >>> reading.edge_at([4.0]), reading.edge_at([8.0])
            (0.5, 0.25)
        """
        if not self.measured:
            return math.nan
        if min(limits) <= 0:
            return math.inf
        total = math.fsum(limit * w for limit, w in zip(limits, self.weights, strict=True) if w > 0)
        return self.curvature / total if total < math.inf else 0.0


class Sharpness:
    r"""Measure which fraction of its linear stability limit an optimizer uses, from below, and leave no trace.

    A measurement climbs from a direction, each new one the best in the span of the old one, its residual and the last correction
    (LOBPCG, which aims at the largest eigenvalue and not at the largest modulus), until the residual is small. The first one starts
    from a random direction, later ones from the direction kept: as long as that stays good, one product is enough. After each one
    the direction does a step of the power iteration, shifted so that negative eigenvalues do not win. A direction that is kept can
    be overtaken by another one and not see it; so measurement 2, 4, 8, ... and each ``fresh``-th one climb from a new random
    direction, too, and the larger edge counts.

    Args:
        optimizer: one of ours, of torch's, or of schedulefree; its groups, states and learning rates are read at each measurement.
        loss: returns the loss with its graph: forward only, without ``backward``; the loss of the training step, decay aside.
        method: how a product with H is made. ``exact``: autograd twice, about 9 forward passes, with the graph kept 5 for each
            further product. ``forward``: tangents through the loss and its gradient, about 9 for each product, no graph kept.
            ``difference``: the central difference of two gradients, about 5 to 6, no second derivative and no graph kept; it also
            sees the kinks of ReLU, which have no second derivative. ``auto``: a graph that is handed over, else the first of the
            three that works, where the refusal of one is remembered.
        tolerance: when a measurement ends: at a residual of this fraction of the edge. The error of the edge is about its square
            over the relative gap to the next eigenvalue.
        products: the largest number of products in one measurement, at least 1.
        fresh: how often to look from a new random direction, too, at least 1: each so many measurements; 1 for always.
        seed: of the random directions.

    Raises:
        TypeError: if the optimizer is none, or the loss cannot be called.
        ValueError: if nothing is known about the optimizer, it normalizes its steps and has no linear limit, or an argument is out
            of range.

    Note:
        An estimate from below. It says "beyond the limit" with certainty (up to the rounding of the product) and "within" never.
        P is that of the last step: before the first step of an adaptive optimizer there is none, and the reading is NaN. Parameters
        without a state there (no gradient so far) are left out. Negative curvature is not reported: every method leaves it.
        In several processes each measures its own batch. Call the model without its DDP wrapper, which waits for a ``backward``.

    References:
        Knyazev, Toward the optimal preconditioned eigensolver, 2001; Cohen et al., Gradient descent at the edge of stability, 2021.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> sharpness = Sharpness(optimizer, lambda: 0.5 * (torch.tensor([19.0, 1.0]) * w**2).sum())
        >>> reading = sharpness.measure()
        >>> round(reading.edge, 4), round(reading.sharpness, 4)  # the limit is 2 (1 + 0.9) / 0.1 = 38
        (0.5, 19.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss: Callable[[], Tensor],
        *,
        method: Method = "auto",
        tolerance: float = 0.05,
        products: int = 20,
        fresh: int = 10,
        seed: int = 0,
    ) -> None:
        rule = known_limits(optimizer)
        for group in optimizer.param_groups:
            rule.limit(group)
        self.choice = Choice(loss, method)
        for name, value in (("products", products), ("fresh", fresh)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        if not 0.0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number >= 0, got {tolerance!r}.")
        self.optimizer, self.loss = optimizer, loss
        self.tolerance, self.products, self.fresh, self.seed = float(tolerance), products, fresh, seed
        self._warm: dict[int | None, Direction] = {}

    def restart(self) -> None:
        """Forget the direction: the next measurement starts from a random one."""
        self._warm.clear()

    def measure(self, group: int | None = None, *, graph: Tensor | None = None) -> SharpnessReading:
        """Measure now.

        Args:
            group: the number of a group, for the block of the Hessian of its parameters alone; None for all groups together.
            graph: the loss at the present parameters with a graph that is still there: it saves the evaluation, and stays good.

        Returns:
            The reading.

        Raises:
            ValueError: if the loss is not one real number with a graph, a parameter is sharded or half precision meets differences,
                or the groups do not agree on ``maximize``.
        """
        scaling = _Scaling.of(self.optimizer, group)
        if isinstance(scaling, str):
            return SharpnessReading.missing(scaling)
        if scaling.least <= 0:
            why = "the update is unstable at any curvature: lr times weight_decay is too large, or the momentum"
            return SharpnessReading.missing(why, edge=math.inf)
        if not any(root.any() for root in scaling.roots):
            return SharpnessReading.missing("no parameter moves: every learning rate is zero")
        measured = self.choice.run(scaling.parameters, lambda product: self._climb(product, scaling, group), graph)
        return replace(measured, reason=self.choice.reason) if measured.measured else measured

    def _climb(self, curvature: Curvature, scaling: _Scaling, group: int | None) -> SharpnessReading:
        def product(u: list[Tensor]) -> list[Tensor]:
            """Return D^{-1/2} (H + coupled decay) D^{-1/2} u, all in real views."""
            v = [root * x for root, x in zip(scaling.roots, u, strict=True)]
            Hv = curvature([unviewed(x, p) for x, p in zip(v, scaling.parameters, strict=True)])
            return [
                root * (scaling.sign * real_view(h) + omega * x)
                for root, h, omega, x in zip(scaling.roots, Hv, scaling.decays, v, strict=True)
            ]

        def climb(start: list[Tensor], lowest: float) -> Direction | None:
            return ascend(product, start, self.products, lowest, self.tolerance)

        kept = self._warm.get(group)
        if kept is None or not scaling.fits(kept.vector):
            count, found = 1, climb(scaling.random(self.seed), 0.0)
        else:
            count, found = kept.count + 1, climb(kept.vector, kept.lowest)
            due = count & (count - 1) == 0 or count % self.fresh == 0
            if found is not None and (due or found.value < 0):
                other = climb(scaling.random(self.seed + count), found.lowest)
                found = other if other is not None and other.value > found.value else found
        if found is None:
            self._warm.pop(group, None)
            return SharpnessReading.missing("the curvature is not finite", products=curvature.count)
        reading = scaling.reading(found, curvature)
        self._warm[group] = found.moved(count)
        return reading


@dataclass(frozen=True)
class _Scaling:
    """D^{-1/2} for each parameter, 0 where nothing moves, and what is needed to read a result."""

    parameters: list[Tensor]
    roots: list[Tensor]
    metrics: list[Tensor | float]
    decays: list[float]
    owners: list[int]
    limits: list[float]
    least: float
    sign: float

    @classmethod
    def of(cls, optimizer: Optimizer, only: int | None) -> _Scaling | str:
        """Read the optimizer; a sentence if its metric does not exist yet."""
        rule, groups = known_limits(optimizer), optimizer.param_groups
        if only is not None and not 0 <= only < len(groups):
            raise ValueError(f"group must be a number from 0 to {len(groups) - 1}, got {only!r}.")
        if any(bool(g.get("maximize")) != bool(groups[0].get("maximize")) for g in groups):
            raise ValueError("the groups must agree on maximize: otherwise there is no common loss to measure.")
        limits = [float(rule.limit(g)) for g in groups]
        hidden = [_decay_in_curvature(rule, group) for group in groups]
        parameters, roots, metrics, decays, owners, waiting = [], [], [], [], [], 0
        for i, group in enumerate(groups):
            if only is not None and i != only:
                continue
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                P = _metric(rule, optimizer.state.get(p, {}), group)
                if isinstance(P, float) and P == 0.0:
                    raise ValueError(
                        f"{type(optimizer).__name__} has no metric, so its steps have no linear limit and no sharpness to measure; "
                        "for normalized steps with weight decay the norm of the weights is bounded instead."
                    )
                waiting += P is None
                parameters.append(p)
                owners.append(i)
                decays.append(hidden[i])
                metrics.append(0.0 if P is None else P)
                roots.append(_inverse_root(p, P, limits[i]))
        if parameters and waiting == len(parameters):
            return "the optimizer has taken no step, so its metric does not exist yet"
        least = min((limits[i] for i in owners), default=math.inf)
        return cls(
            parameters, roots, metrics, decays, owners, limits, least, -1.0 if groups[0].get("maximize") else 1.0
        )

    def fits(self, u: list[Tensor]) -> bool:
        """Say whether a direction is one of these parameters, and some of what it moves still moves."""
        return [x.shape for x in u] == [root.shape for root in self.roots] and any(
            bool((root * x).any()) for root, x in zip(self.roots, u, strict=True)
        )

    def random(self, seed: int) -> list[Tensor]:
        """Return a random direction, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root) * (root > 0)
            for root in self.roots
        ]

    def reading(self, found: Direction, curvature: Curvature) -> SharpnessReading:
        """Return what was found along v = D^{-1/2} u."""
        scale = math.sqrt(dot(found.vector, found.vector))
        v = [root * u / scale for root, u in zip(self.roots, found.vector, strict=True)]
        weights = [0.0] * len(self.limits)
        for i, P, x in zip(self.owners, self.metrics, v, strict=True):
            weights[i] += dot([P * x], [x])
        residual = found.residual()
        length = dot(v, v)
        return SharpnessReading(
            edge=found.value,
            sharpness=found.value / math.fsum(weights),
            plain=found.value / length,
            curvature=found.value,
            weights=tuple(weights),
            residual=math.sqrt(dot(residual, residual)),
            products=curvature.count,
            method=curvature.name,
            reason="",
        )


def _metric(rule: Any, state: dict[str, Any], group: dict[str, Any]) -> Tensor | float | None:
    """Return P, None if it does not exist yet."""
    try:
        P = rule.metric(state, group)
    except KeyError:
        if state:
            raise
        return None
    return P.detach() if isinstance(P, Tensor) else float(P)


def _inverse_root(p: Tensor, P: Tensor | float | None, limit: float) -> Tensor:
    shape, dtype = (
        real_view(p.detach()).shape,
        torch.promote_types(p.real.dtype if p.is_complex() else p.dtype, torch.float32),
    )
    if P is None or not 0 < limit < math.inf:
        return torch.zeros(shape, dtype=dtype, device=p.device)
    D = torch.as_tensor(P, device=p.device).to(dtype).expand(shape) * limit
    return torch.where(D > 0, D.clamp_min(torch.finfo(dtype).tiny).rsqrt(), 0.0)


def _decay_in_curvature(rule: Any, group: dict[str, Any]) -> float:
    """Return the weight decay if it belongs to the curvature: a coupled one that the limit of the rule leaves out."""
    omega = float(group.get("weight_decay", 0.0))
    return omega if omega and rule.limit(group) == rule.limit({**group, "weight_decay": 0.0}) else 0.0
