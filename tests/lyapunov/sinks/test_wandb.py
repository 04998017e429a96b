"""What was recorded is what W&B is given, without network, and only a run of our own is finished."""

from __future__ import annotations

import importlib
import json
import random
import struct
import sys

import numpy as np
import pytest
import torch

from stableopt.lyapunov import StepRecord
from stableopt.lyapunov.sinks import WandbSink, scalars


class Run:
    def __init__(self):
        self.calls = []
        self.finished = 0

    def log(self, data, step=None, commit=None):
        self.calls.append((step, data))

    def finish(self):
        self.finished += 1


def record(step):
    return StepRecord(step=step, loss=1 / step, trust=0.5, lr=(0.1,), norms={"0.weight": 2.0})


def test_a_run_gets_the_scalars_and_stays_open():
    run = Run()
    sink = WandbSink(run)
    for step in (1, 2):
        sink.write(record(step))
    sink.close()
    sink.write(record(3))
    assert run.calls == [(step, scalars(record(step))) for step in (1, 2, 3)]
    assert run.finished == 0


@pytest.fixture
def fake(monkeypatch):
    """In the place of the package: it keeps what it was asked."""

    class Fake:
        def __init__(self):
            self.runs, self.arguments = [], []

        def init(self, **arguments):
            self.arguments.append(arguments)
            self.runs.append(Run())
            return self.runs[-1]

    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return module


def test_a_run_of_its_own_is_offline_begins_at_the_first_record_and_is_finished_once(fake):
    sink = WandbSink(project="stability")
    sink.close()
    assert fake.runs == []
    sink.write(record(1))
    sink.write(record(2))
    sink.close()
    sink.close()
    assert fake.arguments == [{"mode": "offline", "project": "stability"}]
    assert [step for step, _ in fake.runs[0].calls] == [1, 2]
    assert fake.runs[0].finished == 1


def test_the_mode_is_yours(fake):
    WandbSink(mode="online").write(record(1))
    assert fake.arguments == [{"mode": "online"}]


def test_a_run_that_does_not_begin_costs_one_warning(fake):
    def init(**_):
        raise RuntimeError("no service")

    fake.init = init
    sink = WandbSink()
    with pytest.warns(RuntimeWarning, match="no service"):
        sink.write(record(1))
    sink.write(record(2))
    sink.close()


def test_wrong_arguments_are_refused(fake):
    with pytest.raises(TypeError, match="log"):
        WandbSink(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a run and project"):
        WandbSink(Run(), project="a")


def test_without_the_package_the_sink_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install wandb.*log"):
        WandbSink()


def test_the_real_one_offline_keeps_every_step_and_touches_no_random_state(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    sink = WandbSink(dir=str(tmp_path), project="stability", settings=wandb.Settings(console="off"))
    for step in (1, 2, 3):
        sink.write(record(step))
    assert not sink.disabled
    assert wandb.run.settings.mode == "offline"
    sink.close()
    assert wandb.run is None
    assert torch.equal(state[0], torch.get_rng_state())
    assert random.getstate() == state[2]
    assert all(map(np.array_equal, state[1], np.random.get_state()))  # noqa: NPY002
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert history(next(folder.glob("*.wandb"))) == [{**scalars(record(step)), "_step": step} for step in (1, 2, 3)]


def history(path):
    """What a short offline run holds of each step, but its clock."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, rows = path.read_bytes(), 7, []
    assert len(content) < 1 << 15  # one block: every message is whole, after its checksum, length and kind
    while at < len(content):
        length, kind = struct.unpack_from("<HB", content, at + 4)
        assert kind == 1
        message = messages.Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if message.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item
            }
            rows.append({name: value for name, value in items.items() if name not in {"_timestamp", "_runtime"}})
    return rows
