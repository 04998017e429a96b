"""After a diagonal preconditioner the projection is the nearest point in its metric, where the set has that exactly."""

from __future__ import annotations

import pytest
import torch

import stableopt as so
from stableopt.constraints import Constraint, L1Ball, L2Ball, Simplex

SETS = [L2Ball(1.0), L1Ball(1.0), Simplex(1.0)]


@pytest.mark.parametrize("constraint", SETS, ids=repr)
def test_adamw_projects_in_its_own_metric(constraint: Constraint) -> None:
    """<P (x - p), u - p> <= 0 for every u of the set, which the Euclidean projection of the same point breaks."""
    start = constraint.project(torch.tensor([0.3, 0.5, 0.2, 0.0]))
    free, held = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    plain = torch.optim.AdamW([free], lr=0.5, weight_decay=0.0)
    ours = so.optim.AdamW([held], lr=0.5, weight_decay=0.0, constraint=constraint, guard="off")
    broken = 0
    for t in range(4):
        gradient = torch.tensor([-4.0, -0.3, 1.0, 0.02]) * (1 + t)
        free.grad, held.grad = gradient.clone(), gradient.clone()
        with torch.no_grad():
            free.copy_(held)
        plain.load_state_dict(plain.state_dict() | {"state": {0: {k: v.clone() for k, v in ours.state[held].items()}}})
        plain.step()
        ours.step()
        metric = ours.rule.metric(ours.state[held], ours.param_groups[0])
        reached, p = free.detach(), held.detach()
        assert constraint.violation(p) == 0.0
        usual = constraint.project(reached)
        for _ in range(300):
            u = constraint.project(2 * torch.randn(4))
            assert float((metric * (reached - p) * (u - p)).sum()) <= 1e-9 * float(metric.max())
            broken += float((metric * (reached - usual) * (u - usual)).sum()) > 1e-6 * float(metric.max())
    assert broken > 0


def test_a_learning_rate_of_zero_leaves_a_feasible_point_alone() -> None:
    for constraint in SETS:
        p = torch.nn.Parameter(constraint.project(torch.rand(4)))
        before = p.detach().clone()
        p.grad = torch.ones(4)
        so.optim.AdamW([p], lr=0.0, constraint=constraint, guard="off").step()
        assert torch.equal(p, before)
