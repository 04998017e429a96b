"""The progress says what happened."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from stableopt.cli.progress import LiveProgress


@dataclass
class Step:
    action: str
    loss: float = 0.5
    energy_after: float = 0.75


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_are_counted_by_what_was_done_to_them(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with LiveProgress(console, epochs=2) as progress:
        for action in ("accepted", "accepted", "unguarded", "shrunk", "restarted", "undone"):
            progress.step(0, Step(action))
        progress.epoch(0, proved=0.5, accuracy=0.25)
    text = console.file.getvalue()
    assert "accepted 3 shrunk 2 undone 1" in text
    assert "loss 0.5000 energy 0.7500" in text
    assert "bound 0.500000" in text
    assert "accuracy 0.2500" in text
