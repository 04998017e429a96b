"""Compiled loops: built once, kept privately, never needed."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stableopt.constraints.native import compiled

SOURCE = "double fused(double a, double b, double c) { return a * b + c; }"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("STABLEOPT_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    compiled.cache_clear()
    yield tmp_path / "stableopt"
    compiled.cache_clear()


@needs_compiler
def test_multiply_and_add_are_rounded_one_by_one_as_in_python(cache: Path) -> None:
    library = compiled(SOURCE)
    assert library is not None
    library.fused.restype, library.fused.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    a = 1.0 + 2.0**-30
    assert library.fused(a, a, -(a * a)) == 0.0


@needs_compiler
def test_a_library_is_built_once_and_kept_privately(cache: Path) -> None:
    assert compiled(SOURCE) is not None
    (kept,) = cache.iterdir()
    before = kept.stat()
    assert before.st_mode & 0o077 == 0
    assert cache.stat().st_mode & 0o077 == 0
    compiled.cache_clear()
    assert compiled(SOURCE) is not None
    assert kept.stat().st_mtime_ns == before.st_mtime_ns


@needs_compiler
def test_a_library_that_others_could_have_written_is_not_loaded(cache: Path) -> None:
    assert compiled(SOURCE) is not None
    (kept,) = cache.iterdir()
    kept.chmod(0o666)
    compiled.cache_clear()
    assert compiled(SOURCE) is None
    kept.chmod(0o600)
    cache.chmod(0o777)
    compiled.cache_clear()
    assert compiled(SOURCE) is None


def test_it_can_be_turned_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABLEOPT_NATIVE", "0")
    assert compiled(SOURCE) is None
    assert not cache.exists()


@pytest.mark.parametrize("source", ["not C", "#error no"])
def test_without_a_working_compiler_there_is_none(cache: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(source) is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiled(SOURCE) is None
    monkeypatch.setenv("CC", "false")
    compiled.cache_clear()
    assert compiled(SOURCE) is None
