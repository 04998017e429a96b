"""A sink that cannot go on says so once; a mistake in a sink is not hidden."""

from __future__ import annotations

import os
import warnings

import pytest

from stableopt.lyapunov import JSONLSink, Sink, StepRecord
from stableopt.lyapunov.sinks import CSVSink, FileSink


def test_a_sink_is_a_write_method():
    with pytest.raises(TypeError):
        Sink()  # type: ignore[abstract]

    class Count(Sink):
        seen = 0

        def write(self, record):
            self.seen += 1

    sink = Count()
    sink.write(StepRecord(step=1))
    sink.truncate(0)
    sink.close()
    assert sink.seen == 1


@pytest.mark.parametrize("kind", [JSONLSink, CSVSink])
def test_a_path_that_cannot_be_written_costs_one_warning(tmp_path, kind):
    (tmp_path / "file").write_text("")
    sink = kind(tmp_path / "file" / "energy")
    with pytest.warns(RuntimeWarning, match="training goes on"):
        sink.write(StepRecord(step=1))
    assert sink.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.write(StepRecord(step=2))
        sink.close()


class Lines(FileSink):
    def begin(self):
        pass

    def line(self, record):
        return f"{record.step}\n".encode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("make", [lambda: Lines("/dev/full"), lambda: JSONLSink("/dev/full")])
def test_a_full_disk_costs_one_warning(make):
    sink = make()
    with pytest.warns(RuntimeWarning, match=r"cannot write .*No space left"):
        sink.write(StepRecord(step=1))
    sink.write(StepRecord(step=2))  # a warning here would be an error
    sink.close()
    assert sink.disabled


def test_the_warning_may_be_an_error_and_the_sink_is_disabled_all_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    sink = JSONLSink(tmp_path / "file" / "energy.jsonl")
    with pytest.raises(RuntimeWarning):  # warnings are errors in these tests
        sink.write(StepRecord(step=1))
    sink.write(StepRecord(step=2))


def test_a_mistake_in_a_line_reaches_the_caller(tmp_path):
    class Wrong(Lines):
        def line(self, record):
            raise KeyError("wrong")

    sink = Wrong(tmp_path / "a")
    with pytest.raises(KeyError, match="wrong"):
        sink.write(StepRecord(step=1))
    assert not sink.disabled
    sink.close()


def test_a_line_is_with_the_operating_system_before_the_next(tmp_path):
    sink = Lines(tmp_path / "new" / "a")
    for step in (1, 2):
        sink.write(StepRecord(step=step))
        assert sink.path.read_text().count("\n") == step
    sink.close()
    sink.close()
    sink.write(StepRecord(step=3))
    sink.close()
    assert sink.path.read_text() == "1\n2\n3\n"
