"""Laws of stabilize on models with branches: every branch is limited, and what is made of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn import GroupSort, lipschitz, parameter_groups, stabilize
from stableopt.nn.branches import branch_constant, branches_of
from stableopt.nn.export import export, release
from stableopt.nn.limits import limited_slots
from stableopt.nn.plan import check_settings, make_plan
from stableopt.nn.residual import AveragedResidual
from stableopt.nn.stabilize import record_of
from stableopt.nn.structure import Concat, Merge, Parallel
from stableopt.nn.table import table
from stableopt.optim import SGD


def mlp(n: int = 4, m: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, 6), GroupSort(), nn.Linear(6, m))


def framed(*inner: nn.Module, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *inner, nn.Linear(width, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: framed(AveragedResidual(mlp())),
    "residual, fixed weight": lambda: framed(AveragedResidual(nn.Linear(4, 4), 0.25, learnable=False)),
    "concat": lambda: framed(Concat(nn.Identity(), mlp(), nn.Linear(4, 3)), width=11),
    "parallel": lambda: framed(Parallel(nn.Linear(1, 2), mlp(3, 2), sizes=(1, 3))),
    "merge": lambda: framed(Merge(mlp(), nn.Linear(4, 4), weights=(2.0, -3.0))),
    "merge l2": lambda: framed(Merge(mlp(), nn.Tanh(), by="l2")),
    "nested": lambda: framed(
        Concat(nn.Identity(), nn.Sequential(AveragedResidual(mlp()), nn.Linear(4, 2)), dim=-1), width=6
    ),
    "nothing around": lambda: AveragedResidual(mlp()),
}
every_model = pytest.mark.parametrize("name", MODELS)


@torch.no_grad()
def thrown(model: nn.Module) -> None:
    """Write large numbers into all parameters, as a bad step would."""
    for parameter in model.parameters():
        parameter.normal_().mul_(50.0)


@every_model
@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("budget", ["even", "fan", "learned"])
def test_the_limit_holds_wherever_the_parameters_are(name: str, norm: str, budget: str) -> None:
    model = MODELS[name]()
    limit = 1.5 if not branches_of(model) else 1.0
    stabilize(model, limit, norm=norm, budget=budget)  # type: ignore[arg-type]
    assert lipschitz(model, norm).upper <= limit
    for _ in range(3):
        thrown(model)
        assert lipschitz(model, norm).upper <= limit
        assert lipschitz(export(model), norm).upper <= limit
    limits = [(slot.key, bound.radius) for slot, bound in limited_slots(model)]
    assert len(limits) == sum(isinstance(part, nn.Linear) for part in model.modules())


@every_model
@pytest.mark.parametrize("budget", ["even", "learned"])
def test_all_parameters_are_trained_and_the_limit_stays(name: str, budget: str) -> None:
    model = stabilize(MODELS[name](), budget=budget)  # type: ignore[arg-type]
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(5):
        optimizer.zero_grad()
        out = model(x)
        (out - (x if out.shape[1] == 4 else y)).square().mean().backward()
        optimizer.step()
        assert lipschitz(model).upper <= 1.0
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == [] or all(key.endswith("shares") for key in dead)  # a budget with one layer has nothing to share


def test_projection_reaches_into_branches() -> None:
    model = stabilize(MODELS["nested"](), 1.0, by="projection")
    optimizer = SGD(parameter_groups(model), lr=10.0, guard="off")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().neg().backward()
        optimizer.step()
        assert lipschitz(model).upper <= 1.0


def test_the_limit_is_attained_and_just_past_it_is_not_proved() -> None:
    """Identities everywhere, and a frame that uses all of the budget: the bound is tight, a longer branch breaks it."""
    model = nn.Sequential(Concat(nn.Identity(), nn.Linear(3, 3, bias=False), dim=-1), nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[0].branches[1].weight.copy_(torch.eye(3))  # type: ignore[index, operator, union-attr]
        model[1].weight.copy_(torch.eye(6))  # type: ignore[operator]
    stabilize(model, 2.0, method="cholesky")
    J = torch.autograd.functional.jacobian(model, torch.zeros(3))
    assert 2.0 - 1e-9 < float(torch.linalg.matrix_norm(J, 2)) <= lipschitz(model).upper <= 2.0
    plain = release(model)
    with torch.no_grad():
        plain[0].branches[1].weight.mul_(1.0 + 1e-6)
    assert lipschitz(plain).upper > 2.0


def test_a_branch_without_weights_counts_with_its_constant() -> None:
    model = stabilize(framed(Concat(nn.Sigmoid(), nn.Linear(4, 4)), width=8), 1.0)
    assert record_of(model).constants == {"1": pytest.approx(math.hypot(0.25, 1.0), rel=1e-12)}  # type: ignore[union-attr]
    rows = {row.name: (row.limit, row.count) for row in table(model).rows}
    assert rows["1.branches.1.weight"] == (1.0, 0)
    assert rows["0.weight"][0] == pytest.approx(math.hypot(0.25, 1.0) ** -0.5)


def test_the_table_counts_a_branch_once_and_proves_what_is_there() -> None:
    model = stabilize(framed(AveragedResidual(nn.Linear(4, 4), 0.5, learnable=False)), 1.0)
    found = table(model)
    assert found.enforced.upper <= 1.0  # type: ignore[union-attr]
    assert found.proved.upper == pytest.approx(lipschitz(model).upper, rel=1e-12)  # type: ignore[union-attr]
    assert "1.branch.weight (in a branch)" in str(found)
    with torch.no_grad():
        model[1].branch.parametrizations.weight.original.mul_(0.5)
    assert table(model).proved.upper == pytest.approx(0.75 * found.proved.upper, rel=1e-6)  # type: ignore[union-attr]
    assert table(model).enforced == found.enforced


def test_a_layer_that_occurs_twice_counts_twice_also_with_a_radius() -> None:
    layer = nn.Linear(3, 3)
    found = table(stabilize(nn.Sequential(layer, nn.ReLU(), layer), radius=2.0))
    assert found.rows[0].count == 2
    assert found.enforced.upper == pytest.approx(4.0, rel=1e-12)  # type: ignore[union-attr]


def test_with_a_radius_the_branches_bound_the_model_as_well() -> None:
    model = stabilize(framed(AveragedResidual(mlp())), radius=2.0)
    found = table(model)
    assert found.enforced.upper == pytest.approx(2.0 * 4.0 * 2.0, rel=1e-12)  # type: ignore[union-attr]
    thrown(model)
    assert lipschitz(model).upper <= found.enforced.upper  # type: ignore[union-attr]


def test_a_weight_in_several_branches_obeys_the_smallest_of_its_limits() -> None:
    """Once in a branch the layer may have norm 1, twice and before a Sigmoid it may have 2; once more behind them, 0.5."""
    layer = nn.Linear(2, 2)
    twins = Parallel(layer, nn.Sequential(layer, nn.ReLU(), nn.Sigmoid(), layer), sizes=(2, 2))
    with pytest.raises(ValueError, match=r"occurs in several branches, which cannot share a learned radius"):
        stabilize(twins, budget="learned")
    around = nn.Sequential(AveragedResidual(layer), layer)
    settings = check_settings(0.5, None, "l2", "even", None, "parametrization", (), "keep")
    assert make_plan(around, settings).radii == (0.5,)
    stabilize(twins, 1.0)
    thrown(twins)
    assert [bound.radius for _, bound in limited_slots(twins)] == [1.0]
    assert 0.9 < lipschitz(twins).upper <= 1.0


def test_a_branch_that_has_no_bound_is_refused_with_its_place_and_nothing_changes() -> None:
    model = framed(AveragedResidual(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UncertifiableError, match=r"'1\.branch\.1' \(GRU\)"):
        stabilize(model, 1.0)
    assert list(model.state_dict()) == list(before)
    trainable = framed(AveragedResidual(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))))
    with pytest.raises(UncertifiableError, match=r"'1\.branch\.1' \(LayerNorm\)"):
        stabilize(trainable, 1.0)


def test_a_skipped_layer_in_a_branch_must_be_frozen() -> None:
    model = framed(AveragedResidual(mlp()))
    with pytest.raises(UncertifiableError, match=r"'1\.branch\.2' \(Linear\) has trainable parameters"):
        stabilize(model, 1.0, skip=["1.branch.2"])
    model[1].branch[2].requires_grad_(False)  # type: ignore[index, union-attr, operator]
    assert lipschitz(stabilize(model, 1.0, skip=["1.branch.2"])).upper <= 1.0
    assert "1.branch.2.weight" in model.state_dict()


def test_a_subclass_with_its_own_forward_is_refused() -> None:
    class Doubled(AveragedResidual):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return 2.0 * super().forward(input)

    with pytest.raises(UncertifiableError, match="overrides forward of AveragedResidual"):
        stabilize(framed(Doubled(mlp())), 1.0)


def test_the_constant_of_no_module_with_branches_is_refused() -> None:
    with pytest.raises(TypeError, match="a module with branches is expected, got ReLU"):
        branch_constant(nn.ReLU(), [Bound.point(1.0)], "l2")
