r"""The bound that is published for each operation of a program, and weights shrunk until their bound is within a limit.

A published bound of a weight is the proved one times :math:`1 + s`, rounded up. The slack :math:`s` (1e-9 up to sides of about
2000) leaves the verifier room for the rounding of its own, different proof. A bound that follows from exact fractions has no slack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stableopt.certify.conv_bounds import conv_inf_upper, conv_sides, conv_upper
from stableopt.certify.program import Node, Program, nested_tensors, output_shape
from stableopt.certify.publish_constants import CONSTANTS, constant_bound
from stableopt.certify.verifier.activations import slopes as verified_slopes
from stableopt.certify.verifier.numbers import RejectedError
from stableopt.certify.verifier.operations import Graph
from stableopt.errors import UncertifiableError
from stableopt.linalg import inf_norm, round_up
from stableopt.linalg.proved import gamma

__all__ = [
    "COMPOSITES", "WEIGHTED", "composite", "from_file", "layer_limits", "matrix_bound", "publish", "published", "shapes", "shrink",
    "slopes", "to_file", "weight_bound", "within",
]  # fmt: skip

Shape: TypeAlias = tuple[int, ...]
Publisher: TypeAlias = Callable[[Node, Mapping[str, Tensor], list[Shape], str], Node]

WEIGHTED = ("linear", "conv")
"""The operations whose bound is the norm of their weight."""
COMPOSITES: dict[str, Publisher] = {}
"""What publishes the bound of each composite operation."""
_COMBINE = ("sum", "concat")
_ROOM = 1.0 - 2.0**-40
"""Limits are lowered by this factor, so that a product of limits is within its target in spite of rounding."""
_HEX = re.compile(r"-?0x[01](\.[0-9a-f]{1,13})?p[+-][0-9]{1,4}")


def composite(op: str) -> Callable[[Publisher], Publisher]:
    """Register what publishes a composite operation: ``(node, tensors, shapes of its inputs, norm) -> node with its bound``.

    Args:
        op: the name of the operation.

    Examples:
        >>> @composite("twice")
        ... def _(node, tensors, shapes, norm):
        ...     return node | {"bound": 2.0}
        >>> published({"op": "twice", "in": [0]}, {}, [(3,)], "l2")["bound"]
        2.0
        >>> _ = COMPOSITES.pop("twice")
    """

    def register(publisher: Publisher) -> Publisher:
        COMPOSITES[op] = publisher
        return publisher

    return register


def publish(program: Program) -> Program:
    r"""Return the program with the bound of each of its operations.

    Args:
        program: operations without bounds.

    Raises:
        UncertifiableError: if an operation has no proved bound in the norm of the program.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> graph = Builder((2,))
        >>> _ = graph.add("linear", graph.input, weight=2 * torch.eye(2), bias=None, transposed=False)
        >>> 2.0 < publish(graph.program()).nodes[0]["bound"] < 2.00000001
        True
    """
    sizes = shapes(program)
    nodes = [
        node
        if node["op"] in _COMBINE
        else published(node, program.tensors, [sizes[v] for v in node["in"]], program.norm)
        for node in program.nodes
    ]
    return replace(program, nodes=tuple(nodes))


def published(node: Node, tensors: Mapping[str, Tensor], sizes: list[Shape], norm: str) -> Node:
    """Return one operation, or one that is nested in another, with its bound.

    Args:
        node: the operation without bound.
        tensors: the tensors that it names.
        sizes: the shapes of its inputs, without the batch.
        norm: the norm of the program.

    Raises:
        UncertifiableError: if there is no proved bound.

    Examples:
        >>> published({"op": "scale", "in": [0], "factor": -3.0}, {}, [(2,)], "l2")
        {'op': 'scale', 'in': [0], 'factor': -3.0, 'bound': 3.0}
    """
    op = node["op"]
    if op in COMPOSITES:
        return COMPOSITES[op](node, tensors, sizes, norm)
    if op == "activation":
        return node | {"bound": round_up(max(map(abs, slopes(node, tensors, sizes[0]))))}
    if op in CONSTANTS:
        return node | {"bound": constant_bound(node, tensors, sizes[0], norm)}
    if op not in WEIGHTED:
        raise UncertifiableError(f"the operation '{op}' has no proved bound.")
    return node | {"bound": weight_bound(node, tensors[node["weight"]], sizes[0], norm)}


def weight_bound(node: Node, weight: Tensor, shape: Sequence[int] | None = None, norm: str = "l2") -> float:
    r"""Return the publishable bound of the operator norm of a weight: proved, with slack, rounded up.

    Args:
        node: the operation, ``linear`` or ``conv``.
        weight: its weight, of any storage dtype.
        shape: the shape of its input without the batch; None for a convolution of images of any size.
        norm: the norm.

    Raises:
        UncertifiableError: if the norm is too large for float64, or there is no bound in this norm.

    Examples:
        >>> 2.0 < weight_bound({"op": "linear"}, torch.tensor([[2.0]])) < 2.00000001
        True
    """
    if node["op"] == "linear":
        return matrix_bound(weight.T if node.get("transposed", False) else weight, norm)
    if norm == "token_max":
        raise UncertifiableError("a convolution has no bound in the norm token_max.")
    if norm == "linf":
        return _above_sum(conv_inf_upper(node, weight), weight.numel())
    proved = conv_upper(node, weight, None if shape is None else shape[1:])
    return _with_slack(proved, *(2 * side for side in conv_sides(node, weight.shape)))


def matrix_bound(matrix: Tensor, norm: str = "l2") -> float:
    r"""Return the publishable bound of the norm of a matrix: spectral, or the largest absolute row sum in ``"linf"``.

    Args:
        matrix: the matrix, of any storage dtype.
        norm: the norm of what it maps.

    Raises:
        UncertifiableError: if the norm is too large for float64.

    Examples:
        >>> 3.0 <= matrix_bound(torch.tensor([[1.0, -2.0]]), "linf") < 3.0000001
        True
    """
    if norm == "linf":
        return _above_sum(Fraction(inf_norm(matrix).upper), matrix.shape[1])
    return _with_slack(_top_singular_value(matrix), *matrix.shape)


def _top_singular_value(matrix: Tensor) -> float:
    """Compute the largest singular value to within a part of the slack; the proof that the slack is enough is the verifier's."""
    a = matrix.detach().to("cpu", torch.float64)
    a = a if a.shape[0] >= a.shape[1] else a.T
    largest = float(a.abs().amax()) if a.numel() else 0.0
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    scaled = torch.ldexp(a, torch.tensor(-exponent))
    square = float(torch.linalg.eigvalsh(scaled.T @ scaled)[-1])
    try:
        return math.ldexp(math.sqrt(max(square, 0.25)), exponent)
    except OverflowError:
        return math.inf


def _with_slack(proved: float, rows: int, columns: int) -> float:
    """Add the slack. The verifier loses at most (3/2) n (gamma_m + gamma_n) + 64 n u for n <= m; twice that, and at least 1e-9."""
    long, short = max(rows, columns), min(rows, columns)
    slack = max(Fraction(1, 10**9), Fraction(short * (3 * (long + short) + 128), 2**53))
    if proved == math.inf:
        return _float(None)
    return _float(Fraction(proved) * (1 + slack))


def _above_sum(value: Fraction, terms: int) -> float:
    """Round a sum of moduli up so far that it is not below the same sum in another order, and its rounding."""
    return _float(value * (1 + Fraction(gamma(8 * terms))) + (Fraction(1, 2**899) if value else 0))


def _float(value: Fraction | None) -> float:
    bound = math.inf if value is None else round_up(value)
    if not math.isfinite(bound):
        raise UncertifiableError("the norm of a weight is too large for float64.")
    return bound


def slopes(node: Node, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> tuple[Fraction, Fraction]:
    """Return the ends of an interval that holds all slopes of an activation, as the verifier knows them.

    Args:
        node: the operation ``activation``, real settings as floats.
        tensors: the tensors that it names.
        shape: the shape of its input, without the batch.

    Raises:
        UncertifiableError: if the activation has no rule.

    Examples:
        >>> slopes({"op": "activation", "name": "leaky_relu", "slope": 0.25}, {}, (2,))
        (Fraction(1, 4), Fraction(1, 1))
    """
    arrays = {name: tensors[name].double().numpy() for name in nested_tensors(node) if name in tensors}
    try:
        return verified_slopes(Graph(arrays, "l2", exact=False), to_file(node), tuple(shape))
    except (RejectedError, KeyError) as error:
        raise UncertifiableError(f"the activation '{node.get('name')}' has no proved bound: {error}.") from None


def shapes(program: Program) -> list[Shape]:
    """Return the shape of every value of a program, the input first, without the batch.

    Args:
        program: the program; each operation is run once on zeros.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> graph = Builder((2,))
        >>> _ = graph.add("sum", graph.input, graph.input, factors=[1.0, 1.0])
        >>> shapes(graph.program())
        [(2,), (2,)]
    """
    found = [program.shape]
    for node in program.nodes:
        found.append(output_shape(node, program.tensors, [found[number] for number in node["in"]]))
    return found


def shrink(node: Node, weight: Tensor, limit: float, shape: Sequence[int] | None = None, norm: str = "l2") -> Tensor:
    r"""Scale a weight down, in its own dtype, until its published bound is at most the limit.

    Args:
        node: the operation.
        weight: the weight; returned as it is if its bound is within the limit already.
        limit: the largest bound allowed, positive.
        shape: the shape of its input without the batch, as for :func:`weight_bound`.
        norm: the norm.

    Returns:
        A weight of the same dtype and shape.

    Raises:
        UncertifiableError: if the dtype is too coarse for the limit.

    Examples:
        >>> weight = shrink({"op": "linear"}, torch.eye(2, dtype=torch.bfloat16), 1.0)
        >>> weight_bound({"op": "linear"}, weight) <= 1.0
        True
    """
    bound, factor, excess, result = weight_bound(node, weight, shape, norm), 1.0, 2.0**-50, weight
    for _ in range(80):
        if bound <= limit:
            return result
        factor *= min(limit / bound, 1.0) * (1.0 - excess)
        excess = min(2.0 * excess, 0.25)
        result = (weight.double() * factor).to(weight.dtype)
        bound = weight_bound(node, result, shape, norm)
    raise UncertifiableError(
        f"the weight '{node.get('weight')}' cannot be shrunk to the limit {limit!r} in {weight.dtype}."
    )


def layer_limits(bounds: Sequence[float], fixed: float, target: float) -> float:
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

    Args:
        limit: the limit.

    Examples:
        >>> 0.999999 < within(1.0) < 1.0
        True
    """
    return limit * _ROOM


def to_file(value: Any) -> Any:
    """Return a node, or any part of a certificate, as it is written: real numbers as hexadecimal floats.

    Args:
        value: numbers, strings, lists and dictionaries of them.

    Examples:
        >>> to_file({"op": "scale", "factor": 1.0})
        {'op': 'scale', 'factor': '0x1.0000000000000p+0'}
    """
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: to_file(entry) for key, entry in value.items()}
    return [to_file(entry) for entry in value] if isinstance(value, list | tuple) else value


def from_file(value: Any) -> Any:
    """Return a node with its hexadecimal floats as floats; the inverse of :func:`to_file`.

    Args:
        value: what was read.

    Examples:
        >>> from_file({"op": "scale", "factor": "0x1.0000000000000p+0"})
        {'op': 'scale', 'factor': 1.0}
    """
    if isinstance(value, str):
        return float.fromhex(value) if _HEX.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: from_file(entry) for key, entry in value.items()}
    return [from_file(entry) for entry in value] if isinstance(value, list) else value
