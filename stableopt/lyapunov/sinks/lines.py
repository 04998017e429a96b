"""The lines of a file that a killed process may have left torn, from its beginning or from its end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["is_torn", "lines_from_end", "whole_lines"]

_BLOCK = 1 << 16
_DECODER = json.JSONDecoder()


def is_torn(line: bytes) -> bool:
    r"""Whether what follows the last line break of a file is only the beginning of a JSON object.

    An object that is complete was not torn, whatever follows it: no beginning of a line is a whole object.

    Examples:
        >>> is_torn(b'{"step": 1'), is_torn(b'{"step": 1}'), is_torn(b'{"step": 1}x')
        (True, False, False)
    """
    if not line.startswith(b"{"):
        return True
    try:
        _DECODER.raw_decode(line.decode("latin-1"))  # any byte is a character there; only the structure matters
    except (ValueError, RecursionError):
        return True
    return False


def whole_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    r"""Yield the lines of a file of JSON objects with their numbers from 1, without their line breaks and without a torn last one.

    A file that is being written is read up to its first line without a line break.

    Args:
        path: the file; read as it is asked for, a line at a time.

    Raises:
        OSError: if the file cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.jsonl"
        ...     _ = path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
        ...     list(whole_lines(path))
        [(1, b'{"a": 1}'), (2, b'{"a": 2}')]
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line[:-1]
            else:
                if not is_torn(line):
                    yield number, line
                return  # what a writer appends meanwhile belongs to a line that was taken, or left out


def lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    r"""Yield where each line of a file begins, and the line without its line break, the last line first.

    Reads blocks from the end as they are asked for: for files of :math:`10^7` lines. The first line that comes is what follows
    the last line break; it is empty in a file that ends with one.

    Args:
        file: an open file that can be sought.

    Examples:
        >>> import io
        >>> list(lines_from_end(io.BytesIO(b"ab\nc\n")))
        [(5, b''), (3, b'c'), (0, b'ab')]
    """
    start = file.seek(0, os.SEEK_END)
    parts: list[bytes] = []  # of the line whose beginning is not yet known, the last part first
    while start > 0:
        block = min(start, _BLOCK)
        start -= block
        file.seek(start)
        head, *lines = file.read(block).split(b"\n")
        end = start + block
        while lines:
            line = lines.pop()
            end -= len(line)
            yield end, b"".join([line, *reversed(parts)])
            parts = []
            end -= 1
        parts.append(head)
    yield 0, b"".join(reversed(parts))
