"""The commands do what they say, with the exit codes they promise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stableopt._version import __version__
from stableopt.cli import train as train_module
from stableopt.cli.app import app

RUN = CliRunner()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "first"
    result = RUN.invoke(app, ["train", "--epochs", "1", "--batch-size", "256", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    for line in ("epoch 1/1", "proved Lipschitz bound", "certified accuracy, radius 0.1", "radius 0.25", "radius 0.5"):
        assert line in result.output
    return folder


def test_verify_accepts_the_honest_and_rejects_the_edited(finished: Path, tmp_path: Path) -> None:
    honest = RUN.invoke(app, ["verify", str(finished), "--json"])
    assert honest.exit_code == 0
    assert json.loads(honest.output)["verified"] is True
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    edited = RUN.invoke(app, ["verify", str(copy / "model.cert.json")])
    assert edited.exit_code == 1
    assert "reject" in edited.output.lower()
    assert RUN.invoke(app, ["verify", str(tmp_path / "nothing")]).exit_code == 2


def test_lowering_any_claimed_number_by_1e8_is_rejected(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "model.cert.json"
    original = json.loads(path.read_text())
    numbers = [
        ("claims", "proved", 0, "L"),
        *(("graph", i, "bound") for i, n in enumerate(original["predicate"]["graph"]) if "weight" in n),
    ]
    assert len(numbers) >= 4
    for keys in numbers:
        certificate = json.loads(json.dumps(original))
        place = certificate["predicate"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = (float.fromhex(place[keys[-1]]) * (1 - 1e-8)).hex()
        path.write_text(json.dumps(certificate))
        assert RUN.invoke(app, ["verify", str(path)]).exit_code == 1, keys


def test_certify_again_gives_the_same_certificate(finished: Path) -> None:
    before = (finished / "model.cert.json").read_bytes()
    assert RUN.invoke(app, ["certify", str(finished)]).exit_code == 0
    assert (finished / "model.cert.json").read_bytes() == before


def test_report_writes_one_page(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = RUN.invoke(app, ["report", str(finished), "--out", str(page)])
    assert result.exit_code == 0
    assert "<svg" in page.read_text() or "data:image/svg" in page.read_text()


def test_an_interrupt_leaves_a_usable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = train_module._Run.step

    def step(self: train_module._Run, *batch: object) -> None:
        if self.epochs_done == 1:
            raise KeyboardInterrupt
        genuine(self, *batch)

    monkeypatch.setattr(train_module._Run, "step", step)
    arguments = ["train", "--epochs", "2", "--batch-size", "512", "--out", str(tmp_path / "run")]
    result = RUN.invoke(app, arguments)
    assert result.exit_code == 130
    assert "continue with --resume" in result.output
    assert RUN.invoke(app, ["verify", str(tmp_path / "run")]).exit_code == 0
    monkeypatch.setattr(train_module._Run, "step", genuine)
    assert RUN.invoke(app, [*arguments, "--resume"]).exit_code == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 2


def test_the_installed_command_prints_its_version_and_says_errors_in_a_sentence(tmp_path: Path) -> None:
    version = subprocess.run(
        [sys.executable, "-m", "stableopt", "--version"], capture_output=True, text=True, check=False
    )
    assert (version.returncode, version.stdout.strip()) == (0, __version__)
    wrong = subprocess.run(
        [sys.executable, "-m", "stableopt", "train", "--model", "x", "--out", str(tmp_path / "r")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: unknown model 'x': choose one of mlp, resnet, cnn."
    assert not (tmp_path / "r").exists()
