"""The progress says what happened."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from stableopt.cli.progress import LiveProgress
from stableopt.lyapunov import StepRecord


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


@pytest.mark.parametrize("terminal", [False, True])
def test_the_live_view_shows_each_record_once_and_the_epoch(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with LiveProgress(console, epochs=2, live=True) as progress:
        for step in range(1, 101):
            record = StepRecord(step=step, loss=0.5, verdict="decreased", action="accepted", trust=0.75)
            progress.step(0, record)
            progress.step(0, record)  # a step at which the monitor did not look
        progress.epoch(0, proved=0.5, accuracy=0.25)
    text = console.file.getvalue()
    assert "epoch 1/2" in text
    assert "100 decreased" in text if terminal else "decreased 100 trust 0.75 calm" in text
    assert "bound 0.500000 accuracy 0.2500" in text
