"""Attested claims: they name one record and no other, and repeat what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from stableopt.certify.attested import attest_ledger, attest_record, attest_run, chain_head, save_ledger
from stableopt.lyapunov import JSONLSink, StepRecord, verify_chain
from stableopt.optim import StabilityLedger

RECORDS = [
    StepRecord(step=1, loss=1.0, verdict="decreased", action="accepted"),
    StepRecord(step=2, loss=0.5, verdict="increased", action="accepted"),
    StepRecord(step=3, loss=0.7, verdict="increased", action="undone"),
    StepRecord(step=4, loss=0.5, verdict="undecided", action="accepted"),
    StepRecord(step=5, loss=0.4, verdict="nonfinite", action="undone"),
    StepRecord(step=6, loss=0.4, verdict="unobserved"),
]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    sink = JSONLSink(tmp_path / "energy.jsonl")
    for one in RECORDS:
        sink.write(one)
    sink.close()
    return sink.path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A record without digests in its lines, as older versions wrote it."""
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(one.to_json() + "\n" for one in RECORDS))
    return path


def by_hand(path: Path) -> str:
    """The definition, written out."""
    head = hashlib.sha256(b"stableopt: a chain of step records\n").hexdigest()
    for line in path.read_bytes().splitlines():
        content = line[:-78] + b"}" if b'"chain"' in line else line
        head = hashlib.sha256(head.encode() + content).hexdigest()
    return head


def test_the_record_is_counted_and_named(record: Path) -> None:
    claim = attest_record(record)
    assert claim == {
        "id": "energy_record", "file": "energy.jsonl", "sha256": hashlib.sha256(record.read_bytes()).hexdigest(),
        "hash_chain_head": verify_chain(record).head, "chained": True, "steps": 6, "violations": 1, "undone": 1, "undecided": 1,
        "unobserved": 1, "nonfinite": 1,
    }  # fmt: skip
    assert claim["hash_chain_head"] == by_hand(record) == chain_head(record)
    json.dumps(claim, allow_nan=False)


def test_the_head_is_that_of_the_content_with_and_without_digests_in_the_lines(record: Path, plain: Path) -> None:
    assert chain_head(plain) == by_hand(plain) == chain_head(record)
    assert attest_record(plain)["chained"] is False


@pytest.mark.parametrize("k", range(len(RECORDS)))
def test_to_change_drop_or_move_any_line_changes_the_head(plain: Path, k: int) -> None:
    lines, head = plain.read_bytes().splitlines(keepends=True), chain_head(plain)
    changed = lines[k].replace(b'"trials": 0', b'"trials": 1')
    assert changed != lines[k]
    others = (k + 1) % len(lines)
    moved = list(lines)
    moved[k], moved[others] = moved[others], moved[k]
    for edited in (
        [*lines[:k], changed, *lines[k + 1 :]],
        [*lines[:k], *lines[k + 1 :]],
        moved,
        [*lines[:k], lines[k], *lines[k:]],
    ):
        plain.write_bytes(b"".join(edited))
        assert chain_head(plain) != head


@pytest.mark.parametrize("k", range(len(RECORDS) - 1))
def test_where_lines_carry_digests_the_edit_itself_is_refused(record: Path, k: int) -> None:
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join([*lines[:k], lines[k].replace(b'"trials": 0', b'"trials": 1'), *lines[k + 1 :]]))
    with pytest.raises(ValueError, match=f"line {k + 1} does not follow"):
        chain_head(record)
    record.write_bytes(b"".join([*lines[:k], *lines[k + 1 :]]))
    with pytest.raises(ValueError, match=f"line {k + 1} does not follow"):
        attest_record(record)


def test_a_torn_last_line_is_left_out_and_a_dropped_one_is_seen_in_the_head(record: Path) -> None:
    whole, head = record.read_bytes(), chain_head(record)
    record.write_bytes(whole + b'{"acti')
    assert chain_head(record) == head
    assert attest_record(record)["steps"] == 6
    record.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert chain_head(record) != head
    record.write_bytes(whole[:-1])  # without its line break it is the same record
    assert chain_head(record) == head


def test_a_ledger_is_repeated_in_hexadecimal_and_its_bounds_rounded_up(record: Path) -> None:
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.3)
    ledger = StabilityLedger(optimizer)
    for _ in range(3):
        w.grad = torch.ones(1)
        optimizer.step()
    bound = ledger.convex(1.0, samples=7, smoothness=2.0)
    save_ledger(record.parent, ledger, {"convex": bound})
    energy, claim = attest_run(record.parent)
    assert energy == attest_record(record)
    assert claim == attest_ledger(ledger, {"convex": bound})
    assert (claim["id"], claim["steps"], claim["adapted"]) == ("ledger", 3, 0)
    assert float.fromhex(claim["total"]) == ledger.total
    assert float.fromhex(claim["bounds"]["convex"]) >= 2 / 7 * 0.9 * (1 - 1e-15)


GOOD = {"id": "ledger", "steps": 1, "adapted": 0, "bounds": {}} | dict.fromkeys(
    ("total", "squares", "largest", "rise"), "0x1p0"
)
DAMAGED = ["", "[]", "{}", '{"id": "ledger"}', '{"id": "other"}', "null", "[" * 100000, '{"id": "ledger", "steps": 1}']
EDITS = [
    {"steps": -1},
    {"steps": True},
    {"total": "nan"},
    {"proved": True},
    {"rise": "0x1p9999"},
    {"bounds": []},
    {"total": 1.0},
]


@pytest.mark.parametrize("text", [*DAMAGED, *(json.dumps(GOOD | edit) for edit in EDITS)])
def test_a_damaged_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps(GOOD))
    assert attest_run(tmp_path) == [GOOD | dict.fromkeys(("total", "squares", "largest", "rise"), (1.0).hex())]
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read|larger than"):
        attest_run(tmp_path)


def test_a_folder_without_a_record_attests_nothing_and_none_is_an_error(tmp_path: Path) -> None:
    assert attest_run(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        attest_run(tmp_path / "none")
