"""The rules of GRU and LSTM layers and cells."""

from __future__ import annotations

import math

from torch import Tensor, nn

from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.certify.publish_gates import gated_reach, gated_scaling
from stableopt.errors import UncertifiableError
from stableopt.nn.input_clip import input_limit
from stableopt.nn.precision import wide

__all__ = ["add_gated", "check_batch", "check_sequence"]


def check_sequence(value: Value) -> None:
    """Refuse a value that is no sequence.

    Args:
        value: the value before a layer over time.

    Raises:
        ValueError: if its shape is not (steps, features).

    Examples:
        >>> check_sequence(Value(0, (5, 2)))
    """
    if len(value.shape) != 2:
        raise ValueError(f"a layer over time needs the shape (steps, features), got {value.shape}.")


def check_batch(batch_first: bool) -> None:
    """Refuse a layer that takes the first dimension for the time.

    Args:
        batch_first: its setting.

    Raises:
        UncertifiableError: if it is False.

    Examples:
        >>> check_batch(True)
    """
    if not batch_first:
        raise UncertifiableError("it has batch_first=False, and a certificate takes the first dimension for the batch.")


def add_gated(
    graph: Builder,
    value: Value,
    module: nn.RNNBase | nn.RNNCellBase,
    suffix: str,
    *,
    reverse: bool,
    limit: float,
    initial: Tensor | None = None,
) -> tuple[Value, float]:
    """Append one direction of one layer of a GRU or LSTM.

    Args:
        graph: the program.
        value: its input, a sequence.
        module: the layer or cell.
        suffix: the end of the names of its weights.
        reverse: whether it runs backwards in time.
        limit: to which the moduli of its inputs are clipped; infinity for no limit.
        initial: a learned initial state.

    Returns:
        The outputs, and a limit of their moduli.

    Raises:
        UncertifiableError: for an initial state, or a gain that is too large for float64.

    Examples:
        >>> import torch
        >>> graph = Builder((5, 2))
        >>> cell = nn.GRUCell(2, 3, dtype=torch.float64)
        >>> add_gated(graph, graph.input, cell, "", reverse=False, limit=1.0)[0].shape
        (5, 3)
    """
    check_sequence(value)
    if initial is not None:
        raise UncertifiableError(
            "it learns its initial state, and what is proved about gates starts from zeros. Build it with learn_initial=False."
        )
    names = {
        "weight": "weight_hh",
        "input": "weight_ih",
        "bias": "bias_ih",
        "hidden_bias": "bias_hh",
        "projection": "weight_hr",
    }
    tensors = {key: getattr(module, f"{name}{suffix}", None) for key, name in names.items()}
    settings = {key: None if tensor is None else wide(tensor.detach()) for key, tensor in tensors.items()} | {
        "kind": "gru" if isinstance(module, nn.GRU | nn.GRUCell) else "lstm",
        "limit": None if math.isinf(limit) else limit,
        "reverse": reverse,
        "length": value.shape[0],
    }
    return graph.add("gated", value, **settings, scaling=gated_scaling(settings, graph.norm)), gated_reach(settings)


@fold.register(nn.GRU)
@fold.register(nn.LSTM)
def _(module: nn.GRU | nn.LSTM, graph: Builder, value: Value) -> Value:
    check_batch(module.batch_first)
    limit = input_limit(module)
    for layer in range(module.num_layers):
        suffixes = [(f"_l{layer}", False), (f"_l{layer}_reverse", True)][: 2 if module.bidirectional else 1]
        found = [add_gated(graph, value, module, name, reverse=back, limit=limit) for name, back in suffixes]
        value = found[0][0] if len(found) == 1 else graph.add("concat", *(output for output, _ in found), axis=1)
        limit = max(reach for _, reach in found) * (1.0 + 1e-6)  # the next layer clips what never is as large
    return value
