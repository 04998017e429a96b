"""The sum of all exponents is what theory says, for every optimizer of which that is known; and what is wrong does not pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import stableopt as so
from stableopt.constraints import L1
from stableopt.lyapunov.doctor import diagnose
from stableopt.lyapunov.profile.studies import slices
from stableopt.lyapunov.profile.studies.determinants import DeterminantFactors, log_determinant
from stableopt.lyapunov.profile.studies.identities import _balanced, _units, check_identities
from stableopt.lyapunov.profile.tangents.push import Pushed, push
from tests.optim.test_sharpness import everything, same

O = torch.optim
ln = math.log


def net(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(12, 3, dtype=dtype), torch.randint(3, (12,))
    return model, lambda: F.cross_entropy(model(x), y)


def train(loss: Callable[[], Tensor], optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def weights(p: Any) -> list[nn.Parameter]:
    return [w for w in p if w.ndim == 2]


DECAYED = ln(1 - 0.1 * 0.5)
CLOSED: dict[str, tuple[Callable[[Any], Optimizer], float]] = {  # optimizer, sum of its exponents per entry
    "momentum": (lambda p: O.SGD(p, lr=0.1, momentum=0.9), ln(0.9)),
    "momentum, decay": (lambda p: O.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.5), ln(0.9)),
    "maximize": (lambda p: O.SGD(p, lr=0.1, momentum=0.9, maximize=True), ln(0.9)),
    "Adam": (lambda p: O.Adam(p, lr=0.1), ln(0.9 * 0.999)),
    "Adam, coupled decay": (lambda p: O.Adam(p, lr=0.1, betas=(0.5, 0.8), weight_decay=0.5), ln(0.5 * 0.8)),
    "AdamW": (lambda p: O.AdamW(p, lr=0.1, weight_decay=0.5), ln(0.9 * 0.999) + DECAYED),
    "RAdam": (lambda p: O.RAdam(p, lr=0.1), ln(0.9 * 0.999)),
    "RMSprop, momentum": (lambda p: O.RMSprop(p, lr=0.01, momentum=0.5), ln(0.99 * 0.5)),
    "RMSprop, centered": (lambda p: O.RMSprop(p, lr=0.01, momentum=0.5, centered=True), ln(0.99**2 * 0.5)),
    "Lion": (lambda p: so.optim.Lion(p, 1e-2, weight_decay=0.5), ln(0.99) + ln(1 - 1e-2 * 0.5)),
    "Muon": (
        lambda p: O.Muon(weights(p), lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=False), ln(0.9) + DECAYED
    ),
    "ours": (lambda p: so.optim.AdamW(p, lr=0.1, weight_decay=0.5), ln(0.9 * 0.999) + DECAYED),
}  # fmt: skip


@pytest.mark.parametrize("warm", [0, 4])
@pytest.mark.parametrize("case", CLOSED)
def test_the_sum_of_all_exponents_is_the_closed_form(case: str, warm: int) -> None:
    make, each = CLOSED[case]
    model, loss = net()
    optimizer = make(model.parameters())
    train(loss, optimizer, warm)
    found = check_identities(model, loss, optimizer, steps=3)
    assert found.holds
    assert found.expected == pytest.approx(3 * 8 * each, rel=1e-12)
    assert found.error <= 1e-10
    assert found.tolerance < 1e-9
    assert 3 * math.fsum(found.exponents) == pytest.approx(found.measured, abs=1e-10)
    assert "holds to" in str(found)


HESSIAN: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: O.SGD(p, lr=0.5),
    "SGD, decay": lambda p: O.SGD(p, lr=0.5, weight_decay=0.5),
    "Nesterov": lambda p: O.SGD(p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.5),
    "NAdam": lambda p: O.NAdam(p, lr=0.1, weight_decay=0.5),
    "NAdam, decoupled": lambda p: O.NAdam(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True),
    "RMSprop": lambda p: O.RMSprop(p, lr=0.1, weight_decay=0.5),
    "RMSprop, centered": lambda p: O.RMSprop(p, lr=0.1, centered=True, maximize=True),
}


@pytest.mark.parametrize("case", HESSIAN)
def test_where_a_step_sees_the_gradient_directly_the_hessian_enters(case: str) -> None:
    model, loss = net()
    optimizer = HESSIAN[case](model.parameters())
    train(loss, optimizer, 2)
    found = check_identities(model, loss, optimizer, steps=2)
    assert found.holds
    assert found.error <= 1e-10
    assert "ln|" in found.name


def test_gradient_descent_has_the_exponents_of_its_hessian() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    model = nn.Module()
    model.w = w
    found = check_identities(model, lambda: 0.5 * (w * torch.tensor([1.0, 30.0])) @ w, O.SGD([w], lr=0.1), steps=4)
    assert found.expected == pytest.approx(4 * (ln(0.9) + ln(2.0)), rel=1e-14)
    assert found.exponents == pytest.approx((ln(2.0), ln(0.9)), rel=1e-13)


@pytest.mark.parametrize(("name", "make"), [(n, CLOSED[n][0]) for n in ("momentum", "Adam", "AdamW")])
def test_all_exponents_of_a_whole_net_sum_up_to_the_identity(name: str, make: Callable[[Any], Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x, y = torch.randn(8, 2), torch.randn(8, 1)
    optimizer = make(model.parameters())
    count, steps = sum(p.numel() for p in model.parameters()), 12
    found = check_identities(model, lambda: F.mse_loss(model(x), y), optimizer, entries=1000, steps=steps)
    assert found.entries == count
    assert abs(found.error) <= 1e-10 * steps
    assert len(found.exponents) == count * (2 if name == "momentum" else 3)
    assert math.fsum(found.exponents) == pytest.approx(count * CLOSED[name][1], abs=1e-10)


def test_the_check_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
    x, y = torch.randn(12, 3), torch.randint(3, (12,))
    optimizer = O.AdamW(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    for warm in (0, 2):
        train(loss, optimizer, warm)
        graph = loss()  # somebody's graph stays good
        before, versions = everything(model, optimizer), [p._version for p in model.parameters()]
        with torch.no_grad():
            assert check_identities(model, loss, optimizer, steps=3).holds
        assert same(before, everything(model, optimizer))
        assert versions == [p._version for p in model.parameters()]
        graph.backward()


def test_an_error_leaves_the_entries_as_they_were() -> None:
    model, loss = net()
    calls = []

    def fails() -> Tensor:
        calls.append(1)
        if len(calls) > 6:
            raise ZeroDivisionError
        return loss()

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        check_identities(model, fails, O.Adam(model.parameters(), lr=0.5), steps=8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_derivative_that_is_wrong_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = net()

    def forgets_momentum(*args: Any) -> Pushed:  # as torch's buffer does, which is detached
        right, d_state = push(*args), args[-1]
        without = push(*args[:-1], {name: torch.zeros_like(d) for name, d in d_state.items()})
        return replace(right, d_parameter=without.d_parameter)

    def loses_a_millionth(*args: Any) -> Pushed:
        right = push(*args)
        return replace(right, d_state=right.d_state | {"exp_avg_sq": (1 - 1e-6) * right.d_state["exp_avg_sq"]})

    for optimizer in (O.SGD(model.parameters(), lr=0.1, momentum=0.9), O.Adam(model.parameters(), lr=0.1)):
        assert check_identities(model, loss, optimizer).holds
        with monkeypatch.context() as patch:
            patch.setattr(slices, "push", forgets_momentum)
            found = check_identities(model, loss, optimizer)
        assert found.holds is False
        assert "FAILS" in str(found)
    with monkeypatch.context() as patch:
        patch.setattr(slices, "push", loses_a_millionth)
        found = check_identities(model, loss, optimizer)
    assert found.holds is False
    assert found.error == pytest.approx(8e-6, rel=1e-3)


def test_a_step_that_takes_a_direction_to_zero_says_nothing() -> None:
    """lr times decay is 1: the closed form is minus infinity, what is computed some power of the rounding."""
    model, loss = net()
    found = check_identities(model, loss, O.AdamW(model.parameters(), lr=0.1, weight_decay=10.0))
    assert found.holds is None
    assert found.expected == -math.inf
    assert "takes a direction to zero" in found.reason
    assert "not checked" in str(found)
    near = check_identities(model, loss, O.AdamW(model.parameters(), lr=0.1, weight_decay=10.0 * (1 - 1e-6)))
    assert near.holds
    w = nn.Parameter(torch.ones(1))
    model.w = w
    exact = check_identities(model, lambda: 0.5 * w.square().sum(), O.SGD([w], lr=1.0))
    assert exact.holds
    assert exact.measured == -math.inf


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("case", ["momentum", "AdamW", "ours"])
def test_a_parameter_that_is_one_number_moves_too(case: str, warm: int) -> None:
    make, each = CLOSED[case]
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.3, -1.0]))

    def loss() -> Tensor:
        return (model.a * model.b).sin().square().sum()

    optimizer = make(model.parameters())
    train(loss, optimizer, warm)
    found = check_identities(model, loss, optimizer, steps=2)
    assert found.entries == 3
    assert found.holds
    assert found.expected == pytest.approx(2 * 3 * each, rel=1e-12)


def test_single_precision_holds_to_what_is_computed_for_it() -> None:
    for make, each in (CLOSED["momentum"], CLOSED["AdamW"]):
        model, loss = net(torch.float32)
        optimizer = make(model.parameters())
        train(loss, optimizer, 3)
        found = check_identities(model, loss, optimizer, steps=3)
        assert found.holds
        assert found.expected == pytest.approx(24 * each)
        assert 1e-9 < found.error <= found.tolerance < 1e-2


def test_maxima_that_are_replaced_make_the_step_singular() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    model = nn.Module()
    model.w = w
    scale = [1.0]
    optimizer = O.Adam([w], lr=0.1, amsgrad=True)

    def loss() -> Tensor:
        return scale[0] * w.square().sum()

    train(loss, optimizer, 1)
    growing = check_identities(model, loss, optimizer)
    assert (growing.expected, growing.measured, growing.error, growing.holds) == (-math.inf, -math.inf, 0.0, True)
    scale[0] = 1e-3  # now the maxima stay
    kept = check_identities(model, loss, optimizer)
    assert kept.expected == pytest.approx(2 * ln(0.9 * 0.999), rel=1e-12)
    assert kept.holds
    json.dumps(growing.as_dict(), allow_nan=False)


def test_what_has_no_identity_says_so() -> None:
    model, loss = net()
    cases: list[tuple[Optimizer, str]] = [
        (O.Rprop(model.parameters()), "nothing is known about its update"),
        (O.Muon(weights(model.parameters())), "no identity is known for Muon with Nesterov"),
        (so.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, prox=L1(0.1)), "each parameter has a prox or a set"),
    ]
    for optimizer, said in cases:
        found = check_identities(model, loss, optimizer)
        assert found.holds is None
        assert said in found.reason
        assert "not checked" in str(found)
    with pytest.raises(ValueError, match="entries and steps must be at least 1"):
        check_identities(model, loss, cases[0][0], entries=0)


def test_parameters_with_a_set_are_left_out_and_groups_have_their_own_numbers() -> None:
    model, loss = net()
    first, *rest = model.parameters()
    optimizer = so.optim.SGD(
        [{"params": [first], "prox": L1(0.1)}, {"params": rest, "momentum": 0.5}], lr=0.1, momentum=0.9
    )
    found = check_identities(model, loss, optimizer, entries=1000)
    assert found.entries == sum(p.numel() for p in rest)
    assert found.expected == pytest.approx(found.entries * ln(0.5), rel=1e-12)
    assert found.holds
    mixed = check_identities(
        model,
        loss,
        O.SGD([{"params": [first], "momentum": 0.9}, {"params": rest, "weight_decay": 0.5}], lr=0.5),
        entries=1000,
    )
    assert mixed.holds
    assert mixed.name == "d ln(beta) and sum ln|1 - lr (lambda + wd)|"


def test_the_determinant_is_that_of_a_matrix_written_down() -> None:
    generator = np.random.default_rng(0)
    H = generator.normal(size=(3, 3))
    H = H + H.T
    kept, direct = np.array([0.9, 1.0, 0.8]), np.array([0.0, 0.3, 0.7])
    part = DeterminantFactors("", np.zeros(3), kept, direct, coupled=0.2)
    value, rough = log_determinant([part], H)
    exact = np.linalg.slogdet(np.diag(kept) - direct[:, None] * (H + 0.2 * np.eye(3)))[1]
    assert value == pytest.approx(exact, abs=1e-13)
    assert rough < 1e-13
    crooked = H + 1e-6 * generator.normal(size=(3, 3))
    value, rough = log_determinant([part], crooked)
    exact = np.linalg.slogdet(np.diag(kept) - direct[:, None] * (crooked + 0.2 * np.eye(3)))[1]
    assert abs(value - exact) <= rough <= 1e-4
    badly = np.array([[1.0, 1e9], [1e-12, 2.0]])
    assert np.linalg.cond(_balanced(badly, _units(badly))) < 10
    assert np.linalg.det(_balanced(badly, _units(badly))) == pytest.approx(2.0 - 1e-3)


def test_the_doctor_runs_it() -> None:
    model, loss = net()
    found = diagnose(model, loss, O.Adam(model.parameters(), lr=0.1))
    assert found.identity is not None
    assert found.identity.holds
    assert "- identity d ln(beta1 beta2) of Adam (8 entries): -0.850888, holds to" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)
    assert diagnose(model, loss).identity is None
