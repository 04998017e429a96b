"""Whatever byte a run dies at, the whole lines are there, and the run can go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopt.lyapunov import JSONLSink, StepRecord, read_records, truncate_records
from stableopt.lyapunov.sinks import iter_records, last_step, verify_chain
from tests.lyapunov.sinks.files import plain, write
from tests.lyapunov.sinks.files import records_of as steps
from tests.lyapunov.test_record import records


def test_cut_at_any_byte_the_whole_lines_are_read_and_the_run_goes_on_as_if_uninterrupted(tmp_path):
    content = write(tmp_path / "all.jsonl", (1, 2)).read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    path = tmp_path / "cut.jsonl"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(cut >= end - 1 for end in ends)  # a line that lacks only its line break is whole
        assert steps(path) == [1, 2][:whole], cut
        assert last_step(path) == whole, cut
        write(path, range(whole + 1, 3))
        assert path.read_bytes() + b"\n" * (cut == len(content) - 1) == content, cut


@settings(max_examples=30)
@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_any_records_come_back_also_when_the_file_was_cut_and_continued(tmp_path_factory, some, data):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.unlink(missing_ok=True)
    some = [replace(record, step=step) for step, record in enumerate(some, start=1)]
    lines = [record.to_json() for record in some]
    whole = b""
    for _ in range(2):
        sink = JSONLSink(path)
        for record in some[len(read_records(path)) if path.exists() else 0 :]:
            sink.write(record)
        sink.close()
        assert [record.to_json() for record in read_records(path)] == lines
        assert whole in {b"", path.read_bytes()}
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2))])


def test_a_long_torn_line_is_removed_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", (1,))
    with path.open("ab") as file:
        file.write(b'{"reason": "' + b"x" * 200_000)
    write(path, (2,))
    assert steps(path) == [1, 2]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{" * 100_000)
    assert steps(path) == []
    write(path, (2,))
    assert steps(path) == [2]


@pytest.mark.slow
def test_a_killed_process_leaves_every_record_it_wrote(tmp_path):
    path = tmp_path / "runs" / "energy.jsonl"
    program = (
        "import os, signal, sys\n"
        "from stableopt.lyapunov import JSONLSink, StepRecord\n"
        "sink = JSONLSink(sys.argv[1])\n"
        "for step in range(1, 8):\n"
        "    sink.write(StepRecord(step=step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert steps(path) == list(range(1, 8))


@pytest.mark.parametrize(
    "damage",
    [
        b"x",
        b"\xff\xfe",
        b'{"schema": 1}',
        b"",
        b"nan",
    ],
)
def test_a_corrupt_line_is_named(tmp_path, damage):
    path = write(tmp_path / "energy.jsonl", (1, 2, 3))
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"energy\.jsonl, line 2 "):
        read_records(path)


@pytest.mark.parametrize("second", [1, 2])
def test_steps_must_rise(tmp_path, second):
    path = tmp_path / "energy.jsonl"
    path.write_text("".join(StepRecord(step=step).to_json() + "\n" for step in (2, second)), encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is of step"):
        read_records(path)
    path.write_text("".join(StepRecord(step=step).to_json() + "\n" for step in (2, 3)), encoding="utf-8")
    assert steps(path) == [2, 3]


def test_an_absent_file_is_an_error_and_an_empty_one_is_not(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert read_records(tmp_path / "empty.jsonl") == []


def test_a_closed_sink_appends_when_written_again(tmp_path):
    sink = JSONLSink(tmp_path / "a.jsonl")
    sink.close()
    for step in (1, 2):
        sink.write(StepRecord(step=step))
        sink.close()
        sink.close()
    assert steps(sink.path) == [1, 2]


def test_the_same_records_are_the_same_bytes(tmp_path):
    a, b = write(tmp_path / "a.jsonl", range(1, 6)), write(tmp_path / "b.jsonl", range(1, 6))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("last", range(6))
def test_truncated_and_continued_is_uninterrupted(tmp_path, last):
    whole = write(tmp_path / "whole.jsonl", range(1, 6)).read_bytes()
    path = write(tmp_path / "cut.jsonl", range(1, 6))
    assert truncate_records(path, last) == 5 - last
    assert steps(path) == list(range(1, last + 1))
    write(path, range(last + 1, 6))
    assert path.read_bytes() == whole


def test_truncating_keeps_the_mode_and_leaves_no_litter(tmp_path):
    path = write(tmp_path / "energy.jsonl", (1, 2))
    path.chmod(0o640)
    with path.open("ab") as file:
        file.write(b'{"torn')
    assert truncate_records(path, 2) == 0
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.read_bytes().endswith(b"}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["energy.jsonl"]


def test_truncating_touches_no_line_that_stays(tmp_path):
    path = tmp_path / "energy.jsonl"
    path.write_bytes(b"".join(plain(step, schema=1) + b"\n" for step in (1, 2, 3)))
    write(path, (4, 5, 6))
    lines = path.read_bytes().splitlines(keepends=True)
    for last in (5, 4, 3, 2, 0):
        truncate_records(path, last)
        assert path.read_bytes() == b"".join(lines[:last])
        assert verify_chain(path).chained == max(last - 3, 0)


def test_a_file_that_is_damaged_where_it_would_be_cut_is_left_as_it_is(tmp_path):
    path = write(tmp_path / "energy.jsonl", (1, 2, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    for place in (1, 2):
        path.write_bytes(b"".join([*lines[:place], b"x\n", *lines[place + 1 :]]))
        before = path.read_bytes()
        with pytest.raises(ValueError, match="last lines"):
            truncate_records(path, 1)
        assert path.read_bytes() == before


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_truncating_needs_a_step(tmp_path, step):
    path = write(tmp_path / "a.jsonl", (1, 2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="integer >= 0"):
        truncate_records(path, step)
    assert path.read_bytes() == before
    assert truncate_records(tmp_path / "none.jsonl", 3) == 0


def test_the_last_step_of_a_damaged_file_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", (1, 2))
    with path.open("ab") as file:
        file.write(b"x\n")
    with pytest.raises(ValueError, match="last line"):
        last_step(path)


def test_the_last_step_of_a_long_file_is_found(tmp_path):
    path = write(tmp_path / "a.jsonl", range(1, 400))
    assert path.stat().st_size > 1 << 16
    assert last_step(path) == 399
    with path.open("ab") as file:
        file.write(b"{" * 200_000)
    assert last_step(path) == 399


def test_a_damaged_last_line_is_not_taken_for_a_torn_one(tmp_path):
    path = write(tmp_path / "a.jsonl", (1, 2))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for check in (read_records, last_step, lambda p: truncate_records(p, 1)):
        with pytest.raises(ValueError, match="line"):
            check(path)
    write(path, (3,))  # it stays where it can be found
    with pytest.raises(ValueError, match="line 2 "):
        read_records(path)


def test_records_come_one_by_one_up_to_the_line_that_is_wrong(tmp_path):
    path = write(tmp_path / "a.jsonl", (1, 2, 3))
    path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 4'))
    found = iter_records(path)
    assert [next(found).step, next(found).step] == [1, 2]
    with pytest.raises(ValueError, match="line 3 does not follow"):
        next(found)


def test_a_sink_that_was_cut_back_goes_on_with_a_valid_chain(tmp_path):
    sink = JSONLSink(tmp_path / "a.jsonl")
    for step in (1, 2, 3):
        sink.write(StepRecord(step=step, loss=1 / step, reason="ü"))
    whole = sink.path.read_bytes()
    sink.truncate(1)
    for step in (2, 3):
        sink.write(StepRecord(step=step, loss=1 / step, reason="ü"))
    sink.close()
    assert sink.path.read_bytes() == whole


def test_to_continue_a_file_only_its_end_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", range(1, 1000))
    path.write_bytes(b"x" * 1000 + path.read_bytes()[1000:])  # what is wrong at the beginning is found by who reads it
    assert path.stat().st_size > 4 << 16
    assert last_step(path) == 999
    write(path, (1000,))
    assert truncate_records(path, 998) == 2
    with pytest.raises(ValueError, match="line 1 "):
        read_records(path)


def test_the_documentation_names_every_key():
    page = (Path(__file__).parents[3] / "docs" / "records.md").read_text(encoding="utf-8")
    table = page.partition("| key |")[2].partition("\n\n")[0]
    keys = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert keys == {item.name for item in fields(StepRecord)} | {"schema", "chain"}
    always = {name for row in table.splitlines() for name in re.findall(r"`(\w+)` •", row.split("|")[1])}
    assert always == {*json.loads(StepRecord(step=1).to_json()), "chain"}


def test_a_file_that_was_removed_begins_anew(tmp_path):
    sink = JSONLSink(tmp_path / "a.jsonl")
    for _ in range(2):
        sink.write(StepRecord(step=1))
        sink.close()
        assert verify_chain(sink.path).chained == 1
        sink.path.unlink()


def test_a_file_that_is_cut_while_a_sink_has_it_open_goes_on_with_a_valid_chain(tmp_path):
    whole = write(tmp_path / "whole.jsonl", range(1, 5)).read_bytes()
    sink = JSONLSink(tmp_path / "a.jsonl")
    for step in (1, 2, 3):
        sink.write(StepRecord(step=step, loss=1 / step, reason="ü"))
    truncate_records(sink.path, 1)
    for step in (2, 3, 4):
        sink.write(StepRecord(step=step, loss=1 / step, reason="ü"))
    sink.close()
    assert sink.path.read_bytes() == whole


class Interrupt(BaseException):
    """Like KeyboardInterrupt, but one that does not end the tests."""


class Interrupted:
    """A file in which an interrupt comes in the middle of a line, before it, or after it."""

    def __init__(self, file, share) -> None:
        self._file, self._share = file, share

    def write(self, line):
        self._file.write(line[: round(self._share * len(line))])
        raise Interrupt

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_interrupt_while_a_line_is_written_leaves_a_file_that_goes_on(tmp_path, share):
    sink = JSONLSink(tmp_path / "a.jsonl")
    sink.write(StepRecord(step=1))
    sink._file = Interrupted(sink._file, share)  # type: ignore[assignment]
    with pytest.raises(Interrupt):
        sink.write(StepRecord(step=2))
    for step in (3, 4):
        sink.write(StepRecord(step=step))  # a warning of another writer would be an error here
    sink.close()
    assert steps(sink.path) == [1, *([2] if share == 1.0 else []), 3, 4]
    assert verify_chain(sink.path).chained == len(steps(sink.path))


def test_an_interrupt_between_a_line_and_its_digest_does_not_count_as_a_line(tmp_path, monkeypatch):
    sink = JSONLSink(tmp_path / "a.jsonl")
    sink.write(StepRecord(step=1))

    def interrupted(self):
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepRecord, "to_json", interrupted)
        with pytest.raises(Interrupt):
            sink.write(StepRecord(step=2))
    with monkeypatch.context() as patch:
        patch.setattr(JSONLSink, "written", interrupted)
        with pytest.raises(Interrupt):
            sink.write(StepRecord(step=3))
    sink.write(StepRecord(step=4))
    sink.close()
    assert steps(sink.path) == [1, 3, 4]


def test_a_file_that_grows_while_it_is_read_is_read_up_to_the_line_that_was_not_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", (1, 2))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    found = iter_records(path)
    assert [next(found).step, next(found).step] == [1, 2]
    with path.open("ab") as file:
        file.write(b"\n")
    assert list(found) == []
