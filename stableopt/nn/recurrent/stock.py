r"""Rules for torch's recurrent layers and cells as they are: RNN, GRU and LSTM.

What is proved about one step is in ``stock_rnn``, ``stock_gru`` and ``stock_lstm``; here are their weights and the layers that
are made of them. A layer of two directions joins their outputs, so its gain is the vector norm of the two gains; layers on top of
each other multiply. The constant of a whole layer is that of the map from the input sequence to the output sequence, the first of
the two things that torch returns, for runs from the zero state; dropout between layers is off. With ``batch_first=False`` the
batch is the second dimension, and the norm is one of a sequence, not of a step of all sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.dispatch import TOKEN_MAX, check_forward, lipschitz_rule, require_norm
from stableopt.nn.input_clip import input_limit
from stableopt.nn.parametrized import plain_class
from stableopt.nn.recurrent.bounds import FEATURE_NORMS, CellBound, cell_rule
from stableopt.nn.recurrent.comparison import Comparison, cell_constants, sequence_constant
from stableopt.nn.recurrent.gates import Array
from stableopt.nn.recurrent.stock_gru import GatedStep
from stableopt.nn.recurrent.stock_lstm import MemoryStep
from stableopt.nn.recurrent.stock_rnn import PlainStep
from stableopt.nn.tokens import token_rule

__all__ = ["STOCK_CELLS", "STOCK_LAYERS", "layer_bounds", "remedy", "steps_of"]

STOCK_LAYERS: tuple[type[nn.RNNBase], ...] = (nn.RNN, nn.GRU, nn.LSTM)
STOCK_CELLS: tuple[type[nn.RNNCellBase], ...] = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


@dataclass(frozen=True)
class Direction:
    """One direction of one layer of a recurrent module.

    Args:
        name: what torch appends to the names of its weights, ``"l0"`` or ``"l1_reverse"``; empty for a cell.
        step: how differences grow in it.
    """

    name: str
    step: Comparison


def steps_of(module: nn.Module) -> list[list[Direction]]:
    """Return the comparison maps of the layers of a recurrent module, each with one or two directions.

    Args:
        module: one of torch's recurrent layers or cells.

    Raises:
        TypeError: if it is none.
        ValueError: if a weight holds NaN or infinity.

    Examples:
        >>> [[direction.name for direction in layer] for layer in steps_of(nn.GRU(2, 3, 2, bidirectional=True))]
        [['l0', 'l0_reverse'], ['l1', 'l1_reverse']]
    """
    if isinstance(module, STOCK_CELLS):
        return [[Direction("", _step(module, "", np.full(module.input_size, input_limit(module))))]]
    if not isinstance(module, STOCK_LAYERS):
        raise TypeError(f"one of torch's recurrent layers or cells is expected, got {type(module).__name__}.")
    limits = np.full(module.input_size, input_limit(module))
    stack: list[list[Direction]] = []
    for layer in range(module.num_layers):
        names = [f"l{layer}", f"l{layer}_reverse"][: 2 if module.bidirectional else 1]
        stack.append([Direction(name, _step(module, name, limits)) for name in names])
        limits = np.concatenate([direction.step.reach for direction in stack[-1]])
    return stack


def _step(module: nn.Module, suffix: str, limits: Array) -> Comparison:
    def weight(kind: str) -> Tensor | None:
        return getattr(module, f"{kind}_{suffix}" if suffix else kind, None)

    W_h, W_x, b_x, b_h = (weight(kind) for kind in ("weight_hh", "weight_ih", "bias_ih", "bias_hh"))
    if W_h is None or W_x is None:
        raise TypeError(f"{type(module).__name__} has no weight for {suffix!r}.")
    kind = plain_class(module)
    if issubclass(kind, nn.GRU | nn.GRUCell):
        return GatedStep(W_h, W_x, b_x, b_h, limits)
    if issubclass(kind, nn.LSTM | nn.LSTMCell):
        return MemoryStep(W_h, W_x, b_x, b_h, weight("weight_hr"), limits)
    return PlainStep(W_h, W_x, [b_x, b_h], bounded=module.nonlinearity == "tanh")


def remedy(module: nn.Module) -> str:
    """Return the sentence that says how to make a recurrent module contract.

    Examples:
        >>> remedy(nn.RNN(1, 1))
        'Call stableopt.nn.contracting(module, rate) to keep it so while training'
    """
    kind = plain_class(module)
    if issubclass(kind, nn.RNN | nn.RNNCell) or math.isfinite(input_limit(module)):
        return "Call stableopt.nn.contracting(module, rate) to keep it so while training"
    return (
        "Its gates can stay open for large inputs: call stableopt.nn.contracting(module, rate, input_bound=u), which clips the "
        "inputs and keeps its weights within limits, or stableopt.nn.clip_input(module, u) if the weights are small enough already"
    )


def layer_bounds(module: nn.Module, norm: str = "l2") -> dict[str, CellBound]:
    """Return the constants of a step for each layer and direction of a recurrent module.

    Args:
        module: RNN, GRU, LSTM or one of their cells.
        norm: of one input and one output of a layer, ``"l2"``, ``"linf"`` or ``"l1"``; ``"token_max"`` is measured in l2.

    Returns:
        The bounds by the ends of the names of the weights, such as ``"l0"`` and ``"l0_reverse"``; ``""`` for a cell.

    Raises:
        TypeError: if the module is of another class.
        ValueError: if the norm is unknown, or a weight holds NaN or infinity.
        UncertifiableError: if a hook or a subclass may change its map.

    Examples:
        >>> _ = nn.init.eye_((rnn := nn.RNN(2, 2, 2)).weight_hh_l1)
        >>> {name: round(bound.state.upper, 9) for name, bound in layer_bounds(rnn).items()}["l1"]
        1.0
    """
    require_norm(norm)
    for kind in (*STOCK_LAYERS, *STOCK_CELLS):
        if isinstance(module, kind):
            check_forward(module, kind)
    return {
        direction.name: cell_constants(direction.step, FEATURE_NORMS[norm])
        for layer in steps_of(module)
        for direction in layer
    }


@cell_rule.register(nn.RNN)
@cell_rule.register(nn.GRU)
@cell_rule.register(nn.LSTM)
@cell_rule.register(nn.RNNCell)
@cell_rule.register(nn.GRUCell)
@cell_rule.register(nn.LSTMCell)
def _cell(cell: nn.Module, norm: str) -> CellBound:
    if isinstance(cell, nn.RNNBase) and (cell.num_layers > 1 or cell.bidirectional):
        raise UncertifiableError(
            f"{type(cell).__name__} has {cell.num_layers} layers in {2 if cell.bidirectional else 1} directions, which are no "
            "single cell; ask stableopt.nn.layer_bounds for each of them, or stableopt.nn.lipschitz for the whole."
        )
    return cell_constants(steps_of(cell)[0][0].step, norm)


def _gains(module: nn.Module, norm: str) -> Iterator[float]:
    """Yield the gain of each layer, both directions together."""
    for layer in steps_of(module):
        gains: list[float] = []
        for direction in layer:
            gain, bound = sequence_constant(direction.step, norm)
            if math.isinf(gain):
                raise UncertifiableError(_reason(module, norm, direction.name, bound))
            gains.append(gain)
        yield _joined(gains, norm)


def _joined(gains: list[float], norm: str) -> float:
    """Return the gain of directions whose outputs stand side by side."""
    if len(gains) == 1 or norm == "linf":
        return max(gains)
    power = 1 if norm == "l1" else 2
    total = sum((Bound.point(gain) ** power for gain in gains), start=Bound.point(0.0))
    return total.upper if power == 1 else total.sqrt().upper


def _reason(module: nn.Module, norm: str, name: str, bound: CellBound) -> str:
    return (
        f"no {norm} Lipschitz bound for sequences of every length is known for {plain_class(module).__name__}: it is not proved to "
        f"contract, a step of {name} has the factor {bound.state.upper:.4g} in {bound.metric}. {remedy(module)}; or bound "
        "sequences of one length by stableopt.nn.sequence_gain."
    )


@lipschitz_rule.register(nn.RNN)
@lipschitz_rule.register(nn.GRU)
@lipschitz_rule.register(nn.LSTM)
def _layer(module: nn.RNNBase, norm: str) -> Bound:
    total = functools.reduce(lambda product, gain: product * gain, _gains(module, norm), Bound.point(1.0))
    return Bound(0.0, total.upper)


@token_rule.register(nn.RNN)
@token_rule.register(nn.GRU)
@token_rule.register(nn.LSTM)
def _layer_token(module: nn.RNNBase) -> Bound:
    return _layer(module, TOKEN_MAX)
