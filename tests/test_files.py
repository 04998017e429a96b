"""A file is the old one or the new one, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load

from stableopt import files
from stableopt.files import decode_safetensors, encode_safetensors, write_atomically


def test_content_replaces_the_old_file_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_kill_during_writing_never_leaves_a_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"0" * 2**20)
    script = (
        "import runpy, sys\nwrite_atomically = runpy.run_path(sys.argv[2])['write_atomically']\nprint('go', flush=True)\n"
        "while True:\n    for c in b'0123456789': write_atomically(sys.argv[1], bytes([c]) * 2**20)\n"
    )
    for delay in (0.01, 0.03, 0.05):
        process = subprocess.Popen([sys.executable, "-c", script, str(path), files.__file__], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        content = path.read_bytes()
        assert len(content) == 2**20
        assert len(set(content)) == 1


def test_what_is_encoded_is_decoded_and_what_safetensors_reads() -> None:
    arrays = {"b": ("F64", (2, 1), bytes(range(16))), "a": ("I32", (), b"\1\2\3\4"), "c": ("I64", (0, 3), b"")}
    data = encode_safetensors(arrays)
    found = decode_safetensors(data)
    assert {name: (kind, shape, bytes(body)) for name, (kind, shape, body) in found.items()} == arrays
    theirs = load(data)
    assert {name: (value.shape, value.tobytes()) for name, value in theirs.items()} == {
        name: (shape, body) for name, (_, shape, body) in arrays.items()
    }


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -8, -1])
def test_a_cut_file_is_not_decoded(cut: int) -> None:
    data = encode_safetensors({"a": ("F64", (3,), bytes(24))})
    with pytest.raises(ValueError, match=r"within its header|not all there|control character|Unterminated|Expecting"):
        decode_safetensors(data[:cut])
