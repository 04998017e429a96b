"""Checkpoints hold data only, and damage is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from stableopt.cli.storage import load_checkpoint, save_checkpoint, write_json


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": None})
    write_json(tmp_path / "b.json", {"a": None, "b": [1, 2.5]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2), "epoch": 4, "settings": {"lr": 0.1, "name": None}}
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded.pop("w"), state.pop("w"))
    assert loaded == state


class Payload:
    """Anything that is not plain data."""


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"w": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"object": Payload()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
