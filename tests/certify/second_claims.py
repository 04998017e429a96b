"""Claims and joint bounds for the second verifier."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from flint import arb, fmpq, fmpz, fmpz_mat

from tests.certify.second_norms import is_positive_semidefinite, norm_at_most
from tests.certify.second_reader import parse_real, power_of_two
from tests.certify.second_rules import Context, activation_slope, integer, need

__all__ = ["check_claims", "check_joint", "integer_matrix"]


def integer_matrix(rows: list[list[fmpq]]) -> fmpz_mat:
    """Return a positive multiple with integer entries."""
    scale = fmpz(1)
    for row in rows:
        for value in row:
            scale = scale.lcm(value.q)
    return fmpz_mat([[int(fmpz(value.p) * (scale // value.q)) for value in row] for row in rows])


def _matrix(context: Context, node: dict[str, Any]) -> list[list[fmpq]]:
    weight = context.tensor(node["weight"], 2)
    rows = [[v * weight.unit for v in row] for row in weight.rows()]
    return [list(column) for column in zip(*rows, strict=True)] if node["transposed"] else rows


def check_joint(entry: Any, nodes: list[Any], context: Context) -> tuple[int, int, arb]:
    """Return the last and the first node and the bound of a chain, whose matrix inequality is decided as a whole.

    With z_0 the change of the input and z_i that behind activation i, ||z_0||^2 - sum z_i^T T_i (A_i z_{i-1} - z_i) - ||W z||^2/L^2
    is a quadratic form; the sum is at least 0 for slopes in [0, 1], so ||W z|| <= L ||z_0|| if the form is never negative.
    """
    need(isinstance(entry, dict) and set(entry) == {"nodes", "multipliers", "bound"}, "joint: wrong fields")
    chain = [integer(k, 0, len(nodes) - 1) for k in entry["nodes"]]
    need(len(chain) >= 2 and len(set(chain)) == len(chain), "joint: too short")
    need(context.metric != "linf", "joint: not in linf")
    for before, node in pairwise(chain):
        need(nodes[node]["in"] == [before + 1], "joint: not a chain")
    limit = parse_real(entry["bound"]) * (1 - 10**5 * context.room)  # its proof in floating point is less sharp
    need(limit >= 0, "joint: negative")
    lines = [nodes[k] for k in chain if nodes[k]["op"] == "linear"]
    matrices = [_matrix(context, node) for node in lines]
    if len(chain) == 2:
        need(len(lines) == 2 and entry["multipliers"] == [], "joint: two linears")
        product = _product(matrices[1], matrices[0])
        scaled = integer_matrix([*product, [limit] * len(product[0])]).tolist()
        need(norm_at_most([[int(v) for v in row] for row in scaled[:-1]], fmpq(scaled[-1][0] ** 2)), "joint: too small")
        return chain[-1], chain[0], arb(parse_real(entry["bound"]))
    need(len(chain) % 2 == 1 and len(lines) == len(chain) // 2 + 1, "joint: not alternating")
    need(all(nodes[k]["op"] == "linear" for k in chain[::2]), "joint: not alternating")
    for k, matrix in zip(chain[1::2], matrices, strict=False):
        _monotone(context, nodes[k], len(matrix))
    multipliers = [[parse_real(t) for t in row] for row in entry["multipliers"]]
    need([len(m) for m in multipliers] == [len(a) for a in matrices[:-1]], "joint: multipliers")
    need(all(t >= 0 for row in multipliers for t in row) and limit > 0, "joint: negative multiplier")
    need(is_positive_semidefinite(_form(matrices, multipliers, limit)), "joint: too small")
    context.chains.append((chain, matrices, multipliers))
    return chain[-1], chain[0], arb(parse_real(entry["bound"]))


def _monotone(context: Context, node: dict[str, Any], size: int) -> None:
    """Slopes in [0, 1]; the names whose slope never is negative."""
    need(node["op"] == "activation", "joint: no activation")
    slope = activation_slope(context, node, (size,))
    never = {"zigzag", "spline", "abs", "gelu", "gelu_tanh", "silu", "mish", "hardswish", "soft_abs"}
    need(node["name"] not in never and slope <= 1, "joint: slopes beyond [0, 1]")
    if node["name"] in {"leaky_relu", "elu"}:
        need(
            0 <= parse_real(node["slope" if node["name"] == "leaky_relu" else "alpha"]) <= 1,
            "joint: slopes beyond [0, 1]",
        )
    if node["name"] == "prelu":
        need(all(v >= 0 for v in context.tensors[node["weight"]].integers), "joint: slopes beyond [0, 1]")


def _product(a: list[list[fmpq]], b: list[list[fmpq]]) -> list[list[fmpq]]:
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), fmpq(0)) for column in zip(*b, strict=True)]
        for row in a
    ]


def _form(matrices: list[list[list[fmpq]]], multipliers: list[list[fmpq]], limit: fmpq) -> fmpz_mat:
    sizes = [len(matrices[0][0]), *map(len, multipliers)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    total = sum(sizes)
    form = [[fmpq(0)] * total for _ in range(total)]
    for i in range(sizes[0]):
        form[i][i] = fmpq(1)
    for layer, (a, row) in enumerate(zip(matrices, multipliers, strict=False), start=1):
        for i, t in enumerate(row):
            at = starts[layer] + i
            form[at][at] += t
            for j, v in enumerate(a[i]):
                other = starts[layer - 1] + j
                form[at][other] -= t * v / 2
                form[other][at] -= t * v / 2
    last = matrices[-1]
    for i, column in enumerate(zip(*last, strict=True)):
        for j, other in enumerate(zip(*last, strict=True)):
            value = sum((x * y for x, y in zip(column, other, strict=True)), fmpq(0))
            form[starts[-1] + i][starts[-1] + j] -= value / limit**2
    return integer_matrix(form)


CLAIMS = {
    "lipschitz": {"norm", "L"},
    "margin_constants": {"L"},
    "contraction": {"from", "to", "factor"},
    "forward_exponent": {"depth", "rate"},
    "lognorm": {"node", "mu"},
}


def check_claims(predicate: Any, values: list[Any], context: Context) -> None:
    """Refuse unless every claim of the proved tier is true."""
    claims = predicate["claims"]
    need(all(isinstance(claims[tier], list) for tier in ("proved", "replayable", "attested")), "claims are missing")
    kinds = [claim["id"] for claim in claims["proved"]]
    need(kinds.count("lipschitz") == 1, "one Lipschitz claim")
    total = values[-1].through[0][0]
    for claim in claims["proved"]:
        need(claim["id"] in CLAIMS and set(claim) == CLAIMS[claim["id"]] | {"id"}, "unknown claim")
    claim = next(c for c in claims["proved"] if c["id"] == "lipschitz")
    least = parse_real(claim["L"])
    need(claim["norm"] == context.metric and not arb(least) < total, "the Lipschitz constant is too small")
    nodes = predicate["graph"]
    for claim in claims["proved"]:
        if claim["id"] == "margin_constants":
            _margins(claim["L"], nodes, values, context)
        elif claim["id"] == "contraction":
            start, end = (integer(claim[key], 0, len(nodes)) for key in ("from", "to"))
            need(start < end and start in values[end].through, "a value is not a function of another one")
            need(not arb(parse_real(claim["factor"])) < values[end].through[start][0], "no such contraction")
        elif claim["id"] == "forward_exponent":
            depth, rate = integer(claim["depth"], 1, 2**48), parse_real(claim["rate"])
            need(rate >= 0 and not arb(rate) ** depth < total, "no such rate")
        elif claim["id"] == "lognorm":
            _lognorm(nodes[integer(claim["node"], 0, len(nodes) - 1)], parse_real(claim["mu"]), context)


def _margins(table: Any, nodes: list[Any], values: list[Any], context: Context) -> None:
    last = nodes[-1]
    need(last["op"] == "linear" and len(values[-1].shape) == 1, "margins need a dense last operation")
    before = values[last["in"][0]].through[0][0]
    rows = _matrix(context, last)
    need(len(table) == len(rows) and all(len(line) == len(rows) for line in table), "margins of another size")
    for i, line in enumerate(table):
        for j, text in enumerate(line):
            need(parse_real(text) >= 0 and text == table[j][i], "a margin is negative or not symmetric")
            if i == j:
                continue
            change = [a - b for a, b in zip(rows[i], rows[j], strict=True)]
            size = arb(sum(map(abs, change), fmpq(0)))
            if context.metric != "linf":
                size = arb(sum((c * c for c in change), fmpq(0))).sqrt()
            limit = parse_real(text) * (1 - context.room)
            need(limit > 0 or not context.room or not any(change), "a margin without room")
            if arb(limit) < before * size:
                need(not context.room and _joint_margin(limit, i, j, nodes, values, context), "a margin is too small")


def _joint_margin(limit: fmpq, i: int, j: int, nodes: list[Any], values: list[Any], context: Context) -> bool:
    """Decide a margin from the matrix inequality of a chain that ends with the last operation, with w_i - w_j in the place of W."""
    for chain, matrices, multipliers in context.chains:
        before = values[nodes[chain[0]]["in"][0]].through[0][0]
        room = fmpq(before.upper().man_exp()[0]) * power_of_two(int(before.upper().man_exp()[1]))
        if chain[-1] == len(nodes) - 1 and limit > 0 and room > 0:
            row = [a - b for a, b in zip(matrices[-1][i], matrices[-1][j], strict=True)]
            if is_positive_semidefinite(_form([*matrices[:-1], [row]], multipliers, limit / room)):
                return True
    return False


def _lognorm(node: Any, mu: fmpq, context: Context) -> None:
    need(node["op"] == "linear", "the log-norm of a linear operation")
    rows = _matrix(context, node)
    need(len(rows) == len(rows[0]), "the log-norm of a square matrix")
    n = len(rows)
    if context.room:  # and more than what underflows
        mu -= sum((abs(v) for row in rows for v in row), fmpq(0)) * context.room + fmpq(1, 2**800)
    form = [[2 * mu * (i == j) - rows[i][j] - rows[j][i] for j in range(n)] for i in range(n)]
    need(is_positive_semidefinite(integer_matrix(form)), "the log-norm is too small")
