r"""One parameter's update map :math:`(\theta, u) \mapsto (\theta^+, u^+)` and its exact derivative in k directions at once.

The map is the rule's pure ``update``, then prox or projection in the metric of the step, then the momentum set to the realised
displacement: what :mod:`stableopt.optim` does in place. Its derivative is taken in forward mode, for all directions in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.overrides import TorchFunctionMode

from stableopt.constraints import Regularizer
from stableopt.lyapunov.layers.forward import dual_numbers
from stableopt.optim.rules.base import Group, State, UpdateRule

__all__ = ["Pushed", "push", "tangent_names"]

_COUNTS = frozenset({"step", "mu_product"})
"""Entries of a state that depend on the number of steps alone; of a 0-d parameter they have the shape of the parameter."""


@dataclass(frozen=True)
class Pushed:
    """Where an update map leads, and where k tangents go.

    Args:
        parameter: after the step.
        state: after the step.
        d_parameter: ``(k, *shape)``.
        d_state: the tangents of the state's entries that carry some, each ``(k, *shape)``.
    """

    parameter: Tensor
    state: State
    d_parameter: Tensor
    d_state: dict[str, Tensor]


def tangent_names(rule: UpdateRule, state: State, parameter: Tensor) -> tuple[str, ...]:  # noqa: ARG001 - for other rules
    """Return the entries of a state that carry tangents: floating tensors shaped like the parameter, counts excepted.

    Args:
        rule: of the optimizer.
        state: of the parameter; an empty one, before the first step, carries none.
        parameter: the parameter.

    Examples:
        >>> from stableopt.optim.rules import Adaptive
        >>> w = torch.zeros(2)
        >>> tangent_names(Adaptive(), {"step": torch.ones(()), "exp_avg": w, "exp_avg_sq": w}, w)
        ('exp_avg', 'exp_avg_sq')
    """
    return tuple(
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.shape == parameter.shape
        and (value.is_floating_point() or value.is_complex())
        and name not in _COUNTS
    )


def push(
    rule: UpdateRule | None,
    group: Group,
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    d_parameter: Tensor,
    d_gradient: Tensor,
    d_state: dict[str, Tensor],
    *,
    regularizer: Regularizer | None = None,
    d_hyper: dict[str, Tensor] | None = None,
) -> Pushed:
    r"""Do one step of one parameter and push k tangents through it.

    Args:
        rule: of the optimizer.
        group: hyper-parameters.
        parameter: :math:`\theta` before the step, any shape.
        gradient: of the loss at it.
        state: of the parameter before the step, empty before the first one.
        d_parameter: ``(k, *shape)``.
        d_gradient: ``(k, *shape)``, what the tangents of everything make of the gradient.
        d_state: the tangents of entries of the state, each ``(k, *shape)``; a name that is left out has none.
        regularizer: the penalty or the set of the parameter.
        d_hyper: the tangents of hyper-parameters.

    Returns:
        The parameter and the state after the step, and their tangents.

    Examples:
        >>> from stableopt.optim.rules import HeavyBall
        >>> w, one = torch.tensor([2.0]), torch.ones(1, 1)
        >>> pushed = push(HeavyBall(), {"lr": 0.25, "momentum": 0.5}, w, w, {}, one, one, {})
        >>> pushed.parameter.item(), pushed.d_parameter.item(), pushed.d_state["momentum_buffer"].item()
        (1.5, 0.75, 1.0)
    """
    if rule is None or regularizer is not None or d_hyper:
        raise NotImplementedError("to follow")
    point = {"parameter": parameter, "gradient": gradient} | {name: state[name] for name in d_state}
    tangents = {"parameter": d_parameter, "gradient": d_gradient} | d_state

    def mapped(at: dict[str, Tensor]) -> tuple[Tensor, State]:
        held = state | {name: at[name] for name in d_state}
        return rule.update(at["parameter"], at["gradient"], held, group)

    with torch.no_grad():
        new, held = mapped(point)
        names = tangent_names(rule, held, new)

        def carried(at: dict[str, Tensor]) -> dict[str, Tensor]:
            moved, after = mapped(at)
            return {"parameter": moved, "state": {name: after[name] for name in names}}  # pyright: ignore[reportReturnType]

        pushed: Any = _tangents(carried, point, tangents)
    return Pushed(new, held, pushed["parameter"], pushed["state"])


def _tangents(
    function: Callable[[dict[str, Tensor]], Any], point: dict[str, Tensor], tangents: dict[str, Tensor]
) -> Any:
    """Return the derivative of a function at a point along each row of the tangents."""
    with dual_numbers():  # loads what the first dual number needs
        pass
    with _RootAtZero():
        return vmap(lambda direction: jvp(function, (point,), (direction,))[1])(tangents)


class _RootAtZero(TorchFunctionMode):
    """Give the square root the derivative 0 at 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.sqrt, torch.Tensor.sqrt) and not kwargs:
            x = args[0]
            flat = x == 0
            return torch.where(flat, torch.zeros_like(x), func(torch.where(flat, torch.ones_like(x), x)))
        return func(*args, **(kwargs or {}))
