"""A table keeps its columns, reads back exactly, and goes on after a crash."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.lyapunov import StepRecord
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.sinks import COLUMNS, CSVSink


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path, steps):
    sink = CSVSink(path)
    for step in steps:
        sink.write(StepRecord(step=step, loss=1 / step, lr=(0.1, 0.2), reason='a "quoted", thing'))
    sink.close()
    return path


def test_the_columns_are_every_field_but_the_tables():
    tables = {item.name for item in fields(StepRecord) if str(item.type).startswith("Mapping")}
    assert set(COLUMNS) == {item.name for item in fields(StepRecord)} - tables
    assert len(COLUMNS) == len(set(COLUMNS))
    assert COLUMNS[:4] == ("step", "verdict", "action", "loss")  # a table that is there depends on the order


floats = st.floats(allow_nan=True, allow_infinity=True)


@given(floats, floats, st.text(max_size=20), st.lists(st.text(max_size=5), max_size=3))
@example(-0.0, 5e-324, 'a\r\nb,"c"\u2028\0\ud800', ["param:a,b", "\n"])
def test_a_row_reads_back_what_was_written(tmp_path_factory, loss, trust, reason, names):
    path = tmp_path_factory.getbasetemp() / "row.csv"
    path.unlink(missing_ok=True)
    event = Event(2, "alarm", "level", "warn", reason, "e", 1, "a")
    record = StepRecord(
        step=2, loss=loss, trust=trust, reason=reason, nonfinite=tuple(names), events=(event,), lr=(loss,)
    )
    sink = CSVSink(path)
    sink.write(record)
    sink.close()
    assert path.read_bytes().count(b"\n") == 2  # header and row
    (row,) = rows_of(path)
    for name, value in (("loss", loss), ("trust", trust)):
        assert repr(float(row[name])) == repr(value)
    assert repr(float(json.loads(row["lr"])[0])) == repr(loss)
    assert json.loads(row["nonfinite"]) == names
    assert json.loads(row["events"]) == [str(event)]
    assert row["reason"] == " ".join(reason.splitlines()).encode("utf-8", "backslashreplace").decode()
    assert (row["step"], row["verdict"], row["energy_after"]) == ("2", "unobserved", "nan")


def test_a_table_cut_at_any_byte_goes_on_with_the_rows_that_ended(tmp_path):
    content = write(tmp_path / "all.csv", (1, 2)).read_bytes()
    path = tmp_path / "cut.csv"
    header = content.index(b"\n")
    for cut in (*range(0, header, 29), *range(header - 1, len(content) + 1)):
        path.write_bytes(content[:cut])
        whole = max(content[:cut].count(b"\n") - 1, 0)
        write(path, range(whole + 1, 3))
        assert path.read_bytes() == content[: cut if whole == 2 else None], cut


def test_the_header_comes_once(tmp_path):
    path = tmp_path / "new" / "a.csv"
    for steps in ((1, 2), (3,), ()):
        write(path, steps)
    assert [row["step"] for row in rows_of(path)] == ["1", "2", "3"]
    assert path.read_text().count("verdict") == 1


def test_a_table_with_fewer_columns_keeps_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n1,0.5\n")
    write(path, (2,))
    assert path.read_text() == "step,loss\n1,0.5\n2,0.5\n"


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"loss,step\n", b'{"step": 1}\n', b"\xff\n", b"x", b"step,later\n"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CSVSink needs a new file"):
        CSVSink(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("last", range(5))
def test_cut_back_and_continued_is_uninterrupted(tmp_path, last):
    whole = write(tmp_path / "whole.csv", range(1, 5)).read_bytes()
    path = write(tmp_path / "cut.csv", range(1, 5))
    with path.open("ab") as file:
        file.write(b"5,decr")
    CSVSink(path).truncate(last)
    assert [int(row["step"]) for row in rows_of(path)] == list(range(1, last + 1))
    write(path, range(last + 1, 5))
    assert path.read_bytes() == whole


def test_cutting_back_needs_rows_that_begin_with_a_step(tmp_path):
    path = write(tmp_path / "a.csv", (1, 2))
    path.write_bytes(path.read_bytes() + b"x,y\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not with a step"):
        CSVSink(path).truncate(1)
    assert path.read_bytes() == before
    CSVSink(tmp_path / "none.csv").truncate(0)
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_one_warning():
    sink = CSVSink("/dev/full")
    with pytest.warns(RuntimeWarning, match="training goes on"):
        sink.write(StepRecord(step=1, loss=math.inf))
    sink.write(StepRecord(step=2))
    assert sink.disabled
