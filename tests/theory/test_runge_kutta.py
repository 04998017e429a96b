"""T3h: circle contractivity, against adversarial gradient fields."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import stableopt.theory as th
from stableopt.theory.tableaux import (
    BACKWARD_EULER,
    DOPRI5,
    EULER,
    HEUN,
    HEUN3,
    KUTTA3,
    MIDPOINT,
    RALSTON,
    RK4,
    RK4_38,
    TABLEAUX,
)

TABLE = [
    (EULER, 1, 1.0),
    (MIDPOINT, 2, 0.0),
    (HEUN3, 3, 0.0),
    (HEUN, 2, 1.0),
    (th.ssprk2(2), 2, 1.0),
    (RALSTON, 2, (math.sqrt(21) - 3) / 2),
    (KUTTA3, 3, 0.5),
    (th.SSPRK33, 3, 1.0),
    (RK4, 4, 1.0),
    (RK4_38, 4, 2 * math.sqrt(3) - 3),
    (th.ssprk2(3), 3, 2.0),
    (th.ssprk2(4), 4, 3.0),
    (th.SSPRK43, 4, 2.0),
    (th.SSPRK104, 10, 6.0),
    (DOPRI5, 7, 0.0),
    (th.substepped_euler(5), 5, 5.0),
    (BACKWARD_EULER, 1, math.inf),
    (th.IMPLICIT_MIDPOINT, 1, math.inf),
    (th.RADAU_IIA, 2, math.inf),
    (th.TRAPEZOIDAL, 2, 2.0),
]


def step_norm(t: th.ButcherTableau, slopes: list[np.ndarray], tau: float) -> float:
    """The norm of one step when stage i sees the derivative -slopes[i] (the frozen field of the theorem)."""
    s, n = t.stages, len(slopes[0])
    A = np.array(t.A, dtype=float)
    M = np.eye(s * n)
    for i in range(s):
        for j in range(s):
            M[i * n : (i + 1) * n, j * n : (j + 1) * n] += tau * A[i, j] * slopes[j]
    Y = np.linalg.solve(M, np.tile(np.eye(n), (s, 1)))
    step = np.eye(n) - tau * sum(float(t.b[i]) * slopes[i] @ Y[i * n : (i + 1) * n] for i in range(s))
    return float(np.linalg.norm(step, 2))


def projector(angle: float) -> np.ndarray:
    v = np.array([math.cos(angle), math.sin(angle)])
    return np.outer(v, v)


def worst(t: th.ButcherTableau, tau: float, tries: int = 400) -> float:
    """The largest norm over random Clarke derivatives of convex 1-smooth functions, refined by random search."""
    g = np.random.default_rng(0)
    best, at = 0.0, None
    for k in range(tries):
        angles = (
            g.uniform(0, math.pi, t.stages) if at is None or k < tries // 2 else at + 0.1 * g.standard_normal(t.stages)
        )
        value = step_norm(t, [projector(a) for a in angles], tau)
        if value > best:
            best, at = value, angles
    return max(best, step_norm(t, [np.eye(2)] * t.stages, tau))


@pytest.mark.parametrize(("tableau", "stages", "radius"), TABLE, ids=lambda x: getattr(x, "name", str(x)))
def test_the_radius_is_that_of_the_table(tableau: th.ButcherTableau, stages: int, radius: float) -> None:
    assert tableau.stages == stages
    found = th.circle_contractivity_radius(tableau)
    assert found == pytest.approx(radius, rel=1e-12)
    assert found <= radius * (1 + 1e-15)
    assert th.runge_kutta_max_step(tableau, 4.0) == (found / 2 if radius < math.inf else math.inf)


@pytest.mark.parametrize(
    "tableau", [EULER, HEUN, RALSTON, KUTTA3, RK4, RK4_38, th.SSPRK33, th.ssprk2(3), th.TRAPEZOIDAL]
)
def test_no_gradient_field_expands_up_to_the_limit_and_some_does_beyond(tableau: th.ButcherTableau) -> None:
    limit = th.runge_kutta_max_step(tableau, 1.0)
    for at in (0.25, 0.7, 1.0):
        assert worst(tableau, at * limit, 120) <= 1 + 1e-9
    assert worst(tableau, 1.3 * limit, 1500) > 1


@pytest.mark.parametrize("tableau", [MIDPOINT, HEUN3, DOPRI5], ids=lambda t: t.name)
def test_methods_without_a_radius_expand_at_small_steps(tableau: th.ButcherTableau) -> None:
    assert th.runge_kutta_max_step(tableau, 1.0) == 0.0
    assert worst(tableau, 0.5, 3000) > 1 + 1e-7


@pytest.mark.parametrize("tableau", [BACKWARD_EULER, th.IMPLICIT_MIDPOINT, th.RADAU_IIA], ids=lambda t: t.name)
def test_algebraically_stable_methods_never_expand(tableau: th.ButcherTableau) -> None:
    assert max(worst(tableau, tau, 100) for tau in (0.1, 1.0, 30.0)) <= 1 + 1e-9


def test_the_linear_stability_limit_of_rk4_is_not_enough() -> None:
    """On a fixed matrix RK4 is stable to 2.785; along a gradient field it expands before."""
    assert step_norm(RK4, [np.eye(1)] * 4, 2.78) < 1
    assert worst(RK4, 2.5, 2000) > 1.01


def test_order_conditions_confirm_the_tableaux() -> None:
    orders = {
        1: [EULER, th.substepped_euler(3), BACKWARD_EULER],
        2: [MIDPOINT, HEUN, RALSTON, th.ssprk2(4), th.IMPLICIT_MIDPOINT, th.TRAPEZOIDAL],
        3: [KUTTA3, HEUN3, th.SSPRK33, th.SSPRK43, th.RADAU_IIA],
        4: [RK4, RK4_38, th.SSPRK104],
        5: [DOPRI5],
    }
    for order, tableau in [(order, tableau) for order, tableaux in orders.items() for tableau in tableaux]:
        b, c, A = tableau.b, tableau.c, tableau.A
        bushy = [sum(x * y**k for x, y in zip(b, c, strict=True)) == Fraction(1, k + 1) for k in range(6)]
        assert all(bushy[:order]), tableau.name
        if order >= 3:
            assert sum(b[i] * A[i][j] * c[j] for i in range(len(b)) for j in range(len(b))) == Fraction(1, 6)


def test_explicit_means_strictly_lower_triangular() -> None:
    implicit = {t.name for t in TABLEAUX if not t.explicit}
    assert implicit == {"backward Euler", "implicit midpoint", "trapezoidal", "Radau IIA, order 3"}


def test_stages_that_do_not_matter_do_not_lower_the_radius() -> None:
    F = Fraction
    unused = th.ButcherTableau(((), (F(7),)), (F(1), F(0)))  # the second stage never reaches the result
    assert th.circle_contractivity_radius(unused) == 1.0
    twins = th.ButcherTableau(((), ()), (F(2), F(-1)))  # two equal stages: Euler in disguise
    assert th.circle_contractivity_radius(twins) == 1.0
    hidden = th.ButcherTableau(((), (), (F(1), F(-1))), (F(0), F(0), F(1)))  # equal stages that cancel
    assert th.circle_contractivity_radius(hidden) == 1.0


def test_floats_are_taken_exactly_and_malformed_tableaux_are_refused() -> None:
    assert th.circle_contractivity_radius(th.ButcherTableau(((), (2 / 3,)), (0.25, 0.75))) == pytest.approx(0.7912878)
    for A, b in [(((),), ()), (((),), (1.0, 0.0)), (((1.0, 1.0),), (1.0,)), (((),), (0.5,)), (((),), (math.nan,))]:
        with pytest.raises(ValueError, match=r"tableau|weights"):
            th.ButcherTableau(A, b)
    for make in (lambda: th.ssprk2(1), lambda: th.substepped_euler(0)):
        with pytest.raises(ValueError, match="at least"):
            make()
