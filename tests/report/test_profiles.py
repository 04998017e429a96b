"""The files of a profile are read as they are, or refused with a reason."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from stableopt.lyapunov.profile.files import arrays_of, numbers_of
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.reading import ProfileReading
from stableopt.report import read_run
from stableopt.report.profiles import ProfileSummary, read_arrays, read_numbers
from tests.report.folders import run_folder
from tests.report.profiled import numbers, system, write_profile


def test_arrays_are_read_bit_for_bit(tmp_path):
    arrays = system(20) | {
        "small": np.array([5e-324, -0.0, np.nan, np.inf]),
        "none": np.empty((0, 3)),
    }
    write_profile(tmp_path, arrays=arrays)
    read = read_arrays(tmp_path / "profile.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -8, -1])
def test_a_cut_file_is_refused(tmp_path, cut):
    path = write_profile(tmp_path) / "profile.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"within its header|not all there|control character|Unterminated|Expecting"):
        read_arrays(path)


def _file(header: object, body: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_file([]), "no JSON object"),
        (_file({"a": None}), "does not describe 'a'"),
        (_file({"a": {"dtype": "F64", "shape": [1]}}), "does not describe 'a'"),
        (_file({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 8]}}), "does not describe 'a'"),
        (_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "F32 is none of F64, I64"),
        (_file({"a": {"dtype": "F64", "shape": ["x"], "data_offsets": [0, 8]}}), "does not describe 'a'"),
        (_file({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8, 9]}}), "does not describe 'a'"),
        (_file({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}), "'a' are not all there"),
        (_file({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}), "'a' are not all there"),
        (_file({"a": {"dtype": "F64", "shape": [1], "data_offsets": [-8, 0]}}), "'a' are not all there"),
        (_file({"a": {"dtype": "F64", "shape": [-1, -1], "data_offsets": [0, 8]}}), "'a' are not all there"),
        (struct.pack("<Q", 2**63) + b"{}", "within its header"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "decode"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, data, said):
    (tmp_path / "profile.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_arrays(tmp_path / "profile.safetensors")


def test_metadata_are_no_array(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "x.safetensors", metadata={"by": "test"})
    assert list(read_arrays(tmp_path / "x.safetensors")) == ["a"]


@pytest.mark.parametrize("text", ["[]", "{", '{"schema": 2}', '{"schema": "1"}', "{}", "null"])
def test_numbers_of_another_layout_are_refused(tmp_path, text):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected|Expecting"):
        read_numbers(tmp_path / "profile.json")


def test_what_the_profile_writes_is_what_the_report_reads(tmp_path):
    R = np.triu(np.random.default_rng(0).normal(size=(60, 2, 2)))
    R[:, range(2), range(2)] = np.abs(R[:, range(2), range(2)])
    theta = np.tile(np.eye(2), (61, 1, 1))
    reading = ProfileReading(pieces=(Factors(R, np.arange(61), dimension=2),), theta=(theta,))
    reading.save(tmp_path)
    run = read_run(tmp_path)
    assert not run.problems
    arrays = arrays_of(reading)
    assert run.profile.arrays.keys() == arrays.keys()
    for key, value in arrays.items():
        assert run.profile.arrays[key].tobytes() == np.ascontiguousarray(value).tobytes()
    assert run.profile.content == json.loads(json.dumps(numbers_of(reading)))


@pytest.mark.parametrize(("value", "number"), [("inf", math.inf), ("-inf", -math.inf), (-1.5, -1.5), (3, 3.0)])
def test_infinite_numbers_are_texts(value, number):
    assert ProfileSummary({"a": {"b": value}}).number("a", "b") == number


@pytest.mark.parametrize("value", [None, True, "1", "nan", "infinity", [], {}, 10**400])
def test_what_is_no_number_is_nan(value):
    profile = ProfileSummary(
        {"verdict": {"peak": value}, "energy": value, "exponents": value, "layers": value, "backend": value}
    )
    assert math.isnan(profile.number("verdict", "peak"))
    assert math.isnan(profile.number("energy", "rate"))
    assert profile.rows("exponents") == []
    assert profile.text("backend") == (value if isinstance(value, str) else "")
    assert profile.table("verdict", "peak") == {}


def test_a_series_has_a_place_for_each_value():
    arrays = {
        "steps": np.array([0, 10, 20]),
        "a": np.array([1.0, 2.0, 3.0]),
        "b": np.array([4.0, 5.0]),
        "c": np.ones((2, 2)),
    }
    profile = ProfileSummary({}, arrays)
    assert profile.series("steps", "a") == [(0.0, 1.0), (10.0, 2.0), (20.0, 3.0)]
    assert profile.series("steps", "b") == [(10.0, 4.0), (20.0, 5.0)]
    assert profile.series("nothing", "b") == profile.series("steps", "c") == profile.series("steps", "nothing") == []
    assert profile.series("b", "a") == profile.series("a", "b")[2:] == []


def test_a_folder_with_a_profile_is_read_completely(tmp_path):
    run = read_run(write_profile(run_folder(tmp_path / "a")))
    assert run.problems == {}
    assert run.absent == ()
    assert run.profile.content == numbers()
    assert run.profile.array("path", 1)[0] == 0.0
    assert read_run(run_folder(tmp_path / "b")).absent == ()
    assert not read_run(tmp_path / "b").profile


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
def test_one_file_alone_is_noted_as_the_lack_of_the_other(tmp_path, name):
    folder = write_profile(run_folder(tmp_path / "a"))
    (folder / name).unlink()
    run = read_run(folder)
    assert run.absent == (name,)
    assert bool(run.profile) == (name != "profile.json")


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff\n", b"null\n", b"[" * 100_000, b"\x08\0\0\0\0\0\0\0{}{}{}{}"]
)
@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
def test_a_damaged_file_is_a_problem_and_the_rest_is_read(tmp_path, name, damage):
    folder = write_profile(run_folder(tmp_path / "a"))
    (folder / name).write_bytes(damage)
    run = read_run(folder)
    assert set(run.problems) == {name}
    assert run.problems[name].startswith("cannot be read: ")
    assert bool(run.profile.arrays) == (name == "profile.json")
    assert bool(run.profile.content) == (name != "profile.json")
    assert run.history.count
