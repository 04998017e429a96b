r"""The bound that is published for each operation, and weights shrunk until their bound is within a limit.

A published bound of a weight is the proved one times :math:`1 + s`, rounded up. The slack :math:`s` (1e-9 up to a size of
about 2000) leaves the verifier room for the rounding of its own, different proof.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from stableopt.certify.verify import RejectedError, constant_bound
from stableopt.errors import UncertifiableError
from stableopt.linalg import conv_symbol_norm, round_down, round_up, spectral_norm

__all__ = ["WEIGHTED", "layer_limits", "publish", "shrink", "weight_bound"]

Node = dict[str, Any]

WEIGHTED = ("linear", "conv")
"""The operations whose bound is the norm of their weight."""

_ROOM = 1.0 - 2.0**-40
"""Limits are lowered by this factor, so that a product of limits is within its target in spite of rounding."""


def weight_bound(node: Node, weight: Tensor) -> float:
    r"""Return the publishable bound of the operator norm of a weight: proved, with slack, rounded up.

    Args:
        node: the operation, ``linear``, ``conv`` or ``gradient_block``.
        weight: its weight, of any storage dtype.

    Examples:
        >>> 2.0 < weight_bound({"op": "linear"}, torch.tensor([[2.0]])) < 2.00000001
        True
    """
    if node["op"] == "conv":
        proved = conv_symbol_norm(weight, groups=node["groups"]).upper
        long, short = 2 * max(weight.shape[:2]), 2 * min(weight.shape[:2])
    else:
        proved = spectral_norm(weight).upper
        long, short = max(weight.shape), min(weight.shape)
    # the verifier loses at most u n max(m, 2n) / 2 + 32 n u for n <= m; twice that, and at least 1e-9
    slack = max(Fraction(1, 10**9), Fraction(short * (max(long, 2 * short) + 64), 2**53))
    bound = round_up(Fraction(proved) * (1 + slack)) if math.isfinite(proved) else math.inf
    if not math.isfinite(bound):
        raise UncertifiableError(f"the norm of the weight '{node.get('weight')}' is too large for float64.")
    return bound


def publish(node: Node, tensors: dict[str, Tensor]) -> Node:
    r"""Return the node with its bound, and with the step of a gradient block lowered until its proof goes through.

    Args:
        node: an operation without bound.
        tensors: the tensors that it names.

    Raises:
        UncertifiableError: for settings without a proved bound.

    Examples:
        >>> publish({"op": "scale", "factor": -3.0}, {})
        {'op': 'scale', 'factor': -3.0, 'bound': 3.0}
    """
    if node["op"] in WEIGHTED:
        return node | {"bound": weight_bound(node, tensors[node["weight"]])}
    if node["op"] == "gradient_block":
        return _publish_block(node, tensors[node["weight"]])
    try:
        return node | {"bound": constant_bound(to_file(node))}
    except (RejectedError, KeyError) as error:
        raise UncertifiableError(
            f"the operation {node['op']} {node.get('name', '')} has no proved bound: {error}."
        ) from None


def _publish_block(node: Node, weight: Tensor) -> Node:
    norm = weight_bound(node, weight)
    strong = Fraction(node["strong"])
    curvature = 2 * strong + Fraction(norm) ** 2
    step = min(Fraction(node["step"]), 2 / curvature) if curvature else Fraction(node["step"])
    low = _storable_down(step, weight.dtype)
    ends = (abs(1 - Fraction(low) * strong), abs(1 - Fraction(low) * (strong + Fraction(norm) ** 2)))
    return node | {"step": low, "weight_bound": norm, "bound": round_up(max(ends))}


def _storable_down(step: Fraction, dtype: torch.dtype) -> float:
    """Round a step down to a number that multiplies tensors of the dtype exactly as it is: float32, or float64 for float64."""
    low = round_down(step)
    if dtype == torch.float64:
        return low
    single = torch.tensor(low, dtype=torch.float32)
    if float(single) > low:
        single = torch.nextafter(single, torch.zeros((), dtype=torch.float32))
    return float(single)


def shrink(node: Node, weight: Tensor, limit: float) -> Tensor:
    r"""Scale a weight down, in its own dtype, until its published bound is at most the limit.

    Args:
        node: the operation.
        weight: the weight; returned as it is if its bound is within the limit already.
        limit: the largest bound allowed, positive.

    Returns:
        A weight of the same dtype and shape.

    Raises:
        UncertifiableError: if the dtype is too coarse for the limit.

    Examples:
        >>> weight = shrink({"op": "linear"}, torch.eye(2, dtype=torch.bfloat16), 1.0)
        >>> weight_bound({"op": "linear"}, weight) <= 1.0
        True
    """
    bound, factor, excess, result = weight_bound(node, weight), 1.0, 2.0**-50, weight
    for _ in range(80):
        if bound <= limit:
            return result
        factor *= min(limit / bound, 1.0) * (1.0 - excess)
        excess = min(2.0 * excess, 0.25)
        result = (weight.double() * factor).to(weight.dtype)
        bound = weight_bound(node, result)
    raise UncertifiableError(
        f"the weight '{node.get('weight')}' cannot be shrunk to the limit {limit!r} in {weight.dtype}."
    )


def layer_limits(bounds: list[float], fixed: float, target: float) -> float:
    r"""Return the common limit :math:`c` of the weights with :math:`F \prod_i \min(b_i, c) \le T`, up to a margin for rounding.

    Only the largest norms are lowered, so the limit is the least intrusive one that is common to all layers.

    Args:
        bounds: the bounds :math:`b_i` of the weighted operations.
        fixed: the product :math:`F` of all other bounds.
        target: the Lipschitz constant :math:`T > 0` wanted for the whole.

    Raises:
        UncertifiableError: if there is no weight to shrink.

    Examples:
        >>> round(layer_limits([8.0, 0.5], 1.0, 2.0), 6)
        4.0
        >>> layer_limits([1.0], 1.0, 2.0)
        inf
    """
    logs = sorted(math.log(b) if b > 0 else -math.inf for b in bounds)
    wanted = math.log(target) - (math.log(fixed) if fixed > 0 else -math.inf)
    if sum(logs) <= wanted:
        return math.inf
    for kept in range(len(logs)):  # keep the smallest ones, lower the others to the same value
        level = (wanted - sum(logs[:kept])) / (len(logs) - kept)
        if level <= logs[kept]:
            return math.exp(level) * _ROOM
    raise UncertifiableError(
        f"no weight can be shrunk to reach the Lipschitz constant {target!r}: the rest has {fixed!r}."
    )


def within(limit: float) -> float:
    """Lower a limit of one layer a little, against rounding in the product of the layers.

    Examples:
        >>> 0.999999 < within(1.0) < 1.0
        True
    """
    return limit * _ROOM


def to_file(node: Node) -> Node:
    """Return a node as it is written in the file: real numbers as hexadecimal floats.

    Examples:
        >>> to_file({"op": "scale", "factor": 1.0})
        {'op': 'scale', 'factor': '0x1.0000000000000p+0'}
    """
    return {key: value.hex() if isinstance(value, float) else value for key, value in node.items()}


def from_file(node: Node) -> Node:
    """Return a node with its hexadecimal floats as floats; the inverse of :func:`to_file`.

    Examples:
        >>> from_file({"op": "scale", "factor": "0x1.0000000000000p+0"})
        {'op': 'scale', 'factor': 1.0}
    """
    real = {"factor", "slope", "alpha", "beta", "min", "max", "step", "strong", "weight_bound", "bound"}
    return {key: float.fromhex(value) if key in real else value for key, value in node.items()}
