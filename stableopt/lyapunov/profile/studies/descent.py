"""One training with the derivative of all its parameters by their start, and the logarithmic norm of the flow that it follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.profile.tangents.products import GradientTap
from stableopt.lyapunov.profile.tangents.system import PARAMETER, System
from stableopt.optim import RandomState
from stableopt.optim.curvature import Choice
from stableopt.optim.rules import HeavyBall, rule_for
from stableopt.optim.rules.base import number

__all__ = ["DENSE", "Descent", "column_of"]

Array: TypeAlias = NDArray[np.float64]

DENSE = 512
"""Numbers of a state up to which its derivative is written down."""


class Descent:
    r"""One training, with its derivative by its start.

    Args:
        make_model: returns the model.
        make_optimizer: ``(model, step)`` -> optimizer, one with a rule.
        loss: model -> loss.
        step: that ``make_optimizer`` is given.
        direction: one tensor per parameter, to follow it alone; None for all.

    Raises:
        ValueError: if there is no direction, and too many parameters to follow all.

    Attributes:
        start: the parameters before the first step.
        columns: directions that are followed, ``(size, k)``.
        gain: :math:`\eta(1-\delta)/(1-\beta)` of SGD; NaN where there is none.
        momentum: :math:`\beta` of SGD.

    Examples:
        >>> run = Descent(
        ...     lambda: nn.Linear(1, 1, bias=False, dtype=torch.float64),
        ...     lambda m, step: torch.optim.SGD(m.parameters(), lr=step),
        ...     lambda m: m.weight.square().sum(),
        ...     0.25,
        ...     None,
        ... )
        >>> run.train(2, log_norms=True), run.end()[1].tolist()
        ([-2.0, -2.0, -2.0], [[0.25]])
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module, float], Optimizer],
        loss: Callable[[nn.Module], Tensor],
        step: float,
        direction: Sequence[Tensor] | None,
    ) -> None:
        random = RandomState.capture()
        self.model, self.loss = make_model(), loss
        random.restore()
        self.optimizer = make_optimizer(self.model, step)
        self.system = System(self.optimizer)
        self.parameters = self.system.parameters
        self.size = sum(p.numel() for p in self.parameters)
        self.eps = max((torch.finfo(p.dtype).eps for p in self.parameters), default=0.0)
        if direction is None and self.size > DENSE:
            raise ValueError(
                f"{self.size} parameters are too many for a dense derivative, {DENSE} are the limit: give a direction."
            )
        flat = None if direction is None else torch.cat([v.detach().reshape(-1) for v in direction])
        self.columns = np.eye(self.size) if flat is None else column_of(flat, self.size)
        self.start = self._flat(self.parameters)
        self.gain, self.momentum = _gain(self.optimizer)
        self.tap, self.choice = GradientTap(self.parameters, model=self.model), Choice(lambda: loss(self.model))
        rows = torch.from_numpy(self.columns.T.copy())
        parts = rows.split([p.numel() for p in self.parameters], dim=1)
        self.system.columns = [
            {PARAMETER: part.to(p).reshape(-1, *p.shape)} for part, p in zip(parts, self.parameters, strict=True)
        ]

    def train(self, count: int, *, log_norms: bool) -> list[float]:
        """Train, and return the logarithmic norm of the gradient flow at each step if that is asked for."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = self.loss(self.model)
            value.backward()
            return value

        random, found = RandomState.capture(), []
        for _ in range(count):
            if log_norms:
                found.append(self._log_norm())
            before = self.system.before()
            random.restore()
            self.tap.evaluate(closure, self.system.directions())
            used = [p.grad for p in self.parameters]
            self.optimizer.step()
            if self.tap.gradient is None:
                raise RuntimeError("the gradient of the loss could not be differentiated.")
            self.system.advance(before, self.tap.gradient, used)
        if log_norms:
            found.append(self._log_norm())
        random.restore()
        return found

    def end(self) -> tuple[Array, Array]:
        """Return the parameters and their derivative ``(d, k)``."""
        rows = [column[PARAMETER].reshape(self.columns.shape[1], -1) for column in self.system.columns]
        return self._flat(self.parameters), torch.cat(rows, dim=1).double().cpu().numpy().T

    def _log_norm(self) -> float:
        r"""Return :math:`-\lambda_{\min}` of the Hessian."""
        basis = torch.eye(self.size, dtype=torch.float64).split([p.numel() for p in self.parameters], dim=1)
        vectors = [
            [part[i].to(p).reshape(p.shape) for part, p in zip(basis, self.parameters, strict=True)]
            for i in range(self.size)
        ]
        H = self.choice.run(self.parameters, lambda product: np.stack([self._flat(product(v)) for v in vectors]))
        return -float(np.linalg.eigvalsh(0.5 * (H + H.T))[0])

    @staticmethod
    def _flat(tensors: Sequence[Tensor]) -> Array:
        return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors]).numpy()


def column_of(direction: Tensor, size: int) -> Array:
    """Return a direction as a column.

    Args:
        direction: of any shape.
        size: how many numbers it must have.

    Raises:
        ValueError: if it has others, or is zero.

    Examples:
        >>> column_of(torch.ones(1, 2), 2).tolist()
        [[1.0], [1.0]]
    """
    column = direction.detach().double().cpu().numpy().reshape(-1, 1)
    if column.size != size or not np.any(column):
        raise ValueError(f"a direction must have the {size} numbers of the state, not all zero, got {column.size}.")
    return column


def _gain(optimizer: Optimizer) -> tuple[float, float]:
    r"""Return :math:`\eta(1-\delta)/(1-\beta)` of SGD and :math:`\beta`; NaN for others, and where groups differ."""
    if not isinstance(rule_for(optimizer), HeavyBall):
        return math.nan, math.nan
    gains = set()
    for group in optimizer.param_groups:
        beta = float(group.get("momentum", 0.0))
        damping = float(group.get("dampening", 0.0)) if beta else 0.0
        plain = not (group.get("weight_decay") or group.get("maximize") or group.get("prox") or group.get("constraint"))
        gains.add((number(group["lr"]) * (1 - damping) / (1 - beta) if plain and beta < 1 else math.nan, beta))
    return gains.pop() if len(gains) == 1 else (math.nan, math.nan)
