"""T3h in every norm: convex combinations of Euler steps."""

from __future__ import annotations

import numpy as np
import pytest

import stableopt.theory as th

RADII = [
    (th.EULER, 1.0), (th.MIDPOINT, 0.0), (th.HEUN, 1.0), (th.RALSTON, 0.5), (th.KUTTA3, 0.0), (th.HEUN3, 0.0), (th.RK4, 0.0),
    (th.RK4_38, 0.0), (th.DOPRI5, 0.0), (th.SSPRK33, 1.0), (th.SSPRK43, 2.0), (th.SSPRK104, 6.0), (th.ssprk2(4), 3.0),
    (th.substepped_euler(3), 3.0),
]  # fmt: skip


@pytest.mark.parametrize(("tableau", "radius"), RADII, ids=lambda x: getattr(x, "name", str(x)))
def test_the_radius_is_the_known_one_and_never_above_that_of_the_circle(
    tableau: th.ButcherTableau, radius: float
) -> None:
    found = th.monotonicity_radius(tableau)
    assert found == pytest.approx(radius, rel=1e-12)
    assert found <= th.circle_contractivity_radius(tableau)


@pytest.mark.parametrize("tableau", [t for t, r in RADII if r > 0], ids=lambda t: t.name)
@pytest.mark.parametrize("q", [1.0, 0.8, 1.1])
def test_the_factor_bounds_every_switching_field_in_the_maximum_norm(tableau: th.ButcherTableau, q: float) -> None:
    """Stage i sees its own derivative; all of them have Euler steps of norm at most q at the length 1/r."""
    g = np.random.default_rng(0)
    r = th.monotonicity_radius(tableau)
    factor = th.monotone_factor(tableau, r, q)
    A, b = np.array(tableau.A, dtype=float), np.array(tableau.b, dtype=float)
    for _ in range(50):
        slopes, stages = [], []
        for _ in range(tableau.stages):
            E = g.standard_normal((3, 3)) * g.integers(0, 2, (3, 3))
            E *= q / max(np.abs(E).sum(1).max(), 1e-9)
            slopes.append(r * (E - np.eye(3)))  # (E - I) / (tau / r), tau = 1
        for i in range(tableau.stages):
            stages.append(np.eye(3) + sum((A[i, j] * slopes[j] @ stages[j] for j in range(i)), np.zeros((3, 3))))
        step = np.eye(3) + sum(b[i] * slopes[i] @ stages[i] for i in range(tableau.stages))
        assert np.abs(step).sum(1).max() <= factor * (1 + 1e-12)
    assert (factor < 1) is (q < 1)
    linear = np.ones(tableau.stages)  # and f(h) = -r(1 - q)h attains it
    for i in range(tableau.stages):
        linear[i] = 1 - r * (1 - q) * (A[i] @ linear - A[i, i:] @ linear[i:])
    assert 1 - r * (1 - q) * b @ linear == pytest.approx(factor, rel=1e-12)


def test_smaller_radii_are_allowed_and_larger_ones_and_other_methods_refused() -> None:
    assert th.monotone_factor(th.HEUN, 0.5, 1.0) == 1.0
    for tableau, radius in ((th.HEUN, 1.5), (th.RK4, 1.0), (th.HEUN, 0.0), (th.BACKWARD_EULER, 1.0)):
        with pytest.raises(ValueError, match="no convex combination"):
            th.monotone_factor(tableau, radius, 0.5)
    with pytest.raises(ValueError, match="explicit method"):
        th.monotonicity_radius(th.TRAPEZOIDAL)
