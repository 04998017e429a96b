"""Certified implicit blocks: the iterations that run are certified, and other solvers are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stableopt import UncertifiableError
from stableopt.nn import (
    BackwardEulerBlock,
    DissipativeField,
    GradientField,
    InfNormField,
    ProximalBlock,
    ResolventBlock,
    lipschitz,
)
from stableopt.nn.implicit import Anderson, Fista, ForwardBackward
from tests.certify.fold.block_laws import as_map, certified, constant, outputs, rejected, stirred
from tests.nn.adversary import worst_ratio

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "proximal": lambda: ProximalBlock(4, 5, step=2.0),
    "proximal strong": lambda: ProximalBlock(4, 5, strong=0.3, activation="tanh", solver=ForwardBackward(3)),
    "resolvent": lambda: ResolventBlock(4, 5, step=2.0),
    "resolvent strong": lambda: ResolventBlock(3 + 1, 5, strong=0.3, solver=ForwardBackward(1)),
    "backward gradient": lambda: BackwardEulerBlock(GradientField(4, 5, strong=0.2), step=2.0),
    "backward dissipative": lambda: BackwardEulerBlock(DissipativeField(4, 5), iterations=3),
    "backward infinity": lambda: BackwardEulerBlock(InfNormField(4, rate=0.2), iterations=4, step=1.0),
}


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_folded_block_computes_what_the_module_computes_and_its_bound_is_that_of_the_module(
    name: str, norm: str
) -> None:
    module = stirred(BLOCKS[name](), 0.1)
    program = certified(module, (4,), norm)
    x = 3.0 * torch.randn(6, 4)
    torch.testing.assert_close(outputs(program, x), module(x), rtol=1e-7, atol=1e-7)
    bound = constant(program)
    assert bound <= lipschitz(module, norm).upper * (1.0 + 1e-7)
    assert bound >= worst_ratio(as_map(program), (4,), norm, starts=4, steps=4) * (1.0 - 1e-9)


def test_the_bound_of_the_iterates_is_attained_where_no_unit_is_active() -> None:
    block = ProximalBlock(3, strong=0.5, step=2.0)
    with torch.no_grad():
        block.bias.fill_(-50.0)
    program = certified(block, (3,))
    J = torch.autograd.functional.jacobian(lambda z: as_map(program)(z[None])[0], torch.zeros(3))
    bound = constant(program)
    assert bound * (1.0 - 1e-12) <= float(torch.linalg.matrix_norm(J, 2)) <= bound
    assert "not proved" in rejected(program, lambda node: node.update(bound=bound * (1.0 - 1e-6)))
    assert bound == pytest.approx(0.5, rel=1e-12)


def test_a_resolvent_that_is_larger_than_its_bound_is_rejected() -> None:
    program = certified(ResolventBlock(3), (3,))
    name = program.nodes[0]["resolvent"]

    def grow(tensors: dict[str, Tensor]) -> None:
        tensors[name] *= 1.0 + 1e-6

    assert "not proved" in rejected(program, tensors=grow)
    assert "not proved" in rejected(program, lambda node: node.update(resolvent_bound=0.9))
    assert "not proved" in rejected(program, lambda node: node.update(mix=node["mix"] * 1.001))
    assert rejected(program, lambda node: node["map"].update(decay=node["map"]["decay"] * 1.001))


@pytest.mark.parametrize(("make", "solver"), [(ProximalBlock, Fista()), (ResolventBlock, Anderson())])
def test_solvers_that_stop_by_their_residual_are_refused_with_a_way_out(make: type[nn.Module], solver: object) -> None:
    with pytest.raises(
        UncertifiableError, match=r"stops when its residual is small.*ForwardBackward\(iterations=\.\.\.\)"
    ):
        certified(make(3, solver=solver), (3,))


def test_more_iterations_are_one_operation_with_a_smaller_bound() -> None:
    few, many = (
        certified(BackwardEulerBlock(GradientField(3, strong=0.5), step=2.0, iterations=n), (3,)) for n in (1, 200)
    )
    assert len(few.nodes) == len(many.nodes) == 1
    assert constant(many) == pytest.approx(0.5, rel=1e-3)
    assert constant(few) > 0.6
