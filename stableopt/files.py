"""Files that are complete or absent, never half written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

__all__ = ["decode_safetensors", "encode_safetensors", "write_atomically"]

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4}
_LARGEST_HEADER = 100_000_000


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


def decode_safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    r"""Return the arrays of a safetensors file, which may be damaged or come from anywhere.

    Args:
        data: the bytes of the file.

    Returns:
        Name -> (dtype as the format names it, shape, numbers in row-major order, little-endian), without the metadata.

    Raises:
        ValueError: if the file is cut, its header does not describe it, or a dtype is none of F64, F32, I64 and I32.

    Examples:
        >>> {
        ...     name: entry[:2]
        ...     for name, entry in decode_safetensors(encode_safetensors({"a": ("F32", (1,), bytes(4))})).items()
        ... }
        {'a': ('F32', (1,))}
        >>> decode_safetensors(b"short")
        Traceback (most recent call last):
        ValueError: it ends within its header, after 5 bytes.
    """
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else _LARGEST_HEADER
    if size >= _LARGEST_HEADER or 8 + size > len(data):
        raise ValueError(f"it ends within its header, after {len(data)} bytes.")
    header = json.loads(data[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object.")  # noqa: TRY004 - content of a file
    body, found = memoryview(data)[8 + size :], {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind = entry["dtype"]
            shape = tuple(int(length) for length in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
            expected = _SIZES[kind] * prod(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"its header does not describe '{name}' ({error!r}).") from error
        if min(shape, default=0) < 0 or not 0 <= start <= end <= len(body) or end - start != expected:
            raise ValueError(f"the numbers of '{name}' are not all there.")
        found[name] = kind, shape, body[start:end]
    return found


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
