"""A record survives its line of JSON, and nothing else passes for one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.lyapunov import ACTIONS, KINDS, POLICIES, VERDICTS, Event, StepRecord

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
]
"""What every line has."""
FLOATS = ["loss", "energy_before", "energy_after", "dissipation", "predicted", "tolerance", "scale", "displacement"]
LATER = [
    "grad_norm", "weight_norm", "slope", "loss_after", "trust", "batch_sharpness", "edge_distance", "sharpness", "edge",
    "plain_sharpness", "sharpness_residual", "trace", "trace_error", "noise_scale", "forward_exponent", "weight_exponent",
    "overhead",
]  # fmt: skip
TABLES = ["norms", "limits", "cfl", "norm_gap", "grad_norms", "update_ratio", "kinks", "gains", "growth"]

floats = st.floats(allow_nan=True, allow_infinity=True)
tables = st.dictionaries(st.text(max_size=8), floats, max_size=3)
words = st.text(max_size=8)
events = st.builds(
    Event,
    step=st.integers(0, 2**63),
    kind=st.sampled_from(KINDS),
    channel=words,
    action=st.sampled_from(POLICIES),
    what=words,
    evidence=words,
    since=st.integers(0, 9),
    advice=words,
    statistic=floats,
    threshold=floats,
)
records = st.builds(
    StepRecord,
    step=st.integers(0, 2**63),
    **dict.fromkeys([*FLOATS, *LATER], floats),
    verdict=st.sampled_from(VERDICTS),
    action=st.sampled_from(ACTIONS),
    reason=st.text(max_size=30),
    trials=st.integers(0, 9),
    lr=st.lists(floats, max_size=3).map(tuple),
    hvp=words,
    nonfinite=st.lists(words, max_size=2).map(tuple),
    notes=st.lists(words, max_size=2).map(tuple),
    events=st.lists(events, max_size=2).map(tuple),
    **dict.fromkeys(TABLES, tables),
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
    assert all(same(getattr(again, name), getattr(record, name)) for name in [*FLOATS, *LATER])
    assert len(again.lr) == len(record.lr)
    assert all(map(same, again.lr, record.lr))
    for name in TABLES:
        ours, theirs = getattr(again, name), getattr(record, name)
        assert ours.keys() == theirs.keys()
        assert all(same(ours[key], theirs[key]) for key in ours)
    for name in ("step", "trials", "verdict", "action", "reason", "hvp", "nonfinite", "notes"):
        assert getattr(again, name) == getattr(record, name)
    assert [str(event.as_dict()) for event in again.events] == [str(event.as_dict()) for event in record.events]


@given(records)
def test_the_line_is_strict_json_with_the_agreed_keys_in_alphabetical_order(record):
    def refuse(literal):
        raise AssertionError(literal)

    line = record.to_json()
    assert "\n" not in line
    assert line.isascii()
    data = json.loads(line, parse_constant=refuse)
    assert list(data) == sorted(data)
    assert {*KEYS} <= data.keys() <= {*KEYS, *LATER, *TABLES, "hvp", "nonfinite", "events", "notes"}
    assert not any(data[key] in ("nan", "", [], {}) for key in data.keys() - {*KEYS})  # unknown or empty is left out
    assert data["schema"] == 2
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


@pytest.mark.parametrize("key", sorted(KEYS))
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
        spoiled(schema=3),
        spoiled(schema=0),
        spoiled(schema=1, trust=1.0),
        spoiled(nonfinite="loss"),
        spoiled(nonfinite=[1]),
        spoiled(events={}),
        spoiled(events=[1]),
        spoiled(events=[{"step": 1}]),
        spoiled(
            events=[
                Event(1, "alarm", "level", "warn", "up").as_dict() | {"kind": "rumor", "statistic": 1, "threshold": 1}
            ]
        ),
        spoiled(hvp=1),
        spoiled(kinks=[]),
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


def test_records_of_the_first_schema_are_read():
    data = json.loads(StepRecord(step=3, loss=2.0).to_json()) | {"schema": 1}
    assert StepRecord.from_json(json.dumps(data)).loss == 2.0
    assert StepRecord.from_json(json.dumps(data | {"norm_gap": {"a": 1.5}})).norm_gap == {"a": 1.5}


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ({"step": -1}, ValueError),
        ({"since": 1.0}, ValueError),
        ({"kind": "rumor"}, ValueError),
        ({"action": "panic"}, ValueError),
        ({"what": 3}, TypeError),
        ({"statistic": "high"}, TypeError),
        ({"threshold": True}, TypeError),
    ],
)
def test_an_event_of_the_wrong_kind_is_refused(bad, kind):
    good = {"step": 1, "kind": "alarm", "channel": "level", "action": "warn", "what": "the loss went up"}
    with pytest.raises(kind, match=next(iter(bad))):
        Event(**good | bad)
