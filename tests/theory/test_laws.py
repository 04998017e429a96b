"""What every law owes: enclosures in, enclosures out; limits on the safe side; nonsense refused."""

from __future__ import annotations

import inspect
import math
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

import stableopt.theory as th
from stableopt.linalg import Bound
from stableopt.theory import _arguments as arguments
from tests.theory.catalogue import FACTORS, LIMITS

Row = tuple[Callable[..., Any], tuple[float, ...], tuple[int, ...]]


def name(row: Row) -> str:
    law = row[0]
    if law.__name__ != "<lambda>":
        return law.__name__
    found = re.search(r"th\.(\w+)", "".join(n for n in [inspect.getsource(law)]))
    return found.group(1) if found else "law"


def widened(x: float, random_: random.Random, width: float) -> Bound:
    return Bound(x - abs(x) * width * random_.random(), x + abs(x) * width * random_.random())


@pytest.mark.parametrize("row", FACTORS, ids=name)
def test_a_factor_of_enclosures_encloses_the_factor_of_every_member(row: Row) -> None:
    law, point, positions = row
    generator = random.Random(0)
    assert isinstance(law(*point), float)
    for _ in range(30):
        bounds: list[Any] = list(point)
        for i in positions:
            if generator.random() < 0.8:
                bounds[i] = widened(point[i], generator, 0.02)
        if not any(isinstance(b, Bound) for b in bounds):
            continue
        enclosure = law(*bounds)
        assert isinstance(enclosure, Bound)
        assert enclosure.proved
        members = [generator.uniform(b.lower, b.upper) if isinstance(b, Bound) else b for b in bounds]
        value, slack = law(*members), 1e-13 * (1 + abs(enclosure.upper))
        assert enclosure.lower - slack <= value <= enclosure.upper + slack


@pytest.mark.parametrize("row", FACTORS, ids=name)
def test_a_factor_of_points_is_that_number_and_a_factor_of_estimates_is_an_estimate(row: Row) -> None:
    law, point, positions = row
    exact = law(*[Bound.point(x) if i in positions else x for i, x in enumerate(point)])
    value = law(*point)
    assert exact.width <= 1e-13 * max(1.0, abs(value))
    assert abs(exact.upper - value) <= 1e-13 * max(1.0, abs(value))
    assert not law(*[Bound.estimate(x) if i == positions[0] else x for i, x in enumerate(point)]).proved


@pytest.mark.parametrize("row", LIMITS, ids=name)
def test_a_limit_of_enclosures_is_a_float_below_the_limit_of_every_member(row: Row) -> None:
    law, point, positions = row
    generator = random.Random(0)
    for _ in range(30):
        bounds = [widened(x, generator, 0.02) if i in positions else x for i, x in enumerate(point)]
        limit = law(*bounds)
        assert type(limit) is float
        for _ in range(5):
            members = [generator.uniform(b.lower, b.upper) if isinstance(b, Bound) else b for b in bounds]
            assert limit <= law(*members)


@pytest.mark.parametrize("row", LIMITS, ids=name)
def test_a_limit_scales_like_a_step(row: Row) -> None:
    """All curvatures times c, the step divided by c: every limit of one curvature has the unit 1/curvature."""
    law, point, _ = row
    if len(point) == 1 and name(row) not in {"leaky_infinity_max_step", "adamw_energy_limit", "adamw_edge"}:
        for power in (-27, -13, 13, 27):  # scales 1e-8 to 1e8
            assert law(point[0] * 2.0**power) == law(point[0]) / 2.0**power


@pytest.mark.parametrize("row", [*FACTORS, *LIMITS], ids=name)
def test_nan_and_infinity_and_what_is_no_number_are_refused_in_a_sentence(row: Row) -> None:
    law, point, positions = row
    for i in positions:
        for wrong in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=r"^[a-z|].* got .*\.$"):
                law(*[wrong if j == i else x for j, x in enumerate(point)])
        with pytest.raises(TypeError, match="must be a number or a Bound"):
            law(*["1.0" if j == i else x for j, x in enumerate(point)])


SIGNED = {
    "dissipative_factor": {1},
    "dissipative_max_step": {0},
    "implicit_factor": {1},
    "implicit_max_step": {0},
    "infinity_law": {1},
    "leaky_infinity_factor": {2},
    "gradient_descent_factor": {1, 2},
    "heavy_ball_energy": {0},
    "adam_energy": {0},
    "adamw_energy": {0},
    "flow_factor": {0},
    "gradient_flow_factor": {0},
    "adamw_edge": {0},
    "adam_edge": set(),
}


@pytest.mark.parametrize("row", [*FACTORS, *LIMITS], ids=name)
def test_negative_constants_and_steps_are_refused(row: Row) -> None:
    law, point, positions = row
    for i in set(positions) - SIGNED.get(name(row), set()):
        for wrong in (-0.1, Bound(-0.1, 1e-3)):
            with pytest.raises(ValueError, match="got"):
                law(*[wrong if j == i else x for j, x in enumerate(point)])


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan])
@pytest.mark.parametrize(
    "law",
    [
        lambda b: th.heavy_ball_edge(1.0, b),
        lambda b: th.nesterov_edge(1.0, b),
        lambda b: th.sgd_edge(1.0, momentum=b),
        lambda b: th.sgd_edge(1.0, momentum=0.5, dampening=b),
        lambda b: th.adam_edge(1.0, b),
        lambda b: th.adamw_edge(1.0, b),
        lambda b: th.nadam_edge(1.0, b),
        lambda b: th.rmsprop_edge(1.0, b),
        lambda b: th.heavy_ball_energy_limit(1.0, b),
        lambda b: th.sgd_energy_limit(1.0, momentum=0.5, dampening=b),
        lambda b: th.heavy_ball_energy(1.0, 0.1, b, 1.0),
        lambda b: th.heavy_ball_dissipation(0.1, 1.0, b),
        lambda b: th.adam_energy(1.0, 0.1, b, 1.0),
        lambda b: th.adamw_energy(1.0, 1.0, 1.0, lr=0.1, beta1=b, weight_decay=0.0),
        lambda b: th.adamw_energy_limit(1.0, b, 0.0),
        lambda b: th.adamw_dissipation(0.1, 1.0, b, 0.0),
        lambda b: th.heavy_ball_matrix(0.1, 1.0, b),
        lambda b: th.nesterov_matrix(0.1, 1.0, b),
        lambda b: th.sgd_matrix(0.1, 1.0, momentum=b),
        lambda b: th.adamw_matrix(0.1, 1.0, b),
        lambda b: th.nadam_matrix(0.1, 1.0, b),
    ],
)
def test_momentum_outside_zero_to_one_is_refused(law: Callable[[float], object], beta: float) -> None:
    with pytest.raises(ValueError, match="got"):
        law(beta)


def test_the_room_exports_every_public_name_once() -> None:
    import importlib
    import pkgutil

    names = []
    for module in pkgutil.iter_modules(th.__path__):
        if not module.name.startswith("_"):
            names += importlib.import_module(f"stableopt.theory.{module.name}").__all__
    assert sorted(names) == sorted(th.__all__)
    assert len(set(names)) == len(names)


def test_exponentials_and_logarithms_of_enclosures_are_rounded_outwards() -> None:
    import mpmath

    mpmath.mp.prec = 200
    for x in (-745.2, -700.0, -1.0, -1e-8, 0.0, 1e-15, 0.1, 1.0, 700.0):
        enclosure = arguments.real_exp(Bound.point(x))
        assert isinstance(enclosure, Bound)
        exact = mpmath.exp(mpmath.mpf(x))
        assert enclosure.lower <= exact <= enclosure.upper
        assert math.nextafter(enclosure.lower, math.inf) >= enclosure.upper
        assert arguments.real_exp(x) in Bound(
            math.nextafter(enclosure.lower, 0.0), math.nextafter(enclosure.upper, 9e999)
        )
    for x in (5e-324, 0.1, 1.0, 1 + 2**-52, 3.0, 1e308):
        enclosure = arguments.real_log(Bound.point(x))
        assert isinstance(enclosure, Bound)
        assert enclosure.lower <= mpmath.log(mpmath.mpf(x)) <= enclosure.upper
        assert math.nextafter(enclosure.lower, math.inf) >= enclosure.upper
    assert arguments.real_exp(Bound.point(0.0)) == Bound.point(1.0)
    assert arguments.real_exp(Bound.point(1e-300)).upper > 1.0  # beyond the digits that are computed
    assert arguments.real_exp(Bound.point(-1e-300)).lower < 1.0
    assert arguments.real_exp(Bound(-1e9, 1e9)) == Bound(0.0, math.inf)
    assert arguments.real_exp(1e9) == math.inf
    assert arguments.real_log(Bound(0.0, 1.0)) == Bound(-math.inf, 0.0)
    assert arguments.real_log(0.0) == -math.inf


def test_limits_are_rounded_down_and_not_further() -> None:
    for a, b in [(2, 3), (1, 10), (7, 11)]:
        limit = arguments.limit(a, b)
        assert Fraction(limit) <= Fraction(a, b) < Fraction(math.nextafter(limit, math.inf))
    assert arguments.limit(0, 0) == 0.0
    assert arguments.limit(1, 0) == math.inf


def test_malformed_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        th.spectral_radius([[1.0, 2.0]])
    with pytest.raises(ValueError, match="NaN"):
        th.spectral_radius([[math.nan]])
    with pytest.raises(ValueError, match="at least one"):
        th.transition([], 0, 0)
    with pytest.raises(ValueError, match="one size"):
        th.transition([[[1.0]], [[1.0, 0.0], [0.0, 1.0]]], 0, 1)
    with pytest.raises(ValueError, match="vector"):
        th.diagonal_norm([[1.0]], [])
    with pytest.raises(ValueError, match="NaN"):
        th.almost_sure_exponent([math.nan])
