"""Whatever byte a run dies at, the whole lines are there, and the run can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings

import pytest

from stableopt.lyapunov import JSONLSink, Sink, StepRecord, read_records, truncate_records
from stableopt.lyapunov.sinks import last_step


def write(path, steps):
    sink = JSONLSink(path)
    for step in steps:
        sink.write(StepRecord(step=step, loss=1 / step, reason="ü"))
    sink.close()
    return path


def steps(path):
    return [record.step for record in read_records(path)]


def test_cut_at_any_byte_the_whole_lines_are_read_and_the_run_goes_on(tmp_path):
    content = write(tmp_path / "all.jsonl", (1, 2, 3)).read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        whole = sum(cut >= end - 1 for end in ends)  # a line that lacks only its line break is whole
        assert steps(path) == [1, 2, 3][:whole], cut
        write(path, (9,))
        assert steps(path) == [*[1, 2, 3][:whole], 9], cut
        assert path.read_bytes().endswith(b"}\n")


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


def test_a_path_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    sink = JSONLSink(tmp_path / "file" / "energy.jsonl")
    with pytest.warns(RuntimeWarning, match="training goes on"):
        sink.write(StepRecord(step=1))
    assert sink.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.write(StepRecord(step=2))
        sink.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_one_warning():
    sink = JSONLSink("/dev/full")
    with pytest.warns(RuntimeWarning, match="cannot write"):
        sink.write(StepRecord(step=1))
    sink.write(StepRecord(step=2))  # a warning here would be an error
    sink.close()
    assert sink.disabled


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


def test_a_crash_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "energy.jsonl", (1, 2, 3))
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        truncate_records(path, 1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["energy.jsonl"]


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_truncating_needs_a_step(tmp_path, step):
    path = write(tmp_path / "a.jsonl", (1, 2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="integer >= 0"):
        truncate_records(path, step)
    assert path.read_bytes() == before
    assert truncate_records(tmp_path / "none.jsonl", 3) == 0


def test_a_sink_is_a_write_method():
    with pytest.raises(TypeError):
        Sink()  # type: ignore[abstract]

    class Count(Sink):
        seen = 0

        def write(self, record):
            self.seen += 1

    sink = Count()
    sink.write(StepRecord(step=1))
    sink.close()
    assert sink.seen == 1


def test_the_last_step_is_known_at_whatever_byte_a_run_died(tmp_path):
    content = write(tmp_path / "all.jsonl", (1, 2, 30)).read_bytes()
    path = tmp_path / "cut.jsonl"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert last_step(path) == max(steps(path), default=0), cut
    assert last_step(tmp_path / "none.jsonl") == 0


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
