"""The files of a run: settings and figures as JSON, and a checkpoint of tensors and plain data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

from stableopt.files import write_atomically

__all__ = ["load_checkpoint", "save_checkpoint", "write_json"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, with sorted keys, so that equal contents are equal bytes.

    Raises:
        ValueError: if a number is NaN or infinite: JSON has no word for it.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_json(folder / "a.json", {"b": 1, "a": 2})
        >>> json.loads((folder / "a.json").read_text())
        {'a': 2, 'b': 1}
    """
    write_atomically(path, (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save tensors and plain data atomically; :func:`load_checkpoint` reads them without executing anything.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_checkpoint(folder / "c.pt", {"epoch": 3, "w": torch.ones(1)})
        >>> load_checkpoint(folder / "c.pt")["epoch"]
        3
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint; only tensors and plain data are accepted.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged or holds anything else.

    Examples:
        >>> load_checkpoint(Path("nowhere.pt"))
        Traceback (most recent call last):
        FileNotFoundError: no checkpoint at 'nowhere.pt': train there first, without --resume.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}': train there first, without --resume.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"the checkpoint '{path}' cannot be read ({type(error).__name__}): start the run anew."
        ) from error
