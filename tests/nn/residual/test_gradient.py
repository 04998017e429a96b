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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import spectral_norm
from stableopt.nn import SLL, GradientBlock, lipschitz, lipschitz_rule, stabilize, unit_slopes
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.module_laws import check_copies, check_devices_and_dtypes, check_gradients
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
    for block in list(plain)[1:-1]:
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
    for block in list(plain)[1:-1]:
        bound = bound * (1 + lipschitz(block.first) * lipschitz(block.second))  # type: ignore[arg-type]
    assert bound.lower >= 1e20


# A step per unit, and the other limits.


def per_unit(dim: int, hidden: int, **options: object) -> GradientBlock:
    """A block with random parameters and steps per unit near their limits."""
    block = GradientBlock(dim, hidden, bound="rows", **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        block.raw_step.add_(3.0)
    return block


@settings(max_examples=60)
@given(
    hidden=st.integers(1, 7), dim=st.integers(1, 6), strong=st.sampled_from([0.0, 1e-6, 0.3, 5.0, 1e9]),
    log_scale=st.integers(-8, 8), raw=st.floats(-50, 50), activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), kind=st.sampled_from(["any", "one", "rows"]),
)  # fmt: skip
def test_steps_per_unit_never_expand_whatever_the_parameters(
    hidden: int,
    dim: int,
    strong: float,
    log_scale: int,
    raw: float,
    activation: str,
    seed: int,
    dtype: torch.dtype,
    kind: str,
) -> None:
    torch.manual_seed(seed)
    block = per_unit(dim, hidden, strong=strong, activation=activation)
    with torch.no_grad():
        if kind == "one":
            block.weight.copy_(torch.outer(torch.randn(hidden), torch.randn(dim)))
        block.weight.mul_(10.0**log_scale if kind != "rows" else 10.0 ** torch.randint(-3, 4, (hidden, 1)))
        block.raw_step.fill_(raw)
        block.get_parameter("raw_q").mul_(5.0)
    block = block.to(dtype)
    bound, kappa = lipschitz(block).upper, float(block.damping().detach())
    assert bound <= 1.0
    assert bound == pytest.approx(1.0 - kappa, abs=1e-9)
    J = jacobian(copy.deepcopy(block).double(), torch.randn(1, dim))
    torch.testing.assert_close(J, J.mT, rtol=0, atol=1e-9)
    if dtype == torch.float64:  # the Jacobian of the numbers of the bound
        assert operator_norm(J, "l2") <= bound + 1e3 * EPS
        assert operator_norm(J, "linf") <= lipschitz(block, "linf").upper * (1 + 1e3 * EPS)


@pytest.mark.parametrize("strong", [0.0, 0.4])
def test_steps_per_unit_at_their_limit_are_sharp(strong: float) -> None:
    """Orthogonal rows of different lengths: every unit reaches the other end of the spectrum, and none may take more."""
    block = GradientBlock(4, 3, strong=strong, bound="rows")
    with torch.no_grad():
        block.weight.mul_(torch.tensor([[0.2], [1.0], [3.0]]))
        block.bias.fill_(30.0)
        block.raw_step.fill_(40.0)
        if strong:
            block.get_parameter("raw_damping").fill_(40.0)
    steps, kappa = block.step_sizes().detach(), float(block.damping().detach())
    torch.testing.assert_close(steps, 2 / (2 * strong + torch.tensor([0.04, 1.0, 9.0])), rtol=1e-9, atol=0)
    assert kappa == pytest.approx(2 * strong / (2 * strong + 9.0))  # the damping obeys the steepest unit
    for over, expands in ((1.0, False), (1.001, True)):
        J = (1 - kappa) * torch.eye(4) - over * block.weight.mT @ torch.diag(steps) @ block.weight
        smallest = float(torch.linalg.eigvalsh(J.detach())[0])
        assert (-smallest > 1 - kappa + 1e-6) is expands
    torch.testing.assert_close(jacobian(block, torch.zeros(1, 4)), jacobian(block, torch.ones(1, 4)))
    assert lipschitz(block).upper == pytest.approx(1 - kappa, abs=1e-12)


def test_steps_per_unit_without_damping_at_full_length_are_the_sdp_layer() -> None:
    block, layer = per_unit(5, 7), SLL(5, 7)
    layer.load_state_dict({name: block.get_parameter(name) for name in ("weight", "bias", "raw_q")})
    nn.init.constant_(block.raw_step, 60.0)
    x = torch.randn(3, 5)
    torch.testing.assert_close(block(x), layer(x), rtol=0, atol=0)
    assert set(block.state_dict()) == {"weight", "bias", "raw_step", "raw_q"}  # no damping, no step for it
    assert set(GradientBlock(2).state_dict()) == {"weight", "bias", "raw_step"}


@pytest.mark.parametrize("strong", [0.0, 0.3])
def test_the_map_with_steps_per_unit_is_the_formula(strong: float) -> None:
    block = per_unit(4, 6, strong=strong, activation="tanh")
    W, b, x = block.weight, block.bias, torch.randn(5, 4)
    q = torch.exp(15 * torch.tanh(block.get_parameter("raw_q") / 15))
    r = (W @ W.mT).abs() @ q / q
    s = 2 / (2 * strong + r) * block.raw_step.sigmoid()
    tau = 2 / (2 * strong + r.max()) * block.get_parameter("raw_damping").sigmoid() if strong else 0.0
    torch.testing.assert_close(
        block(x), x - tau * strong * x - (s * torch.tanh(x @ W.mT + b)) @ W, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(block.step_sizes(), s, rtol=1e-9, atol=0)
    assert GradientBlock(4, 6, bound="rows").raw_step.shape == (6,)
    assert GradientBlock(4, 6).raw_step.shape == (1,)
    with pytest.raises(ValueError, match=r"no single one; call step_sizes\(\)"):
        block.step_size()
    scalar = GradientBlock(4, 6, strong=0.5)
    torch.testing.assert_close(scalar.step_sizes(), scalar.step_size().expand(6), rtol=0, atol=0)
    torch.testing.assert_close(scalar.damping(), 0.5 * scalar.step_size(), rtol=0, atol=0)


def test_steps_per_unit_are_not_above_those_of_the_norm_and_nearly_so_for_rows_that_are_orthogonal() -> None:
    torch.manual_seed(0)
    mean = {}
    for hidden in (4, 256):
        A = torch.randn(hidden, 256)
        block = GradientBlock(256, hidden, bound="rows", step=0.5)
        with torch.no_grad():
            block.weight.copy_(A)
        largest = float(torch.linalg.matrix_norm(A, 2)) ** 2
        mean[hidden] = (
            float(block.step_sizes().detach().mean()) * largest
        )  # 1 is the step of the norm, at half of the limit
    assert 0.7 < mean[4] <= 1.0
    assert 0.25 < mean[256] < 0.6


@pytest.mark.parametrize("bound", ["frobenius", "schur"])
def test_the_cheap_limits_are_their_formulas_and_below_that_of_the_norm(bound: str) -> None:
    block = GradientBlock(6, 9, strong=0.2, bound=bound, step=0.3)
    with torch.no_grad():
        block.weight.copy_(torch.randn(9, 6))
    A = block.weight.detach()
    square = float((A**2).sum() if bound == "frobenius" else A.abs().sum(0).max() * A.abs().sum(1).max())
    assert float(block.step_size().detach()) == pytest.approx(0.3 * 2 / (0.4 + square), rel=1e-9)
    assert float(block.step_size().detach()) < 0.3 * 2 / (0.4 + square)
    tight = GradientBlock(6, 9, strong=0.2, step=0.3)
    tight.load_state_dict(block.state_dict())
    assert float(block.step_size().detach()) < float(tight.step_size().detach())


@pytest.mark.parametrize("bound", ["gram", "frobenius", "schur", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_limit_is_broken_by_rounding(bound: str, dtype: torch.dtype) -> None:
    """One row: the bounds of the norm are exact, so that only the slack is left."""
    for size in (1, 3, 33) * 4:
        block = GradientBlock(size, 1, bound=bound, strong=0.1 if bound == "rows" else 0.0)
        with torch.no_grad():
            block.weight.copy_(torch.randn(1).sign() if bound == "schur" else torch.randn(1, size))
            for name in {"raw_step", "raw_damping"} & set(block.state_dict()):
                block.get_parameter(name).fill_(60.0)
        block = block.to(dtype)
        proved, kappa = lipschitz(block).upper, float(block.damping().detach())
        assert proved <= 1.0
        assert proved <= (1 - Fraction(kappa)) * (
            1 + Fraction(1, 2**40)
        )  # the two ends of the spectrum meet at the limit
        assert proved >= 1.0 - kappa


@pytest.mark.parametrize("bound", ["gram", "frobenius", "schur", "rows"])
def test_a_limit_without_gradient_is_the_same_map_with_steps_as_constants(bound: str) -> None:
    block = GradientBlock(4, 6, strong=0.3, bound=bound)
    nn.init.normal_(block.weight)
    constant = GradientBlock(4, 6, strong=0.3, bound=bound, limit_gradient=False)
    constant.load_state_dict(block.state_dict())
    x = torch.randn(3, 4)
    assert constant(x).equal(block(x))
    for module in (block, constant):
        module(x).square().sum().backward()
        assert module.raw_step.grad is not None
        assert bool(module.raw_step.grad.any())
    assert not torch.allclose(block.get_parameter("weight").grad, constant.get_parameter("weight").grad)  # type: ignore[arg-type]
    torch.testing.assert_close(block.raw_step.grad, constant.raw_step.grad)
    if bound == "rows":
        assert constant.get_parameter("raw_q").grad is None
        assert block.get_parameter("raw_q").grad is not None
    else:
        A, s = constant.weight.detach().clone().requires_grad_(), constant.step_size().detach()
        y = x - s * (0.3 * x + torch.relu(x @ A.mT) @ A)
        (expected,) = torch.autograd.grad(y.square().sum(), A)
        torch.testing.assert_close(constant.weight.grad, expected)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("strong", [0.0, 0.3])
def test_steps_per_unit_fold_into_the_weight(activation: str, strong: float) -> None:
    block = per_unit(4, 6, strong=strong, activation=activation)
    weight, bias, tau, damping, name = block.folded()
    x = torch.randn(20, 4)
    act = F.relu if activation == "relu" else F.leaky_relu
    torch.testing.assert_close(
        x - tau * (damping * x + act(x @ weight.mT + bias) @ weight), block(x), rtol=1e-9, atol=1e-9
    )
    assert name == activation
    assert damping == float(block.damping().detach())
    assert Fraction(tau) * (2 * Fraction(damping) + Fraction(spectral_norm(weight).upper) ** 2) <= 2
    with pytest.raises(UncertifiableError, match="only with relu or leaky_relu, got tanh"):
        per_unit(4, 6, activation="tanh").folded()


def test_blocks_with_steps_per_unit_live_in_the_ecosystem() -> None:
    block = per_unit(4, 6, strong=0.3)
    check_copies(block, (4,))
    check_devices_and_dtypes(block, (4,))
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.func.vmap(block)(x), block(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(block))(x), block(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = block.float().step_sizes()
    assert inside.equal(block.step_sizes())
    for name, _ in block.named_parameters():
        broken = copy.deepcopy(block)
        nn.init.constant_(broken.get_parameter(name), math.nan)
        with pytest.raises(ValueError, match=r"NaN|finite"):
            lipschitz(broken)


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["frobenius", "schur", "rows"])
def test_the_gradients_of_every_limit_are_right(bound: str) -> None:
    block = GradientBlock(3, 4, activation="tanh", strong=0.1, bound=bound)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    check_gradients(block, (3,))
    parameters, x = dict(block.named_parameters()), torch.randn(2, 3)

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradgradcheck(f, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["gram", "frobenius", "schur", "rows"])
def test_training_never_breaks_the_promise(bound: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    x, y, _, _ = digits()
    blocks = [GradientBlock(32, depth=4, bound=bound, strong=m) for m in (0.0, 0.1, 0.0, 0.1)]
    model = nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-2)
    loss = torch.tensor(math.inf)
    for batch in torch.randperm(len(x)).split(64):
        opt.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        assert all(lipschitz(block).upper <= 1.0 for block in blocks)
    assert float(loss.detach()) < 1.0


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="bound must be one of gram, frobenius, schur, rows, got 'svd'"):
        GradientBlock(3, bound="svd")
