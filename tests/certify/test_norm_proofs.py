"""Norm proofs in bulk against exact integer arithmetic: nothing false is proved, and what is true with room is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flint import fmpz_mat, fmpz_poly

from stableopt.certify.verifier import check
from stableopt.certify.verifier.numbers import norm_at_most
from tests.certify.random_programs import Draft, Sample, document, safetensors
from tests.certify.second_verifier import decide

Array = np.ndarray[Any, Any]
SLACKS = (
    1e-3,
    1e-6,
    1e-8,
    1e-9,
    1e-10,
    1e-11,
    1e-12,
    1e-13,
    1e-14,
    1e-15,
    3e-16,
    0.0,
    -1e-16,
    -1e-15,
    -1e-13,
    -1e-9,
    -1e-3,
)
KINDS = ("gauss", "rank1", "constant", "columns", "rows", "orthogonal", "sparse", "hadamard", "nearly equal")


def nasty(rng: np.random.Generator) -> Array:
    """Draw a small matrix of one of the kinds on which bounds go wrong, at one of the scales where floats go wrong."""
    m, n = rng.integers(1, 7, 2)
    A, kind = rng.standard_normal((m, n)), rng.choice(KINDS)
    if kind == "rank1":
        A = np.outer(A[:, 0], A[0])
    elif kind == "constant":
        A = np.full((m, n), rng.choice([0.1, 1.0, 1 / 3]))
    elif kind == "columns":
        A *= 10.0 ** rng.integers(-12, 13, n)
    elif kind == "rows":
        A *= 10.0 ** rng.integers(-12, 13, (m, 1))
    elif kind == "orthogonal":
        A = np.linalg.qr(rng.standard_normal((6, 6)))[0][:m, :n]
    elif kind == "sparse":
        A *= rng.random((m, n)) < 0.3
    elif kind == "hadamard":
        A = np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(m)])
    elif kind == "nearly equal":
        A = np.eye(m, n) + 2.0 ** -rng.integers(20, 60) * A
    scale = rng.choice([0, 0, 0, -150, 150, -305, -318, 300])
    return A * 10.0 ** int(scale)


class Exact:
    """The largest eigenvalue of A^T A, as the greatest root of its characteristic polynomial."""

    def __init__(self, A: Array) -> None:
        _, exponents = np.frexp(A)
        self.exponent = int(exponents[A != 0].min(initial=2000)) - 53 if A.any() else 0
        whole = [[int(Fraction(float(v)) / Fraction(2) ** self.exponent) for v in row] for row in A]
        B = fmpz_mat(whole if len(whole) >= len(whole[0]) else [list(c) for c in zip(*whole, strict=True)])
        self.polynomial: fmpz_poly = (B.transpose() * B).charpoly()

    def at_most(self, limit: Fraction) -> bool:
        """All roots are real; none exceeds t exactly if p(x + t) has no negative coefficient."""
        square = (limit / Fraction(2) ** self.exponent) ** 2
        p, q = square.numerator, square.denominator
        coefficients = [
            int(c) * q ** (self.polynomial.degree() - k) for k, c in enumerate(self.polynomial)
        ]  # roots times q
        moved = fmpz_poly(coefficients)(fmpz_poly([p, 1]))
        return all(c >= 0 for c in moved)


def proofs(rng: np.random.Generator, *, exact: bool = False) -> Iterator[str]:
    """Try to prove bounds on both sides of the norm of one matrix; yield what came out."""
    A = nasty(rng)
    peak = float(np.abs(A).max())
    if not np.isfinite(peak):
        return
    power = Fraction(2) ** int(np.frexp(peak)[1])
    norm = Fraction(
        float(np.linalg.norm(A / float(power) if power < 2**1000 else A * 2.0**-1000 / float(power / 2**1000), 2))
    )
    oracle = Exact(A)
    for slack in SLACKS:
        limit = norm * power * (1 + Fraction(slack))
        proved = norm_at_most(A[None], limit, exact=exact)
        assert not proved or oracle.at_most(limit), f"{A.tolist()} has a norm above {float(limit)!r}, which was proved"
        assert proved or slack < 1e-9 or not oracle.at_most(limit * (1 - Fraction(1, 10**10))), (
            f"not proved: {A.tolist()}"
        )
        yield "proved" if proved else "not proved, true" if oracle.at_most(limit) else "not proved, false"


def count_of(matrices: int, seed: int, *, exact: bool = False) -> Counter[str]:
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        return Counter(verdict for _ in range(matrices) for verdict in proofs(rng, exact=exact))


def test_no_norm_is_proved_that_is_false() -> None:
    verdicts = count_of(75, 0)
    assert verdicts["proved"] > 150
    assert verdicts["not proved, false"] > 125


def test_no_norm_is_proved_in_integers_that_is_false() -> None:
    verdicts = count_of(60, 1, exact=True)
    assert verdicts["proved"] > 40
    assert verdicts["not proved, false"] > 100


@pytest.mark.slow
def test_a_hundred_thousand_norm_proofs_hold() -> None:
    verdicts = count_of(15_000, 2)
    assert verdicts["proved"] >= 100_000
    assert verdicts["not proved, false"] >= 50_000


@pytest.mark.slow
def test_thousands_of_norm_proofs_in_integers_hold() -> None:
    verdicts = count_of(3000, 3, exact=True)
    assert verdicts["proved"] >= 3000


def test_the_oracle_knows_some_norms_by_heart() -> None:
    for A, norm in (([[3.0, 0.0], [4.0, 0.0]], 5), ([[0.0]], 0), ([[1.0, 1.0], [1.0, 1.0]], 2), ([[-3.0, 4.0]], 5)):
        oracle = Exact(np.array(A))
        assert oracle.at_most(Fraction(norm))
        assert not oracle.at_most(Fraction(norm) - Fraction(1, 10**30)) or norm == 0
    tiny = Exact(np.array([[5e-324]]))
    assert tiny.at_most(Fraction(5e-324))
    assert not tiny.at_most(Fraction(5e-324) * Fraction(999, 1000))


# ------------------------------------------------------------------------------------------------------------ convolutions


def lone_conv(rng: np.random.Generator, metric: str) -> Draft:
    """A single convolution on a small image."""
    while True:
        dims = int(rng.integers(1, 4))
        shape = (int(rng.integers(1, 4)), *rng.integers(1, (10, 5, 4)[dims - 1], dims).tolist())
        draft = Draft(rng, metric, shape)
        if draft.conv(0) is not None and draft.values["t0"].any():
            return draft


def conv_proofs(rng: np.random.Generator, metric: str) -> Iterator[str]:
    """Search the least bound that is proved, and compare it with the dense matrix of the layer."""
    draft = lone_conv(rng, metric)
    node = draft.nodes[0]
    weights, top = safetensors(draft.tensors), float.fromhex(node["bound"])

    def sample(factor: float) -> Sample:
        node["bound"] = (top * factor).hex()
        predicate = draft.predicate([{"id": "lipschitz", "norm": metric, "L": node["bound"]}])
        return Sample(document(predicate, weights), weights)

    for factor in (1.0, 0.999, 0.99, 0.97, 0.93, 0.88, 0.8, 0.7, 0.5, 0.3):
        case = sample(factor)
        proved = check(case.certificate, lambda _, data=case.weights: data).verified
        true = decide(case.certificate, case.weights).accepted
        assert true or not proved, case.document["predicate"]
        assert proved or factor < 1.0, case.document["predicate"]
        yield "proved" if proved else "not proved, true" if true else "not proved, false"


def test_no_norm_of_a_convolution_is_proved_that_is_false() -> None:
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        verdicts = Counter(v for k in range(18) for v in conv_proofs(rng, ("l2", "linf")[k % 3 == 2]))
    assert verdicts["proved"] > 15
    assert verdicts["not proved, false"] > 15


@pytest.mark.slow
def test_thousands_of_convolutions_are_bounded() -> None:
    rng = np.random.default_rng(1)
    with np.errstate(all="ignore"):
        verdicts = Counter(v for k in range(1500) for v in conv_proofs(rng, ("l2", "linf")[k % 3 == 2]))
    assert verdicts["proved"] > 1500
    assert verdicts["not proved, false"] > 1500
