"""One proposed step: what is accepted, and what of it is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box
from stableopt.optim import SGD, AdamW
from stableopt.optim.agree import Alone
from stableopt.optim.proposal import Before, Proposal, coarsest_eps, propose, uphill

EPS = 2.0**-52
PLAIN = Proposal(1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 0.0)


def test_accepted_is_a_decrease_by_what_is_required_up_to_the_tolerance() -> None:
    assert replace(PLAIN, after=1.5).accepted
    assert not replace(PLAIN, after=1.5 + EPS).accepted
    assert replace(PLAIN, after=1.5 + 0.25, tolerance=0.25).accepted
    assert not replace(PLAIN, after=1.5 + 0.25 + EPS, tolerance=0.25).accepted


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["before", "after", "displacement", "required"])
def test_what_is_not_finite_is_not_accepted(bad: float, name: str) -> None:
    proposal = replace(PLAIN, **{name: bad})
    assert not proposal.finite
    assert not proposal.accepted


def at(optimizer: SGD, loss: float) -> Before:
    return Before.of(optimizer, loss, EPS)


def test_a_proposal_moves_the_parameters_and_sums_without_the_loss() -> None:
    w = nn.Parameter(torch.tensor([3.0, 0.0]))
    optimizer = SGD([w], lr=0.5, weight_decay=1.0, armijo=0.25)
    w.grad = torch.tensor([1.0, 0.0])
    proposal = propose(optimizer, at(optimizer, 10.0), 0.5)
    assert w.tolist() == [2.0, 0.0]  # lr 0.25 on gradient 1 + 3
    assert (proposal.before, proposal.after) == (4.5, 2.0)
    assert (proposal.predicted, proposal.required, proposal.displacement) == (4.0, 1.0, 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    judged = proposal.judged(lambda: 11.0)
    assert (judged.before, judged.after) == (14.5, 13.0)
    assert judged.tolerance == 8 * EPS * 14.5
    assert judged.accepted
    assert not proposal.with_loss(13.0).accepted


def test_penalties_count_before_and_after() -> None:
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([-2.0]))
    optimizer = SGD([{"params": [a], "prox": L1(2.0)}, {"params": [b], "constraint": Box(-5.0, 5.0)}], lr=0.5)
    a.grad, b.grad = torch.zeros(1), torch.zeros(1)
    proposal = propose(optimizer, at(optimizer, 0.0), 1.0)
    assert (a.item(), b.item()) == (2.0, -2.0)
    assert (proposal.before, proposal.after) == (6.0, 4.0)
    assert proposal.predicted == 2.0


def test_a_loss_that_is_maximized_counts_negatively() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.5, maximize=True)
    w.grad = torch.ones(1)
    judged = propose(optimizer, at(optimizer, 1.0), 1.0).judged(lambda: 3.0)
    assert w.item() == 1.5
    assert (judged.before, judged.after) == (-1.0, -3.0)


def test_where_the_step_is_not_finite_the_loss_is_not_evaluated() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.5)
    w.grad = torch.tensor([math.nan])

    def forbidden() -> float:
        raise AssertionError

    assert not propose(optimizer, at(optimizer, 1.0), 1.0).judged(forbidden).accepted


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_restart_begins_with_zero_momentum_and_its_energy_too(cls: type) -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    options = {"momentum": 0.9} if cls is SGD else {"weight_decay": 0.0}
    optimizer = cls([w], lr=0.1, **options)
    w.grad = torch.ones(1)
    optimizer.step()
    w.grad = torch.tensor([-1.0])
    before = at(optimizer, 0.0)
    plain = propose(optimizer, before, 1.0)
    assert plain.before > 0.0
    before.snapshot.restore()
    restarted = propose(optimizer, before, 1.0, restart=True)
    assert restarted.before == 0.0
    buffer = optimizer.rule.buffer(optimizer.state[w]).item()
    assert buffer == pytest.approx(-1.0 if cls is SGD else -0.1)


def test_uphill_is_a_step_along_the_gradient() -> None:
    a, b, idle = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.ones(1))
    optimizer = SGD([a, b, idle], lr=0.1, momentum=0.9)
    for gradient, expected in ((1.0, False), (-0.5, True), (-20.0, False)):
        a.grad, b.grad = torch.tensor([gradient]), torch.tensor([2 * gradient])
        before = at(optimizer, 0.0)
        propose(optimizer, before, 1.0)
        assert uphill(optimizer, before) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_uphill_for_other_dtypes(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = SGD([w], lr=0.1)
    w.grad = torch.ones(2, dtype=dtype) * (1j if dtype.is_complex else 1)
    before = at(optimizer, 0.0)
    propose(optimizer, before, 1.0)
    assert not uphill(optimizer, before)
    with torch.no_grad():
        w.add_(w.grad, alpha=3.0)
    assert uphill(optimizer, before)


def test_uphill_of_a_step_without_gradients_is_false() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not uphill(optimizer, at(optimizer, 0.0))


def test_the_coarsest_dtype_rules() -> None:
    a, b = nn.Parameter(torch.ones(1).double()), nn.Parameter(torch.ones(1).bfloat16())
    loss = torch.tensor(1.0, dtype=torch.float32)
    assert coarsest_eps(SGD([a]), 1.0) == 2.0**-52
    assert coarsest_eps(SGD([a]), loss) == 2.0**-23
    assert coarsest_eps(SGD([a, b]), loss) == 2.0**-7
    assert coarsest_eps(SGD([a]), torch.tensor(1)) == 2.0**-52
    assert coarsest_eps(SGD([nn.Parameter(torch.ones(1, dtype=torch.complex64))]), 1.0) == 2.0**-23


def test_alone_nothing_is_averaged() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = SGD([w])
    assert Before.of(optimizer, 3.0, EPS).processes is Alone
    assert Before.of(optimizer, 3.0, EPS).loss == 3.0


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SGD, {"prox": L1(50.0)}),
        (SGD, {"weight_decay": 25.0}),
        (AdamW, {"prox": L1(50.0), "weight_decay": 0.0}),
        (AdamW, {"weight_decay": 1e3}),
    ],
)
@pytest.mark.parametrize(
    ("length", "expected"), [(-1e-3, False), (-0.5, False), (-30.0, False), (1e-3, True), (0.5, True)]
)
def test_uphill_is_meant_of_loss_and_penalty_and_decay_together(
    cls: type, options: dict, length: float, expected: bool
) -> None:
    """Between the minimum of the loss, 2, and that of the whole the loss rises along every good step, however long."""
    w = nn.Parameter(torch.tensor([1.9, 1.9]))
    optimizer = cls([w], lr=1e-9, guard="off", **options)
    w.grad = 25.0 * (w.detach() - 2.0)
    optimizer.step()  # the metric is that of this gradient
    with torch.no_grad():
        w.fill_(1.9)
    before = at(optimizer, 0.0)
    with torch.no_grad():
        w.add_(length)
    assert uphill(optimizer, before) is expected


def test_near_the_optimum_of_a_penalized_loss_a_step_that_is_too_long_becomes_shorter() -> None:
    """It is not its momentum that is wrong."""
    w = nn.Parameter(torch.tensor([1.9]))
    optimizer = SGD([w], lr=0.5, momentum=0.9, prox=L1(50.0), guard="strict")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 25.0 * ((w - 2.0) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert optimizer.last_step.action == "shrunk"
