"""Learning rates are smaller within a step, and what they were after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.policies.rates import Rates


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("new", "after"), [(0.7, 0.7), (0.09, 0.09), (0.05, 0.1), (0.045, 0.09), (0.005, 0.01), (0.0, 0.0)]
)
def test_what_is_set_within_the_step_stays_unless_it_is_made_from_the_scaled_one(
    new: float, after: float, tensor: bool
) -> None:
    lr = torch.tensor(0.1) if tensor else 0.1
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    rates, group = Rates(optimizer), optimizer.param_groups[0]
    rates.scale(0.5)
    assert float(group["lr"]) == pytest.approx(0.05)
    if tensor:
        group["lr"].fill_(new)
    else:
        group["lr"] = float(str(new))
    rates.put_back()
    assert float(group["lr"]) == pytest.approx(after)
    assert not tensor or group["lr"] is lr
    rates.put_back()
    assert float(group["lr"]) == pytest.approx(after)


def test_the_very_objects_come_back_and_groups_without_a_rate_are_left_alone() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}])
    first, second = optimizer.param_groups
    first["lr"], second["lr"] = torch.tensor(0.3), None
    there, rates = first["lr"], Rates(optimizer)
    rates.scale(0.1)
    rates.scale(0.1)  # not twice
    assert float(first["lr"]) == pytest.approx(0.03)
    rates.put_back()
    assert first["lr"] is there
    assert float(there) == 0.3
    assert second["lr"] is None
