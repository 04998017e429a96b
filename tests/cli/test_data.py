"""Data come in as promised, or are refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stableopt.cli.data import load_data


def arrays(n: int = 6, shape: tuple[int, ...] = (4,)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.random((n, *shape)),
        "y_train": np.arange(n) % 3,
        "x_test": rng.random((3, *shape)),
        "y_test": np.arange(3),
    }


def saved(folder: Path, **changes: object) -> str:
    content = {k: v for k, v in (arrays() | changes).items() if v is not None}
    np.savez(folder / "data.npz", **content)
    return str(folder / "data.npz")


def test_the_digits_are_split_by_position_and_scaled() -> None:
    data = load_data("digits")
    assert data.shape == (64,)
    assert data.classes == 10
    assert (len(data.x_train), len(data.x_test)) == (1438, 359)
    assert float(data.x_train.min()) == 0.0
    assert float(data.x_train.max()) == 1.0
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    torch.testing.assert_close(data.x_test[1].double(), torch.from_numpy(x[9] / 16))
    assert int(data.y_test[1]) == y[9]


def test_unsigned_bytes_become_images_in_the_unit_interval(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 5, 5), dtype=np.uint8)
    data = load_data(saved(tmp_path, x_train=pixels, x_test=pixels[:3]))
    assert data.shape == (1, 5, 5)
    np.testing.assert_allclose(data.x_train[:, 0].numpy(), pixels / 255, rtol=1e-7)
    assert data.as_vectors().shape == (25,)
    torch.testing.assert_close(data.as_vectors().as_images().x_train, data.x_train)


def test_the_digest_names_the_numbers(tmp_path: Path) -> None:
    first = load_data(saved(tmp_path)).digest
    assert load_data(saved(tmp_path)).digest == first
    changed = arrays()["x_test"]
    changed[0, 0] += 1e-3
    assert load_data(saved(tmp_path, x_test=changed)).digest != first


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"y_train": np.zeros(5, int)}, "6 integers"),
        ({"y_train": np.zeros(6)}, "integers >= 0"),
        ({"y_train": np.full(6, -1)}, "integers >= 0"),
        ({"x_train": np.full((6, 4), np.nan)}, "NaN or infinity"),
        ({"x_train": np.zeros((6, 5))}, "differ in shape"),
        ({"x_train": np.zeros(6)}, "must be numbers of shape"),
        ({"x_train": np.zeros((0, 4)), "y_train": np.zeros(0, int)}, "must be numbers of shape"),
        ({"x_train": np.zeros((6, 4), int)}, "must be numbers of shape"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_data(saved(tmp_path, **change))


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the word digits"):
        load_data(str(tmp_path / "nothing.npz"))
    with pytest.raises(ValueError, match="needs images"):
        load_data(saved(tmp_path, x_train=np.zeros((6, 5)), x_test=np.zeros((3, 5)))).as_images()


def test_a_file_that_is_no_archive_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    whole = Path(saved(tmp_path)).read_bytes()
    for content in (b"text", b"", whole[:-40], whole[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no usable"):
            load_data(str(path))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="no named arrays"):
        load_data(str(tmp_path / "one.npy"))
