r"""The registry of the operations of a program: how each runs, and of which simpler ones a composite one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Lowering", "Node", "Operation", "apply", "is_composite", "lower", "lowering", "operation", "run"]

Node: TypeAlias = dict[str, Any]
Operation: TypeAlias = Callable[[Node, Mapping[str, Tensor], list[Tensor]], Tensor]
Lowering: TypeAlias = Callable[[Node], list[Node]]

_OPERATIONS: dict[str, Operation] = {}
_LOWERINGS: dict[str, Lowering] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register the function that runs an operation: ``(node, tensors, inputs) -> output``, all with a batch dimension.

    Args:
        name: the name of the operation.

    Examples:
        >>> import torch
        >>> from stableopt.certify.execute import apply
        >>> apply({"op": "scale", "in": [0], "factor": 2.0}, {}, [torch.ones(1, 2)])
        tensor([[2., 2.]])
    """

    def register(function: Operation) -> Operation:
        _OPERATIONS[name] = function
        return function

    return register


def lowering(name: str) -> Callable[[Lowering], Lowering]:
    """Register the small program that a composite operation stands for: ``(node) -> list of operations``.

    Value 0, 1, ... of the small program are the inputs of the composite one, operation k makes the value ``inputs + k``, and the
    last value is its output. The tensors keep their names.

    Args:
        name: the name of the composite operation.

    Examples:
        >>> @lowering("twice")
        ... def _(node):
        ...     return [{"op": "sum", "in": [0, 0], "factors": [1.0, 1.0]}]
        >>> lower({"op": "twice", "in": [4]})
        [{'op': 'sum', 'in': [0, 0], 'factors': [1.0, 1.0]}]
    """

    def register(function: Lowering) -> Lowering:
        _LOWERINGS[name] = function
        return function

    return register


def is_composite(node: Node) -> bool:
    """Return whether an operation is made of simpler ones.

    Examples:
        >>> is_composite({"op": "scale", "in": [0], "factor": 2.0})
        False
    """
    return node["op"] in _LOWERINGS


def lower(node: Node) -> list[Node]:
    """Return the operations that a composite one stands for; another operation stands for itself.

    Examples:
        >>> lower({"op": "scale", "in": [3], "factor": 2.0})
        [{'op': 'scale', 'in': [0], 'factor': 2.0}]
    """
    if node["op"] in _LOWERINGS:
        return _LOWERINGS[node["op"]](node)
    return [node | {"in": list(range(len(node["in"])))}]


def run(nodes: Sequence[Node], tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Run operations in order on the values before them; return the last value.

    Args:
        nodes: the operations; the numbers below ``len(inputs)`` are the inputs.
        tensors: the tensors that they name.
        inputs: the batches that they start from.

    Examples:
        >>> import torch
        >>> from stableopt.certify.execute import run
        >>> double = {"op": "sum", "in": [0, 0], "factors": [1.0, 1.0]}
        >>> run([double, double | {"in": [0, 1]}], {}, [torch.ones(1, 1)])
        tensor([[3.]])
    """
    values = list(inputs)
    for node in nodes:
        values.append(apply(node, tensors, [values[number] for number in node["in"]]))
    return values[-1]


def apply(node: Node, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Run one operation on a batch.

    Args:
        node: the operation, real settings as floats.
        tensors: the tensors that it names, in the dtype and on the device of the inputs.
        inputs: the batches that it reads, first dimension the batch.

    Raises:
        ValueError: for an unknown operation.

    Examples:
        >>> import torch
        >>> from stableopt.certify.execute import apply
        >>> apply({"op": "sum", "in": [0, 0], "factors": [1.0, -1.0]}, {}, [torch.ones(1, 2), torch.ones(1, 2)])
        tensor([[0., 0.]])
    """
    if node["op"] in _OPERATIONS:
        return _OPERATIONS[node["op"]](node, tensors, list(inputs))
    if node["op"] in _LOWERINGS:
        return run(lower(node), tensors, inputs)
    raise ValueError(f"the operation {node['op']!r} is unknown.")
