"""Sign the folder of a certificate, and check the signature: who published it, beside what it proves."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from stableopt.errors import CertificateError

__all__ = ["SIGNATURE", "sign", "verify_signature"]

SIGNATURE = "model.sig"
"""The name of the signature in the folder; it covers every other file there."""


def sign(folder: str | Path, private_key: str | Path) -> Path:
    """Sign every file of a folder with an elliptic-curve key, and write the signature beside them.

    A certificate says what is true of the weights; a signature says who says so. It holds no key, and needs no network.

    Args:
        folder: where the certificate and its weights are.
        private_key: the file of a private key in PEM without password, on the curve P-256, P-384 or P-521.

    Returns:
        The path of the signature, ``model.sig`` in the folder.

    Raises:
        ImportError: if the extra ``sign`` is not installed.
        CertificateError: if the folder or the key cannot be read or used.

    Examples:
        >>> sign("no such folder", "private.pem")
        Traceback (most recent call last):
        ...
        stableopt.errors.CertificateError: there is no folder 'no such folder' to sign.
    """
    folder, key = _folder(folder, "sign"), _file(private_key, "private key")
    signing, hashing = _modules("signing")
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_covered(hashing, folder)).sign(folder, folder / SIGNATURE)
    except Exception as error:
        raise CertificateError(f"'{folder}' could not be signed with '{key}': {error}") from error
    return folder / SIGNATURE


def verify_signature(folder: str | Path, public_key: str | Path) -> None:
    """Check that every file of a folder is as its signer left it, that none is missing, and that none was added.

    Args:
        folder: where the certificate, its weights and ``model.sig`` are.
        public_key: the file of the public key of the signer, in PEM. Get it from the signer, not from the folder.

    Raises:
        ImportError: if the extra ``sign`` is not installed.
        CertificateError: if there is no signature, or it is not that of this key and these files.

    Examples:
        >>> verify_signature("no such folder", "public.pem")
        Traceback (most recent call last):
        ...
        stableopt.errors.CertificateError: there is no folder 'no such folder' to verify.
    """
    folder, key = _folder(folder, "verify"), _file(public_key, "public key")
    signature = _file(folder / SIGNATURE, "signature")
    verifying, hashing = _modules("verifying")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.set_hashing_config(_covered(hashing, folder)).verify(folder, signature)
    except Exception as error:
        raise CertificateError(f"the signature of '{folder}' does not hold: {error}") from error


def _modules(name: str) -> tuple[Any, Any]:
    try:
        modules = [importlib.import_module(f"model_signing{part}") for part in ("", f".{name}", ".hashing")]
    except ImportError as error:
        raise ImportError(
            f"signatures need the extra 'sign'; install it with: pip install 'stableopt[sign]' ({error})."
        ) from error
    return modules[1], modules[2]


def _covered(hashing: Any, folder: Path) -> Any:
    """Return the choice of the files that a signature covers: all but itself, also those that git would ignore."""
    return hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)


def _folder(folder: str | Path, what: str) -> Path:
    if not Path(folder).is_dir():
        raise CertificateError(f"there is no folder '{folder}' to {what}.")
    return Path(folder).resolve()  # the tool takes a relative path of a file to leave out as one inside the folder


def _file(path: str | Path, what: str) -> Path:
    if not Path(path).is_file():
        raise CertificateError(f"there is no {what} '{path}'.")
    return Path(path)
