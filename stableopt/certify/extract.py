r"""From a torch model to the program that a certificate speaks about.

Each layer is *folded*: read as the operations that it computes in evaluation mode, with the numbers that its parametrizations
produce now. A module without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from stableopt.certify.fold.registry import checked_fold
from stableopt.certify.program import Builder, Node, Program, nested_tensors
from stableopt.errors import UncertifiableError
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.sharded import refuse_spread

__all__ = ["extract", "live"]


def extract(model: nn.Module, shape: tuple[int, ...], norm: str = "l2") -> Program:
    """Fold a model into a program with detached CPU copies of its tensors.

    Args:
        model: nested ``nn.Sequential`` of layers with a rule; it is not changed and need not be in evaluation mode.
        shape: shape of one input, without the batch dimension.
        norm: the norm in which bounds will be proved, ``"l2"``, ``"linf"`` or ``"token_max"``.

    Raises:
        UncertifiableError: for a layer without a rule; the message names its class, its path and how to register one.
        ValueError: if a layer does not fit the shape before it, or a weight is not finite.

    Examples:
        >>> program = extract(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (2, 2))
        >>> [node["op"] for node in program.nodes], sorted(program.tensors)
        (['reshape', 'linear'], ['1.bias', '1.weight'])
    """
    refuse_spread(model, UncertifiableError)
    with undisturbed(model), torch.no_grad():
        model.eval()  # where the weights are those of a method that trains with an estimate, too
        graph = Builder(tuple(shape), norm, rule=checked_fold)
        output = checked_fold(model, graph, graph.input)
    if not output.number:
        raise UncertifiableError("the model has no layer, so there is nothing to certify.")
    return live(graph.program(), output.number)


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
    return Program(nodes, {k: v for k, v in program.tensors.items() if k in names}, program.shape, program.norm)


def _renumbered(node: Node, place: dict[int, int]) -> list[int]:
    inputs: Iterable[int] = node["in"]
    return [place[number] for number in inputs]
