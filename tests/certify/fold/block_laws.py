"""What the tests of folded blocks share: a published program, its verdict by the verifier, and programs with one change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.execute import run
from stableopt.certify.extract import extract
from stableopt.certify.program import Program
from stableopt.certify.publish import publish, to_file
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.operations import Graph
from stableopt.certify.verifier.program import Walk

Node = dict[str, Any]


def stirred(module: nn.Module, size: float = 0.3) -> nn.Module:
    """Move all parameters away from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def certified(module: nn.Module, shape: tuple[int, ...], norm: str = "l2") -> Program:
    """The published program of a module."""
    return publish(extract(module, shape, norm))


def constant(program: Program, *, exact: bool = False) -> float:
    """The constant that the verifier proves; it rejects with an exception."""
    tensors = {name: value.double().numpy() for name, value in program.tensors.items()}
    graph = Graph(tensors, program.norm, exact)
    walk = Walk([to_file(node) for node in program.nodes], graph, program.shape)
    assert graph.used == set(tensors)
    last = walk.constants()[-1]
    assert last is not None
    return float(last)


def rejected(
    program: Program,
    change: Callable[[Node], None] | None = None,
    tensors: Callable[[dict[str, Tensor]], None] | None = None,
) -> str:
    """The reason why the verifier rejects a program whose only operation, or whose tensors, are changed; empty if it does not."""
    nodes, numbers = (
        copy.deepcopy(list(program.nodes)),
        {name: value.clone() for name, value in program.tensors.items()},
    )
    if change is not None:
        change(nodes[0])
    if tensors is not None:
        tensors(numbers)
    try:
        constant(Program(tuple(nodes), numbers, program.shape, program.norm))
    except RejectedError as error:
        return str(error)
    return ""


def outputs(program: Program, x: Tensor) -> Tensor:
    """What the certified operations compute."""
    with torch.no_grad():
        return run(program.nodes, {k: v.to(x.dtype) for k, v in program.tensors.items()}, [x])


def as_map(program: Program) -> Callable[[Tensor], Tensor]:
    """The certified operations as a function that has derivatives."""
    return lambda x: run(program.nodes, program.tensors, [x])
