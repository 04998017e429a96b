"""A signature covers every file of a folder, and holds for one key only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stableopt.certify.signing import SIGNATURE, sign, verify_signature
from stableopt.errors import CertificateError

pytest.importorskip("model_signing", reason="the extra 'sign' is not installed")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")


def keys(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    private = ec.generate_private_key(ec.SECP256R1())
    coded = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret.write_bytes(private.private_bytes(pem, pkcs8, coded))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(pem, info))
    return secret, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a signed certificate, and the public key."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.cert.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    secret, public = keys(tmp_path, "key")
    assert sign(folder, secret) == folder / SIGNATURE
    return folder, public


def test_an_untouched_folder_has_the_signature_of_its_key(
    signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_signature(*signed)
    monkeypatch.chdir(signed[0].parent)
    verify_signature("model", "key.pub")
    sign("model", "key.pem")
    verify_signature(*signed)


def _append(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights\0")


def _replace(folder: Path) -> None:
    (folder / "model.cert.json").write_text('{"L": 1}')


def _add(folder: Path) -> None:
    (folder / "more.txt").write_text("x")


def _add_hidden(folder: Path) -> None:
    (folder / ".gitignore").write_text("x")


def _remove(folder: Path) -> None:
    (folder / "model.cert.json").unlink()


def _rename(folder: Path) -> None:
    (folder / "model.cert.json").rename(folder / "other.cert.json")


def _unsign(folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def _garble(folder: Path) -> None:
    data = (folder / SIGNATURE).read_text()
    (folder / SIGNATURE).write_text(data.replace("payload", "payloat"))


def _empty(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes(b"")


@pytest.mark.parametrize("damage", [_append, _replace, _add, _add_hidden, _remove, _rename, _unsign, _garble, _empty])
def test_a_touched_folder_has_none(signed: tuple[Path, Path], damage: Callable[[Path], None]) -> None:
    damage(signed[0])
    with pytest.raises(CertificateError):
        verify_signature(*signed)


def test_the_key_of_another_does_not_do(signed: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = keys(tmp_path, "other")
    with pytest.raises(CertificateError, match="does not hold"):
        verify_signature(signed[0], other)


def test_signing_again_replaces_the_signature(signed: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="could not be signed"):
        sign(signed[0], keys(tmp_path, "locked", b"word")[0])
    secret, public = keys(tmp_path, "other")
    sign(signed[0], secret)
    verify_signature(signed[0], public)
    with pytest.raises(CertificateError):
        verify_signature(*signed)


def test_what_is_missing_is_named(signed: tuple[Path, Path], tmp_path: Path) -> None:
    for call, word in (
        (lambda: sign(tmp_path / "no", tmp_path / "key.pem"), "folder"),
        (lambda: sign(signed[0], tmp_path / "no.pem"), "private key"),
        (lambda: verify_signature(tmp_path / "no", signed[1]), "folder"),
        (lambda: verify_signature(signed[0], tmp_path / "no.pem"), "public key"),
    ):
        with pytest.raises(CertificateError, match=word):
            call()


def test_the_missing_extra_is_named(signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ImportError, match=r"stableopt\[sign\]"):
        verify_signature(*signed)
