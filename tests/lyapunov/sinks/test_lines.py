"""Lines are the same from the beginning and from the end, and a torn one is told from a damaged one."""

from __future__ import annotations

import io
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt.lyapunov.sinks import lines as rules
from stableopt.lyapunov.sinks.lines import is_torn, lines_from_end, whole_lines


@given(st.lists(st.text("ab", max_size=9), min_size=1, max_size=9), st.integers(1, 12))
def test_lines_from_the_end_are_those_of_split_whatever_the_block(lines, block):
    content = "\n".join(lines).encode()
    before, rules._BLOCK = rules._BLOCK, block
    try:
        found = list(lines_from_end(io.BytesIO(content)))
    finally:
        rules._BLOCK = before
    assert [line.decode() for _, line in found] == lines[::-1]
    assert all(content[begin : begin + len(line)] == line for begin, line in found)
    assert all(begin == 0 or content[begin - 1 : begin] == b"\n" for begin, _ in found)


def test_the_end_of_a_long_file_is_found_without_reading_the_rest():
    class Counted(io.BytesIO):
        read_bytes = 0

        def read(self, size=-1):
            self.read_bytes += size
            return super().read(size)

    file = Counted(b"x" * 99 + b"\n" + (b"y" * 999 + b"\n") * 10_000)
    assert next(lines_from_end(file))[1] == b""
    assert file.read_bytes <= rules._BLOCK


values = st.recursive(
    st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=4))
def test_no_beginning_of_an_object_is_whole_and_nothing_after_it_makes_it_torn(data):
    line = json.dumps(data).encode()
    assert all(is_torn(line[:cut]) for cut in range(len(line)))
    assert not is_torn(line)
    assert not is_torn(line + b"x")
    assert not is_torn(line + b"\xff")


@pytest.mark.parametrize("line", [b"", b"x", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"{" * 100_000])
def test_what_is_no_object_is_torn(line):
    assert is_torn(line)


def test_whole_lines_are_numbered_from_one_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{}\n\nx\r\n{"a": 1}')
    assert list(whole_lines(path)) == [(1, b"{}"), (2, b""), (3, b"x\r"), (4, b'{"a": 1}')]
    path.write_bytes(b'{}\n{"a": 1')
    assert list(whole_lines(path)) == [(1, b"{}")]


@pytest.mark.parametrize("end", [b'{"a": 2}', b'{"a": '])
def test_nothing_is_read_after_a_line_that_was_not_whole(tmp_path, end):
    path = tmp_path / "a"
    path.write_bytes(b'{"a": 1}\n' + end)
    found = whole_lines(path)
    assert next(found) == (1, b'{"a": 1}')
    assert list(itertools.islice(found, 1)) == [(2, end)] * (not is_torn(end))
    with path.open("ab") as file:
        file.write(b'3}\n{"a": 4}\n')
    assert list(found) == []
