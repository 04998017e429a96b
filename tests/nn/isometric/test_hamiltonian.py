"""Laws of Hamiltonian blocks: volume is kept, distances grow and shrink within the budget, and never only shrink."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.linalg import Bound
from stableopt.nn import HamiltonianBlock, lipschitz, lipschitz_rule, stabilize, uniform_bound
from stableopt.nn.isometric.shears import pair_limit, pair_norm, shear_norm
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import train

EPS = torch.finfo(torch.float64).eps
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "softplus", "hardtanh"]


def filled(block: HamiltonianBlock, scale: float = 1.0) -> HamiltonianBlock:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return block


@settings(max_examples=20)
@given(
    half=st.integers(1, 3), hidden=st.integers(1, 5), growth=st.sampled_from([1.0001, 2.0, 1e3]), depth=st.integers(1, 7),
    damping=st.sampled_from([0.0, 0.3]), log_scale=st.integers(-6, 6), raw=st.tuples(*[st.floats(-60, 60)] * 2),
    activation=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_distances_grow_and_shrink_within_the_budget_whatever_the_parameters(
    half: int, hidden: int, growth: float, depth: int, damping: float, log_scale: int, raw: tuple[float, ...],
    activation: str, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    block = HamiltonianBlock(2 * half, hidden, growth=growth, depth=depth, damping=damping, activation=activation).to(
        dtype
    )
    filled(block, 10.0**log_scale)
    with torch.no_grad():
        block.raw_step.copy_(torch.tensor(raw))
    bound, uniform = lipschitz(block), uniform_bound(block)
    assert uniform is not None
    assert bound.proved
    assert bound.upper <= uniform.upper
    assert Fraction(block.limit) ** depth <= Fraction(growth)
    assert block.limit == pytest.approx(growth ** (1 / depth), rel=1e-12)
    assert uniform.upper <= block.limit * math.exp(-damping) * (1 + 2 * EPS)
    if damping == 0.0:
        assert bound.upper <= block.limit  # not 1 + eps times it
    if dtype == torch.float32:
        return  # the map itself is rounded
    J = jacobian(block, torch.randn(1, 2 * half))
    s = torch.linalg.svdvals(J)
    tolerance = 1e3 * EPS * growth
    assert float(s[0]) <= bound.upper + tolerance
    assert float(s[-1]) >= math.exp(-2 * damping) / bound.upper - tolerance
    assert float(torch.linalg.det(J)) == pytest.approx(math.exp(-damping * 2 * half), rel=1e-6)
    for norm in ("linf", "l1"):
        assert operator_norm(J, norm) <= lipschitz(block, norm).upper * (1 + 1e3 * EPS)
        most = uniform_bound(block, norm)
        assert most is not None
        assert lipschitz(block, norm).upper <= most.upper


def product(S1: torch.Tensor, S2: torch.Tensor) -> torch.Tensor:
    eye, zero = torch.eye(len(S1)), torch.zeros_like(S1)
    return torch.cat([torch.cat([eye, S2], 1), torch.cat([zero, eye], 1)]) @ torch.cat(
        [torch.cat([eye, zero], 1), torch.cat([-S1, eye], 1)]
    )


@settings(max_examples=40)
@given(u1=st.floats(1e-3, 30.0), u2=st.floats(1e-3, 30.0), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_norm_of_two_shears_is_a_bound(u1: float, u2: float, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    parts = []
    for u in (u1, u2):
        Q = torch.linalg.qr(torch.randn(size, size)).Q
        parts.append(u * (Q * torch.rand(size).round(decimals=seed % 2)) @ Q.T)  # also of zeros and ones
    assert operator_norm(product(*parts), "l2") <= pair_norm(u1, u2).upper * (1 + 1e3 * EPS)


@pytest.mark.parametrize(
    ("u1", "u2"),
    [(0.01, 0.01), (0.3, 0.5), (1.0, 1.0), (2.0, 1.5), (1.5, 2.0), (3.0, 0.2), (2.5, 2.4), (9.0, 7.0), (1.2, 0.0)],
)
def test_the_norm_of_two_shears_is_attained_at_some_angle(u1: float, u2: float) -> None:
    angles = torch.linspace(0, math.pi / 2, 2001)
    v = torch.tensor([1.0, 0.0])
    w = torch.stack([angles.cos(), angles.sin()], 1)
    best = max(operator_norm(product(u1 * torch.outer(v, v), u2 * torch.outer(b, b)), "l2") for b in w)
    assert pair_norm(u1, u2).upper == pytest.approx(best, rel=1e-6)
    assert pair_norm(u1, u2).width <= 1e-12 * best


@pytest.mark.parametrize("L", [1 + 1e-9, 1.0001, 1.5, 1 + math.sqrt(2), 3.0, 100.0])
def test_the_limit_of_two_shears_uses_up_the_norm(L: float) -> None:
    u = pair_limit(L)
    assert pair_norm(u, u).upper <= L
    assert pair_norm(u, u).upper == pytest.approx(L, rel=1e-13, abs=1e-14)
    assert pair_norm(1.001 * u, 1.001 * u).lower > L
    assert shear_norm(Bound.point(u)).upper <= L


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("over", "exceeds"), [(1.0, False), (1.001, True)])
def test_one_shear_attains_the_bound_and_a_step_past_the_budget_exceeds_it(
    first: bool, over: float, exceeds: bool
) -> None:
    block = HamiltonianBlock(6, growth=1.5, activation="relu")
    with torch.no_grad():
        block.raw_step.fill_(60.0)
        (block.weight_p if first else block.weight_q).zero_()
        block.bias_q.fill_(1e3)
        block.bias_p.fill_(1e3)
    weight = (block.weight_q if first else block.weight_p).detach()
    U2 = float(torch.linalg.matrix_norm(weight, 2)) ** 2
    h = block.step_sizes()[0 if first else 1].item()
    assert 0.9 * pair_limit(1.5) / U2 <= h <= pair_limit(1.5) / U2
    zero, exact = torch.zeros(()), (1.5 - 1 / 1.5) / U2  # alone it may be longer: u = t - 1/t
    block.step_sizes = lambda: (over * exact + zero, zero) if first else (zero, over * exact + zero)
    norm = operator_norm(jacobian(block, torch.zeros(1, 6)), "l2")
    assert norm == pytest.approx(shear_norm(Bound.point(over * (1.5 - 1 / 1.5))).upper, rel=1e-12)
    assert (norm > 1.5 + 1e-4) is exceeds
    assert lipschitz_rule(block, "l2").upper == pytest.approx(norm, rel=1e-9)


def test_both_shears_use_up_the_budget_at_the_worst_angle() -> None:
    block = HamiltonianBlock(4, 1, growth=math.sqrt(3.0), activation="relu")
    with torch.no_grad():
        block.weight_q.copy_(torch.tensor([[1.0, 0.0]]))
        block.weight_p.copy_(torch.tensor([[1.0, math.sqrt(2.0)]]) / math.sqrt(3.0))  # cos^2 = 1/3 at u = 1
        block.raw_step.fill_(60.0)
        block.bias_q.fill_(1e3)
        block.bias_p.fill_(1e3)
    norm = operator_norm(jacobian(block, torch.zeros(1, 4)), "l2")
    assert norm == pytest.approx(math.sqrt(3.0), rel=1e-9)
    assert norm <= lipschitz(block).upper <= block.limit
    assert 0.95 * norm <= worst_ratio(block, (4,), steps=30) <= norm * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_never_lifts_a_full_step_over_the_budget(dtype: torch.dtype) -> None:
    """Gram iteration is exact for rank one: only the slack is left between the steps and their limit."""
    for size in (1, 2, 3, 8, 32) * 4:
        block = HamiltonianBlock(2 * size, size, growth=1.5).to(dtype)
        with torch.no_grad():
            for weight in (block.weight_q, block.weight_p):
                weight.copy_(torch.outer(torch.randn(size), torch.randn(size)))
            block.raw_step.fill_(60.0)
        assert lipschitz(block).upper <= block.limit


def test_it_is_never_a_contraction_and_damping_makes_it_one() -> None:
    for activation in ACTIVATIONS:
        block = filled(HamiltonianBlock(4, 6, growth=4.0, activation=activation))
        assert operator_norm(jacobian(block, torch.randn(1, 4)), "l2") >= 1.0 - 1e-12
    damped = filled(HamiltonianBlock(4, 6, growth=4.0, damping=math.log(4.0)))
    assert lipschitz(damped).upper <= 1.0
    uniform = uniform_bound(damped)
    assert uniform is not None
    assert uniform.upper == pytest.approx(1.0)


def test_forward_euler_of_the_same_system_does_not_keep_volume() -> None:
    """Both updates from the old state: the determinant is above 1, and grows with depth (H-DNN's MS2)."""
    block = HamiltonianBlock(4, growth=2.0, activation="relu")
    nn.init.constant_(block.bias_q, 1e3)
    nn.init.constant_(block.bias_p, 1e3)
    h1, h2 = (h.item() for h in block.step_sizes())
    S1, S2 = (W.detach().T @ W.detach() for W in (block.weight_q, block.weight_p))
    eye = torch.eye(2)
    euler = torch.cat([torch.cat([eye, h2 * S2], 1), torch.cat([-h1 * S1, eye], 1)])
    assert float(torch.linalg.det(euler)) > 1.0 + 1e-3
    assert float(torch.linalg.det(jacobian(block, torch.zeros(1, 4)))) == pytest.approx(1.0)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_formula_and_its_inverse(damping: float) -> None:
    block = filled(HamiltonianBlock(6, 4, growth=5.0, damping=damping, activation="softplus"))
    x = torch.randn(7, 6)
    q, p = x[:, :3], x[:, 3:]
    h1, h2 = block.step_sizes()
    softplus = torch.nn.functional.softplus
    p = p - h1 * softplus(q @ block.weight_q.T + block.bias_q) @ block.weight_q
    q = q + h2 * softplus(p @ block.weight_p.T + block.bias_p) @ block.weight_p
    torch.testing.assert_close(block(x), math.exp(-damping) * torch.cat([q, p], 1))
    torch.testing.assert_close(block.inverse(block(x)), x)
    torch.testing.assert_close(block(block.inverse(x)), x)
    with pytest.raises(ValueError, match=r"inverse needs 6 features in the last dimension, got shape \(2, 5\)"):
        block.inverse(torch.zeros(2, 5))


def test_the_budget_belongs_to_the_stack() -> None:
    stack = nn.Sequential(*[filled(HamiltonianBlock(4, growth=2.0, depth=12)) for _ in range(12)])
    assert lipschitz(stack).upper <= 2.0 * (1 + 12 * EPS)
    J = jacobian(stack, torch.randn(1, 4))
    s = torch.linalg.svdvals(J)
    assert 0.5 <= float(s[-1]) <= 1.0 <= float(s[0]) <= 2.0


def test_the_initial_steps_are_the_fraction_of_their_limit() -> None:
    for growth, depth, step in ((4.0, 1, 0.5), (4.0, 8, 0.5), (1.5, 1, 0.9)):
        block = HamiltonianBlock(8, growth=growth, depth=depth, step=step)
        for h in block.step_sizes():
            assert 0.9 * step * pair_limit(block.limit) <= h.item() <= step * pair_limit(block.limit)


def test_copies_and_state_round_trips_keep_the_map() -> None:
    block = filled(HamiltonianBlock(4, 6))
    x = torch.randn(3, 4)
    fresh = HamiltonianBlock(4, 6)
    fresh.load_state_dict(block.state_dict())
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh, torch.func.vmap(block)]
    for other in copies:
        torch.testing.assert_close(other(x), block(x))
    assert lipschitz(block, "token_max").upper == lipschitz(block).upper
    parameters = dict(block.named_parameters())
    f = lambda x, *values: torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))  # noqa: E731
    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), *values))
    assert block.to("meta")(x.to("meta")).shape == (3, 4)


@pytest.mark.slow
def test_compilation_and_export_keep_the_map() -> None:
    block, x = filled(HamiltonianBlock(4, 6)), torch.randn(3, 4)
    for other in (torch.compile(block, backend="eager", fullgraph=True), torch.export.export(block, (x,)).module()):
        torch.testing.assert_close(other(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_budget(dtype: torch.dtype) -> None:
    block = HamiltonianBlock(16, growth=2.0, step=0.999).to(dtype)
    assert block(torch.randn(2, 16, dtype=dtype)).dtype == dtype
    assert block.step_sizes()[0].dtype == torch.float32
    assert lipschitz(block).upper <= 2.0


def test_nan_parameters_cannot_be_bounded() -> None:
    for name, _ in HamiltonianBlock(4).named_parameters():
        block = HamiltonianBlock(4)
        with torch.no_grad():
            block.get_parameter(name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match=f"whose {name} holds NaN"):
            lipschitz(block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 3}, "dim must be even"),
        ({"dim": 0}, "dim must be an integer"),
        ({"dim": 2, "hidden": 0}, "hidden must be"),
        ({"dim": 2, "growth": 1.0}, "growth must be finite and > 1, got 1.0: volume is kept"),
        ({"dim": 2, "growth": math.inf}, "growth must be finite"),
        ({"dim": 2, "growth": 1.0 + 1e-12, "depth": 8}, "leaves nothing for a block"),
        ({"dim": 2, "depth": 0}, "depth must be"),
        ({"dim": 2, "damping": -0.1}, "damping must be finite"),
        ({"dim": 2, "step": 1.0}, "step is a fraction of the limit"),
        ({"dim": 2, "activation": "gelu"}, "HamiltonianBlock needs slopes"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HamiltonianBlock(**arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stack_learns_within_its_budget() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    blocks = [
        HamiltonianBlock(64, growth=2.0, depth=16, damping=math.log(2.0) / 16, activation="tanh") for _ in range(16)
    ]
    model = stabilize(nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10)), 1.0)
    accuracy = float((train(model, 16.0, 0.4, lr=1e-2, epochs=5) > 0).double().mean())
    assert lipschitz(nn.Sequential(*blocks)).upper <= 1.0 + 1e-12
    assert lipschitz(model).upper <= 1.0 + 1e-12
    assert accuracy >= 0.9
