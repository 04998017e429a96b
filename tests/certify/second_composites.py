"""The rules of the composite operations, for the second verifier (the theorems of the blocks)."""

from __future__ import annotations

from itertools import product
from typing import Any

from flint import arb, fmpq, fmpz, fmpz_mat

from tests.certify.second_norms import conv_matrix, is_positive_semidefinite, largest_eigenvalue_at_most
from tests.certify.second_reader import Tensor, naturals, parse_real
from tests.certify.second_rules import RULES, Context, Node, Shape, activation_slope, integer, need, rule, window_shape

__all__: list[str] = []

FREE_OF_SIGN = {"zigzag", "spline", "abs", "gelu", "gelu_tanh", "silu", "mish", "hardswish", "soft_abs"}


def monotone(context: Context, node: Any, shape: Shape) -> None:
    """Slopes in [0, 1]."""
    need(isinstance(node, dict) and node.get("op") == "activation", "no activation")
    slope = activation_slope(context, node, shape)
    need(node["name"] not in FREE_OF_SIGN and slope <= 1, "slopes beyond [0, 1]")
    if node["name"] in {"leaky_relu", "elu"}:
        need(0 <= parse_real(node["slope" if node["name"] == "leaky_relu" else "alpha"]) <= 1, "slopes beyond [0, 1]")
    if node["name"] == "prelu":
        need(all(v >= 0 for v in context.tensors[node["weight"]].integers), "slopes beyond [0, 1]")


def nonnegative(node: Node, key: str) -> fmpq:
    value = parse_real(node[key])
    need(value >= 0, f"{key} is negative")
    return value


def at_least(context: Context, node: Node, truth: arb) -> None:
    need(not arb(context.limit(node)) < truth, f"{node['op']}: the bound is too small")


def hidden(context: Context, operator: Node, shape: Shape) -> tuple[list[list[int]], Tensor, int]:
    """Return the dense matrix of an operator on a value, its tensor, and how many rows belong to one hidden unit."""
    if operator["op"] == "linear":
        need(set(operator) == {"op", "weight", "bias", "transposed", "bound"}, "wrong fields")
        weight = context.tensor(operator["weight"], 2)
        rows = weight.rows()
        if operator["transposed"]:
            rows = [list(c) for c in zip(*rows, strict=True)]
        need(len(rows[0]) == shape[-1], "an operator does not fit")
        context.vector(operator["bias"], len(rows))
        return rows, weight, 1
    need(operator["op"] == "conv" and context.metric == "l2", "no such operator")
    fields = RULES["conv"][0] | {"op", "bound"}
    need(fields == set(operator) - {"grid"} and not operator["transposed"], "wrong fields")
    dims = integer(operator["dims"], 1, 3)
    weight, groups = context.tensor(operator["weight"], dims + 2), integer(operator["groups"], 1, 2**40)
    need(shape[0] == groups * weight.shape[1] and weight.shape[0] % groups == 0, "an operator does not fit")
    out, place = window_shape(shape[1:], weight.shape[2:], operator)
    spans = [d * (k - 1) for (_, _, d), k in zip(place, weight.shape[2:], strict=True)]
    circular = operator["padding_mode"] == "circular"
    for (s, p, _), span in zip(place, spans, strict=True):
        need(s == 1 and (2 * p == span if circular else p <= span), "a convolution in a block keeps the grid")
    need(
        operator["padding_mode"] in {"zeros", "circular"} and not any(naturals(operator["output_padding"], 0)),
        "bad padding",
    )
    context.vector(operator["bias"], weight.shape[0])
    rows = conv_matrix(weight.shape, weight.integers, shape[1:], out, place, groups, circular=circular)
    return rows, weight, len(rows) // weight.shape[0]


def _weighted_gram(rows: list[list[int]], steps: list[int]) -> fmpz_mat:
    a = fmpz_mat(rows)
    weighted = fmpz_mat([[s * v for v in row] for s, row in zip(steps, rows, strict=True)])
    return a.transpose() * weighted


@rule("euler", "operator steps step decay skew skew_bound free activation times")
def _euler(context: Context, node: Node, shape: Shape) -> Shape:
    need(context.metric != "linf", "not in linf")
    rows, weight, repeat = hidden(context, node["operator"], shape)
    units = len(rows) // repeat
    steps, unit = [1] * len(rows), weight.unit**2
    if (vector := context.vector(node["steps"], units)) is not None:
        need(all(s >= 0 for s in vector.integers), "negative steps")
        steps, unit = [s for s in vector.integers for _ in range(repeat)], unit * vector.unit
    large = context.limit(node["operator"]) - (fmpq(1, 2**880) if context.room else 0)
    need(large >= 0, "euler: the operator is larger")
    need(largest_eigenvalue_at_most(_weighted_gram(rows, steps), large**2 / unit), "euler: the operator is larger")
    monotone(context, node["activation"], (units,) if repeat == 1 else (units, repeat))
    u = nonnegative(node["operator"], "bound")
    a, c = nonnegative(node, "step") * u * u, parse_real(node["decay"])
    factor = arb(max(abs(c), abs(c - a)))
    if node["skew"] is not None:
        k = _skew(context, node, shape[-1])
        factor = arb((c - a / 2) ** 2 + k * k).sqrt() + a / 2
    if node["free"] is not None:
        factor += _free(context, node["free"], shape)
    at_least(context, node, factor ** integer(node["times"], 1, 2**40))
    return shape


def _skew(context: Context, node: Node, size: int) -> fmpq:
    matrix = context.tensor(node["skew"], 2)
    need(matrix.shape == (size, size), "the skew matrix has another size")
    rows = matrix.rows()
    need(all(rows[i][j] == -rows[j][i] for i, j in product(range(size), repeat=2)), "not antisymmetric")
    k = context.limit(node, "skew_bound")
    a = fmpz_mat(rows)
    need(largest_eigenvalue_at_most(a.transpose() * a, (k / matrix.unit) ** 2), "euler: the skew matrix is larger")
    return nonnegative(node, "skew_bound")


def _free(context: Context, free: Any, shape: Shape) -> arb:
    need(set(free) == {"inner", "outer", "scale"} and free["outer"]["bias"] is None, "wrong fields")
    inner, first, _ = hidden(context, free["inner"], shape)
    outer, second, _ = hidden(context, free["outer"], (len(inner),))
    need(free["inner"]["op"] == free["outer"]["op"] == "linear" and len(outer) == shape[-1], "a free part does not fit")
    for rows, tensor, part in ((inner, first, free["inner"]), (outer, second, free["outer"])):
        a = fmpz_mat(rows)
        need(largest_eigenvalue_at_most(a.transpose() * a, (context.limit(part) / tensor.unit) ** 2), "free: larger")
    return arb(
        abs(parse_real(free["scale"])) * nonnegative(free["inner"], "bound") * nonnegative(free["outer"], "bound")
    )


@rule("infinity", "operator steps decay activation times")
def _infinity(context: Context, node: Node, shape: Shape) -> Shape:
    need(context.metric == "linf", "only in linf")
    operator, c = node["operator"], nonnegative(node, "decay")
    rows, diagonal, size = _square_rows(context, operator, shape)
    steps = context.vector(node["steps"], size)
    assert steps is not None
    monotone(context, node["activation"], (size,))
    factor = fmpq(0)
    for t, (centre, others) in zip(steps.integers, zip(diagonal, rows, strict=True), strict=True):
        need(t >= 0, "negative steps")
        h = t * steps.unit
        factor = max(factor, abs(1 - h * c), abs(1 - h * c + h * centre) + h * others)
    at_least(context, node, arb(factor) ** integer(node["times"], 1, 2**40))
    return shape


def _square_rows(context: Context, operator: Node, shape: Shape) -> tuple[list[fmpq], list[fmpq], int]:
    """Return, for each unit, the sum of moduli off the centre and the entry at the centre."""
    if operator["op"] == "linear":
        need(set(operator) - {"bound"} == {"op", "weight", "bias", "transposed"}, "wrong fields")
        weight = context.tensor(operator["weight"], 2)
        rows, at = weight.rows(), list(range(weight.shape[0]))
        if operator["transposed"]:
            rows = [list(column) for column in zip(*rows, strict=True)]
        need(weight.shape == (shape[-1], shape[-1]), "not square")
    else:
        dims = integer(operator["dims"], 1, 3)
        need(operator["op"] == "conv" and len(shape) == dims + 1, "no such operator")
        weight = context.tensor(operator["weight"], dims + 2)
        kernel, n = weight.shape[2:], weight.shape[0]
        need(
            weight.shape[:2] == (shape[0], shape[0]) and operator["groups"] == 1 and all(k % 2 for k in kernel),
            "not square",
        )
        need(
            operator["padding"] == [k // 2 for k in kernel]
            and operator["stride"] == operator["dilation"] == [1] * dims,
            "bad",
        )
        need(not operator["transposed"] and not any(naturals(operator["output_padding"], 0)), "bad")
        need(operator["padding_mode"] in {"zeros", "circular"}, "bad")
        taps = len(weight.integers) // n // n
        rows = [weight.integers[o * n * taps : (o + 1) * n * taps] for o in range(n)]
        at = [o * taps + taps // 2 for o in range(n)]
    context.vector(operator["bias"], weight.shape[0])
    centres = [row[k] * weight.unit for row, k in zip(rows, at, strict=True)]
    others = [(sum(map(abs, row)) - abs(row[k])) * weight.unit for row, k in zip(rows, at, strict=True)]
    return others, centres, weight.shape[0]


@rule("runge_kutta", "euler weights stages times")
def _runge_kutta(context: Context, node: Node, shape: Shape) -> Shape:
    inner = node["euler"]
    need(inner["op"] == "euler", "bad method")
    need(set(inner) == RULES["euler"][0] | {"op", "bound"} and parse_real(inner["bound"]) <= 1, "not a contraction")
    need(RULES["euler"][1](context, inner, shape) == shape, "bad method")
    weights = [nonnegative({"b": b}, "b") for b in node["weights"]]
    count = len(weights)
    stages = [[parse_real(a) for a in row] for row in node["stages"]]
    need([len(row) for row in stages] == list(range(count)), "not explicit")
    a = [[row[j] if j < len(row) else fmpq(0) for j in range(count)] for row in stages]
    b = weights
    form = [
        [b[i] * a[i][j] + b[j] * a[j][i] - b[i] * b[j] + (b[i] if i == j else 0) for j in range(count)]
        for i in range(count)
    ]  # fmt: skip
    need(is_positive_semidefinite(_integers(form)) and integer(node["times"], 1, 2**40), "not nonexpansive")
    context.holds(node, 1)
    return shape


def _integers(rows: list[list[fmpq]]) -> fmpz_mat:
    scale = fmpz(1)
    for value in (v for row in rows for v in row):
        scale = scale.lcm(value.q)
    return fmpz_mat([[int(fmpz(v.p) * (scale // v.q)) for v in row] for row in rows])


@rule("implicit", "map keep mix start resolvent resolvent_bound times")
def _implicit(context: Context, node: Node, shape: Shape) -> Shape:
    inner, times = node["map"], integer(node["times"], 0, 10_000)
    need(inner["op"] in {"euler", "infinity"} and "in" not in inner, "no such map")
    fields, law = RULES[inner["op"]]
    need(set(inner) == fields | {"op", "bound"} and law(context, inner, shape) == shape, "wrong fields")
    rho = fmpq(1)
    if node["resolvent"] is not None:
        matrix = context.tensor(node["resolvent"], 2)
        need(matrix.shape == (shape[-1], shape[-1]), "the resolvent has another size")
        context.matrix_holds({"op": "implicit", "bound": node["resolvent_bound"]}, matrix.rows(), matrix.exponent)
        rho = nonnegative(node, "resolvent_bound")
    constant = arb(abs(parse_real(node["start"])))
    keep, mix, factor = abs(parse_real(node["keep"])), abs(parse_real(node["mix"])), parse_real(inner["bound"])
    for _ in range(times):
        constant = ((constant * keep * factor + mix) * rho).upper()
    at_least(context, node, constant)
    return shape


@rule("bounded_norm", "radius")
def _bounded_norm(context: Context, node: Node, shape: Shape) -> Shape:
    need(parse_real(node["radius"]) > 0, "the radius must be positive")
    truth = arb(1) if context.metric != "linf" else 1 + (arb(shape[-1] - 1) / 27).sqrt()
    if truth.rad() == 0 and context.metric != "linf":
        context.holds(node, 1)
    else:
        at_least(context, node, truth)
    return shape
