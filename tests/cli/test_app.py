"""The commands do what they say, with the exit codes they promise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stableopt._version import __version__
from stableopt.certify import load
from stableopt.certify.attested import chain_head
from stableopt.cli import train as train_module
from stableopt.cli.app import app, run
from stableopt.cli.data import load_data

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


def test_verify_in_integers_and_with_the_data_of_the_run(finished: Path, tmp_path: Path) -> None:
    data = load_data("digits")
    path = tmp_path / "test.npz"
    np.savez(path, x=data.x_test.numpy(), y=data.y_test.numpy())
    result = RUN.invoke(app, ["verify", str(finished), "--exact", "--replay", str(path)])
    assert result.exit_code == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    right = round(metrics["test_accuracy"] * len(data.y_test))
    assert f"replayed: accuracy: {right} of {len(data.y_test)}" in result.output
    np.savez(path, x=data.x_test.numpy(), y=data.y_test.numpy()[::-1])
    other = RUN.invoke(app, ["verify", str(finished), "--replay", str(path)])
    assert (other.exit_code, "no replayable claim is about these data" in other.output) == (1, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [("text", "are no npz file"), ("objects", "plain arrays of numbers"), ("names", "arrays x and y")],
)
def test_data_that_cannot_be_replayed_are_named_and_never_unpickled(
    finished: Path, tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "data.npz"
    if content == "text":
        path.write_text("no archive")
    elif content == "objects":
        np.savez(path, x=np.ones((2, 64), dtype=np.float32), y=np.array([{}, {}], dtype=object))
    else:
        np.savez(path, images=np.ones(2))
    result = RUN.invoke(app, ["verify", str(finished), "--replay", str(path)])
    assert result.exit_code == 1
    assert words in result.output
    assert "pickle" not in result.output


def test_the_certificate_of_a_run_attests_its_record_and_the_report_shows_its_bound(
    finished: Path, tmp_path: Path
) -> None:
    cert = load(finished)
    (claim,) = cert.claims["attested"]
    assert (claim["id"], claim["steps"]) == ("energy_record", len((finished / "energy.jsonl").read_text().splitlines()))
    assert claim["hash_chain_head"] == chain_head(finished / "energy.jsonl")
    assert {entry["id"] for entry in cert.claims["replayable"]} == {"accuracy", "certified_accuracy"}
    page = tmp_path / "page.html"
    assert RUN.invoke(app, ["report", str(finished), "--out", str(page)]).exit_code == 0
    assert f"(exactly <code>{cert.lipschitz.hex()}</code>)" in page.read_text()


def test_the_verifier_is_written_alone_and_takes_a_folder(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "verify_stableopt.pyz"
    assert RUN.invoke(app, ["verify", "--standalone", str(path)]).exit_code == 0
    for target in (finished, finished / "model.cert.json"):
        found = subprocess.run(
            [sys.executable, path, target], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (found.returncode, "verified: Lipschitz constant" in found.stdout) == (0, True), found.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give the path of a model.cert.json, or of the folder"),
        (["FOLDER", "--sig", "nothing.pem"], "there is no public key 'nothing.pem'"),
    ],
)
def test_what_is_missing_is_an_error_and_no_verdict(
    finished: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["stableopt", "verify", *(str(finished) if a == "FOLDER" else a for a in arguments)]
    )
    with pytest.raises(SystemExit) as exit:  # noqa: A001
        run()
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


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
