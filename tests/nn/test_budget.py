"""Laws of the budget: the product of the stored radii obeys the limit exactly, uses it up, and keeps the proportions."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stableopt.nn import GroupSort, layer_limit, layers, lipschitz, stabilize
from stableopt.nn.budget import Budgeted, LearnedBudget, fixed_radii, product_within
from stableopt.nn.stabilize import record_of

positive = st.floats(1e-6, 1e6)


@given(st.data())
def test_fixed_radii_obey_the_limit_exactly_and_use_it_up(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    factors = data.draw(st.lists(positive, min_size=n, max_size=n))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    constants = data.draw(st.lists(st.floats(0.1, 10.0), max_size=3))
    limit = data.draw(positive)
    radii = fixed_radii(limit, factors, counts, constants)
    product = math.prod(Fraction(r) ** c for r, c in zip(radii, counts, strict=True)) * math.prod(
        map(Fraction, constants)
    )
    assert product <= Fraction(limit)
    assert float(product / Fraction(limit)) >= 1 - 1e-12
    scale = [r / f for r, f in zip(radii, factors, strict=True)]
    assert max(scale) / min(scale) <= 1 + 1e-13


@pytest.mark.parametrize("limit", [1e-300, 1.0, 1e300])
def test_long_chains_do_not_leave_the_range_of_floats(limit: float) -> None:
    """The product of the radii of a prefix overflows, the logarithms do not."""
    factors = [1e200] * 3 + [1e-200] * 3 + [1.0] * 94
    radii = fixed_radii(limit, factors)
    assert product_within(radii, [1] * 100, [], limit)
    assert not product_within(
        [math.nextafter(r, math.inf) for r in radii[:-8]] + [2 * r for r in radii[-8:]], [1] * 100, [], limit
    )


def test_impossible_radii_are_refused() -> None:
    with pytest.raises(ValueError, match="no finite radii"):
        fixed_radii(1.0, [1e300, 1e-300], counts=[1, 1], constants=[1e-300, 1e-300])


def test_one_layer_gets_exactly_the_limit() -> None:
    for limit in torch.rand(200).tolist():
        assert fixed_radii(limit, [1.0]) == [limit]


@given(
    n=st.integers(1, 9), limit=positive, spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]), seed=st.integers(0, 999),
    constants=st.lists(st.floats(0.3, 3.0), max_size=3), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_learned_radii_obey_the_limit_for_every_value_of_the_parameters(
    n: int, limit: float, spread: float, seed: int, constants: list[float], dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    counts = torch.randint(1, 4, (n,)).tolist()
    budget = LearnedBudget(limit, counts, constants).to(dtype)
    with torch.no_grad():
        budget.shares.copy_(spread * torch.randn(n))
    radii = budget.radii()
    assert product_within(radii, counts, constants, limit)
    product = sum(c * math.log(r) if r else -math.inf for c, r in zip(counts, radii, strict=True)) + sum(
        map(math.log, constants)
    )
    if spread <= 30.0:
        assert product >= math.log(limit) - 1e-11 * (1 + sum(counts)) * (1 + spread)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), GroupSort(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
def test_a_learned_budget_moves_and_the_model_keeps_its_limit(limit: float) -> None:
    model = stabilize(chain(), limit, budget="learned")
    shares = model.get_parameter("0.parametrizations.weight.0.budget.shares")
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(16, 4)
    first = [layer_limit(model[i]) for i in (0, 2, 4)]
    assert max(first) == pytest.approx(min(first))  # type: ignore[type-var]
    for _ in range(10):
        opt.zero_grad()
        (model(x).sin() - x[:, :2].cos()).square().sum().backward()
        assert shares.grad is not None
        assert shares.grad.any()
        opt.step()
        assert lipschitz(model).upper <= limit
    radii = [layer_limit(model[i]) for i in (0, 2, 4)]
    assert radii != first
    assert product_within(radii, [1, 1, 1], [lipschitz(nn.GELU()).upper], limit)  # type: ignore[arg-type]
    assert all(lipschitz(model[i]).upper <= r for i, r in zip((0, 2, 4), radii, strict=True))  # type: ignore[operator]


def test_every_parameter_of_a_learned_budget_is_listed_once_and_gets_a_gradient() -> None:
    model = stabilize(chain(), 1.0, budget="learned")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sum("shares" in name for name in names) == 1
    assert sum("shares" in name for name in model.state_dict()) == 1
    model(torch.randn(3, 4)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_the_gradient_of_the_shares_is_that_of_the_formula() -> None:
    budget = LearnedBudget(2.0, [1, 2, 1], [1.5])
    assert torch.autograd.gradcheck(
        lambda a: torch.func.functional_call(budget, {"shares": a}, ()), torch.randn(3, requires_grad=True)
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_budget(copied) -> None:
    model = stabilize(chain(), 1.0, budget="learned")
    clone = copied(model)
    x = torch.randn(3, 4)
    expected = model(x)
    with torch.no_grad():
        clone.get_parameter("0.parametrizations.weight.0.budget.shares").copy_(torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert layer_limit(clone[0]) > layer_limit(clone[2]) > layer_limit(clone[4])  # type: ignore[operator]
    assert layer_limit(model[0]) == pytest.approx(layer_limit(model[4]))


def test_a_fan_budget_is_proportional_to_the_root_of_the_quotient_of_the_fans() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2), nn.Linear(2, 50, bias=False)
    )
    stabilize(model, 3.0, budget="fan")
    limits = {i: layer_limit(model[i]) for i in (0, 3, 4)}
    wanted = {0: math.sqrt((8 * 9) / 9), 3: math.sqrt(2 / 32), 4: math.sqrt(50 / 2)}
    scale = [limits[i] / wanted[i] for i in wanted]  # type: ignore[operator]
    assert scale == pytest.approx([scale[0]] * 3, rel=1e-12)
    assert product_within(list(limits.values()), [1, 1, 1], [], 3.0)  # type: ignore[arg-type]
    assert lipschitz(model).upper <= 3.0


def test_a_layer_that_occurs_twice_is_paid_twice_in_every_budget() -> None:
    for budget in ("even", "fan", "learned"):
        layer = nn.Linear(4, 4)
        model = stabilize(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2)), 4.0, budget=budget)  # type: ignore[arg-type]
        assert record_of(model).counts == {"0.weight": 2, "3.weight": 1}  # type: ignore[union-attr]
        limits = [layer_limit(layer), layer_limit(layer), layer_limit(model[3])]
        assert product_within(limits, [1, 1, 1], [], 4.0)  # type: ignore[arg-type]
        assert math.prod(limits) == pytest.approx(4.0, rel=1e-9)  # type: ignore[arg-type]
        assert lipschitz(model).upper <= 4.0


def test_the_constants_of_the_other_layers_are_paid_for() -> None:
    model = stabilize(chain(), 1.0)
    limits = [layer_limit(layer) for _, layer in layers(model) if layer_limit(layer)]
    constants = record_of(model).constants  # type: ignore[union-attr]
    assert constants["3"] == lipschitz(nn.GELU()).upper
    assert math.prod(limits) * math.prod(constants.values()) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_assigning_a_weight_under_a_learned_budget_keeps_it_if_it_fits() -> None:
    model = stabilize(chain(), 8.0, budget="learned")
    radius = layer_limit(model[2])
    W = torch.eye(8) * radius * 0.7  # type: ignore[operator]
    model[2].weight = W
    torch.testing.assert_close(model[2].weight.detach(), W, rtol=1e-12, atol=0)
    model[2].weight = torch.eye(8) * radius * 5  # type: ignore[operator]
    assert 0.9 * radius <= lipschitz(model[2]).upper <= radius  # type: ignore[operator]


def test_the_budget_refuses_a_limit_that_is_no_positive_number() -> None:
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="limit must be positive and finite"):
            LearnedBudget(bad, [1])


def test_the_radius_of_a_budgeted_weight_is_read_from_the_budget() -> None:
    model = stabilize(chain(), 2.0, budget="learned")
    owner, other = (model[i].parametrizations["weight"][0] for i in (0, 2))  # type: ignore[union-attr]
    assert isinstance(owner, Budgeted)
    assert owner.shared is other.shared
    assert [owner.radius, other.radius] == owner.shared.radii()[:2]
    assert "layers=3" in repr(owner.shared)
