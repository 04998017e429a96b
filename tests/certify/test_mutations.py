"""Tampering: what is not provably true after it is rejected, with a sentence, soon, and without much memory."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from stableopt.certify.verifier import check
from tests.certify.mutations import Mutation, bases, json_mutations, text_mutations, weight_mutations
from tests.certify.random_programs import Draft, Sample, document, safetensors
from tests.certify.second_verifier import decide

BASES = bases()


def judge(mutations: Iterator[Mutation]) -> Counter[str]:
    """Ask the verifier about each, and the second verifier about each that it accepts."""
    verdicts = Counter[str]()
    for mutation in mutations:
        start = time.process_time()
        result = check(mutation.certificate, lambda _, data=mutation.weights: data)
        assert time.process_time() - start < 2.0, f"{mutation.name}: slow"
        assert result.verified or len(result.reason) > 8, f"{mutation.name}: no reason"
        if result.verified:
            second = decide(mutation.certificate, mutation.weights)
            if "too large for the exact oracle" in second.reason:
                verdicts["not decided"] += 1
                continue
            assert second.accepted, f"{mutation.name}: accepted, but {second.reason}"
        verdicts["accepted" if result.verified else "rejected"] += 1
    assert verdicts["not decided"] <= verdicts.total() / 500 + 3
    return verdicts


def everything(base: Sample, rng: np.random.Generator, count: int) -> Iterator[Mutation]:
    yield from json_mutations(base)
    yield from text_mutations(base, rng, count)
    yield from weight_mutations(base, rng, count)


FIRST = [0, *(pytest.param(index, marks=pytest.mark.slow) for index in range(1, len(BASES)))]
"""Every certificate in the slow run, one by default."""


@pytest.mark.parametrize("index", range(len(BASES)))
def test_the_untouched_certificates_are_true(index: int) -> None:
    base = BASES[index]
    result = check(base.certificate, lambda _: base.weights)
    assert result.verified, result.reason
    assert decide(base.certificate, base.weights).accepted


@pytest.mark.parametrize("index", FIRST)
def test_some_mutations_are_judged_rightly(index: int) -> None:
    verdicts = judge(islice(everything(BASES[index], np.random.default_rng(index), 30), index, None, 61))
    assert verdicts["rejected"] > 20
    assert verdicts["accepted"] < verdicts["rejected"]


@pytest.mark.slow
def test_thousands_of_mutations_are_judged_rightly() -> None:
    total = Counter[str]()
    for index, base in enumerate(BASES):
        total += judge(everything(base, np.random.default_rng(100 + index), 200))
    assert total["rejected"] > 8000
    assert total["accepted"] < total["rejected"] / 5


# ---------------------------------------------------------------------------------------------- every number, lowered by 1e-8


def _reals(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, str) and value.startswith("0x"):
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _reals(inner, (*at, key))


@pytest.mark.parametrize("index", FIRST)
def test_a_lowered_lipschitz_constant_is_always_rejected(index: int) -> None:
    for mutation in json_mutations(BASES[index]):
        if ".L times 1 -" in mutation.name:
            assert not check(mutation.certificate, lambda _, data=mutation.weights: data).verified, mutation.name


# ----------------------------------------------------------------------------------------------------- bombs: time and memory


def _claimed(draft: Draft, **fields: Any) -> Sample:
    weights = safetensors(draft.tensors)
    predicate = draft.predicate([{"id": "lipschitz", "norm": draft.metric, "L": "0x1.0p+1000"}])
    predicate["claims"]["proved"] += fields.pop("claims", [])
    return Sample(document({**predicate, **fields}, weights), weights)


def _conv(shape: tuple[int, ...], kernel: tuple[int, ...], **fields: Any) -> Sample:
    draft = Draft(np.random.default_rng(0), fields.pop("metric", "l2"), shape, "F16")
    name, _ = draft.tensor(np.ones((1, 1, *kernel)))
    dims = len(kernel)
    node = {
        "dims": dims, "stride": [1] * dims, "padding": [0] * dims, "dilation": [1] * dims, "groups": 1, "padding_mode": "zeros",
        "transposed": False, "output_padding": [0] * dims, **fields,
    }  # fmt: skip
    draft.add("conv", [0], shape, None, weight=name, bias=None, bound="0x1.0p+900", **node)
    return _claimed(draft)


def _lone(op: str, given: tuple[int, ...], bound: str = "0x1.0p+900", metric: str = "l2", **fields: Any) -> Sample:
    draft = Draft(np.random.default_rng(0), metric, given)
    draft.add(op, [0], given, None, bound=bound, **fields)
    return _claimed(draft)


def _many(count: int, factor: str, claims: int = 0) -> Sample:
    draft = Draft(np.random.default_rng(0), "l2", (2,))
    for k in range(count):
        draft.add("scale", [k], (2,), None, factor=factor, bound=factor)
    claim = {"id": "contraction", "from": 0, "to": count, "factor": "0x1.0p+1000"}
    return _claimed(draft, claims=[claim] * claims)


def _doubling(count: int, width: int) -> Sample:
    draft = Draft(np.random.default_rng(0), "l2", (2,))
    for k in range(count):
        draft.add("sum", [k] * width, (2,), None, factors=["0x1.fffffffffffffp+1000"] * width)
    return _claimed(draft)


def _slices(count: int) -> Sample:
    draft = Draft(np.random.default_rng(0), "l2", (2,))
    for k in range(count):
        draft.add("slice", [k], (2,), None, axis=0, start=0, stop=2, bound="0x1.0p+0")
    return _claimed(draft)


def _implicit(times: int) -> Sample:
    draft = Draft(np.random.default_rng(0), "l2", (2,))
    name, _ = draft.tensor(np.zeros((1, 2)))
    operator = {"op": "linear", "weight": name, "bias": None, "transposed": False, "bound": "0x1.0p+0"}
    sigma = {"op": "activation", "name": "relu"}
    step = {"op": "euler", "operator": operator, "steps": None, "step": "0x1.0p+0", "decay": "0x1.0p+1000", "skew": None,
            "skew_bound": None, "free": None, "activation": sigma, "times": 1, "bound": "0x1.0p+1020"}  # fmt: skip
    fields = {"keep": "0x1.0p+1000", "mix": "0x1.0p+0", "start": "0x1.0p+0", "resolvent": None, "resolvent_bound": None}
    draft.add("implicit", [0], (2,), None, map=step, times=times, bound="0x1.0p+1000", **fields)
    return _claimed(draft)


BOMBS: dict[str, Callable[[], Sample]] = {
    "stride 2^30": lambda: _conv((1, 5), (3,), stride=[2**30]),
    "stride 2^30 transposed": lambda: _conv((1, 5), (3,), stride=[2**30], transposed=True),
    "stride 2^30 transposed in linf": lambda: _conv((1, 5), (3,), stride=[2**30], transposed=True, metric="linf"),
    "stride 2^39 circular": lambda: _conv((1, 2**39), (3,), stride=[2**39], padding=[1], padding_mode="circular"),
    "dilation 2^39": lambda: _conv((1, 2**39), (3,), dilation=[2**37]),
    "image 2^39": lambda: _conv((1, 2**39), (3,)),
    "padding 2^39": lambda: _conv((1, 4), (3,), padding=[2**39]),
    "image of coprime sides": lambda: _conv((1, 997, 991, 983), (3, 3, 3)),
    "kernel 8 x 8 x 8": lambda: _conv((1, 8, 8, 8), (8, 8, 8), padding=[7, 7, 7]),
    "kernel 61 x 59 x 53": lambda: _conv((1, 61, 59, 53), (61, 59, 53), padding=[60, 58, 52]),
    "kernel 128 x 128": lambda: _conv((1, 999, 999), (128, 128)),
    "kernel 100000": lambda: _conv((1, 10**6), (10**5,)),
    "take 2^33": lambda: _lone("take", (2**33,), axis=0, index=[2**33 - 1]),
    "pool 2^39": lambda: _lone(
        "pool", (1, 2**39), name="max", dims=1, kernel=[2**39], stride=[1], padding=[0], metric="linf"
    ),
    "group size 2^39": lambda: _lone("groupsort", (2**39,), group_size=2**39, axis=0),
    "pad 2^39": lambda: _lone("pad", (2,), before=[2**38], after=[2**38]),
    "reshape 2^39": lambda: _lone("reshape", (2**39,), shape=[1] * 50_000 + [2**39]),
    "permute": lambda: _lone("permute", (1,) * 50_000, order=list(range(50_000))),
    "mean": lambda: _lone("mean", (2**39, 2), axis=0),
    "standardize": lambda: _lone("standardize", (2**39,), eps="0x1.0p-1000", centered=True, metric="linf"),
    "many steep scalings": lambda: _many(9999, "0x1.0p+1023"),
    "many flat scalings": lambda: _many(9999, "0x1.0000000000001p-1022"),
    "many claims": lambda: _many(5000, "0x1.0p+0", 2000),
    "wide steep sums": lambda: _doubling(3000, 30),
    "nested slices": lambda: _slices(9999),
    "times 10000": lambda: _implicit(10_000),
    "times 2^39": lambda: _implicit(2**39),
}


LONG = {
    "many steep scalings",
    "many flat scalings",
    "many claims",
    "wide steep sums",
    "nested slices",
    "kernel 8 x 8 x 8",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in BOMBS])
def test_bombs_are_defused(name: str) -> None:
    """Small files that ask for much time or memory are answered soon: the answer may be either."""
    sample = BOMBS[name]()
    tracemalloc.start()
    start = time.process_time()
    result = check(sample.certificate, lambda _: sample.weights)
    duration, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.verified or len(result.reason) > 8
    assert peak < 5e8, f"{peak / 1e6:.0f} MB"
    assert duration < 8.0, f"{duration:.1f} s"  # tracemalloc makes it some four times slower
