"""Whatever is done to a chained file is found and named, or changes nothing."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopt.lyapunov import JSONLSink, StepRecord, read_records
from stableopt.lyapunov.sinks import Chain, verify_chain
from stableopt.lyapunov.sinks.chain import add_link, first_link, split_link
from tests.lyapunov.sinks.files import plain, records_of, write


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chain") / "energy.jsonl", (1, 2)).read_bytes()


def outcome(path, content):
    """The records and the head of a file with this content, or the message."""
    path.write_bytes(content)
    try:
        records = [record.to_json() for record in read_records(path)]
    except ValueError as error:
        return str(error)
    return records, verify_chain(path).head


def line_of(content, position):
    return content.count(b"\n", 0, position) + 1


def edits(content, positions, changes):
    """Where, and the content with one byte removed, replaced, or inserted."""
    for at in positions:
        yield at, content[:at] + content[at + 1 :]
        for byte in (change(content[at]) for change in changes):
            yield at, content[:at] + bytes([byte]) + content[at + 1 :]
            yield at, content[:at] + bytes([byte]) + content[at:]


CHANGES = [lambda c: c ^ 1, lambda c: c ^ 32, lambda c: c ^ 128, lambda c: 32, lambda c: 10, lambda c: 48]


def assert_found_or_harmless(path, content, all_edits):
    good = outcome(path, content)
    assert not isinstance(good, str)
    for at, edited in all_edits:
        found = outcome(path, edited)
        if isinstance(found, str):
            assert any(f"line {line_of(content, at) + later} " in found for later in (0, 1)), (at, found)
        else:  # the very last line break is missing, or the edit was none
            assert at == len(content) - 1 or edited == content, (at, edited[at : at + 1])
            assert found == good, at


@pytest.mark.slow
def test_every_edit_of_one_byte_is_found_or_changes_nothing(tmp_path, content):
    assert_found_or_harmless(tmp_path / "a", content, edits(content, range(len(content)), CHANGES))


@pytest.mark.parametrize("change", CHANGES)
def test_edits_of_one_byte_are_found_or_change_nothing(tmp_path, content, change):
    last = range(len(content) - 3, len(content))
    assert_found_or_harmless(tmp_path / "a", content, edits(content, [*range(0, len(content), 37), *last], [change]))


def test_what_follows_the_last_line_break_is_no_record(tmp_path, content):
    good = outcome(tmp_path / "a", content)
    for byte in (*b' \n\r0x{}[]"\0', 0xFF):
        found = outcome(tmp_path / "a", content + bytes([byte]))
        assert found == good or "line 3 " in found


@given(data=st.data())
@settings(max_examples=60)
def test_a_random_edit_is_found_or_changes_nothing(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / "edited.jsonl"
    good = outcome(path, content)
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(len(content), begin + 40)))
    edited = content[:begin] + data.draw(st.binary(max_size=9)) + content[end:]
    found = outcome(path, edited)
    if not isinstance(found, str):
        whole = edited.rpartition(b"\n")[0] + b"\n"
        assert found == good or (content.startswith(whole) and found[0] == good[0][: len(found[0])])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a, b, c, d: [b, c, d], 1),
        (lambda a, b, c, d: [a, c, d], 2),
        (lambda a, b, c, d: [a, b, d], 3),
        (lambda a, b, c, d: [b, a, c, d], 1),
        (lambda a, b, c, d: [a, c, b, d], 2),
        (lambda a, b, c, d: [a, b, d, c], 3),
        (lambda a, b, c, d: [a, a, b, c, d], 2),
        (lambda a, b, c, d: [split_link(a)[0], b, c, d], 2),
        (lambda a, b, c, d: [a, split_link(b)[0], c, d], 2),
        (lambda a, b, c, d: [a, b, c, split_link(d)[0]], 4),
        (lambda a, b, c, d: [a, plain(1), b, c, d], 2),
        (lambda a, b, c, d: [plain(0), a, b, c, d], 2),
        (lambda a, b, c, d: [a, b, c, d, plain(9)], 5),
        (lambda a, b, c, d: [a, b, c, d, add_link(plain(9), first_link())[0]], 5),
        (lambda a, b, c, d: [a, add_link(split_link(b)[0], first_link())[0], c, d], 2),
        (lambda a, b, c, d: [a, b, b"", c, d], 3),
    ],
)
def test_lines_that_were_removed_inserted_or_moved_are_named(tmp_path, change, named):
    path = write(tmp_path / "energy.jsonl", (2, 3, 4, 5))
    path.write_bytes(b"".join(line + b"\n" for line in change(*path.read_bytes().splitlines())))
    for check in (read_records, verify_chain):
        with pytest.raises(ValueError, match=rf"energy\.jsonl, line {named} "):
            check(path)


def test_an_edited_line_with_a_digest_made_anew_is_found_at_the_next(tmp_path):
    path = write(tmp_path / "energy.jsonl", (1, 2, 3))
    a, b, c = path.read_bytes().splitlines()
    forged = add_link(split_link(b)[0].replace(b'"loss": 0.5', b'"loss": 0.4'), split_link(a)[1])[0]
    assert forged != b
    path.write_bytes(b"\n".join([a, forged, c, b""]))
    with pytest.raises(ValueError, match="line 3 does not follow"):
        read_records(path)


def test_what_the_chain_cannot_show_its_head_shows(tmp_path):
    path = write(tmp_path / "energy.jsonl", (1, 2, 3))
    whole = verify_chain(path)
    assert whole == Chain(lines=3, chained=3, head=split_link(path.read_bytes().splitlines()[-1])[1])
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert verify_chain(path).chained == 2
    assert verify_chain(path).head != whole.head
    rebuilt = write(tmp_path / "rebuilt.jsonl", (1, 2, 4))
    assert verify_chain(rebuilt).chained == 3
    assert verify_chain(rebuilt).head != whole.head


def test_the_chain_is_what_the_documentation_says(tmp_path):
    """An independent reader: standard library, ten lines, nothing of ours."""
    path = write(tmp_path / "energy.jsonl", range(1, 6))
    chain = hashlib.sha256(b"stableopt: a chain of step records\n").hexdigest()
    for line in path.read_text().splitlines():
        data = json.loads(line)
        assert list(data)[-1] == "chain"
        found = data.pop("chain")
        chain = hashlib.sha256((chain + json.dumps(data, sort_keys=True)).encode()).hexdigest()
        assert found == chain
    assert chain == verify_chain(path).head


def test_a_file_that_began_without_a_chain_goes_on_with_one(tmp_path):
    path = tmp_path / "energy.jsonl"
    path.write_bytes(plain(1, schema=1) + b"\n" + plain(2) + b"\n")
    assert verify_chain(path) == Chain(lines=2, chained=0, head="")
    write(path, (3, 4))
    found = verify_chain(path)
    assert (found.lines, found.chained) == (4, 2)
    assert records_of(path) == [1, 2, 3, 4]
    write(path, (5,))
    assert verify_chain(path).chained == 3
    lines = path.read_bytes().splitlines(keepends=True)
    for left in ([0, 2, 3, 4], [2, 3, 4], [0, 1, 3, 4]):  # the last line before the chain is bound to it
        path.write_bytes(b"".join(lines[i] for i in left))
        with pytest.raises(ValueError, match="does not follow"):
            read_records(path)


def test_an_empty_file_and_an_absent_one(tmp_path):
    (tmp_path / "a").touch()
    assert verify_chain(tmp_path / "a") == Chain(lines=0, chained=0, head="")
    with pytest.raises(FileNotFoundError):
        verify_chain(tmp_path / "b")


texts = st.text(max_size=12) | st.sampled_from(['", "chain": "', '"chain"', "chain", '\\"}', "}\n{"])


@settings(max_examples=40)
@given(st.dictionaries(texts, texts | st.dictionaries(texts, texts, max_size=2), min_size=1, max_size=3))
def test_a_link_comes_off_as_it_was_put_on(data):
    content = json.dumps(data).encode()
    line, digest = add_link(content, first_link())
    assert split_link(line) == (content, digest)
    assert split_link(content) == (content, "")
    if "chain" not in data:
        assert json.loads(line) == {**data, "chain": digest}


def test_a_digest_is_64_small_hexadecimal_digits():
    line, _ = add_link(b'{"a": 1}', first_link())
    for wrong in (
        line[:-66] + line[-66:].upper(),
        line[:-3] + b'g"}',
        line + b" ",
        line.replace(b', "chain"', b',"chain"'),
        line[:-1],
    ):
        assert split_link(wrong) == (wrong, "")


def formatted_anew(lines):
    yield "line breaks", [line + b"\r" for line in lines]
    yield "separators", [json.dumps(json.loads(line), separators=(",", ":")).encode() for line in lines]
    yield "order", [json.dumps(dict(reversed(json.loads(line).items()))).encode() for line in lines]
    yield "spaces", [b" " + line + b" " for line in lines]
    yield "escapes", [line.replace(b'"chain"', b'"ch\\u0061in"') for line in lines]


def test_a_file_that_was_edited_and_formatted_anew_is_no_file_without_a_chain(tmp_path):
    lines = write(tmp_path / "energy.jsonl", (1, 2, 3)).read_bytes().splitlines()
    path = tmp_path / "again.jsonl"
    for kind, others in formatted_anew([line.replace(b'"loss": 0.5', b'"loss": 0.4') for line in lines]):
        for changed in (others, [*others[:2], lines[2]]):
            path.write_bytes(b"".join(line + b"\n" for line in changed))
            for check in (read_records, verify_chain):
                with pytest.raises(ValueError, match=r'again\.jsonl, line 1 (has a "chain" in another form|does not)'):
                    check(path)
        path.write_bytes(b"".join(line + b"\n" for line in [lines[0], others[1], lines[2]]))
        with pytest.raises(ValueError, match=r"line 2 "):
            verify_chain(path)
        assert kind


def test_a_text_about_a_chain_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(StepRecord(step=1, reason='the "chain" \\u0061', norms={"chain": 1.0}).to_json() + "\n")
    assert verify_chain(path) == Chain(lines=1, chained=0, head="")


def test_two_runs_that_write_to_one_file_are_told(tmp_path):
    path = tmp_path / "energy.jsonl"
    a, b = JSONLSink(path), JSONLSink(path)
    a.write(StepRecord(step=1))
    b.write(StepRecord(step=1))
    with pytest.warns(RuntimeWarning, match=r"somebody else writes to .*energy\.jsonl"):
        a.write(StepRecord(step=3))
    with pytest.warns(RuntimeWarning, match="somebody else"):
        b.write(StepRecord(step=4))
    a.write(StepRecord(step=5))  # once is enough
    a.close(), b.close()
    assert verify_chain(path).chained == 5
    with pytest.raises(ValueError, match="line 2 is of step 1, after one of step 1"):
        read_records(path)
