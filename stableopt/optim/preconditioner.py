"""The metric in which the steps of an optimizer are linearly stable up to curvature 1, and its inverse root for each parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stableopt.optim.curvature import dot
from stableopt.optim.limits import known_limits
from stableopt.optim.packing import Packing
from stableopt.optim.rules.base import real_view

__all__ = ["Preconditioner"]


@dataclass(frozen=True)
class Preconditioner:
    r"""The inverse root of the metric D = limit · P of an optimizer, in which its update is linearly stable up to curvature 1.

    Args:
        parameters: those that require gradients, in the order of the groups.
        packing: of vectors over them, where those of different groups stay apart.
        roots: :math:`D^{-1/2}`, packed, entrywise on the real view of the parameters; 0 where nothing moves.
        decays: the weight decay that belongs to the curvature, for each packed tensor.
        limits: of each group.
        least: the smallest limit of the groups that are looked at.
        sign: -1 if the optimizer maximizes, else 1.

    Examples:
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> Preconditioner.of(torch.optim.SGD([w], lr=0.5)).roots  # the limit is 2 / 0.5
        [tensor([0.5000])]
    """

    parameters: list[Tensor]
    packing: Packing
    roots: list[Tensor]
    decays: list[float]
    limits: list[float]
    least: float
    sign: float

    @classmethod
    def of(cls, optimizer: Optimizer, only: int | None = None) -> Preconditioner | str:
        """Read the optimizer.

        Args:
            optimizer: whose limits are known.
            only: the number of one group; None for all.

        Returns:
            The metric; a sentence if it does not exist yet.

        Raises:
            ValueError: if there is no such group, the groups do not agree on ``maximize``, or the steps have no linear limit.

        Examples:
            >>> Preconditioner.of(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]))
            'the optimizer has taken no step, so its metric does not exist yet'
        """
        rule, groups = known_limits(optimizer), optimizer.param_groups
        if only is not None and not 0 <= only < len(groups):
            raise ValueError(f"group must be a number from 0 to {len(groups) - 1}, got {only!r}.")
        if any(bool(g.get("maximize")) != bool(groups[0].get("maximize")) for g in groups):
            raise ValueError("the groups must agree on maximize: otherwise there is no common loss to measure.")
        limits = [float(rule.limit(g)) for g in groups]
        parameters, roots, owners, waiting = [], [], [], 0
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
                roots.append(_inverse_root(p, P, limits[i]))
        if parameters and waiting == len(parameters):
            return "the optimizer has taken no step, so its metric does not exist yet"
        packing = Packing.of(parameters, owners)
        hidden = [_decay_in_curvature(rule, group) for group in groups]
        return cls(
            parameters,
            packing,
            packing.pack(roots),
            [hidden[owner] for owner, _, _ in packing.keys],
            limits,
            min((limits[i] for i in owners), default=math.inf),
            -1.0 if groups[0].get("maximize") else 1.0,
        )

    def placed(self, u: list[Tensor] | None) -> list[Tensor] | None:
        """Return a packed direction where it is needed.

        Args:
            u: the direction.

        Returns:
            It; None if it is not one of these parameters, or nothing of what it moves moves any more.

        Examples:
            >>> scaling = Preconditioner.of(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5))
            >>> scaling.placed([torch.ones(2)]) is None
            True
        """
        if u is None or not self.packing.fits(u):
            return None
        here = [x.to(root) for x, root in zip(u, self.roots, strict=True)]
        return here if any(bool((root * x).any()) for root, x in zip(self.roots, here, strict=True)) else None

    def random(self, seed: int) -> list[Tensor]:
        """Return a random direction, packed, the same on every device.

        Args:
            seed: of it.

        Examples:
            >>> scaling = Preconditioner.of(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.5))
            >>> scaling.random(0)[0].shape
            torch.Size([3])
        """
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root) * (root > 0)
            for root in self.roots
        ]

    def weights(self, u: list[Tensor]) -> list[float]:
        r"""Return :math:`\|v\|_P^2` of each group along :math:`v = D^{-1/2} u`, which is :math:`\|u\|^2` over its limit.

        Args:
            u: packed.

        Examples:
            >>> scaling = Preconditioner.of(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5))
            >>> scaling.weights([torch.ones(1)])
            [0.25]
        """
        squares = [0.0] * len(self.limits)
        for x, (owner, _, _) in zip(u, self.packing.keys, strict=True):
            squares[owner] += dot([x], [x])
        return [square / limit if square else 0.0 for square, limit in zip(squares, self.limits, strict=True)]


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
