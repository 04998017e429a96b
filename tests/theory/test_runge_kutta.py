"""T3h: circle contractivity, against adversarial gradient fields."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    ("tableau", "stages", "radius"), [row for row in TABLE if row[0].explicit], ids=lambda x: getattr(x, "name", str(x))
)
def test_the_radius_of_plain_floats_is_that_of_the_table_to_ten_digits(
    tableau: th.ButcherTableau, stages: int, radius: float
) -> None:
    floats = [[float(a) for a in row] for row in tableau.A]
    assert th.circle_radius(floats, [float(b) for b in tableau.b]) == pytest.approx(radius, rel=1e-10, abs=1e-10)
    assert th.circle_radius(np.array(floats), np.array([float(b) for b in tableau.b])) == pytest.approx(
        radius, abs=1e-9
    )
    assert th.circle_radius(tableau.A, tableau.b) == th.circle_contractivity_radius(tableau)


def test_coefficients_that_are_no_method_are_refused() -> None:
    for A, b in [([[]], [0.5]), ([[math.nan]], [1.0]), ([[]], [math.inf]), ([], []), ([[], [0.5]], [1.0])]:
        with pytest.raises(ValueError, match=r"tableau|weights"):
            th.circle_radius(A, b)


def climbed(t: th.ButcherTableau, tau: float, *, starts: int = 60, steps: int = 60) -> float:
    """The largest norm that gradient ascent finds over convex 1-smooth functions in the plane that switch between the stages.

    Half of the starts are random; the others have rank one along nearly the same direction, where near the limit the expansion is.
    """
    g = torch.Generator().manual_seed(0)
    tilts = torch.logspace(-2, 0, starts // 2).unsqueeze(1) * torch.randn(starts // 2, t.stages, generator=g)
    angle = torch.cat([tilts, math.pi * torch.rand(starts - starts // 2, t.stages, generator=g)]).requires_grad_()
    spread = torch.cat([torch.ones(starts // 2, t.stages), torch.rand(starts - starts // 2, t.stages, generator=g)])
    other = torch.cat([torch.zeros(starts // 2, t.stages), torch.rand(starts - starts // 2, t.stages, generator=g)])
    spread[-1], other[-1] = 1.0, 1.0  # the whole identity at every stage
    opt, best = torch.optim.Adam([angle], lr=0.05), 0.0
    for _ in range(steps):
        v = torch.stack([angle.cos(), angle.sin()], -1)
        w = torch.stack([-angle.sin(), angle.cos()], -1)
        S = (
            spread[..., None, None] * v[..., :, None] * v[..., None, :]
            + other[..., None, None] * w[..., :, None] * w[..., None, :]
        )
        slopes: list[torch.Tensor] = []
        for i, row in enumerate(t.A):
            stage = torch.eye(2) + tau * sum(
                (float(a) * k for a, k in zip(row, slopes, strict=False) if a), torch.zeros(2, 2)
            )
            slopes.append(-S[:, i] @ stage)
        step = torch.eye(2) + tau * sum(
            (float(b) * k for b, k in zip(t.b, slopes, strict=True) if b), torch.zeros(2, 2)
        )
        norms = torch.linalg.matrix_norm(step, 2)
        best = max(best, float(norms.detach().max()))
        opt.zero_grad()
        (-norms.sum()).backward()
        opt.step()
    return best


FINITE = [t for t, _, radius in TABLE if t.explicit and radius > 0]


@pytest.mark.slow
@pytest.mark.parametrize("tableau", FINITE, ids=lambda t: t.name)
def test_two_per_cent_beyond_the_limit_a_field_is_found_that_expands_and_none_at_the_limit(
    tableau: th.ButcherTableau,
) -> None:
    limit = th.runge_kutta_max_step(tableau, 1.0)
    assert climbed(tableau, limit) <= 1 + 1e-12
    assert climbed(tableau, 1.02 * limit, starts=120, steps=150) > 1 + 1e-7


def test_a_little_beyond_the_limit_of_rk4_a_field_is_found_that_expands() -> None:
    limit = th.runge_kutta_max_step(RK4, 1.0)
    assert climbed(RK4, limit, starts=40, steps=20) <= 1 + 1e-12
    assert climbed(RK4, 1.02 * limit, starts=40, steps=40) > 1 + 1e-7


@pytest.mark.parametrize(("tau", "least"), [(0.25, 2.5e-4), (0.5, 2.5e-3), (1.0, 0.03)])
def test_the_midpoint_rule_expands_at_every_step(tau: float, least: float) -> None:
    assert climbed(MIDPOINT, tau, starts=20, steps=40) > 1 + least


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
