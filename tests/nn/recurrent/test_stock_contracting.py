"""Laws of torch's recurrent layers that are kept contracting."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stableopt.optim
from stableopt.errors import UncertifiableError
from stableopt.nn import (
    cell_bound,
    clip_input,
    contracting,
    export,
    layer_bounds,
    lipschitz,
    parameter_groups,
    plain_state_dict,
    release,
    stabilize,
    uniform_bound,
)
from stableopt.nn.recurrent.gate_balls import GateBalls
from stableopt.nn.recurrent.stock_contracting import contracting_names
from tests.nn.recurrent.stock_modules import jacobians, scaled

KINDS: dict[str, Any] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def norm_of(module: nn.Module) -> str:
    return "l2" if isinstance(module, nn.RNN | nn.RNNCell) else "linf"


def worst_factor(module: nn.Module, norm: str | None = None) -> float:
    return max(bound.state.upper for bound in layer_bounds(module, norm or norm_of(module)).values())


# --------------------------------------------------------------------------------------------------------------------- the promise


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["rnn", "gru", "lstm"]), units=st.integers(1, 6), rate=st.sampled_from([0.8, 0.9, 0.95, 0.999]),
    log_scale=st.sampled_from([-30, -1, 0, 1, 2, 30]), rank_one=st.booleans(), bound=st.sampled_from([0.1, 1.0, 20.0]),
    single=st.booleans(), by=st.sampled_from(["parametrization", "projection"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_factor_stays_within_the_rate_whatever_the_parameters(
    kind: str, units: int, rate: float, log_scale: int, rank_one: bool, bound: float, single: bool, by: str, seed: int
) -> None:
    torch.manual_seed(seed)
    module = KINDS[kind](3, units, num_layers=2, bidirectional=True).to(torch.float32 if single else torch.float64)
    contracting(module, rate, input_bound=bound, by=by)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            fresh = torch.randn_like(parameter)
            if rank_one and parameter.ndim == 2:
                fresh = torch.outer(fresh[:, 0], fresh[0])
            parameter.copy_(fresh * 10.0**log_scale)
        for group in parameter_groups(module):
            for parameter in group["params"]:
                if "constraint" in group:
                    group["constraint"].project_(parameter)
    assert worst_factor(module) <= rate
    A, _ = jacobians_of_first(module, bound)
    assert rate * (1 + (1e-5 if single else 1e-9)) >= A


def jacobians_of_first(module: nn.Module, bound: float) -> tuple[float, float]:
    """The exact factor of one step of the first direction at a corner of the box, in the norm of the promise."""
    plain: Any = export(module).double()
    one = type(plain)(plain.input_size, plain.hidden_size)
    for name, parameter in one.named_parameters():
        parameter.data.copy_(getattr(plain, name))
    clip_input(one, bound)
    state = torch.zeros(one.hidden_size * (2 if isinstance(one, nn.LSTM) else 1))
    A, B = jacobians(one, state, bound * torch.randn(3).sign())
    p = 2 if isinstance(one, nn.RNN) else math.inf
    return float(torch.linalg.matrix_norm(A, p)), float(torch.linalg.matrix_norm(B, p))


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_plain_recurrence_reaches_its_rate_in_every_norm(norm: str) -> None:
    rnn = contracting(scaled(nn.RNN(3, 8), 5.0), 0.9, norm=norm, by="projection")  # type: ignore[arg-type]
    assert 0.9 * (1 - 1e-4) <= cell_bound(rnn, norm).state.upper <= 0.9


@settings(max_examples=8)
@given(
    kind=st.sampled_from(["rnn", "gru", "lstm"]), gain=st.sampled_from([0.1, 1.0, 30.0]), rate=st.sampled_from([0.8, 0.95]),
    layers=st.integers(1, 2), both=st.booleans(), scale=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 50),
)  # fmt: skip
def test_the_gain_stays_within_its_limit(
    kind: str, gain: float, rate: float, layers: int, both: bool, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    for norm in ("l2", "linf", "l1") if kind == "rnn" else ("linf",):
        module = scaled(KINDS[kind](2, 3, layers, bidirectional=both), scale)
        contracting(module, rate, norm=norm, gain=gain, input_bound=1.0)  # type: ignore[arg-type]
        assert lipschitz(module, norm).upper <= gain
        if norm == "linf":
            assert uniform_bound(module, norm).upper == gain  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "used"), [("gru", 0.35), ("lstm", 0.1)])
def test_rate_and_gain_are_used(kind: str, used: float, bias: bool) -> None:
    """Limits that no weights come near would be no limits to speak of."""
    torch.manual_seed(0)
    large = KINDS[kind](2, 4, bias=bias)
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            parameter.mul_(1.0 if name.startswith("bias") else 30.0)
    assert worst_factor(contracting(copy.deepcopy(large), 0.8, input_bound=1.0)) >= 0.9 * 0.8
    assert lipschitz(contracting(large, 0.8, gain=1.0, input_bound=1.0), "linf").upper >= used


def test_a_contracting_layer_counts_in_a_stabilized_model() -> None:
    gru = contracting(nn.GRU(4, 8), 0.95, gain=2.0, input_bound=1.0)
    model = stabilize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), gru), 1.0, norm="linf")
    assert lipschitz(model, "linf").upper <= 1.0
    with pytest.raises(UncertifiableError, match="has trainable parameters"):
        stabilize(nn.Sequential(nn.Linear(3, 4), contracting(nn.GRU(4, 8), input_bound=1.0)), 1.0, norm="linf")


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_dropping_one_limit_breaks_the_promise(kind: str) -> None:
    """Each limit is needed: with one of them taken off and its weight enlarged the factor exceeds the rate."""
    rate = 0.9
    start = contracting(KINDS[kind](2, 3), rate, input_bound=1.0)
    for name in contracting_names(start):
        broken = release(copy.deepcopy(start))
        with torch.no_grad():
            getattr(broken, name).add_(5.0)
        assert worst_factor(broken) > rate, name


def test_the_default_layers_do_not_contract_and_the_weights_that_do_are_left_alone() -> None:
    for kind in KINDS.values():
        assert not cell_bound(clip_input(kind(4, 32), 1.0), "linf").contracts
    for kind in KINDS.values():
        small = scaled(kind(4, 6), 0.05)
        before = {name: value.clone() for name, value in small.state_dict().items()}
        after = plain_state_dict(contracting(small, 0.95, input_bound=1.0))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value)


# --------------------------------------------------------------------------------------------------------------------- the limits


@settings(max_examples=15)
@given(
    gates=st.integers(1, 4), units=st.integers(1, 3), width=st.integers(1, 5), log_scale=st.sampled_from([-200, -5, 0, 5, 200]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
@example(gates=2, units=1, width=1, log_scale=0, dtype=torch.bfloat16, seed=0)
def test_both_ways_into_the_balls_end_within(
    gates: int, units: int, width: int, log_scale: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    first = tuple(float(w) for w in torch.rand(gates) + 0.1)
    second = tuple(4.0 * w if g % 2 else 0.0 for g, w in enumerate(first))
    for balls in ((first,), (second, first) if any(second) else (first,)):
        constraint = GateBalls(balls)
        x = (torch.randn(gates * units, width) * 10.0 ** min(log_scale, 4 if dtype is torch.float16 else 30)).to(dtype)
        for inside in (constraint.project(x), constraint.map(x)):
            assert inside.dtype == dtype
            assert constraint.violation(inside) == 0.0
            parts = inside.double().abs().view(gates, units, width).sum(2)
            for ball in balls:
                assert float((torch.tensor(ball)[:, None] * parts).sum(0).max()) <= 1.0
        torch.testing.assert_close(constraint.project(constraint.project(x)), constraint.project(x), rtol=0, atol=0)
        small = constraint.map(x) / 4
        torch.testing.assert_close(constraint.map(small), small, rtol=0, atol=0)


def test_the_projection_on_balls_without_a_common_gate_is_the_nearest_point() -> None:
    """Against many feasible points, and by the variational inequality."""
    torch.manual_seed(0)
    constraint = GateBalls(((1.0, 0.0, 2.0), (0.0, 3.0, 0.0)))
    x = torch.randn(6, 3)
    nearest = constraint.project(x)
    for _ in range(30):
        y = constraint.project(2 * torch.randn(6, 3))
        assert float(((x - nearest) * (y - nearest)).sum()) <= 1e-9


def test_scaling_keeps_directions_and_its_gradient_is_right() -> None:
    constraint = GateBalls(((1.0, 0.5), (0.0, 2.0)))
    x = torch.randn(4, 3)
    scale = constraint.map(x) / x
    assert torch.allclose(scale, scale[:, :1].expand_as(scale))
    assert torch.autograd.gradcheck(constraint.map, (x.requires_grad_(),))
    with pytest.raises(ValueError, match="multiple of that"):
        constraint.map(torch.ones(3, 2))
    for bad in ((), ((1.0,), (1.0, 2.0)), ((0.0,),), ((-1.0,),), ((math.nan,),)):
        with pytest.raises(ValueError, match="GateBalls needs"):
            GateBalls(bad)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- the life of a module


@pytest.mark.parametrize("kind", [*KINDS])
def test_state_copies_and_half_precision(kind: str) -> None:
    torch.manual_seed(0)
    module = contracting(scaled(KINDS[kind](3, 5, batch_first=True), 3.0), 0.9, input_bound=1.0)
    x = 2 * torch.randn(2, 6, 3)
    expected = module(x)[0]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    twin = contracting(KINDS[kind](3, 5, batch_first=True), 0.9, input_bound=1.0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), twin, export(module)):
        torch.testing.assert_close(other(x)[0], expected)
        assert worst_factor(other) <= 0.9
    plain = KINDS[kind](3, 5, batch_first=True)
    plain.load_state_dict(plain_state_dict(module))
    torch.testing.assert_close(clip_input(plain, 1.0)(x)[0], expected)
    half = copy.deepcopy(module).bfloat16()
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    assert worst_factor(half) <= 0.9 * (1 + (2**-7 if kind == "rnn" else 0.0))  # a spectral ball rounds entry by entry
    assert copy.deepcopy(module).to("meta")(x.to("meta"))[0].shape == (2, 6, 5)
    module.weight_hh_l0 = 7 * torch.ones_like(module.weight_hh_l0)
    assert worst_factor(module) <= 0.9


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("by", ["parametrization", "projection"])
def test_cells_are_kept_too(kind: Any, by: str) -> None:
    cell = contracting(scaled(kind(2, 4), 5.0), 0.85, by=by, input_bound=1.0)  # type: ignore[arg-type]
    assert worst_factor(cell) <= 0.85
    states = [cell(3 * torch.randn(5, 2)) for _ in range(2)]
    assert len(states) == 2


def test_without_biases_and_with_a_projection() -> None:
    lstm = contracting(scaled(nn.LSTM(2, 5, 2, bias=False, proj_size=3), 5.0), 0.9, input_bound=1.0)
    assert contracting_names(lstm) == (
        "weight_hh_l0", "weight_ih_l0", "weight_hr_l0", "weight_hh_l1", "weight_ih_l1", "weight_hr_l1",
    )  # fmt: skip
    assert worst_factor(lstm) <= 0.9


def test_release_gives_the_layer_back() -> None:
    for by in ("parametrization", "projection"):
        gru = contracting(nn.GRU(2, 3), 0.9, by=by, input_bound=1.0)  # type: ignore[arg-type]
        values = plain_state_dict(gru)
        assert release(gru) is gru
        assert type(gru) is nn.GRU
        assert contracting_names(gru) == ()
        assert all(torch.equal(values[name], value) for name, value in gru.state_dict().items())
        assert list(gru.state_dict()) == list(nn.GRU(2, 3).state_dict())
        contracting(gru, 0.95, by="projection", input_bound=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"rate of a contracting GRU must lie in \[0\.8, 1\)"),
        ({"rate": 0.5}, r"rate of a contracting GRU must lie in \[0\.8, 1\)"),
        ({"rate": math.nan}, "rate of a contracting GRU"),
        ({"input_bound": None}, "a GRU needs input_bound"),
        ({"input_bound": -1.0}, "input_bound must be finite and > 0"),
        ({"gain": 0.0}, "gain must be finite and > 0"),
        ({"norm": "l2"}, "norm of a contracting GRU must be one of linf"),
        ({"by": "penalty"}, "by must be"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_changed(arguments: dict[str, object], message: str) -> None:
    gru = nn.GRU(2, 3)
    with pytest.raises(ValueError, match=message):
        contracting(gru, **{"rate": 0.9, "input_bound": 1.0, **arguments})  # type: ignore[arg-type]
    assert type(gru) is nn.GRU
    assert not gru._forward_pre_hooks


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TypeError, match="contracting needs an RNN"):
        contracting(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="rate of a contracting RNN must lie in"):
        contracting(nn.RNN(1, 1), 0.0)
    gru = contracting(nn.GRU(2, 3), 0.9, input_bound=1.0)
    with pytest.raises(
        ValueError, match=r"'weight_hh_l0' of this GRU is constrained already; call stableopt\.nn\.release"
    ):
        contracting(gru, 0.9, input_bound=1.0)
    broken: Any = nn.GRU(2, 3)
    with torch.no_grad():
        broken.weight_hh_l0.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        contracting(broken, 0.9, input_bound=1.0)


# ----------------------------------------------------------------------------------------------------------------------- training


class Classifier(nn.Module):
    """The last output of a recurrence, and a linear head."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def more_above(count: int) -> tuple[Tensor, Tensor]:
    """Sequences of 12 steps, and whether the sum of the last four is positive."""
    x = torch.randn(count, 12, 2)
    return x, (x[:, -4:, 0].sum(1) > 0).long()


def train(module: nn.RNNBase, optimizer: str, steps: int, lr: float) -> tuple[float, int, float]:
    """Train in float32; return the accuracy, how often a step is not proved to contract, and the largest factor."""
    model = Classifier(module).float()
    groups = parameter_groups(model, lr=lr)
    opt = stableopt.optim.Adam(groups) if optimizer == "ours" else getattr(torch.optim, optimizer)(groups, lr=lr)
    violations, worst = 0, 0.0
    for _ in range(steps):
        x, y = more_above(64)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        factor = worst_factor(module)
        violations, worst = violations + (factor >= 1.0), max(worst, factor)
    x, y = more_above(512)
    return float((model(x).argmax(1) == y).double().mean()), violations, worst


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS])
def test_training_keeps_it_contracting_while_plain_layers_stop_to(kind: str) -> None:
    torch.set_default_dtype(torch.float32)
    for optimizer, by in (("Adam", "parametrization"), ("SGD", "parametrization"), ("ours", "projection")):
        torch.manual_seed(0)
        module = contracting(KINDS[kind](2, 16, batch_first=True), 0.95, by=by, input_bound=3.0)  # type: ignore[arg-type]
        accuracy, violations, worst = train(module, optimizer, 100, 0.2 if optimizer == "SGD" else 2e-2)
        assert violations == 0
        assert worst <= 0.95
        assert accuracy >= (0.85 if optimizer != "SGD" else 0.6)
    torch.manual_seed(0)
    plain = clip_input(scaled(KINDS[kind](2, 16, batch_first=True), 0.1), 3.0)
    assert worst_factor(plain) < 1.0
    accuracy, violations, worst = train(plain, "Adam", 100, 2e-2)
    assert violations >= 50
    assert worst > 1.5


def test_a_few_steps_of_any_optimizer_keep_it_contracting() -> None:
    for kind, (optimizer, by) in itertools.product(
        ("gru", "lstm"), (("SGD", "parametrization"), ("ours", "projection"))
    ):
        module = contracting(KINDS[kind](2, 4, batch_first=True), 0.9, by=by, input_bound=3.0)  # type: ignore[arg-type]
        torch.set_default_dtype(torch.float32)
        _, violations, worst = train(module, optimizer, 4, 1.0)
        torch.set_default_dtype(torch.float64)
        assert violations == 0
        assert worst <= 0.9


@pytest.mark.slow
def test_it_is_compiled_and_exported_with_its_limits() -> None:
    torch.manual_seed(0)
    gru: Any = contracting(nn.GRUCell(3, 4), 0.9, input_bound=1.0)
    x, h = 3 * torch.randn(2, 3), torch.zeros(2, 4)
    torch.testing.assert_close(torch.compile(gru, backend="eager", fullgraph=True)(x, h), gru(x, h))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.export.export(gru, (x, h)).module()(x, h), gru(x, h))


def test_nothing_is_promised_for_inputs_larger_than_the_weights_are_limited_for() -> None:
    layer = contracting(nn.LSTM(2, 1, bias=False), 0.95, input_bound=1.0, gain=1.0)
    assert uniform_bound(layer, "linf") is not None
    clip_input(layer, 0.5)
    assert uniform_bound(layer, "linf") is not None
    clip_input(layer, 5000.0)
    assert uniform_bound(layer, "linf") is None
    layer._forward_pre_hooks.clear()
    assert uniform_bound(layer, "linf") is None
