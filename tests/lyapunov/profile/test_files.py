"""The two files of a profile."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stableopt.files import decode_safetensors
from stableopt.lyapunov.profile.files import ARRAYS, NUMBERS, arrays_of, numbers_of
from stableopt.lyapunov.profile.growth.exponents import exponent
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.reading import ProfileReading
from stableopt.lyapunov.profile.representations.looks import Look


def reading(*pieces: tuple[np.ndarray, np.ndarray], **options) -> ProfileReading:
    factors = tuple(Factors(np.asarray(R)[:, None, None], steps, dimension=1) for R, steps in pieces)
    return ProfileReading(factors, tuple(np.ones((f.count + 1, 1, 1)) for f in factors), **options)


def test_running_exponents_are_those_of_all_pieces() -> None:
    grows, shrinks = (np.full(200, 2.0), np.arange(201)), (np.full(200, 0.9), np.arange(1000, 1201))
    found = reading(grows, shrinks, windowed=True)
    arrays = arrays_of(found)
    assert arrays["running/steps"][[0, -1]].tolist() == [1, 1200]
    assert (np.diff(arrays["running/steps"]) > 0).all()
    assert {200 < step <= 1000 for step in arrays["running/steps"].tolist()} == {False}
    assert arrays["running/exponent"][0] == pytest.approx(math.log(2.0))
    last = found.exponents[0]
    assert arrays["running/exponent"][-1] == pytest.approx(last.value, abs=1e-15)
    whole = np.concatenate([piece.growth for piece in found.pieces])
    middle = len(arrays["running/steps"]) // 2
    count = int(np.searchsorted(np.r_[1:201, 1001:1201], arrays["running/steps"][middle])) + 1
    assert arrays["running/exponent"][middle] == pytest.approx(exponent(whole[:count]).value, abs=1e-15)


def test_a_last_piece_without_a_step_leaves_the_rest() -> None:
    found = reading((np.full(60, 0.9), np.arange(61)), (np.zeros(0), np.array([100])), windowed=True)
    assert arrays_of(found)["running/exponent"][-1] == pytest.approx(math.log(0.9))
    json.dumps(numbers_of(found), allow_nan=False)


def test_an_annihilated_exponent_is_not_an_unknown_one() -> None:
    found = numbers_of(reading((np.r_[np.full(100, 0.5), 0.0], np.arange(102))))
    first = found["exponents"][0]
    assert [first[key] for key in ("value", "lower", "upper")] == ["-inf"] * 3
    assert numbers_of(reading((np.full(3, 0.5), np.arange(4))))["exponents"][0]["lower"] is None


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_strong_contraction_and_explosion_are_written(size: float, tmp_path) -> None:
    reading((np.full(80, size), np.arange(81))).save(tmp_path)
    content = json.loads((tmp_path / NUMBERS).read_text())
    assert content["energy"]["largest_rate"] == pytest.approx(size, rel=1e-9)
    assert content["energy"]["holds"] is True
    assert decode_safetensors((tmp_path / ARRAYS).read_bytes())["factors/R"][:2] == ("F64", (80, 1, 1))


def test_a_strong_contraction_with_a_weight_is_written() -> None:
    R = np.tile([[1e-170, 1e-165], [0.0, 1e-170]], (60, 1, 1))  # weights of 1e340
    found = ProfileReading((Factors(R, np.arange(61), dimension=2),), (np.tile(np.eye(2), (61, 1, 1)),))
    json.dumps(numbers_of(found), allow_nan=False)


def test_the_two_numbers_of_the_energy_are_a_bound() -> None:
    energy = numbers_of(reading((np.r_[np.full(100, 1.1), np.full(100, 0.9)], np.arange(201))))["energy"]
    assert energy["rate"] < 1
    assert energy["largest_rate"] == pytest.approx(1.1, rel=1e-9)
    assert energy["constant_between"] >= energy["constant"] >= 1


def test_looks_that_failed_are_named_with_their_reason() -> None:
    looks = (
        Look(0, 0, None, {}, np.eye(1), "the forward block: no"),
        Look(30, 0, None, {"0": np.eye(1)}, np.eye(1)),
        Look(60, 0, None, {"0": np.eye(1), "1": np.eye(1)}, np.eye(1)),
    )
    found = reading((np.full(60, 0.9), np.arange(61)), looks=looks)
    content, arrays = numbers_of(found), arrays_of(found)
    assert content["missing"] == [{"step": 0, "reason": "the forward block: no"}]
    assert content["layers"] == ["0", "1"]
    assert arrays["mixed/steps"].tolist() == [30, 60]
    assert np.isnan(arrays["mixed/log_norms"]).tolist() == [[False, True], [False, False]]
