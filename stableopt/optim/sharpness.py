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

from torch import Tensor
from torch.optim import Optimizer

from stableopt.optim.ascent import Direction, ascend
from stableopt.optim.curvature import Choice, Curvature, Method, dot
from stableopt.optim.limits import known_limits
from stableopt.optim.preconditioner import Preconditioner
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
    direction, too, and the larger edge counts. With few products that is a waste: ``fresh=None`` keeps the runner-up as well, and
    looks at it in each measurement that has a product left.

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
        fresh: how often to look from a new random direction, too, at least 1: each so many measurements; 1 for always, None for
            the runner-up instead.
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
        >>> import torch
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
        fresh: int | None = 10,
        seed: int = 0,
    ) -> None:
        rule = known_limits(optimizer)
        for group in optimizer.param_groups:
            rule.limit(group)
        self.choice = Choice(loss, method)
        for name, value in (("products", products), ("fresh", 1 if fresh is None else fresh)):
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
        scaling = self._scaling(group)
        if isinstance(scaling, SharpnessReading):
            return scaling
        measured = self.choice.run(scaling.parameters, lambda product: self._climb(product, scaling, group), graph)
        return replace(measured, reason=self.choice.reason) if measured.measured else measured

    def measure_within(self, curvature: Curvature) -> SharpnessReading:
        """Measure all groups together by products that somebody else has opened.

        Args:
            curvature: on the parameters of the optimizer that require gradients, in their order.

        Returns:
            The reading.

        Raises:
            ValueError: as :meth:`measure`, or if the products are on other parameters.

        Examples:
            >>> import torch
            >>> from stableopt.optim.curvature import Exact
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> loss = lambda: (w**2).sum()
            >>> sharpness = Sharpness(torch.optim.SGD([w], lr=0.5), loss)
            >>> with Exact(loss, [w]) as product:
            ...     sharpness.measure_within(product).edge
            0.5
        """
        scaling = self._scaling(None)
        if isinstance(scaling, SharpnessReading):
            return scaling
        if [id(p) for p in curvature.parameters] != [id(p) for p in scaling.parameters]:
            raise ValueError(
                "the products must be on the parameters of the optimizer that require gradients, in its order."
            )
        return self._climb(curvature, scaling, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the directions that are kept, as tensors and plain data.

        Examples:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> sharpness = Sharpness(torch.optim.SGD([w], lr=0.5), lambda: (w**2).sum())
            >>> _ = sharpness.measure()
            >>> sharpness.state_dict()["directions"][0]["vector"]
            [tensor([1.])]
        """
        kept = ("vector", "value", "lowest", "count", "second")
        directions = [{"group": g, **{name: getattr(d, name) for name in kept}} for g, d in self._warm.items()]
        return {"directions": directions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from directions that were kept.

        Args:
            state_dict: as :meth:`state_dict` gives it.

        Examples:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> sharpness = Sharpness(torch.optim.SGD([w], lr=0.5), lambda: (w**2).sum())
            >>> sharpness.load_state_dict({"directions": []})
        """
        self._warm = {
            kept["group"]: Direction(kept["vector"], [], kept["value"], kept["lowest"], kept["count"], kept["second"])
            for kept in state_dict["directions"]
        }

    def _scaling(self, group: int | None) -> Preconditioner | SharpnessReading:
        """Return the metric, or the reading that there is nothing to measure."""
        scaling = Preconditioner.of(self.optimizer, group)
        if isinstance(scaling, str):
            return SharpnessReading.missing(scaling)
        if scaling.least <= 0:
            why = "the update is unstable at any curvature: lr times weight_decay is too large, or the momentum"
            return SharpnessReading.missing(why, edge=math.inf)
        if not any(root.any() for root in scaling.roots):
            return SharpnessReading.missing("no parameter moves: every learning rate is zero")
        return scaling

    def _climb(self, curvature: Curvature, scaling: Preconditioner, group: int | None) -> SharpnessReading:
        packing = scaling.packing

        def product(u: list[Tensor]) -> list[Tensor]:
            """Return D^{-1/2} (H + coupled decay) D^{-1/2} u, all packed."""
            v = [root * x for root, x in zip(scaling.roots, u, strict=True)]
            Hv = curvature([unviewed(x, p) for x, p in zip(packing.unpack(v), scaling.parameters, strict=True)])
            return [
                root * (scaling.sign * h + omega * x)
                for root, h, omega, x in zip(
                    scaling.roots, packing.pack([real_view(h) for h in Hv]), scaling.decays, v, strict=True
                )
            ]

        def climb(start: list[Tensor], lowest: float, second: list[Tensor] | None = None) -> Direction | None:
            # from a random direction a small residual may be that of a lower eigenvalue on the way
            strict = 0.1 if self.fresh is None and kept is None else 1.0
            return ascend(product, start, self.products, lowest, strict * self.tolerance, second)

        kept = self._warm.get(group)
        start = None if kept is None else scaling.placed(kept.vector)
        if kept is None or start is None:
            kept = None
            count, found = 1, climb(scaling.random(self.seed), 0.0)
        else:
            second = scaling.placed(kept.second) if self.fresh is None else None
            count, found = kept.count + 1, climb(start, kept.lowest, second)
            due = self.fresh is not None and (count & (count - 1) == 0 or count % self.fresh == 0)
            if found is not None and (due or found.value < 0):
                other = climb(scaling.random(self.seed + count), found.lowest)
                found = other if other is not None and other.value > found.value else found
        if found is None:
            self._warm.pop(group, None)
            return SharpnessReading.missing("the curvature is not finite", products=curvature.count)
        reading = _reading(found, scaling, curvature)
        self._warm[group] = found.moved(count, keep_second=self.fresh is None)
        return reading


def _reading(found: Direction, scaling: Preconditioner, curvature: Curvature) -> SharpnessReading:
    """Return what was found along v = D^{-1/2} u."""
    scale = math.sqrt(dot(found.vector, found.vector))
    u = [x / scale for x in found.vector]
    v = [root * x for root, x in zip(scaling.roots, u, strict=True)]
    weights = scaling.weights(u)
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
