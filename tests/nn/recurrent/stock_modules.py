"""Torch's recurrent modules as maps of states, for the tests of what is proved about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stableopt.nn import clip_input

Make = Callable[..., Any]
Module = TypeVar("Module", bound=nn.Module)

GATED: dict[str, Make] = {"gru": nn.GRU, "lstm": nn.LSTM}
PLAIN: dict[str, Make] = {"tanh": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}


def scaled(module: Module, factor: float) -> Module:
    """The module with all parameters multiplied."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    return module


def gated(kind: str, inputs: int, units: int, factor: float, *, bound: float = 1.0, **options: Any) -> Any:
    """A GRU or LSTM with small weights and clipped inputs."""
    return clip_input(scaled(GATED[kind](inputs, units, **options), factor), bound)


def outputs(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from input to output sequences, ``(batch, time, features)``, of a module with ``batch_first``."""
    return lambda x: module(x)[0]


def one_step(module: Any, state: Tensor, x: Tensor) -> Tensor:
    """Torch's own next state (of an LSTM, c before h) for a flat state; ``(states,)`` and ``(inputs,)``."""
    if isinstance(module, nn.LSTM):
        size = module.hidden_size
        c, h = state[:size], state[size:]
        _, (h, c) = module(x.view(1, -1), (h.view(1, -1), c.view(1, -1)))
        return torch.cat([c.flatten(), h.flatten()])
    return module(x.view(1, -1), state.view(1, -1))[1].flatten()


def jacobians(module: nn.Module, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of one step by the state and by the input."""
    J = torch.autograd.functional.jacobian(lambda s, v: one_step(module, s, v), (state, x))
    return J[0], J[1]  # pyright: ignore[reportReturnType, reportIndexIssue]
