"""Laws of the recurrent cells: each contracts in its norm whatever its parameters, the bound is attained, and cannot be passed."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    AntisymmetricCell,
    ContractingCell,
    DiagonalMetricCell,
    LastStep,
    LeakyCell,
    Recurrence,
    RecurrentCell,
    cell_bound,
    lipschitz,
)
from tests.nn.recurrent.cells import CELLS, between, metric, random_parameters, step_jacobians
from tests.nn.training import digits

EPS = torch.finfo(torch.float64).eps
ACTIVATIONS = ["tanh", "relu", "leaky_relu", "softplus", "hardtanh"]


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(CELLS)), inputs=st.integers(1, 4), hidden=st.integers(1, 5), rate=st.sampled_from([0.95, 0.999]),
    activation=st.sampled_from(ACTIVATIONS), log_scale=st.integers(-3, 3), rank_one=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_step_never_exceeds_its_bound_nor_its_cap(
    name: str, inputs: int, hidden: int, rate: float, activation: str, log_scale: int, rank_one: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cell = CELLS[name](inputs, hidden, rate=rate, activation=activation, memory=8, gain=2.0 if seed % 2 else None)
    random_parameters(cell, log_scale, rank_one=rank_one)
    d = metric(cell)
    x, h = torch.randn(inputs) / 10.0**log_scale, torch.randn(hidden)
    Jx, Jh = step_jacobians(cell, x, h)
    for norm in ("l2", "linf", "l1"):
        bound = cell_bound(cell, norm)
        assert bound.state.upper <= rate  # the cap, not 1 + eps of it
        assert bound.contracts
        assert between(d[:, None] * Jh / d, cell.norm, cell.norm) <= bound.state.upper * (1 + 64 * EPS)
        assert between(d[:, None] * Jx, norm, cell.norm) <= bound.input.upper * (1 + 64 * EPS) + 1e-300
        assert between(torch.diag(1 / d), cell.norm, norm) <= bound.output.upper * (1 + 64 * EPS)
    if cell.gain is not None:
        assert lipschitz(Recurrence(cell), cell.norm).upper <= cell.gain


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(CELLS)), hidden=st.integers(1, 4), steps=st.integers(1, 6), seed=st.integers(0, 99),
    norm=st.sampled_from(["l2", "linf", "l1"]), declared=st.booleans(),
)  # fmt: skip
def test_the_jacobian_of_a_sequence_never_exceeds_the_gain(
    name: str, hidden: int, steps: int, seed: int, norm: str, declared: bool
) -> None:
    torch.manual_seed(seed)
    cell = random_parameters(CELLS[name](2, hidden, rate=0.95, memory=4), 0.0)
    layer = Recurrence(cell, length=steps if declared else None)
    x = torch.randn(1, steps, 2)
    J = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), x).reshape(steps * hidden, steps * 2)
    assert between(J, norm, norm) <= lipschitz(layer, norm).upper * (1 + 64 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(CELLS))
def test_rounding_never_lifts_a_cell_over_its_cap_or_its_gain(name: str, dtype: torch.dtype) -> None:
    # the smallest step of the leaky cell is 0.35, which bfloat16 rounds down
    for log_scale, hidden in ((-3.0, 5), (0.5, 12), (3.5, 1), (3.5, 12)):
        cell = random_parameters(CELLS[name](3, hidden, rate=0.965, gain=0.7, memory=4), log_scale).to(dtype)
        assert cell_bound(cell, cell.norm).state.upper <= 0.965
        assert lipschitz(Recurrence(cell), cell.norm).upper <= 0.7
        assert cell(torch.randn(2, 3, dtype=dtype)).dtype == dtype
    for raw in (-60.0, 60.0):  # steps and dampings at the ends of their ranges
        for p in cell.parameters():
            p.data.fill_(raw) if p.ndim == 1 else None
        assert cell_bound(cell, cell.norm).state.upper <= 0.965
        assert lipschitz(Recurrence(cell), cell.norm).upper <= 0.7


# ---------------------------------------------------------------------------------------------------------------- witnesses


def test_the_bound_of_the_contracting_cell_is_attained_where_all_units_are_active() -> None:
    cell = random_parameters(ContractingCell(2, 5, activation="relu"), 0.0)
    with torch.no_grad():
        cell.bias.fill_(1e3)
        cell.weight.diagonal().fill_(-40.0)  # the row sums reach the limit
        cell.raw_step.fill_(40.0)  # and the steps theirs
    _, A, step = (t.detach() for t in cell.prepared())
    _, Jh = step_jacobians(cell, torch.zeros(2), torch.zeros(5))
    assert float((A.abs().sum(1) - A.diagonal().abs() + A.diagonal() - 0.9).abs().max()) < 1e-12
    torch.testing.assert_close(step, 1 / (1 - A.diagonal().clamp_max(0)))
    assert between(Jh, "linf", "linf") == pytest.approx(cell_bound(cell, "linf").state.upper, rel=1e-12)
    assert between(Jh, "linf", "linf") == pytest.approx(1 - float(step.min()) * 0.1, rel=1e-9)


def test_past_the_limit_of_its_step_the_contracting_cell_breaks_its_law() -> None:
    cell = random_parameters(ContractingCell(1, 6, activation="relu"), 0.5)
    with torch.no_grad():
        cell.bias.fill_(1e3)
        cell.weight.diagonal().fill_(-40.0)
    A = cell.matrix().detach()
    for over, broken in ((0.999, False), (1.001, True), (1.2, True)):
        cell.step_sizes = lambda A, over=over: over / (1 - A.diagonal().clamp_max(0))  # type: ignore[method-assign]
        _, Jh = step_jacobians(cell, torch.zeros(1), torch.zeros(6))
        law = 1 - cell.step_sizes(A) * (1 - 0.9)
        rows = Jh.abs().sum(1)
        assert bool((rows > law + 1e-6).any()) is broken
        with pytest.raises(UncertifiableError, match="overrides step_sizes"):
            cell_bound(cell, "linf")


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_bounds_of_the_leaky_cell_are_attained(norm: str) -> None:
    cell = LeakyCell(3, 3, norm=norm, radius=0.5, rate=0.9, memory=4, activation="relu")
    with torch.no_grad():
        cell.weight.copy_(torch.eye(3))
        cell.weight_input.copy_(2.0 * torch.eye(3))
        cell.bias.fill_(1e3)
        cell.raw_step.fill_(-40.0)
    bound = cell_bound(cell, norm)
    Jx, Jh = step_jacobians(cell, torch.zeros(3), torch.zeros(3))
    # Gram iteration overestimates the norm of the identity by 3^(1/128)
    assert between(Jh, norm, norm) == pytest.approx(bound.state.upper, rel=1e-12)
    assert 0.899 < bound.state.upper <= 0.9
    assert between(Jx, norm, norm) == pytest.approx(bound.input.upper, rel=1e-12)
    x = torch.zeros(1, 400, 3)
    J = torch.autograd.functional.jacobian(lambda c: Recurrence(cell)(x + c)[0, -1], torch.zeros(3))
    assert between(J, norm, norm) == pytest.approx(
        lipschitz(Recurrence(cell), norm).upper, rel=1e-9
    )  # a constant input
    assert lipschitz(Recurrence(cell), norm).upper == pytest.approx(4.0, rel=2e-2)  # |U| / (1 - rho)


def test_units_of_unequal_speed_cost_nothing_in_the_maximum_norm() -> None:
    """Factor and input constant belong to different units there; the gain is that of the worst unit."""
    cell = LeakyCell(1, 2, norm="linf", radius=0.5, rate=0.99, activation="relu")
    with torch.no_grad():
        cell.weight.copy_(torch.eye(2))
        cell.weight_input.fill_(1.0)
        cell.raw_step.copy_(torch.tensor([-40.0, 40.0]))
    bound = cell_bound(cell, "linf")
    assert (bound.input / (1.0 - bound.state)).upper == pytest.approx(100.0, rel=1e-6)
    assert lipschitz(Recurrence(cell), "linf").upper == pytest.approx(2.0, rel=1e-9)
    assert cell_bound(cell, "l2").peak is None


def test_the_bounds_of_the_diagonal_metric_cell_are_attained() -> None:
    cell = random_parameters(DiagonalMetricCell(2, 4, rate=0.9, memory=4, activation="relu"), 0.0)
    with torch.no_grad():
        cell.bias.fill_(1e3)
        cell.weight.mul_(0.5 / torch.linalg.matrix_norm(cell.weight, 2))  # below the cap: used as it is
    d = metric(cell)
    Jx, Jh = step_jacobians(cell, torch.zeros(2), torch.zeros(4))
    torch.testing.assert_close(d[:, None] * Jh / d, cell.weight)
    bound = cell_bound(cell, "l2")
    assert bound.state.upper == pytest.approx(0.5, rel=1e-12)
    assert between(d[:, None] * Jx, "l2", "l2") == pytest.approx(bound.input.upper, rel=1e-12)
    assert bound.output.upper == pytest.approx(float((1 / d).max()), rel=1e-12)
    with torch.no_grad():
        cell.weight.mul_(30.0)
    assert (
        0.9 * 4 ** -(2.0**-11) <= cell_bound(cell, "l2").state.upper <= 0.9
    )  # above it: at the cap up to the Gram iteration


def test_the_bounds_of_the_antisymmetric_cell_are_attained() -> None:
    cell = random_parameters(AntisymmetricCell(3, 4, rate=0.9, memory=4, activation="relu"), 0.0)
    with torch.no_grad():
        cell.bias.fill_(-1e3)  # all units off: the isometry and the damping are left
    bound = cell_bound(cell)
    _, Jh = step_jacobians(cell, torch.zeros(3), torch.zeros(4))
    assert between(Jh, "l2", "l2") == pytest.approx(bound.state.upper, rel=1e-9)
    torch.testing.assert_close(Jh @ Jh.mT, float(cell.damping().detach()) ** 2 * torch.eye(4))
    with torch.no_grad():
        cell.bias.fill_(1e3)
        cell.weight.copy_(2.0 * torch.eye(4))
        cell.weight_input.copy_(torch.eye(4)[:, :3])
    Jx, _ = step_jacobians(cell, torch.zeros(3), torch.zeros(4))
    assert between(Jx, "l2", "l2") == pytest.approx(cell_bound(cell).input.upper, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_full_step_of_the_antisymmetric_cell_stays_at_its_limit(dtype: torch.dtype) -> None:
    """Gram iteration is exact for rank one: only the slack is left between the step and its limit."""
    for size in (1, 2, 8):
        cell = random_parameters(AntisymmetricCell(2, size, rate=0.95), 0.0, rank_one=True).to(dtype)
        with torch.no_grad():
            cell.raw_step.fill_(60.0)
            cell.raw_damping.fill_(60.0)
        limit = 2 / float(torch.linalg.matrix_norm(cell.weight.detach().double(), 2)) ** 2
        assert 0.99 * limit < float(cell.step_size().detach()) <= limit
        assert cell_bound(cell).state.upper <= 0.95


def test_past_the_limit_of_its_step_the_antisymmetric_cell_breaks_its_law() -> None:
    cell = AntisymmetricCell(2, 3, activation="relu")
    torch.nn.init.constant_(cell.bias, 1e3)
    norm = float(torch.linalg.matrix_norm(cell.weight.detach(), 2))
    for over, broken in ((1.0, False), (1.001, True)):
        tau = torch.tensor(over * 2 / norm**2)
        cell._step_and_norm = lambda tau=tau: (tau, torch.tensor(norm))  # type: ignore[method-assign]
        _, Jh = step_jacobians(cell, torch.zeros(2), torch.zeros(3))
        assert (between(Jh, "l2", "l2") > float(cell.damping().detach()) * (1 + 1e-4)) is broken


# ------------------------------------------------------------------------------------------------------- memory and learning


@pytest.mark.parametrize("name", sorted(CELLS))
@pytest.mark.parametrize("memory", [10, 100])
def test_a_new_cell_remembers_for_as_many_steps_as_asked(name: str, memory: int) -> None:
    cell = CELLS[name](2, 16, memory=memory, rate=0.999)
    bound = cell_bound(cell, cell.norm)
    assert 0.5 / memory <= 1 - bound.state.upper <= 2.5 / memory or name == "contracting inhibited"
    h = torch.randn(2, 16)
    for _ in range(memory // 2):
        h = cell(torch.zeros(2, 2), h).detach()
    assert float(h.abs().max()) > 1e-3


@pytest.mark.parametrize("name", sorted(CELLS))
def test_every_parameter_learns_and_the_constant_holds_after_every_step(name: str) -> None:
    cell = CELLS[name](2, 6, rate=0.95, memory=5, gain=1.0)
    layer = Recurrence(cell)
    with torch.no_grad():
        cell.weight_input.mul_(5.0)  # the limit of the gain is active
    opt = torch.optim.Adam(cell.parameters(), lr=0.3)
    x = torch.randn(16, 7, 2)
    target = x.cumsum(1).sum(-1, keepdim=True)
    for _ in range(8):
        opt.zero_grad()
        F.mse_loss(layer(x)[..., :1], target).backward()
        for key, p in cell.named_parameters():
            assert p.grad is not None, key
            assert bool(p.grad.isfinite().all() & (p.grad != 0).any()), key
        opt.step()
        assert lipschitz(layer, cell.norm).upper <= 1.0
        assert cell_bound(cell, cell.norm).state.upper <= 0.95


@pytest.mark.parametrize("name", sorted(CELLS))
def test_the_derivatives_are_right(name: str) -> None:
    cell = CELLS[name](2, 3, rate=0.95, memory=5, gain=0.3)
    parameters = dict(cell.named_parameters())
    x, h = torch.randn(2, 2), torch.randn(2, 3)

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(cell, dict(zip(parameters, values, strict=True)), (x, h))

    values = tuple(p.detach() + 0.1 * torch.randn_like(p) for p in parameters.values())
    assert torch.autograd.gradcheck(f, tuple(v.requires_grad_() for v in values), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("diagonal metric", 0.9), ("leaky l2", 0.8)])
def test_digits_read_row_by_row_are_learned_with_a_constant_that_never_breaks(name: str, least: float) -> None:
    torch.set_default_dtype(torch.float32)
    x, y, x_test, y_test = digits()
    cell = CELLS[name](8, 64, memory=8, rate=0.95)
    model = torch.nn.Sequential(Recurrence(cell), LastStep(), torch.nn.Linear(64, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(8):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            F.cross_entropy(model(x[batch].reshape(-1, 8, 8)), y[batch]).backward()
            opt.step()
            assert cell_bound(cell, cell.norm).state.upper <= 0.95
    with torch.no_grad():
        accuracy = float((model(x_test.reshape(-1, 8, 8)).argmax(1) == y_test).double().mean())
    assert accuracy >= least


# ---------------------------------------------------------------------------------------------------------------- mechanics


@pytest.mark.parametrize("name", sorted(CELLS))
def test_copies_states_and_transforms_keep_the_map(name: str) -> None:
    cell = random_parameters(CELLS[name](3, 4, memory=5), 0.0)
    x, h = torch.randn(5, 3), torch.randn(5, 4)
    fresh = CELLS[name](3, 4, memory=5)
    fresh.load_state_dict(cell.state_dict())
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), fresh):
        torch.testing.assert_close(other(x, h), cell(x, h), rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(lambda x, h: cell(x, h))(x, h), cell(x, h))
    torch.testing.assert_close(cell(x), cell(x, torch.zeros(5, 4)))
    assert copy.deepcopy(cell).to("meta")(x.to("meta")).shape == (5, 4)
    with torch.device("meta"):
        assert CELLS[name](3, 4, memory=5).weight_input.is_meta
    assert "3, 4, activation='tanh'" in str(cell)
    assert dict(cell.named_buffers()) == {}
    assert all(p.ndim >= 1 and p.is_contiguous() for p in cell.parameters())


@pytest.mark.parametrize("name", sorted(CELLS))
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    for key, _ in CELLS[name](2, 3).named_parameters():
        for value in (math.nan, math.inf):
            cell = CELLS[name](2, 3)
            with torch.no_grad():
                cell.get_parameter(key).view(-1)[0] = value
            with pytest.raises(ValueError, match=f"parameter {key} has NaN"):
                cell_bound(cell)


@pytest.mark.parametrize("name", sorted(CELLS))
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size must be an integer >= 1"),
        ({"hidden_size": 2.0}, "hidden_size must be an integer"),
        ({"activation": "gelu"}, "slopes down to -0.129"),
        ({"gain": 0.0}, "gain must be finite and > 0"),
        ({"gain": math.nan}, "gain must be finite"),
        ({"rate": 1.0}, r"must lie in \(0, 1\)"),
        ({"rate": math.nan}, r"must lie in \(0, 1\)"),
        ({"memory": 0}, "memory must be an integer"),
        ({"memory": 100}, "lower the memory or raise the rate"),
    ],
)
def test_wrong_arguments_are_refused(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CELLS[name](**{"input_size": 2, "hidden_size": 3, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContractingCell(2, 3, log_norm=1.0), "log_norm is the limit"),
        (lambda: ContractingCell(2, 3, log_norm=math.nan), "log_norm is the limit"),
        (lambda: ContractingCell(2, 3, log_norm=0.9, rate=0.9, memory=4), "rate must be at least 0.1"),
        (lambda: LeakyCell(2, 3, norm="l1"), "norm must be 'l2' or 'linf'"),
        (lambda: LeakyCell(2, 3, radius=1.0), "radius is the cap"),
        (lambda: LeakyCell(2, 3, radius=0.9, rate=0.9, memory=4), "rate must be at least 0.1"),
        (lambda: AntisymmetricCell(2, 3, step=1.0), "step is a fraction"),
    ],
)
def test_wrong_arguments_of_one_cell_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_subclass_that_changes_the_step_has_no_bound() -> None:
    class Other(LeakyCell):
        def advance(self, state: torch.Tensor, drive: torch.Tensor, prepared: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return 2 * super().advance(state, drive, prepared)

    with pytest.raises(UncertifiableError, match="overrides advance"):
        lipschitz(Recurrence(Other(2, 3)))
    assert isinstance(Other(2, 3), RecurrentCell)


def test_a_tiny_step_has_finite_gradients_under_a_limit_of_the_gain() -> None:
    cell = AntisymmetricCell(2, 3, gain=1.0).float()
    torch.nn.init.constant_(cell.raw_step, -60.0)
    cell(torch.ones(1, 2, dtype=torch.float32)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in cell.parameters())
