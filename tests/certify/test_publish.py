"""Published bounds: the verifier accepts each of them, and no smaller one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableopt.certify.program import Builder
from stableopt.certify.publish import (
    COMPOSITES,
    composite,
    from_file,
    layer_limits,
    matrix_bound,
    publish,
    published,
    shapes,
    shrink,
    slopes,
    to_file,
    weight_bound,
    within,
)  # fmt: skip
from stableopt.certify.publish_constants import CONSTANTS, root_up
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.operations import RULES, Graph
from stableopt.errors import UncertifiableError

NODES: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"op": "scale", "factor": -1.7}, (3,)),
    ({"op": "affine", "scale": "v", "bias": None, "axis": -1}, (2, 3)),
    ({"op": "affine", "scale": None, "bias": "v", "axis": -1}, (2, 3)),
    ({"op": "pool", "name": "avg", "dims": 1, "kernel": [3], "stride": [2], "padding": [0]}, (1, 7)),
    ({"op": "pool", "name": "max", "dims": 1, "kernel": [3], "stride": [2], "padding": [1]}, (1, 7)),
    ({"op": "l2pool", "dims": 1, "kernel": [3], "stride": [2]}, (1, 7)),
    ({"op": "reshape", "shape": [6]}, (2, 3)),
    ({"op": "reshape", "shape": [3, 2]}, (2, 3)),
    ({"op": "reshape", "shape": [2, 4]}, (8, 1)),
    ({"op": "permute", "order": [1, 0]}, (2, 3)),
    ({"op": "pad", "before": [1, 0], "after": [0, 2]}, (2, 3)),
    ({"op": "slice", "axis": 1, "start": 1, "stop": 3}, (2, 3)),
    ({"op": "groupsort", "group_size": 3, "axis": -1}, (2, 3)),
    ({"op": "mean", "axis": 0}, (5, 3)),
    ({"op": "take", "axis": 0, "index": [0, 1, 0, 0]}, (2, 3)),
    ({"op": "take", "axis": 1, "index": [0, 1, 0, 0]}, (2, 3)),
    ({"op": "softmax", "axis": -1}, (2, 3)),
    ({"op": "center"}, (2, 3)),
    ({"op": "ball", "radius": 2.0, "center": None, "axis": -1}, (2, 3)),
    ({"op": "householder", "vectors": "d", "axis": -1}, (2, 4)),
    ({"op": "standardize", "eps": 0.25, "centered": True}, (2, 28)),
    ({"op": "standardize", "eps": 1e-5, "centered": False}, (2, 28)),
    ({"op": "activation", "name": "elu", "alpha": 1.5}, (2, 3)),
    ({"op": "activation", "name": "gelu"}, (2, 3)),
    ({"op": "activation", "name": "prelu", "weight": "v", "axis": -1}, (2, 3)),
    ({"op": "linear", "weight": "w", "bias": None, "transposed": False}, (2, 3)),
    ({"op": "linear", "weight": "w", "bias": None, "transposed": True}, (2, 4)),
]
TENSORS = {
    "v": torch.tensor([0.5, -2.0, 1.25]),
    "d": torch.tensor([[1.0, 2.0], [-0.5, 0.25]]),
    "w": torch.tensor([[1.0, -2.0, 0.5], [0.25, 1.0, 0.0], [3.0, 1.0, -1.0], [0.0, 0.5, 0.125]]),
}
TIGHT = {"linear", "standardize"}
"""What is published with a slack, or a root that is rounded."""


def accepted(node: dict[str, Any], shape: tuple[int, ...], bound: float, norm: str) -> bool:
    rule = RULES[node["op"]]
    graph = Graph({name: value.double().numpy() for name, value in TENSORS.items()}, norm, exact=False)
    try:
        rule.check(graph, to_file(node | {"in": [0], "bound": bound}), shape, Fraction(bound))
    except RejectedError as error:
        if "not proved" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("norm", ["l2", "linf", "token_max"])
@pytest.mark.parametrize(("node", "shape"), NODES)
def test_the_verifier_accepts_what_is_published_and_nothing_less(
    node: dict[str, Any], shape: tuple[int, ...], norm: str
) -> None:
    if norm not in RULES[node["op"]].norms:
        with pytest.raises(UncertifiableError):
            published(node | {"in": [0]}, TENSORS, [shape], norm)
        return
    bound = published(node | {"in": [0]}, TENSORS, [shape], norm)["bound"]
    assert accepted(node, shape, bound, norm)
    less = bound * (1 - 1e-8) if node["op"] in TIGHT else math.nextafter(math.nextafter(bound, 0.0), 0.0)
    assert not accepted(node, shape, less, norm)


def test_every_operation_with_a_constant_is_in_the_table() -> None:
    assert {node["op"] for node, _ in NODES} >= set(CONSTANTS)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ({"op": "groupsort", "group_size": 2, "axis": 0}, (2, 3)), ({"op": "mean", "axis": 1}, (2, 3)),
        ({"op": "softmax", "axis": 0}, (2, 3)), ({"op": "ball", "radius": 1.0, "center": None, "axis": None}, (2, 3)),
        ({"op": "pool", "name": "max", "dims": 1, "kernel": [2], "stride": [2], "padding": [0]}, (2, 4)),
        ({"op": "conv", "weight": "w", "groups": 1}, (2, 4)), ({"op": "never", "weight": "w"}, (2, 4)),
        ({"op": "activation", "name": "never"}, (2, 4)),
    ],
)  # fmt: skip
def test_what_mixes_tokens_or_is_unknown_has_no_bound(node: dict[str, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(UncertifiableError):
        published(node | {"in": [0]}, TENSORS, [shape], "token_max")


@given(st.fractions(min_value=0, max_value=10**9), st.integers(-200, 200))
def test_the_root_is_the_least_float_above_or_the_next(value: Fraction, scale: int) -> None:
    square = value * Fraction(4) ** scale
    root = root_up(square)
    assert Fraction(root) ** 2 >= square
    below = math.nextafter(math.nextafter(root, 0.0), 0.0)
    assert root == 0.0 or Fraction(below) ** 2 < square or below == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_shrunk_weight_keeps_its_limit_and_a_small_one_its_numbers(dtype: torch.dtype) -> None:
    node = {"op": "linear", "transposed": False}
    weight = torch.eye(3, dtype=dtype)
    assert shrink(node, weight, 2.0) is weight
    smaller = shrink(node, weight, 0.7)
    assert smaller.dtype == dtype
    assert 0.68 < weight_bound(node, smaller) <= 0.7
    assert matrix_bound(weight, "linf") >= 1.0


def test_only_the_largest_layers_are_limited() -> None:
    assert layer_limits([1.0, 0.5], 2.0, 1.0) == math.inf
    assert layer_limits([4.0, 0.5, 4.0], 1.0, 2.0) == pytest.approx(2.0, rel=1e-9)
    assert layer_limits([2.0], 1.0, 1.0) <= within(1.0) * (1 + 1e-15)
    with pytest.raises(UncertifiableError, match="no weight"):
        layer_limits([], 3.0, 2.0)


def test_a_program_gets_the_bounds_of_its_nodes_and_sums_none() -> None:
    graph = Builder((3,))
    first = graph.add("linear", graph.input, weight=TENSORS["w"][:3], bias=None, transposed=False)
    graph.add("sum", graph.input, first, factors=[1.0, 0.5])
    program = graph.program()
    assert shapes(program) == [(3,), (3,), (3,)]
    nodes = publish(program).nodes
    assert nodes[0]["bound"] == matrix_bound(TENSORS["w"][:3])
    assert "bound" not in nodes[1]


def test_composites_are_published_by_whom_they_name() -> None:
    @composite("twice")
    def twice(node: Any, _tensors: Any, sizes: Any, norm: str) -> Any:
        return node | {"bound": 2.0, "seen": [sizes, norm]}

    try:
        assert published({"op": "twice", "in": [0]}, {}, [(2,)], "l2")["seen"] == [[(2,)], "l2"]
    finally:
        del COMPOSITES["twice"]


def test_what_is_written_is_read_back() -> None:
    node = {"op": "x", "a": 0.1, "b": [1, -2.5e-300, None, True], "c": {"d": [0.0, "0.weight"]}, "e": "relu"}
    assert from_file(to_file(node)) == node
    assert to_file(node)["a"] == (0.1).hex()


def test_slopes_come_from_the_verifier() -> None:
    assert slopes({"op": "activation", "name": "sigmoid"}, {}, (2,)) == (0, Fraction(1, 4))
    with pytest.raises(UncertifiableError, match="no proved bound"):
        slopes({"op": "activation", "name": "softplus", "beta": -1.0}, {}, (2,))
