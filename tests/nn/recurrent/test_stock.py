"""Laws of what is proved about torch's RNN, GRU and LSTM."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.nn import cell_bound, clip_input, layer_bounds, lipschitz, sequence_gain, stabilize
from stableopt.nn.recurrent.comparison import _candidates
from stableopt.nn.recurrent.gates import Rows, Worst
from stableopt.nn.recurrent.stock import Direction, steps_of
from tests.nn.adversary import worst_ratio
from tests.nn.recurrent.stock_modules import GATED, PLAIN, gated, jacobians, one_step, outputs, scaled

ORDER = {"l2": 2, "linf": math.inf, "l1": 1}
NORMS = ("l2", "linf", "l1", "token_max")


def step_of(module: nn.Module) -> Direction:
    return steps_of(module)[0][0]


def in_reach(module: nn.Module, *, corner: bool) -> Tensor:
    """A state within the box that the proof is about, or a corner of it."""
    step = step_of(module).step
    limits = torch.from_numpy(step.reach)
    if isinstance(module, nn.LSTM):
        limits = torch.cat([torch.from_numpy(step.cells), limits])  # type: ignore[attr-defined]
    u = torch.rand_like(limits) * 2 - 1
    return limits * (u.sign() if corner else u)


# ------------------------------------------------------------------------------------------------------------------- one step


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["gru", "lstm"]), inputs=st.integers(1, 4), units=st.integers(1, 5),
    factor=st.sampled_from([0.1, 0.4, 1.0, 3.0]), bound=st.sampled_from([0.3, 1.0, 4.0]),
    bias=st.booleans(), corner=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_step_grows_faster_than_the_comparison_map(
    kind: str, inputs: int, units: int, factor: float, bound: float, bias: bool, corner: bool, seed: int
) -> None:
    """Entry by entry, which implies every norm, and for torch's own step: a reset before the matrix would break it."""
    torch.manual_seed(seed)
    module = gated(kind, inputs, units, factor, bound=bound, bias=bias)
    step = step_of(module).step
    state, x = in_reach(module, corner=corner), bound * (2 * torch.rand(inputs) - 1)
    if corner:
        x = bound * x.sign()
    A, B = jacobians(module, state, x)
    for norm, w in itertools.product(
        ("l2", "linf", "l1"), (np.ones(step.states), np.random.default_rng(seed).random(step.states))
    ):
        grown = torch.from_numpy(step.grown(w, None, Worst()))
        assert (A.abs() @ torch.from_numpy(w) <= grown + 1e-12).all()
        dual = {"l2": 2, "linf": 1, "l1": math.inf}[norm]
        pushed = torch.from_numpy(step.grown(np.zeros(step.states), norm, Worst()))
        assert (torch.linalg.vector_norm(B, dual, dim=1) <= pushed + 1e-12).all()
    assert (B.abs() <= torch.from_numpy(step.input_columns(Worst())) + 1e-12).all()
    majorant = torch.from_numpy(step.grown(np.eye(step.states), None, Worst()))
    assert (A.abs() <= majorant + 1e-12).all()


# For each product in the derivative: the weight of one unit that carries it, the other weights and biases, the state as a part of
# its limits and the input at which all of its factors are at their limits.
WITNESSES = {
    "n": (nn.GRU, "weight_hh", 2, {"bias_ih": (30.0, 0.5, 0.0)}, (0.0,), 0.0),
    "q": (nn.GRU, "weight_hh", 0, {"bias_hh": (0.0, 0.5, 2.0), "bias_ih": (0.0, 0.0, -1.0)}, (0.0,), 0.0),
    "-q": (nn.GRU, "weight_hh", 0, {"bias_hh": (0.0, 0.5, -2.0), "bias_ih": (0.0, 0.0, 1.0)}, (0.0,), 0.0),
    "z": (nn.GRU, "weight_hh", 1, {"bias_ih": (0.0, 0.5, 0.0), "weight_ih": (0.0, 0.0, 1.0)}, (1.0,), -1.0),
    "x": (nn.GRU, "weight_ih", 2, {"bias_ih": (0.0, -30.0, 0.0)}, (0.0,), 0.0),
    "f": (nn.LSTM, "weight_hh", 1, {"bias_ih": (0.3, 0.5, 1.0, 0.0)}, (1.0, 0.0), 0.0),
    "i": (nn.LSTM, "weight_hh", 0, {"bias_ih": (0.3, 0.5, 1.0, 0.0)}, (0.0, 0.0), 0.0),
    "g": (nn.LSTM, "weight_hh", 2, {"bias_ih": (0.3, 0.5, 0.0, 0.0)}, (0.0, 0.0), 0.0),
    "o": (nn.LSTM, "weight_hh", 3, {"bias_ih": (0.3, 0.5, 1.0, 0.7)}, (1.0, 0.0), 0.0),
}


@pytest.mark.parametrize("part", [*WITNESSES])
def test_each_product_in_the_slopes_is_attained(part: str) -> None:
    """With one small weight of one unit the bound is first order exact: the same derivative at the worst state and input."""
    kind, name, gate, others, state, x = WITNESSES[part]
    module: Any = clip_input(scaled(kind(1, 1), 0.0), 1.0)
    with torch.no_grad():
        for other, values in others.items():
            getattr(module, f"{other}_l0").view(-1).copy_(torch.tensor(values))
    derivatives, bounds = [], []
    for weight in (0.0, 1e-3):
        with torch.no_grad():
            getattr(module, f"{name}_l0").view(-1)[gate] = weight
        step = step_of(module).step
        limits = np.concatenate([step.cells, step.reach]) if kind is nn.LSTM else step.reach  # type: ignore[attr-defined]
        A, B = jacobians(module, torch.tensor(state) * torch.from_numpy(limits), torch.tensor([x]))
        majorant = (
            step.input_columns(Worst()) if name == "weight_ih" else step.grown(np.eye(step.states), None, Worst())
        )
        derivatives.append(B[:, -1] if name == "weight_ih" else A[:, -1])
        bounds.append(torch.from_numpy(majorant)[:, -1])
    exact, bound = (float((second - first).abs().max()) for first, second in (derivatives, bounds))
    assert exact > 1e-5
    assert bound == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@settings(max_examples=5)
@given(factor=st.sampled_from([0.2, 1.0, 3.0]), bound=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 30))
def test_runs_from_zero_and_from_the_box_stay_in_it(kind: str, factor: float, bound: float, seed: int) -> None:
    torch.manual_seed(seed)
    module = gated(kind, 2, 4, factor, bound=bound)
    step = step_of(module).step
    limits = torch.from_numpy(step.reach)
    if kind == "lstm":
        limits = torch.cat([torch.from_numpy(step.cells), limits])  # type: ignore[attr-defined]
    for state in (torch.zeros(step.states), limits.clone(), -limits):
        x = 10 * torch.randn(2)  # beyond the bound: it is clipped
        for _ in range(12):
            state = one_step(module, state, x).detach()
            assert (state.abs() <= limits + 1e-12).all()


@pytest.mark.parametrize("kind", [*PLAIN])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_the_factor_of_a_plain_step_is_its_matrix_norm_and_attained(kind: str, norm: str) -> None:
    module = PLAIN[kind](3, 4)
    W = 0.9 * module.weight_hh_l0.detach() / torch.linalg.matrix_norm(module.weight_hh_l0.detach(), ORDER[norm])
    with torch.no_grad():
        module.weight_hh_l0.copy_(W)
        module.bias_ih_l0.copy_(-module.bias_hh_l0 if kind == "tanh" else torch.full((4,), 5.0))
    bound = cell_bound(module, norm)
    A, B = jacobians(module, torch.zeros(4), torch.zeros(3))  # all slopes are 1 there
    assert float(torch.linalg.matrix_norm(A, ORDER[norm])) == pytest.approx(bound.state.upper, rel=1e-9)
    assert bound.state.upper == pytest.approx(0.9, rel=1e-9)
    assert float(torch.linalg.matrix_norm(B, ORDER[norm])) == pytest.approx(bound.input.upper, rel=1e-9)


@pytest.mark.parametrize("factor", [1.0 - 1e-3, 1.0 + 1e-3])
def test_just_past_the_limit_a_plain_recurrence_expands(factor: float) -> None:
    """An orthogonal matrix in the linear region: a difference grows by exactly its factor."""
    module: Any = nn.RNN(2, 4)
    with torch.no_grad():
        module.weight_hh_l0.copy_(factor * nn.init.orthogonal_(torch.empty(4, 4)))
        module.bias_ih_l0.copy_(-module.bias_hh_l0)
    A, _ = jacobians(module, torch.zeros(4), torch.zeros(2))
    growth = float(torch.linalg.matrix_norm(torch.linalg.matrix_power(A, 100), 2))
    assert growth == pytest.approx(factor**100, rel=1e-9)
    assert cell_bound(module).contracts is (factor < 1.0)
    assert (growth > 1.0) is (factor > 1.0)


def test_a_spectral_radius_below_one_is_not_enough() -> None:
    """The trap of the theory: a fixed point of a ReLU cell that repels by 1.5 per step, with radius 0.866."""
    module: Any = nn.RNN(1, 2, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.tensor([[1.5, -2.0], [1.5, -1.5]]))
    assert float(torch.linalg.eigvals(module.weight_hh_l0.detach()).abs().max()) < 0.87
    bound = cell_bound(module)
    assert not bound.contracts
    A, _ = jacobians(module, torch.tensor([1.0, 0.1]), torch.zeros(1))
    assert float(torch.linalg.eigvals(A).abs().max()) <= bound.state.upper
    with pytest.raises(
        UncertifiableError, match=r"a step of l0 has the factor .* Call stableopt\.nn\.contracting\(module, rate\)"
    ):
        lipschitz(module)


def test_a_diagonal_metric_proves_what_the_plain_norm_does_not() -> None:
    """|W| is 4, but its two entries never meet: with a scaling it contracts at any rate."""
    module: Any = nn.RNN(1, 2, bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    for norm in ("l2", "linf", "l1"):
        bound = cell_bound(module, norm)
        assert bound.contracts, norm
        assert lipschitz(module, norm).upper < math.inf


def linear(W: Tensor, U: Tensor) -> Any:
    """A recurrence whose units are all active near the input 0: its gain is that of (I - W)^-1 U for nonnegative matrices."""
    rnn: Any = nn.RNN(U.shape[1], len(W), nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        for own, value in (("weight_hh_l0", W), ("weight_ih_l0", U), ("bias_hh_l0", 5 * torch.ones(len(W)))):
            getattr(rnn, own).copy_(value)
    return rnn


F64 = torch.float64  # made before the default is set
CHAIN = torch.tensor([[0.0, 4.0], [0.0, 0.0]], dtype=F64), torch.tensor([[0.0], [1.0]], dtype=F64)
FAN = F.pad(torch.full((16, 1), 1 / 16, dtype=F64), (0, 15)), torch.full((16, 1), 1 / 4, dtype=F64)


ONE_ROW = FAN[0].T.clone(), F.pad(torch.full((1, 16), 1 / 4, dtype=F64), (0, 0, 0, 15))


@pytest.mark.parametrize(("W", "U"), [CHAIN, FAN, (FAN[0].T.clone(), FAN[1]), ONE_ROW])
def test_every_metric_counts_what_it_costs_at_input_and_output(W: Tensor, U: Tensor) -> None:
    exact = torch.linalg.solve(torch.eye(len(W)) - W, U)
    step = step_of(linear(W, U)).step
    for norm in ("l2", "linf", "l1"):
        gain = float(torch.linalg.matrix_norm(exact, ORDER[norm]))
        for bound in _candidates(step, norm, everything=True):
            assert bound.gain().upper >= gain * (1 - 1e-12), (norm, bound)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_a_nonnegative_matrix_contracts_at_its_perron_root_in_every_norm(norm: str) -> None:
    """Up to the distance of the rates that are tried; the plain norms are far above 1."""
    for seed in range(3):
        torch.manual_seed(seed)
        W = torch.rand(5, 5) ** 4
        d = torch.logspace(-1, 1, 5)[torch.randperm(5)]
        W = 0.45 * W / torch.linalg.eigvals(W).abs().max() * d / d[:, None]
        found = [
            bound.state.upper for bound in _candidates(step_of(linear(W, torch.ones(5, 1))).step, norm, everything=True)
        ]
        assert 0.45 * (1 - 1e-9) <= min(found) <= 0.51


@settings(max_examples=10)
@given(n=st.integers(2, 6), seed=st.integers(0, 50))
def test_the_metric_of_a_hidden_scaling_is_found(n: int, seed: int) -> None:
    """W = D^-1 Q D with a rotation Q of norm 0.9: no plain norm is below 1, the right scaling is 0.9."""
    torch.manual_seed(seed)
    d = torch.logspace(-1, 1, n)
    Q = 0.9 * nn.init.orthogonal_(torch.empty(n, n))
    module: Any = nn.RNN(1, n, bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(Q * d / d[:, None])
    bound = cell_bound(module)
    if float(torch.linalg.matrix_norm(module.weight_hh_l0.detach(), 2)) >= 1.0:
        assert bound.state.upper < 1.0
        assert "diagonal" in bound.metric or "weighted" in bound.metric


# ------------------------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["gru", "lstm", "tanh", "relu"])
def test_no_pair_of_sequences_is_spread_beyond_the_gain(kind: str, norm: str) -> None:
    torch.manual_seed(0)
    small = gated(kind, 2, 3, 0.25, batch_first=True) if kind in GATED else None
    module = small or scaled(PLAIN[kind](2, 3, batch_first=True), 0.4)
    found = worst_ratio(outputs(module), (8, 2), norm, starts=6, steps=15, scale=0.3)
    proved = lipschitz(module, norm).upper
    assert 0.05 * proved < found <= proved
    assert sequence_gain(module, norm).upper >= proved * (1 - 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("kind", ["gru", "lstm", "tanh"])
def test_layers_and_directions_compose(kind: str, options: dict[str, Any], norm: str) -> None:
    torch.manual_seed(1)
    if kind in GATED:
        module = gated(kind, 2, 3, 0.25, batch_first=True, **options)
    else:
        module = scaled(PLAIN[kind](2, 3, batch_first=True, **options), 0.4)
    proved = lipschitz(module, norm).upper
    for length in (8, 32):
        assert worst_ratio(outputs(module), (length, 2), norm, starts=8, steps=40, scale=0.3) <= proved


def test_the_gain_of_a_positive_recurrence_is_attained_by_a_constant_input() -> None:
    """W >= 0 in the linear region: the gain is that of (I - W)^-1 U, in every norm of sequences."""
    torch.manual_seed(0)
    W, U = 0.25 * torch.rand(3, 3), torch.rand(3, 2)
    module = linear(W, U)
    G = torch.linalg.solve(torch.eye(3) - W, U)
    for norm in ("l2", "linf", "l1"):
        exact = float(torch.linalg.matrix_norm(G, ORDER[norm]))
        assert exact <= lipschitz(module, norm).upper == pytest.approx(exact, rel=1e-6)
    x = torch.rand(1, 60, 2)
    change = 1e-3 * torch.ones_like(x)
    spread = module(x + change)[0] - module(x)[0]
    assert float(spread.abs().max().detach()) == pytest.approx(1e-3 * lipschitz(module, "linf").upper, rel=1e-6)


def test_two_directions_join_as_a_vector_of_their_gains() -> None:
    torch.manual_seed(0)
    both = scaled(nn.RNN(2, 3, bidirectional=True), 0.3)
    one, other = nn.RNN(2, 3), nn.RNN(2, 3)
    for name, parameter in both.named_parameters():
        part = other if name.endswith("_reverse") else one
        getattr(part, name.removesuffix("_reverse")).data.copy_(parameter.data)
    for norm, join in (("l2", math.hypot), ("token_max", math.hypot), ("linf", max), ("l1", lambda a, b: a + b)):
        expected = join(lipschitz(one, norm).upper, lipschitz(other, norm).upper)
        assert lipschitz(both, norm).upper == pytest.approx(expected, rel=1e-9)


def test_a_gate_that_may_keep_for_ever_still_has_a_gain_in_the_maximum_norm() -> None:
    """Without a limit of the inputs no state is forgotten, but small weights keep differences of states small."""
    torch.manual_seed(0)
    gru = scaled(nn.GRU(2, 3, batch_first=True), 0.2)
    bound = cell_bound(gru, "linf")
    assert not bound.contracts
    proved = lipschitz(gru, "linf").upper
    assert sequence_gain(gru, "linf").upper == pytest.approx(proved)
    assert worst_ratio(outputs(gru), (15, 2), "linf", starts=8, steps=40, scale=2.0) <= proved
    with pytest.raises(UncertifiableError, match=r"gates can stay open for large inputs: call .*clip_input"):
        lipschitz(gru, "l2")
    clip_input(gru, 1.0)
    assert cell_bound(gru, "linf").contracts
    assert lipschitz(gru, "l2").upper < math.inf
    assert lipschitz(gru, "linf").upper < proved


def test_an_lstm_without_a_limit_of_its_inputs_is_refused() -> None:
    lstm = scaled(nn.LSTM(2, 3), 0.05)
    assert cell_bound(lstm, "linf").state.upper == math.inf
    with pytest.raises(UncertifiableError, match="gates can stay open"):
        lipschitz(lstm, "linf")


@pytest.mark.parametrize("factor", [0.05, 0.2])
def test_a_projected_lstm_is_bounded_through_its_projection(factor: float) -> None:
    torch.manual_seed(1)
    lstm = gated("lstm", 2, 4, factor, proj_size=2, batch_first=True)
    step = step_of(lstm).step
    assert step.states == 6
    assert len(step.reach) == 2
    y = outputs(lstm)(100 * torch.randn(8, 30, 2)).abs().amax((0, 1))
    assert (y <= torch.from_numpy(step.reach)).all()
    for norm in ("l2", "linf"):
        assert worst_ratio(outputs(lstm), (10, 2), norm, starts=4, steps=20) <= lipschitz(lstm, norm).upper


def test_dropout_between_layers_is_off_in_the_statement() -> None:
    gru = gated("gru", 2, 3, 0.2, num_layers=2, dropout=0.5)
    plain = gated("gru", 2, 3, 0.2, num_layers=2)
    plain.load_state_dict(gru.state_dict())
    assert lipschitz(gru, "linf") == lipschitz(plain, "linf")
    assert gru.training


# ----------------------------------------------------------------------------------------------------------- cells and questions


@pytest.mark.parametrize(("cell", "layer"), [(nn.RNNCell, nn.RNN), (nn.GRUCell, nn.GRU), (nn.LSTMCell, nn.LSTM)])
def test_a_cell_has_the_constants_of_its_layer(cell: Any, layer: Any) -> None:
    own, stack = cell(2, 3), layer(2, 3)
    for name, parameter in own.named_parameters():
        getattr(stack, f"{name}_l0").data.copy_(parameter.data)
    for module in (own, stack):
        scaled(clip_input(module, 1.0), 0.3)
    assert cell_bound(own, "linf") == cell_bound(stack, "linf") == layer_bounds(own, "linf")[""]
    assert (
        worst_ratio(lambda x: own(x)[0] if cell is nn.LSTMCell else own(x), (2,), "linf", steps=10)
        <= cell_bound(own, "linf").input.upper
    )
    with pytest.raises(UncertifiableError, match="it is one step of a recurrence"):
        lipschitz(own)


def test_every_layer_and_direction_has_its_bounds() -> None:
    lstm = gated("lstm", 2, 3, 0.1, num_layers=2, bidirectional=True)
    assert list(layer_bounds(lstm, "linf")) == ["l0", "l0_reverse", "l1", "l1_reverse"]
    with pytest.raises(UncertifiableError, match=r"2 layers in 2 directions.*stableopt\.nn\.layer_bounds"):
        cell_bound(lstm, "linf")


def test_a_recurrent_layer_is_part_of_a_chain_and_said_where_it_is_not_bounded() -> None:
    rnn = scaled(nn.RNN(4, 4), 0.3)
    linear = nn.Linear(4, 4)
    assert lipschitz(nn.Sequential(linear, rnn)).upper == pytest.approx(lipschitz(linear).upper * lipschitz(rnn).upper)
    with pytest.raises(
        UncertifiableError, match=r"in '1' \(LSTM\): no l2 Lipschitz bound for sequences of every length"
    ):
        lipschitz(nn.Sequential(linear, nn.LSTM(4, 4)))
    with pytest.raises(UncertifiableError, match=r"the gain of '1' \(GRU\) is no product"):
        stabilize(nn.Sequential(linear, nn.GRU(4, 4)), 1.0)


def test_nan_hooks_and_subclasses_are_refused() -> None:
    gru = gated("gru", 2, 3, 0.2)
    gru.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(UncertifiableError, match="forward hook"):
        cell_bound(gru, "linf")

    class Louder(nn.GRU):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, state = super().forward(*args, **kwargs)
            return 2 * output, state

    with pytest.raises(UncertifiableError, match="overrides forward"):
        layer_bounds(Louder(2, 3))
    for name in ("weight_hh_l0", "bias_hh_l0", "weight_ih_l0", "bias_ih_l0"):
        for kind in (nn.RNN, nn.GRU, nn.LSTM):
            module = clip_input(kind(2, 3), 1.0)
            with torch.no_grad():
                getattr(module, name).view(-1)[0] = math.nan
            with pytest.raises(ValueError, match="NaN"):
                lipschitz(module, "linf")
    with pytest.raises(TypeError, match="recurrent layers or cells"):
        layer_bounds(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="norm must be one of"):
        layer_bounds(nn.RNN(1, 1), "l3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_is_about_the_stored_numbers(dtype: torch.dtype) -> None:
    gru = gated("gru", 2, 3, 0.3).to(dtype)
    wide = copy.deepcopy(gru).double()
    assert lipschitz(gru, "linf") == lipschitz(wide, "linf")


# -------------------------------------------------------------------------------------------------------------------- arithmetic


@given(low=st.floats(0, 1), width=st.floats(0, 1), keep=st.floats(0, 4), new=st.floats(0, 4), cross=st.floats(0, 8))
@example(low=0.0, width=1.0, keep=1.0, new=1.0, cross=0.0)
@example(low=0.0, width=1.0, keep=0.0, new=0.0, cross=5e-324)
def test_the_worst_gate_is_the_worst_and_no_more(
    low: float, width: float, keep: float, new: float, cross: float
) -> None:
    high = min(1.0, low + width)
    z = np.linspace(low, high, 2001)
    exact = float((z * keep + (1 - z) * new + z * (1 - z) * cross).max())
    found = float(Worst()(*(np.array([x]) for x in (low, high, keep, new, cross)))[0])
    assert exact <= found <= exact + 1e-6 * (1 + cross) + 1e-12


@given(rows=st.integers(1, 4), columns=st.integers(1, 6), log_scale=st.integers(-160, 150), seed=st.integers(0, 50))
def test_sizes_of_rows_are_rounded_up(rows: int, columns: int, log_scale: int, seed: int) -> None:
    from fractions import Fraction

    torch.manual_seed(seed)
    W = torch.randn(rows, columns) * 10.0**log_scale
    gate = Rows(torch.zeros(rows, 1), W)
    exact = [[Fraction(float(x)) for x in row] for row in W.abs()]
    for i, row in enumerate(exact):
        assert Fraction(float(gate.from_input("linf")[i])) >= sum(row)
        assert Fraction(float(gate.from_input("l2")[i])) ** 2 >= sum(x * x for x in row)
        assert Fraction(float(gate.from_input("l1")[i])) == max(row)
    low, high = gate.interval(np.ones(1), np.full(columns, 2.0))
    for i, row in enumerate(exact):
        assert Fraction(float(low[i])) <= -2 * sum(row)
        assert Fraction(float(high[i])) >= 2 * sum(row)
    assert float(gate.from_input("linf")[0]) == pytest.approx(float(sum(exact[0])), rel=1e-12)


def test_zero_and_single_weights_are_no_special_case() -> None:
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        module = clip_input(scaled(kind(2, 3), 0.0), 1.0)
        for norm in NORMS:
            assert lipschitz(module, norm).upper < 1e-6
        assert lipschitz(clip_input(scaled(kind(1, 1), 0.1), 1.0), "linf").upper < 1.0


# ------------------------------------------------------------------------------------------------------------------------ inputs


def test_the_clip_limits_every_kind_of_input_and_travels_with_the_module() -> None:
    gru = clip_input(nn.GRU(2, 3, batch_first=True), 0.5)
    x = 3 * torch.randn(4, 6, 2)
    expected = gru(x.clamp(-0.5, 0.5))[0]
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 6, 6, 6], batch_first=True)
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(gru(packed)[0], batch_first=True)
    for y in (
        gru(x)[0],
        gru(input=x)[0],
        gru(x, None)[0],
        unpacked,
        copy.deepcopy(gru)(x)[0],
        pickle.loads(pickle.dumps(gru))(x)[0],
    ):
        torch.testing.assert_close(y, expected)
    clip_input(gru, 2.0)  # replaces
    torch.testing.assert_close(gru(x)[0], gru(x.clamp(-2, 2))[0])
    with pytest.raises(ValueError, match="input_bound must be finite"):
        clip_input(gru, math.inf)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        clip_input(torch.ones(1), 1.0)  # type: ignore[arg-type]
