r"""The bounds of the operations whose norm does not take a proof: exact fractions, or the root of one, per operation and norm.

The proofs are in step S5 of docs/soundness.md; the verifier repeats each of these laws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stableopt.certify.verifier.numbers import root_up as fraction_root_up
from stableopt.errors import UncertifiableError

__all__ = ["CONSTANTS", "constant_bound", "root_up"]

Node: TypeAlias = dict[str, Any]
Law: TypeAlias = Callable[[Node, Mapping[str, Tensor], Sequence[int], str], "Fraction | None"]


def root_up(square: Fraction) -> float:
    """Return a float whose square is not below a fraction, the least one or the one after it.

    Args:
        square: the fraction, at least 0.

    Examples:
        >>> root_up(Fraction(4)), root_up(Fraction(2)) ** 2 >= 2.0
        (2.0, True)
    """
    if square == 0:
        return 0.0
    half = max(0, 64 + (square.denominator.bit_length() - square.numerator.bit_length()) // 2)
    value = float(
        Fraction(math.isqrt(square.numerator * 4**half // square.denominator), 2**half)
    )  # within 2^-52 of the root
    while Fraction(value) ** 2 < square:
        value = math.nextafter(value, math.inf)
    return value


def constant_bound(node: Node, tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> float:
    """Return the bound of an operation without a weight, rounded up.

    Args:
        node: the operation, real settings as floats.
        tensors: the tensors that it names.
        shape: the shape of its input, without the batch.
        norm: ``"l2"``, ``"linf"`` or ``"token_max"``.

    Raises:
        UncertifiableError: if the operation has no bound in this norm.

    Examples:
        >>> constant_bound({"op": "scale", "factor": -3.0}, {}, (2,), "l2")
        3.0
        >>> constant_bound({"op": "mean", "axis": 0}, {}, (4, 2), "l2")
        0.5
    """
    square = CONSTANTS[node["op"]](node, tensors, shape, norm)
    if square is None:
        raise UncertifiableError(
            f"the operation '{node['op']}' on the shape {tuple(shape)} has no bound in the norm {norm}."
        )
    return root_up(square)


def _one(_node: Node, _tensors: Mapping[str, Tensor], _shape: Sequence[int], _norm: str) -> Fraction:
    return Fraction(1)


def _scale(node: Node, _tensors: Mapping[str, Tensor], _shape: Sequence[int], _norm: str) -> Fraction:
    return Fraction(node["factor"]) ** 2


def _affine(node: Node, tensors: Mapping[str, Tensor], _shape: Sequence[int], _norm: str) -> Fraction:
    return Fraction(1) if node["scale"] is None else Fraction(float(tensors[node["scale"]].double().abs().max())) ** 2


def _windows(node: Node) -> int:
    return math.prod(-(-k // s) for k, s in zip(node["kernel"], node["stride"], strict=True))


def _pool(node: Node, _tensors: Mapping[str, Tensor], _shape: Sequence[int], norm: str) -> Fraction | None:
    if norm == "token_max":
        return None
    if norm == "linf":
        return Fraction(1)
    return Fraction(_windows(node), math.prod(node["kernel"]) if node["name"] == "avg" else 1)


def _l2pool(node: Node, _tensors: Mapping[str, Tensor], _shape: Sequence[int], norm: str) -> Fraction | None:
    if norm == "token_max":
        return None
    return Fraction(math.prod(node["kernel"]) if norm == "linf" else _windows(node))


def _reshape(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction:
    before, after = shape[-1], node["shape"][-1]
    if norm != "token_max" or before % after == 0:
        return Fraction(1)
    return Fraction(after // before) if after % before == 0 else Fraction((after - 1) // before + 2)


def _permute(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction:
    order = node["order"]
    return Fraction(1) if norm != "token_max" or order[-1] == len(order) - 1 else Fraction(shape[order[-1]])


def _groupsort(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction | None:
    return Fraction(1) if norm != "token_max" or _within_tokens(node["axis"], shape) else None


def _mean(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction | None:
    if norm == "token_max" and node["axis"] in {-1, len(shape) - 1}:
        return None
    return Fraction(1, shape[node["axis"]]) if norm == "l2" else Fraction(1)


def _take(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction:
    if norm == "linf" or (norm == "token_max" and node["axis"] not in {-1, len(shape) - 1}):
        return Fraction(1)
    return Fraction(int(torch.bincount(torch.tensor(node["index"])).max()))


def _softmax(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction | None:
    """The derivative diag(p) - p p^T is symmetric with absolute row sums 2 p (1 - p) <= 1/2."""
    return Fraction(1, 4) if norm != "token_max" or _within_tokens(node["axis"], shape) else None


def _center(_node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction:
    return Fraction(2 * (shape[-1] - 1), shape[-1]) ** 2 if norm == "linf" else Fraction(1)


def _ball(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction | None:
    whole = node.get("axis") is None and len(shape) > 1
    return None if norm == "linf" or (norm == "token_max" and whole) else Fraction(1)


def _householder(node: Node, tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction | None:
    """An isometry on either side of its hyperplane, continuous; in the maximum norm, the row sums of I - 2 d d^T / d.d."""
    if norm != "linf":
        return Fraction(1) if norm == "l2" or _within_tokens(node["axis"], shape) else None
    largest = Fraction(1)
    for row in tensors[node["vectors"]].double().tolist():
        d = [abs(Fraction(v)) for v in row]
        square, total = sum(v * v for v in d), sum(d)
        if square:
            largest = max(largest, *((abs(square - 2 * v * v) + 2 * v * (total - v)) / square for v in d))
    return largest**2


def _standardize(node: Node, _tensors: Mapping[str, Tensor], shape: Sequence[int], norm: str) -> Fraction:
    square = 1 / Fraction(node["eps"])
    if norm != "linf":
        return square
    n = shape[-1]
    centre = Fraction(2 * (n - 1), n) if node["centered"] else Fraction(1)
    return square * (centre + fraction_root_up(Fraction(n - 1, 27))) ** 2


def _within_tokens(axis: int, shape: Sequence[int]) -> bool:
    return axis in {-1, len(shape) - 1}


CONSTANTS: dict[str, Law] = {
    "scale": _scale, "affine": _affine, "pool": _pool, "l2pool": _l2pool, "reshape": _reshape, "permute": _permute, "pad": _one,
    "slice": _one, "groupsort": _groupsort, "mean": _mean, "take": _take, "softmax": _softmax, "center": _center, "ball": _ball,
    "householder": _householder, "standardize": _standardize,
}  # fmt: skip
"""The square of the bound of each operation, exactly; None where there is none."""
