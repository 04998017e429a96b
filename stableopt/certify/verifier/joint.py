"""Joint bounds of chains of dense layers, sharper than the product of their norms (docs/soundness.md, S7.5)."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np

from .activations import slopes
from .files import ints, number
from .numbers import TINY, Array, U, defect, float_up, gamma, need, norm_at_most, root_up, squares
from .program import Walk

__all__ = ["read_joint"]


def read_joint(walk: Walk, entry: Any) -> None:
    """Check an entry of the list of joint bounds and keep its bound for the last operation of the chain."""
    need(isinstance(entry, dict) and set(entry) == {"nodes", "multipliers", "bound"}, "a joint bound has wrong keys")
    nodes, bound = ints(entry["nodes"], 0, "the nodes of a joint bound"), number(entry["bound"], "a joint bound")
    need(
        len(nodes) >= 2 and max(nodes) < len(walk.nodes) and max(nodes) not in walk.joint,
        "a joint bound names wrong operations",
    )
    need(
        walk.g.norm != "linf" and not walk.g.exact,
        "a joint bound is for l2 and token_max, and has no proof in integers",
    )
    for before, after in itertools.pairwise(nodes):
        need(walk.nodes[after]["in"] == [before + 1], "the operations of a joint bound do not follow each other")
    chain = [walk.nodes[index] for index in nodes]
    dense = chain if len(chain) == 2 else chain[::2]
    need(
        all(node["op"] == "linear" for node in dense) and len(chain) != 4,
        "a joint bound alternates dense layers and activations",
    )
    matrices = [
        walk.g.tensors[node["weight"]].T if node["transposed"] else walk.g.tensors[node["weight"]] for node in dense
    ]
    matrices = [np.ascontiguousarray(matrix) for matrix in matrices]
    given = entry["multipliers"]
    if len(chain) == 2:
        need(given == [], "two dense layers have no multipliers")
        product = matrices[1] @ matrices[0]
        error = (
            gamma(len(matrices[0])) * root_up(squares(matrices[0][None])) * root_up(squares(matrices[1][None])) + TINY
        )
        proved, gram = norm_at_most(product[None], bound - error), None
    else:
        need(
            len(chain) % 2 == 1 and isinstance(given, list) and len(given) == len(chain) // 2,
            "a joint bound has wrong multipliers",
        )
        for node in chain[1::2]:
            low, high = slopes(walk.g, node)
            need(0 <= low <= high <= 1, "a joint bound needs activations with slopes in [0, 1]")
        multipliers = [np.array([float(number(value, "a multiplier")) for value in row]) for row in given]
        sizes = [len(matrix) for matrix in matrices[:-1]]
        need(
            [len(row) for row in multipliers] == sizes and all((row > 0).all() for row in multipliers),
            "wrong multipliers",
        )
        gram = _chain(matrices, multipliers, bound)
        proved = gram is not None
    need(proved, f"the joint bound {float(bound)!r} is not proved")
    walk.joint[max(nodes)] = (min(nodes), bound, gram)


def _chain(matrices: list[Array], multipliers: list[Array], bound: Fraction) -> Array | None:
    """Check [[X, -B], [-B^T, T - Y]] >= 0 with B = A^T T/2 for each layer, [[X, W^T], [W, G]] >= 0 and G <= bound^2; return G.

    The forms are the choice of the proof (here what the first inequality leaves, a little smaller) and are not trusted.
    """
    form = np.eye(matrices[0].shape[1])
    for matrix, multiplier in zip(matrices[:-1], multipliers, strict=True):
        cross = matrix.T * (multiplier / 2)
        inner = np.linalg.solve(form, cross)
        following = (1 - 2.0**-20) * (np.diag(multiplier) - cross.T @ inner)
        following = (following + following.T) / 2
        corner = np.diag(multiplier) - following
        error = U * (root_up(squares(cross[None])) * 2 + Fraction(float(np.abs(corner.diagonal()).max()))) + TINY
        if not _semidefinite(np.block([[form, -cross], [-cross.T, corner]]), error):
            return None
        form = following
    last = matrices[-1]
    gram = (1 + 2.0**-20) * (last @ np.linalg.solve(form, last.T))
    gram = (gram + gram.T) / 2 + 2.0**-20 * np.trace(gram) / len(gram) * np.eye(len(gram))  # it may be singular
    if not _semidefinite(np.block([[form, last.T], [last, gram]]), Fraction(0)):
        return None
    square = float_up(-(bound**2))  # -bound^2, rounded up: towards zero
    room = -gram
    room[range(len(gram)), range(len(gram))] -= square
    rounding = U * Fraction(float(np.abs(room.diagonal()).max())) + TINY
    return gram if _semidefinite(room, rounding) else None


def _semidefinite(matrix: Array, error: Fraction) -> bool:
    """Return True only if every symmetric matrix within the error of the given one is proved to be positive semidefinite.

    It is scaled to a unit diagonal by powers of two D, exactly; that multiplies the error by at most the largest of D^2.
    """
    diagonal = matrix.diagonal()
    if not np.isfinite(matrix).all() or (diagonal <= 0).any():
        return False
    powers = np.round(-np.log2(diagonal) / 2).astype(int)
    scaled = np.ldexp(matrix, powers[:, None] + powers[None, :])
    error = error * Fraction(4) ** int(powers.max()) + TINY
    shift = float(error) * (1 + 2.0**-40) + len(matrix) * (64 + 4 * len(matrix)) * 2.0**-53 * float(
        scaled.diagonal().max()
    )
    return Fraction(shift) >= error + defect(scaled[None], -shift)
