"""The doctor on the command line: a file of the user in, a table or JSON out, one sentence for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stableopt.cli.app import app
from stableopt.cli.subject import load_subject, subject

RUN = CliRunner()
FILE = """
import torch
from torch import nn
from beside import WIDTH

def make():
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    return model, torch.randn(8, 4), torch.randint(3, (8,)), torch.optim.AdamW(model.parameters(), lr=0.1)

def broken():
    raise KeyError("lost")

def wrong():
    return 3

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "model.py").write_text(FILE)
    (tmp_path / "syntax.py").write_text("def make(:\n")
    return tmp_path / "model.py"


def test_a_table_or_json_is_printed(file: Path) -> None:
    result = RUN.invoke(app, ["doctor", f"{file}:make"])
    assert result.exit_code == 0, result.output
    for part in (
        "43 parameters",
        "exact*",
        "forward",
        "difference",
        "sharpness",
        "the sharpness limit of AdamW is 379.8",
    ):
        assert part in result.output
    found = json.loads(RUN.invoke(app, ["doctor", f"{file}:make", "--json"]).output)
    assert found["parameters"] == 43
    assert [way["works"] for way in found["ways"]] == [True] * 4
    assert found["ways"][0]["difference"] is None


def test_what_is_wrong_is_said_in_one_sentence(file: Path) -> None:
    cases = [
        (f"{file}", "expected FILE.py:FUNCTION, as in model.py:make"),
        (f"{file.parent}/nowhere.py:make", "there is no file"),
        (f"{file}:nothing", "has no function 'nothing': write one that returns (model, loss)"),
        (f"{file}:not_a_function", "has no function 'not_a_function'"),
        (f"{file}:broken", "broken() in"),
        (f"{file}:broken", "failed: KeyError: 'lost'"),
        (f"{file}:wrong", "got (int)"),
        (f"{file.parent}/syntax.py:make", "could not be run: SyntaxError"),
    ]
    for place, said in cases:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_subject(place)
        assert said in str(error.value)
        assert "\n" not in str(error.value).strip()


@pytest.mark.slow
def test_a_foreseen_failure_is_one_line_and_exit_code_2(file: Path) -> None:
    command = [sys.executable, "-m", "stableopt", "doctor", f"{file}:wrong"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected (model, loss)")
    assert done.stderr.count("\n") == 1


def test_every_form_of_subject_gives_a_loss() -> None:
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    classes, numbers = torch.randint(3, (6,)), torch.randn(6, 3)
    by_hand = nn.functional.cross_entropy(model(x), classes)
    torch.testing.assert_close(subject((model, x, classes))[1](), by_hand)
    torch.testing.assert_close(subject((model, x, numbers))[1](), (model(x) - numbers).square().mean())
    torch.testing.assert_close(subject((model, x))[1](), 0.5 * model(x).square().mean())
    torch.testing.assert_close(subject((model, {"input": x}, classes))[1](), by_hand)
    torch.testing.assert_close(subject([model, (x,), classes])[1](), by_hand)
    torch.testing.assert_close(subject((model, lambda: by_hand))[1](), by_hand)
    l1 = subject((model, x, numbers, nn.functional.l1_loss))[1]()
    torch.testing.assert_close(l1, (model(x) - numbers).abs().mean())
    words = torch.randint(3, (2, 3))
    torch.testing.assert_close(
        subject((model, x.view(2, 3, 4), words))[1](), nn.functional.cross_entropy(model(x), words.flatten())
    )
    optimizer = torch.optim.SGD(model.parameters())
    assert subject((model, x, optimizer))[2] is optimizer

    class Output:
        loss = by_hand

    class Whole(nn.Module):
        def forward(self, input: torch.Tensor) -> Output:  # noqa: A002
            return Output()

    assert subject((Whole(), x))[1]() is by_hand
    for wrong in ((model,), (model, 3), (model, 1, 2, 3, 4), (x, model)):
        with pytest.raises(ValueError, match=r"expected \(model, loss\)"):
            subject(wrong)
