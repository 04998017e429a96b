r"""A program as a torch module."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.arguments import shape_words
from stableopt.certify.execute import apply, is_composite, lower
from stableopt.certify.execute_weighted import plain_convolve
from stableopt.certify.program import Program
from stableopt.nn.activations import at_least_float32

__all__ = ["CertifiedNetwork", "flatten"]

Node = dict[str, Any]

_PRODUCTS = {"linear", "conv", "recurrence", "statespace", "attention", "gated"}


class CertifiedNetwork(nn.Module):
    r"""The network that a program describes, with exactly its numbers.

    Composite operations run as the simple ones that they stand for, so what runs is what the analysis of the rounding speaks about.

    Args:
        program: the operations and their tensors, which are copied.
        plain: whether convolutions are unfolded and run as matrix products. The default is the routine of torch, which is faster
            but may transform its inputs, and then the sums of a convolution are not those of its definition.

    Raises:
        ValueError: for an unknown operation.

    Note:
        The parameters are frozen. Their names are those of the tensors with dots as ``__``. The module is in evaluation mode and
        can be moved, cast, compiled and exported; cast to another dtype, its numbers are no longer the certified ones.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> graph = Builder((2,))
        >>> value = graph.add("linear", graph.input, weight=torch.eye(2), bias=None, transposed=False)
        >>> _ = graph.add("activation", value, name="relu")
        >>> CertifiedNetwork(graph.program())(torch.tensor([[1.0, -1.0]]))
        tensor([[1., 0.]])
    """

    def __init__(self, program: Program, *, plain: bool = False) -> None:
        super().__init__()
        self.shape, self.plain = program.shape, plain
        self.nodes = flatten(program.nodes, 1)
        self._keys: dict[str, str] = {}
        for name, value in program.tensors.items():
            key = name.replace(".", "__")
            while hasattr(self, key):
                key += "_"
            self._keys[name] = key
            self.register_parameter(key, nn.Parameter(value.detach().clone(), requires_grad=False))
        self._last = _last_uses(self.nodes)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the outputs of a batch of inputs, shape ``(batch, *shape)``."""
        if input.ndim == 0 or tuple(input.shape[1:]) != self.shape:
            raise ValueError(f"expected inputs of shape {shape_words(self.shape)}, got {tuple(input.shape)}.")
        tensors = self.tensors()
        values: dict[int, Tensor] = {0: input}
        for number, node in enumerate(self.nodes, 1):
            values[number] = self._run(node, tensors, [values[k] for k in node["in"]])
            for unused in self._last[number - 1]:
                del values[unused]
        return values[len(self.nodes)]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the program.

        Examples:
            >>> from stableopt.certify.program import Builder
            >>> CertifiedNetwork(Builder((2,)).program()).tensors()
            {}
        """
        return {name: getattr(self, key) for name, key in self._keys.items()}

    def _run(self, node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
        if self.plain and node["op"] == "conv":
            bias = None if node["bias"] is None else tensors[node["bias"]]
            return plain_convolve(node, tensors[node["weight"]], bias, inputs[0])
        if self.plain and node["op"] == "linear":  # of matrices: other products are stored before the bias is added
            rows = apply(node, tensors, [inputs[0].reshape(-1, inputs[0].shape[-1])])
            return rows.reshape(*inputs[0].shape[:-1], rows.shape[-1])
        if node["op"] in _PRODUCTS:
            return apply(node, tensors, inputs)
        kind = functools.reduce(torch.promote_types, (value.dtype for value in inputs))
        return apply(node, tensors, [at_least_float32(value) for value in inputs]).to(
            kind
        )  # half precision rounds once

    def extra_repr(self) -> str:
        """Return the shape of one input and the number of operations."""
        return f"{self.shape}, operations={len(self.nodes)}"


def flatten(nodes: Sequence[Node], inputs: int) -> list[Node]:
    """Replace composite operations by the simple ones that they stand for, and number the values anew.

    Args:
        nodes: the operations of a program.
        inputs: how many values come before them.

    Examples:
        >>> double = {"op": "sum", "in": [0, 0], "factors": [1.0, 1.0]}
        >>> flatten([double, double | {"in": [0, 1]}], 1)[1]["in"]
        [0, 1]
    """
    flat: list[Node] = []
    numbers = list(range(inputs))  # of the values of the program, in the new numbering
    for node in nodes:
        arguments = [numbers[k] for k in node["in"]]
        if not is_composite(node):
            flat.append({key: value for key, value in node.items() if key != "bound"} | {"in": arguments})
        else:
            start = inputs + len(flat) - len(arguments)  # inner value k >= the arguments is value start + k
            for inner in flatten(lower(node), len(arguments)):
                places = [arguments[k] if k < len(arguments) else start + k for k in inner["in"]]
                flat.append(inner | {"in": places})
        numbers.append(inputs + len(flat) - 1 if not is_composite(node) or lower(node) else arguments[0])
    return flat


def _last_uses(nodes: Sequence[Node]) -> list[list[int]]:
    """Return, for each operation, the values that no later one reads."""
    last = {number: index for index, node in enumerate(nodes) for number in node["in"]}
    return [[number for number, index in last.items() if index == k] for k in range(len(nodes))]
