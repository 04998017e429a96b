r"""Which modules of a model come one after another, so that the growth of the whole is the product of theirs.

A point of a computation is a *cut* if everything that depends on the input and reaches the output passes through it: the output of
a layer in a chain is one, and the sum of a residual block, but no point within its branch. The cuts are found in the graph of the
operations of one evaluation, recorded below autograd; functions without a module (``relu``, ``flatten``, a sum) are in it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating
from stableopt.optim import RandomState

__all__ = ["Trunk", "find_trunk"]


@dataclass(frozen=True)
class Trunk:
    """The layers of a model along the data.

    Args:
        layers: names of the calls that have a matrix or a kernel. Each goes on to where the next one begins, so activations and
            normalizations belong to the layer before them; the first begins at the input. A module is split into its parts if
            all of them with a matrix lie on the trunk: a chain is split and a residual block is not. A model that is no chain
            is one layer.
        modules: all calls from the input to the output, if modules are all there is; empty if functions lie between them, of
            which the weights say nothing.

    Examples:
        >>> Trunk(("",)).depth
        1
    """

    layers: tuple[str, ...]
    modules: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.layers)


def find_trunk(model: nn.Module, probe: Callable[[], Any], start: RandomState | None = None) -> Trunk:
    """Find the layers of a model by one evaluation of a loss.

    Args:
        model: the model.
        probe: evaluates a loss by calling it.
        start: the random state to begin with.

    Raises:
        ProbeError: if the probe does not call the model, or the output does not depend on the input.

    Note:
        The evaluation holds all intermediate results, as a training step does, and takes some microseconds per operation more
        than one without gradients.

    Examples:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(2, 2)
        ...
        ...     def forward(self, x):
        ...         return x + self.inner(x).relu()
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Block(), nn.Linear(2, 1))
        >>> x = torch.ones(1, 2)
        >>> find_trunk(model, lambda: model(x).sum()).layers
        ('0', '2', '3')
    """
    flow = _Flow()
    recorder = _Recorder(flow)
    walk = Walk(model, probe, recorder)
    with flow:
        walk.run(start)
    root = recorder.root
    if recorder.opaque:
        raise ProbeError(
            f"the model returns a {recorder.opaque} in which no tensors are found: let it return tensors, alone or in tuples, "
            "lists and dicts, or register the class with torch.export.register_dataclass"
        )
    if root is None or not root.leaves:
        raise ProbeError("the output does not depend on the input")
    cuts, reached = flow.cuts(root.leaves)
    parts = _parts(root, cuts, reached)
    ends = [(call.enters & reached, call.leaves & reached) for call in parts]
    joints = zip(
        [{_SOURCE}, *(leaves for _, leaves in ends)], [*(enters for enters, _ in ends), root.leaves], strict=True
    )
    closed = all(left == right for left, right in joints)
    layers = tuple(call.name for call in parts if call.has_matrix) or (root.name,)
    return Trunk(layers, tuple(call.name for call in parts) if closed else ())


_SOURCE = 0


@dataclass(eq=False)
class _Call:
    name: str
    has_matrix: bool
    enters: set[int]
    leaves: set[int] = field(default_factory=set)
    inner: list[_Call] = field(default_factory=list)


def _parts(call: _Call, cuts: set[int], reached: set[int]) -> list[_Call]:
    """Split a call into those in it, if all that have parameters lie on the trunk."""
    inner = [one for one in call.inner if one.leaves & reached - {_SOURCE}]
    heavy = [one for one in inner if one.has_matrix]
    if not heavy or not all(_is_cut(one.enters, cuts, reached) and _is_cut(one.leaves, cuts, reached) for one in heavy):
        return [call]
    on_trunk = [one for one in inner if one.has_matrix or _is_cut(one.leaves, cuts, reached)]
    return [part for one in on_trunk for part in _parts(one, cuts, reached)]


def _is_cut(ends: set[int], cuts: set[int], reached: set[int]) -> bool:
    on_path = ends & reached
    return len(on_path) == 1 and on_path <= cuts


class _Flow(TorchDispatchMode):
    """Number the memory of every tensor that depends on the input by the last operation that wrote to it.

    Views share the memory and the number of their base, and writing in place gives it a new one. All results are kept until the
    end, so that no memory is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._parents: list[set[int]] = []
        self._now: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def begin(self, x: Tensor) -> None:
        """Forget everything, and let this be the source."""
        self._parents, self._now, self._kept = [set()], {}, []
        self._write([x], _SOURCE)

    def numbers(self, tree: Any) -> set[int]:
        """Return the numbers of the tensors that depend on the input."""
        memory = [_memory(t) for t in tree_leaves(tree) if isinstance(t, Tensor)]
        return {self._now[m] for m in memory if m in self._now}

    def cuts(self, ends: set[int]) -> tuple[set[int], set[int]]:
        """Return the operations that everything passes through, and all that lead to the ends.

        In the order of their numbers, an operation is a cut if no edge leads from one before it to one after it.
        """
        last = len(self._parents)
        parents = [*self._parents, ends]
        reached, furthest = {last}, [0] * (last + 1)
        for number in range(last, -1, -1):
            if number in reached:
                reached |= parents[number]
                for parent in parents[number]:
                    furthest[parent] = max(furthest[parent], number)
        cuts, far = set(), 0
        for number in sorted(reached):
            if far <= number:
                cuts.add(number)
            far = max(far, furthest[number])
        return cuts, reached

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        sources = self.numbers((args, kwargs))
        if sources:
            made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
            if func._schema.is_mutable:  # noqa: SLF001 torch has no public access
                new = made or [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            else:
                largest = max(t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                new = [t for t in made if t.numel() > largest or _memory(t) not in self._now]  # others are views
            if new:
                self._parents.append(sources)
                self._write(new, len(self._parents) - 1)
        return results

    def _write(self, tensors: list[Tensor], number: int) -> None:
        for t in tensors:
            self._now[_memory(t)] = number
        self._kept += tensors


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata  # noqa: SLF001 two storages of no elements have the same address


class _Recorder:
    """Builds the tree of calls."""

    def __init__(self, flow: _Flow) -> None:
        self._flow = flow
        self.start()

    def start(self) -> None:
        self.root: _Call | None = None
        self._open: list[_Call] = []
        self._begun = False
        self.opaque = ""

    def source(self, x: Tensor) -> Tensor:
        x = x.clone()  # the model may write into it
        self._flow.begin(x)
        self._begun = True
        return x

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enters = self._flow.numbers((args, kwargs)) if self._begun else {_SOURCE}
        call = _Call(name, any(p.ndim > 1 for p in module.parameters()), enters)
        if self._open:
            self._open[-1].inner.append(call)
        else:
            self.root = call
        self._open.append(call)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self._open.pop().leaves = self._flow.numbers(floating(output))
        if not self._open and not floating(output):
            self.opaque = type(output).__name__

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs
