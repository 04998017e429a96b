"""Three verdicts, and a tolerance that is computed."""

from __future__ import annotations

import math

import pytest

from stableopt.optim import StepReport, energy_tolerance, verdict_of


def test_the_verdict_changes_just_past_the_tolerance() -> None:
    tolerance = 2.0**-20
    assert verdict_of(1.0, 1.0 + tolerance, tolerance) == "undecided"
    assert verdict_of(1.0, 1.0 - tolerance, tolerance) == "undecided"
    assert verdict_of(1.0, 1.0 + tolerance * (1 + 2.0**-20), tolerance) == "increased"
    assert verdict_of(1.0, 1.0 - tolerance * (1 + 2.0**-20), tolerance) == "decreased"


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 0.0)])
def test_what_is_not_finite_is_no_decrease(pair: tuple[float, float]) -> None:
    assert verdict_of(*pair, 1.0) == "nonfinite"


def test_the_tolerance_grows_with_the_energy_and_never_vanishes() -> None:
    eps = 2.0**-23
    assert energy_tolerance(0.0, 0.0, eps) == 8 * eps
    assert energy_tolerance(-100.0, 1.0, eps) == 800 * eps
    assert energy_tolerance(1.0, 100.0, eps) == 800 * eps


def test_an_unobserved_step_claims_nothing() -> None:
    report = StepReport.unobserved(step=2, lr=(0.1, 0.2), reason="no closure")
    assert (report.action, report.verdict, report.lr) == ("unguarded", "unobserved", (0.1, 0.2))
    assert all(math.isnan(x) for x in (report.energy_before, report.energy_after, report.dissipation, report.predicted))
