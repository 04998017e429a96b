"""The last records, and no more of them."""

from __future__ import annotations

import math

import pytest

from stableopt.lyapunov import StepRecord
from stableopt.lyapunov.sinks import MemorySink


def filled(keep, steps):
    sink = MemorySink(keep)
    for step in steps:
        sink.write(StepRecord(step=step, loss=1.0 / step, trust=math.inf, norms={"a": step} if step % 2 else {}))
    return sink


@pytest.mark.parametrize("keep", [1, 3, 7])
def test_the_last_records_are_kept_in_order(keep):
    sink = filled(keep, range(1, 6))
    assert sink.column("step") == list(range(1, 6))[-keep:]
    assert len(sink) == min(keep, 5)
    assert [record.step for record in sink] == sink.column("step")
    assert sink.column("loss") == [1.0 / step for step in sink.column("step")]


def test_a_column_is_a_field_or_a_name_of_a_dashboard():
    sink = filled(9, (1, 2, 3))
    assert sink.column("trust") == [math.inf] * 3  # a field as it is
    assert sink.column("norms") == [{"a": 1.0}, {}, {"a": 3.0}]
    first, second, third = sink.column("norm/a")
    assert (first, third) == (1.0, 3.0)
    assert math.isnan(second)
    with pytest.raises(KeyError, match="norm/a"):
        sink.column("norm/b")
    with pytest.raises(KeyError, match="none"):
        MemorySink().column("trust/rho")
    assert MemorySink().column("loss") == []


def test_cut_back():
    sink = filled(3, range(1, 6))
    sink.truncate(4)
    assert sink.column("step") == [3, 4]
    sink.truncate(0)
    assert len(sink) == 0


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, None])
def test_a_wrong_number_is_refused(keep):
    with pytest.raises(ValueError, match="integer >= 1"):
        MemorySink(keep)
