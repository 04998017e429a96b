"""Laws of the solvers: rates, tolerances, what happens when they stop too early, and when nothing can be read."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from stableopt.nn import Anderson, Fista, ForwardBackward, ProximalBlock, ResolventBlock
from stableopt.nn.implicit.equation import Equation
from stableopt.nn.implicit.solvers import ConjugateGradient


def equation(*, h: float = 5.0, skew: float = 0.0, activate=torch.tanh) -> Equation:
    K = torch.randn(6, 6)
    return Equation(
        torch.randn(7, 6),
        torch.randn(7),
        skew * (K - K.T) if skew else None,
        torch.tensor(h),
        0.1,
        activate,
    )


def sizes(equation: Equation, x: Tensor, y: Tensor) -> Tensor:
    return equation.residual(x, y).norm(dim=-1)


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_forward_backward_shrinks_the_error_at_its_rate(skew: float) -> None:
    problem = equation(skew=skew)
    x = torch.randn(20, 6)
    exact = ForwardBackward(3000).solve(problem, x)
    U2 = float(problem.square())
    rate = 5.0 * U2 / (2 * (1 + 0.5) + 5.0 * U2)
    errors = [(ForwardBackward(k).solve(problem, x) - exact).norm(dim=-1) for k in (1, 2, 10)]
    assert (errors[1] <= rate * errors[0] * (1 + 1e-9)).all()
    assert (errors[2] <= rate**9 * errors[0] * (1 + 1e-9)).all()


def test_fista_needs_the_root_of_the_steps_of_forward_backward() -> None:
    problem, x = equation(h=200.0), torch.randn(20, 6)
    exact = Fista(tolerance=1e-15, max_iterations=20_000).solve(problem, x)
    kappa = 1 + 200 * float(problem.square()) / 21
    steps = math.ceil(12 * math.sqrt(kappa))
    with pytest.warns(
        RuntimeWarning, match=f"Fista did not reach the relative residual .* in {steps} steps; solution_e"
    ):
        fast = Fista(tolerance=1e-15, max_iterations=steps).solve(problem, x)
    slow = ForwardBackward(steps).solve(problem, x)
    # the energy falls by (1 - 1/sqrt(kappa))^k and bounds the square of the error up to a factor of kappa
    start = (x / 21 - exact).norm(dim=-1)
    assert ((fast - exact).norm(dim=-1) <= start * math.sqrt(2 * kappa) * math.exp(-6)).all()
    assert ((fast - exact).norm() <= 0.1 * (slow - exact).norm()).all()


@pytest.mark.parametrize("skew", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("h", [0.1, 200.0])
def test_anderson_reaches_the_solution_of_forward_backward(h: float, skew: float) -> None:
    problem, x = equation(h=h, skew=skew), 3 * torch.randn(20, 6)
    y = Anderson().solve(problem, x)
    scale = x.norm(dim=-1) + problem.size() * y.norm(dim=-1)
    assert (sizes(problem, x, y) <= 256 * torch.finfo(torch.float64).eps * scale).all()


def test_anderson_needs_fewer_evaluations() -> None:
    problem, x = equation(h=50.0, skew=1.0, activate=torch.relu), torch.randn(20, 6)
    with pytest.warns(RuntimeWarning, match="did not reach"):
        y = Anderson(tolerance=1e-30, max_iterations=60).solve(problem, x)
    plain = ForwardBackward(60).solve(problem, x)
    assert (sizes(problem, x, y) + 1e-13).log().mean() < (sizes(problem, x, plain) + 1e-13).log().mean() - 2.0


def test_anderson_makes_the_progress_of_a_plain_step_in_every_two_evaluations() -> None:
    """Without the way back it diverges here."""
    problem = equation(h=50.0, activate=torch.nn.functional.hardtanh)
    problem, x = problem._replace(bias=3 * torch.randn(7)), 30 * torch.randn(50, 6)
    splitting = problem.splitting(inward=False)
    start = splitting.start * x
    first = (splitting.advance(problem, x, start) - start).norm(dim=-1)
    for k in (20, 60, 100):
        with pytest.warns(RuntimeWarning, match="did not reach"):
            y = Anderson(tolerance=1e-30, max_iterations=k).solve(problem, x)
        now = (splitting.advance(problem, x, y) - y).norm(dim=-1)
        assert (now <= first * splitting.keep ** (k // 2 - 1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("skew", [0.0, 30.0])
def test_the_size_of_an_equation_bounds_its_jacobian(skew: float) -> None:
    problem = equation(skew=skew, activate=lambda z: z)._replace(bias=None)
    M = problem.residual(torch.zeros(6, 6), torch.eye(6)).T
    norm = float(torch.linalg.matrix_norm(M, 2))
    assert norm * (1 - 64 * torch.finfo(torch.float64).eps) <= float(problem.size()) <= 4 * norm  # both are rounded


def test_conjugate_gradients_end_after_as_many_steps_as_dimensions() -> None:
    slopes = torch.rand(20, 7)
    problem = equation()._replace(bias=None, activate=lambda z: slopes * z)
    g = torch.randn(20, 6)
    u = ConjugateGradient(max_iterations=12, check_every=1, tolerance=1e-12).solve(problem, g)
    A = problem.weight
    M = 1.5 * torch.eye(6) + 5.0 * A.T @ (slopes[:, :, None] * A)
    torch.testing.assert_close(u, torch.linalg.solve(M, g))
    assert (ConjugateGradient().solve(problem, torch.zeros(20, 6)) == 0).all()  # no division of zero by zero


@pytest.mark.parametrize("solver", [Fista(), Anderson()], ids=lambda s: type(s).__name__)
def test_each_vector_meets_the_tolerance_beside_any_other(solver: Fista | Anderson) -> None:
    problem = equation(h=20.0)
    x = torch.randn(3, 6) * torch.tensor([[1e-6], [1.0], [1e6]])
    alone = torch.stack([solver.solve(problem, row) for row in x])
    torch.testing.assert_close(solver.solve(problem, x), alone, rtol=1e-9, atol=1e-12)
    assert solver.solve(problem, torch.zeros(0, 6)).shape == (0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ProximalBlock, ResolventBlock])
def test_nothing_is_read_while_compiling_exporting_or_mapping(kind: type) -> None:
    block = kind(4, 5, activation="tanh", solver=Anderson(tolerance=1e-3, max_iterations=12, check_every=12))
    x = torch.randn(3, 4)
    expected = block(x)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch makes an instance of its own class while it compiles
        torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.func.vmap(block)(x), expected)
    with torch.no_grad():
        exported = torch.export.export(block, (x,), strict=False).module()
        torch.testing.assert_close(exported(x), expected)
    assert block.to("meta")(x.to("meta")).shape == (3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardBackward(0), "iterations must be an integer"),
        (lambda: Fista(tolerance=0.0), r"tolerance must be None or lie in \(0, 1\), got 0.0"),
        (lambda: Fista(tolerance=math.nan), "tolerance must be None"),
        (lambda: Fista(max_iterations=0), "max_iterations must be"),
        (lambda: Anderson(check_every=0), "check_every must be"),
        (lambda: Anderson(memory=0), "memory must be"),
        (lambda: Fista().solve(equation(skew=1.0), torch.ones(6)), "use Anderson"),
    ],
)
def test_wrong_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
