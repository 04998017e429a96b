"""Laws of the gradient block: it never expands, the limit is sharp, negative slopes break it, deep stacks learn."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import spectral_norm
from stableopt.nn import GradientBlock, lipschitz, lipschitz_rule, stabilize, unit_slopes
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.training import digits, train

EPS = torch.finfo(torch.float64).eps
ACTIVATIONS = ["relu", "leaky_relu", "tanh", "softplus", "hardtanh"]


def at_the_limit(A: torch.Tensor, *, strong: float = 0.0, activation: str = "relu", over: float = 1.0) -> GradientBlock:
    """A block whose step is its limit times ``over``, all units active."""
    block = GradientBlock(A.shape[1], A.shape[0], strong=strong, activation=activation)
    exact = 2.0 / (2.0 * strong + float(torch.linalg.matrix_norm(A, 2)) ** 2)
    with torch.no_grad():
        block.weight.copy_(A)
        block.bias.fill_(30.0 if activation in {"relu", "softplus", "leaky_relu"} else 0.0)
    block.step_size = lambda: torch.tensor(over * exact)  # type: ignore[method-assign]
    return block


@given(
    hidden=st.integers(1, 6), dim=st.integers(1, 6), strong=st.sampled_from([0.0, 0.3, 5.0]), log_scale=st.integers(-6, 6),
    raw=st.floats(-50, 50), activation=st.sampled_from(ACTIVATIONS), rank_one=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_never_expands_whatever_the_parameters(
    hidden: int, dim: int, strong: float, log_scale: int, raw: float, activation: str, rank_one: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    block = GradientBlock(dim, hidden, strong=strong, activation=activation)
    A = torch.randn(hidden, 1) @ torch.randn(1, dim) if rank_one else torch.randn(hidden, dim)
    with torch.no_grad():
        block.weight.copy_(10.0**log_scale * A)
        block.bias.copy_(3 * torch.randn(hidden))
        block.raw_step.fill_(raw)
    tau = float(block.step_size().detach())
    bound = lipschitz(block)
    assert bound.upper <= 1.0  # proved, not 1 + eps
    assert bound.upper == pytest.approx(1 - tau * strong, abs=1e-9) or bound.upper < 1 - tau * strong + 1e-9
    J = jacobian(block, torch.randn(1, dim))
    torch.testing.assert_close(J, J.T)
    assert operator_norm(J, "l2") <= bound.upper + 1e3 * EPS


@pytest.mark.parametrize("activation", ["relu", "softplus", "tanh", "hardtanh", "leaky_relu"])
@pytest.mark.parametrize("strong", [0.0, 0.4])
def test_the_limit_is_attained_and_sharp(activation: str, strong: float) -> None:
    A = torch.randn(5, 4)
    x = torch.zeros(1, 4)
    for over, expands in ((1.0, False), (1.001, True)):
        J = jacobian(at_the_limit(A, strong=strong, activation=activation, over=over), x)
        U2 = float(torch.linalg.matrix_norm(A, 2)) ** 2
        tau = over * 2 / (2 * strong + U2)
        smallest = float(torch.linalg.eigvalsh(J)[0])
        assert smallest == pytest.approx(1 - tau * (strong + U2), abs=1e-9)  # the witness: every unit has slope 1
        if strong == 0.0:
            assert (operator_norm(J, "l2") > 1 + 1e-3 / 2) is expands
        else:  # |1 - tau (m + U^2)| = 1 - tau m exactly at the limit, larger beyond it
            assert (-smallest > 1 - tau * strong + 1e-6) is expands


def test_the_step_is_the_fraction_of_the_proved_limit() -> None:
    block = GradientBlock(6, 4, strong=0.2, step=0.3)
    tau = float(block.step_size().detach())
    limit = 2 / (0.4 + spectral_norm(block.weight).upper ** 2)
    assert tau <= 0.3 * limit
    assert tau >= 0.3 * limit / 4 ** (1 / 64)  # Gram iteration: at most rank^(1/2^7) too large, squared
    with torch.no_grad():
        block.raw_step.fill_(40.0)
        block.weight.copy_(torch.outer(torch.ones(4), torch.ones(6)))  # rank one: Gram iteration is exact
    assert float(block.step_size().detach()) == pytest.approx(2 / (0.4 + 24.0), rel=1e-12)
    assert float(block.step_size().detach()) < 2 / (0.4 + 24.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_never_lifts_a_full_step_over_the_limit(dtype: torch.dtype) -> None:
    """Gram iteration is exact for rank one: only the slack is left between the step and its limit."""
    for size in (1, 2, 3, 8, 32) * 4:
        block = GradientBlock(size).to(dtype)
        with torch.no_grad():
            block.weight.copy_(torch.outer(torch.randn(size), torch.randn(size)))
            block.raw_step.fill_(60.0)
        assert lipschitz(block).upper <= 1.0
        assert block.folded().tau == float(block.step_size().detach())


@pytest.mark.parametrize(("depth", "fraction"), [(1, 0.5), (2, 0.5), (8, 1 / 8), (64, 1 / 64)])
def test_the_initial_step_fits_the_depth(depth: int, fraction: float) -> None:
    block = GradientBlock(4, depth=depth)
    limit = 2 / float(torch.linalg.matrix_norm(block.weight.detach(), 2)) ** 2
    assert fraction * limit * 0.9 <= float(block.step_size().detach()) <= fraction * limit


def test_a_deep_stack_keeps_the_signal_at_the_start() -> None:
    """The depth-aware start keeps the product of 64 Jacobians above e^-2; half of the limit everywhere kills it."""
    aware = nn.Sequential(*[GradientBlock(16, depth=64) for _ in range(64)])
    naive = nn.Sequential(*[GradientBlock(16, step=0.5) for _ in range(64)])
    x = torch.randn(1, 16)
    assert operator_norm(jacobian(aware, x), "l2") >= math.exp(-2.1)
    assert operator_norm(jacobian(naive, x), "l2") < 1e-3


@pytest.mark.parametrize("activation", ["gelu", "silu", "mish", "hardswish"])
def test_negative_slopes_are_refused_and_would_break_it(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"slopes down to -0\.\d+; the bound of a GradientBlock needs slopes in \[0, 1\]"
    ):
        GradientBlock(3, activation=activation)
    monkeypatch.setitem(unit_slopes.UNIT_SLOPES, "bad", getattr(F, activation))
    block = GradientBlock(3, activation="bad", step=0.5)
    worst = 0.0
    for bias in np.linspace(-6, 3, 40):
        nn.init.constant_(block.bias, float(bias))
        worst = max(worst, operator_norm(jacobian(block, torch.zeros(1, 3)), "l2"))
    assert worst > 1.01


def test_the_softplus_does_not_jump_to_the_identity() -> None:
    x = torch.linspace(-30, 60, 1001)
    exact = torch.logaddexp(x, torch.zeros(()))
    torch.testing.assert_close(unit_slopes.UNIT_SLOPES["softplus"](x), exact, rtol=4 * EPS, atol=0)


def test_every_allowed_activation_has_slopes_in_the_unit_interval() -> None:
    x = torch.linspace(-60, 60, 100_001, requires_grad=True)
    for name, function in unit_slopes.UNIT_SLOPES.items():
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        assert 0.0 <= float(slope.min()) <= float(slope.max()) <= 1.0, name
        assert (function(x).diff() >= 0).all(), name  # also across the places where an implementation switches branches


@given(
    dim=st.integers(1, 6), hidden=st.integers(1, 6), strong=st.sampled_from([0.0, 1e-3, 2.0]), seed=st.integers(0, 50)
)
def test_the_folded_step_obeys_the_limit_exactly(dim: int, hidden: int, strong: float, seed: int) -> None:
    torch.manual_seed(seed)
    for dtype in (torch.float64, torch.float32):
        block = GradientBlock(dim, hidden, strong=strong).to(dtype)
        with torch.no_grad():
            block.weight.copy_(torch.randn(hidden, 1) @ torch.randn(1, dim) + 0.1 * torch.randn(hidden, dim))
            block.raw_step.fill_(40.0)
        folded = block.folded()
        U = Fraction(spectral_norm(folded.weight).upper)
        assert Fraction(folded.tau) * (2 * Fraction(strong) + U * U) <= 2
        assert folded.tau == pytest.approx(float(block.step_size().detach()), rel=1e-3)
        assert folded[:1] + folded[2:] == (folded.weight, folded.tau, strong, "relu")


@pytest.mark.parametrize("strong", [0.0, 0.4])
def test_the_folded_step_is_rounded_down_when_the_block_exceeds_its_limit(strong: float) -> None:
    A = torch.randn(4, 4)
    folded = at_the_limit(A, strong=strong, over=1.5).folded()
    limit = 2 / (2 * strong + spectral_norm(A).upper ** 2)
    assert folded.tau == pytest.approx(limit, rel=1e-12)
    assert Fraction(folded.tau) * (2 * Fraction(strong) + Fraction(spectral_norm(A).upper) ** 2) <= 2


def test_a_step_beyond_the_limit_is_bounded_by_the_other_end_of_the_spectrum() -> None:
    block = at_the_limit(torch.randn(4, 4), over=1.5)
    assert lipschitz_rule(block, "l2").upper == pytest.approx(2.0, rel=1e-12)  # |1 - 1.5 * 2|
    assert operator_norm(jacobian(block, torch.zeros(1, 4)), "l2") == pytest.approx(2.0, rel=1e-9)
    with pytest.raises(UncertifiableError, match="overrides step_size"):
        lipschitz(block)


def test_the_linf_bound_of_a_block_covers_its_expansion() -> None:
    """A damps along (1, 1, 1): a single coordinate leaks into the two others, 1 - 4 tau + 8 tau = 4/3 for tau = 1/12."""
    block = at_the_limit(torch.full((1, 3), 2.0), over=0.5)
    exact = operator_norm(jacobian(block, torch.zeros(1, 3)), "linf")
    assert exact == pytest.approx(4 / 3)
    assert exact <= lipschitz_rule(block, "linf").upper == pytest.approx(exact, rel=1e-12)  # attained


def test_folding_copies_and_computes_the_same_map() -> None:
    block = GradientBlock(4, 5, strong=0.3, activation="tanh")
    nn.init.normal_(block.bias)
    weight, bias, tau, strong, activation = block.folded()
    x = torch.randn(3, 4)
    literal = x - tau * (strong * x + torch.tanh(x @ weight.T + bias) @ weight)
    assert activation == "tanh"
    torch.testing.assert_close(literal, block(x), rtol=1e-9, atol=1e-12)
    weight.zero_()
    assert block.weight.any()


def test_nan_parameters_cannot_be_folded_or_bounded() -> None:
    for name in ("weight", "bias", "raw_step"):
        block = GradientBlock(3)
        with torch.no_grad():
            getattr(block, name).view(-1)[0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            block.folded()
        with pytest.raises(ValueError, match="NaN"):
            lipschitz(block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be an integer"),
        ({"dim": 2.0}, "dim must be an integer"),
        ({"dim": 2, "hidden": 0}, "hidden must be"),
        ({"dim": 2, "depth": 0}, "depth must be"),
        ({"dim": 2, "strong": -1.0}, "strong must be finite"),
        ({"dim": 2, "strong": math.nan}, "strong must be finite"),
        ({"dim": 2, "step": 1.0}, "step is a fraction"),
        ({"dim": 2, "step": 0.0}, "step is a fraction"),
        ({"dim": 2, "step": math.nan}, "step is a fraction"),
        ({"dim": 2, "activation": "sigmoidal"}, "activation must be one of relu"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientBlock(**arguments)  # type: ignore[arg-type]


def test_a_zero_weight_is_the_identity_with_finite_gradients() -> None:
    block = GradientBlock(3)
    nn.init.zeros_(block.weight)
    x = torch.randn(2, 3)
    y = block(x)
    torch.testing.assert_close(y, x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_the_gradient_is_right_through_the_step() -> None:
    block = GradientBlock(3, 4, activation="tanh", strong=0.1)
    parameters = dict(block.named_parameters())
    x = torch.randn(2, 3)

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))


def test_copies_compilation_and_state_round_trips_keep_the_map() -> None:
    block = GradientBlock(4, 6)
    nn.init.normal_(block.bias)
    x = torch.randn(3, 4)
    fresh = GradientBlock(4, 6)
    fresh.load_state_dict(block.state_dict())
    copies = [
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        fresh,
        torch.compile(block, backend="eager", fullgraph=True),
    ]
    for other in copies:
        torch.testing.assert_close(other(x), block(x))
    batched = torch.func.vmap(lambda v: block(v))(x)
    torch.testing.assert_close(batched, block(x))
    assert block.to("meta")(x.to("meta")).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_never_expands_either(dtype: torch.dtype) -> None:
    block = GradientBlock(16, step=0.999).to(dtype)
    assert block(torch.randn(2, 16, dtype=dtype)).dtype == dtype
    assert block.step_size().dtype == torch.float32
    assert lipschitz(block).upper <= 1.0


def test_autocast_does_not_lower_the_precision_of_the_step() -> None:
    block = GradientBlock(32).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block.step_size()
    torch.testing.assert_close(inside, block.step_size(), rtol=0, atol=0)


def test_training_and_evaluation_are_the_same_map() -> None:
    block = GradientBlock(5)
    x = torch.randn(2, 5)
    for _ in range(3):
        block.train()(x)
    torch.testing.assert_close(block.eval()(x), copy.deepcopy(block).train()(x), rtol=0, atol=0)
    assert dict(block.named_buffers()) == {}


class Plain(nn.Module):
    """The usual residual block; its only bound is 1 + |B| |A|."""

    def __init__(self, dim: int):
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


@pytest.mark.slow
def test_sixty_four_blocks_learn_with_a_proved_bound_of_one_and_plain_blocks_have_no_useful_one() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    blocks = [GradientBlock(64, depth=64) for _ in range(64)]
    model = stabilize(nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10)), 1.0)
    assert float((train(model, 16.0, 0.4, lr=1e-2, epochs=8) > 0).double().mean()) >= 0.93
    assert lipschitz(model).upper <= 1.0

    plain = nn.Sequential(nn.Linear(64, 64), *[Plain(64) for _ in range(64)], nn.Linear(64, 10))
    bound = lipschitz(plain[0]) * lipschitz(plain[-1])
    for block in plain[1:-1]:
        bound = bound * (1 + lipschitz(block.first) * lipschitz(block.second))  # type: ignore[arg-type]
    assert bound.lower >= 1e10
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    x, y, _, _ = digits()
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            F.cross_entropy(plain(x[batch]), y[batch]).backward()
            opt.step()
    bound = lipschitz(plain[0]) * lipschitz(plain[-1])
    for block in plain[1:-1]:
        bound = bound * (1 + lipschitz(block.first) * lipschitz(block.second))  # type: ignore[arg-type]
    assert bound.lower >= 1e20
