"""A second verifier of certificates, independent of stableopt.certify.verifier: exact integers and balls (python-flint) only.

It is slower and knows small sizes only, but it decides what is *true* of the image sizes declared: convolutions and pools by their
dense matrices, composition by the best of all rules. So what the first verifier accepts, this one must accept too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flint import arb, fmpq

import tests.certify.second_composites
from tests.certify.second_claims import check_claims, check_joint
from tests.certify.second_norms import precision
from tests.certify.second_reader import RefusedError, naturals, parse_json, parse_real, parse_weights
from tests.certify.second_rules import RULES, Context, Node, Shape, integer, need, some_axis

__all__ = ["Value", "Verdict", "constants", "decide"]

assert tests.certify.second_composites.__doc__  # its rules are registered by importing it


@dataclass(frozen=True)
class Verdict:
    """Whether everything claimed as proved is true, and if not why."""

    accepted: bool
    reason: str = ""


@dataclass
class Value:
    """A value: its shape, and for each value v through which all of its dependence goes (v: ratio, entries of v that it reads).

    ``through[v]`` = (K, (axis, set of indices) or None for all): the value is a function of these entries of v with constant K.
    """

    shape: Shape
    through: dict[int, tuple[arb, tuple[int, frozenset[int]] | None]] = field(default_factory=dict)


def decide(certificate: bytes, weights: bytes, room: fmpq | None = None) -> Verdict:
    """Decide whether a certificate is true; with ``room``, whether all its bounds exceed the truth by that part."""
    try:
        with precision(4096):
            statement = parse_json(certificate)
            need(_digest(statement) == hashlib.sha256(weights).hexdigest(), "the digest does not match")
            tensors = parse_weights(weights)
            context = Context(tensors, _metric(statement["predicate"]), room or fmpq(0))
            values = walk(statement["predicate"], context)
            need(context.used == set(tensors), "tensors outside the graph")
            check_claims(statement["predicate"], values, context)
    except RefusedError as error:
        return Verdict(False, str(error))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, AssertionError) as error:
        return Verdict(False, f"malformed ({type(error).__name__})")
    return Verdict(True)


def constants(predicate: Any, weights: bytes) -> list[arb]:
    """Return the constant of every value of a program whose bounds are true."""
    with precision(4096):
        context = Context(parse_weights(weights), _metric(predicate), fmpq(0))
        return [value.through[0][0] for value in walk(predicate, context)]


def _digest(statement: Any) -> str:
    need(statement["_type"] == "https://in-toto.io/Statement/v1", "no in-toto statement")
    need(statement["predicateType"] == "https://stableopt.dev/certificate/v2", "another predicate")
    need(len(statement["subject"]) == 1, "one subject")
    name = statement["subject"][0]["name"]
    need(isinstance(name, str) and name and not set(name) & set("/\\\0\n") and name[0] != ".", "unsafe name")
    return statement["subject"][0]["digest"]["sha256"]


def _metric(predicate: Any) -> str:
    metric = predicate["input"]["metric"]
    need(type(predicate["schema"]) is int and predicate["schema"] == 2, "unknown schema")
    need(metric in {"l2", "linf", "token_max"} and predicate["input"]["domain"] == "R^n", "unknown metric or domain")
    return metric


def walk(predicate: Any, context: Context) -> list[Value]:
    """Check every operation and return the values."""
    shape, nodes = naturals(predicate["input"]["shape"], 1), predicate["graph"]
    need(shape and isinstance(nodes, list) and 0 < len(nodes) <= 10_000, "no graph")
    values, read = [Value(shape, {0: (arb(1), None)})], set[int]()
    joints: dict[int, list[tuple[int, arb]]] = {}
    for entry in predicate.get("joint", []):
        last, first, bound = check_joint(entry, nodes, context)
        joints.setdefault(last, []).append((first, bound))
    for number, node in enumerate(nodes, start=1):
        inputs = [integer(v, 0, number - 1) for v in _list(node["in"])]
        need(inputs, "an operation without inputs")
        read.update(inputs)
        value = _step(context, node, [values[v] for v in inputs])
        value.through[number] = (arb(1), None)
        for first, bound in joints.get(number - 1, []):
            source = nodes[first]["in"][0]
            for at, (constant, entries) in values[source].through.items():
                _improve(value, at, constant * bound, entries)
        _close(value, values)
        values.append(value)
    need(read == set(range(len(nodes))), "a value is not used")
    return values


def _list(value: Any) -> list[Any]:
    need(isinstance(value, list), "no list")
    return value


def _improve(value: Value, at: int, constant: arb, entries: tuple[int, frozenset[int]] | None) -> None:
    old = value.through.get(at)
    if old is None or bool(constant < old[0]):
        value.through[at] = (constant.upper(), entries if old is None else old[1])


def _close(value: Value, values: list[Value]) -> None:
    """Whatever goes through v goes through all that v goes through: take the product where it is smaller."""
    for middle in sorted(value.through, reverse=True)[1:]:
        constant = value.through[middle][0]
        for at, (outer, entries) in values[middle].through.items():
            _improve(value, at, constant * outer, entries)


def _step(context: Context, node: Node, inputs: list[Value]) -> Value:
    op = node["op"]
    if op == "sum":
        return _sum(node, inputs)
    if op == "concat":
        return _concat(context, node, inputs)
    need(isinstance(op, str) and op in RULES and len(inputs) == 1, f"unknown operation {op!r}")
    fields, rule = RULES[op]
    optional = {"grid"} if op == "conv" else set[str]()
    need(fields == {"*"} or set(node) - optional == fields | {"op", "in", "bound"}, f"{op}: wrong fields")
    shape = rule(context, node, inputs[0].shape)
    bound = arb(parse_real(node["bound"]))
    through = {at: (constant * bound, entries) for at, (constant, entries) in inputs[0].through.items()}
    if op == "slice":  # of the value sliced only these entries are read
        number = max(inputs[0].through)
        kept = frozenset(range(node["start"], node["stop"]))
        through[number] = (bound, (some_axis(node, inputs[0].shape), kept))
    return Value(shape, through)


def _common(
    inputs: list[Value], combine: Callable[[list[arb], bool], arb]
) -> dict[int, tuple[arb, tuple[int, frozenset[int]] | None]]:
    """Combine the constants through every value that all inputs go through; True: they read disjoint parts of it."""
    found: dict[int, tuple[arb, tuple[int, frozenset[int]] | None]] = {}
    for at in set.intersection(*(set(value.through) for value in inputs)):
        parts = [value.through[at] for value in inputs]
        regions = [entries for _, entries in parts]
        axes = {region[0] for region in regions if region is not None}
        if None in regions or len(axes) != 1:
            found[at] = (combine([c for c, _ in parts], False), None)
            continue
        sets = [region[1] for region in regions if region is not None]
        union = frozenset[int]().union(*sets)
        disjoint = len(union) == sum(map(len, sets))
        found[at] = (combine([c for c, _ in parts], disjoint), (axes.pop(), union))
    return found


def _sum(node: Node, inputs: list[Value]) -> Value:
    need(set(node) == {"op", "in", "factors"} and len(_list(node["factors"])) == len(inputs), "sum: wrong fields")
    need(len({value.shape for value in inputs}) == 1, "a sum of different shapes")
    factors = [abs(parse_real(f)) for f in node["factors"]]
    return Value(
        inputs[0].shape, _common(inputs, lambda cs, _: _total(f * c for f, c in zip(factors, cs, strict=True)))
    )


def _total(terms: Iterable[arb]) -> arb:
    return sum(terms, arb(0))


def _concat(context: Context, node: Node, inputs: list[Value]) -> Value:
    need(set(node) == {"op", "in", "axis"}, "concat: wrong fields")
    shape = inputs[0].shape
    axis = some_axis(node, shape)
    need(all(len(v.shape) == len(shape) for v in inputs), "a concat of different shapes")
    rest = {(*v.shape[:axis], *v.shape[axis + 1 :]) for v in inputs}
    need(len(rest) == 1, "a concat of different shapes")
    squares = context.metric == "l2" or (context.metric == "token_max" and axis == len(shape) - 1)

    def combine(constants: list[arb], disjoint: bool) -> arb:
        if not squares or (disjoint and context.metric == "l2"):
            return _greatest(constants)
        return _total(c * c for c in constants).sqrt()

    size = sum(value.shape[axis] for value in inputs)
    return Value((*shape[:axis], size, *shape[axis + 1 :]), _common(inputs, combine))


def _greatest(constants: list[arb]) -> arb:
    best = constants[0]
    for constant in constants[1:]:
        best = best.max(constant)
    return best.upper()
