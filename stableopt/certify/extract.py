r"""From a torch model to the program that a certificate speaks about.

Each layer is *folded*: read as the operations that it computes in evaluation mode, with the numbers that its parametrizations
produce now. A module with a forward of its own is read through ``torch.export``. That the program computes what the model computes
is checked on random inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from stableopt.certify.coverage import is_foreign
from stableopt.certify.crosscheck import check_same_function
from stableopt.certify.fold.registry import checked_fold, has_rule
from stableopt.certify.folding import fold_affine, with_nodes
from stableopt.certify.program import Builder, Node, Program, Value, nested_tensors
from stableopt.errors import UncertifiableError
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.sharded import refuse_spread

__all__ = ["extract", "live"]


def extract(model: nn.Module, shape: tuple[int, ...], norm: str = "l2", *, join: bool = True) -> Program:
    """Fold a model into a program with detached CPU copies of its tensors.

    Args:
        model: layers with a rule, in nested ``nn.Sequential`` or called by modules with a forward of their own; it is not changed
            and need not be in evaluation mode.
        shape: shape of one input, without the batch dimension.
        norm: the norm in which bounds will be proved, ``"l2"``, ``"linf"`` or ``"token_max"``.
        join: whether a normalization is joined with the weight before it, which gives smaller bounds.

    Raises:
        TypeError: if ``model`` is no module.
        UncertifiableError: for a layer or operation without a rule; the message names it, its path and how to register one. If the
            program computes something else than the model.
        ValueError: if a layer does not fit the shape before it, or a weight is not finite.

    Examples:
        >>> program = extract(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (2, 2))
        >>> [node["op"] for node in program.nodes], sorted(program.tensors)
        (['reshape', 'linear'], ['1.bias', '1.weight'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {_kind(model)}.")
    refuse_spread(model, UncertifiableError)
    with undisturbed(model), torch.no_grad():
        model.eval()  # where the weights are those of a method that trains with an estimate, too
        graph = Builder(tuple(shape), norm, rule=_fold)
        output = _fold(model, graph, graph.input)
        if not output.number:
            raise UncertifiableError("the model has no layer, so there is nothing to certify.")
        program = live(_rounded(graph.program(), model), output.number)
        program = fold_affine(program) if join else program
        check_same_function(model, program)
    return program


def _kind(thing: object) -> str:
    return f"the class {thing.__name__}: make an instance" if isinstance(thing, type) else type(thing).__name__


def _fold(module: nn.Module, graph: Builder, value: Value) -> Value:
    """Fold by the rule of the class, or through ``torch.export`` if it has a forward of its own."""
    if has_rule(module) or not is_foreign(module):
        return checked_fold(module, graph, value)
    from stableopt.certify.exported import fold_exported  # here, because torch.export takes seconds to import

    return fold_exported(module, graph, value)


def _rounded(program: Program, model: nn.Module) -> Program:
    """Round the numbers that rules computed in a wider dtype than any of the model to the widest of the model."""
    widths = [p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    widest = max(widths, key=lambda dtype: torch.finfo(dtype).bits, default=torch.get_default_dtype())
    bits = torch.finfo(widest).bits
    metrics = {node.get("scaling") for node in program.nodes}  # these do not run
    rounded = {
        k: v.to(widest) for k, v in program.tensors.items() if torch.finfo(v.dtype).bits > bits and k not in metrics
    }
    tensors = program.tensors | rounded
    return replace(program, tensors=tensors)


def live(program: Program, output: int) -> Program:
    """Return the program without the operations and tensors on which one of its values does not depend.

    Args:
        program: the program.
        output: the number of the value; it is the last one of the result.

    Examples:
        >>> graph = Builder((2,))
        >>> first = graph.add("scale", graph.input, factor=2.0)
        >>> _ = graph.add("scale", graph.input, factor=3.0)
        >>> live(graph.program(), first.number).nodes
        ({'op': 'scale', 'in': [0], 'factor': 2.0},)
    """
    needed = {output}
    for number in range(output, 0, -1):
        if number in needed:
            needed |= set(program.nodes[number - 1]["in"])
    kept = [number for number in range(1, output + 1) if number in needed]
    place = {0: 0} | {number: index + 1 for index, number in enumerate(kept)}
    nodes = tuple(program.nodes[number - 1] | {"in": _renumbered(program.nodes[number - 1], place)} for number in kept)
    names = {name for node in nodes for name in nested_tensors(node)}
    return with_nodes(program, nodes, {k: v for k, v in program.tensors.items() if k in names}, place)


def _renumbered(node: Node, place: dict[int, int]) -> list[int]:
    inputs: Iterable[int] = node["in"]
    return [place[number] for number in inputs]
