"""The claims: what each says, and that it follows from the checked program (docs/soundness.md, S7-S8)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from .files import ints, number
from .numbers import TINY, Array, U, defect, exact_log_norm, float_up, gamma, need, root_up, squares
from .operations import Node
from .program import Walk

__all__ = ["check_claims", "margin_constants", "needed_margins"]

TIERS = ("proved", "replayable", "attested")


def margin_constants(weight: Array, before: Fraction, norm: str = "l2", *, exact: bool = False) -> Array:
    """Bound before * ||w_i - w_j||, in the dual norm, the constants of the differences of the outputs of a dense layer (S7.3)."""
    if not weight.any() or not before:
        return np.zeros((len(weight), len(weight)))
    exponent = int(np.frexp(np.abs(weight).max())[1])
    scaled, rows = np.ldexp(weight, -exponent), []
    inflate, factor = float_up(1 + gamma(2 * (weight.shape[1] + 4))), float_up(before * Fraction(2) ** exponent)
    factor_exact = before * Fraction(2) ** exponent
    for row, given in zip(scaled, weight, strict=True):  # with exact: every difference and sum in fractions
        if exact:
            rows.append([float_up(factor_exact * _exact_distance(row, other, norm)) for other in scaled])
            continue
        parts = np.abs(scaled - row) if norm == "linf" else np.square(scaled - row)
        sums = np.nextafter(parts.sum(axis=1) * inflate + 2.0**-900, np.inf)
        norms = sums if norm == "linf" else np.nextafter(np.sqrt(sums), np.inf)
        rows.append(np.where((weight == given).all(axis=1), 0.0, np.nextafter(norms * factor, np.inf)))
    return np.array(rows)


def _exact_distance(row: Array, other: Array, norm: str) -> Fraction:
    steps = [abs(Fraction(x) - Fraction(y)) for x, y in zip(row.tolist(), other.tolist(), strict=True)]
    if norm == "linf" or not any(steps):
        return sum(steps, Fraction(0))
    return root_up(sum((step * step for step in steps), Fraction(0)))


def _lipschitz(walk: Walk, claim: Node) -> None:
    """For all x, y: ||f(x) - f(y)|| <= L ||x - y|| in the norm of the certificate."""
    need(claim["norm"] == walk.g.norm, "the Lipschitz constant is claimed in another norm")
    constant = walk.constants()[-1]
    need(
        constant is not None and number(claim["L"], "L") >= constant,
        "the Lipschitz constant is below what can be proved",
    )


def _margin_constants(walk: Walk, claim: Node) -> None:
    """For all i, j: f_i - f_j has the Lipschitz constant L_ij."""
    last, (size, *more_axes) = walk.nodes[-1], walk.shapes[-1]
    need(last["op"] == "linear" and not more_axes, "margin constants need a dense last layer")
    rows = claim["L"]
    need(isinstance(rows, list) and len(rows) == size, "the margin constants have the wrong shape")
    need(all(isinstance(row, list) and len(row) == size for row in rows), "the margin constants have the wrong shape")
    claimed = np.array([[float(number(value, "a margin constant")) for value in row] for row in rows])
    needed = needed_margins(walk)
    need((claimed == claimed.T).all() and not claimed.diagonal().any(), "the margin constants are not symmetric")
    need((claimed >= needed).all(), "a margin constant is below what can be proved")


def needed_margins(walk: Walk) -> Array:
    """Return the least margin constants that are proved, from the last layer and from a joint bound that ends with it."""
    last, constants = walk.nodes[-1], walk.constants()
    weight = walk.g.tensors[last["weight"]]
    before = constants[last["in"][0]]
    need(before is not None, "margin constants of a constant")
    needed = margin_constants(weight.T if last["transposed"] else weight, before, walk.g.norm, exact=walk.g.exact)
    first, _, form = walk.joint.get(len(walk.nodes) - 1, (0, None, None))
    start = constants[walk.nodes[first]["in"][0]]
    if form is None or start is None:
        return needed
    entries = [[Fraction(value) for value in row] for row in form.tolist()]
    size = range(len(entries))
    distances = [[max(entries[i][i] + entries[j][j] - 2 * entries[i][j], Fraction(0)) for j in size] for i in size]
    jointly = [
        [float_up(start * root_up(d)) if i != j else 0.0 for j, d in enumerate(row)] for i, row in enumerate(distances)
    ]
    return np.minimum(needed, np.array(jointly))


def _contraction(walk: Walk, claim: Node) -> None:
    """The value `to` is a function of the value `from` alone, with the Lipschitz constant `factor`."""
    start, end = ints([claim["from"], claim["to"]], 0, "contraction")
    need(start < end < len(walk.shapes), "a contraction names values that are not there")
    factor = walk.constants(start)[end]
    need(
        factor is not None and number(claim["factor"], "factor") >= factor,
        "a contraction factor is below what can be proved",
    )


def _forward_exponent(walk: Walk, claim: Node) -> None:
    """rate^depth >= L: the exponent per operation of the whole network is at most log(rate)."""
    depth, constant = ints([claim["depth"]], 1, "depth")[0], walk.constants()[-1]
    need(depth <= len(walk.nodes), "the depth is above the number of operations")
    need(
        constant is not None and number(claim["rate"], "rate") ** depth >= constant,
        "the forward exponent is not proved",
    )


def _lognorm(walk: Walk, claim: Node) -> None:
    """The logarithmic 2-norm of a square linear operation: 2 mu I - W - W^T >= 0 (S7.4)."""
    node = walk.nodes[ints([claim["node"]], 0, "node")[0]]
    need(node["op"] == "linear" and walk.g.norm != "linf", "a logarithmic norm needs a linear operation, in l2")
    weight = walk.g.tensors[node["weight"]]
    need(weight.shape[0] == weight.shape[1], "a logarithmic norm needs a square matrix")
    exponent = int(np.frexp(np.abs(weight).max())[1])
    scaled = np.ldexp(weight, -exponent)
    mu = 2 * number(claim["mu"], "mu", signed=True) / Fraction(2) ** exponent
    if walk.g.exact:
        need(exact_log_norm(scaled, mu), "the logarithmic norm is not proved")
        return
    symmetric = -(scaled + scaled.T)
    error = U * root_up(squares(symmetric[None])) + TINY
    shift = float(mu - error - 64 * len(weight) * U * (abs(mu) + 2 * len(weight)))
    need(Fraction(shift) + defect(symmetric[None], shift) + error <= mu, "the logarithmic norm is not proved")


def _stability(walk: Walk, claim: Node) -> None:
    """A recurrent operation forgets its state at the rate, and has the gain for sequences of every length."""
    index = ints([claim["node"]], 0, "node")[0]
    need(
        index < len(walk.nodes) and id(walk.nodes[index]) in walk.g.stable,
        "stability is claimed of no recurrent operation",
    )
    rate, gain = walk.g.stable[id(walk.nodes[index])]
    need(rate <= number(claim["rate"], "rate") < 1, "the rate of a recurrence is not proved to be below 1")
    need(gain is not None and gain <= number(claim["gain"], "gain"), "the gain of a recurrence is not proved")


_PROVED: dict[str, tuple[set[str], Callable[[Walk, Node], None]]] = {
    "lipschitz": ({"norm", "L"}, _lipschitz),
    "margin_constants": ({"L"}, _margin_constants),
    "contraction": ({"from", "to", "factor"}, _contraction),
    "forward_exponent": ({"depth", "rate"}, _forward_exponent),
    "lognorm": ({"node", "mu"}, _lognorm),
    "stability": ({"node", "rate", "gain"}, _stability),
}


def check_claims(claims: Any, walk: Walk) -> float:
    """Check all proved claims, and that the three tiers are lists of claims; return the Lipschitz constant."""
    need(isinstance(claims, dict) and set(claims) == set(TIERS), "the claims are malformed")
    for tier in TIERS:
        ok = isinstance(claims[tier], list) and all(
            isinstance(c, dict) and isinstance(c.get("id"), str) for c in claims[tier]
        )
        need(
            ok and (tier == "proved" or not any(c["id"] in _PROVED for c in claims[tier])),
            f"the {tier} claims are malformed",
        )
    for claim in claims["proved"]:
        need(claim["id"] in _PROVED, f"a claim {claim['id']!r} cannot be proved")
        keys, check = _PROVED[claim["id"]]
        need(set(claim) == keys | {"id"}, f"the claim {claim['id']!r} has wrong keys")
        check(walk, claim)
    totals = [claim["L"] for claim in claims["proved"] if claim["id"] == "lipschitz"]
    need(len(totals) == 1, "there must be one claim of a Lipschitz constant")
    return float(number(totals[0], "L"))
