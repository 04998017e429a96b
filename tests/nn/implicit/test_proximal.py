"""Laws of proximal and resolvent blocks: every iterate has the constant of the solution, whatever the step and the parameters."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.linalg import spectral_norm
from stableopt.nn import (
    Anderson,
    Fista,
    ForwardBackward,
    ProximalBlock,
    ResolventBlock,
    lipschitz,
    stabilize,
    uniform_bound,
)
from stableopt.nn.implicit.block import bound
from stableopt.nn.implicit.equation import SLOPES, Equation, Splitting
from stableopt.nn.implicit.proof import residual_upper
from stableopt.nn.unit_slopes import UNIT_SLOPES
from stableopt.theory import skew_damped_factor
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import digits, train

EPS = torch.finfo(torch.float64).eps
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "softplus", "hardtanh"]
BLOCKS = [ProximalBlock, ResolventBlock]


def filled(block: nn.Module, scale: float = 1.0) -> nn.Module:
    """Give a block parameters that are not those of a new one; the step stays."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name != "raw_step":
                parameter.copy_(scale * torch.randn_like(parameter))
    return block


@settings(max_examples=20)
@given(
    kind=st.sampled_from(BLOCKS), hidden=st.integers(1, 5), dim=st.integers(1, 5), strong=st.sampled_from([0.0, 0.3, 5.0]),
    log_scale=st.integers(-6, 6), raw=st.floats(-50, 1e7), iterations=st.integers(1, 7), activation=st.sampled_from(ACTIVATIONS),
    rank_one=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_iterate_has_the_constant_of_the_solution_whatever_the_parameters(
    kind: type, hidden: int, dim: int, strong: float, log_scale: int, raw: float, iterations: int, activation: str,
    rank_one: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    block = kind(dim, hidden, strong=strong, activation=activation, solver=ForwardBackward(iterations))
    with torch.no_grad():
        A = torch.randn(hidden, 1) @ torch.randn(1, dim) if rank_one else torch.randn(hidden, dim)
        block.weight.copy_(10.0**log_scale * A)
        block.bias.copy_(3 * torch.randn(hidden))
        block.raw_step.fill_(raw)
        if block.skew is not None:
            block.skew.copy_(10.0 ** float(torch.randint(-6, 7, ())) * torch.randn(dim, dim))
    bound = lipschitz(block)
    assert bound.proved
    assert bound.upper <= 1.0  # not 1 + eps
    h = block.step_size().item()
    assert bound.upper == pytest.approx(1 / (1 + h * strong), rel=1e-9)
    J = jacobian(block, torch.randn(1, dim))
    assert operator_norm(J, "l2") <= bound.upper + 1e3 * EPS
    for norm in ("linf", "l1"):
        assert operator_norm(J, norm) <= lipschitz(block, norm).upper * (1 + 1e3 * EPS)
        assert lipschitz(block, norm).upper <= math.sqrt(dim) * (1 + 4 * EPS)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("strong", [0.0, 0.4])
def test_the_constant_is_attained_where_all_units_are_off(kind: type, strong: float) -> None:
    """Along the kernel of the skew part, which an odd dimension has."""
    block = kind(3, 6, strong=strong, step=2.5, solver=ForwardBackward(12))
    nn.init.constant_(block.bias, -1e3)
    J = jacobian(block, torch.zeros(1, 3))
    assert operator_norm(J, "l2") == pytest.approx(1 / (1 + 2.5 * strong), rel=1e-9)
    assert lipschitz(block).upper == pytest.approx(operator_norm(J, "l2"), rel=1e-9)
    assert worst_ratio(block, (3,), steps=5) <= lipschitz(block).upper


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_jacobian_of_the_solution_is_the_inverse_of_that_of_the_equation(kind: type) -> None:
    block = kind(4, 5, strong=0.2, step=3.0, solver=ForwardBackward(150))
    nn.init.constant_(block.bias, 1e3)  # all units on: a linear map
    A = block.weight.detach()
    M = (1 + 3.0 * 0.2) * torch.eye(4) + 3.0 * A.T @ A
    if block.skew is not None:
        M = M - 3.0 * (block.skew - block.skew.mT).detach()
    torch.testing.assert_close(jacobian(block, torch.randn(1, 4)), torch.linalg.inv(M), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("over", "expands"), [(1.0, False), (1.001, True)])
def test_the_limit_of_the_splitting_step_is_sharp(over: float, expands: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a large step the first iterate is x - w A^T A x with w ||A||^2 = 2."""
    block = ProximalBlock(4, 6, step=1e6, solver=ForwardBackward(1))
    nn.init.constant_(block.bias, 1e3)
    A = block.weight.detach()
    w = over * 2 / float(torch.linalg.matrix_norm(A, 2)) ** 2
    one = torch.ones(())
    alpha = w / 1e6
    numbers = Splitting(one / (1 + alpha), w * one / (1 + alpha), alpha * one / (1 + alpha), one, None)
    J = jacobian(lambda x: numbers.advance(block.equation(), x, x), torch.zeros(1, 4))
    assert (operator_norm(J, "l2") > 1 + 1e-4) is expands
    monkeypatch.setattr(Equation, "splitting", lambda self: numbers)
    assert (bound(block, "l2").upper > 1 + 1e-4) is expands


def test_the_explicit_step_of_the_same_field_expands_at_every_step() -> None:
    block = ResolventBlock(2, 1, step=0.01)
    with torch.no_grad():
        block.weight.zero_()
        block.skew.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    for h in (1e-3, 0.1, 1.0):
        assert skew_damped_factor(h, 0.0, 1.0) > 1.0
    assert operator_norm(jacobian(block, torch.zeros(1, 2)), "l2") == pytest.approx(
        1 / math.sqrt(1 + 0.01**2), rel=1e-9
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("solver", [ForwardBackward(300), Fista(), Anderson()], ids=lambda s: type(s).__name__)
def test_the_output_minimises_the_objective_and_is_firmly_nonexpansive(solver: object, activation: str) -> None:
    block = filled(ProximalBlock(4, 3, strong=0.1, step=4.0, activation=activation, solver=solver))  # type: ignore[arg-type]
    x = 3 * torch.randn(20, 4)
    y, A, h = block(x), block.weight, block.step_size()
    gradient = y - x + h * (UNIT_SLOPES[activation](y @ A.T + block.bias) @ A + 0.1 * y)
    assert float(gradient.detach().norm(dim=-1).max()) <= 1e-10
    dx, dy = (v[:, None] - v[None] for v in (x, y.detach()))
    assert (dy.square().sum(-1) * (1 + 0.1 * h.item()) <= (dx * dy).sum(-1) + 1e-9).all()


def test_the_closed_form_in_one_dimension() -> None:
    block = ProximalBlock(1, step=3.0, strong=1.0, solver=ForwardBackward(200))
    nn.init.constant_(block.weight, 2.0)
    x = torch.linspace(-4, 4, 9)[:, None]
    expected = torch.where(x > 0, x / (1 + 3.0 * (1.0 + 4.0)), x / (1 + 3.0))  # (1 + hm) y + h a relu(a y) = x
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_error_of_the_solution_is_proved_and_not_far_from_the_true_one(kind: type) -> None:
    for dtype, iterations in ((torch.float64, 5), (torch.float32, 5), (torch.float32, 400)):
        block = filled(kind(5, 4, strong=0.1, step=2.0, activation="tanh", solver=ForwardBackward(iterations))).to(
            dtype
        )
        x = torch.randn(7, 5, dtype=dtype)
        exact = copy.deepcopy(block).double()
        exact.solver = Anderson(tolerance=1e-15, max_iterations=3000)
        h = block.step_size().item()  # in its own precision: the equation is that of the stored numbers
        exact.step_size = lambda h=h: torch.tensor(h)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            error = (exact(x.double()) - block(x).double()).norm(dim=-1).max().item()
        bound = block.solution_error(x)
        assert bound.proved
        assert error <= bound.upper * (1 + 1e-6) + 1e-13
        assert bound.upper <= 60 * error + 1e-12


def test_the_residual_counts_the_rounding_of_its_own_evaluation() -> None:
    """Against rational arithmetic, for outputs whose residual is nothing but rounding."""
    for seed in range(10):
        torch.manual_seed(seed)
        block = filled(
            ResolventBlock(3, 4, strong=0.1, step=20.0, solver=Anderson(tolerance=1e-15, max_iterations=200))
        )
        x, equation = torch.randn(3), block.equation()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            y = block(x)
        A, b, K, X, Y = ([[Fraction(v) for v in row] for row in t.reshape(-1, t.shape[-1]).tolist()] for t in (
            block.weight, block.bias, equation.skew, x, y))  # fmt: skip
        h, m = Fraction(block.step_size().item()), Fraction(0.1)
        active = [
            max(Fraction(0), sum(p * q for p, q in zip(row, Y[0], strict=True)) + c)
            for row, c in zip(A, b[0], strict=True)
        ]
        square = Fraction(0)
        for i in range(3):
            field = sum(row[i] * s for row, s in zip(A, active, strict=True)) + m * Y[0][i]
            field -= sum(p * q for p, q in zip(K[i], Y[0], strict=True))
            square += (Y[0][i] + h * field - X[0][i]) ** 2
        assert square <= Fraction(residual_upper(equation, "relu", x, y).upper) ** 2


def test_two_inputs_are_no_further_apart_than_their_distance_and_their_errors_say() -> None:
    block = filled(ProximalBlock(4, 6, strong=0.2, step=20.0, solver=Fista(tolerance=1e-2)))
    x, y = torch.randn(1, 4), torch.randn(1, 4)
    spread = float((block(x) - block(y)).detach().norm())
    allowed = float((x - y).norm()) / (1 + 20.0 * 0.2) + block.solution_error(x).upper + block.solution_error(y).upper
    assert spread <= allowed


def test_solvers_without_proved_iterates_are_not_marked_as_proved() -> None:
    for kind, solver in ((ProximalBlock, Fista()), (ProximalBlock, Anderson()), (ResolventBlock, Anderson())):
        block = kind(3, strong=0.5, step=2.0, solver=solver)
        for norm, size in (("l2", 1.0), ("linf", math.sqrt(3)), ("token_max", 1.0)):
            assert not lipschitz(block, norm).proved
            assert lipschitz(block, norm).upper == pytest.approx(size / 2.0)
        uniform = uniform_bound(block)
        assert uniform is not None
        assert not uniform.proved
        block.solver = ForwardBackward(3)
        assert lipschitz(block).proved


def test_a_loose_tolerance_does_break_the_constant_of_two_near_inputs() -> None:
    """Why it is not: the number of steps jumps, and so does the output, by less than the errors."""
    torch.manual_seed(1)
    block = filled(ProximalBlock(4, 6, step=20.0, solver=Fista(tolerance=3e-2, check_every=1)))
    x = torch.randn(1, 4) + torch.linspace(0, 1, 200)[:, None] * torch.randn(1, 4)
    with torch.no_grad():
        y = torch.cat([block(row[None]) for row in x])
    ratios = y.diff(dim=0).norm(dim=1) / x.diff(dim=0).norm(dim=1)
    assert float(ratios.max()) > 1.5


@pytest.mark.parametrize("hL", [20.0, 200.0])
def test_undamped_newton_cycles_where_the_block_converges(hL: float) -> None:
    torch.manual_seed(0)
    A = torch.linalg.qr(torch.randn(8, 8)).Q
    b = torch.randn(8)
    x = 10 * torch.randn(8)
    y = x.clone()
    for _ in range(500):
        z = (A @ y + b).tanh()
        F = y - x + hL * A.T @ z
        y = y - torch.linalg.solve(torch.eye(8) + hL * A.T @ torch.diag(1 - z**2) @ A, F)
    assert not float((y - x + hL * A.T @ (A @ y + b).tanh()).norm()) <= 1e-6
    for solver in (ForwardBackward(math.ceil(20 * hL)), Fista(), Anderson()):
        block = ProximalBlock(8, activation="tanh", step=hL, solver=solver)
        with torch.no_grad():
            block.weight.copy_(A)
            block.bias.copy_(b)
        assert block.solution_error(x).upper <= 1e-8


@pytest.mark.parametrize("kind", BLOCKS)
def test_copies_and_state_round_trips_keep_the_map(kind: type) -> None:
    block = filled(kind(4, 6, strong=0.1))
    x = torch.randn(3, 4)
    fresh = kind(4, 6, strong=0.1)
    fresh.load_state_dict(block.state_dict())
    expected = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh, torch.func.vmap(block)):
        torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(block(x[0]), expected[0])
    torch.testing.assert_close(block(x.view(3, 1, 1, 4)), expected.view(3, 1, 1, 4))
    assert block.to("meta")(x.to("meta")).shape == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_compilation_and_export_keep_the_map(kind: type) -> None:
    block, x = filled(kind(4, 6, strong=0.1, solver=ForwardBackward(3))), torch.randn(3, 4)
    for other in (torch.compile(block, backend="eager", fullgraph=True), torch.export.export(block, (x,)).module()):
        torch.testing.assert_close(other(x), block(x))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_precisions_keep_the_promise(kind: type, dtype: torch.dtype) -> None:
    for solver in (ForwardBackward(6), Anderson()):
        block = kind(12, 9, step=3.0, strong=0.1, solver=solver).to(dtype)
        x = torch.randn(2, 12, dtype=dtype)
        assert block(x).dtype == dtype
        assert block.step_size().dtype == torch.float32
        assert lipschitz(block).upper <= 1.0
        assert block.solution_error(x).upper <= 0.5


def test_autocast_does_not_lower_the_precision_of_the_numbers() -> None:
    block = ResolventBlock(8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block.equation().splitting()
    for a, b in zip(inside, block.equation().splitting(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_zero_weight_divides_by_the_damping_with_finite_gradients() -> None:
    block = ResolventBlock(3, strong=1.0, step=3.0)
    nn.init.zeros_(block.weight)
    nn.init.zeros_(block.skew)
    x = torch.randn(2, 3)
    y = block(x)
    torch.testing.assert_close(y, x / 4)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("kind", BLOCKS)
def test_nan_parameters_cannot_be_bounded(kind: type) -> None:
    for name, _ in kind(3).named_parameters():
        block = kind(3)
        with torch.no_grad():
            block.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            lipschitz(block)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be an integer"),
        ({"dim": 2, "hidden": 0}, ValueError, "hidden must be"),
        ({"dim": 2, "depth": 0}, ValueError, "depth must be"),
        ({"dim": 2, "strong": -1.0}, ValueError, "strong must be finite"),
        ({"dim": 2, "step": 0.0}, ValueError, r"step must lie in \[1e-06, 1e\+06\], got 0.0"),
        ({"dim": 2, "step": math.nan}, ValueError, "step must lie"),
        ({"dim": 2, "activation": "gelu"}, ValueError, "ProximalBlock needs slopes"),
        ({"dim": 2, "solver": "fista"}, TypeError, r"solver must be a Solver such as ForwardBackward\(10\), got str"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ProximalBlock(**arguments)  # type: ignore[arg-type]


def test_a_resolvent_is_no_minimum() -> None:
    with pytest.raises(TypeError, match="use Anderson, not Fista"):
        ResolventBlock(3, solver=Fista())


@pytest.mark.parametrize(("depth", "step"), [(1, 1.0), (2, 1.0), (16, 0.125)])
def test_the_initial_step_fits_the_depth(depth: int, step: float) -> None:
    assert ProximalBlock(3, depth=depth).step_size().item() == pytest.approx(step)
    assert ProximalBlock(3, depth=depth, step=7.0).step_size().item() == pytest.approx(7.0)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_gradient_of_the_iterates_is_right_for_all_numbers(kind: type) -> None:
    block = filled(kind(3, 4, activation="tanh", strong=0.1, step=1.5, solver=ForwardBackward(2)))
    parameters = dict(block.named_parameters())

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    values = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(f, (torch.randn(2, 3, requires_grad=True), *values))


def test_the_slopes_are_the_derivatives_of_all_activations() -> None:
    assert SLOPES.keys() == UNIT_SLOPES.keys()
    z = torch.linspace(-5, 5, 41, requires_grad=True)  # with 0 and the kinks of hardtanh
    for name, function in UNIT_SLOPES.items():
        (slope,) = torch.autograd.grad(function(z).sum(), z)
        torch.testing.assert_close(SLOPES[name](z.detach()), slope, msg=name)


def test_a_stored_rotation_has_a_proved_norm_of_one() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for scale in (1e-8, 1.0, 1e3, 1e8):
            block = ResolventBlock(6).to(dtype)
            nn.init.normal_(block.skew, std=scale)
            rotation = block.equation().splitting().rotation
            assert rotation is not None
            assert spectral_norm(rotation).upper <= 1.0


def test_the_equation_is_that_of_its_splitting() -> None:
    """The fixed point of the splitting step solves the equation, also where the skew part is large."""
    K = torch.randn(4, 4)
    equation = Equation(torch.randn(3, 4), torch.randn(3), 30 * (K - K.T), torch.tensor(2.0), 0.3, torch.tanh)
    splitting, x = equation.splitting(), torch.randn(5, 4)
    y = torch.zeros_like(x)
    for _ in range(2000):
        y = splitting.advance(equation, x, y)
    torch.testing.assert_close(equation.residual(x, y), torch.zeros_like(x), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_stacks_learn_with_a_proved_constant_of_one_after_every_step(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    blocks = [kind(64, depth=8, solver=ForwardBackward(4)) for _ in range(8)]
    model = stabilize(nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10)), 1.0)
    uppers = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        original(self)
        uppers.append(max(lipschitz(block).upper for block in blocks))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    accuracy = float((train(model, 16.0, 0.4, lr=1e-2, epochs=4) > 0).double().mean())
    assert len(uppers) == 4 * math.ceil(len(digits()[0]) / 128)
    assert max(uppers) <= 1.0
    assert lipschitz(model).upper <= 1.0
    assert accuracy >= 0.93
