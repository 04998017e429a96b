"""Laws of certified accuracy: counted by hand, strict at the radius, the same for all batches, with refusals in one sentence."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stableopt.certify import certify
from stableopt.certify.evaluation import CertifiedAccuracy, certified_accuracy, dataset_sha256
from stableopt.nn import GroupSort, MarginBounds, stabilize


def line() -> nn.Linear:
    """Class 0 where x > 0; the boundary is 0, so radii are distances."""
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    return layer


X = torch.tensor([[3.0], [1.0], [0.0], [-2.0], [-1.0], [4.0]], dtype=torch.float64)
Y = torch.tensor([0, 0, 0, 1, 0, 1])


def test_it_counts_what_one_counts_by_hand() -> None:
    found = certified_accuracy(line(), (X, Y), eps=[0.0, 0.5, 1.5, 3.5])
    torch.testing.assert_close(found.radii, torch.tensor([3.0, 1.0, 0.0, 2.0, 0.0, 0.0]), rtol=1e-8, atol=0.0)
    assert found.n == 6
    assert found.clean == 4 / 6  # the tie at 0 is predicted as the first class
    assert found.certified == (3 / 6, 3 / 6, 2 / 6, 0.0)  # and is certified at no radius, not at 0 either
    assert found.mean_radius == pytest.approx(1.0)
    assert found.median_radius == 0.0
    first, second, whole = found.rows()
    assert (first["class"], first["n"], first["correct"], first["certified"]) == (0, 4, 3, [2, 2, 1, 0])
    assert (second["class"], second["n"], second["correct"], second["certified"]) == (1, 2, 1, [1, 1, 1, 0])
    assert (whole["class"], whole["accuracy"]) == ("all", list(found.certified))
    assert "| 0 | 4 | 75.00 | 50.00 | 50.00 | 25.00 | 0.00 | 0.0000 |" in found.to_markdown()
    assert "certified at 0.5: 50.00 %" in str(found)


@settings(max_examples=30)
@given(radii=st.lists(st.floats(0, 3) | st.just(math.inf), min_size=1, max_size=9), eps=st.floats(0, 4))
def test_the_curve_is_the_share_above(radii: list[float], eps: float) -> None:
    found = CertifiedAccuracy(
        (eps,), torch.tensor(radii), torch.zeros(len(radii), dtype=torch.int64), torch.tensor(radii) > 0
    )
    for at in (eps, *radii):
        if math.isfinite(at):
            assert found.count(at) == sum(r > at for r in radii)
    curve = found.curve()
    assert curve[0] == (0.0, found.at(0.0))
    assert all(a < b and u > v for (a, u), (b, v) in itertools.pairwise(curve))
    assert curve[-1][1] == sum(math.isinf(r) for r in radii) / len(radii)
    for at, value in found.curve(points=5):
        assert value == found.at(at)


def test_a_radius_that_is_attained_is_not_above_itself() -> None:
    found = certified_accuracy(line(), (X, Y), eps=0.0)
    r = float(found.radii[0])
    assert found.count(math.nextafter(r, 0.0)) == found.count(r) + 1


def loaders() -> Iterator[object]:
    yield (X, Y)
    yield [X, Y]
    yield [(X[:2], Y[:2]), [X[2:], Y[2:].int()]]
    yield DataLoader(TensorDataset(X, Y), batch_size=4)
    yield ((X[i : i + 1], Y[i : i + 1]) for i in range(6))


def test_batches_do_not_matter() -> None:
    expected = certified_accuracy(line(), (X, Y), eps=1.0)
    for loader in loaders():
        found = certified_accuracy(line(), loader, eps=1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(found.radii, expected.radii, rtol=0.0, atol=0.0)
        assert found.dataset_sha256 == expected.dataset_sha256 == dataset_sha256(X, Y)
        assert found.certified == expected.certified


def test_the_digest_can_be_repeated_with_the_standard_library() -> None:
    inputs = hashlib.sha256(X.numpy().astype("<f8").tobytes()).hexdigest()
    labels = hashlib.sha256(Y.numpy().astype("<i8").tobytes()).hexdigest()
    text = json.dumps({"dtype": "float64", "inputs": inputs, "labels": labels, "shape": [1]}, sort_keys=True)
    assert dataset_sha256(X, Y) == hashlib.sha256(text.encode()).hexdigest()
    others = [(X.float(), Y), (X.reshape(6, 1, 1), Y), (X, 1 - Y), (X.flip(0), Y), (X[:5], Y[:5]), (-X, Y)]
    assert len({dataset_sha256(x, y) for x, y in [(X, Y), *others]}) == 7
    assert dataset_sha256(X.bfloat16(), Y) != dataset_sha256(X.half(), Y)


def test_a_model_a_certificate_and_the_radii_by_hand_agree() -> None:
    torch.manual_seed(1)
    model = stabilize(nn.Sequential(nn.Linear(4, 8), GroupSort(), nn.Linear(8, 3)), 1.0).eval()
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    certificate = certify(model, (4,))
    found = certified_accuracy(certificate, (x, y), eps=(0.05, 0.1))
    torch.testing.assert_close(certified_accuracy(model.train(), (x, y)).radii, found.radii)
    torch.testing.assert_close(found.radii, certificate.radius(x, y), rtol=0.0, atol=0.0)
    assert found.certified[0] == certificate.certified_accuracy(x, y, 0.05)
    assert found.clean == float((certificate.module()(x).argmax(1) == y).double().mean())
    bounds = MarginBounds(model.eval())
    torch.testing.assert_close(bounds.radii(model(x), y), found.radii, rtol=1e-6, atol=1e-9)


def test_the_claims_can_be_repeated() -> None:
    found = certified_accuracy(line(), (X, Y), eps=[0.5])
    clean, certified = found.claims()
    assert clean == {
        "id": "accuracy", "dataset_sha256": dataset_sha256(X, Y), "runtime": "real arithmetic", "count": 6, "passed": 4,
        "value": (4 / 6).hex(),
    }  # fmt: skip
    assert certified["id"] == "certified_accuracy"
    assert (float.fromhex(certified["eps"]), certified["passed"], certified["norm"]) == (0.5, 3, "l2")
    assert json.loads(json.dumps([clean, certified])) == [clean, certified]


def test_a_deployed_model_counts_the_rounding_and_says_why_nothing_is_certified() -> None:
    certificate = certify(line(), (1,))
    exact = certified_accuracy(certificate, (X, Y), eps=[0.5, 1.5])
    found = certified_accuracy(certificate, (X, Y), eps=[0.5, 1.5], runtime="float32")
    assert found.certified == exact.certified
    assert bool((found.radii <= exact.radii).all())
    torch.testing.assert_close(found.radii, exact.radii, rtol=1e-5, atol=0.0)
    assert found.reasons == {"a tie": 1}
    assert (found.runtime, found.clean) == ("float32", exact.clean)
    ready = certified_accuracy(certificate.deploy("float32"), (X, Y))
    torch.testing.assert_close(ready.radii, found.radii, rtol=0.0, atol=0.0)
    with pytest.raises(
        ValueError, match="the CertifiedModel runs in 'float32', and the accuracy is asked for in 'float16'"
    ):
        certified_accuracy(certificate.deploy("float32"), (X, Y), runtime="float16")


def test_radii_are_in_the_norm_that_is_asked_for() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), GroupSort(), nn.Linear(6, 3))
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    inf = certified_accuracy(model, (x, y), norm="linf")
    assert inf.norm == "linf"
    torch.testing.assert_close(MarginBounds(model, "linf").radii(model(x), y), inf.radii, rtol=1e-6, atol=1e-9)
    certificate = certify(model, (4,))
    for runtime in (None, "float32"):
        two, converted = (
            certified_accuracy(certificate, (x, y), norm=norm, runtime=runtime) for norm in (None, "linf")
        )
        assert (two.norm, converted.norm) == ("l2", "linf")
        torch.testing.assert_close(converted.radii, two.radii / 2.0)
    with pytest.raises(ValueError, match="norm"):
        certified_accuracy(certificate, (x, y), norm="token_max")


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0 ... 1, got 2"):
        certified_accuracy(line(), (X, Y + 1))
    with pytest.raises(ValueError, match=r"got -1"):
        certified_accuracy(line(), (X, Y - 1))


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ((X[:0], Y[:0]), ValueError, "needs at least one sample"),
        ([], ValueError, "needs at least one sample"),
        (X, TypeError, "must be batches"),
        (3, TypeError, "must be batches"),
        ([X[:1]], TypeError, "each batch must be a pair of tensors"),
        ([(X, Y, Y)], TypeError, "each batch must be a pair of tensors"),
        ((X, Y.double()), TypeError, "the labels must be integers"),
        ((X.long(), Y), TypeError, "the inputs must be a floating tensor"),
        ((X, Y[:2]), ValueError, r"a batch needs inputs \(n, ...\) and labels \(n,\)"),
        ((X, X.long()), ValueError, r"a batch needs inputs \(n, ...\) and labels \(n,\)"),
    ],
)
def test_data_that_do_not_fit_are_refused(loader: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certified_accuracy(line(), loader)  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_refused() -> None:
    for eps in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
            certified_accuracy(line(), (X, Y), eps=[eps])
    with pytest.raises(TypeError, match="needs a model, a Certificate or a CertifiedModel, got str"):
        certified_accuracy("model", (X, Y))  # type: ignore[arg-type]
    found = certified_accuracy(line(), (X, Y))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        found.at(-1.0)
    with pytest.raises(ValueError, match="at least 2 points"):
        found.curve(points=1)
