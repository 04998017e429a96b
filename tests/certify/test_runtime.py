"""Formats are those of the hardware, and flags that change the arithmetic are seen."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch

from stableopt.certify.runtime import RUNTIMES, Format, check, current, find_runtime, require
from stableopt.errors import CertificateError

BACKENDS: Any = torch.backends


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    BACKENDS.mkldnn.matmul.fp32_precision = "none"
    BACKENDS.mkldnn.conv.fp32_precision = "none"


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_a_number_is_stored_within_its_format(name: str) -> None:
    kind, dtype = RUNTIMES[name].results, getattr(torch, name)
    limits = torch.finfo(dtype)
    assert kind.largest == limits.max
    assert kind.unit == limits.eps / 2
    x = torch.cat([torch.rand(2000, dtype=torch.float64) + 1, torch.logspace(-30, 4, 2000, dtype=torch.float64)])
    for exact, stored in zip(x.tolist(), x.to(dtype).double().tolist(), strict=True):
        assert abs(Fraction(exact) - Fraction(stored)) <= Fraction(kind.unit) * Fraction(exact) + Fraction(kind.tiny)


def test_formats_join() -> None:
    assert Format(1.0, 0.5, 9.0) | Format(0.5, 1.0, 8.0) == Format(1.0, 1.0, 8.0)


def test_this_process_is_within_the_cpu_runtimes() -> None:
    for runtime in RUNTIMES.values():
        assert check(runtime) == []
        require(runtime, "cpu")


@pytest.mark.parametrize("word", ["high", "medium"])
def test_a_lowered_precision_is_seen(word: str) -> None:
    torch.set_float32_matmul_precision(word)
    assert current()["float32 products"] == {"high": "tf32", "medium": "bf16"}[word]
    (difference,) = check(RUNTIMES["float32"])
    assert "float32 products" in difference
    assert bool(check(RUNTIMES["tf32"])) == (word == "medium")
    assert check(RUNTIMES["float64"]) == []
    with pytest.raises(CertificateError, match="float32 products"):
        require(RUNTIMES["float32"], "cpu")


@pytest.mark.parametrize("part", ["all", "matmul", "conv"])
def test_the_flags_of_the_backends_are_seen(part: str) -> None:
    owner = BACKENDS if part == "all" else getattr(BACKENDS.mkldnn, part)
    owner.fp32_precision = "bf16"
    assert current()["float32 products"] == "bf16"
    owner.fp32_precision = "ieee"
    assert current()["float32 products"] == "ieee"


def test_flags_that_no_radius_depends_on_are_read_only() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert current()["autocast"] == "on"
        assert check(RUNTIMES["float32"]) == []  # predict sets its own
    assert current()["autocast"] == "off"
    assert current()["default dtype"] == "float64"
    assert current()["small numbers"] in {"kept", "flushed"}


def test_emulation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_EMULATE_SINGLE_PRECISION", "1")
    assert "emulation" in check(RUNTIMES["float64"])[0]
    monkeypatch.setenv("CUBLAS_EMULATE_SINGLE_PRECISION", "0")
    assert check(RUNTIMES["float64"]) == []


def test_another_device_is_another_runtime() -> None:
    assert "cuda" in check(RUNTIMES["float32"].on("cuda"), "cpu")[0]
    assert RUNTIMES["float32"].on("cuda").sums == 2.0**-24
    assert RUNTIMES["bfloat16"].on("cuda").sums == 2.0**-22
    assert RUNTIMES["bfloat16"].on("cpu") == RUNTIMES["bfloat16"]
    assert current("cuda")["half sums"] == "half"  # the default of torch
    assert "half sums" in check(RUNTIMES["bfloat16"].on("cuda"), "cuda")[0]
    with pytest.raises(ValueError, match="mps"):
        RUNTIMES["float32"].on("mps")


def test_unknown_runtimes_are_refused() -> None:
    assert find_runtime(RUNTIMES["tf32"]) is RUNTIMES["tf32"]
    with pytest.raises(ValueError, match="float8"):
        find_runtime("float8")
