"""One sample replaced: influence and twin agree to first order, bounds hold and are attained, and nothing else differs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import stableopt as so
from stableopt.constraints import Box
from stableopt.lyapunov.profile.studies.data import replace_one

O = torch.optim


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return make()

    return made


def points(n: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 4, generator=generator), torch.randint(classes, (n,), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: O.SGD(m.parameters(), lr=0.3),
    "momentum": lambda m: O.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda m: O.AdamW(m.parameters(), lr=0.02, eps=1e-3, weight_decay=0.1),
    "ours, in a box": lambda m: so.optim.SGD(m.parameters(), lr=0.3, momentum=0.5, constraint=Box(-0.55, 1.01)),
}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *((name, mlp) for name in OPTIMIZERS),
        ("ours, in a box", noisy),
        *(pytest.param(name, noisy, marks=pytest.mark.slow) for name in ("SGD", "momentum", "AdamW")),
    ],
)
def test_influence_is_the_derivative_of_the_twin(name: str, make: Callable[[], nn.Module]) -> None:
    weights = (2e-3, 1e-3, 5e-4, 1e-5)
    found = replace_one(
        seeded(make), OPTIMIZERS[name], points(), None, 2, 7, steps=14, batches=4, weights=(1.0, *weights, 0.0)
    )
    assert not found.why.get("influence")
    assert found.drawn == 5
    assert found.influence[-1] > 1e-3
    # to first order: (twin - weight * influence) falls with the square of the weight, from both sides of a factor 4
    gaps = [found.gaps[w][-1] for w in weights]
    for coarse, fine in itertools.pairwise(gaps[:-1]):
        assert 3.0 < coarse / fine < 5.0
    assert found.gaps[1e-5][-1] <= 1e-3 * found.displacements[1e-5][-1]
    assert np.all(found.displacements[0.0] == 0.0)  # to the last bit
    assert found.displacement > 0.0
    assert "bound for these batches     not applicable: it needs lipschitz and smoothness" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_twin_is_the_run_that_one_would_have_made() -> None:
    x, y = points()
    plan = [[0, 1, 2, 3], [2, 2, 5, 6], [8, 9, 10, 11]]
    found = replace_one(seeded(noisy), OPTIMIZERS["AdamW"], (x, y), None, 2, 7, steps=6, batches=plan)
    ends = []
    for j in (2, 7):
        model = seeded(noisy)()
        optimizer = OPTIMIZERS["AdamW"](model)
        for t in range(6):
            rows = [j if i == 2 else i for i in plan[t % 3]]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert found.displacement == pytest.approx(float(torch.linalg.vector_norm(ends[0] - ends[1])), rel=1e-12)
    assert found.drawn == 4
    assert np.isnan(found.mean_bound)


def test_a_sample_that_is_not_drawn_does_nothing() -> None:
    found = replace_one(
        seeded(mlp), OPTIMIZERS["SGD"], points(), None, 2, 7, steps=4, batches=[[0, 1]], lipschitz=1.0, smoothness=1.0
    )
    assert (found.displacement, float(found.influence[-1]), found.drawn) == (0.0, 0.0, 0)
    assert float(found.bound[-1]) == 0.0
    assert found.holds


def test_influence_on_a_quadratic_is_the_closed_form() -> None:
    # l_i = (w - z_i)^2 / 2: w' - w after T steps of all samples is (1 - (1 - lr)^T) (z' - z) / n, exactly linear
    z = torch.arange(5.0)[:, None]

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

    found = replace_one(
        Mean, lambda m: O.SGD(m.parameters(), lr=0.25), z, lambda m, b: 0.5 * (m.w - b).square().mean(), 1,
        torch.tensor([3.5]), steps=8, weights=(1.0, 0.5),
    )  # fmt: skip
    exact = (1 - 0.75 ** np.arange(9)) * 2.5 / 5
    np.testing.assert_allclose(found.influence, exact, atol=1e-15)
    np.testing.assert_allclose(found.displacements[1.0], exact, atol=1e-15)
    np.testing.assert_allclose(found.displacements[0.5], exact / 2, atol=1e-15)
    assert found.direction[0].item() == pytest.approx(exact[-1])
    gone = replace_one(
        Mean, lambda m: O.SGD(m.parameters(), lr=0.6), z, lambda m, b: 0.5 * (m.w - b).square().mean(), 4, steps=40
    )
    # the mean without the sample, counted as if there still were n: stationary where 4 w = sum of the others
    assert gone.kind == "removed"
    assert gone.displacement == pytest.approx(2.0 - 6 / 4, abs=1e-9)
    assert float(gone.influence[-1]) == pytest.approx((4.0 - 2.0) / 5, abs=1e-9)


def logistic(batch: Any) -> tuple[Callable[[], nn.Module], Callable[[nn.Module, Any], Tensor]]:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.softplus(-b[1] * m(b[0]).squeeze(-1)).mean()

    return seeded(lambda: nn.Linear(3, 1, bias=False)), loss


@pytest.mark.parametrize("batches", [None, 1, 5])
def test_convex_runs_stay_within_their_bounds(batches: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, generator=generator)
    x = 2.0 * x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    y = torch.where(torch.rand(20, generator=generator) < 0.5, -1.0, 1.0)
    model, loss = logistic((x, y))
    G, L = 2.0, 1.0  # |x|, |x|^2 / 4
    for j in (0, 7) if batches is None else (7,):
        found = replace_one(
            model, lambda m: O.SGD(m.parameters(), lr=2.0 / L), (x, y), loss, j, (-x[j], y[j]), steps=40, batches=batches,
            lipschitz=G, smoothness=L, smallest_curvature=0.0,
        )  # fmt: skip
        assert found.holds
        assert 0.0 < found.displacement < found.bound[-1]
        assert found.mean_bound == pytest.approx(2 * G / 20 * 40 * 2.0, rel=1e-9)
        whole = 40 % (20 // (batches or 20)) == 0
        assert not whole or found.bound[-1] == pytest.approx(found.mean_bound, rel=1e-9)
        assert not found.why


def test_half_of_the_bound_is_attained_where_the_logistic_loss_is_steep() -> None:
    # all samples on the wrong side, the replacement far on the right one: gradients G and 0, and never G and -G
    def model() -> nn.Module:
        made = nn.Linear(1, 1, bias=False)
        nn.init.constant_(made.weight, -20.0)
        return made

    x, y = torch.full((10, 1), 2.0), torch.ones(10)
    _, loss = logistic((x, y))
    found = replace_one(
        model, lambda m: O.SGD(m.parameters(), lr=0.5), (x, y), loss, 4, (x[4], torch.tensor(-1.0)), steps=8, lipschitz=2.0,
        smoothness=1.0, smallest_curvature=0.0,
    )  # fmt: skip
    assert found.holds
    assert found.displacement == pytest.approx(0.5 * found.bound[-1], rel=1e-6)


def test_the_bound_is_attained_by_a_linear_loss() -> None:
    def loss(m: nn.Module, b: Tensor) -> Tensor:
        return m(b).mean()

    found = replace_one(
        seeded(lambda: nn.Linear(1, 1, bias=False)), lambda m: O.SGD(m.parameters(), lr=0.5), torch.ones(8, 1), loss, 3,
        torch.tensor([-1.0]), steps=16, batches=2, lipschitz=1.0, smoothness=0.0,
    )  # fmt: skip
    assert found.holds
    np.testing.assert_allclose(found.displacements[1.0], found.bound, rtol=1e-13)
    assert found.bound[-1] == pytest.approx(4 * 0.5 * 2 / 2)
    assert found.bound[-1] == pytest.approx(found.mean_bound)
    smaller = replace_one(
        seeded(lambda: nn.Linear(1, 1, bias=False)), lambda m: O.SGD(m.parameters(), lr=0.5), torch.ones(8, 1), loss, 3,
        torch.tensor([-1.0]), steps=16, batches=2, lipschitz=0.99, smoothness=0.0,
    )  # fmt: skip
    assert smaller.holds is False  # G is not the constant of this loss


def test_growth_enters_the_bound() -> None:
    # l = -w^2 / 2 + z w: the growth 1 + lr is attained
    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

    z = torch.full((4, 1), 1e-3)
    found = replace_one(
        Saddle, lambda m: O.SGD(m.parameters(), lr=0.5), z, lambda m, b: (-0.5 * m.w**2 + b * m.w).mean(), 0,
        torch.tensor([-1e-3]), steps=6, lipschitz=1e-3, smoothness=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(found.displacements[1.0], found.bound, rtol=1e-12)
    assert found.bound[-1] == pytest.approx(2e-3 / 4 * (1.5**6 - 1), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: O.SGD(m.parameters(), lr=0.1, momentum=0.5), "without momentum"),
        (lambda m: O.Adam(m.parameters(), lr=0.1), "the bounds are for SGD"),
        (lambda m: O.SGD(m.parameters(), lr=0.1, maximize=True), "maximized"),
    ],
)
def test_where_the_theorem_does_not_speak_the_bound_is_not_given(make: Callable[[nn.Module], Any], said: str) -> None:
    found = replace_one(seeded(mlp), make, points(), None, 2, 7, steps=4, lipschitz=1.0, smoothness=1.0)
    assert said in found.why["bound"]
    assert said in found.why["mean_bound"]
    assert found.holds is None
    assert np.isnan(found.bound).all()
    noise = replace_one(seeded(noisy), OPTIMIZERS["SGD"], points(), None, 2, 7, steps=4, lipschitz=1.0, smoothness=1.0)
    assert "no mean over the samples" in noise.why["bound"]


def test_an_optimizer_without_a_rule_has_a_twin_and_no_influence() -> None:
    found = replace_one(seeded(mlp), lambda m: O.Adagrad(m.parameters(), lr=0.1), points(), None, 2, 7, steps=4)
    assert found.displacement > 0
    assert np.isnan(found.influence).all()
    assert "nothing is known about the update of Adagrad" in found.why["influence"]
    assert found.direction == ()
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_dataset_is_as_good_as_tensors() -> None:
    x, y = points()
    one, two = (
        replace_one(seeded(mlp), OPTIMIZERS["SGD"], data, None, 2, replacement, steps=5, batches=3)
        for data, replacement in (((x, y), 7), (TensorDataset(x, y), (x[7], y[7])))
    )
    assert one.displacement == two.displacement
    assert float(one.influence[-1]) == pytest.approx(float(two.influence[-1]), rel=1e-14)


def test_the_random_state_goes_on_as_after_the_run_alone() -> None:
    model = seeded(noisy)()
    optimizer = OPTIMIZERS["SGD"](model)
    x, y = points()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    alone = torch.rand(3)
    replace_one(seeded(noisy), OPTIMIZERS["SGD"], (x, y), None, 2, 7, steps=3)
    assert torch.equal(alone, torch.rand(3))


def test_what_makes_no_sense_is_refused() -> None:
    args: Any = (seeded(mlp), OPTIMIZERS["SGD"], points(), None)
    for kwargs, said in (
        ({"index": 12}, "index must be from 0 to 11"),
        ({"index": 0, "replacement": 12}, "replacement must be from 0 to 11"),
        ({"index": 0, "steps": 0}, "steps must be at least 1"),
        ({"index": 0, "batches": 13}, "from 1 to 12 samples"),
        ({"index": 0, "batches": [[0, 12]]}, "indices from 0 to 11"),
        ({"index": 0, "weights": (2.0,)}, "weights must lie in"),
    ):
        with pytest.raises(ValueError, match=said):
            replace_one(*args, **({"steps": 2, "replacement": 1} | kwargs))
    with pytest.raises(ValueError, match="the same parameters each time"):
        replace_one(Unseeded(), *args[1:], 0, 1, steps=2)
    with pytest.raises(ValueError, match="can only be removed from a loss that is a mean"):
        replace_one(seeded(noisy), *args[1:], 0, steps=2)
    with pytest.raises(ValueError, match="can only be removed from a loss that is a mean"):
        replace_one(args[0], args[1], args[2], lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), 0, steps=2)


class Unseeded:
    count = 0

    def __call__(self) -> nn.Module:
        self.count += 1
        torch.manual_seed(self.count)
        return mlp()


def test_a_probe_tells_the_influence_on_a_test_sample() -> None:
    x, y = points()
    tested = (torch.tensor([[0.3, -1.0, 0.5, 0.2]]), torch.tensor([1]))

    def probe(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(tested[0]), tested[1])

    found = replace_one(
        seeded(mlp),
        OPTIMIZERS["momentum"],
        (x, y),
        None,
        2,
        7,
        steps=8,
        batches=4,
        weights=(1.0, 1e-3, 5e-4, 0.0),
        probe=probe,
    )
    coarse, fine = (found.probe[w] - w * found.probe_influence for w in (1e-3, 5e-4))
    assert abs(fine) < 1e-2 * abs(found.probe[5e-4])
    assert coarse / fine == pytest.approx(4.0, rel=0.05)
    assert found.probe[0.0] == 0.0
    assert "probe, to first order" in str(found)
    alone = replace_one(seeded(mlp), OPTIMIZERS["momentum"], (x, y), None, 2, 7, steps=8, batches=4)
    assert alone.displacement == found.displacement
    assert not alone.probe
