r"""The bounds that are published for recurrences, and the metric of the state in which they are smallest.

The slack of the factor of one step is only what the proof of the verifier needs: a gain divides by one minus the factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stableopt.certify.publish import composite
from stableopt.certify.publish_numbers import LARGEST_SCALE, Array, input_norm, padded_norm, published_number
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.sequences import power_sum
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_up, spectral_norm
from stableopt.linalg.proved import as_matrix

__all__ = ["publish_recurrence", "state_metric"]

Node: TypeAlias = dict[str, Any]


def _sum_of_powers(a: float, n: int) -> Fraction:
    try:
        return power_sum(Fraction(a), n)[0]
    except RejectedError:
        raise UncertifiableError(
            f"one step of a recurrence has the factor {a:.4g}, so no bound is known for {n} steps."
        ) from None


def state_metric(
    weights: tuple[Tensor, Tensor],
    step: Tensor | None,
    outer: Tensor | None,
    norm: str,
    length: int,
    hint: Tensor | None = None,
) -> tuple[str, Tensor | None]:
    r"""Choose the norm of the state in which a recurrence has the smallest bound.

    Args:
        weights: :math:`W` and :math:`U`.
        step: :math:`\alpha`, or None for ones.
        outer: :math:`Q` of a cell that is a gradient step, or None.
        norm: that of the certificate.
        length: number of steps.
        hint: a diagonal that may be good, or None.

    Returns:
        ``"l2"`` or ``"linf"``, and the diagonal :math:`d`: the norm is :math:`\|d \odot h\|_2` or :math:`\max_i |h_i| / d_i`.

    Raises:
        UncertifiableError: if no bound is known in any of them.

    Examples:
        >>> W, U = 0.5 * torch.eye(2), torch.eye(2)
        >>> state_metric((W, U), None, None, "l2", 10)
        ('l2', None)
    """
    if outer is not None:
        return "l2", None
    W, U = (as_matrix(matrix) for matrix in weights)
    t = np.ones(len(W)) if step is None else as_matrix(step, 1)
    best, chosen = math.inf, ("", None)
    for state, d in _metrics(W, U, t, norm, hint):
        try:
            bound = _recurrence_numbers(W, U, t, d, state, norm, length)["bound"]
        except UncertifiableError:
            continue
        if bound < best * (1.0 - 1e-9):
            best, chosen = bound, (state, None if (d == 1.0).all() else torch.tensor(d))
    if not chosen[0]:
        raise UncertifiableError(
            f"no {norm} bound is known for {length} steps of this recurrence, whose steps do not contract."
        )
    return chosen


def _metrics(W: Array, U: Array, t: Array, norm: str, hint: Tensor | None) -> Iterator[tuple[str, Array]]:
    ones = np.ones(len(W))
    yield "l2", ones
    if hint is not None:
        yield "l2", as_matrix(hint, 1)
    yield from (("l2", d) for d in _perron_scalings(t[:, None] * np.abs(W)))
    yield "linf", ones
    pushes = _compared(W, U, t, ones, norm)[1]
    M = t[:, None] * np.abs(W)
    M[range(len(W)), range(len(W))] = np.abs(1.0 - t + t * W.diagonal())
    with np.errstate(all="ignore"):
        try:
            v = np.linalg.solve(np.eye(len(W)) - M, pushes + 1e-9 * pushes.max() + 1e-15)
        except np.linalg.LinAlgError:
            return
    v = v * (1.0 + 1e-10)
    if np.isfinite(v).all() and v.min() >= 1.0 / LARGEST_SCALE and v.max() <= LARGEST_SCALE:
        yield "linf", v


def _perron_scalings(M: Array) -> Iterator[Array]:
    r"""Yield diagonals for which :math:`\|DMD^{-1}\|_2` is small: at the growth of M they make it as small as it can be."""
    ones = np.ones(len(M))
    for rate in (1.0, 0.95, 0.75, 0.5):
        with np.errstate(all="ignore"):
            try:
                right, left = (np.linalg.solve(np.eye(len(M)) - part / rate, ones) for part in (M, M.T))
            except np.linalg.LinAlgError:
                continue
            d = np.sqrt(left / right)
            d = d / d.max()
        if min(right.min(), left.min()) > 0.0 and np.isfinite(d).all() and d.min() >= 1.0 / LARGEST_SCALE:
            yield d


def _compared(W: Array, U: Array, t: Array, v: Array, norm: str) -> tuple[Array, Array]:
    """What a step gives each unit from the state and from the input, rounded up, as in the verifier."""
    own, grow = W.diagonal(), 1.0 + 2.0**-50 * (len(W) + U.shape[1] + 16)
    moved = np.abs(1.0 - t + t * own) + 2.0**-49 * (1.0 + t + t * np.abs(own))
    sizes = np.abs(U).sum(1) if norm == "linf" else np.sqrt(np.square(U).sum(1) + 2.0**-990)
    rows = moved * v + t * (np.abs(W - np.diag(own)) @ v)
    return rows * grow + 2.0**-890, t * sizes * grow + 2.0**-890


def _recurrence_numbers(W: Array, U: Array, t: Array, d: Array, state: str, norm: str, length: int) -> dict[str, float]:
    kept, peak = max(abs(1 - Fraction(x)) for x in t.tolist()), None
    if state == "l2":
        with np.errstate(all="ignore"):
            matrix, pushed = (d * t)[:, None] * W / d, (d * t)[:, None] * U
        rate = round_up(kept + Fraction(padded_norm(matrix)))
        push = published_number(Fraction(input_norm(pushed, norm)) / Fraction(float(d.min())))
    else:
        rows, pushes = _compared(W, U, t, d, norm)
        if not (np.isfinite(rows).all() and np.isfinite(pushes).all()):
            raise UncertifiableError("a weight is too large for float64.")
        size = d.max() if norm == "linf" else spectral_norm(d[None]).upper
        rate = max(round_up(kept), float((rows / d).max()) * (1.0 + 2.0**-50))
        push = published_number(Fraction(float(size)) * Fraction(float((pushes / d).max())))
        if norm != "l2" and kept <= 1 and (rows + pushes <= d * (1.0 - 2.0**-49)).all():
            peak = published_number(float(size))
    total = round_up(Fraction(push) * _sum_of_powers(rate, length)) if math.isfinite(rate) else math.inf
    bound = total if peak is None else min(total, peak)
    if not math.isfinite(bound):
        raise UncertifiableError("the bound of a recurrence is too large for float64.")
    return {"rate": rate, "push": push, "bound": bound}


def publish_recurrence(node: Node, tensors: Mapping[str, Tensor], norm: str) -> Node:
    r"""Return a recurrence with the factor of a step, what an input adds, and the bound of the whole sequence.

    Args:
        node: the operation without them.
        tensors: the tensors that it names.
        norm: that of the certificate.

    Raises:
        UncertifiableError: if there is no bound.

    Examples:
        >>> node = {"op": "recurrence", "weight": "W", "input": "U", "step": None, "outer": None, "length": 3}
        >>> node |= {"state": "l2", "scaling": None}
        >>> done = publish_recurrence(node, {"W": 0.5 * torch.eye(2), "U": torch.eye(2)}, "l2")
        >>> round(done["rate"], 9), round(done["bound"], 6)
        (0.5, 1.75)
    """
    W, U = as_matrix(tensors[node["weight"]]), as_matrix(tensors[node["input"]])
    t, d = (np.ones(len(W)) if node[key] is None else as_matrix(tensors[node[key]], 1) for key in ("step", "scaling"))
    if node["outer"] is None:
        return node | {"weight_bound": None} | _recurrence_numbers(W, U, t, d, node["state"], norm, node["length"])
    size, top = padded_norm(W), Fraction(float(t.max()))
    steep = max(Fraction(1), top * Fraction(size) ** 2 - 1)
    rate = round_up(Fraction(padded_norm(as_matrix(tensors[node["outer"]]))) * steep)
    push = published_number(Fraction(rate) * top * Fraction(size) * Fraction(input_norm(U, norm)))
    bound = round_up(Fraction(push) * _sum_of_powers(rate, node["length"]))
    return node | {"weight_bound": size, "rate": rate, "push": push, "bound": bound}


@composite("recurrence")
def _(node: Node, tensors: Mapping[str, Tensor], _shapes: list[tuple[int, ...]], norm: str) -> Node:
    return publish_recurrence(node, tensors, norm)
