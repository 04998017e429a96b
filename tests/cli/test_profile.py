"""The profile on the command line: of a folder that has one, or measured by training again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stableopt.cli import train as train_module
from stableopt.cli.app import app
from stableopt.cli.train import Settings, train_again
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.reading import ProfileReading
from stableopt.report import read_run
from stableopt.report.figures import profile_figures
from tests.report.profiled import exponent_entry, numbers, system, write_profile

RUN = CliRunner()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, without a certificate."""
    folder = tmp_path_factory.mktemp("trained")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as in the tests
    with train_module._threads(1):
        train_module._train(Settings(epochs=1, batch_size=512).resolved(), folder, resume=False, progress=None)
    torch.set_default_dtype(dtype)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("profile.")}


def test_a_profile_is_printed_with_its_verdict_and_all_tables(tmp_path: Path) -> None:
    result = RUN.invoke(app, ["profile", str(write_profile(tmp_path))])
    assert result.exit_code == 0, result.output
    for part in (
        "exponentially stable on 200 steps, 0 to 200",
        "exponent -0.02 per step (95 % interval -0.024 … -0.016)",
        "87.25",
        "largest growth of all windows",
        "largest eigenvalue M of all P",
        "small-gain condition",
        "Forward block at step 200",
        "constant C of C ρ^(t − s), for all windows",
    ):
        assert part in result.output
    rows = [line for line in result.output.splitlines() if "almost sure" in line]
    assert len(rows) == 4
    assert len({row.index("almost sure") for row in rows}) == 1


def test_the_numbers_are_printed_as_json(tmp_path: Path) -> None:
    content = numbers(growth=0.02)
    folder = write_profile(tmp_path, content, system(growth=0.02))
    found = json.loads(RUN.invoke(app, ["profile", str(folder), "--json"]).output)
    assert found == content


def test_an_annihilated_perturbation_is_printed_as_one(tmp_path: Path) -> None:
    R = np.full((200, 1, 1), 0.5)
    R[-1] = 0.0
    factors = Factors(R, np.arange(201), dimension=1)
    ProfileReading(pieces=(factors,), theta=(np.ones((201, 1, 1)),)).save(tmp_path)
    assert json.loads((tmp_path / "profile.json").read_text())["exponents"][0]["value"] == "-inf"
    result = RUN.invoke(app, ["profile", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "-inf … -inf" in result.output
    assert "vanishes within the run" in result.output
    assert "refused" not in result.output


ODD = {
    "no step": np.zeros((0, 1, 1)),
    "one step": np.full((1, 1, 1), 0.5),
    "one step to zero": np.zeros((1, 1, 1)),
    "two steps": np.full((2, 2, 2), 0.5) * np.triu(np.ones((2, 2))),
    "strong contraction": np.full((80, 1, 1), 1e-200),
    "denormal": np.full((80, 1, 1), 5e-324),
    "explosion": np.full((80, 1, 1), 1e308),
    "annihilated at first": np.r_[0.0, np.full(79, 2.0)][:, None, None],
    "annihilated at last": np.r_[np.full(79, 0.5), 0.0][:, None, None],
    "zero": np.zeros((60, 2, 2)),
    "rank one": np.tile(np.diag([1.0, 0.0]), (60, 1, 1)),
    "apart": np.tile(np.diag([1e100, 1e-100]), (60, 1, 1)),
    "shear": np.tile([[1.0, 1e150], [0.0, 1.0]], (60, 1, 1)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_are_saved_printed_and_drawn(name: str, tmp_path: Path) -> None:
    R = ODD[name]
    k = R.shape[-1]
    factors = Factors(R, np.arange(len(R) + 1), dimension=k)
    reading = ProfileReading(pieces=(factors,), theta=(np.tile(np.eye(k), (len(R) + 1, 1, 1)),))
    assert str(reading)
    reading.save(tmp_path)
    result = RUN.invoke(app, ["profile", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output.replace("determinant", "").split()
    assert profile_figures([read_run(tmp_path)])


def test_a_refused_interval_is_said_in_words(tmp_path: Path) -> None:
    refused = exponent_entry(0.001, lower=None, upper=None, reason="12 effective values are too few for an interval")
    verdict = {"kind": "inconclusive", "horizon": 40, "reason": "too few steps", "exponent": refused}
    result = RUN.invoke(app, ["profile", str(write_profile(tmp_path, numbers(exponents=[refused], verdict=verdict)))])
    assert "inconclusive on 40 steps" in result.output
    assert "Exponent 1: 12 effective values are too few for an interval." in result.output
    assert "refused" in result.output


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
def test_half_a_profile_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = write_profile(tmp_path)
    (folder / name).write_bytes(b"[")
    damaged = RUN.invoke(app, ["profile", str(folder)])
    assert isinstance(damaged.exception, ValueError)
    assert f"{name}' cannot be read" in str(damaged.exception)
    (folder / name).unlink()
    absent = RUN.invoke(app, ["profile", str(folder)])
    assert isinstance(absent.exception, FileNotFoundError)
    assert f"one half of a profile: {name} is not there" in str(absent.exception)


def test_a_folder_without_a_profile_or_a_run_is_one_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert "neither a profile nor a run" in str(RUN.invoke(app, ["profile", str(folder)]).exception)


def test_a_function_of_the_user_is_trained_and_profiled(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
def make():
    model = nn.Linear(3, 2)
    return model, torch.randn(8, 3), torch.randint(2, (8,)), torch.optim.SGD(model.parameters(), lr=0.1)
def without():
    return nn.Linear(3, 2), torch.randn(8, 3)
"""
    (tmp_path / "model.py").write_text(text)
    out = tmp_path / "profile"
    command = ["profile", f"{tmp_path / 'model.py'}:make", "--steps", "5", "--directions", "2", "--out", str(out)]
    result = RUN.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "on 5 steps, 0 to 5" in result.stdout
    assert RUN.invoke(app, ["profile", str(out)]).stdout == result.stdout
    for place, steps, said in (("without", "5", "returns no optimizer"), ("make", "0", "steps must be")):
        refused = RUN.invoke(
            app, ["profile", f"{tmp_path / 'model.py'}:{place}", "--steps", steps, "--out", str(tmp_path)]
        )
        assert said in str(refused.exception)


@pytest.mark.slow
def test_a_foreseen_failure_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stableopt", "profile", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


class Watched:
    """A context that keeps what it is given."""

    def __init__(self, *given: object) -> None:
        self.given = given

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_training_again_takes_the_same_steps_and_leaves_the_folder_alone(trained: Path) -> None:
    before, made = content_of(trained), []

    def watch(*given: object) -> Watched:
        made.append(given)
        return Watched(*given)

    assert train_again(trained, 300, watch) == 3
    assert content_of(trained) == before
    state = torch.load(trained / "checkpoint.pt", weights_only=True)["model"]
    model = made[0][0]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert train_again(trained, 2, Watched) == 2
    with pytest.raises(ValueError, match="steps must be"):
        train_again(trained, 0, Watched)


def test_a_trained_run_without_a_profile_gets_one(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    write_profile(folder)
    result = RUN.invoke(app, ["profile", str(folder), "--again", "--steps", "2", "--directions", "1"])
    assert result.exit_code == 0, result.output
    assert "on 2 steps, 0 to 2" in result.output
    assert content_of(folder) == content_of(trained)
    content = json.loads((folder / "profile.json").read_text())
    assert (content["directions"], content["steps"], content["optimizer"]) == (1, [0, 2], "AdamW")
    assert result.stderr.startswith("taking up to 2 steps of ")
    assert RUN.invoke(app, ["profile", str(folder)]).output == result.stdout
