r"""The bounds that are published for state spaces, attention and the normalization of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stableopt.certify.publish import composite
from stableopt.certify.publish_numbers import LARGEST_SCALE, SLACK, Array, padded_norm, published_number
from stableopt.certify.verifier.numbers import root_up
from stableopt.certify.verifier.sequences import weight_sum
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_up, spectral_norm
from stableopt.linalg.proved import as_matrix

__all__ = ["publish_attention", "publish_statespace", "state_scaling"]

Node: TypeAlias = dict[str, Any]


def state_scaling(system: Mapping[str, Tensor | None], norm: str, hint: float) -> tuple[Tensor | None, float | None]:
    r"""Choose the scales of the states and the weight q of the direct path that make the bound of a state space small.

    Args:
        system: its tensors ``real``, ``imag``, ``input``, ``output`` and ``skip``.
        norm: that of the certificate.
        hint: a weight q that may be good.

    Returns:
        The scales, None for ones, and q, None without a direct path.

    Raises:
        UncertifiableError: if an eigenvalue is not proved to lie inside the unit circle.

    Examples:
        >>> half, zero = torch.full((1,), 0.5), torch.zeros(1)
        >>> system = {"real": half, "imag": zero, "input": torch.ones(2, 1), "output": torch.ones(1, 2), "skip": None}
        >>> state_scaling(system, "l2", 1.0)
        (None, None)
    """
    if norm == "linf":
        return None, None if system["skip"] is None else 1.0
    space, best, chosen = _space(system), math.inf, (None, None)
    for theta in _state_scales(space):
        gain, out = _state_parts(space, theta, norm)
        for q in _splits(space.skip, gain, out, hint):
            bound = _joint(out, space.skip, gain, q)
            if bound < best * (1.0 - 1e-9):
                best, chosen = bound, (None if (theta == 1.0).all() else torch.tensor(theta), q)
    return chosen


class _Space(NamedTuple):
    """The tensors of a state space, and what is left to 1 of the modulus of each eigenvalue, for real and imaginary parts."""

    room: Array
    input: Array
    output: Array
    skip: Array | None


def _space(system: Mapping[str, Tensor | None]) -> _Space:
    real, imag, B, C, D = (
        None if (value := system[key]) is None else as_matrix(value, value.ndim)
        for key in ("real", "imag", "input", "output", "skip")
    )
    if real is None or imag is None or B is None or C is None:
        raise ValueError("a state space has eigenvalues, an input and an output.")
    modulus = np.sqrt(real * real + imag * imag) * (1.0 + 2.0**-50) + 2.0**-500
    if not modulus.max(initial=0.0) < 1.0:
        raise UncertifiableError(
            f"an eigenvalue of the state space has the modulus {float(modulus.max()):.17g}, which is not proved to be "
            "below 1, so no gain holds for it."
        )
    return _Space(np.tile((1.0 - modulus) * (1.0 - 2.0**-50), 2), B, C, D)


def _state_scales(space: _Space) -> Iterator[Array]:
    n = len(space.room) // 2
    yield np.ones(n)
    parts = ((space.output, 0), (space.input / space.room[:, None], 1))
    outs, ins = (np.hypot(*np.linalg.norm(part, axis=axis).reshape(2, n)) for part, axis in parts)
    if outs.min() > 0.0 and ins.min() > 0.0:
        theta = np.sqrt(outs / ins)
        yield np.clip(theta / theta.max(), 1.0 / LARGEST_SCALE, 1.0)


def _state_parts(space: _Space, theta: Array, norm: str) -> tuple[float, Array]:
    """Return the published gain from the input to the scaled states, and the matrix from them to the output."""
    both = np.tile(theta, 2)
    S = both[:, None] * space.input / space.room[:, None]
    if not np.isfinite(S).all():
        raise UncertifiableError("an input matrix is too large for float64.")
    gain = padded_norm(S) if norm == "l2" else published_number(float(np.linalg.norm(S)), Fraction(S.size + 64, 2**52))
    return gain, space.output / both


def _splits(skip: Array | None, gain: float, out: Array, hint: float) -> Iterator[float | None]:
    if skip is None:
        yield None
        return
    sizes = spectral_norm(out).upper, spectral_norm(skip).upper
    yield max(float(np.float32(hint)), 2.0**-40)
    if min(*sizes, gain) > 0.0:
        yield math.sqrt(gain * sizes[1] / sizes[0])


def _joint(out: Array, skip: Array | None, gain: float, q: float | None) -> float:
    if skip is None or q is None:
        return published_number(Fraction(padded_norm(out)) * Fraction(gain))
    joined = Fraction(padded_norm(np.concatenate([out, skip / q], 1)))
    return published_number(joined * root_up(Fraction(gain) ** 2 + Fraction(q) ** 2))


def publish_statespace(node: Node, tensors: Mapping[str, Tensor], norm: str) -> Node:
    """Return a state space with the gain of its states and of the whole.

    Args:
        node: the operation without them.
        tensors: the tensors that it names.
        norm: that of the certificate.

    Raises:
        UncertifiableError: if an eigenvalue is not proved to lie inside the unit circle.

    Examples:
        >>> node = {"op": "statespace", "real": "r", "imag": "i", "input": "B", "output": "C", "skip": None}
        >>> node |= {"scaling": None, "split": None}
        >>> half, zero = torch.full((1,), 0.5), torch.zeros(1)
        >>> tensors = {"r": half, "i": zero, "B": torch.tensor([[0.5], [0.0]]), "C": torch.tensor([[3.0, 0.0]])}
        >>> round(publish_statespace(node, tensors, "l2")["bound"], 6)
        3.0
    """
    names = {key: node[key] for key in ("real", "imag", "input", "output", "skip")}
    space = _space({key: None if name is None else tensors[name] for key, name in names.items()})
    n = len(space.room) // 2
    if norm == "linf":
        S, C = space.input / space.room[:, None], space.output
        sums = np.hypot(C[:, :n], C[:, n:]) @ np.hypot(S[:n], S[n:]).sum(1)
        total = float((sums + (0.0 if space.skip is None else np.abs(space.skip).sum(1))).max())
        return node | {"state_gain": None, "bound": published_number(total)}
    theta = np.ones(n) if node["scaling"] is None else as_matrix(tensors[node["scaling"]], 1)
    gain, out = _state_parts(space, theta, norm)
    return node | {"state_gain": gain, "bound": _joint(out, space.skip, gain, node["split"])}


def publish_attention(node: Node, tensors: Mapping[str, Tensor], shape: tuple[int, ...], norm: str) -> Node:
    """Return an attention with the norms of its matrices and its bound.

    Args:
        node: the operation without them.
        tensors: the tensors that it names.
        shape: of its input, without the batch.
        norm: that of the certificate.

    Raises:
        UncertifiableError: in linf.

    Examples:
        >>> node = {"op": "attention", "scales": "s", "radii": [1.0, 1.0, 1.0], "causal": False}
        >>> node |= {f"{side}_weight": "W" for side in ("query", "key", "value", "output")}
        >>> tensors = {"s": torch.zeros(1), "W": torch.eye(2)}
        >>> round(publish_attention(node, tensors, (3, 2), "token_max")["bound"], 6)
        1.0
    """
    if norm == "linf":
        raise UncertifiableError(
            "no linf bound is known for attention whose balls are Euclidean. Ask for norm='token_max', or l2."
        )
    scales = as_matrix(tensors[node["scales"]], 1)
    Q, K, V, O = (as_matrix(tensors[node[f"{side}_weight"]]) for side in ("query", "key", "value", "output"))
    heads, (R_q, R_k, R_v) = len(scales), map(Fraction, node["radii"])
    keys, values = (
        [padded_norm(block, SLACK) for block in matrix.reshape(heads, -1, matrix.shape[1])] for matrix in (K, V)
    )
    query, output = padded_norm(np.repeat(scales, len(Q) // heads)[:, None] * Q, SLACK), padded_norm(O, SLACK)
    total = Fraction(0)
    for s, k, v in zip(map(Fraction, scales.tolist()), map(Fraction, keys), map(Fraction, values), strict=True):
        kappa = s * R_v * R_q * k
        constant = (v + kappa + root_up(v**2 + kappa**2)) / 2
        total += constant**2 * (weight_sum(s * R_q * R_k, shape[-2], causal=node["causal"]) if norm == "l2" else 1)
    bound = Fraction(output) * (root_up(total) + R_v * R_k * Fraction(query))
    published = {"key_bounds": keys, "value_bounds": values, "query_bound": query, "output_bound": output}
    return node | published | {"bound": published_number(bound, Fraction(1, 2**60))}


@composite("statespace")
def _(node: Node, tensors: Mapping[str, Tensor], _shapes: list[tuple[int, ...]], norm: str) -> Node:
    return publish_statespace(node, tensors, norm)


@composite("bounded_norm")
def _(node: Node, _tensors: Mapping[str, Tensor], shapes: list[tuple[int, ...]], norm: str) -> Node:
    """The constant 1; in linf the rows, 1 + sqrt((d - 1)/27)."""
    excess = root_up(Fraction(shapes[0][-1] - 1, 27)) if norm == "linf" and shapes[0][-1] > 1 else Fraction(0)
    return node | {"bound": round_up(1 + excess)}


@composite("attention")
def _(node: Node, tensors: Mapping[str, Tensor], shapes: list[tuple[int, ...]], norm: str) -> Node:
    return publish_attention(node, tensors, shapes[0], norm)
