"""False certificates built by hand against single steps of the verifier; each is rejected, and its true sibling is accepted."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stableopt.certify.verifier import check, main
from stableopt.certify.verifier.numbers import row_sums
from tests.certify.mutations import bases
from tests.certify.random_programs import Draft, Sample, document, safetensors
from tests.certify.second_verifier import decide

ONE = "0x1.0000000000000p+0"
Build = Callable[[Draft], float]


def sample(
    metric: str, shape: tuple[int, ...], build: Build, *, claim: float | None = None, extra: list[Any] | None = None
) -> Sample:
    """A program and a claim: the constant that ``build`` returns, or another one."""
    draft = Draft(np.random.default_rng(0), metric, shape)
    constant = build(draft)
    claims = [{"id": "lipschitz", "norm": metric, "L": (constant if claim is None else claim).hex()}, *(extra or [])]
    weights = safetensors(draft.tensors)
    return Sample(document(draft.predicate(claims), weights), weights)


def verdicts(case: Sample) -> tuple[bool, bool]:
    return check(case.certificate, lambda _: case.weights).verified, decide(case.certificate, case.weights).accepted


def cut(draft: Draft, value: int, axis: int, start: int, stop: int) -> int:
    shape = draft.shapes[value]
    new = (*shape[:axis], stop - start, *shape[axis + 1 :])
    return draft.add("slice", [value], new, None, axis=axis, start=start, stop=stop, bound=ONE)


def join(draft: Draft, parts: list[int], axis: int) -> int:
    shape = draft.shapes[parts[0]]
    size = sum(draft.shapes[p][axis] for p in parts)
    return draft.add("concat", parts, (*shape[:axis], size, *shape[axis + 1 :]), None, axis=axis)


def disjoint(draft: Draft) -> float:
    join(draft, [cut(draft, 0, 0, 0, 2), cut(draft, 0, 0, 2, 4)], 0)
    return 1.0


def overlapping(draft: Draft) -> float:
    join(draft, [cut(draft, 0, 0, 0, 3), cut(draft, 0, 0, 2, 4)], 0)
    return 1.0


def twice(draft: Draft) -> float:
    part = cut(draft, 0, 0, 0, 2)
    join(draft, [part, part, cut(draft, 0, 0, 2, 4)], 0)
    return 1.0


def of_two_values(draft: Draft) -> float:
    """Disjoint entries, but of two values that depend on the same input."""
    other = draft.add("permute", [0], (4,), None, order=[0], bound=ONE)
    swapped = draft.add("take", [other], (4,), None, axis=0, index=[2, 3, 0, 1], bound=ONE)
    join(draft, [cut(draft, 0, 0, 0, 2), cut(draft, swapped, 0, 2, 4)], 0)
    return 1.0


def with_a_whole(draft: Draft) -> float:
    """One part depends on a slice and on the whole value."""
    first = cut(draft, 0, 0, 0, 2)
    mixed = draft.add("sum", [first, cut(draft, 0, 0, 2, 4)], (2,), None, factors=[ONE, ONE])
    join(draft, [mixed, cut(draft, 0, 0, 2, 4)], 0)
    return 2.0


def crossed(draft: Draft) -> float:
    """Slices along different axes meet in a corner."""
    row = draft.add("reshape", [cut(draft, 0, 0, 0, 1)], (2,), None, shape=[2], bound=ONE)
    column = draft.add("reshape", [cut(draft, 0, 1, 0, 1)], (2,), None, shape=[2], bound=ONE)
    rest = draft.add("reshape", [0], (4,), None, shape=[4], bound=ONE)
    join(draft, [row, column, cut(draft, rest, 0, 3, 4)], 0)
    return 1.0


def token_features(draft: Draft) -> float:
    """Tokens are mixed in one of two disjoint halves of the features: the maxima of both may meet in one token."""
    left, right = cut(draft, 0, 1, 0, 1), cut(draft, 0, 1, 1, 2)
    turned = draft.add("take", [left], (2, 1), None, axis=0, index=[1, 0], bound=ONE)
    join(draft, [turned, right], 1)
    return 1.0


@pytest.mark.parametrize(
    ("metric", "shape", "build", "true"),
    [
        ("l2", (4,), disjoint, 1.0), ("l2", (4,), overlapping, 1.42), ("l2", (4,), twice, 1.8), ("l2", (4,), of_two_values, 1.42),
        ("l2", (4,), with_a_whole, 2.24), ("l2", (2, 2), crossed, 1.8), ("token_max", (2, 2), token_features, 1.42),
        ("linf", (4,), overlapping, 1.0),
    ],
)  # fmt: skip
def test_parts_are_measured_apart_only_where_they_are(
    metric: str, shape: tuple[int, ...], build: Build, true: float
) -> None:
    below = build(Draft(np.random.default_rng(0), metric, shape))
    assert verdicts(sample(metric, shape, build, claim=true)) == (True, True)
    assert verdicts(sample(metric, shape, build, claim=below)) == (below >= true,) * 2


def lone(op: str, **fields: Any) -> Build:
    def build(draft: Draft) -> float:
        draft.add(op, [0], draft.shapes[0], None, bound=ONE, **fields)
        return 1.0

    return build


@pytest.mark.parametrize(
    ("shape", "build"),
    [
        ((2, 3), lone("reshape", shape=[6])), ((2, 3), lone("reshape", shape=[3, 2])), ((2, 3), lone("permute", order=[1, 0])),
        ((4, 3), lone("groupsort", group_size=2, axis=0)), ((2, 3), lone("softmax", axis=0)), ((2, 3), lone("mean", axis=1)),
        ((2, 3), lone("ball", radius=ONE, center=None, axis=None)), ((2, 3), lone("take", axis=1, index=[0, 0])),
        ((2, 3), lone("pool", name="max", dims=1, kernel=[1], stride=[1], padding=[0])),
        ((2, 3), lone("l2pool", dims=1, kernel=[1], stride=[1])),
    ],
)  # fmt: skip
def test_what_mixes_tokens_has_no_constant_of_one(shape: tuple[int, ...], build: Build) -> None:
    assert not check((case := sample("token_max", shape, build)).certificate, lambda _: case.weights).verified


def column_layer(draft: Draft) -> float:
    """Transposed: the rows of the layer are the columns of the tensor."""
    name, _ = draft.tensor(np.array([[1.0, 1.0], [0.0, 4.0]]))
    draft.add("linear", [0], (2,), None, weight=name, bias=None, transposed=True, bound=(5.0).hex())
    return 5.0


@pytest.mark.parametrize(("margin", "true"), [(float(np.hypot(1, 3)), False), (float(np.hypot(0, 4)) + 1e-8, True)])
def test_margins_of_a_transposed_layer_are_those_of_its_columns(margin: float, true: bool) -> None:
    table = [["0x0.0p+0", margin.hex()], [margin.hex(), "0x0.0p+0"]]
    case = sample("l2", (2,), column_layer, extra=[{"id": "margin_constants", "L": table}])
    assert verdicts(case) == (true, true)


@pytest.mark.parametrize(
    "text", ["0x1.8p-1074", "0x1.0p-1075", "0x1p+1024", "0x1p-9999", "-0x0.0p+0", "0x1.00000000000000p+0"]
)
def test_reals_that_float64_does_not_hold_are_no_reals(text: str) -> None:
    case = sample("l2", (2,), lone("scale", factor="0x0.0p+0"))
    case.document["predicate"]["graph"][0]["bound"] = text
    case = Sample(case.document, case.weights)
    assert not check(case.certificate, lambda _: case.weights).verified


def test_no_row_is_left_out_of_the_greatest_sum() -> None:
    """A thousand rows of nearly the greatest sum before the greatest, and a sum whose small terms are lost if they come last."""
    rows = np.ones((3000, 2))
    rows[-1, 1] = 1 + 2.0**-40
    assert row_sums(rows[None]) >= Fraction(2) + Fraction(1, 2**40)
    lost = np.full((2, 100_000), 2.0**-54)
    lost[0, 0], lost[1] = 1.0, 0.0
    lost[1, 0] = 1.0 + 2.0**-40
    for array in (lost, np.asfortranarray(lost)):
        assert row_sums(array[None]) >= sum(map(Fraction, lost[0].tolist()), Fraction(0))


def test_a_contraction_is_that_of_a_function_of_one_value() -> None:
    """The sum reads the input beside value 1, so it is no function of value 1."""

    def build(draft: Draft) -> float:
        half = draft.add("scale", [0], (2,), None, factor="-0x1.0p-1", bound="0x1.0p-1")
        draft.add("sum", [0, half], (2,), None, factors=[ONE, ONE])
        return 1.5

    for start, factor, true in ((0, 1.5, True), (1, 1.0, False), (1, 100.0, False), (2, 1.0, False), (0, 1.4, False)):
        claim = {"id": "contraction", "from": start, "to": 2, "factor": factor.hex()}
        assert verdicts(sample("l2", (2,), build, extra=[claim])) == (true, true), (start, factor)


def test_a_joint_bound_needs_monotone_activations_and_an_unbroken_chain() -> None:
    def chain(name: str, **settings: str) -> Build:
        def build(draft: Draft) -> float:
            a, A = draft.add_dense(0, 2, 2)
            b = draft.add("activation", [a], (2,), None, name=name, bound=ONE, **settings)
            c, C = draft.add_dense(b, 2, 2)
            t = 1.0 / float(np.linalg.norm(A, 2)) ** 2
            middle = t * np.eye(2) - t * t / 4 * A @ A.T
            bound = 1.001 * float(np.sqrt(np.linalg.eigvals(np.linalg.solve(middle, C.T @ C)).real.max()))
            draft.joint.append({"nodes": [a - 1, b - 1, c - 1], "multipliers": [[t.hex()] * 2], "bound": bound.hex()})
            return bound

        return build

    assert verdicts(sample("l2", (2,), chain("relu"))) == (True, True)
    for name, settings in (("abs", {}), ("leaky_relu", {"slope": "-0x1.0p-1"}), ("elu", {"alpha": "-0x1.0p-1"})):
        assert verdicts(sample("l2", (2,), chain(name, **settings))) == (False, False), name
    for nodes in ([0, 2, 1], [0, 1], [2, 1, 0], [0, 1, 2, 1, 2], [0, 0, 2], [1, 0, 2], [0, 1, 9]):
        case = sample("l2", (2,), chain("relu"))
        case.document["predicate"]["joint"][0]["nodes"] = nodes
        assert verdicts(Sample(case.document, case.weights)) == (False, False), nodes


def test_a_claim_of_the_proved_kind_has_no_place_in_another_tier() -> None:
    for tier in ("replayable", "attested"):
        case = sample("l2", (2,), lone("activation", name="relu"))
        case.document["predicate"]["claims"][tier].append({"id": "lipschitz", "norm": "l2", "L": "0x1.0p-9"})
        assert not check(Sample(case.document, case.weights).certificate, lambda _, c=case: c.weights).verified


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04 garbage" * 9, b"\x93NUMPY", b"\x80\x04K\x01.", b"\x93NUMPY\x01\x00v\x00{'descr'"]
)
def test_broken_data_for_a_replay_are_rejected(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = bases()[0]
    (tmp_path / "model.cert.json").write_bytes(base.certificate)
    (tmp_path / "model.safetensors").write_bytes(base.weights)
    (tmp_path / "data.npz").write_bytes(data)
    assert main([str(tmp_path / "model.cert.json"), "--replay", str(tmp_path / "data.npz")]) in {1, 2}
    written = capsys.readouterr()
    assert "Traceback" not in written.out + written.err
