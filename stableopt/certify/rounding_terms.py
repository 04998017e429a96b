r"""What one operation adds to the rounding error, and the norms that the analysis needs.

The error of an operation that is computed in a format of unit roundoff u is at most :math:`\gamma_k M(z)` in each entry, with
:math:`\gamma_k = ku/(1 - ku)`; k is a number of roundings and M a map of the input with
:math:`\|M(z + \delta)\| \le \|M(z)\| + g\|\delta\|`. The steps of docs/soundness.md (part R) derive each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.certify.execute import apply
from stableopt.certify.execute_weighted import along, keeps_circle, linear, plain_convolve
from stableopt.errors import CertificateError
from stableopt.linalg import conv_symbol_norm, inf_norm, spectral_norm

__all__ = [
    "INFLATE",
    "PASSING",
    "Own",
    "absolute_norm",
    "evaluate",
    "gamma",
    "ones",
    "own_error",
    "reflection_sums",
    "size",
    "weight_norm",
]

Node = dict[str, Any]

INFLATE = 1.0 + 1e-6
"""More than the rounding of one step of the analysis itself, for sums of up to 2^32 terms."""

PASSING = {"reshape", "permute", "pad", "slice", "take", "concat", "groupsort"}
"""Operations that only move entries: exact, and an entrywise relative error of the input is one of the output."""
_HOMOGENEOUS = {"identity", "relu", "abs", "leaky_relu", "prelu"}
_RELATIVE = {"tanh", "sigmoid", "elu", "celu", "selu", "softsign", "hardtanh", "threshold", "zigzag"} | _HOMOGENEOUS
_EXACT = {"identity", "relu", "abs"}
_ULPS = 16  # of an activation, in units of u: a few library functions within 4 units in the last place each


@dataclass(frozen=True)
class Own:
    r"""The error that an operation adds: at most :math:`\gamma_k M`, with M of shape (batch, ...), and its growth g."""

    count: int
    size: Tensor
    gain: float


def gamma(count: int, unit: float) -> float:
    r"""Return :math:`ku/(1 - ku)`, rounded up; infinity if :math:`ku \ge 1`.

    Examples:
        >>> gamma(2, 0.25) >= 1.0, gamma(4, 0.25)
        (True, inf)
    """
    product = count * unit
    return product / (1.0 - product) * (1.0 + 2.0**-48) if product < 1.0 else math.inf


def size(x: Tensor, norm: str) -> Tensor:
    """Bound the norm of each sample from above, without over- or underflow.

    Examples:
        >>> x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> 5.0 <= float(size(x, "l2")) < 5.0001, float(size(x, "linf"))
        (True, 4.0)
    """
    flat = x.flatten(1)
    largest = flat.abs().amax(1)
    if norm == "linf":
        return largest
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    if norm == "token_max" and x.ndim > 2:
        tokens = x.flatten(1, -2) / scale[:, None, None]
        return scale * torch.linalg.vector_norm(tokens, dim=-1).amax(1) * INFLATE
    return scale * torch.linalg.vector_norm(flat / scale[:, None], dim=1) * INFLATE


def ones(x: Tensor, norm: str) -> float:
    """Bound the norm of a sample of ones in the shape of a batch.

    Examples:
        >>> 2.0 <= ones(torch.zeros(1, 4), "l2") < 2.0001
        True
    """
    if norm == "linf":
        return 1.0
    return math.sqrt(x.shape[-1] if norm == "token_max" else x[0].numel()) * INFLATE


def weight_norm(node: Node, weight: Tensor, norm: str) -> float:
    """Bound the operator norm of a dense layer or a convolution, for images of every size.

    Examples:
        >>> 1.0 <= weight_norm({"op": "linear", "transposed": False}, torch.eye(2), "linf") < 1.0001
        True
    """
    if node["op"] == "conv":
        if norm == "linf":
            return _largest_taps(node, weight)
        return conv_symbol_norm(weight, groups=node["groups"]).upper
    if norm == "linf":
        return inf_norm(weight.T if node["transposed"] else weight).upper
    return spectral_norm(weight).upper


def absolute_norm(node: Node, weight: Tensor, norm: str) -> float:
    """Bound the norm of the operator of the absolute values.

    Examples:
        >>> absolute_norm({"op": "linear"}, -torch.eye(2, dtype=torch.float64), "l2") >= 1.0
        True
    """
    return weight_norm(node, weight.abs(), norm)


def reflection_sums(vectors: Tensor) -> float:
    r"""Bound the row sums of :math:`I - 2vv^\top/v^\top v` and of the identity: the constant of reflections in linf.

    Examples:
        >>> 5 / 3 < reflection_sums(torch.tensor([[1.0, 2.0, 2.0, 0.0]])) < 1.667
        True
    """
    v = vectors.double().abs()
    v = v / v.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    square = v.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rows = (1.0 - 2.0 * v.square() / square).abs() + 2.0 * v * (v.sum(1, keepdim=True) - v) / square
    return max(1.0, float(rows.max())) * INFLATE


def _largest_taps(node: Node, weight: Tensor) -> float:
    parts = weight.double().abs().unflatten(0, (node["groups"], -1))
    totals = parts.flatten(3).sum(3).sum(1 if node["transposed"] else 2)
    return float(totals.max()) * INFLATE


def evaluate(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Run an operation as plain sums of products.

    Examples:
        >>> evaluate({"op": "scale", "factor": 2.0}, {}, [torch.ones(1, 1)])
        tensor([[2.]])
    """
    if node["op"] == "conv":
        bias = None if node["bias"] is None else tensors[node["bias"]]
        return plain_convolve(node, tensors[node["weight"]], bias, inputs[0])
    return apply(node, tensors, inputs)


def own_error(
    node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor], output: Tensor, bound: float
) -> Own | None:
    """Return what an operation without products adds to the error; None if it is exact.

    Args:
        node: the operation.
        tensors: its tensors in float64.
        inputs: its inputs in float64.
        output: its output.
        bound: a bound of its Lipschitz constant.

    Raises:
        CertificateError: for an operation whose rounding has no rule.

    Examples:
        >>> x = torch.ones(1, 2, dtype=torch.float64)
        >>> own_error({"op": "activation", "name": "relu"}, {}, [x], x, 1.0) is None
        True
        >>> own_error({"op": "activation", "name": "tanh"}, {}, [x], x.tanh(), 1.0).count
        16
    """
    op = node["op"]
    if op in PASSING or (op == "pool" and node["name"] == "max") or node.get("name") in _EXACT:
        return None
    if op not in _RULES:
        raise CertificateError(
            f"the rounding of the operation {op!r} has no rule, so no radius can be given in a runtime."
        )
    return _RULES[op](node, tensors, inputs, output, bound)


Rule = Callable[[Node, Mapping[str, Tensor], list[Tensor], Tensor, float], Own]
_RULES: dict[str, Rule] = {}


def _rule(name: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES[name] = function
        return function

    return register


@_rule("activation")
def _activation(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor], output: Tensor, bound: float) -> Own:
    x, name = inputs[0].abs(), node["name"]
    if name in {"leaky_relu", "prelu"}:
        return Own(2, output.abs(), bound)
    if name in _RELATIVE:
        return Own(_ULPS, output.abs(), bound)
    if name == "soft_abs":
        return Own(_ULPS, x + 2.0 * node["delta"], 1.0)
    if name == "spline":
        slopes, bias = tensors[node["slopes"]].abs(), tensors[node["bias"]].abs()
        knots = slopes.shape[1] - 1
        steep, span = along(slopes.amax(1), node["axis"], x), node["span"]
        most = along(bias + 2.0 * slopes.sum(1) * 2.0 * span / (knots - 1), node["axis"], x)
        return Own(knots + 16, most + 2.0 * steep * (x + 2.0 * span), 2.0 * float(slopes.max()))
    return Own(_ULPS, x + output.abs(), 1.0 + bound)


@_rule("affine")
def _affine(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor], _output: Tensor, bound: float) -> Own:
    steps = (node["scale"] is not None) + (node["bias"] is not None)
    absolute = {name: tensors[name].abs() for name in (node["scale"], node["bias"]) if name is not None}
    return Own(steps, apply(node, absolute, [inputs[0].abs()]), bound)


@_rule("scale")
def _scale(_node: Node, _tensors: Mapping[str, Tensor], _inputs: list[Tensor], output: Tensor, bound: float) -> Own:
    return Own(2, output.abs(), bound)  # the factor and the product round


@_rule("sum")
def _sum(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor], _output: Tensor, _bound: float) -> Own:
    factors = [abs(factor) for factor in node["factors"]]
    return Own(len(factors) + 1, apply(node | {"factors": factors}, {}, [x.abs() for x in inputs]), math.nan)


@_rule("mean")
def _mean(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor], output: Tensor, bound: float) -> Own:
    return Own(inputs[0][0].numel() // max(1, output[0].numel()) + 1, apply(node, {}, [inputs[0].abs()]), bound)


@_rule("pool")
def _pool(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor], _output: Tensor, bound: float) -> Own:
    return Own(math.prod(node["kernel"]) + 1, apply(node, {}, [inputs[0].abs()]), bound)


@_rule("l2pool")
def _l2pool(node: Node, _tensors: Mapping[str, Tensor], _inputs: list[Tensor], output: Tensor, bound: float) -> Own:
    return Own(math.prod(node["kernel"]) + 8, output.abs(), bound)


@_rule("center")
def _center(_node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor], _output: Tensor, _bound: float) -> Own:
    x = inputs[0].abs()
    return Own(x.shape[-1] + 2, x + x.mean(-1, keepdim=True), 2.0)


@_rule("ball")
def _ball(node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor], output: Tensor, _bound: float) -> Own:
    extra = 0.0 if node["center"] is None else 2.0 * tensors[node["center"]].abs()
    return Own(inputs[0][0].numel() + 12, output.abs() + extra, 1.0)


@_rule("bounded_norm")
def _bounded_norm(
    _node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor], output: Tensor, bound: float
) -> Own:
    return Own(inputs[0].shape[-1] + 16, output.abs(), bound)


@_rule("householder")
def _householder(
    node: Node, tensors: Mapping[str, Tensor], inputs: list[Tensor], _output: Tensor, _bound: float
) -> Own:
    r"""M(z) = |z| + 2 |v| |v|^T |z| / v^T v: the map that reflects with -|v| and adds."""
    v = tensors[node["vectors"]].abs()
    x, dim = inputs[0].abs(), 1 if node["axis"] == 0 else inputs[0].ndim - 1
    z = x.unflatten(dim, tuple(v.shape))
    v = v / v.amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    v = v / v.square().sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(v.dtype).tiny)
    gain = max(3.0, float((1.0 + 2.0 * v.amax(1) * v.sum(1)).max()))  # in linf a row of I + 2 |v| |v|^T
    v = v.reshape(*v.shape, *[1] * (z.ndim - dim - 2))
    return Own(2 * v.shape[1] + 12, (z + 2.0 * (v * z).sum(dim + 1, keepdim=True) * v).flatten(dim, dim + 1), gain)


@_rule("softmax")
def _softmax(node: Node, _tensors: Mapping[str, Tensor], inputs: list[Tensor], output: Tensor, _bound: float) -> Own:
    """Off by p (t + sum p t + n + 8) u with t = max x - x, and p t <= 1/e, sum p t <= log n: a bound for every input."""
    n = inputs[0].shape[node["axis"] + 1 if node["axis"] >= 0 else node["axis"]]
    return Own(n + 16, torch.full_like(output, 1.0 + math.log(n)), 0.0)


def product_terms(node: Node, weight: Tensor, x: Tensor) -> tuple[int, Tensor]:
    """Return the number of products in each sum and :math:`|W||x|`.

    Examples:
        >>> n, q = product_terms({"op": "linear", "transposed": False}, -torch.eye(2), torch.ones(1, 2))
        >>> n, q.tolist()
        (2, [[1.0, 1.0]])
    """
    if node["op"] == "conv":
        count = weight[0].numel() if not node["transposed"] else weight[:, 0].numel() // node["groups"]
        if node["transposed"] and node["padding_mode"] == "circular" and not keeps_circle(node, weight.shape[2:]):
            raise CertificateError("the rounding of a transposed convolution on a circle of another size has no rule.")
        return count, plain_convolve(node, weight.abs(), None, x.abs())
    return weight.shape[0 if node["transposed"] else 1], linear(node, weight.abs(), None, x.abs())
