"""Files that are complete or absent, never half written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["encode_safetensors", "write_atomically"]


def encode_safetensors(arrays: Mapping[str, tuple[str, Sequence[int], bytes]]) -> bytes:
    r"""Return the bytes of a safetensors file: the same arrays always give the same bytes.

    Args:
        arrays: name -> (dtype as the format names it, shape, numbers in row-major order, little-endian).

    Examples:
        >>> data = encode_safetensors({"a": ("F32", (1,), bytes(4))})
        >>> len(data), data[-4:]
        (68, b'\x00\x00\x00\x00')
    """
    header, chunks, start = {}, [], 0
    for name in sorted(arrays):
        kind, shape, chunk = arrays[name]
        chunks.append(chunk)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, start + len(chunk)]}
        start += len(chunk)
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data to eight bytes
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, whole.

    A temporary file in the same folder is flushed to disk and renamed over the old file; then the folder is flushed too.

    Args:
        path: the file; an existing one stays as it is until the new one is complete.
        content: all its bytes.

    Raises:
        OSError: if the folder cannot be written; the old file is then as before.

    Examples:
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_atomically(folder / "a.txt", b"whole")
        >>> (folder / "a.txt").read_bytes(), len(list(folder.iterdir()))
        (b'whole', 1)
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
