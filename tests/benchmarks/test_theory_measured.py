"""No law is contradicted by what real operators do, every tight one is attained, and every limit is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stableopt import theory
from tests.benchmarks.theory_measured import LAWS, PARTS, line, page
from tests.benchmarks.theory_rows import SMALL, Row, Size
from tests.benchmarks.theory_steps import edges


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_measured_never_exceeds_theory_and_witnesses_attain_it(law: Callable[[Size], list[Row]]) -> None:
    rows = law(SMALL)
    assert [line(row) for row in rows if row.broken] == []
    assert all(row.part[:2] in PARTS for row in rows)
    for row in rows:
        if row.kind == "witness":
            assert 0.95 <= row.ratio <= 1 + row.rounding
        elif row.kind == "beyond":
            assert row.ratio > 1
        else:
            assert row.ratio <= 1 + row.rounding
            assert row.rounding < 1e-9 or not row.tight
    for name in {row.law for row in rows if row.kind == "search" and row.tight}:
        assert any(row.kind == "witness" for row in rows if row.law == name), name


def test_a_law_that_is_contradicted_is_said_to_be() -> None:
    rows = [
        Row("T2", "law", "fine", "search", 1.0, 1.0 + 1e-15, 1e-14),
        Row("T2", "law", "too large", "search", 1.0, 1.0 + 1e-12, 1e-14),
        Row("T2", "law", "not attained", "witness", 1.0, 0.9, 1e-14),
        Row("T2", "law", "a cautious limit", "beyond", 1.0, 1.0, 0.0),
        Row("T4", "law", "promised more than real", "search", 1.0, 0.9, 1e-14, lower=True),
        Row("T4", "law", "rose", "search", 1.0, 0.0, 1e-14, lower=True),
    ]
    assert [row.broken for row in rows] == [False, True, True, True, True, True]
    text = page(rows, SMALL)
    assert "6 rows, 5 of them against the theory" in text
    assert text.count("**broken**") == 5


@pytest.mark.parametrize(
    ("factor", "kinds"), [(1.0, set()), (1.0001, {"search", "witness"}), (0.98, {"witness", "beyond"})]
)
def test_a_limit_that_is_off_to_either_side_is_seen(
    factor: float, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = theory.heavy_ball_edge
    monkeypatch.setattr(theory, "heavy_ball_edge", lambda *args: factor * edge(*args))
    broken = {row.kind for row in edges(Size(draws=10, climb=0, dimension=4)) if row.broken}
    assert broken == kinds
