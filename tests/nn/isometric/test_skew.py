"""Laws of rotations with damping: every singular value is the decay, at every step; explicit steps have a limit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.linalg import spectral_norm
from stableopt.nn import GradientBlock, SkewBlock, SkewEulerBlock, lipschitz, lipschitz_rule, stabilize, uniform_bound
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import train

EPS = torch.finfo(torch.float64).eps
MAKES = [lambda: SkewBlock(4, 0.1), lambda: SkewBlock(4, method="expm", bias=False), lambda: SkewEulerBlock(4, 0.1)]


@settings(max_examples=20)
@given(
    dim=st.integers(1, 6), damping=st.sampled_from([0.0, 1e-9, 0.3, 50.0]), method=st.sampled_from(["cayley", "expm"]),
    log_scale=st.integers(-8, 8), raw=st.floats(-60, 1e7), dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_all_singular_values_are_the_decay_whatever_the_parameters(
    dim: int, damping: float, method: str, log_scale: int, raw: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    block = SkewBlock(dim, damping, method=method).to(dtype)
    with torch.no_grad():
        block.skew.copy_(10.0**log_scale * torch.randn(dim, dim))
        block.raw_step.fill_(raw)
    eps = torch.finfo(dtype).eps
    decay = math.exp(-damping * block.step_size().item())
    bound = lipschitz(block)
    assert bound.proved
    assert bound.upper <= 1.0
    assert bound.upper == pytest.approx(decay, rel=100 * eps * max(1.0, damping * block.step_size().item()), abs=1e-40)
    s = torch.linalg.svdvals(jacobian(block, torch.randn(1, dim, dtype=dtype)).double())
    torch.testing.assert_close(s, torch.full_like(s, decay), rtol=1e-3 if log_scale > 4 else 3e4 * eps, atol=1e-30)
    for norm in ("linf", "l1"):
        uniform = uniform_bound(block, norm)
        assert uniform is not None
        assert lipschitz(block, norm).upper <= uniform.upper


def test_the_methods_are_the_midpoint_step_and_the_flow() -> None:
    V, h, gamma = torch.randn(5, 5), 0.3, 0.7
    K, eye, x = V - V.T, torch.eye(5), torch.randn(3, 5)
    midpoint = torch.linalg.solve(eye - h / 2 * K, eye + h / 2 * K)
    for method, exact in (("cayley", midpoint), ("expm", torch.linalg.matrix_exp(h * K))):
        block = SkewBlock(5, gamma, step=h, method=method)
        with torch.no_grad():
            block.skew.copy_(V)
            block.bias.copy_(torch.ones(5))
        torch.testing.assert_close(block(x), math.exp(-gamma * h) * x @ exact.T + 1.0)
        assert lipschitz(block).lower == pytest.approx(math.exp(-gamma * h), rel=1e-12)
        assert worst_ratio(block, (5,), steps=3) == pytest.approx(math.exp(-gamma * h), rel=1e-9)
        for norm in ("linf", "l1"):
            assert operator_norm(math.exp(-gamma * h) * exact, norm) == pytest.approx(lipschitz(block, norm).upper)


@settings(max_examples=20)
@given(
    dim=st.integers(1, 6), damping=st.sampled_from([1e-3, 0.3, 50.0]), log_scale=st.integers(-8, 8),
    raw=st.floats(-60, 60), dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_explicit_step_stays_below_its_limit_whatever_the_parameters(
    dim: int, damping: float, log_scale: int, raw: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    block = SkewEulerBlock(dim, damping).to(dtype)
    with torch.no_grad():
        block.skew.copy_(10.0**log_scale * torch.randn(dim, dim))
        block.raw_step.fill_(raw)
    bound, h = lipschitz(block), block.step_size().item()
    assert bound.proved
    assert bound.upper <= 1.0
    K = (block.skew - block.skew.mT).detach().double()
    M = torch.eye(dim) + h * (K - damping * torch.eye(dim))
    for norm in ("l2", "linf", "l1"):
        exact, found = operator_norm(M, norm), lipschitz(block, norm)
        assert found.lower * (1 - 1e3 * EPS) <= exact <= found.upper * (1 + 1e3 * EPS)
        assert found.upper <= exact * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(("over", "expands"), [(1.0, False), (1.001, True)])
def test_the_limit_of_the_explicit_step_is_sharp(over: float, expands: bool) -> None:
    block = SkewEulerBlock(4, 0.3)
    omega = float(spectral_norm(block.skew.detach() - block.skew.detach().mT).upper)
    limit = 2 * 0.3 / (0.3**2 + omega**2)
    block.step_size = lambda: torch.tensor(over * limit)
    norm = operator_norm(jacobian(block, torch.zeros(1, 4)), "l2")
    assert norm == pytest.approx(math.sqrt(1 + (over - 1) * 2 * 0.3 * over * limit), abs=1e-12)
    assert (norm > 1 + 1e-5) is expands
    assert lipschitz_rule(block, "l2").upper == pytest.approx(norm, rel=1e-12)


def test_the_initial_explicit_step_is_the_fraction_of_its_limit() -> None:
    for depth, fraction in ((1, 0.5), (8, 1 / 8)):
        block = SkewEulerBlock(6, 0.3, depth=depth)
        omega = float(torch.linalg.matrix_norm((block.skew - block.skew.mT).detach(), 2))
        limit = 2 * 0.3 / (0.3**2 + omega**2)
        assert 0.95 * fraction * limit <= block.step_size().item() <= fraction * limit
        assert SkewBlock(6, depth=depth).step_size().item() == pytest.approx(1 / depth)


def test_two_patterns_of_slopes_of_a_nonlinear_skew_block_multiply() -> None:
    """The trap: each frozen step has its eigenvalues in the left half plane, and the alternation grows by 6.7 in each period."""
    K, gamma, h = torch.tensor([[0.0, 0.5], [-0.5, 0.0]]), 0.1, 0.1
    period = torch.eye(2)
    for slopes in ([1.0, 0.0], [0.0, 1.0]):
        J = torch.diag(torch.tensor(slopes)) @ (K - gamma * torch.eye(2))
        assert float(torch.linalg.eigvals(J).real.max()) <= 1e-12
        period = torch.linalg.matrix_power(torch.eye(2) + h * J, 80) @ period
    assert float(torch.linalg.eigvals(period).abs().max()) == pytest.approx(6.7, abs=0.1)


def test_the_nonlinear_skew_block_separates_two_states_by_inputs_that_saturate_in_turn() -> None:
    K, gamma, h = torch.tensor([[0.0, 0.5], [-0.5, 0.0]]), 0.1, 0.1
    x = torch.tensor([[0.0, 0.0], [1e-6, 1e-6]])
    mild = x.clone()
    good = SkewBlock(2, gamma, step=h)
    with torch.no_grad():
        good.skew.copy_(K / 2)
    for t in range(800):
        bias = torch.tensor([[0.0, 9.0], [9.0, 0.0]][t // 80 % 2])
        x = x + h * F.hardtanh(x @ (K - gamma * torch.eye(2)).T + bias)
        x = x - x[:1]  # the input is a nudge: the first state is held, the difference is what counts
    assert float((x[1] - x[0]).norm()) > 1e2 * 1e-6
    for _ in range(10):
        mild = good(mild).detach()
    assert float((mild[1] - mild[0]).norm()) == pytest.approx(math.exp(-gamma * h * 10) * math.sqrt(2) * 1e-6, rel=1e-6)


@pytest.mark.parametrize("make", MAKES)
def test_copies_and_state_round_trips_keep_the_map(make) -> None:
    block = make()
    x = torch.randn(3, 4)
    fresh = make()
    fresh.load_state_dict(block.state_dict())
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh, torch.func.vmap(block)]
    for other in copies:
        torch.testing.assert_close(other(x), block(x))
    assert lipschitz(block, "token_max").upper == lipschitz(block).upper <= 1.0
    parameters = dict(block.named_parameters())
    f = lambda x, *values: torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))  # noqa: E731
    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), *values))
    assert block.to("meta")(x.to("meta")).shape == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
def test_compilation_and_export_keep_the_map(make) -> None:
    block, x = make(), torch.randn(3, 4)
    for other in (torch.compile(block, backend="eager", fullgraph=True), torch.export.export(block, (x,)).module()):
        torch.testing.assert_close(other(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_promise(dtype: torch.dtype) -> None:
    for block in (SkewBlock(24, 1e-3), SkewBlock(24, method="expm"), SkewEulerBlock(24, 0.3, step=0.999)):
        block = block.to(dtype)
        assert block(torch.randn(2, 24, dtype=dtype)).dtype == dtype
        assert block.step_size().dtype == torch.float32
        assert 0.8 < lipschitz(block).upper <= 1.0


def test_a_rotation_beyond_the_range_of_half_precision_is_one_by_half_a_turn() -> None:
    block = SkewBlock(4).half()
    with torch.no_grad():
        block.skew.mul_(1e4)
        block.raw_step.fill_(1e3)
    assert 0.9 < lipschitz(block).upper <= 1.0


def test_nan_parameters_cannot_be_bounded() -> None:
    for make in (lambda: SkewBlock(3), lambda: SkewEulerBlock(3, 0.1)):
        for name, _ in make().named_parameters():
            block = make()
            with torch.no_grad():
                block.get_parameter(name).view(-1)[0] = math.nan
            with pytest.raises(ValueError, match=f"whose {name} holds NaN"):
                lipschitz(block)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkewBlock(0), "dim must be an integer"),
        (lambda: SkewBlock(2, -1.0), "damping must be finite and >= 0"),
        (lambda: SkewBlock(2, depth=0), "depth must be"),
        (lambda: SkewBlock(2, step=0.0), "step must lie in"),
        (lambda: SkewBlock(2, method="euler"), "method must be one of cayley, expm, got 'euler'"),
        (lambda: SkewEulerBlock(2, 0.0), "damping must be finite and > 0"),
        (lambda: SkewEulerBlock(2, 0.1, step=1.0), "step is a fraction"),
        (lambda: SkewEulerBlock(2, 0.1, depth=0), "depth must be"),
    ],
)
def test_wrong_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_rotations_between_gradient_blocks_learn_with_a_proved_constant_of_one() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    blocks = [block for _ in range(8) for block in (SkewBlock(64, 0.1, depth=8), GradientBlock(64, depth=8))]
    model = stabilize(nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10)), 1.0)
    accuracy = float((train(model, 16.0, 0.4, lr=1e-2, epochs=5) > 0).double().mean())
    assert max(lipschitz(block).upper for block in blocks) <= 1.0
    assert lipschitz(model).upper <= 1.0
    assert accuracy >= 0.93
