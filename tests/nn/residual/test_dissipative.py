"""Laws of the dissipative block: it contracts, its limit is sharp, and the rotation inside the activation is a trap."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stableopt.theory as th
from stableopt.nn import DissipativeBlock, DissipativeField, field_bound, lipschitz, lipschitz_rule, uniform_bound
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm

EPS = torch.finfo(torch.float64).eps


def filled(block: nn.Module, scale: float, *, raw: float, rank_one: bool = False) -> None:
    """Draw every weight anew at a scale."""
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name.endswith("raw_step"):
                p.fill_(raw)
            elif rank_one and p.ndim == 2:
                p.copy_(scale * torch.randn(len(p), 1) @ torch.randn(1, p.shape[1]))
            else:
                p.copy_(scale * torch.randn_like(p))


@settings(max_examples=30)
@given(
    dim=st.integers(1, 5), hidden=st.integers(1, 5), rate=st.sampled_from([1e-6, 0.1, 3.0]), free=st.sampled_from([0.0, 1.0, 50.0]),
    log_scale=st.integers(-6, 5), raw=st.sampled_from([-30.0, 0.0, 50.0]), rank_one=st.booleans(), learn=st.booleans(),
    single=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_contracts_whatever_the_parameters(
    dim: int, hidden: int, rate: float, free: float, log_scale: int, raw: float, rank_one: bool, learn: bool, single: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    block = DissipativeBlock(dim, hidden, rate=rate, free=free, learn_rate=learn, activation="tanh")
    filled(block, 10.0**log_scale, raw=raw, rank_one=rank_one)
    block = block.float() if single else block
    bound = lipschitz(block)
    tau, field = float(block.step_size().detach()), field_bound(block.field, "l2")
    assert bound.upper <= 1.0  # proved, not 1 + eps
    assert field.rate.lower > 0.0
    assert bound.upper <= th.dissipative_factor(tau, field.rate.lower, field.lipschitz.upper * (1 + 1e-12)) + 1e-12
    if single:
        return
    J = jacobian(block, torch.randn(1, dim))
    assert operator_norm(J, "l2") <= bound.upper + 1e4 * EPS
    if raw == 0.0 and tau * rate > 1e-12:
        assert bound.upper < 1.0


def rotating(rate: float, omega: float, curvature: float = 0.0) -> DissipativeBlock:
    """Two features that turn; the gradient acts on both alike."""
    block = DissipativeBlock(2, rate=rate, free=0.0)
    with torch.no_grad():
        block.field.weight.copy_(math.sqrt(curvature) * torch.eye(2))
        block.field.bias.fill_(1.0)
        block.field.skew.copy_(torch.tensor([[0.0, omega], [0.0, 0.0]]))
    return block


@pytest.mark.parametrize("omega", [0.3, 4.0])
def test_the_factor_and_the_limit_are_attained_by_a_rotation(omega: float) -> None:
    block = rotating(0.5, omega)
    limit = th.skew_damped_max_step(0.5, omega)
    for at in (0.5, 0.999, 1.001):
        block.step_size = lambda at=at: torch.tensor(at * limit)  # type: ignore[method-assign]
        exact = operator_norm(jacobian(block, torch.zeros(1, 2)), "l2")
        assert (exact > 1.0) is (at > 1.0)
        assert lipschitz_rule(block, "l2").upper == pytest.approx(exact, rel=1e-12)
    assert field_bound(block.field, "l2").max_step == pytest.approx(limit, rel=1e-12)
    fresh = rotating(0.5, omega)
    nn.init.constant_(fresh.raw_step, 50.0)
    assert float(fresh.step_size().detach()) == pytest.approx(limit, rel=0.02)


def test_the_factor_is_attained_by_a_gradient_and_by_a_free_part() -> None:
    block = rotating(0.25, 0.0, curvature=3.0)
    limit = 2.0 / 3.25
    for at in (0.3, 0.999, 1.001):
        block.step_size = lambda at=at: torch.tensor(at * limit)  # type: ignore[method-assign]
        J = jacobian(block, torch.ones(1, 2))
        inactive = jacobian(block, -torch.ones(1, 2) * 5)
        exact = max(operator_norm(J, "l2"), operator_norm(inactive, "l2"))
        assert lipschitz_rule(block, "l2").upper == pytest.approx(exact, rel=1e-12)
        assert (exact > 1.0) is (at > 1.0)
    free = DissipativeBlock(1, rate=0.25, free=2.0, step=0.9)
    with torch.no_grad():
        for name, value in (("weight", 0.0), ("inner", 3.0), ("outer", 5.0), ("inner_bias", 1.0)):
            getattr(free.field, name).fill_(value)
    exact = operator_norm(jacobian(free, torch.ones(1, 1)), "l2")  # the free part cancels its own decay
    assert lipschitz(free).upper == pytest.approx(exact, rel=1e-5)
    assert exact == pytest.approx(1 - float(free.step_size().detach()) * 0.25, rel=1e-3)


def test_a_rotation_inside_the_activation_is_not_covered() -> None:
    """sigma(Kx + b) - gamma x with K skew: frozen eigenvalues are fine, and every small step expands."""
    G = torch.randn(6, 6)
    K, gamma = 2 * (G - G.mT), 0.5
    expanding = 0
    for pattern in range(64):
        D = torch.diag(torch.tensor([float(pattern >> i & 1) for i in range(6)]))
        J = D @ K - gamma * torch.eye(6)
        assert float(torch.linalg.eigvals(J).real.max()) <= -gamma + 1e-9
        expanding += operator_norm(torch.eye(6) + 1e-3 * J, "l2") > 1 + 1e-5
    assert expanding > 10
    block = DissipativeBlock(6, rate=gamma, free=0.0)
    with torch.no_grad():
        block.field.skew.copy_(K / 2)
    torch.testing.assert_close(block.field.rotation(), K)
    assert lipschitz(block).upper < 1.0


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_no_adversary_finds_more_than_the_bound(norm: str) -> None:
    block = DissipativeBlock(4, 6, rate=0.3)
    filled(block, 0.6, raw=2.0)
    found = worst_ratio(block, (4,), norm, starts=8, steps=15)
    assert 0.3 < found <= lipschitz(block, norm).upper


def test_the_field_is_what_its_formula_says() -> None:
    field = DissipativeField(4, 5, rate=0.3, free=0.7, learn_rate=True, activation="tanh")
    filled(field, 0.8, raw=0.0)
    x = torch.randn(3, 4)
    A, b, W, C, d, B = field.weight, field.bias, field.skew, field.inner, field.inner_bias, field.outer
    assert C is not None
    assert B is not None
    assert d is not None
    assert field.raw_rate is not None
    m = 0.3 * torch.exp(15 * torch.tanh(field.raw_rate / 15))
    scale = 0.7 / (torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(C, 2))
    literal = (
        -(m + 0.7) * x + x @ (W - W.mT).mT - torch.tanh(x @ A.mT + b) @ A + scale * torch.tanh(x @ C.mT + d) @ B.mT
    )
    torch.testing.assert_close(
        field(x), literal, rtol=0.05, atol=0.02
    )  # Gram iteration: at most 2.6 % too large, twice
    free = field.free_scale()
    assert free is not None
    assert float(scale.detach()) * 0.95 <= float(free.detach()) <= float(scale.detach())
    torch.testing.assert_close(field(x), literal + (free - scale) * torch.tanh(x @ C.mT + d) @ B.mT)


def test_the_rate_holds_for_a_whole_stack_and_its_uniform_bound_is_one() -> None:
    stack = nn.Sequential(*[DissipativeBlock(5, rate=0.4, depth=8) for _ in range(8)])
    taus = [float(block.step_size().detach()) for block in stack]  # type: ignore[operator]
    assert lipschitz(stack).upper == pytest.approx(math.exp(-0.4 * sum(taus)), rel=0.05)
    bound = uniform_bound(stack)
    assert bound is not None
    assert bound.upper == 1.0
    assert uniform_bound(stack, "linf") is None


def test_gradients_reach_every_parameter_and_are_right() -> None:
    block = DissipativeBlock(3, 4, rate=0.2, learn_rate=True, activation="tanh", step=0.7)
    filled(block, 0.5, raw=0.3)
    parameters = dict(block.named_parameters())
    x = torch.randn(2, 3)

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    inputs = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(f, inputs)
    block(x).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in block.parameters())


@pytest.mark.slow
def test_compilation_and_export_keep_the_map() -> None:
    block, x = DissipativeBlock(4, 5), torch.randn(3, 4)
    exported = torch.export.export(block, (x,)).module()
    for other in (torch.compile(block, backend="eager", fullgraph=True), exported):
        torch.testing.assert_close(other(x), block(x))


@pytest.mark.parametrize("free", [0.0, 1.0])
def test_copies_and_casts_keep_the_map(free: float) -> None:
    block = DissipativeBlock(4, 5, free=free)
    x = torch.randn(3, 4)
    fresh = DissipativeBlock(4, 5, free=free)
    fresh.load_state_dict(block.state_dict())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
        torch.testing.assert_close(other(x), block(x))
    torch.testing.assert_close(torch.func.vmap(block)(x), block(x))
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(block).to(dtype)
        assert half(x.to(dtype)).dtype == dtype
        assert half.step_size().dtype == torch.float32
        assert lipschitz(half).upper < 1.0
    assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == (3, 4)
    assert "rate=0.1" in repr(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block.float().step_size()
    torch.testing.assert_close(inside, block.step_size(), rtol=0, atol=0)


def test_nan_steps_and_weights_have_no_bound() -> None:
    for name in ("raw_step", "field.skew", "field.outer"):
        block = DissipativeBlock(3)
        with torch.no_grad():
            block.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            lipschitz(block)
