"""Data sets that radii are measured on: what a loader gives, and a digest that whoever has the data can repeat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from stableopt.certify.arguments import check_inputs

__all__ = ["Digest", "batches", "dataset_sha256"]

_ROWS = 256


def dataset_sha256(x: Tensor, y: Tensor) -> str:
    """Return a digest of inputs and labels, whatever the batches they come in.

    It is the SHA-256 of the text ``{"labels": …, "dtype": …, "inputs": …, "shape": […]}`` (JSON, keys sorted), with the SHA-256 of
    the bytes of the labels (int64) and of the inputs (in their dtype), in C order and little-endian, and the shape of one input.

    Args:
        x: inputs, shape ``(n, *shape)``.
        y: labels, shape ``(n,)``, of any integer dtype.

    Examples:
        >>> x, y = torch.ones(2, 3), torch.tensor([0, 1])
        >>> dataset_sha256(x, y) == dataset_sha256(x, y.int()), dataset_sha256(x, y) == dataset_sha256(x.double(), y)
        (True, False)
    """
    digest = Digest()
    digest.update(x, y)
    return digest.hexdigest()


class Digest:
    """The digest of a data set, batch by batch; see :func:`dataset_sha256`.

    Examples:
        >>> digest = Digest()
        >>> digest.update(torch.ones(2, 3), torch.tensor([0, 1]))
        >>> digest.hexdigest() == dataset_sha256(torch.ones(2, 3), torch.tensor([0, 1]))
        True
    """

    def __init__(self) -> None:
        self.inputs, self.labels, self.head = hashlib.sha256(), hashlib.sha256(), dict[str, Any]()

    def update(self, x: Tensor, y: Tensor) -> None:
        """Count in a batch of inputs and labels."""
        self.head = {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape[1:])}
        self.inputs.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        self.labels.update(y.detach().cpu().long().contiguous().numpy().astype("<i8").tobytes())

    def hexdigest(self) -> str:
        """Return the digest of what was counted in so far."""
        head = self.head | {"inputs": self.inputs.hexdigest(), "labels": self.labels.hexdigest()}
        return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def batches(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of inputs and labels that fit each other.

    Args:
        loader: batches ``(x, y)``, such as a DataLoader, or one pair of tensors, which is split.

    Raises:
        TypeError: if it is neither, or the inputs are not floating, or the labels no integers.
        ValueError: if the shapes do not fit.

    Examples:
        >>> [len(x) for x, y in batches((torch.ones(300, 1), torch.zeros(300, dtype=torch.int64)))]
        [256, 44]
    """
    if isinstance(loader, tuple | list) and len(loader) == 2 and all(isinstance(part, Tensor) for part in loader):
        X, Y = _checked_batch(loader)
        yield from zip(X.split(_ROWS), Y.split(_ROWS), strict=True) if len(X) else ()
        return
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            f"the data must be batches (x, y), as of a DataLoader, or a pair of tensors (X, Y), got {type(loader).__name__}."
        )
    for batch in loader:
        x, y = _checked_batch(batch)
        if len(x):
            yield x, y


def _checked_batch(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise TypeError(f"each batch must be a pair of tensors (x, y), got {type(batch).__name__}.")
    x, y = batch
    if y.is_floating_point() or y.dtype in {torch.bool, torch.complex64, torch.complex128}:
        raise TypeError(f"the labels must be integers, got dtype {y.dtype}.")
    check_inputs(x)
    if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
        raise ValueError(f"a batch needs inputs (n, ...) and labels (n,), got {tuple(x.shape)} and {tuple(y.shape)}.")
    return x, y
