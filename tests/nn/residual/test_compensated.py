"""Laws of compensated pairs: never above 1 whatever the parameters, attained, and independent limits do not do."""

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

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    CompensatedPair,
    ConvGradientBlock,
    DissipativeBlock,
    GradientBlock,
    InfNormBlock,
    MarginCrossEntropy,
    Scale,
    lipschitz,
    stabilize,
    table,
    uniform_bound,
)
from stableopt.theory import compensated_max_step, strongly_convex_best_step, strongly_convex_factor
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import digits


def mlp(n: int = 4, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, n))


def full(pair: CompensatedPair) -> CompensatedPair:
    """The whole of what the contraction leaves."""
    nn.init.constant_(pair.raw_step, 60.0)
    return pair


CONTRACTIONS = {
    "gradient": ("l2", lambda: GradientBlock(3, strong=0.8)),
    "gradient rows": ("l2", lambda: GradientBlock(3, strong=0.8, bound="rows")),
    "dissipative": ("l2", lambda: DissipativeBlock(3, rate=0.5)),
    "maximum norm": ("linf", lambda: InfNormBlock(3, rate=0.5)),
    "limited": ("l2", lambda: stabilize(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 0.5)),
    "limited in l1": ("l1", lambda: stabilize(nn.Linear(3, 3), 0.5, norm="l1")),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
@settings(max_examples=8)
@given(
    log_scale=st.integers(-6, 6), raw=st.floats(-50, 50), zero=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_never_expands_whatever_the_parameters(
    name: str, log_scale: int, raw: float, zero: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    norm, make = CONTRACTIONS[name]
    pair = CompensatedPair(make(), mlp(3, 5), norm=norm).eval()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.copy_(10.0**log_scale * torch.randn_like(parameter))
        if zero:
            for parameter in pair.branch.parameters():
                parameter.zero_()
        for key, parameter in pair.named_parameters():
            if key.endswith("raw_step"):
                parameter.fill_(raw)
    pair.to(dtype)
    bound = lipschitz(pair, norm)
    assert bound.proved
    assert bound.upper <= 1.0  # exactly
    uniform = uniform_bound(pair, norm)
    assert uniform is not None
    assert uniform.upper == 1.0
    if dtype is torch.float64:
        assert operator_norm(jacobian(pair, torch.randn(1, 3)), norm) <= bound.upper * (1.0 + 1e-9)


def orthogonal_pair(fraction: float) -> CompensatedPair:
    """A gradient block with m = U^2 = 1/2, that of an orthogonal LeakyReLU(1/2), and an orthogonal branch."""
    block = GradientBlock(4, strong=0.5)
    branch = nn.Linear(4, 4, bias=False)
    Q = nn.init.orthogonal_(torch.empty(4, 4))
    with torch.no_grad():
        block.weight.copy_(math.sqrt(0.5) * Q)
        block.bias.zero_()
        branch.weight.copy_(Q)
        block.raw_step.fill_(math.log(fraction / (1.0 - fraction)))
    return CompensatedPair(block, branch)


def test_the_limit_is_what_the_contraction_leaves() -> None:
    """The table of T3i: steps 0.5, 1 and 4/3 of an orthogonal LeakyReLU(1/2) contract by 0.75, 0.5, 1/3 and leave 1/3, 1, 2."""
    for step, c, allowed in ((0.5, 0.75, 1 / 3), (1.0, 0.5, 1.0), (4 / 3, 1 / 3, 2.0), (1.89, 0.89, 0.1236)):
        factor = strongly_convex_factor(step, 0.5, 1.0)
        assert factor == pytest.approx(c)
        assert compensated_max_step(factor, 1.0) == pytest.approx(allowed, rel=1e-3)
        if step < 4 / 3:  # the block does not go beyond its best step, 4/3
            pair = full(orthogonal_pair(step / (4 / 3)))
            assert float(pair.contractive.step_size().detach()) == pytest.approx(step, rel=0.02)  # type: ignore[operator]
            assert float(pair.step_size().detach()) == pytest.approx(allowed, rel=0.06)  # both norms by Gram iteration
            assert float(pair.step_size().detach()) <= allowed
    assert strongly_convex_best_step(0.5, 1.0) == pytest.approx(4 / 3)


def test_it_is_attained_and_just_past_the_limit_it_expands() -> None:
    """A contraction by c I, 1 - tau m with a zero weight, and a branch L I."""
    block = GradientBlock(3, strong=1.0, step=0.6)
    nn.init.zeros_(block.weight)
    pair = full(CompensatedPair(block, Scale(2.0)))
    tau = float(pair.step_size().detach())
    c = 1.0 - float(block.step_size().detach())
    assert tau == pytest.approx((1 / c - 1) / 2, rel=1e-9)
    x = torch.randn(1, 3)
    assert operator_norm(jacobian(pair, x), "l2") == pytest.approx(1.0, abs=1e-9)
    assert 1.0 - 1e-9 < lipschitz(pair).upper <= 1.0
    pair.step_size = lambda: torch.tensor(1.001 * tau)  # type: ignore[method-assign]
    assert operator_norm(jacobian(pair, x), "l2") > 1.0 + 1e-4
    assert lipschitz(CompensatedPair(block, Scale(2.0), step=0.5)).upper == pytest.approx(0.5 * (1 + c), rel=1e-6)


def test_limits_that_do_not_know_of_each_other_are_no_limit() -> None:
    """The trap: an orthogonal LeakyReLU(1/2) step in [0.11, 1.89] and an expansive one up to 1.9, each clamped by itself."""
    A = nn.init.orthogonal_(torch.empty(4, 4))

    def pair(x: torch.Tensor, contract: float, expand: float) -> torch.Tensor:
        y = x - contract * F.leaky_relu(x @ A.T, 0.5) @ A
        return y + expand * F.leaky_relu(y @ A.T, 0.5) @ A

    positive = torch.ones(1, 4) @ A  # all units active
    J = torch.as_tensor(torch.autograd.functional.jacobian(lambda x: pair(x, 0.11, 1.9), positive)).view(4, 4)
    assert operator_norm(J, "l2") == pytest.approx((1 - 0.11) * (1 + 1.9))  # 2.58
    assert lipschitz(full(orthogonal_pair(0.11 / (4 / 3)))).upper <= 1.0


def test_the_step_follows_the_contraction_of_the_moment() -> None:
    pair = full(CompensatedPair(GradientBlock(4, strong=1.0, step=0.5), mlp()))
    before = float(pair.step_size().detach())
    nn.init.constant_(pair.contractive.raw_step, -2.0)  # type: ignore[arg-type]
    weaker = float(pair.step_size().detach())
    assert weaker < 0.5 * before
    nn.init.constant_(pair.contractive.raw_step, -60.0)  # type: ignore[arg-type]
    assert float(pair.step_size().detach()) == 0.0
    torch.testing.assert_close(pair(torch.ones(1, 4)), torch.ones(1, 4))
    loud = full(CompensatedPair(GradientBlock(4, strong=1.0, step=0.5), mlp()))
    with torch.no_grad():
        for parameter in loud.branch.parameters():
            parameter.mul_(10.0)
    assert float(loud.step_size().detach()) < 0.1 * before


def test_the_adversary_stays_below_the_bound() -> None:
    torch.manual_seed(0)
    pair = full(CompensatedPair(DissipativeBlock(4, rate=1.0, step=0.6), mlp()))
    assert 0.3 < worst_ratio(pair, (4,), starts=8, steps=20) <= lipschitz(pair).upper <= 1.0


def test_the_map_gradients_and_copies() -> None:
    pair = CompensatedPair(GradientBlock(3, strong=0.5), mlp(3, 3), depth=4)
    assert float(pair.raw_step.detach().sigmoid()) == pytest.approx(0.25)
    x = torch.randn(2, 3)
    y = pair.contractive(x)
    torch.testing.assert_close(pair(x), y + pair.step_size() * pair.branch(y), rtol=0, atol=0)
    names = dict(pair.named_parameters())

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pair, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in names.values()))
    pair(x).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in pair.parameters())
    fresh = CompensatedPair(GradientBlock(3, strong=0.5), mlp(3, 3))
    fresh.load_state_dict(pair.state_dict())
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair)), fresh):
        torch.testing.assert_close(other(x), pair(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(pair)(x), pair(x))
    assert copy.deepcopy(pair).to("meta")(x.to("meta")).shape == x.shape
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(pair).to(dtype)
        assert half(x.to(dtype)).dtype == dtype
        assert half.step_size().dtype == torch.float32


@pytest.mark.slow
def test_it_is_compiled_in_one_graph_and_exported() -> None:
    pair = CompensatedPair(GradientBlock(4, strong=0.5), mlp()).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(pair, backend="eager", fullgraph=True)(x), pair(x))
    torch.testing.assert_close(torch.export.export(pair, (x,)).module()(x), pair(x))


def test_images_and_the_norm_of_tokens() -> None:
    image = full(CompensatedPair(ConvGradientBlock(2, 3, 3, strong=0.5), nn.Conv2d(2, 2, 3, padding=1)))
    assert 0.5 < lipschitz(image).upper <= 1.0
    assert operator_norm(jacobian(image, torch.randn(1, 2, 4, 4)), "l2") <= lipschitz(image).upper
    tokens = full(CompensatedPair(GradientBlock(4, strong=0.5), mlp(), norm="token_max"))
    assert 0.5 < lipschitz(tokens, "token_max").upper <= 1.0
    assert uniform_bound(tokens, "token_max").upper == 1.0  # type: ignore[union-attr]
    assert uniform_bound(tokens, "l2") is None


def test_stabilize_limits_the_branch_and_leaves_the_contraction_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), CompensatedPair(GradientBlock(4, strong=0.5), mlp()), nn.Linear(4, 2))
    stabilize(model, 1.0)
    rows = {row.name: row.limit for row in table(model).rows}
    assert sorted(rows) == ["0.weight", "1.branch.0.weight", "1.branch.2.weight", "2.weight"]
    assert rows["0.weight"] == pytest.approx(1.0)  # the pair counts 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_().mul_(30.0)
    assert lipschitz(model).upper <= 1.0
    with pytest.raises(UncertifiableError, match="does not expand in the norm that it was built with, 'l2'"):
        stabilize(nn.Sequential(CompensatedPair(GradientBlock(4, strong=0.5), mlp())), 1.0, norm="linf")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="needs a constant below 1, and GradientBlock has 1: nothing is left"):
        CompensatedPair(GradientBlock(3), nn.Tanh())
    layer = nn.Linear(3, 3)
    nn.init.eye_(layer.weight)
    with pytest.raises(ValueError, match=r"needs a constant below 1, and Linear has \d"):
        CompensatedPair(layer, nn.Tanh())
    with torch.no_grad():
        layer.weight.mul_(0.5)
    with pytest.raises(ValueError, match="must not expand for any value of its parameters"):
        CompensatedPair(layer, nn.Tanh())  # contracts now, and nothing keeps it from expanding later
    with pytest.raises(UncertifiableError, match="known not to expand in linf, and 'l2' was asked for"):
        CompensatedPair(InfNormBlock(3, rate=0.5), nn.Tanh())
    with pytest.raises(UncertifiableError, match=r"PReLU\) in a branch of CompensatedPair"):
        CompensatedPair(GradientBlock(3, strong=0.5), nn.PReLU())
    with pytest.raises(TypeError, match=r"branches of CompensatedPair must be torch\.nn\.Modules"):
        CompensatedPair(GradientBlock(3, strong=0.5), torch.tanh)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inplace=True"):
        CompensatedPair(GradientBlock(3, strong=0.5), nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="norm must be one of"):
        CompensatedPair(GradientBlock(3, strong=0.5), nn.Tanh(), norm="fro")
    with pytest.raises(ValueError, match="branch of a CompensatedPair must keep the shape"):
        CompensatedPair(GradientBlock(3, strong=0.5), nn.Linear(3, 1))(torch.zeros(1, 3))
    pair = CompensatedPair(GradientBlock(3, strong=0.5), nn.Tanh())
    nn.init.constant_(pair.raw_step, math.nan)
    with pytest.raises(ValueError, match="no bound holds for a CompensatedPair with NaN"):
        lipschitz(pair)
    with torch.device("meta"):
        assert CompensatedPair(GradientBlock(3, strong=0.5), nn.Tanh())(torch.zeros(1, 3)).is_meta
    changed = CompensatedPair(GradientBlock(3, strong=0.5), nn.Sequential(nn.Tanh()))
    changed.branch[0] = nn.GELU()  # type: ignore[index, operator]
    assert uniform_bound(changed) is None


def test_a_limited_layer_is_a_contraction_for_every_weight() -> None:
    pair = full(CompensatedPair(stabilize(nn.Linear(3, 3), 0.5), nn.Tanh())).eval()
    assert uniform_bound(pair) is not None
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.mul_(1e3)
    assert lipschitz(pair).upper <= 1.0
    pair.contractive = nn.Linear(3, 3)
    assert uniform_bound(pair) is None


def test_a_contraction_by_cancellation_pays_for_its_rounding() -> None:
    """Where the factor 1 - tau * gamma nearly vanishes, its rounding is that of 1."""
    worst = 0.0
    for raw in torch.linspace(-0.02, 0.02, 41).tolist():
        block = DissipativeBlock(3, rate=0.37, free=0.0, step=0.5).float()
        with torch.no_grad():
            block.field.weight.zero_()
            block.field.skew.zero_()
            block.raw_step.fill_(raw)
        pair = CompensatedPair(block, nn.Tanh()).float()
        nn.init.constant_(pair.raw_step, 30.0)
        worst = max(worst, lipschitz(pair).upper)
    assert worst <= 1.0


@pytest.mark.slow
def test_pairs_learn_and_never_expand_at_any_step() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    pairs = [
        CompensatedPair(GradientBlock(64, strong=0.5, depth=4), mlp(64, 64), depth=2) for _ in range(4)
    ]  # the contraction is weak at the start, so is the expansion
    model = nn.Sequential(*pairs, stabilize(nn.Linear(64, 10), 1.0))
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    loss = MarginCrossEntropy(16.0, 0.4)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            opt.step()
            assert all(lipschitz(pair).upper <= 1.0 for pair in pairs)
    with torch.no_grad():
        assert float((model.eval()(x_test).argmax(1) == y_test).double().mean()) >= 0.93


def test_rounding_never_lifts_a_full_pair() -> None:
    """Fixed constants: only the slack is left between the step and its limit."""
    for c in (0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
        for L in (0.3, 1.0, 3.0, 7.0):
            for dtype in (torch.float64, torch.float32):
                pair = full(CompensatedPair(Scale(c), Scale(L))).to(dtype)
                assert 1.0 - 1e-4 < lipschitz(pair).upper <= 1.0
