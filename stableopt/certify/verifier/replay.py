"""Replayable claims: run the program again on the data, in numpy and float64, and compare the counts.

This is a repetition, not a proof: rounding is not counted, and samples whose margin is within 1e-6 of the limit may count
either way.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import parse_json, parse_weights, to_float64
from .numbers import Array, RejectedError, need
from .operations import Node

__all__ = ["evaluate", "replay"]

Run = Callable[[Node, dict[str, Array], list[Array]], Array]
_TOLERANCE, _ROWS = 1e-6, 256
_erf = np.vectorize(math.erf, otypes=[float])

_ACTIVATIONS: dict[str, Callable[[Array, dict[str, float]], Array]] = {
    "identity": lambda x, _: x,
    "relu": lambda x, _: np.maximum(x, 0.0),
    "abs": lambda x, _: np.abs(x),
    "tanh": lambda x, _: np.tanh(x),
    "sigmoid": lambda x, _: _sigmoid(x),
    "softplus": lambda x, s: np.logaddexp(s["beta"] * x, 0.0) / s["beta"],
    "hardtanh": lambda x, s: np.clip(x, s["min"], s["max"]),
    "threshold": lambda x, s: np.maximum(x, s["min"]),
    "leaky_relu": lambda x, s: np.where(x > 0, x, s["slope"] * x),
    "elu": lambda x, s: np.where(x > 0, x, s["alpha"] * np.expm1(np.minimum(x, 0.0))),
    "celu": lambda x, s: np.where(x > 0, x, s["alpha"] * np.expm1(np.minimum(x, 0.0) / s["alpha"])),
    "selu": lambda x, _: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0.0))),
    "gelu": lambda x, _: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x, _: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x, _: x * _sigmoid(x),
    "mish": lambda x, _: x * np.tanh(np.logaddexp(x, 0.0)),
    "hardswish": lambda x, _: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "hardsigmoid": lambda x, _: np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "softsign": lambda x, _: x / (1.0 + np.abs(x)),
    "logsigmoid": lambda x, _: -np.logaddexp(-x, 0.0),
    "tanhshrink": lambda x, _: x - np.tanh(x),
    "softshrink": lambda x, s: np.sign(x) * np.maximum(np.abs(x) - s["lambd"], 0.0),
    "soft_abs": lambda x, s: np.sqrt(x * x + s["delta"] ** 2) - s["delta"],
}


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _real(text: Any) -> float:
    return float.fromhex(text)


def _activation(node: Node, _tensors: dict[str, Array], x: list[Array]) -> Array:
    need(node["name"] in _ACTIVATIONS, f"the activation {node['name']!r} cannot be replayed here")
    settings = {key: _real(value) for key, value in node.items() if key not in {"op", "in", "name", "bound"}}
    return _ACTIVATIONS[node["name"]](x[0], settings)


def _linear(node: Node, tensors: dict[str, Array], x: list[Array]) -> Array:
    weight = tensors[node["weight"]]
    y = x[0] @ (weight if node["transposed"] else weight.T)
    return y if node["bias"] is None else y + tensors[node["bias"]]


def _conv(node: Node, tensors: dict[str, Array], x: list[Array]) -> Array:
    need(not node["transposed"], "a transposed convolution cannot be replayed here")
    weight, mode = tensors[node["weight"]], "wrap" if node["padding_mode"] == "circular" else "constant"
    image = np.pad(x[0], [(0, 0), (0, 0), *((p, p) for p in node["padding"])], mode=mode)  # type: ignore[call-overload]
    windows = _windows(image, weight.shape[2:], node["stride"], node["dilation"])
    parts = []
    for part, kernel in zip(np.split(windows, node["groups"], 1), np.split(weight, node["groups"]), strict=True):
        axes = [1, *range(part.ndim - node["dims"], part.ndim)]
        parts.append(np.moveaxis(np.tensordot(part, kernel, (axes, list(range(1, kernel.ndim)))), -1, 1))
    y: Array = np.concatenate(parts, axis=1)
    return y if node["bias"] is None else y + tensors[node["bias"]].reshape(-1, *[1] * node["dims"])


def _windows(image: Array, kernel: tuple[int, ...], stride: list[int], dilation: list[int]) -> Array:
    """Return (batch, channels, *places, *kernel)."""
    dims = len(kernel)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(image, spans, axis=tuple(range(2, 2 + dims)))  # type: ignore[call-overload]
    return windows[(..., *(slice(None, None, s) for s in stride), *(slice(None, None, d) for d in dilation))]


def _affine(node: Node, tensors: dict[str, Array], x: list[Array]) -> Array:
    y, trailing = x[0], x[0].ndim - 2 if node["axis"] == 0 else 0
    for key in ("scale", "bias"):
        if node[key] is not None:
            values = tensors[node[key]].reshape(*tensors[node[key]].shape, *[1] * trailing)
            y = y * values if key == "scale" else y + values
    return y


def _pool(node: Node, _tensors: dict[str, Array], x: list[Array]) -> Array:
    empty = -np.inf if node["name"] == "max" else 0.0
    image = np.pad(x[0], [(0, 0), (0, 0), *((p, p) for p in node["padding"])], constant_values=empty)
    windows, axes = (
        _windows(image, tuple(node["kernel"]), node["stride"], [1] * node["dims"]),
        tuple(range(-node["dims"], 0)),
    )
    return windows.max(axis=axes) if node["name"] == "max" else windows.mean(axis=axes)


def _groupsort(node: Node, _tensors: dict[str, Array], x: list[Array]) -> Array:
    axis = 1 if node["axis"] == 0 else x[0].ndim - 1
    moved = np.moveaxis(x[0], axis, -1)
    grouped = np.sort(moved.reshape(*moved.shape[:-1], -1, node["group_size"]), axis=-1)
    return np.moveaxis(grouped.reshape(moved.shape), -1, axis)


def _sum(node: Node, _tensors: dict[str, Array], x: list[Array]) -> Array:
    total: Array = np.zeros_like(x[0])
    for factor, value in zip(node["factors"], x, strict=True):
        total = total + _real(factor) * value
    return total


def _slice(node: Node, _tensors: dict[str, Array], x: list[Array]) -> Array:
    return x[0][(slice(None),) * (node["axis"] + 1) + (slice(node["start"], node["stop"]),)]


def _euler(node: Node, tensors: dict[str, Array], x: list[Array]) -> Array:
    need(node["operator"]["op"] == "linear" and node["free"] is None, "this block cannot be replayed here")
    value, weight = x[0], tensors[node["operator"]["weight"]]
    units = 1.0 if node["steps"] is None else tensors[node["steps"]]
    for _ in range(node["times"]):
        hidden = _activation(node["activation"], tensors, [_linear(node["operator"], tensors, [value])])
        moved = 0.0 if node["skew"] is None else value @ tensors[node["skew"]].T
        value = _real(node["decay"]) * value + moved - _real(node["step"]) * ((units * hidden) @ weight)
    return value


_OPERATIONS: dict[str, Run] = {
    "linear": _linear,
    "conv": _conv,
    "affine": _affine,
    "scale": lambda node, _, x: x[0] * _real(node["factor"]),
    "activation": _activation,
    "groupsort": _groupsort,
    "pool": _pool,
    "reshape": lambda node, _, x: x[0].reshape(len(x[0]), *node["shape"]),
    "permute": lambda node, _, x: x[0].transpose(0, *(axis + 1 for axis in node["order"])),
    "pad": lambda node, _, x: np.pad(x[0], [(0, 0), *zip(node["before"], node["after"], strict=True)]),
    "slice": _slice,
    "take": lambda node, _, x: np.take(x[0], node["index"], axis=node["axis"] + 1),
    "mean": lambda node, _, x: x[0].mean(axis=node["axis"] + 1),
    "center": lambda _node, _, x: x[0] - x[0].mean(axis=-1, keepdims=True),
    "sum": _sum,
    "concat": lambda node, _, x: np.concatenate(x, axis=node["axis"] + 1),
    "euler": _euler,
}


def evaluate(nodes: list[Node], tensors: dict[str, Array], x: Array) -> Array:
    """Run a program, as it is in the file, on a batch."""
    values = [x]
    for node in nodes:
        need(node["op"] in _OPERATIONS, f"the operation {node['op']!r} cannot be replayed here")
        values.append(_OPERATIONS[node["op"]](node, tensors, [values[number] for number in node["in"]]))
    return values[-1]


def data_digest(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> str:
    """Return the digest of a data set: that of its dtype, its shape, and the digests of inputs and labels."""
    head = {"dtype": str(x.dtype), "shape": list(x.shape[1:])}
    for name, values in (("inputs", x), ("labels", y.astype("<i8"))):
        head[name] = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def replay(certificate: bytes, weights: bytes, data: bytes) -> list[str]:
    """Repeat the replayable claims of a checked certificate on a data set, an npz file with arrays x and y; return a line for each.

    Raises:
        RejectedError: if a count differs, if no claim is about these data, or if an operation is not among those known here.
    """
    predicate = parse_json(certificate)["predicate"]
    tensors = {key: to_float64(*entry) for key, entry in parse_weights(weights).items()}
    need(zipfile.is_zipfile(io.BytesIO(data)), "the data are no npz file")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        need({"x", "y"} <= set(arrays.files), "the data need arrays x and y")
        try:
            x, y = arrays["x"], arrays["y"]
        except ValueError:  # the words of numpy suggest to load pickles
            raise RejectedError("the data need plain arrays of numbers") from None
    need(x.dtype.kind == "f" and y.dtype.kind in "iu" and len(y), "the data need floating x and integer labels y")
    ours = [c for c in predicate["claims"]["replayable"] if c.get("dataset_sha256") == data_digest(x, y)]
    need(ours, "no replayable claim is about these data")
    need(
        x.shape[1:] == tuple(predicate["input"]["shape"]) and y.shape == x.shape[:1],
        "the data do not fit the input shape",
    )
    with np.errstate(all="ignore"):
        pieces = np.array_split(x.astype(np.float64), max(1, len(x) // _ROWS))
        logits = np.concatenate([evaluate(predicate["graph"], tensors, piece) for piece in pieces])
    need(0 <= y.min() <= y.max() < logits.shape[-1], "a label is no class")
    need(logits.ndim == 2 and np.isfinite(logits).all(), "the outputs are no finite logits")
    return [_compared(claim, predicate, logits, y.astype(np.int64)) for claim in ours]


def _compared(claim: Node, predicate: Node, logits: Array, y: npt.NDArray[np.int64]) -> str:
    """Count again, with margins moved by the tolerance in both directions; the claimed count must lie between."""
    if claim["runtime"] != "real arithmetic":
        return f"{claim['id']} in {claim['runtime']}: not repeated, this is float64"
    rows = np.arange(len(y))
    margins = logits[rows, y][:, None] - logits
    margins[rows, y] = np.inf
    limits: Any = 0.0
    if claim["id"] == "certified_accuracy":
        need(claim["norm"] == predicate["input"]["metric"], "radii in another norm cannot be replayed here")
        table = next((c["L"] for c in predicate["claims"]["proved"] if c["id"] == "margin_constants"), None)
        need(table is not None, "without margin constants nothing can be replayed here")
        limits = _real(claim["eps"]) * np.array([[_real(value) for value in row] for row in table or []])[y]
    room = _TOLERANCE * (1.0 + np.abs(logits).max())
    low, high = (int((margins > limits + side * room).all(axis=1).sum()) for side in (1, -1))
    what = f"{claim['id']}{' at ' + repr(_real(claim['eps'])) if 'eps' in claim else ''}"
    if claim.get("count") != len(y) or not low <= claim["passed"] <= high:
        raise RejectedError(
            f"{what}: claimed {claim['passed']} of {claim.get('count')}, repeated {low} to {high} of {len(y)}"
        )
    return f"replayed: {what}: {claim['passed']} of {len(y)}"
