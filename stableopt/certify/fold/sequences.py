"""The rules of layers over time: recurrent cells, torch's plain recurrence, state spaces, and what reads off a sequence."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.fold.gates import add_gated, check_batch, check_sequence
from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.certify.publish_recurrence import state_metric
from stableopt.certify.publish_sequences import state_scaling
from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import check_forward
from stableopt.nn.input_clip import input_limit
from stableopt.nn.precision import wide
from stableopt.nn.recurrent import (
    AntisymmetricCell,
    ContractingCell,
    DiagonalMetricCell,
    LastStep,
    LeakyCell,
    MeanOverTime,
    Recurrence,
)
from stableopt.nn.statespace.capped import CappedLinear
from stableopt.nn.statespace.diagonal import DiagonalStateSpace
from stableopt.nn.statespace.stack import StateSpaceBlock, StateSpaceStack

__all__ = ["cell_law", "unit_activation"]


def unit_activation(name: str) -> dict[str, Any]:
    """Return the activation with slopes in [0, 1] that a cell names, as an operation.

    Args:
        name: a key of :data:`stableopt.nn.unit_slopes.UNIT_SLOPES`.

    Examples:
        >>> unit_activation("leaky_relu")
        {'op': 'activation', 'name': 'leaky_relu', 'slope': 0.01}
    """
    settings: dict[str, dict[str, float]] = {
        "leaky_relu": {"slope": 0.01},
        "softplus": {"beta": 1.0},
        "hardtanh": {"min": -1.0, "max": 1.0},
    }
    return {"op": "activation", "name": name, **settings.get(name, {})}


@functools.singledispatch
def cell_law(cell: nn.Module) -> dict[str, Any]:
    """Return the tensors of one step of a cell: ``weight``, ``input``, ``bias``, ``step``, ``outer``, ``activation``, ``hint``.

    Args:
        cell: the cell.

    Raises:
        UncertifiableError: for a class without a law.

    Examples:
        >>> law = cell_law(nn.RNNCell(2, 3))
        >>> tuple(law["weight"].shape), law["activation"]["name"]
        ((3, 3), 'tanh')
    """
    raise UncertifiableError(
        f"no law of one step is known for {type(cell).__name__}. Use one of the cells of stableopt.nn."
    )


def _law(weight: Tensor, inputs: Tensor, bias: Tensor | None, activation: str, **others: Any) -> dict[str, Any]:
    tensors = {"weight": wide(weight), "input": wide(inputs), "bias": None if bias is None else wide(bias)}
    return {"step": None, "outer": None, "hint": None, **tensors, "activation": unit_activation(activation), **others}


@cell_law.register
def _(cell: ContractingCell) -> dict[str, Any]:
    U, A, step = cell.prepared()
    return _law(A, U, cell.bias, cell.activation, step=wide(step))


@cell_law.register
def _(cell: LeakyCell) -> dict[str, Any]:
    U, W, step = cell.prepared()
    return _law(W, U, cell.bias, cell.activation, step=wide(step).expand(len(W)))


@cell_law.register
def _(cell: DiagonalMetricCell) -> dict[str, Any]:
    U, W = cell.prepared()
    return _law(W, U, cell.bias, cell.activation, hint=cell.scaling())


@cell_law.register
def _(cell: AntisymmetricCell) -> dict[str, Any]:
    U, A, Q, step, damping = cell.prepared()
    return _law(A, U, cell.bias, cell.activation, step=step.expand(len(A)), outer=damping * wide(Q))


@cell_law.register
def _(cell: nn.RNNCell) -> dict[str, Any]:
    return _plain_law(cell, "")


def _plain_law(module: nn.RNN | nn.RNNCell, suffix: str) -> dict[str, Any]:
    W, U = (getattr(module, f"weight_{kind}{suffix}") for kind in ("hh", "ih"))
    biases = [wide(getattr(module, f"bias_{kind}{suffix}")) for kind in ("ih", "hh")] if module.bias else []
    return _law(W, U, biases[0] + biases[1] if biases else None, module.nonlinearity)


def _add_recurrence(
    graph: Builder, value: Value, law: dict[str, Any], *, reverse: bool, initial: Tensor | None = None
) -> Value:
    check_sequence(value)
    law, length = dict(law), value.shape[0]
    hint = law.pop("hint")
    state, scaling = state_metric((law["weight"], law["input"]), law["step"], law["outer"], graph.norm, length, hint)
    start = None if initial is None else wide(initial)
    return graph.add(
        "recurrence", value, **law, initial=start, reverse=reverse, length=length, state=state, scaling=scaling
    )


@fold.register(Recurrence)
def _(module: Recurrence, graph: Builder, value: Value) -> Value:
    check_batch(module.batch_first)
    if module.return_state:
        raise UncertifiableError("it returns a pair; build it with return_state=False.")
    if module.length is not None and value.shape[0] > module.length:
        raise ValueError(f"it is declared for at most length={module.length} steps, got {value.shape[0]}.")
    kind = next((kind for kind in type(module.cell).__mro__ if kind in cell_law.registry and kind is not object), None)
    if kind is not None:
        check_forward(module.cell, kind, f"{graph.path}.cell" if graph.path else "cell")
    if isinstance(module.cell, nn.GRUCell):
        limit, start = input_limit(module.cell), module.initial
        return add_gated(graph, value, module.cell, "", reverse=module.reverse, limit=limit, initial=start)[0]
    value = _clipped(module.cell, graph, value)
    return _add_recurrence(graph, value, cell_law(module.cell), reverse=module.reverse, initial=module.initial)


def _clipped(module: nn.Module, graph: Builder, value: Value) -> Value:
    """Clamp the inputs as :func:`stableopt.nn.clip_input` does."""
    limit = input_limit(module)
    return value if math.isinf(limit) else graph.add("activation", value, name="hardtanh", min=-limit, max=limit)


@fold.register(nn.RNN)
def _(module: nn.RNN, graph: Builder, value: Value) -> Value:
    check_batch(module.batch_first)
    value = _clipped(module, graph, value)
    for layer in range(module.num_layers):
        suffixes = [(f"_l{layer}", False), (f"_l{layer}_reverse", True)][: 2 if module.bidirectional else 1]
        outputs = [_add_recurrence(graph, value, _plain_law(module, name), reverse=back) for name, back in suffixes]
        value = outputs[0] if len(outputs) == 1 else graph.add("concat", *outputs, axis=1)
    return value


@fold.register(LastStep)
def _(module: LastStep, graph: Builder, value: Value) -> Value:
    check_batch(module.batch_first)
    check_sequence(value)
    length, size = value.shape
    return graph.add("reshape", graph.add("slice", value, axis=0, start=length - 1, stop=length), shape=[size])


@fold.register(MeanOverTime)
def _(module: MeanOverTime, graph: Builder, value: Value) -> Value:
    check_batch(module.batch_first)
    check_sequence(value)
    if value.shape[0] < module.shortest:
        raise ValueError(f"it is declared for at least {module.shortest} steps, got {value.shape[0]}.")
    return graph.add("mean", value, axis=0)


@fold.register(DiagonalStateSpace)
def _(module: DiagonalStateSpace, graph: Builder, value: Value) -> Value:
    check_sequence(value)
    with torch.no_grad():
        system = module.system()
    parts = {
        "real": system.real,
        "imag": system.imag,
        "input": system.input,
        "output": system.output,
        "skip": system.skip,
    }
    scaling, split = state_scaling(parts, graph.norm, float(system.weight))
    settings = {"bidirectional": module.bidirectional, "length": value.shape[0], "states": len(system.real)}
    return graph.add("statespace", value, **parts, **settings, scaling=scaling, split=split)


@fold.register(StateSpaceBlock)
def _(module: StateSpaceBlock, graph: Builder, value: Value) -> Value:
    mixed = graph.fold(module.time, value, "time")
    a = float(module.weight().detach())
    return graph.fold(module.features, graph.add("sum", value, mixed, factors=[1.0 - a, a]), "features")


@fold.register(CappedLinear)
def _(module: CappedLinear, graph: Builder, value: Value) -> Value:
    bias = None if module.bias is None else wide(module.bias)
    return graph.add("linear", value, weight=module.matrix(), bias=bias, transposed=False)


@fold.register(StateSpaceStack)
def _(module: StateSpaceStack, graph: Builder, value: Value) -> Value:
    chain = OrderedDict(encoder=module.encoder, **{f"blocks.{i}": block for i, block in enumerate(module.blocks)})
    for name, part in OrderedDict(chain, decoder=module.decoder).items():
        value = graph.fold(part, value, name)
    return value
