"""The data sets of the command line: scikit-learn's digits, or arrays in a ``.npz`` file."""

from __future__ import annotations

import hashlib
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Dataset", "load_data"]

KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Inputs scaled to [0, 1] in float32, and integer labels ``0 … classes - 1``.

    Args:
        name: what to call it in reports.
        x_train: inputs, shape ``(n, *shape)``; ``shape`` is ``(features,)`` or ``(channels, height, width)``.
        y_train: labels, shape ``(n,)``, int64.
        x_test: inputs for the figures that are reported.
        y_test: labels of ``x_test``.
        digest: sha256 of all the numbers, so that a result names its data.

    Examples:
        >>> data = load_data("digits")
        >>> data.shape, data.classes, len(data.x_train), len(data.x_test)
        ((64,), 10, 1438, 359)
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    digest: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.x_train.shape[1:])

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(torch.cat([self.y_train, self.y_test]).max()) + 1

    def as_images(self) -> Dataset:
        """Return the same data with inputs of shape ``(channels, height, width)``.

        Flat inputs are taken as square images of one channel.

        Raises:
            ValueError: if the inputs are flat and their number is no square.

        Examples:
            >>> load_data("digits").as_images().shape
            (1, 8, 8)
        """
        if len(self.shape) == 3:
            return self
        side = math.isqrt(math.prod(self.shape))
        if side * side != math.prod(self.shape):
            raise ValueError(
                f"a cnn needs images, but '{self.name}' has {math.prod(self.shape)} features; "
                "store them as (n, channels, height, width)."
            )
        return self._reshaped(1, side, side)

    def as_vectors(self) -> Dataset:
        """Return the same data with flat inputs.

        Examples:
            >>> load_data("digits").as_images().as_vectors().shape
            (64,)
        """
        return self._reshaped(-1)

    def _reshaped(self, *shape: int) -> Dataset:
        train = self.x_train.reshape(len(self.x_train), *shape)
        test = self.x_test.reshape(len(self.x_test), *shape)
        return Dataset(self.name, train, self.y_train, test, self.y_test, self.digest)


def load_data(source: str) -> Dataset:
    """Load a data set by name or from a file.

    Args:
        source: ``"digits"`` (1797 images of 8 x 8, shipped with scikit-learn; every fifth one is the test set), or the path of a
            ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test``. Unsigned bytes are divided by 255; floats are
            taken as they are.

    Returns:
        The data set; images of shape ``(n, height, width)`` get a channel axis.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a key is missing, the numbers of inputs and labels differ, a value is not finite, or labels are not
            integers from 0.
    """
    if source == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        test = np.arange(len(x)) % 5 == 4
        return _dataset(
            "digits", {"x_train": x[~test] / 16, "y_train": y[~test], "x_test": x[test] / 16, "y_test": y[test]}
        )
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no data at '{source}': expected the word digits or the path of a .npz file.")
    arrays = _read_archive(path)
    for key in ("x_train", "x_test"):
        if arrays[key].dtype == np.uint8:
            arrays[key] = arrays[key] / 255.0
        if arrays[key].ndim == 3:
            arrays[key] = arrays[key][:, None]
    return _dataset(path.name, arrays)


def _read_archive(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays, or say in a sentence why the file cannot be used."""
    try:
        content = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        arrays = {key: content[key] for key in content.files} if isinstance(content, np.lib.npyio.NpzFile) else {}
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"'{path.name}' is no usable .npz file ({type(error).__name__}: {error}).") from error
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"'{path.name}' lacks {', '.join(missing)}; it has {', '.join(arrays) or 'no named arrays'}.")
    return {key: arrays[key] for key in KEYS}


def _dataset(name: str, arrays: dict[str, npt.NDArray[np.generic]]) -> Dataset:
    tensors: dict[str, Tensor] = {}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim not in (2, 4) or not np.issubdtype(x.dtype, np.floating) or len(x) == 0:
            raise ValueError(
                f"x_{part} of '{name}' must be numbers of shape (n, features) or (n, [channels,] height, width), "
                f"got {x.dtype} {x.shape}."
            )
        if not np.isfinite(x).all():
            raise ValueError(f"x_{part} of '{name}' holds NaN or infinity; clean the data first.")
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise ValueError(f"y_{part} of '{name}' must be {len(x)} integers >= 0, got {y.dtype} {y.shape}.")
        tensors[f"x_{part}"] = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        tensors[f"y_{part}"] = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
    if tensors["x_train"].shape[1:] != tensors["x_test"].shape[1:]:
        raise ValueError(
            f"the inputs of '{name}' differ in shape: {tuple(tensors['x_train'].shape[1:])} to train, "
            f"{tuple(tensors['x_test'].shape[1:])} to test."
        )
    digest = hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in KEYS)).hexdigest()
    return Dataset(name, **tensors, digest=digest)
