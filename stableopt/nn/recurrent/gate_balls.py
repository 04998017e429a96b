"""Limits on the rows of gates: weighted sums of moduli over the gates of each unit."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stableopt.constraints import Constraint, L1Ball, Parametrization
from stableopt.constraints.arguments import check_tensor
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.nn.precision import full_precision, wide

__all__ = ["GateBalls"]


@dataclass(frozen=True)
class GateBalls(Constraint):
    r"""The stacked matrices of the gates of a cell whose units have small rows.

    For each ball :math:`\omega` and each unit i the matrices :math:`W_1, \dots, W_G` satisfy

    .. math:: \sum_g \omega_g \|W_{g,i}\|_1 \le 1 ,

    the rows :math:`W_{g,i}` being those of unit i. One ball may limit several gates together, and a gate be part of several
    balls; with weight 0 it is not part of one.

    Args:
        balls: for each ball, one weight >= 0 per gate in the order in which torch stacks them.

    Raises:
        ValueError: if the balls have different lengths, a weight is negative or not finite, or a ball is empty.

    Note:
        :meth:`project` projects on one ball after the other, which only lowers moduli, so that all hold in the end; it is the
        nearest point if no gate is part of two balls. It makes zeros. :meth:`map` multiplies the rows of each ball by a common
        factor, one ball after the other, which keeps their directions, and is what a parametrization uses.

    Examples:
        >>> W = torch.tensor([[3.0], [1.0]])  # two gates of one unit
        >>> GateBalls(((1.0, 1.0),)).project(W).T.round(decimals=4), GateBalls(((1.0, 1.0),)).map(W).T.round(decimals=4)
        (tensor([[1., 0.]]), tensor([[0.7500, 0.2500]]))
    """

    balls: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check the weights."""
        balls = tuple(tuple(float(w) for w in ball) for ball in self.balls)
        object.__setattr__(self, "balls", balls)
        if not balls or len({len(ball) for ball in balls}) != 1:
            raise ValueError(f"GateBalls needs balls with one weight per gate each, got {balls!r}.")
        if any(not (math.isfinite(w) and w >= 0.0) for ball in balls for w in ball) or not all(map(any, balls)):
            raise ValueError(f"GateBalls needs finite weights >= 0, some of each ball positive, got {balls!r}.")

    @property
    def gates(self) -> int:
        """How many gates are stacked."""
        return len(self.balls[0])

    def project(self, x: Tensor) -> Tensor:
        """Return the point that the projections on the balls lead to, one after the other; the nearest one if they share no gate.

        Args:
            x: ``(gates * units, ...)``; never changed.

        Raises:
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if its first dimension is no multiple of the number of gates.

        Examples:
            >>> GateBalls(((2.0,),)).project(torch.tensor([[3.0, -1.0]])).round(decimals=4)
            tensor([[0.5000, 0.0000]])
        """
        if is_sharded(x):
            return on_whole("GateBalls", self.project, x)
        stacked = self._stacked(x)
        parts = list(stacked)
        for ball in self.balls:
            members = [g for g, w in enumerate(ball) if w > 0.0]
            rows = torch.cat([parts[g] for g in members], dim=1)  # (units, gates of the ball * width)
            if rows.numel():
                rows = _row_ball(tuple(ball[g] for g in members), stacked.shape[2]).project(rows)
            for g, part in zip(members, rows.chunk(len(members), dim=1), strict=True):
                parts[g] = part
        return torch.stack(parts).reshape(x.shape)

    def violation(self, x: Tensor) -> float:
        """Return by how much the largest of the sums exceeds 1, in float64; infinite for NaN.

        Args:
            x: ``(gates * units, ...)``.

        Examples:
            >>> GateBalls(((1.0,),)).violation(torch.tensor([[0.5]]))
            0.0
        """
        if is_sharded(x):
            x = x.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        stacked = self._stacked(x)
        worst = 0.0
        for ball in self.balls:
            members = [g for g, w in enumerate(ball) if w > 0.0]
            rows = torch.cat([stacked[g] for g in members], dim=1)
            if rows.numel():
                worst = max(worst, _row_ball(tuple(ball[g] for g in members), stacked.shape[2]).violation(rows))
        return worst

    def map(self, x: Tensor) -> Tensor:
        r"""Multiply the rows of each ball by :math:`\min(1, 1/\text{their sum})`, a little less for rounding.

        Args:
            x: ``(gates * units, ...)``.

        Examples:
            >>> W = GateBalls(((1.0, 0.0),)).map(torch.tensor([[3.0, 1.0], [5.0, 5.0]]))
            >>> W.round(decimals=4)
            tensor([[0.7500, 0.2500],
                    [5.0000, 5.0000]])
        """
        stacked = wide(self._stacked(x))
        with full_precision(stacked):
            sums = stacked.abs().sum(dim=2)  # (gates, units)
            slack = 2.0 * torch.finfo(x.dtype).eps
            slack += 2.0 * (stacked.shape[2] + 16) * self.gates * torch.finfo(stacked.dtype).eps
            factors = [torch.ones_like(sums[0])] * self.gates
            for ball in self.balls:
                total = sum(w * sums[g] * factors[g] for g, w in enumerate(ball) if w > 0.0)
                factor = (total * (1.0 + slack)).clamp_min(1.0).reciprocal()  # pyright: ignore[reportAttributeAccessIssue]
                factors = [old * factor if w > 0.0 else old for w, old in zip(ball, factors, strict=True)]
            scaled = stacked * torch.stack(factors).unsqueeze(2)
        return scaled.reshape(x.shape).to(x.dtype)

    def parametrization(self, tensor: Tensor) -> nn.Module:
        """Return the module that applies :meth:`map`, and starts from scaled rather than projected weights.

        Args:
            tensor: the tensor to be parametrized; only its shape, dtype and device matter.

        Examples:
            >>> GateBalls(((1.0,),)).parametrization(torch.ones(2, 2))
            GateScaling(GateBalls(balls=((1.0,),)))
        """
        self._stacked(tensor)
        return GateScaling(self)

    def _stacked(self, x: Tensor) -> Tensor:
        check_tensor("GateBalls", x)
        if not x.ndim or x.shape[0] % self.gates:
            raise ValueError(
                f"GateBalls with {self.gates} gates needs a tensor whose first dimension is a multiple of that, got "
                f"{tuple(x.shape)}."
            )
        return x.reshape(self.gates, x.shape[0] // self.gates, math.prod(x.shape[1:]))


class GateScaling(Parametrization):
    """Scale the rows of gates into their balls.

    Args:
        constraint: the balls.

    Examples:
        >>> GateScaling(GateBalls(((1.0,),)))(torch.tensor([[4.0]])).round(decimals=4)
        tensor([[1.]])
    """

    @torch.no_grad()
    def right_inverse(self, x: Tensor) -> Tensor:
        """Return the scaled weights, from which the same weights are made."""
        return x if x.is_meta else self.constraint.map(x).contiguous()


@functools.lru_cache(maxsize=256)
def _row_ball(weights: tuple[float, ...], width: int) -> L1Ball:
    """Return the ball of one unit, whose rows stand side by side."""
    return L1Ball(1.0, weights=tuple(w for w in weights for _ in range(width)), dims=1)
