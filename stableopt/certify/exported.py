r"""Modules with a forward of their own: the operations that ``torch.export`` records, around layers that have a rule.

The module runs once with every layer that has a rule replaced by an operation that only says which layer it is. What is left are
the operations that the module itself calls: each is translated or refused. Operations on numbers alone, such as a parametrization
of a weight, are evaluated. A batch of two runs, and an operation that could mix its items is refused.
"""

from __future__ import annotations

import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

import stableopt.certify.aten_layout  # noqa: F401 importing it registers rules
from stableopt.certify.aten import RULES, Call, bound_arguments
from stableopt.certify.coverage import is_foreign, uncovered
from stableopt.certify.fold.registry import has_rule
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import check_forward, named

__all__ = ["BATCH", "fold_exported"]

BATCH = 2
"""The number of samples with which a module runs."""

_SHAPES: list[tuple[int, ...]] = []
"""The shapes that the layers gave in the run before the export, by the number of the call."""


@torch.library.custom_op("stableopt::layer", mutates_args=())
def _layer(x: Tensor, index: int, call: int) -> Tensor:
    """Stand for a call of a layer that has a rule; it never runs."""
    raise NotImplementedError


@_layer.register_fake
def _(x: Tensor, index: int, call: int) -> Tensor:  # noqa: ARG001 the signature of the operation
    return x.new_empty(_SHAPES[call])


@dataclass
class _Layers:
    """The layers of a module that have a rule, and the shapes in the order of their calls."""

    found: dict[str, nn.Module]
    calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


class _LastStates:
    """Stand for the second thing that a recurrent layer of torch gives, and refuse to be used."""

    def __getitem__(self, _index: Any) -> Any:
        raise UncertifiableError(
            "the last states that a recurrent layer gives beside its outputs are no part of a certificate. Take the last step of "
            "the outputs, outputs[:, -1]."
        )

    __getattr__ = __getitem__


def fold_exported(module: nn.Module, graph: Builder, value: Value) -> Value:
    """Fold a module with a forward of its own by what ``torch.export`` records.

    Args:
        module: the module, in evaluation mode.
        graph: the program under construction.
        value: its input.

    Raises:
        UncertifiableError: for an operation without a rule, a map that mixes the items of a batch, control flow that depends on
            the input, a change of a buffer, or several inputs or outputs. The message names the operation and its line.
        ValueError: if a layer does not fit the shape before it.

    Examples:
        >>> from stableopt.certify.fold.registry import checked_fold
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(2, 2)
        ...
        ...     def forward(self, x):
        ...         return x + torch.relu(self.inner(x))
        >>> graph = Builder((2,), rule=checked_fold)
        >>> _ = fold_exported(Residual(), graph, graph.input)
        >>> [(node["op"], node["in"]) for node in graph.nodes]
        [('linear', [0]), ('activation', [1]), ('sum', [0, 2])]
    """
    for name, part in [("", module), *_containers(module)]:
        check_forward(part, type(part), ".".join(filter(None, (graph.path, name))))  # refuses hooks
    layers = _Layers(dict(_parts_with_rule(module)))
    program = _exported(module, layers, value.shape, graph.path)
    return _Walk(graph, layers, named(module, graph.path), value).output(program)


def _parts_with_rule(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the outermost parts that have a rule, or for which coverage knows a sentence."""
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if name == "parametrizations" or (getattr(child, "inplace", False) and not list(child.children())):
            continue  # an activation that changes its input is recorded as an operation that does
        if _is_recorded(child):
            yield from _parts_with_rule(child, where)
        else:
            yield where, child


def _containers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the parts whose forward is recorded."""
    for name, child in module.named_children():
        if name != "parametrizations" and _is_recorded(child):
            where = f"{path}.{name}" if path else name
            yield where, child
            yield from _containers(child, where)


def _is_recorded(module: nn.Module) -> bool:
    """Return whether the forward of a module is recorded: one of somebody else's, or a chain with such a one in it."""
    if type(module) is nn.Sequential:
        return any(_is_recorded(child) for child in module.children())
    return is_foreign(module) and not has_rule(module)


def _exported(module: nn.Module, layers: _Layers, shape: tuple[int, ...], path: str) -> Any:
    where = named(module, path)
    numbers = [p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()]
    like = numbers[0] if numbers else torch.empty(0)
    x = torch.randn(BATCH, *shape, dtype=like.dtype, device=like.device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with _replaced(layers, _recording(layers)):
                _require_tensor(module(x), where)
            _SHAPES[:] = [after for _, _, after in layers.calls]
            with _replaced(layers, _standing_in(layers)), _quiet():
                program = torch.export.export(module, (x,), strict=False)
            return program.run_decompositions({}) if _in_place(program) else program
    except UncertifiableError:
        raise
    except Exception as error:
        reason = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
        raise UncertifiableError(
            f"{where} cannot be certified: its forward could not be recorded for one input of the shape {shape} ({reason}). It "
            "may have no control flow that depends on the numbers in its input, no other inputs, and no state. Write it as nested "
            f"nn.Sequential, or register a rule: @stableopt.certify.fold.register({type(module).__name__})."
        ) from None


def _require_tensor(output: Any, where: str) -> None:
    if not isinstance(output, Tensor):
        raise UncertifiableError(
            f"{where} cannot be certified: its forward must give one tensor, not {type(output).__name__}. Certify a module "
            "that returns the part that counts, such as the logits."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging what it could not record: the refusal says it."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):  # where it prints the graph
            yield
    finally:
        log.setLevel(level)


def _in_place(program: Any) -> bool:
    """Return whether a recorded operation changes one of its inputs, which decomposition replaces by another operation."""
    schemas = (getattr(node.target, "_schema", None) for node in program.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


@contextmanager
def _replaced(layers: _Layers, make: Callable[[str, nn.Module, int], Callable[..., Any]]) -> Iterator[None]:
    """Give the layers another forward for the duration."""
    kept: list[tuple[nn.Module, Any]] = []
    missing = object()
    try:
        for index, (name, layer) in enumerate(layers.found.items()):
            kept.append((layer, vars(layer).get("forward", missing)))
            vars(layer)["forward"] = make(name, layer, index)
        yield
    finally:
        for layer, forward in reversed(kept):
            if forward is missing:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = forward


def _recording(layers: _Layers) -> Callable[[str, nn.Module, int], Callable[..., Any]]:
    def make(name: str, layer: nn.Module, index: int) -> Callable[..., Any]:  # noqa: ARG001
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                if not has_rule(layer):
                    raise UncertifiableError(uncovered(layer, name))
                raise UncertifiableError(
                    f"'{name}' ({type(layer).__name__}) is called with other things than one tensor; call it with its input alone."
                )
            x = args[0].clone()
            before = x._version  # noqa: SLF001 torch has no public accessor
            output = original(x)
            pair = isinstance(layer, nn.RNNBase) and isinstance(output, tuple)
            output = output[0] if pair else output  # the last states are not part of what is certified
            if x._version != before:  # noqa: SLF001
                raise UncertifiableError(
                    f"'{name}' ({type(layer).__name__}) changes its input in place; use inplace=False."
                )
            if not isinstance(output, Tensor):
                raise UncertifiableError(f"'{name}' ({type(layer).__name__}) gives other things than one tensor.")
            layers.calls.append((name, tuple(args[0].shape), tuple(output.shape)))
            return (output, _LastStates()) if pair else output

        return forward

    return make


def _standing_in(layers: _Layers) -> Callable[[str, nn.Module, int], Callable[..., Any]]:
    count = iter(range(len(layers.calls)))

    def make(name: str, layer: nn.Module, index: int) -> Callable[..., Any]:
        def forward(x: Tensor) -> Any:
            call = next(count)
            if layers.calls[call][:2] != (name, tuple(x.shape)):
                raise UncertifiableError(f"two runs of the module called its layers in another order, at '{name}'.")
            output = torch.ops.stableopt.layer(x, index, call)
            return (output, _LastStates()) if isinstance(layer, nn.RNNBase) else output

        return forward

    return make


class _Walk:
    """The translation of a recorded graph: to each of its nodes a value of the program, a number, or a list of them."""

    def __init__(self, graph: Builder, layers: _Layers, where: str, value: Value) -> None:
        self.graph, self.layers, self.where, self.input, self.root = graph, layers, where, value, graph.path
        self.names: dict[int, str] = {}
        """The names of parameters by the identity of the tensor."""

    def _refused(self, reason: str) -> UncertifiableError:
        return UncertifiableError(f"{self.where} cannot be certified: {reason}.")

    def output(self, program: Any) -> Value:
        """Translate all operations and return the value of the result."""
        signature = program.graph_signature
        changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
        if changed:
            raise self._refused(
                f"it changes {', '.join(map(repr, changed.values()))} when it runs, so two runs may differ"
            )
        known: dict[fx.Node, Any] = {}
        inputs = {spec.arg.name: spec for spec in signature.input_specs}
        result: Any = None
        for node in program.graph.nodes:
            if node.op == "placeholder":
                known[node] = self._placeholder(program, inputs[node.name])
            elif node.op == "output":
                result = [known.get(part, part) if isinstance(part, fx.Node) else part for part in node.args[0]]
            else:
                known[node] = self._call(node, known)
        if result is None or len(result) != 1 or not isinstance(result[0], Value):
            raise self._refused(
                f"it must give one tensor that depends on its input, and gives {len(result or [])} results"
            )
        return result[0]

    def _placeholder(self, program: Any, spec: Any) -> Any:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            return self.input
        if kind not in {"PARAMETER", "BUFFER", "CONSTANT_TENSOR"}:
            raise self._refused(f"it uses {spec.target!r}, which is no tensor")
        store = program.state_dict if spec.target in program.state_dict else program.constants
        tensor = store[spec.target].detach()
        self.names[id(tensor)] = spec.target
        return tensor

    def _call(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: known[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: known[n])
        if node.target is operator.getitem:
            return args[0][args[1]]
        if node.target is torch.ops.stableopt.layer.default:
            return self._layer(args)
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        name = schema.name.removeprefix("aten::") if schema is not None else str(target)
        if name.startswith("_assert"):
            return None
        inputs = [v for v in _flat((args, kwargs)) if isinstance(v, Value)]
        if not inputs and schema is not None:
            return self._constant(target, args, kwargs, node, name)
        rule = RULES.get(name)
        if rule is None or schema is None:
            raise self._refused(
                f"the operation {name} has no rule ({_place(node)}). Use layers and operations with one, or register a rule for "
                "the class by @stableopt.certify.fold.register"
            )
        return self._translated(rule, bound_arguments(schema, args, kwargs), node, name)

    def _translated(self, rule: Callable[[Call], Any], arguments: dict[str, Any], node: fx.Node, name: str) -> Any:
        owner = next((self.names[id(v)] for v in _flat(arguments) if id(v) in self.names), None)
        path = _module_of(node) if owner is None else owner.rpartition(".")[0]
        self.graph.path = ".".join(filter(None, (self.root, path)))
        try:
            result = rule(Call(self.graph, arguments, BATCH, name))
        except (UncertifiableError, ValueError) as error:
            raise self._refused(f"{name} ({_place(node)}): {str(error).rstrip('.')}") from None
        finally:
            self.graph.path = self.root
        expected = node.meta.get("val")
        if (
            isinstance(result, Value)
            and isinstance(expected, Tensor)
            and tuple(expected.shape) != (BATCH, *result.shape)
        ):
            raise self._refused(f"{name} mixes the batch with other dimensions ({_place(node)})")
        return result

    def _constant(self, target: Any, args: Any, kwargs: Any, node: fx.Node, name: str) -> Any:
        """Evaluate an operation on numbers alone."""
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise self._refused(f"{name} draws random numbers ({_place(node)})")
        result: Any = target(*args, **kwargs)
        source: Any = args[0] if args else None
        tensors = isinstance(result, Tensor) and isinstance(source, Tensor)
        if tensors and id(source) in self.names and result.data_ptr() == source.data_ptr():
            self.names[id(result)] = self.names[id(source)]  # a view of a parameter keeps its name
        return result

    def _layer(self, args: tuple[Any, ...]) -> Value:
        value, index = args[0], args[1]
        name, layer = list(self.layers.found.items())[index]
        if not isinstance(value, Value):
            raise self._refused(f"'{name}' is given numbers that do not depend on the input")
        return self.graph.fold(layer, value, name)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _flat(part)
    else:
        yield value


def _module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def _place(node: fx.Node) -> str:
    """Return the module and the line of the source that calls an operation."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    found = re.search(r'File "([^"]+)", line (\d+)', "\n".join(trace[-2:]))
    line = f"{found[1].rsplit('/', 1)[-1]}:{found[2]}: {trace[-1].strip()}" if found else "of unknown origin"
    path = _module_of(node)
    return f"in '{path}', {line}" if path else f"in {line}"
