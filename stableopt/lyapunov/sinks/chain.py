"""The hash chain of a file of records: each line carries a digest of itself and of all that came before."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from stableopt.lyapunov.sinks.lines import whole_lines

__all__ = ["Chain", "Links", "add_link", "first_link", "split_link", "verify_chain"]

_SEED = b"stableopt: a chain of step records\n"
_MARK = b', "chain": "'
_HEX = re.compile(rb"[0-9a-f]{64}")
_DECODER = json.JSONDecoder()
_LENGTH = len(_MARK) + 64 + len(b'"}')


def first_link(before: bytes = b"") -> str:
    r"""Return what the first chained line of a file follows: ``sha256("stableopt: a chain of step records\n" + before)``.

    Args:
        before: the line before it, without its line break, if the file began without a chain.

    Examples:
        >>> first_link()[:8]
        '637f1b2d'
    """
    return hashlib.sha256(_SEED + before).hexdigest()


def add_link(content: bytes, head: str) -> tuple[bytes, str]:
    r"""Return a JSON object with one key more, ``"chain"``, the last, and its value, :math:`c_k = \text{sha256}(c_{k-1} \| x_k)`.

    The digest :math:`c_{k-1}` enters as its 64 hexadecimal digits, the object :math:`x_k` as its bytes without that key.

    Args:
        content: a JSON object that has a key, one line without its line break.
        head: the digest :math:`c_{k-1}` of the line before, or :func:`first_link`.

    Examples:
        >>> line, head = add_link(b'{"step": 1}', first_link())
        >>> line[:29], len(line), head == hashlib.sha256(first_link().encode() + b'{"step": 1}').hexdigest()
        (b'{"step": 1, "chain": "1a979bf', 88, True)
    """
    digest = hashlib.sha256(head.encode() + content).hexdigest()
    return b"".join((content[:-1], _MARK, digest.encode(), b'"}')), digest


def split_link(line: bytes) -> tuple[bytes, str]:
    """Return the object and the digest that :func:`add_link` joined; the line and "" if it is not such a line, byte for byte.

    Examples:
        >>> split_link(add_link(b'{"step": 1}', first_link())[0])[0]
        b'{"step": 1}'
        >>> split_link(b'{"step": 1}')
        (b'{"step": 1}', '')
    """
    content, end = line[:-_LENGTH], line[-_LENGTH:]
    digest = end[len(_MARK) : -2]
    if content and end == _MARK + digest + b'"}' and _HEX.fullmatch(digest):
        return content + b"}", digest.decode()
    return line, ""


class Links:
    r"""Follow the chain through the lines of a file.

    Examples:
        >>> line, head = add_link(b'{"step": 1}', first_link())
        >>> links = Links()
        >>> links.take(line), links.chained, links.head == head
        (b'{"step": 1}', 1, True)
        >>> links.take(line)
        Traceback (most recent call last):
        ValueError: does not follow from the line before: ...
    """

    def __init__(self) -> None:
        self.lines = 0
        self.chained = 0
        self._link = first_link()

    @property
    def head(self) -> str:
        """The digest of the last line, "" as long as no line was chained.

        Examples:
            >>> Links().head
            ''
        """
        return self._link if self.chained else ""

    def take(self, line: bytes) -> bytes:
        """Return the next line without its digest.

        Args:
            line: without its line break.

        Raises:
            ValueError: if it does not follow from the line before, or has no digest although an earlier line has, or a digest in
                another form than that of :func:`add_link`.

        Examples:
            >>> Links().take(b'{"step": 1}')
            b'{"step": 1}'
        """
        content, digest = split_link(line)
        if digest:
            if digest != hashlib.sha256(self._link.encode() + content).hexdigest():
                raise ValueError(
                    "does not follow from the line before: one of the two was edited, a line was removed, inserted or moved, "
                    "or two runs wrote to one file"
                )
            self.chained += 1
            self._link = digest
        elif _names_a_chain(line):
            raise ValueError(
                'has a "chain" in another form than it is written in: the file was formatted anew (line breaks, spaces, order of '
                "keys), so nothing shows whether it was edited"
            )
        elif self.chained:
            raise ValueError('has no "chain" although earlier lines have one: it was edited or inserted')
        else:
            self._link = first_link(line)
        self.lines += 1
        return content


def _names_a_chain(line: bytes) -> bool:
    """Return whether a line begins with a JSON object that has the key ``"chain"``."""
    if b'"chain"' not in line and b"\\u" not in line:
        return False
    try:  # any byte is a character there; only the structure matters
        data, _ = _DECODER.raw_decode(line.removeprefix(b"\xef\xbb\xbf").strip().decode("latin-1"))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "chain" in data


@dataclass(frozen=True)
class Chain:
    """State what :func:`verify_chain` found.

    Args:
        lines: the number of lines, without a torn last one.
        chained: how many of them the chain covers: the last ones, and all in a file of this version.
        head: the digest of the last line, 64 hexadecimal digits; "" if no line is chained. It stands for every byte of the
            chained lines: kept elsewhere, it also shows that lines were removed from the end, or the chain rebuilt.

    Examples:
        >>> Chain(lines=0, chained=0, head="").head
        ''
    """

    lines: int
    chained: int
    head: str


def verify_chain(path: str | os.PathLike[str]) -> Chain:
    r"""Check that no chained line of a file of records was edited, removed, inserted or moved.

    Args:
        path: a file that :class:`~stableopt.lyapunov.JSONLSink` wrote; read a line at a time. A torn last line is left out.

    Raises:
        ValueError: if a line does not follow from the line before, or has its digest in another form; the message names it.
        OSError: if the file cannot be read.

    Note:
        Evidence of damage and of careless editing, no proof of origin: the rule is public, and whoever edits a line can compute
        the chain anew from there. Lines removed from the end leave a valid chain, with another head. Lines from before the chain
        (schema 1) are counted and not checked, except the last of them. Whether the lines are records is the question of
        :func:`~stableopt.lyapunov.read_records`, which checks the chain too.

    Examples:
        >>> import tempfile
        >>> from stableopt.lyapunov import JSONLSink, StepRecord
        >>> folder = tempfile.TemporaryDirectory()
        >>> sink = JSONLSink(Path(folder.name) / "energy.jsonl")
        >>> for step in (1, 2, 3):
        ...     sink.write(StepRecord(step=step))
        >>> sink.close()
        >>> verify_chain(sink.path).chained
        3
        >>> _ = sink.path.write_bytes(sink.path.read_bytes().replace(b'"step": 2', b'"step": 1'))
        >>> verify_chain(sink.path)
        Traceback (most recent call last):
        ValueError: energy.jsonl, line 2 does not follow from the line before: ...
        >>> folder.cleanup()
    """
    links = Links()
    for number, line in whole_lines(path):
        try:
            links.take(line)
        except ValueError as error:
            raise ValueError(f"{Path(path).name}, line {number} {error}.") from None
    return Chain(links.lines, links.chained, links.head)
