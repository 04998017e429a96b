"""What the laws of sequences share: a module as a published program, and what the verifier says of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stableopt.certify.execute import run
from stableopt.certify.fold.registry import checked_fold
from stableopt.certify.program import Builder, Program
from stableopt.certify.publish import publish, to_file
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.operations import Graph
from stableopt.certify.verifier.program import Walk

SLACK = 1 + 1e-8


def pairs(names: Iterable[str], norms: tuple[str, ...]) -> list[Any]:
    """All pairs for the slow run, and one norm of each name, by turns, for the others."""
    return [
        pytest.param(name, norm, id=f"{name}-{norm}", marks=[] if j == i % len(norms) else [pytest.mark.slow])
        for i, name in enumerate(names)
        for j, norm in enumerate(norms)
    ]


def program_of(module: nn.Module, shape: tuple[int, ...], norm: str) -> Program:
    graph = Builder(shape, norm, rule=checked_fold)
    with torch.no_grad():
        checked_fold(module.eval(), graph, graph.input)
    return publish(graph.program())


def output(program: Program, x: Tensor) -> Tensor:
    return run(program.nodes, program.tensors, [x])


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return (y[0] if isinstance(y, tuple) else y).detach()


def walked(program: Program, *, exact: bool = False) -> Walk:
    tensors = {name: value.double().numpy() for name, value in program.tensors.items()}
    with np.errstate(all="ignore"):
        return Walk(to_file(list(program.nodes)), Graph(tensors, program.norm, exact), program.shape)


def constant(program: Program, *, exact: bool = False) -> float:
    """The proved constant of a whole program."""
    found = walked(program, exact=exact).constants()[-1]
    assert found is not None
    return float(found)


def changed(program: Program, index: int, **fields: Any) -> Program:
    nodes = list(copy.deepcopy(program.nodes))
    nodes[index] |= fields
    return replace(program, nodes=tuple(nodes))


def with_tensor(program: Program, name: str, value: Tensor) -> Program:
    return replace(program, tensors=program.tensors | {name: value})


def rejected(program: Program) -> bool:
    try:
        walked(program)
    except (RejectedError, ValueError, KeyError, TypeError, ArithmeticError):  # as check() does
        return True
    return False
