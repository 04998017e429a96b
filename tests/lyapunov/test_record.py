"""A record survives its line of JSON, and nothing else passes for one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.lyapunov import ACTIONS, VERDICTS, StepRecord

KEYS = [
    "schema",
    "step",
    "loss",
    "energy_before",
    "energy_after",
    "dissipation",
    "predicted",
    "tolerance",
    "verdict",
    "action",
    "reason",
    "scale",
    "trials",
    "lr",
    "displacement",
    "norms",
    "limits",
    "cfl",
    "norm_gap",
]
FLOATS = ["loss", "energy_before", "energy_after", "dissipation", "predicted", "tolerance", "scale", "displacement"]

floats = st.floats(allow_nan=True, allow_infinity=True)
tables = st.dictionaries(st.text(max_size=8), floats, max_size=3)
records = st.builds(
    StepRecord,
    step=st.integers(0, 2**63),
    **dict.fromkeys(FLOATS, floats),
    verdict=st.sampled_from(VERDICTS),
    action=st.sampled_from(ACTIONS),
    reason=st.text(max_size=30),
    trials=st.integers(0, 9),
    lr=st.lists(floats, max_size=3).map(tuple),
    norms=tables,
    limits=tables,
    cfl=tables,
    norm_gap=tables,
)


def same(a: float, b: float) -> bool:
    """Equal as numbers and in the sign of zero, or both NaN."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@given(records)
@example(StepRecord(step=1, loss=-0.0, energy_before=5e-324, energy_after=math.inf, dissipation=-math.inf))
@example(StepRecord(step=0, reason='line\nbreak "quoted" \u2028 \U0001f600'))
def test_a_record_is_read_back_bit_for_bit(record):
    line = record.to_json()
    again = StepRecord.from_json(line)
    assert again.to_json() == line
    assert all(same(getattr(again, name), getattr(record, name)) for name in FLOATS)
    assert len(again.lr) == len(record.lr)
    assert all(map(same, again.lr, record.lr))
    for name in ("norms", "limits", "cfl", "norm_gap"):
        ours, theirs = getattr(again, name), getattr(record, name)
        assert ours.keys() == theirs.keys()
        assert all(same(ours[key], theirs[key]) for key in ours)
    assert (again.step, again.trials, again.verdict, again.action, again.reason) == (
        record.step,
        record.trials,
        record.verdict,
        record.action,
        record.reason,
    )


@given(records)
def test_the_line_is_strict_json_with_the_agreed_keys_in_alphabetical_order(record):
    def refuse(literal):
        raise AssertionError(literal)

    line = record.to_json()
    assert "\n" not in line
    assert line.isascii()
    data = json.loads(line, parse_constant=refuse)
    assert list(data) == sorted(KEYS)
    assert data["schema"] == 1
    assert list(data["norms"]) == sorted(record.norms)


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_numbers_are_spelled(value, text):
    record = StepRecord(step=1, loss=value, lr=(value,), norms={"a": value})
    data = json.loads(record.to_json())
    assert data["loss"] == text
    assert data["lr"] == [text]
    assert data["norms"] == {"a": text}


def spoiled(**changes):
    data = json.loads(StepRecord(step=1).to_json())
    data.update(changes)
    return json.dumps(data)


@pytest.mark.parametrize("key", sorted({*KEYS} - {"norm_gap"}))  # measured later than the others
def test_every_key_is_required(key):
    data = json.loads(StepRecord(step=1).to_json())
    del data[key]
    with pytest.raises(ValueError, match=key):
        StepRecord.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "1",
        "[]",
        "null",
        '{"schema": 1',
        spoiled(schema=2),
        spoiled(schema=True),
        spoiled(schema="1"),
        spoiled(step=-1),
        spoiled(step=1.0),
        spoiled(step=True),
        spoiled(step=None),
        spoiled(trials=-1),
        spoiled(loss="high"),
        spoiled(loss="NaN"),
        spoiled(loss=None),
        spoiled(loss=True),
        spoiled(loss=math.nan),
        spoiled(loss=10**400),
        spoiled(verdict="fine"),
        spoiled(verdict=None),
        spoiled(action="skipped"),
        spoiled(reason=3),
        spoiled(lr=0.1),
        spoiled(lr=["a"]),
        spoiled(norms=[1.0]),
        spoiled(norms={"a": None}),
        spoiled(extra=1),
        StepRecord(step=1).to_json()[:-1] + ', "step": 2}',
        StepRecord(step=1).to_json() + " x",
        "[" * 100_000,
    ],
)
def test_what_is_not_a_record_is_refused(line):
    with pytest.raises(ValueError, match=r"."):  # of many kinds; what counts is that it is one
        StepRecord.from_json(line)


def test_a_record_does_not_change_with_the_tables_it_was_made_from():
    norms = {"a": 1.0}
    record = StepRecord(step=1, norms=norms)
    norms["a"] = 2.0
    assert record.norms == {"a": 1.0}
    with pytest.raises(AttributeError):
        record.step = 2  # type: ignore[misc]


@pytest.mark.parametrize("bad", [{"loss": None}, {"lr": 0.1}, {"reason": None}, {"norms": 3}, {"norms": {1: 1.0}}])
def test_a_field_of_the_wrong_type_is_refused(bad):
    with pytest.raises(TypeError):
        StepRecord(step=1, **bad)
