r"""Programs: the form in which a certificate describes a network.

A program is a list of operations in the order in which they run. Value 0 is the input, operation :math:`k` makes value
:math:`k + 1`, and the last value is the output. The shapes are those of one sample, without the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stableopt.certify.execute import apply
from stableopt.errors import UncertifiableError

__all__ = ["Builder", "Node", "Program", "Value", "nested_tensors", "output_shape"]

Node: TypeAlias = dict[str, Any]
"""One operation: ``op``, the numbers ``in`` of its inputs, its settings, the names of its tensors, and its ``bound``."""

_MANY = 5_000_000
"""Products in a convolution beyond which its shape is found without numbers."""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Value:
    """A number of a program and the shape of what it stands for.

    Examples:
        >>> Value(0, (3,)).shape
        (3,)
    """

    number: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """Operations, their tensors, and the shape of one input.

    Args:
        nodes: the operations in order.
        tensors: the tensors that they name, on the CPU.
        shape: the shape of one input.
        norm: the norm in which the bounds hold: ``"l2"``, ``"linf"`` or ``"token_max"``.

    Examples:
        >>> graph = Builder((2,))
        >>> _ = graph.add("scale", graph.input, factor=2.0)
        >>> graph.program().nodes
        ({'op': 'scale', 'in': [0], 'factor': 2.0},)
    """

    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    shape: tuple[int, ...]
    norm: str = "l2"


@dataclass
class Builder:
    """A program under construction: what the rules of :func:`stableopt.certify.fold` write into.

    Args:
        shape: the shape of one input.
        norm: the norm in which the bounds will be proved.

    Examples:
        >>> graph = Builder((3,))
        >>> value = graph.add("linear", graph.input, weight=torch.ones(2, 3), bias=None, transposed=False)
        >>> value
        Value(number=1, shape=(2,))
        >>> graph.nodes[0]["weight"], sorted(graph.tensors)
        ('0.weight', ['0.weight'])
    """

    shape: tuple[int, ...]
    norm: str = "l2"
    nodes: list[Node] = field(default_factory=list[Node])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    path: str = ""
    rule: Callable[[nn.Module, Builder, Value], Value] | None = field(default=None, repr=False)

    @property
    def input(self) -> Value:
        """The input of the program."""
        return Value(0, self.shape)

    def add(self, op: str, *inputs: Value, **settings: Any) -> Value:
        """Append an operation and return its value.

        Args:
            op: its name.
            inputs: the values that it reads.
            settings: its settings; tensors are copied and get the name of the module that is folded.

        Raises:
            ValueError: if a tensor is empty or not finite, or the operation does not fit the shapes before it.
            UncertifiableError: for a tensor of a dtype that cannot be stored.

        Examples:
            >>> graph = Builder((2,))
            >>> graph.add("sum", graph.input, graph.input, factors=[1.0, 0.5]).shape
            (2,)
        """
        node: Node = {"op": op, "in": [value.number for value in inputs]}
        node |= {key: self._named(value, key) for key, value in settings.items()}
        shape = self._shape_after(node, inputs)
        self.nodes.append(node)
        return Value(len(self.nodes), shape)

    def fold(self, module: nn.Module, value: Value, name: str) -> Value:
        """Fold a child of the module that is being folded.

        Args:
            module: the child.
            value: its input.
            name: its name in its parent.

        Examples:
            >>> from stableopt.certify import fold
            >>> graph = Builder((2,), rule=fold)
            >>> graph.fold(nn.ReLU(), graph.input, "0").number
            1
        """
        if self.rule is None:
            raise ValueError("this Builder has no rule to fold modules with; give it rule=stableopt.certify.fold.")
        path, self.path = self.path, f"{self.path}.{name}" if self.path else name
        try:
            return self.rule(module, self, value)
        finally:
            self.path = path

    def program(self) -> Program:
        """Return the finished program; its last value is the output.

        Examples:
            >>> Builder((2,)).program().nodes
            ()
        """
        return Program(tuple(self.nodes), dict(self.tensors), self.shape, self.norm)

    def _named(self, value: Any, key: str) -> Any:
        """Replace the tensors in a setting by names, and keep copies of them."""
        if isinstance(value, dict):
            return {inner: self._named(entry, inner) for inner, entry in value.items()}
        if not isinstance(value, Tensor):
            return value
        stem = f"{self.path}.{key}" if self.path else f"{len(self.nodes)}.{key}"
        name, count = stem, 1
        while name in self.tensors:
            name, count = f"{stem}.{count}", count + 1
        self.tensors[name] = _storable(value, name)
        return name

    def _shape_after(self, node: Node, inputs: tuple[Value, ...]) -> tuple[int, ...]:
        try:
            return output_shape(node, self.tensors, [value.shape for value in inputs])
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(value.shape) for value in inputs)
            where = f"'{self.path}'" if self.path else "the module"
            raise ValueError(f"{where} ({node['op']}) does not fit the shape {shapes} before it: {error}") from None


def output_shape(node: Node, tensors: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the output of an operation, by running it once on zeros, a large convolution without numbers.

    Args:
        node: the operation.
        tensors: the tensors that it names.
        shapes: the shapes of its inputs, without the batch.

    Raises:
        RuntimeError: or ValueError or IndexError, as the operation does: if it does not fit the shapes.

    Examples:
        >>> output_shape({"op": "sum", "in": [0, 0], "factors": [1.0, 1.0]}, {}, [(2,), (2,)])
        (2,)
    """
    if node["op"] == "conv" and tensors[node["weight"]].numel() * math.prod(shapes[0][1:]) > _MANY:
        try:
            return _shape_on("meta", node, tensors, shapes)
        except (RuntimeError, NotImplementedError):
            pass  # the message is the better one with numbers
    return _shape_on("cpu", node, tensors, shapes)


def _shape_on(
    device: str, node: Node, tensors: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    used = {name: tensors[name].to(device).double() for name in nested_tensors(node) if name in tensors}
    zeros = [torch.zeros(1, *shape, dtype=torch.float64, device=device) for shape in shapes]
    with torch.no_grad():
        return tuple(apply(node, used, zeros).shape[1:])


def nested_tensors(node: Node) -> Iterator[str]:
    """Yield the strings in the settings of a node and of the nodes nested in it, among them the names of all its tensors.

    Examples:
        >>> list(nested_tensors({"op": "linear", "in": [0], "weight": "w", "bias": None}))
        ['w']
    """
    for key, value in node.items():
        if isinstance(value, dict):
            yield from nested_tensors(value)
        elif isinstance(value, str) and key not in {"op", "name"}:
            yield value


def _storable(value: Tensor, name: str) -> Tensor:
    if value.dtype not in _DTYPES:
        raise UncertifiableError(
            f"tensor '{name}' has dtype {value.dtype}; a certificate stores float64, 32, 16 and bfloat16."
        )
    value = value.detach().cpu().contiguous().clone()
    if value.numel() == 0 or not torch.isfinite(value).all():
        raise ValueError(
            f"tensor '{name}' of shape {tuple(value.shape)} is empty or holds NaN or infinity: nothing holds for it."
        )
    return value
