"""What was recorded is what TensorBoard reads."""

from __future__ import annotations

import importlib
import random
import sys

import numpy as np
import pytest
import torch

from stableopt.lyapunov import StepRecord
from stableopt.lyapunov.events import Event
from stableopt.lyapunov.sinks import TensorBoardSink, scalars

EVENT = Event(2, "alarm", "level", "warn", "the loss is high", "e = 3", 1, "look at the data")


class Writer:
    def __init__(self):
        self.calls = []

    def add_scalar(self, tag, value, step):
        self.calls.append((step, tag, value))


class TextWriter(Writer):
    def add_text(self, tag, text, step):
        self.calls.append((step, tag, text))


def record(step):
    return StepRecord(
        step=step, loss=1 / step, trust=0.5, lr=(0.1,), norms={"0.weight": 2.0}, events=(EVENT,) if step == 2 else ()
    )


@pytest.mark.parametrize("kind", [Writer, TextWriter])
def test_a_writer_gets_the_scalars_and_the_readings_if_it_takes_them(kind):
    writer = kind()
    sink = TensorBoardSink(writer)
    for step in (1, 2):
        sink.write(record(step))
    sink.truncate(1)
    sink.close()  # the writer is not ours to close
    expected = [(1, name, value) for name, value in scalars(record(1)).items()]
    expected += [(2, name, value) for name, value in scalars(record(2)).items()]
    expected += [(2, "alarms/level", 1.0)]
    if kind is TextWriter:
        expected += [(2, "events/level", str(EVENT))]
    assert writer.calls == expected
    assert all(isinstance(value, float) for step, name, value in writer.calls if not name.startswith("events"))


@pytest.mark.parametrize("wrong", [None, 3, object(), [Writer()]])
def test_what_is_no_writer_is_refused(wrong):
    with pytest.raises(TypeError, match="add_scalar"):
        TensorBoardSink(wrong)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_without_tensorboard_a_folder_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"pip install tensorboard.*add_scalar"):
        TensorBoardSink(kind(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def tensorboard():
    """The real one."""
    pytest.importorskip("tensorboard")
    return importlib.import_module("tensorboard.backend.event_processing.event_accumulator")


def curves(tensorboard, folder):
    accumulator = tensorboard.EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags["scalars"]}, tags["tensors"]


def test_tensorboard_reads_what_was_written(tensorboard, tmp_path):
    sink = TensorBoardSink(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for step in (1, 2, 3):
        sink.write(record(step))
    sink.close()
    assert torch.equal(state[0], torch.get_rng_state())
    assert random.getstate() == state[2]
    assert all(map(np.array_equal, state[1], np.random.get_state()))  # noqa: NPY002
    found, texts = curves(tensorboard, tmp_path / "runs")
    assert set(found) == {"loss", "trust/rho", "lr/0", "norm/0.weight", "alarms/level"}
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3, rel=1e-6))]  # TensorBoard keeps float32
    assert found["alarms/level"] == [(2, 1.0), (3, 1.0)]
    assert texts == ["events/level/text_summary"]


def test_a_resumed_run_replaces_the_later_steps(tensorboard, tmp_path):
    sink = TensorBoardSink(str(tmp_path), tables=False)
    for step in (1, 2, 3):
        sink.write(record(step))
    sink.truncate(1)
    for step in (2, 3):
        sink.write(StepRecord(step=step, loss=7.0))
    sink.close()
    sink.write(StepRecord(step=4, loss=7.0))  # goes on, and replaces nothing
    sink.close()
    found, _ = curves(tensorboard, tmp_path)
    assert found["loss"] == [(1, 1.0), (2, 7.0), (3, 7.0), (4, 7.0)]
    assert "norm/0.weight" not in found


def test_a_folder_that_cannot_be_made_costs_one_warning(tensorboard, tmp_path):
    (tmp_path / "file").write_text("")
    sink = TensorBoardSink(tmp_path / "file" / "runs")
    with pytest.warns(RuntimeWarning, match="TensorBoardSink cannot hand on step 1"):
        sink.write(record(1))
    sink.write(record(2))
    sink.close()
