"""The audit on the command line: a file of the user in, sentences or JSON out, and an exit code for continuous integration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stableopt.cli.app import app
from stableopt.cli.audit import audit_subject

RUN = CliRunner()
FILE = """
import torch
from torch import nn
from stableopt.nn import GroupSort, stabilize

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5)
    def forward(self, ids, scale=1.0):
        return self.head(self.norm(self.embed(ids))) * scale

def make():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3))
    return model, torch.randn(8, 4), torch.randint(3, (8,)), torch.optim.AdamW(model.parameters(), lr=0.1)

def clean():
    model = stabilize(nn.Sequential(nn.Linear(4, 4), GroupSort(2), nn.Linear(4, 3)))
    return model, torch.randn(8, 4)

def tokens():
    model = Tokens()
    ids = torch.randint(5, (2, 6))
    return model, lambda: model(ids).square().mean()

def named():
    return Tokens(), {"ids": torch.randint(5, (2, 6)), "scale": 2.0}

def failing():
    def loss():
        raise KeyError("lost")
    return nn.Sequential(nn.LayerNorm(4)), loss

def slopes():
    return nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(FILE)
    return tmp_path / "model.py"


def test_findings_are_printed_or_written_as_json(file: Path) -> None:
    result = RUN.invoke(app, ["audit", f"{file}:make"])
    assert result.exit_code == 0, result.output
    for part in (
        "5 modules, 2 findings (1 serious, 0 weak, 1 note)",
        "serious  1: LayerNorm",
        "attained 316.2277",
        "note     2: GELU",
    ):
        assert part in result.output
    found = json.loads(RUN.invoke(app, ["audit", f"{file}:make", "--json"]).output)
    assert (found["worst"], found["ran"], found["modules"]) == ("serious", True, 5)
    assert [f["kind"] for f in found["findings"]] == ["sample-normalization", "steep-activation"]
    assert found["findings"][0]["witness"]["shape"] == [1, 4]


@pytest.mark.parametrize(
    ("function", "severity", "code"),
    [
        ("make", "serious", 1), ("make", "note", 1), ("make", "never", 0), ("slopes", "serious", 0), ("slopes", "weak", 0),
        ("slopes", "note", 1), ("clean", "note", 0),
    ],
)  # fmt: skip
def test_the_exit_code_says_whether_it_was_too_bad(file: Path, function: str, severity: str, code: int) -> None:
    assert RUN.invoke(app, ["audit", f"{file}:{function}", "--fail-on", severity]).exit_code == code


def test_a_clean_model_has_one_line(file: Path) -> None:
    result = RUN.invoke(app, ["audit", f"{file}:clean"])
    assert result.output.strip().splitlines() == [result.output.strip()]
    assert "0 findings" in result.output


def test_the_inputs_of_the_loss_are_those_of_the_audit(file: Path) -> None:
    found = audit_subject(f"{file}:tokens")
    assert found.ran
    assert [f.kind for f in found] == ["sample-normalization", "unread"]
    assert [f.kind for f in audit_subject(f"{file}:named")] == ["sample-normalization", "unread"]
    assert [f.kind for f in audit_subject(f"{file}:failing")] == ["sample-normalization"]


def test_what_is_wrong_is_said_in_one_sentence(file: Path) -> None:
    result = RUN.invoke(app, ["audit", f"{file}:make", "--fail-on", "bad"])
    assert isinstance(result.exception, ValueError)
    assert "--fail-on must be one of serious, weak, note and never" in str(result.exception)
    with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION"):
        audit_subject(str(file))
