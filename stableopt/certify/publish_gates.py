r"""The bounds that are published for GRU and LSTM layers, and the scales of their states in which a step contracts best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stableopt.certify.publish import composite
from stableopt.certify.publish_numbers import LARGEST_SCALE, Array, padded_norm, published_number
from stableopt.certify.verifier.gate_steps import Step
from stableopt.certify.verifier.gates import LONGEST, size_of
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.sequences import power_sum
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_up
from stableopt.linalg.proved import as_matrix

__all__ = ["gated_reach", "gated_scaling", "publish_gated"]

Node: TypeAlias = dict[str, Any]


def gated_scaling(settings: Mapping[str, Any], norm: str) -> Tensor | None:
    r"""Choose the weights w of the norm :math:`\max_i |h_i| / w_i` of the states with the smallest gain.

    Args:
        settings: those of the operation ``gated``, with its tensors.
        norm: that of the certificate.

    Returns:
        The weights of all states, of an LSTM the memory first; None for ones.

    Examples:
        >>> settings = {"kind": "gru", "bias": None, "hidden_bias": None, "projection": None, "limit": 1.0, "length": 3}
        >>> settings |= {"weight": torch.zeros(3, 1), "input": torch.ones(3, 1)}
        >>> gated_scaling(settings, "linf")
        tensor([1.], dtype=torch.float64)
    """
    step = _step(settings)
    best, chosen = (math.inf, math.inf), np.ones(step.states)
    with np.errstate(all="ignore"):
        for w in _scales(step, norm):
            rate, push = _numbers(step, w, norm)
            key = push / (1.0 - rate) if rate < 1.0 and step.endless else math.inf, rate
            if key < best:
                best, chosen = key, w
    return torch.tensor(chosen)


def gated_reach(settings: Mapping[str, Any]) -> float:
    """Bound the moduli of all outputs of a GRU or an LSTM that starts from zeros.

    Args:
        settings: those of the operation ``gated``, with its tensors.

    Examples:
        >>> settings = {"kind": "gru", "bias": None, "hidden_bias": None, "projection": None, "limit": 1.0, "length": 3}
        >>> settings |= {"weight": torch.zeros(3, 1), "input": torch.ones(3, 1)}
        >>> round(gated_reach(settings), 6) == round(math.tanh(1.0), 6)
        True
    """
    return float(_step(settings).reach.max())


def _step(settings: Mapping[str, Any]) -> Step:
    W, V = as_matrix(settings["weight"]), as_matrix(settings["input"])
    biases = [
        np.zeros(len(W)) if settings[key] is None else as_matrix(settings[key], 1) for key in ("bias", "hidden_bias")
    ]
    R = None if settings["projection"] is None else as_matrix(settings["projection"])
    if max(np.abs(M).max() for M in (W, V, *biases, *([] if R is None else [R]))) > LARGEST_SCALE:
        raise UncertifiableError("a weight of a gate is above 2^60, too large for a proof.")
    limit = math.inf if settings["limit"] is None else settings["limit"]
    with np.errstate(all="ignore"):
        return Step(settings["kind"], W, V, np.stack(biases), R, limit, settings["length"])


def _scales(step: Step, norm: str) -> Iterator[Array]:
    """Yield weights between those that a step shrinks fastest and those that it makes under constant inputs."""
    yield np.ones(step.states)
    zero, pushed = np.zeros((step.states, 1)), step.pushes(norm)
    drive = step.grown(zero, pushed)
    drive = drive / drive.max() + 1e-6
    for part in (1e-6, 0.01, 0.1, 1.0):  # w = T(w, 0) + part * drive, up to a factor
        w = np.ones((step.states, 1))
        for _ in range(60):
            w = step.grown(w, step.still) / w.max() + part * drive
        if np.isfinite(w).all():
            yield np.clip(w[:, 0] / w.max(), 1.0 / LARGEST_SCALE, 1.0)
    w = step.peak(norm, 200)[0]
    if np.isfinite(w).all():
        yield np.clip(w / w.max(), 1.0 / LARGEST_SCALE, 1.0)


def _numbers(step: Step, w: Array, norm: str) -> tuple[float, float]:
    """Return the rate and the push of a step, with a little room."""
    kept = step.grown(w[:, None], step.still)[:, 0]
    pushed = step.grown(np.zeros((step.states, 1)), step.pushes(norm))[:, 0]
    rate, push = float((kept / w).max()), float((pushed / w).max())
    if not (math.isfinite(rate) and math.isfinite(push)):
        return math.inf, math.inf
    return rate * (1.0 + 2.0**-36), published_number(size_of(w[-len(step.reach) :], norm) * Fraction(push))


def publish_gated(node: Node, tensors: Mapping[str, Tensor], norm: str) -> Node:
    """Return a GRU or an LSTM with the numbers of a step and its bound.

    Args:
        node: the operation without them.
        tensors: the tensors that it names.
        norm: that of the certificate.

    Raises:
        UncertifiableError: if the bound is too large for float64.

    Examples:
        >>> node = {"kind": "lstm", "bias": None, "hidden_bias": None, "projection": None, "limit": 1.0, "length": 2}
        >>> node |= {"weight": "W", "input": "V", "scaling": None}
        >>> done = publish_gated(node, {"W": torch.zeros(4, 1), "V": torch.zeros(4, 1)}, "linf")
        >>> done["bound"] < 1e-9, round(done["rate"], 9)  # no input can reach the memory
        (True, 0.5)
    """
    named = ("weight", "input", "bias", "hidden_bias", "projection", "scaling")
    step = _step(node | {key: tensors[node[key]] for key in named[:5] if node[key] is not None})
    w, length = (
        np.ones(step.states) if node["scaling"] is None else as_matrix(tensors[node["scaling"]], 1),
        node["length"],
    )
    with np.errstate(all="ignore"):
        rate, push = _numbers(step, w, norm)
        found = [_summed(rate, push, length)]
        if norm == "l2":
            G = step.sums(length)
            found += [padded_norm(G)] if np.isfinite(G).all() else []
        elif length <= LONGEST and np.isfinite(peak := step.peak(norm, length)[0]).all():
            found.append(published_number(size_of(peak[-len(step.reach) :], norm)))
    if not math.isfinite(min(found)) or not math.isfinite(rate):
        raise UncertifiableError(
            f"the bound of {length} steps of its gates is too large for float64. Call stableopt.nn.contracting(module, rate, "
            "input_bound=u), which keeps its weights within limits, or certify a shorter sequence."
        )
    return node | {"rate": rate, "push": push, "bound": min(found)}


def _summed(rate: float, push: float, length: int) -> float:
    try:
        return round_up(Fraction(push) * power_sum(Fraction(rate), length)[0]) if math.isfinite(rate) else math.inf
    except RejectedError:
        return math.inf


@composite("gated")
def _(node: Node, tensors: Mapping[str, Tensor], _shapes: list[tuple[int, ...]], norm: str) -> Node:
    return publish_gated(node, tensors, norm)
