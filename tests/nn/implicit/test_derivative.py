"""The derivatives of solutions: against differences, against dense inverses, and of second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stableopt.nn import Anderson, Fista, ForwardBackward, ProximalBlock, ResolventBlock
from stableopt.nn.implicit.derivative import solve_implicitly

SOLVERS = [
    (ProximalBlock, Fista(check_every=1)),
    (ProximalBlock, Anderson(check_every=1)),
    (ResolventBlock, Anderson(check_every=1)),
]
IDS = ["fista", "anderson", "resolvent"]


def problem(kind: type, solver: object, activation: str = "tanh") -> tuple[nn.Module, list[str], tuple[Tensor, ...]]:
    block = kind(2, 3, activation=activation, strong=0.1, step=1.5, solver=solver)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name != "raw_step":
                parameter.copy_(torch.randn_like(parameter))
    values = tuple(p.detach().clone().requires_grad_() for p in block.parameters())
    return block, [name for name, _ in block.named_parameters()], values


def as_function(block: nn.Module, names: list[str]):
    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    return f


@pytest.mark.parametrize(("kind", "solver"), SOLVERS, ids=IDS)
def test_all_derivatives_agree_with_differences(kind: type, solver: object) -> None:
    block, names, values = problem(kind, solver)
    x = torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(as_function(block, names), (x, *values))


@pytest.mark.parametrize(("kind", "solver"), SOLVERS[::2], ids=IDS[::2])
def test_derivatives_of_derivatives_agree_with_differences(kind: type, solver: object) -> None:
    block, names, values = problem(kind, solver, "softplus")
    x = torch.randn(1, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(as_function(block, names), (x, *values), atol=1e-4)


@pytest.mark.parametrize(("kind", "solver"), SOLVERS, ids=IDS)
@pytest.mark.parametrize("activation", ["relu", "hardtanh", "leaky_relu"])
def test_the_derivatives_of_many_vectors_are_those_of_the_iterates(kind: type, solver: object, activation: str) -> None:
    block, _, _ = problem(kind, solver, activation)
    x = torch.randn(3, 5, 2, requires_grad=True)
    weight = torch.randn(3, 5, 2)
    gradients = []
    for method in (solver, ForwardBackward(600)):
        block.solver = method
        gradients.append(torch.autograd.grad((block(x) * weight).sum(), [x, *block.parameters()]))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-7, atol=1e-9)


def test_one_vector_and_the_transforms_of_torch_func_see_the_same_derivative() -> None:
    block, names, values = problem(ResolventBlock, Anderson(max_iterations=60))
    f, x = as_function(block, names), torch.randn(4, 2)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda v: f(v, *values)))(x)
    for row, J in zip(x, jacobians, strict=True):
        expected = torch.autograd.functional.jacobian(lambda v: f(v, *values), row)
        torch.testing.assert_close(J, torch.as_tensor(expected))


def test_no_gradient_is_asked_for_where_none_is_needed() -> None:
    block, _, _ = problem(ProximalBlock, Fista())
    with torch.no_grad():
        assert not block(torch.randn(2, 2)).requires_grad
    block.requires_grad_(False)
    assert not block(torch.randn(2, 2)).requires_grad
    x = torch.randn(2, 2, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None
    assert block.weight.grad is None


def test_the_linear_equation_of_the_derivative_is_solved_to_the_tolerance_of_the_solver() -> None:
    A, one = 3 * torch.randn(5, 4), torch.tensor(10.0)
    x = torch.randn(1, 4, requires_grad=True)
    settings = {"strong": 0.0, "activation": "softplus"}
    errors = []
    for tolerance in (1e-2, 1e-12):
        y = solve_implicitly(x, A, torch.zeros(5), None, one, solver=Fista(tolerance, check_every=1), **settings)
        J = torch.stack([torch.autograd.grad(y[0, i], x, retain_graph=True)[0][0] for i in range(4)])
        M = torch.eye(4) + 10 * A.T @ torch.diag((y[0].detach() @ A.T).sigmoid()) @ A
        errors.append(float((J - torch.linalg.inv(M)).norm()))
    assert errors[1] < 1e-9 < errors[0]
