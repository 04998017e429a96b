r"""Certified radii: within which distance no input changes the predicted class.

The logits are evaluated in float64 with the stored weights, beside a bound :math:`d \ge \|\hat h - h\|_2` of the distance
between the computed and the exact activations, carried from layer to layer. A layer with Lipschitz bound :math:`U` carries the old
error to at most :math:`U d`; its own rounding adds, with :math:`u = 2^{-53}` and :math:`\gamma_k = ku/(1-ku)`,

* dense layer or convolution with :math:`n` products per output: each output is off by at most
  :math:`\gamma_{n+1} q`, :math:`q = |W||\hat h| + |b|`; the computed :math:`\hat q` is at least :math:`(1-\gamma_{n+1}) q`, so
  :math:`2(n+2)u\,\|\hat q\|_2` covers it;
* average pooling: the same with :math:`q` the average of :math:`|\hat h|`; a scaling: one rounding;
* rectifiers, sorting, clipping, absolute value, maximum pooling: nothing, they are exact;
* tanh, sigmoid, ELU, LeakyReLU: :math:`16u|\hat y|` per entry, softplus, GELU, SiLU: :math:`16u(|\hat h| + |\hat y|)`, if the
  library computes the elementary functions within a few units in the last place;
* a gradient block: the two products as above, the inner error through :math:`\tau U_A`, and the roundings of the sum.

The bounds themselves are computed in float64 and inflated by 1e-6, far more than their own rounding.

If :math:`m_{ij}` is the computed difference of logits and :math:`E` the final bound, the exact difference is at least
:math:`m_{ij} - \sqrt2 E`, and on the ball of radius :math:`r` it drops by at most :math:`L_{ij} r`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.certify.modules import activation, build

__all__ = ["evaluate", "radii"]

Node = dict[str, Any]

_U = 2.0**-53
_INFLATE = 1.0 + 1e-6
_TINY = 2.0**-900
"""More than all underflow of one layer."""
_EXACT = {"identity", "relu", "abs", "hardtanh", "groupsort"}
_RELATIVE = {"tanh", "sigmoid", "elu", "leaky_relu"}


def radii(logits: Tensor, error: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the predicted classes and the certified radii :math:`\min_{j} \max(0, m_{ij} - 2E) / L_{ij}`, rounded down.

    Args:
        logits: computed logits, shape ``(batch, classes)``, float64.
        error: bound of the 2-norm of their errors, shape ``(batch,)``.
        constants: bounds of the Lipschitz constants of the differences of logits, shape ``(classes, classes)``.

    Returns:
        The classes, shape ``(batch,)``, and the radii. Ties, overflow, NaN and a single class give 0.

    Examples:
        >>> logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
        >>> constants = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
        >>> labels, r = radii(logits, torch.zeros(2, dtype=torch.float64), constants)
        >>> labels.tolist(), [round(v, 12) for v in r.tolist()]
        ([0, 0], [1.0, 0.0])
    """
    finite = torch.isfinite(logits).all(1) & torch.isfinite(error)
    logits = torch.where(finite[:, None], logits, torch.zeros_like(logits))
    best = logits.argmax(1)
    if logits.shape[1] < 2:
        return best, torch.zeros_like(error)
    margin = _down(logits.gather(1, best[:, None]) - logits)
    margin = _down(margin - (2.0 * _INFLATE) * error[:, None])
    rates = constants[best]
    reach = _down(margin.clamp_min(0.0) / rates).masked_fill(rates == 0.0, math.inf)  # equal rows keep their distance
    reach = torch.where(margin > 0.0, reach, torch.zeros_like(reach)).scatter(1, best[:, None], math.inf)
    reach = reach.amin(1).clamp_min(0.0)
    return best, torch.where(finite & ~torch.isnan(reach), reach, torch.zeros_like(reach))


def evaluate(nodes: tuple[Node, ...], tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 output and a bound of its distance to the exact output, per sample, in the 2-norm.

    Args:
        nodes: the operations with their bounds, real settings as floats.
        tensors: their tensors in float64 on the CPU.
        x: inputs, shape ``(batch, *shape)``, float64 on the CPU.

    Examples:
        >>> node = {"op": "linear", "weight": "w", "bias": None, "bound": 2.0}
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> y, error = evaluate((node,), {"w": torch.full((1, 1), 2.0, dtype=torch.float64)}, x)
        >>> float(y), bool(0 < error < 1e-14)
        (2.0, True)
    """
    error = torch.zeros(len(x), dtype=torch.float64)
    for node in nodes:
        x, own = _layer(node, tensors, x)
        error = (node["bound"] * error + own + _TINY) * _INFLATE
    return x, error


def _layer(node: Node, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of one layer and a bound of the rounding errors that it adds."""
    op = node["op"]
    if op in {"linear", "conv"}:
        apply = _dense if op == "linear" else _conv
        weight, bias = tensors[node["weight"]], None if node["bias"] is None else tensors[node["bias"]]
        size = apply(node, weight.abs(), None if bias is None else bias.abs(), x.abs())
        return apply(node, weight, bias, x), 2.0 * (weight[0].numel() + 2) * _U * _norm(size)
    if op == "activation":
        y = _activation(node, x)
        return y, _activation_error(node["name"], x, y)
    if op == "gradient_block":
        return _gradient_block(node, tensors, x)
    y = build(node, tensors)(x)
    if op == "pool" and node["name"] == "avg":
        return y, 2.0 * (math.prod(node["kernel"]) + 2) * _U * _norm(build(node, tensors)(x.abs()))
    return y, (2.0 * _U if op == "scale" else 0.0) * _norm(y)


def _gradient_block(node: Node, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = tensors[node["weight"]], None if node["bias"] is None else tensors[node["bias"]]
    (hidden, dim), step, strong, norm = weight.shape, node["step"], node["strong"], node["weight_bound"]
    inner = F.linear(x, weight, bias)
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    sigma = {"name": node["activation"], "slope": node.get("slope"), "min": -1.0, "max": 1.0, "beta": 1.0}
    outer = _activation(sigma, inner)
    inner_error = 2.0 * (dim + 2) * _U * _norm(size) + _activation_error(node["activation"], inner, outer)
    force = outer @ weight
    force_size = outer.abs() @ weight.abs()
    force_error = 2.0 * (hidden + 2) * _U * _norm(force_size) + norm * inner_error
    y = x - step * (strong * x + force)
    sums = x.abs() + step * (
        strong * x.abs() + force_size
    )  # four operations follow, each rounding once: 8u covers them
    return y, step * force_error + 8.0 * _U * _norm(sums)


def _activation_error(name: str, x: Tensor, y: Tensor) -> Tensor:
    if name in _EXACT:
        return torch.zeros(len(x), dtype=torch.float64)
    return 16.0 * _U * _norm(y.abs() if name in _RELATIVE else x.abs() + y.abs())


def _dense(_node: Node, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _conv(node: Node, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Convolve by unfolding and a matrix product: plain sums, whatever algorithm the library would choose."""
    stride, padding, dilation = (tuple(node[key]) for key in ("stride", "padding", "dilation"))
    if node["padding_mode"] == "circular":
        x = F.pad(x, [p for q in reversed(padding) for p in (q, q)], mode="circular")
        padding = (0,) * len(padding)
    kernel = tuple(weight.shape[2:])
    if node["dims"] == 1:  # an image of one row
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    image = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    columns = F.unfold(x, kernel, dilation, padding, stride)  # (batch, in * taps, places)
    columns = columns.unflatten(1, (node["groups"], -1))
    y = (weight.reshape(node["groups"], -1, columns.shape[2]) @ columns).flatten(1, 2)
    if bias is not None:
        y = y + bias[:, None]
    return y.unflatten(2, image[-node["dims"] :])


def _activation(node: Node, x: Tensor) -> Tensor:
    """Evaluate an activation as its definition says, without the thresholds of the library."""
    name = node["name"]
    if name == "softplus":
        beta = node["beta"]
        return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta
    if name == "elu":
        return torch.where(x > 0, x, node["alpha"] * torch.expm1(x.clamp_max(0.0)))
    if name == "gelu":
        return 0.5 * x * torch.erfc(-math.sqrt(0.5) * x)
    return activation(node)(x)


def _norm(x: Tensor) -> Tensor:
    """Bound the 2-norm of each sample from above, without over- or underflow."""
    flat = x.flatten(1)
    largest = flat.abs().amax(1)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    return scale * torch.linalg.vector_norm(flat / scale[:, None], dim=1) * _INFLATE


def _down(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))
