"""A training of a few entries has the derivative of its steps, by differences, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stableopt as so
from stableopt.constraints import L1
from stableopt.lyapunov.profile.studies.slices import Slice
from stableopt.optim import rule_for


def quartic() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.tensor([[1.0, -0.5], [0.3, 2.0]])), nn.Parameter(torch.tensor(0.7))


@pytest.mark.parametrize("entries", [1, 3, 5, 50])
def test_the_derivative_is_that_of_the_entries_alone(entries: int) -> None:
    w, b = quartic()

    def loss() -> torch.Tensor:
        return (w.pow(4).sum() + (w.sum() * b).sin()) / 4

    optimizer = torch.optim.SGD([w, b], lr=0.1)
    rule = rule_for(optimizer)
    assert rule is not None
    before = w.detach().clone(), b.detach().clone()
    with Slice(rule, loss, optimizer, entries, 0) as system:
        count = min(entries, 5)
        assert (system.entries, system.dimension) == (count, count)
        A, H, _ = system.step(move=True)
        full = torch.autograd.functional.hessian(
            lambda x: (x[:4].pow(4).sum() + (x[:4].sum() * x[4]).sin()) / 4,
            torch.cat([before[0].flatten(), before[1][None]]),
        )
        moved = torch.cat([(w.detach() != before[0]).flatten(), (b.detach() != before[1])[None]])
        assert int(moved.sum()) == count
        picked = full[moved][:, moved]
        assert torch.from_numpy(H).allclose(picked, atol=1e-12)
        assert torch.from_numpy(A).allclose(torch.eye(count, dtype=torch.float64) - 0.1 * picked, atol=1e-12)
    assert torch.equal(w.detach(), before[0])
    assert torch.equal(b.detach(), before[1])


def test_what_cannot_move_is_left_out() -> None:
    w, b = quartic()
    frozen, unused = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    optimizer = so.optim.SGD([{"params": [w], "prox": L1(0.1)}, {"params": [b, frozen, unused]}], lr=0.1)
    rule = rule_for(optimizer)
    assert rule is not None
    system = Slice(rule, lambda: w.square().sum() * b, optimizer, 8, 0)
    assert [part.parameter is b for part in system.parts] == [True]
    assert not Slice(
        rule,
        lambda: unused.sum() * 0.0 + w.square().sum(),
        so.optim.SGD([{"params": [w], "prox": L1(0.1)}], lr=0.1),
        8,
        0,
    ).parts
