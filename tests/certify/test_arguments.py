"""What users give to a certificate: accepted, or refused in one sentence, the same everywhere; what they get cannot change it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import verify
from stableopt.certify import Certificate, certified_accuracy, certify
from stableopt.certify.arguments import checked_eps
from stableopt.errors import CertificateError

Use = Callable[[Certificate, Any, Any], Any]
USES: dict[str, Use] = {
    "radius": lambda cert, x, y: cert.radius(x, y),
    "local_radius": lambda cert, x, y: cert.local_radius(x, y),
    "predict": lambda cert, x, y: cert.deploy("float64").predict(x, y).radii,
    "certified_accuracy": lambda cert, x, y: cert.certified_accuracy(x, y, 0.1),
}


@functools.cache
def certificate() -> Certificate:
    torch.manual_seed(0)
    return certify(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4,))


X, Y = torch.ones(2, 4), torch.tensor([0, 1])
INPUTS: list[tuple[Any, type[Exception], str]] = [
    (X.long(), TypeError, r"floating tensor, got torch\.int64; convert them"),
    (X > 0, TypeError, r"floating tensor, got torch\.bool"),
    (X.to(torch.complex64), TypeError, r"floating tensor, got torch\.complex64"),
    (X.numpy(), TypeError, "floating tensor, got ndarray"),
    (None, TypeError, "floating tensor, got NoneType"),
    (X[0], ValueError, r"expected inputs of shape \(batch, 4\), got \(4,\)"),
    (X[0, 0], ValueError, r"expected inputs of shape \(batch, 4\), got \(\)"),
    (X[:, :3], ValueError, r"expected inputs of shape \(batch, 4\), got \(2, 3\)"),
    (X.to("meta"), ValueError, "a dense tensor with numbers, got one on the meta device"),
    (X.to_sparse(), ValueError, r"a dense tensor with numbers, got one of layout torch\.sparse_coo"),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("x", "kind", "words"), INPUTS)
def test_inputs_that_do_not_fit_are_refused_everywhere(x: Any, kind: type[Exception], words: str, use: str) -> None:
    with pytest.raises(kind, match=words):
        USES[use](certificate(), x, Y)


LABELS: list[tuple[Any, str]] = [
    (Y.double(), r"integer tensor of shape \(2,\), got torch\.float64 of shape \(2,\)"),
    (Y > 0, r"got torch\.bool"),
    (Y.to(torch.complex64), r"got torch\.complex64"),
    (Y[:1], r"got torch\.int64 of shape \(1,\)"),
    (Y[:, None], r"got torch\.int64 of shape \(2, 1\)"),
    ([0, 1], "got list"),
    (Y - 1, "labels must (lie in 0 ... 2|be at least 0), got -1"),
    (Y + 2, r"labels must lie in 0 \.\.\. 2, got 3"),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("labels", "words"), LABELS)
def test_labels_that_do_not_fit_are_refused_everywhere(labels: Any, words: str, use: str) -> None:
    with pytest.raises(ValueError, match=words):
        USES[use](certificate(), X, labels)


@pytest.mark.parametrize("use", USES)
def test_labels_of_every_integer_type_and_empty_batches_are_taken(use: str) -> None:
    cert = certificate()
    found = [USES[use](cert, X, Y.to(kind)) for kind in (torch.int64, torch.uint8, torch.int8, torch.int32)]
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(found[0])) for one in found)
    if use != "certified_accuracy":
        assert USES[use](cert, X[:0], Y[:0]).shape == (0,)
        return
    with pytest.raises(ValueError, match="accuracy of an empty batch is undefined"):
        USES[use](cert, X[:0], Y[:0])


def test_the_accuracy_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"integer tensor .* got NoneType"):
        certificate().certified_accuracy(X, None, 0.1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("eps", [-1, float("nan"), float("inf"), "0.1", None, True, [[0.1]]], ids=repr)
def test_radii_that_are_no_numbers_are_refused(eps: Any) -> None:
    cert = certificate()
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got"):
        cert.certified_accuracy(X, Y, eps)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got"):
        certified_accuracy(cert, (X, Y), eps=eps)


def test_radii_may_be_tensors() -> None:
    assert checked_eps(torch.tensor(0.5)) == 0.5
    wanted: list[Any] = [torch.tensor(0.5), torch.tensor([0.5]), 0.5, [0.5]]
    for eps in wanted:
        assert certified_accuracy(certificate(), (X, Y), eps=eps).eps == (0.5,)


def test_what_a_certificate_gives_cannot_change_it() -> None:
    cert = certificate()
    x = torch.randn(5, 4)
    radii, output = cert.radius(x), cert.module()(x)
    cert.program.tensors["0.weight"].zero_()
    cert.program.nodes[0]["bound"] = 1e-9
    cert.layers[0]["op"] = "scale"
    cert.claims["proved"].clear()
    table = cert.margin_constants
    assert table is not None
    table.mul_(1e-9)
    cert.module().get_parameter("0__weight").zero_()
    assert torch.equal(cert.radius(x), radii)
    assert torch.equal(cert.module()(x), output)
    assert bool((cert.local_radius(x) >= radii).all())
    assert bool((cert.deploy("float64").predict(x).radii <= radii * (1 + 1e-6)).all())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cert: pickle.loads(pickle.dumps(cert))], ids=["copy", "pickle"]
)
def test_a_copy_says_the_same(copied: Callable[[Certificate], Certificate]) -> None:
    cert, x = certificate(), torch.randn(5, 4)
    radii: Tensor = cert.radius(x)
    other = copied(cert)
    assert (other.lipschitz, other.norm, other.digest) == (cert.lipschitz, cert.norm, cert.digest)
    assert torch.equal(other.radius(x), radii)


@pytest.mark.parametrize(
    "claims", [None, [{"id": "n", "v": torch.ones(2)}], [{"id": "n", "v": object()}], [{1: 2, "id": "n"}]]
)
def test_claims_that_json_cannot_say_are_refused(claims: Any) -> None:
    with pytest.raises(CertificateError, match="claims must be lists of what JSON can say"):
        certificate().with_claims(attested=claims)


def test_a_folder_is_verified_as_its_certificate(tmp_path: Path) -> None:
    certificate().save(tmp_path)
    assert verify(tmp_path).verified
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nothing")
