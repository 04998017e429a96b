"""The rules of blocks: one theorem for a whole residual step (docs/soundness.md, S9)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from .activations import slopes
from .files import choice, ints, number
from .numbers import TINY, Array, U, float_up, gamma, largest, need, norm_at_most, power_up, root_up, squares, up_short
from .operations import RULES, Graph, Node, Shape, rule

__all__ = [
    "euler_factor", "infinity_factor", "infinity_parts", "infinity_sums", "iterated", "row_factor", "sandwich_matrix",
    "scaled_rows", "semidefinite", "shear_excess", "shear_sums",
]  # fmt: skip


def _times(node: Node) -> int:
    need(type(node["times"]) is int and 1 <= node["times"] <= 10_000, "'times' must be an integer from 1 to 10000")
    return node["times"]


def _nested(g: Graph, node: Any, shape: Shape, ops: tuple[str, ...]) -> tuple[Shape, Fraction]:
    """Check a block inside another one; return its shape and its bound."""
    op = choice(node["op"] if isinstance(node, dict) else None, ops, "a nested operation")
    keys, check, norms = RULES[op]
    need(set(node) == (keys or set[str]()) | {"op", "bound"} and g.norm in norms, f"the nested {op} is malformed")
    bound = number(node["bound"], "a nested bound")
    return check(g, node, shape, bound), bound


def _unit_slopes(g: Graph, node: Any) -> None:
    low, high = slopes(g, node)
    need(low >= 0 and high <= 1, "a block needs an activation with slopes in [0, 1]")


def _adjoint(g: Graph, node: Any, steps: Any, shape: Shape) -> tuple[Array, Array | None, Fraction]:
    """Check an operator whose transpose with the same settings is its adjoint (S9.3); return A, steps, U >= ||steps^(1/2) A||_2."""
    plain = node["transposed"] is False and set(node.get("stride", [1])) == {1}
    need(plain, "the operator of a block is plain, with stride 1")
    weight = g.tensor(node["weight"], 2 if node["op"] == "linear" else node["dims"] + 2)
    units, scaled, error, bound = None, None, Fraction(0), None
    if steps is not None:
        units = g.tensor(steps, 1)
        need(len(units) == len(weight) and (units >= 0).all(), "steps are >= 0, one for each hidden unit")
        scaled, error = scaled_rows(weight, units, exact=g.exact)
    if g.norm != "linf":
        bound = number(node["bound"], "a nested bound")
    hidden = g.operator(node, shape, None if bound is None else bound - error, scaled)
    need(node.get("padding_mode") != "circular" or hidden[1:] == shape[1:], "circular padding must keep the size")
    return weight, units, bound or Fraction(0)


def scaled_rows(weight: Array, steps: Array, *, exact: bool = False) -> tuple[Array, Fraction]:
    """Return R A with R >= steps^(1/2), rounded once, and a bound of the norm of that rounding, by u |R A| or exactly (S9.2)."""
    root: Array = np.nextafter(np.sqrt(steps), np.inf).reshape(-1, *[1] * (weight.ndim - 1))
    scaled, taps = (
        root * weight,
        math.prod(weight.shape[2:]),
    )  # the norm of a kernel: at most sqrt(taps) times its 2-norm
    if not exact:
        return scaled, U * root_up(squares(scaled[None]) * taps) + TINY
    need((fractions(root.ravel()) ** 2 >= fractions(steps)).all() and np.isfinite(scaled).all(), "a root is too small")
    return scaled, root_up(((fractions(scaled) - fractions(root) * fractions(weight)) ** 2).sum() * taps)


def fractions(values: Array) -> Any:
    """Return the entries as fractions, in an array with which numpy then computes exactly."""
    return np.frompyfunc(Fraction, 1, 1)(values)


def euler_factor(step: Fraction, norm: Fraction, decay: Fraction, skew: Fraction | None, free: Fraction) -> Fraction:
    """S9.1: c I + K - step A^T D A + free: a normal part (c - a/2) I + K, the rest within a/2, a = step ||A||^2."""
    a = step * norm**2
    ends = max(abs(decay), abs(decay - a)) if skew is None else root_up((decay - a / 2) ** 2 + skew**2) + a / 2
    return up_short(ends + free)


@rule("euler", "operator steps step decay skew skew_bound free activation times")
def _euler(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check c x + K x - step A^T(steps s(A x + b)) + scale B s(C x + d), `times` times (S9.1, in linf S9.10)."""
    _unit_slopes(g, node["activation"])
    decay, step, operator = number(node["decay"], "decay", signed=True), number(node["step"], "step"), node["operator"]
    skew = free = Fraction(0)
    if node["skew"] is not None:
        K, skew = g.tensor(node["skew"], 2), number(node["skew_bound"], "skew_bound")
        need(operator["op"] == "linear" and K.shape == (shape[-1],) * 2, "the skew matrix does not fit")
        need((K == -K.T).all(), "the skew matrix is not antisymmetric")
        g.matrix(K[None], skew)
    need(node["skew"] is not None or node["skew_bound"] is None, "there is a bound of a skew part that is not there")
    if node["free"] is not None:
        free = _free(g, node["free"], shape)
    weight, steps, norm = _adjoint(g, operator, node["steps"], shape)
    if g.norm == "linf":
        factor = row_factor(weight, operator.get("groups", 1), steps, step, decay, exact=g.exact) + skew + free
    else:
        factor = euler_factor(step, norm, decay, None if node["skew"] is None else skew, free)
    need(bound >= power_up(factor, _times(node)), "the bound of the block is not proved")
    return shape


def row_factor(
    weight: Array, groups: int, steps: Array | None, step: Fraction, decay: Fraction, *, exact: bool = False
) -> Fraction:
    """S9.10: bound the rows of c I - step A^T S D A: with n_k = sum_j |A_kj|, |c - p| is c - p or p - c, linear in the slopes D."""
    A: Any = np.abs(weight).reshape(groups, len(weight) // groups, weight.shape[1], -1)
    units: Any = np.ones(len(weight)) if steps is None else steps
    A, units = (fractions(A), fractions(units)) if exact else (A, units)
    growth = Fraction(0) if exact else gamma(4 * (A[0].size + 16))
    sums = A.sum(axis=(2, 3), keepdims=True) * (1 if exact else float_up(1 + growth))  # at least n_k
    scaled = A * units.reshape(groups, -1, 1, 1)
    grown, spread = ((scaled * v).sum(axis=(1, 3)).max() for v in (np.maximum(sums - 2 * A, 0), sums))
    tiny = 0 if exact else TINY * (1 + largest(sums))  # what underflows in ``scaled``, times n_k
    most, whole = ((_finite(v) * (1 + growth) + tiny) * step for v in (grown, spread))
    return up_short(max(decay + most, whole - decay))


def _finite(value: Any) -> Fraction:
    need(isinstance(value, Fraction) or math.isfinite(value), "the arithmetic of a proof overflowed")
    return Fraction(value)


def _free(g: Graph, node: Node, shape: Shape) -> Fraction:
    """Return |scale| ||B|| ||C|| of the free part scale B s(C x + d) (S9.1)."""
    need(set(node) == {"inner", "outer", "scale"} and node["outer"]["bias"] is None, "the free part has wrong keys")
    inner, outer = (number(node[key]["bound"], "a nested bound") for key in ("inner", "outer"))
    output = g.operator(node["outer"], g.operator(node["inner"], shape, inner), outer)
    need(output == shape and node["inner"]["op"] == node["outer"]["op"] == "linear", "the free part changes the shape")
    return abs(number(node["scale"], "scale", signed=True)) * inner * outer


def infinity_sums(kernel: Array, steps: Array, decay: Fraction, *, exact: bool = False) -> tuple[Fraction, Fraction]:
    """S9.4: the largest absolute sums of a row and of a column of 1 - t c + t D A: convex in each slope, so at slope 0 or 1."""
    n, taps = len(kernel), np.abs(kernel).reshape(*kernel.shape[:2], -1)
    own = fractions(kernel.reshape(taps.shape)[range(n), range(n), taps.shape[2] // 2])
    taps[range(n), range(n), taps.shape[2] // 2] = 0.0
    weighted, units = (fractions(taps).sum(axis=2), fractions(steps)) if exact else (taps.sum(axis=2), steps)
    grown, tiny = (1, 0) if exact else (1 + gamma(2 * taps[0].size + 2 * n + 4), TINY)
    rows, columns = (fractions(v) * grown + tiny for v in (weighted.sum(axis=1), units @ weighted))
    moves = fractions(steps)
    idle, moved = abs(1 - moves * decay), abs(1 - moves * decay + moves * own)
    return up_short(max(np.maximum(idle, moved + moves * rows))), up_short(max(np.maximum(idle, moved) + columns))


def infinity_factor(norm: str, sums: tuple[Fraction, Fraction], parts: Fraction | None) -> Fraction:
    """S9.4: in linf the sums of rows; in l2 the root of both sums, or the bound of the parts."""
    product = sums[0] if norm == "linf" else up_short(root_up(sums[0] * sums[1]))
    return product if parts is None else min(product, up_short(parts))


def infinity_parts(steps: Array, decay: Fraction, norm: Fraction) -> Fraction:
    """S9.4: max |1 - t c| + max t ||A||."""
    least, most = Fraction(float(steps.min())), Fraction(float(steps.max()))
    return max(abs(1 - least * decay), abs(1 - most * decay)) + most * norm


@rule("infinity", "operator steps decay activation times")
def _infinity(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check x_i + t_i (s(A x + b)_i - c x_i), `times` times (S9.4)."""
    _unit_slopes(g, node["activation"])
    operator, decay, norm = node["operator"], number(node["decay"], "decay"), None
    if "bound" in operator:
        norm = number(operator["bound"], "a nested bound")
    need(g.operator(operator, shape, norm) == shape, "the operator changes the shape")
    plain = {1}.union(*(operator.get(key, []) for key in ("stride", "dilation")))
    need(plain == {operator.get("groups", 1)} and operator["transposed"] is False, "the operator of a block is plain")
    weight, steps = g.tensors[operator["weight"]], g.tensor(node["steps"], 1)
    need(all(k % 2 for k in weight.shape[2:]), "the kernel of a block has a middle")
    need(len(steps) == len(weight) and (steps >= 0).all(), "steps are >= 0, one for each unit")
    parts = None if norm is None else infinity_parts(steps, decay, norm)
    factor = infinity_factor(g.norm, infinity_sums(weight, steps, decay, exact=g.exact), parts)
    need(bound >= power_up(factor, _times(node)), "the bound of the block is not proved")
    return shape


def shear_excess(u1: Fraction, u2: Fraction) -> Fraction:
    """S9.5: bound L - 1/L for the largest norm L of two opposite shears within u1, u2, concave in cos^2."""
    a, total, gap = u1 * u2, (u1 + u2) ** 2, (u1 - u2) ** 2
    falls, rises = a * (4 - a), a * a
    best = Fraction(a > 0) if falls <= 0 else (rises**2 * total - falls**2 * gap) / (4 * a * falls * rises)
    best = min(max(best, Fraction(0)), Fraction(1))
    return (root_up(total - best * falls) + root_up(gap + best * rises)) / 2


def shear_sums(first: Fraction, second: Fraction) -> Fraction:
    """S9.5 in linf: |p| <= 1 + ||S_1||, then |q| <= 1 + ||S_2|| (1 + ||S_1||)."""
    return max(1 + first, 1 + second * (1 + first))


@rule("shear", "half first second steps decay activation")
def _shear(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check p -= h1 A^T s(A q + b), q += h2 B^T s(B p + c), both times e: two opposite shears (S9.5)."""
    _unit_slopes(g, node["activation"])
    half, sizes, decay = ints([node["half"]], 1, "half")[0], [], number(node["decay"], "decay")
    need(shape[-1] == 2 * half and len(node["steps"]) == 2, "shears need two halves and two steps")
    for operator, step in zip((node["first"], node["second"]), node["steps"], strict=True):
        need(operator["op"] == "linear", "shears need linear operators")
        weight, _, norm = _adjoint(g, operator, None, (*shape[:-1], half))
        size = number(step, "a step")
        sizes.append(
            row_factor(weight, 1, None, size, Fraction(0), exact=g.exact) if g.norm == "linf" else size * norm**2
        )
    if g.norm == "linf":
        need(bound >= shear_sums(*sizes) * decay, "the bound of the shears is not proved")
        return shape
    growth = bound / decay if decay else Fraction(2) ** 2000
    need(growth >= 1 and growth - 1 / growth >= shear_excess(*sizes), "the bound of the shears is not proved")
    return shape


@rule("runge_kutta", "euler weights stages times", "l2 token_max")
def _runge_kutta(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check g_i = E(Y_i) - Y_i, Y_i = x + sum_j a_ij g_j, x + sum_i b_i g_i for a nonexpansive E (S9.6)."""
    b, rows = [number(v, "a weight") for v in node["weights"]], node["stages"]
    s = len(b)
    need(_times(node) and 1 <= s <= 32 and [len(row) for row in rows] == list(range(s)), "the tableau is malformed")
    a = [[number(v, "a stage", signed=True) for v in row] + [Fraction(0)] * (s - len(row)) for row in rows]
    Q = [[b[i] * a[i][j] + a[j][i] * b[j] - b[i] * b[j] + (b[i] if i == j else 0) for j in range(s)] for i in range(s)]
    need(semidefinite(Q), "the step is too long for the method")
    new, factor = _nested(g, node["euler"], shape, ("euler",))
    need(new == shape and factor <= 1 <= bound, "the Euler step of the method expands")
    return shape


def semidefinite(rows: list[list[Fraction]]) -> bool:
    """Decide by exact symmetric elimination."""
    for k, row in enumerate(rows):
        if row[k] < 0 or (row[k] == 0 and any(row[k:])):
            return False
        for i in range(k + 1, len(rows)) if row[k] else ():
            ratio = rows[i][k] / row[k]
            rows[i] = [x - ratio * y for x, y in zip(rows[i], row, strict=True)]
    return True


@rule("implicit", "map keep mix start resolvent resolvent_bound times", "l2 linf token_max")
def _implicit(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check y_0 = start x, y_k+1 = R(keep E(y_k) + mix x), `times` times: c_k+1 = ||R|| (|keep| F c_k + |mix|) (S9.7)."""
    new, factor = _nested(g, node["map"], shape, ("euler", "infinity"))
    rho = Fraction(1) if node["resolvent"] is None else number(node["resolvent_bound"], "resolvent_bound")
    if node["resolvent"] is not None:
        R = g.tensor(node["resolvent"], 2)
        need(R.shape == (shape[-1],) * 2, "the resolvent does not fit")
        g.matrix(R[None], rho)
    need(node["resolvent"] is not None or node["resolvent_bound"] is None, "there is a bound of no resolvent")
    start, keep, mix = (abs(number(node[key], key, signed=True)) for key in ("start", "keep", "mix"))
    need(
        new == shape and bound >= iterated(start, keep * factor, mix, rho, _times(node)),
        "the bound of the iterates is not proved",
    )
    return shape


def iterated(size: Fraction, factor: Fraction, mix: Fraction, rho: Fraction, times: int) -> Fraction:
    """S9.7: the constants of the iterates, c_k+1 = rho (factor c_k + mix)."""
    for _ in range(times):
        size = up_short(rho * (factor * size + mix))
        need(size < 2**1100, "the bound of the iterates is too large for float64")
    return size


@rule("sandwich", "first second scales activation", "l2 token_max")
def _sandwich(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check B s(A x + b) + d: at most ||[B^T / psi, psi A]||^2 / 2 for every psi > 0 (S9.8)."""
    _unit_slopes(g, node["activation"])
    first, second = node["first"], node["second"]
    plain = all(
        part["op"] == "linear" and part["transposed"] is False and "bound" not in part for part in (first, second)
    )
    need(plain, "a sandwich has two plain linear parts without bounds")
    shape = g.operator(second, g.operator(first, shape, None), None)
    A, B, scales = g.tensors[first["weight"]], g.tensors[second["weight"]], g.tensor(node["scales"], 1)
    need(scales.shape == (len(A),) and (scales > 0).all(), "the scales of a sandwich are > 0, one for each hidden unit")
    both, error = sandwich_matrix(A, B, scales, exact=g.exact)
    limit = bound * 2 / root_up(2 * bound) - error  # below the root of 2 L
    need(norm_at_most(both[None], limit, exact=g.exact), "the bound of the sandwich is not proved")
    return shape


def sandwich_matrix(A: Array, B: Array, scales: Array, *, exact: bool = False) -> tuple[Array, Fraction]:
    """Return [B^T / psi, psi A], each entry rounded once, and a bound of the norm of that rounding (S9.8)."""
    both = np.concatenate([B.T / scales[:, None], scales[:, None] * A], axis=1)
    if not exact:
        return both, U * root_up(squares(both[None])) + TINY
    psi = fractions(scales)[:, None]
    need(np.isfinite(both).all(), "the arithmetic of a proof overflowed")
    return both, root_up(
        ((fractions(both) - np.concatenate([fractions(B.T) / psi, psi * fractions(A)], axis=1)) ** 2).sum()
    )


@rule("euclidean", "norm map", "linf")
def _euclidean(g: Graph, node: Node, shape: Shape, bound: Fraction) -> Shape:
    """Check an operation by its bound in l2, or in the 2-norm of each token, times the root of the number of entries (S9.9)."""
    inner = Graph(g.tensors, choice(node["norm"], ("l2", "token_max"), "the norm of a euclidean bound"), g.exact)
    new, factor = _nested(inner, node["map"], shape, ("euler", "shear", "runge_kutta", "implicit"))
    g.used |= inner.used
    size = shape[-1] if inner.norm == "token_max" else math.prod(shape)
    need(new == shape and bound**2 >= factor**2 * size, "the bound is not proved")
    return shape
