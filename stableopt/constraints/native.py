"""Loops that no tensor operation expresses, compiled once from C where the machine has a compiler; elsewhere Python runs them.

An operator hands its source to :func:`compiled`. The library is kept in the cache folder of the user (``XDG_CACHE_HOME``, else
``~/.cache``), under the digest of source, compiler and options, and written atomically. The environment variable
``STABLEOPT_NATIVE=0`` turns this off; ``CC`` names the compiler. Sums are never reordered or fused (``-O2 -ffp-contract=off``,
no fast-math), so that the compiled loop and the Python loop give the same bits: which one ran cannot be seen in a result.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from stableopt.files import write_atomically

__all__ = ["compiled"]

_OPTIONS = ("-O2", "-ffp-contract=off", "-fPIC", "-shared", "-std=c99")
_PATIENCE = 60.0


@functools.cache
def compiled(source: str) -> ctypes.CDLL | None:
    """Compile C99 source to a shared library and load it, once per process.

    Args:
        source: the C code; it includes what it needs and exports plain functions.

    Returns:
        The library, or ``None`` if it is turned off, there is no compiler, or anything fails: callers then use Python.

    Examples:
        >>> library = compiled("double twice(double x) { return 2.0 * x; }")
        >>> if library is not None:
        ...     library.twice.restype, library.twice.argtypes = ctypes.c_double, [ctypes.c_double]
        >>> library is None or library.twice(4.0) == 8.0
        True
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("STABLEOPT_NATIVE", "1") == "0" or os.name != "posix":
        return None
    try:
        folder = _cache_folder()
        digest = hashlib.sha256(
            "\0".join([source, compiler, _version(compiler), *_OPTIONS, platform.machine()]).encode()
        )
        library = folder / f"{digest.hexdigest()[:32]}.so"
        if not library.exists():
            _build(compiler, source, library)
        return ctypes.CDLL(str(library)) if _is_ours(library) else None
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "stableopt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise PermissionError(f"{folder} can be written by others.")
    return folder


def _is_ours(path: Path) -> bool:
    """Return whether only this user can have written a path: code is loaded from it."""
    info = path.stat()
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _version(compiler: str) -> str:
    return subprocess.run(  # noqa: S603  the compiler of the user's own path
        [compiler, "--version"], capture_output=True, text=True, timeout=_PATIENCE, check=True
    ).stdout


def _build(compiler: str, source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        code, made = Path(scratch) / "loops.c", Path(scratch) / "loops.so"
        code.write_text(source, encoding="utf-8")
        subprocess.run(  # noqa: S603  the compiler of the user's own path
            [compiler, *_OPTIONS, str(code), "-o", str(made), "-lm"], capture_output=True, timeout=_PATIENCE, check=True
        )
        write_atomically(library, made.read_bytes())
        library.chmod(0o600)
