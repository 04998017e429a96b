"""Bounds on a ball: against grids of points, exact fractions, attacks, and the limits of what can be followed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.certify.extract import extract
from stableopt.certify.local import _lines, local_margins, local_radii
from stableopt.certify.program import Builder, Program
from stableopt.certify.publish import publish
from stableopt.errors import UncertifiableError
from stableopt.nn import Abs


def program(model: nn.Module, shape: tuple[int, ...], norm: str = "l2") -> Program:
    return publish(extract(model, shape, norm))


def smallest(model: nn.Module, x: Tensor, points: Tensor) -> Tensor:
    """The least difference of the predicted output and each other one over points, per class."""
    label = int(model(x[None]).argmax())
    outputs = model(points).detach()
    return (outputs[:, label : label + 1] - outputs).amin(dim=0)


def disc(radius: float, norm: str) -> Tensor:
    side = torch.linspace(-1.0, 1.0, 61)
    points = torch.cartesian_prod(side, side)
    size = points.norm(dim=1) if norm == "l2" else points.abs().amax(dim=1)
    inside, angle = points[size <= 1.0], torch.linspace(0.0, 2 * math.pi, 500)
    rim = torch.stack([angle.cos(), angle.sin()], dim=1)
    return radius * torch.cat([inside, rim if norm == "l2" else rim / rim.abs().amax(dim=1, keepdim=True)])


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(1.7), Abs(), nn.Identity()])
@pytest.mark.parametrize("depth", [1, 3])
def test_no_point_of_the_ball_is_below_the_bound(norm: str, activation: nn.Module, depth: int) -> None:
    torch.manual_seed(depth)
    layers: list[nn.Module] = [nn.Linear(2, 6)]
    for _ in range(depth - 1):
        layers += [activation, nn.Linear(6, 6)]
    model = nn.Sequential(*layers, activation, nn.Linear(6, 3))
    plan = program(model, (2,), norm)
    for radius in (0.0, 0.01, 0.3, 2.0):
        x = torch.randn(2)
        bound, truth = local_margins(plan, x[None], radius)[0], smallest(model, x, x + disc(radius, norm))
        others = bound.isfinite()
        assert (bound[others] <= truth[others] + 1e-12).all()
        if radius <= 0.01:  # near a point the network is linear, and that is not lost
            assert (bound[others] >= truth[others] - 0.02).all()


def test_layers_that_keep_the_image_are_followed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2, stride=2, groups=1),
        nn.LeakyReLU(0.2), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    x, plan = torch.randn(1, 4, 4), program(model, (1, 4, 4))
    for refine in (0, 512):
        bound = local_margins(plan, x[None], 0.2, refine=refine)[0]
        noise = nn.functional.normalize(torch.randn(2000, 16), dim=1).reshape(-1, 1, 4, 4)
        truth = smallest(model, x, x + 0.2 * noise)
        assert (bound[bound.isfinite()] <= truth[bound.isfinite()] + 1e-12).all()
    coarse, fine = (local_margins(plan, x[None], 1.0, refine=refine)[0] for refine in (0, 512))
    assert (fine >= coarse - 1e-12).all()
    assert (fine > coarse + 1e-4).any()  # radius 1: units of the second layer are undecided


@settings(max_examples=100)
@given(st.floats(-2.0, 2.0), st.floats(-2.0, 2.0), st.floats(-1e3, 1e3), st.floats(0.0, 1e3))
def test_lines_enclose_an_activation_exactly(below: float, above: float, low: float, width: float) -> None:
    high = low + width
    (s, t), (p, q) = (
        (Fraction(float(a)), Fraction(float(b)))
        for a, b in _lines((below, above), torch.tensor([low]), torch.tensor([high]))
    )
    for v in (low, high, 0.0, (low + high) / 2):
        if low <= v <= high:
            exact = Fraction(v) * Fraction(above if v >= 0 else below)
            assert s * Fraction(v) + t <= exact <= p * Fraction(v) + q


def test_rounding_that_cancels_is_subtracted() -> None:
    """At radius 0 the bound must be below the exact margin, also where float64 is off by more than the margin."""
    wide = 2.0**60
    weight = torch.tensor([[wide, 1.0, -wide], [0.0, 0.0, 0.0]])
    graph = Builder((3,))
    graph.add("linear", graph.input, weight=weight, bias=None, transposed=False)
    x = torch.tensor([[1.0, 0.25, 1.0]])  # exactly 1/4 apart, but a sum from the left gives 0
    assert local_margins(publish(graph.program()), x, 0.0)[0].min() <= 0.25


def test_radii_grow_and_are_true() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x, plan = torch.randn(6, 2), program(model, (2,))
    radii = local_radii(plan, x, torch.full((6,), 1e-5))
    assert (radii > 0.01).any()
    for point, radius in zip(x, radii.tolist(), strict=True):
        truth = smallest(model, point, point + disc(radius, "l2"))
        assert truth.sort().values[1] > 0.0


def test_a_radius_is_never_taken_away() -> None:
    plan = program(nn.Linear(2, 2), (2,))
    assert local_radii(plan, torch.zeros(1, 2), torch.tensor([7.0])).item() == 7.0


def test_overflow_proves_nothing() -> None:
    graph = Builder((2,))
    value = graph.add("linear", graph.input, weight=torch.full((2, 2), 1e70), bias=None, transposed=False)
    value = graph.add("activation", value, name="relu")
    graph.add("linear", value, weight=torch.tensor([[1e70, 1.0], [0.0, 1.0]]), bias=None, transposed=False)
    plan = publish(graph.program())
    assert local_radii(plan, torch.full((1, 2), 1e250), torch.zeros(1)).item() == 0.0
    assert local_radii(plan, torch.full((1, 2), float("nan")), torch.zeros(1)).item() == 0.0
    assert local_radii(plan, torch.full((1, 2), 1.0), torch.zeros(1)).item() > 0.0


def test_a_tie_has_no_radius() -> None:
    graph = Builder((1,))
    graph.add("linear", graph.input, weight=torch.ones(2, 1), bias=None, transposed=False)
    assert local_radii(publish(graph.program()), torch.ones(1, 1), torch.zeros(1)).item() == 0.0


def test_what_cannot_be_followed_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), nn.Sequential(nn.Linear(2, 2), nn.Softmax(dim=-1))):
        with pytest.raises(UncertifiableError, match="cannot be followed"):
            local_margins(program(model, (2,)), torch.zeros(1, 2), 0.1)
    graph = Builder((2,))
    graph.add("sum", graph.input, graph.input, factors=[1.0, 1.0])
    with pytest.raises(UncertifiableError, match="'sum'"):
        local_margins(publish(graph.program()), torch.zeros(1, 2), 0.1)
    with pytest.raises(UncertifiableError, match="norm"):
        local_margins(program(nn.Linear(2, 2), (3, 2), "token_max"), torch.zeros(1, 3, 2), 0.1)
