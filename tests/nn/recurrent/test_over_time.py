"""Laws of the layer over time and its readouts: the same as a loop, padded, packed and reversed; constants that are attained."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn import (
    CellBound,
    Concat,
    ContractingCell,
    DiagonalMetricCell,
    LastStep,
    LeakyCell,
    MeanOverTime,
    Recurrence,
    cell_rule,
    contracting,
    lipschitz,
    sequence_gain,
    stabilize,
    uniform_bound,
)
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.recurrent.cells import CELLS, random_parameters


def by_hand(cell: nn.Module, x: Tensor, h: Tensor) -> list[Tensor]:
    """The states of one sequence after each step, by calling the cell."""
    states = []
    for step in x:
        h = cell(step[None], h[None])[0]
        states.append(h)
    return states


@pytest.mark.parametrize("name", sorted(CELLS))
def test_a_sequence_is_a_loop_over_the_cell(name: str) -> None:
    cell = random_parameters(CELLS[name](3, 4, memory=5), 0.0)
    x = torch.randn(2, 6, 3)
    y = Recurrence(cell)(x)
    for i in range(2):
        torch.testing.assert_close(y[i], torch.stack(by_hand(cell, x[i], torch.zeros(4))))
        torch.testing.assert_close(Recurrence(cell)(x[i]), y[i])  # without a batch


def test_order_of_dimensions_direction_and_initial_states() -> None:
    cell = random_parameters(LeakyCell(3, 4), 0.0)
    x, h = torch.randn(2, 5, 3), torch.randn(2, 4)
    y = Recurrence(cell)(x, h)
    torch.testing.assert_close(Recurrence(cell, batch_first=False)(x.transpose(0, 1), h).transpose(0, 1), y)
    torch.testing.assert_close(y[1], torch.stack(by_hand(cell, x[1], h[1])))
    torch.testing.assert_close(Recurrence(cell, reverse=True)(x.flip(1), h).flip(1), y)
    outputs, last = Recurrence(cell, return_state=True)(x, h)
    torch.testing.assert_close(last, outputs[:, -1])
    outputs, last = Recurrence(cell, return_state=True, reverse=True)(x, h)
    torch.testing.assert_close(last, outputs[:, 0])
    learned = Recurrence(cell, learn_initial=True)
    assert learned.initial is not None
    with torch.no_grad():
        learned.initial.copy_(h[0])
    torch.testing.assert_close(learned(x), Recurrence(cell)(x, h[0]))
    learned(x).sum().backward()
    assert learned.initial.grad is not None
    assert bool((learned.initial.grad != 0).any())
    outputs, last = Recurrence(cell, return_state=True)(x[:, :0], h)
    assert outputs.shape == (2, 0, 4)
    torch.testing.assert_close(last, h)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 5, 1], [5, 4, 2]])
def test_steps_that_are_padding_change_nothing(reverse: bool, lengths: list[int]) -> None:
    cell = random_parameters(ContractingCell(2, 3), 0.0)
    layer = Recurrence(cell, reverse=reverse, return_state=True)
    x, h, n = torch.randn(3, 5, 2), torch.randn(3, 3), torch.tensor(lengths)
    outputs, last = layer(x, h, n)
    for i, length in enumerate(lengths):
        alone, end = layer(x[i : i + 1, :length], h[i : i + 1])
        torch.testing.assert_close(outputs[i, :length], alone[0])
        torch.testing.assert_close(last[i], end[0])
        assert not bool(outputs[i, length:].any())
    torch.testing.assert_close(layer(torch.where(outputs[..., :1] != 0, x, torch.tensor(math.nan)), h, n)[1], last)
    packed = pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
    again, packed_last = layer(packed, h)
    assert isinstance(again, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(again, batch_first=True)[0], outputs[:, : max(lengths)])
    torch.testing.assert_close(packed_last, last)
    torch.testing.assert_close(layer(packed)[1], layer(x, None, n)[1])
    if lengths == sorted(lengths, reverse=True):
        assert layer(pack_padded_sequence(x, n, batch_first=True), h)[1].allclose(last)


def test_readouts_of_padded_sequences() -> None:
    x, n = torch.randn(3, 5, 2), torch.tensor([5, 1, 3])
    for i, length in enumerate(n.tolist()):
        torch.testing.assert_close(LastStep()(x, n)[i], x[i, length - 1])
        torch.testing.assert_close(MeanOverTime()(x, n)[i], x[i, :length].mean(0))
        torch.testing.assert_close(MeanOverTime(2)(x, n)[i], x[i, :length].sum(0) / max(length, 2))
    torch.testing.assert_close(LastStep()(x), x[:, -1])
    torch.testing.assert_close(MeanOverTime()(x), x.mean(1))
    for read in (LastStep, MeanOverTime):
        torch.testing.assert_close(read(batch_first=False)(x.transpose(0, 1), n), read()(x, n))
        torch.testing.assert_close(read(batch_first=False)(x.transpose(0, 1)), read()(x))
        torch.testing.assert_close(read()(x[0]), read()(x)[0])


# ---------------------------------------------------------------------------------------------------------------- constants


@settings(max_examples=20)
@given(steps=st.integers(1, 5), shortest=st.integers(1, 5), seed=st.integers(0, 9))
def test_the_constants_of_the_readouts_hold_and_are_attained(steps: int, shortest: int, seed: int) -> None:
    torch.manual_seed(seed)
    shortest = min(shortest, steps)
    x, n = torch.randn(1, steps, 2), torch.tensor([seed % steps + 1])
    for read in (LastStep(), MeanOverTime(shortest)):
        for norm in ("l2", "linf", "l1"):
            L = lipschitz(read, norm).upper
            J = jacobian(read, x)
            assert operator_norm(J, norm) <= L * (1 + 1e-12)
            assert operator_norm(jacobian(lambda x, read=read: read(x, n), x), norm) <= L * (1 + 1e-12)  # type: ignore[arg-type]
            if shortest == steps or norm == "linf" or isinstance(read, LastStep):
                assert operator_norm(J, norm) == pytest.approx(L, rel=1e-12)
        assert lipschitz(read, "token_max").upper == 1.0


@pytest.mark.parametrize("name", ["leaky l2", "diagonal metric", "contracting weighted"])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "token_max"])
def test_the_adversary_does_not_find_more_than_the_proved_gain(name: str, norm: str) -> None:
    cell = random_parameters(CELLS[name](2, 3, memory=4, rate=0.95), -0.3)
    layer = Recurrence(cell, length=6)
    assert worst_ratio(layer, (6, 2), norm, starts=6, steps=8) <= lipschitz(layer, norm).upper


def test_a_model_is_bounded_and_limited_and_its_length_counts() -> None:
    cell = LeakyCell(3, 8, gain=2.0)
    model = nn.Sequential(Recurrence(cell), MeanOverTime(4), nn.Linear(8, 2))
    assert uniform_bound(model[:2], "l2").upper == 1.0  # type: ignore[union-attr]
    assert uniform_bound(model[0], "token_max").upper == 2.0  # type: ignore[union-attr]
    assert uniform_bound(model[0], "linf") is None
    assert lipschitz(stabilize(model, 1.0)).upper <= 1.0
    plain = LeakyCell(3, 8)
    assert uniform_bound(Recurrence(plain), "l2") is None
    assert lipschitz(Recurrence(plain, length=1)).upper < lipschitz(Recurrence(plain, length=4)).upper
    assert lipschitz(Recurrence(plain, length=4)).upper < lipschitz(Recurrence(plain)).upper
    assert lipschitz(Recurrence(plain)).upper == sequence_gain(plain, "l2").upper
    both = Concat(Recurrence(cell), Recurrence(cell, reverse=True), dim=-1)
    assert lipschitz(both).upper == pytest.approx(math.sqrt(2) * lipschitz(model[0]).upper)
    assert both(torch.randn(2, 5, 3)).shape == (2, 5, 16)


def test_the_gain_of_a_length_is_the_sum_of_the_powers() -> None:
    for a in (0.0, 0.5, 0.99, 1.0, 1.5):
        for length in (1, 2, 3, 10, 61):
            exact = sum(a**k for k in range(length))
            assert CellBound(Bound.point(a), Bound.point(1.0)).gain(length).upper == pytest.approx(exact, rel=1e-12)
    limited = CellBound(Bound.point(0.9), Bound.point(1.0), Bound.point(3.0), peak=Bound.point(2.0))
    assert limited.gain().upper == 6.0
    assert limited.gain(1).upper == 3.0
    assert CellBound(Bound.point(0.9), Bound.point(1.0), peak=Bound.estimate(2.0)).gain().proved is False
    assert CellBound(Bound.point(1.0), Bound.point(1.0)).gain().upper == math.inf


def test_other_cells_run_and_need_a_rule() -> None:
    cell = nn.GRUCell(2, 3)
    x = torch.randn(2, 4, 2)
    torch.testing.assert_close(Recurrence(cell)(x)[0], torch.stack(by_hand(cell, x[0], torch.zeros(3))))

    class Constant(nn.Module):
        hidden_size = 2

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return 0.5 * h + x

    with pytest.raises(UncertifiableError, match="no rule is known for one step of Constant"):
        lipschitz(nn.Sequential(Recurrence(Constant())))
    cell_rule.register(Constant, lambda cell, norm: CellBound(Bound.point(0.5), Bound.point(1.0)))
    assert lipschitz(Recurrence(Constant())).upper == 2.0


# ---------------------------------------------------------------------------------------------------------------- mechanics


def test_copies_and_states_keep_the_map() -> None:
    layer = Recurrence(DiagonalMetricCell(2, 3), learn_initial=True)
    x = torch.randn(2, 3, 2)
    fresh = Recurrence(DiagonalMetricCell(2, 3), learn_initial=True)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        torch.testing.assert_close(other(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (2, 3, 3)
    assert "batch_first=True" in str(layer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["antisymmetric", "contracting weighted", "diagonal metric", "leaky l2", "leaky linf"])
def test_every_cell_compiles_exports_and_runs_in_half_precision(name: str) -> None:
    model = nn.Sequential(Recurrence(CELLS[name](2, 4, memory=5, gain=1.0)), LastStep(), nn.Linear(4, 2)).float()
    x = torch.randn(3, 3, 2, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:2]), model(x[:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).isfinite().all()
        inside = model[0].cell.prepared()  # type: ignore[union-attr]
    for a, b in zip(inside, model[0].cell.prepared(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # autocast does not lower their precision
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Recurrence(nn.LSTMCell(2, 3)), TypeError, "one state tensor"),
        (lambda: Recurrence(3), TypeError, "got int"),
        (lambda: Recurrence(nn.Linear(2, 3)), TypeError, "hidden_size"),
        (lambda: Recurrence(LeakyCell(2, 3), length=0), ValueError, "length must be an integer"),
        (
            lambda: Recurrence(LeakyCell(2, 3), length=2)(torch.ones(1, 3, 2)),
            ValueError,
            "at most length=2 steps, got 3",
        ),
        (lambda: Recurrence(LeakyCell(2, 3))(torch.ones(2)), ValueError, "shape .batch, steps, features"),
        (lambda: Recurrence(LeakyCell(2, 3))(torch.ones(4, 5, 2), torch.ones(1, 3)), ValueError, "initial state must"),
        (
            lambda: Recurrence(LeakyCell(2, 3))(torch.ones(4, 5, 2), lengths=torch.ones(1, dtype=torch.long)),
            ValueError,
            r"lengths must have the shape of the batch, \(4,\), got \(1,\)",
        ),
        (
            lambda: Recurrence(LeakyCell(2, 3))(
                pack_padded_sequence(torch.ones(1, 5, 2), torch.tensor([5]), batch_first=True),
                lengths=torch.tensor([5]),
            ),
            ValueError,
            "lengths in itself",
        ),
        (lambda: lipschitz(Recurrence(LeakyCell(2, 3), return_state=True)), UncertifiableError, "returns a pair"),
        (lambda: MeanOverTime(0), ValueError, "shortest must be"),
        (lambda: MeanOverTime(3)(torch.ones(1, 2, 2)), ValueError, "at least 3 steps, got 2"),
        (lambda: LastStep()(torch.ones(1, 0, 2)), ValueError, "at least one step"),
        (lambda: LastStep()(torch.ones(2)), ValueError, "LastStep needs shape"),
    ],
)
def test_wrong_arguments_are_refused(run: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()  # type: ignore[operator]


def test_a_learned_start_outside_of_the_states_of_a_gated_cell_has_no_bound() -> None:
    """The constants of torch's gated cells hold where runs from zero stay."""
    cell = contracting(nn.GRUCell(2, 4), 0.95, input_bound=1.0)
    layer = Recurrence(cell, learn_initial=True)
    assert lipschitz(layer, "linf").upper < math.inf
    assert layer.initial is not None
    for start in (20.0, math.nan):
        nn.init.constant_(layer.initial, start)
        with pytest.raises(UncertifiableError, match="learned initial state of a Recurrence has entries up to"):
            lipschitz(layer, "linf")
    plain = Recurrence(contracting(nn.RNNCell(2, 4), 0.9), learn_initial=True)
    assert plain.initial is not None
    nn.init.constant_(plain.initial, 20.0)
    assert lipschitz(plain).upper < math.inf  # its constants hold everywhere


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_pads_a_sequence_may_be_anything(batch_first: bool) -> None:
    layer = Recurrence(LeakyCell(2, 3), batch_first=batch_first)
    lengths = torch.tensor([2, 4])
    x = torch.randn(2, 4, 2)
    bad = x.clone()
    bad[0, 2:] = math.nan
    outputs = []
    for v in (x, bad):
        layer.zero_grad()
        out = layer(v if batch_first else v.transpose(0, 1), lengths=lengths)
        out.sum().backward()
        outputs.append((out.detach(), [p.grad.clone() for p in layer.parameters() if p.grad is not None]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
