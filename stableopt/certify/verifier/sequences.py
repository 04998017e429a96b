"""The rules of recurrences, state spaces and attention (docs/soundness.md, S12-S14)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from .activations import slopes
from .files import choice, number
from .numbers import TINY, Array, U, gamma, largest, need, norm_at_most, root_up, squares, up_short
from .operations import Graph, Node, Shape, rule

__all__ = ["power_sum", "weight_sum"]

_SCALES = 2.0**60  # scales of a metric lie between this and its inverse


def power_sum(a: Fraction, n: int) -> tuple[Fraction, Fraction]:
    """S12.1: 1 + a + ... + a^(n-1) and a^n, rounded up; the sum of 2n terms is 1 + a^n times that of n."""
    if n == 1:
        return Fraction(1), a
    total, power = power_sum(a, n // 2)
    need(power < 2**2000, "the gain of a recurrence overflows")
    total, power = up_short(total * (1 + power)), up_short(power * power)
    return (up_short(1 + a * total), up_short(a * power)) if n % 2 else (total, power)


def _exactly(g: Graph, matrix: Array, limit: Fraction, what: str) -> None:
    need(norm_at_most(matrix[None], limit, exact=g.exact), f"the norm of {what} is not proved")


def _rounded(g: Graph, matrix: Array, limit: Fraction, what: str) -> None:
    """S12.2: prove the norm of a matrix whose entries were computed with at most three roundings each."""
    _exactly(g, matrix, limit - gamma(8) * root_up(squares(matrix[None])) - TINY, what)


def _into_l2(g: Graph, matrix: Array, limit: Fraction) -> None:
    """S12.2: the same from inputs to the Euclidean norm; in linf by the sums of the rows, which are largest at once."""
    if g.norm == "linf":
        size = root_up(squares(np.abs(matrix).sum(axis=1)[None, None])) * (1 + gamma(2 * matrix.shape[1] + 8))
        need(limit >= size + TINY, "the norm of an input matrix is not proved")
    else:
        _rounded(g, matrix, limit, "an input matrix")


def _vector(g: Graph, name: object, n: int, least: float) -> Array:
    """Return a vector with entries from the least one to 2^60, ones if it is left out."""
    given = g.vector(name, n)
    values = np.ones(n) if given is None else given
    need(least <= values.min() and values.max() <= _SCALES, "a step or a scale is out of range")
    return values


@rule(
    "recurrence",
    "weight input bias initial step outer activation reverse length state scaling weight_bound rate push",
)
def _recurrence(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """S12: h+ = h + t (s(W h + V x + b) - h), or Q (h - W^T t s(W h + V x + b)): rate and push of a step, sum of powers."""
    (W, V), (low, high) = (g.tensor(node[key], 2) for key in ("weight", "input")), slopes(g, node["activation"])
    n, rate, push = len(W), number(node["rate"], "the rate"), number(node["push"], "the push")
    need(len(shape) == 2 and W.shape == (n, n) and V.shape == (n, shape[1]), "a recurrence does not fit its input")
    need(0 <= low <= high <= 1, "a recurrence needs slopes in [0, 1]")
    choice(node["length"], (shape[0],), "length")
    choice(node["reverse"], (False, True), "reverse")
    g.vector(node["bias"], n)
    g.vector(node["initial"], n)
    t, d = _vector(g, node["step"], n, 0.0), _vector(g, node["scaling"], n, 1 / _SCALES)
    state, kept, peak = (
        choice(node["state"], ("l2", "linf"), "state"),
        max(abs(1 - Fraction(x)) for x in t.tolist()),
        None,
    )
    if node["outer"] is not None:
        need(state == "l2" and node["scaling"] is None, "a cell with an outer matrix has the Euclidean norm")
        _gradient_cell(g, node, W, V, Fraction(float(t.max())), rate, push)
    elif state == "l2":  # S12.3: D dh+ = ((1 - t) + s (D t W / D)) D dh + s D t V dx
        _rounded(g, (d * t)[:, None] * W / d, rate - kept, "a scaled matrix")
        _into_l2(g, (d * t)[:, None] * V, push * Fraction(float(d.min())))
    else:
        peak = _compared_cell(g, W, V, t, d, kept, rate, push)
    total, endless = push * power_sum(rate, shape[0])[0], push / (1 - rate) if rate < 1 else None
    need(bound >= (total if peak is None else min(peak, total)), "the bound of a recurrence is not proved")
    g.stable[id(node)] = rate, endless if peak is None or endless is None else min(peak, endless)
    return (shape[0], n)


def _gradient_cell(g: Graph, node: Node, W: Array, V: Array, top: Fraction, rate: Fraction, push: Fraction) -> None:
    """S12.5: I - W^T t s W lies between 1 - max t ||W||^2 and 1; the input adds ||Q|| max t ||W|| ||V||."""
    Q, size = g.tensor(node["outer"], 2), number(node["weight_bound"], "weight_bound")
    need(Q.shape == W.shape and rate * top * size > 0, "a cell is malformed")
    _exactly(g, W, size, "the matrix of a cell")
    _exactly(g, Q, rate / max(1, top * size**2 - 1), "the outer matrix of a cell")
    _into_l2(g, V, push / (rate * top * size))


def _compared_cell(
    g: Graph, W: Array, V: Array, t: Array, v: Array, kept: Fraction, rate: Fraction, push: Fraction
) -> Fraction | None:
    """S12.4: in the norm max |h_i| / v_i each row is largest at a slope 0 or 1; return a bound for every length, if there is one.

    If a step keeps |dh| <= v for all |dx| <= 1, so does every sequence: ||v|| bounds the largest output.
    """
    own, grow = W.diagonal(), 1 + 2.0**-51 * (len(W) + V.shape[1] + 16)
    moved = np.abs(1 - t + t * own) + 2.0**-50 * (1 + t + t * np.abs(own))
    sizes = np.abs(V).sum(axis=1) if g.norm == "linf" else np.sqrt(np.square(V).sum(axis=1) + 2.0**-1000)
    rows = (moved * v + t * (np.abs(W - np.diag(own)) * v).sum(axis=1)) * grow + 2.0**-900
    pushes = t * sizes * grow + 2.0**-900
    size = Fraction(float(v.max())) if g.norm == "linf" else root_up(squares(v[None, None]))
    need(rate >= max(kept, largest(rows / v) * (1 + 2 * U)), "the rate of a recurrence is not proved")
    need(push >= size * largest(pushes / v) * (1 + 2 * U), "the push of a recurrence is not proved")
    return size if g.norm != "l2" and kept <= 1 and (rows + pushes <= v * (1 - 2.0**-51)).all() else None


def _modulus(x: Array, y: Array) -> Array:
    """S13.1: |x + iy|, rounded up."""
    return np.sqrt(x * x + y * y) * (1 + 2.0**-50) + 2.0**-500


@rule("statespace", "real imag input output skip bidirectional length states scaling split state_gain")
def _statespace(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """S13: h+ = lambda h + B x, y = C h + D x. Each state filters with a sum of moduli 1/(1 - |lambda|)."""
    real, imag = g.tensor(node["real"], 1), g.tensor(node["imag"], 1)
    B, C = g.tensor(node["input"], 2), g.tensor(node["output"], 2)
    n, D = len(real), None if node["skip"] is None else g.tensor(node["skip"], 2)
    need(len(shape) == 2 and len(imag) == n and B.shape == (2 * n, shape[1]), "a state space does not fit its input")
    need(
        C.shape[1] == 2 * n and (D is None or D.shape == (len(C), shape[1])), "the output of a state space does not fit"
    )
    both = choice(node["bidirectional"], (False, True), "bidirectional")
    need(n % 2 == 0 or not both, "two directions need an even number of states")
    choice(node["length"], (shape[0],), "length")
    choice(node["states"], (n,), "states")
    modulus, theta = _modulus(real, imag), _vector(g, node["scaling"], n, 1 / _SCALES)
    need(modulus.max() < 1, "an eigenvalue is not proved to lie inside the unit circle")
    S = B / np.tile((1 - modulus) * (1 - 2.0**-50), 2)[:, None]
    if g.norm == "linf":  # S13.3
        sums = (_modulus(C[:, :n], C[:, n:]) * _modulus(S[:n], S[n:]).sum(axis=1)).sum(axis=1)
        total = largest(sums + (0 if D is None else np.abs(D).sum(axis=1)))
        need(bound >= total * (1 + gamma(4 * sum(B.shape) + 32)) + TINY, "the bound of a state space is not proved")
    else:
        _joined(g, node, np.tile(theta, 2)[:, None] * S, C / np.tile(theta, 2), D, bound)
    g.stable[id(node)] = largest(modulus), bound
    return (shape[0], len(C))


def _joined(g: Graph, node: Node, S: Array, C: Array, D: Array | None, bound: Fraction) -> None:
    """S13.2: y = [C, D/q] (h, q x), and ||h|| <= gain ||x||: with the norm of S, in token_max its Frobenius norm."""
    gain, q = number(node["state_gain"], "state_gain"), Fraction(0) if D is None else number(node["split"], "split")
    need(gain > 0 and (D is None or q > 0), "a state space is malformed")
    if g.norm == "l2":
        _rounded(g, S, gain, "the states")
    else:
        need(gain >= root_up(squares(S[None])) * (1 + gamma(8)), "the gain of the states is not proved")
    out = C if D is None else np.concatenate([C, D / float(q)], axis=1)
    _rounded(g, out, bound / (root_up(gain**2 + q**2) if q else gain), "the output of a state space")


@rule(
    "attention",
    "query_weight query_bias key_weight key_bias value_weight value_bias output_weight output_bias scales radii causal "
    "key_bounds value_bounds query_bound output_bound",
    "l2 token_max",
)
def _attention(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """S14: heads of softmax attention whose queries, keys and values are clipped to balls."""
    scales, sides = g.tensor(node["scales"], 1), ("query", "key", "value", "output")
    Q, K, V, O = (g.tensor(node[f"{side}_weight"], 2) for side in sides)
    heads, (R_q, R_k, R_v) = len(scales), (number(radius, "a radius") for radius in node["radii"])
    need(shape[1:] and scales.min() >= 0, "attention needs tokens, and scales >= 0")
    tokens, dim = shape[-2:]
    need(Q.shape == K.shape == V.shape == (O.shape[1], dim), "the matrices of attention do not fit")
    need(len(Q) % heads == 0, "the matrices of attention do not part into heads")
    for side, matrix in zip(sides, (Q, K, V, O), strict=True):
        g.vector(node[f"{side}_bias"], len(matrix))
    causal = choice(node["causal"], (False, True), "causal")
    keys, values = ([number(b, "a bound") for b in node[key]] for key in ("key_bounds", "value_bounds"))
    query, output = (number(node[key], key) for key in ("query_bound", "output_bound"))
    need(len(keys) == len(values) == heads, "attention needs a bound for each head")
    for block, limit in zip([*K.reshape(heads, -1, dim), *V.reshape(heads, -1, dim)], keys + values, strict=True):
        _exactly(g, block, limit, "a head")
    _exactly(g, O, output, "the output of attention")
    _rounded(g, np.repeat(scales, len(Q) // heads)[:, None] * Q, query, "the queries")
    total = Fraction(0)
    for s, k, v in zip(map(Fraction, scales.tolist()), keys, values, strict=True):  # S14.1
        kappa = s * R_v * R_q * k
        constant = (v + kappa + root_up(v**2 + kappa**2)) / 2
        total += constant**2 * (weight_sum(s * R_q * R_k, tokens, causal=causal) if g.norm == "l2" else 1)
    need(bound >= output * (root_up(total) + R_v * R_k * query), "the bound of attention is not proved")
    return (*shape[:-1], len(O))


def weight_sum(limit: Fraction, n: int, *, causal: bool) -> Fraction:
    """S14.2: the weights that one token gets from all n: one of m gets at most 1/(1 + (m - 1) exp(-2 limit))."""
    if limit > 32 or n > 2**12:
        return Fraction(n)
    power, term = Fraction(1), Fraction(1)
    for k in range(1, 200):  # exp(2 limit) by its series; the rest is below the last term
        term = up_short(term * 2 * limit / k)
        power += term
    power += term
    return (
        sum((up_short(power / (power + i)) for i in range(n)), Fraction(0)) if causal else n * power / (power + n - 1)
    )


@rule("bounded_norm", "radius")
def _bounded_norm(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """S14.3: x / sqrt(1 + |x|^2/(d r^2)) is the gradient of a convex function, slopes up to 1; rows 1 + sqrt((d - 1)/27)."""
    need(number(node["radius"], "the radius") > 0 and bound >= 1, "the bound is not proved")
    need(g.norm != "linf" or (bound - 1) ** 2 >= Fraction(math.prod(shape[-1:]) - 1, 27), "the bound is not proved")
    return shape
