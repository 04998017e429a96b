"""Two verifiers that share nothing but the format agree on random certificates; what the first accepts the second proves."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flint import arb, fmpq, fmpz_mat

from stableopt.certify.verifier import check
from stableopt.certify.verifier.operations import RULES
from tests.certify.oracle import norm_is_at_most
from tests.certify.random_programs import Draft, Sample, document, pack, random_certificate, safetensors
from tests.certify.second_norms import is_positive_semidefinite, norm_at_most, slope_bound
from tests.certify.second_reader import RefusedError, parse_json, parse_real, parse_weights
from tests.certify.second_rules import RULES as KNOWN
from tests.certify.second_verifier import decide

ROOM = fmpq(3, 10**9)
COMMON = (set(KNOWN) & set(RULES)) | {"sum", "concat"}


def first(sample: Sample, *, exact: bool = False) -> bool:
    return check(sample.certificate, lambda _: sample.weights, exact=exact).verified


def compare(count: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Ask both verifiers about random certificates."""
    rng, verdicts, operations = np.random.default_rng(seed), Counter[str](), Counter[str]()
    for index in range(count):
        sample = random_certificate(rng, COMMON)
        accepted, proved = first(sample), decide(sample.certificate, sample.weights)
        roomy = decide(sample.certificate, sample.weights, ROOM)
        where = f"seed {seed}, certificate {index}: {proved.reason}, {sample.document['predicate']}"
        assert proved.accepted or not accepted, f"the first verifier accepts what is false; {where}"
        assert proved.accepted or not roomy.accepted, where
        # a convolution whose image is small may have a smaller norm than any rule proves
        assert accepted or not roomy.accepted or sample.lowered == "conv", (
            f"the first verifier refuses what is true with room; {where}"
        )
        grey = "grey zone" if proved.accepted and not roomy.accepted else "accepted" if accepted else "rejected"
        verdicts[grey] += 1
        operations.update(node["op"] for node in sample.document["predicate"]["graph"])
    return verdicts, operations


def test_the_two_verifiers_agree_on_random_certificates() -> None:
    verdicts, operations = compare(120, 0)
    assert verdicts["accepted"] > 50
    assert verdicts["rejected"] > 20
    assert verdicts["grey zone"] < 12
    assert set(operations) >= {"linear", "conv", "sum", "concat", "slice", "euler", "infinity", "pool"}


@pytest.mark.slow
def test_the_two_verifiers_agree_on_ten_thousand_random_certificates() -> None:
    verdicts, operations = compare(10_000, 1)
    assert sum(verdicts.values()) == 10_000
    assert verdicts["accepted"] > 5000
    assert verdicts["rejected"] > 2000
    assert verdicts["grey zone"] < 500
    assert set(operations) >= COMMON - set(KNOWN) | {"linear", "conv", "euler", "infinity", "take", "standardize"}
    assert min(operations.values()) >= 100


@pytest.mark.slow
def test_the_proofs_in_integers_agree_too() -> None:
    rng, verdicts = np.random.default_rng(2), Counter[tuple[bool, bool]]()
    for _ in range(1000):
        sample = random_certificate(rng, COMMON)
        if sample.document["predicate"]["joint"]:
            continue
        accepted, proved = first(sample, exact=True), decide(sample.certificate, sample.weights).accepted
        assert proved or not accepted
        roomy = decide(sample.certificate, sample.weights, ROOM).accepted and sample.lowered != "conv"
        assert accepted or not roomy, sample.document["predicate"]
        verdicts[accepted, proved] += 1
    assert verdicts[True, True] > 500


# ---------------------------------------------------------------------------------------------- the second verifier itself


def dense(
    bound: float,
    claim: float,
    matrix: Any = ((3.0, 0.0), (4.0, 0.0)),
    metric: str = "l2",
    edits: dict[str, Any] | None = None,
) -> Sample:
    """One dense layer, of norm 5 unless said otherwise."""
    draft = Draft(np.random.default_rng(0), metric, (2,))
    name, A = draft.tensor(np.array(matrix))
    draft.add("linear", [0], (len(A),), None, weight=name, bias=None, transposed=False, bound=bound.hex())
    draft.nodes[0] |= edits or {}
    claims = [{"id": "lipschitz", "norm": draft.metric, "L": claim.hex()}]
    weights = safetensors(draft.tensors)
    return Sample(document(draft.predicate(claims), weights), weights)


def test_it_decides_at_the_last_bit() -> None:
    below = float(np.nextafter(5.0, 0.0))
    for bound, claim, truth in ((5.0, 5.0, True), (below, 5.0, False), (5.0, below, False), (6.0, 5.5, False)):
        sample = dense(bound, claim)
        assert decide(sample.certificate, sample.weights).accepted is truth
    assert not decide(dense(5.0, 5.0).certificate, dense(5.0, 5.0).weights, ROOM).accepted
    assert not first(dense(5.0, 5.0))  # no proof in floating point is that sharp
    assert first(dense(5.0 * (1 + 1e-9), 5.0 * (1 + 2e-9)))
    assert decide(
        dense(7.0, 7.0, ((3.0, -4.0),), metric="linf").certificate, dense(7.0, 7.0, ((3.0, -4.0),)).weights
    ).accepted


def test_it_refuses_what_it_does_not_know() -> None:
    for fields in (
        {"op": "sparse"},
        {"extra": 1},
        {"transposed": 1},
        {"bias": "t1"},
        {"in": [1]},
        {"bound": "0x1p+1024"},
    ):
        sample = dense(9.0, 9.0, edits=fields)
        assert not decide(sample.certificate, sample.weights).accepted
        assert not first(sample)


def test_positive_semidefinite_matrices_are_decided_exactly() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 8, 45):
        A = rng.integers(-9, 10, (n + 3, n)).tolist()
        gram = fmpz_mat(A).transpose() * fmpz_mat(A)
        assert is_positive_semidefinite(gram)
        if n <= 8:
            rows = [*A[:-1], A[0]]
            singular = fmpz_mat(rows[: n - 1] or [[0]]).transpose() * fmpz_mat(rows[: n - 1] or [[0]])
            assert is_positive_semidefinite(singular)
            assert not is_positive_semidefinite(
                singular - fmpz_mat(n, n, [int(i == j) for i in range(n) for j in range(n)])
            )
        gram[n - 1, n - 1] = -1
        assert not is_positive_semidefinite(gram)


def test_the_two_oracles_of_a_norm_agree() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        A = rng.integers(-5, 6, rng.integers(1, 5, 2))
        true = float(np.linalg.norm(A, 2))
        for limit in (true * (1 - 1e-12), true * (1 + 1e-12), round(true)):
            exact = Fraction(limit)
            square = fmpq(exact.numerator, exact.denominator) ** 2
            assert norm_at_most(A.tolist(), square) is norm_is_at_most(A, exact)


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_every_dtype_is_read_exactly(kind: str) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.5, 0.1, 6e-8, 1e-5, 60000.0])
    data, stored = pack(kind, values)
    tensor = parse_weights(safetensors({"a": (kind, (8,), data)}))["a"]
    assert [Fraction(v) * Fraction(2) ** tensor.exponent for v in tensor.integers] == list(map(Fraction, stored))
    top = {"F64": 7, "F32": 3, "F16": 1, "BF16": 1}[kind]
    bad = bytearray(data)
    bad[top], bad[top - 1] = 0x7F, 0xF0 if kind != "F16" else bad[top - 1]
    bad[top] = 0x7C if kind == "F16" else 0x7F
    bad[top - 1] |= 0x80 if kind in {"F32", "BF16"} else 0
    with pytest.raises(RefusedError, match="NaN"):
        parse_weights(safetensors({"a": (kind, (8,), bytes(bad))}))


def test_hexadecimal_floats_are_read_exactly_or_refused() -> None:
    for value in (0.0, -0.0, 1.0, 0.1, -5e-324, 2.5e-310, 1.7976931348623157e308):
        exact = Fraction(value)
        assert parse_real(value.hex()) == fmpq(exact.numerator, exact.denominator)
    for text in (
        "0x1p+1024",
        "0x1.8p-1074",
        "0x1p-1075",
        "1.0",
        "inf",
        "nan",
        "0x1",
        "0X1p+0",
        " 0x1p+0",
        "0x1p+0\n",
        1.0,
        None,
    ):
        with pytest.raises(RefusedError):
            parse_real(text)


def test_json_is_read_strictly() -> None:
    assert parse_json(b' {"a": [1, -2.5e1, true, null, "\\u00e9\\n"], "b": {}} ') == {
        "a": [1, -25.0, True, None, "é\n"],
        "b": {},
    }
    for text in (
        b"",
        b"[1,]",
        b"{,}",
        b'{"a":1,"a":2}',
        b"NaN",
        b"[01]",
        b"[1] x",
        b'"\n"',
        b'"\\x"',
        b"\xff",
        b"[" * 200,
        b"'a'",
    ):
        with pytest.raises(RefusedError):
            parse_json(text)


def test_the_largest_slopes_are_those_of_a_fine_grid() -> None:
    x = np.linspace(-6, 6, 400_001)
    for name, value in (("silu", x / (1 + np.exp(-x))), ("mish", x * np.tanh(np.log1p(np.exp(x))))):
        steepest = float(np.abs(np.gradient(value, x)).max())
        found = slope_bound(name, lambda _: fmpq(0))
        assert isinstance(found, arb)
        assert steepest == pytest.approx(float(found), abs=1e-7)
    assert float(slope_bound("gelu", lambda _: fmpq(0)) or 0) == pytest.approx(1.1289042, abs=1e-6)
    assert float(slope_bound("gelu_tanh", lambda _: fmpq(0)) or 0) == pytest.approx(1.12899306865877, abs=1e-12)
