"""A run can be repeated, resumed, interrupted and verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stableopt import verify
from stableopt.cli.train import Settings, certify_run, train
from stableopt.lyapunov import read_records

QUICK = Settings(epochs=2, batch_size=256, seed=3)
ARTIFACTS = ("run.json", "energy.jsonl", "model.safetensors", "model.cert.json", "metrics.json")


@pytest.fixture(autouse=True)
def _as_a_user_runs_it() -> None:
    torch.set_default_dtype(torch.float32)


def artifacts(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ARTIFACTS}


@pytest.mark.parametrize(
    ("model", "optimizer"), [("mlp", "adamw"), ("mlp", "sgd"), ("resnet", "adamw"), ("cnn", "sgd")]
)
def test_a_run_leaves_a_verified_certificate_below_its_limit(tmp_path: Path, model: str, optimizer: str) -> None:
    metrics = train(Settings(model=model, optimizer=optimizer, epochs=1, batch_size=64, lipschitz=0.7), tmp_path)
    assert verify(tmp_path / "model.cert.json").verified
    assert metrics["lipschitz"] <= 0.7
    assert metrics["test_accuracy"] > 0.3
    accuracies = [metrics["test_accuracy"], *metrics["certified_accuracy"].values()]
    assert accuracies == sorted(accuracies, reverse=True)
    records = read_records(tmp_path / "energy.jsonl")
    assert len(records) == metrics["steps"] == sum(metrics["actions"].values()) == 23


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(QUICK, tmp_path / name)
    assert artifacts(tmp_path / "a") == artifacts(tmp_path / "b")
    train(Settings(epochs=2, batch_size=256, seed=4), tmp_path / "c")
    assert artifacts(tmp_path / "c")["model.safetensors"] != artifacts(tmp_path / "a")["model.safetensors"]


class Interrupt:
    """A user who presses Ctrl-C in the middle of an epoch."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, epoch: int, record: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def epoch(self, epoch: int, proved: float, accuracy: float) -> None:
        pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_and_resumed_run_has_the_bytes_of_an_uninterrupted_one(tmp_path: Path, optimizer: str) -> None:
    settings = Settings(optimizer=optimizer, epochs=3, batch_size=256)
    train(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "torn", progress=Interrupt(after=9))  # in the second of three epochs of six steps
    usable = certify_run(tmp_path / "torn")
    assert usable["epochs"] == 1
    assert verify(tmp_path / "torn" / "model.cert.json").verified
    train(settings, tmp_path / "torn", resume=True)
    assert artifacts(tmp_path / "torn") == artifacts(tmp_path / "whole")


def test_a_finished_run_can_be_continued_for_more_epochs(tmp_path: Path) -> None:
    first = train(Settings(epochs=1, batch_size=256), tmp_path)
    more = train(Settings(epochs=3, batch_size=256), tmp_path, resume=True)
    assert (first["epochs"], more["epochs"], more["steps"]) == (1, 3, 18)
    assert more["test_accuracy"] > first["test_accuracy"]


def test_a_run_is_never_overwritten_or_mixed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train(QUICK, tmp_path / "new", resume=True)
    train(QUICK, tmp_path)
    before = artifacts(tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        train(QUICK, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        train(Settings(epochs=3, batch_size=256, seed=9), tmp_path, resume=True)
    assert artifacts(tmp_path) == before


def test_the_run_file_names_settings_versions_and_data(tmp_path: Path) -> None:
    train(QUICK, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seed"] == 3
    assert run["versions"]["torch"] == torch.__version__
    assert len(run["dataset"]["sha256"]) == 64


@pytest.mark.parametrize(
    "bad",
    [
        {"model": "x"}, {"optimizer": "x"}, {"guard": "x"}, {"lipschitz": 0.0}, {"lipschitz": float("nan")}, {"lr": -1.0},
        {"lr": float("inf")}, {"epochs": -1}, {"batch_size": 0}, {"seed": -1}, {"threads": 0},
    ],
)  # fmt: skip
def test_settings_that_cannot_run_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "accuracy"), [("mlp", 0.97), ("resnet", 0.97), ("cnn", 0.97)])
def test_the_recipes_learn_the_digits_under_a_limit_of_one(tmp_path: Path, model: str, accuracy: float) -> None:
    metrics = train(Settings(model=model), tmp_path)
    assert metrics["test_accuracy"] >= accuracy
    assert metrics["lipschitz"] <= 1.0
    assert metrics["certified_accuracy"]["0.1"] >= accuracy - 0.1
