"""Random certificates written directly as bytes: programs over the operations of the format, claims on both sides of the truth."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.certify.second_reader import RefusedError
from tests.certify.second_verifier import constants

__all__ = ["Draft", "Sample", "document", "pack", "random_certificate", "safetensors"]

Array = np.ndarray[Any, Any]
PREDICATE = "https://stableopt.dev/certificate/v2"
EXCESSES = (1e-10, 1e-9, 3e-9, 1e-8, 1e-6, 1e-3, 1.0, 1e6)


class Sample:
    """The bytes of a certificate and those of its weights; ``lowered`` is the operation whose bound was put below the truth."""

    def __init__(self, document_: dict[str, Any], weights: bytes, lowered: str = "") -> None:
        self.document, self.weights, self.lowered = document_, weights, lowered
        self.certificate = json.dumps(document_).encode()


def pack(kind: str, values: Array) -> tuple[bytes, Array]:
    """Return the bytes of an array in a dtype of safetensors, and the numbers that they stand for."""
    flat = np.ascontiguousarray(values, dtype=np.float64)
    if kind == "BF16":
        bits = (flat.astype("<f4").view("<u4") >> 16).astype("<u2")
        return bits.tobytes(), (bits.astype("<u4") << 16).view("<f4").astype(float).reshape(flat.shape)
    stored = flat.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[kind])
    return stored.tobytes(), stored.astype(float)


def safetensors(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """Write a file of tensors (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def document(predicate: dict[str, Any], weights: bytes) -> dict[str, Any]:
    """Wrap a predicate in its statement."""
    subject = {"name": "model.safetensors", "digest": {"sha256": hashlib.sha256(weights).hexdigest()}}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [subject],
        "predicateType": PREDICATE,
        "predicate": predicate,
    }


class Draft:
    """A program under construction, with honest bounds."""

    def __init__(self, rng: np.random.Generator, metric: str, shape: tuple[int, ...], dtype: str = "F64") -> None:
        self.rng, self.metric, self.dtype = rng, metric, dtype
        self.shapes = [shape]
        self.nodes: list[dict[str, Any]] = []
        self.joint: list[dict[str, Any]] = []
        self.tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        self.values: dict[str, Array] = {}
        self.input = {"shape": list(shape), "metric": metric, "domain": "R^n"}

    def tensor(self, values: Array) -> tuple[str, Array]:
        name = f"t{len(self.tensors)}"
        data, stored = pack(self.dtype, values)
        self.tensors[name] = (self.dtype, values.shape, data)
        self.values[name] = stored
        return name, stored

    def add(self, op: str, inputs: list[int], result: tuple[int, ...], truth: float | None, **fields: Any) -> int:
        node = {"op": op, "in": inputs, **fields}
        if truth is not None:
            node["bound"] = above(truth, 1e-6)
        self.nodes.append(node)
        self.shapes.append(result)
        return len(self.nodes)

    def predicate(self, claims: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "schema": 2, "producer": {}, "input": self.input, "graph": self.nodes, "joint": self.joint,
            "claims": {"proved": claims, "replayable": [], "attested": []},
            "runtime": {}, "assumptions": [], "not_claimed": [],
        }  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- operations

    def weight(self, *shape: int) -> tuple[str, Array]:
        rng, size = self.rng, (shape[0], math.prod(shape[1:]))
        A = rng.standard_normal(size)
        kind = rng.choice(["gauss", "gauss", "rank1", "zero", "constant", "sparse", "columns", "single", "orthogonal"])
        if kind == "rank1":
            A = np.outer(A[:, 0], A[0])
        elif kind == "zero":
            A = np.zeros(size)
        elif kind == "constant":
            A = np.full(size, 0.1)
        elif kind == "sparse":
            A *= rng.random(size) < 0.4
        elif kind == "columns":
            A *= 10.0 ** (rng.integers(-12, 12, size[1]) if self.dtype != "F16" else rng.integers(-2, 2, size[1]))
        elif kind == "single":
            A *= 0
            A[rng.integers(size[0]), rng.integers(size[1])] = -3.0
        elif kind == "orthogonal":
            A = np.linalg.qr(rng.standard_normal((max(size),) * 2))[0][: size[0], : size[1]]
        power = rng.choice([0, 0, rng.integers(-20, 20)]) if self.dtype != "F16" else rng.integers(-2, 2)
        return self.tensor((A * 10.0**power).reshape(shape))

    def matrix_norm(self, A: Array) -> float:
        return float(np.abs(A).sum(axis=1).max()) if self.metric == "linf" else float(np.linalg.norm(A, 2))

    def bias(self, size: int) -> str | None:
        return self.tensor(self.rng.standard_normal(size))[0] if self.rng.random() < 0.5 else None

    def linear(self, v: int, out: int | None = None) -> int:
        shape, turned = self.shapes[v], bool(self.rng.integers(2))
        out = out or int(self.rng.integers(1, 9))
        size = (shape[-1], out) if turned else (out, shape[-1])
        name, A = self.weight(*size)
        truth = self.matrix_norm(A.T if turned else A)
        return self.add("linear", [v], (*shape[:-1], out), truth, weight=name, bias=self.bias(out), transposed=turned)

    def conv(self, v: int) -> int | None:
        rng, (channels, *image) = self.rng, self.shapes[v]
        dims = len(image)
        groups = int(rng.choice([g for g in (1, 2, 3) if channels % g == 0]))
        out, turned = groups * int(rng.integers(1, 3)), bool(rng.random() < 0.3)
        mode = "circular" if not turned and rng.random() < 0.4 else "zeros"
        kernel, dilation, stride = (rng.integers(1, top, dims).tolist() for top in (4, 3, 4))
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        limits = [min(s // 2, n) if mode == "circular" else min(s, n) for s, n in zip(spans, image, strict=True)]
        padding, extra = [int(rng.integers(0, t + 1)) for t in limits], [0] * dims
        if turned:
            extra = [int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True)]
            sizes = [
                (n - 1) * s - 2 * p + w + 1 + e
                for n, s, p, w, e in zip(image, stride, padding, spans, extra, strict=True)
            ]
        else:
            sizes = [(n + 2 * p - w - 1) // s + 1 for n, p, w, s in zip(image, padding, spans, stride, strict=True)]
        if min(sizes) < 1 or out * math.prod(sizes) > 40:
            return None
        first, second = (channels, out // groups) if turned else (out, channels // groups)
        name, W = self.weight(first, second, *kernel)
        fields = {
            "dims": dims, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
            "padding_mode": mode, "transposed": turned, "output_padding": extra,
        }  # fmt: skip
        truth = (
            row_law(W, groups, turned)
            if self.metric == "linf"
            else riesz(W, groups, stride, dilation, mode == "circular")
        )
        return self.add("conv", [v], (out, *sizes), truth, weight=name, bias=self.bias(out), **fields)

    def affine(self, v: int) -> int:
        shape, axis = self.shapes[v], int(self.rng.choice([0, -1]))
        size = shape[axis]
        scale, values = self.weight(size, 1) if self.rng.random() < 0.7 else (None, np.ones((1, 1)))
        if scale is not None:
            kind, _, data = self.tensors[scale]
            self.tensors[scale] = (kind, (size,), data)
        bias = self.bias(size)
        return self.add("affine", [v], shape, float(np.abs(values).max()), scale=scale, bias=bias, axis=axis)

    def scale(self, v: int) -> int:
        factor = float(self.rng.standard_normal() * 10.0 ** self.rng.integers(-3, 3))
        return self.add("scale", [v], self.shapes[v], abs(factor), factor=factor.hex())

    def activation(self, v: int) -> int:
        name, settings, truth = ACTIVATIONS[self.rng.integers(len(ACTIVATIONS))]
        return self.add(
            "activation", [v], self.shapes[v], truth, name=name, **{k: x.hex() for k, x in settings.items()}
        )

    def groupsort(self, v: int) -> int | None:
        shape = self.shapes[v]
        axis = -1 if self.metric == "token_max" else int(self.rng.choice([0, -1]))
        sizes = [g for g in (2, 3, 4) if shape[axis] % g == 0]
        return (
            self.add("groupsort", [v], shape, 1.0, group_size=int(self.rng.choice(sizes)), axis=axis) if sizes else None
        )

    def pool(self, v: int) -> int | None:
        rng, (channels, *image) = self.rng, self.shapes[v]
        kernel, stride = (rng.integers(1, 4, len(image)).tolist() for _ in range(2))
        padding = [int(rng.integers(0, k // 2 + 1)) for k in kernel]
        sizes = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(image, padding, kernel, stride, strict=True)]
        name = str(rng.choice(["avg", "max"]))
        if min(sizes) < 1:
            return None
        windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
        truth = 1.0 if self.metric == "linf" else math.sqrt(windows / (math.prod(kernel) if name == "avg" else 1))
        fields = {"dims": len(image), "kernel": kernel, "stride": stride, "padding": padding}
        return self.add("pool", [v], (channels, *sizes), truth, name=name, **fields)

    def layout(self, v: int) -> int | None:
        rng, shape = self.rng, self.shapes[v]
        kind = rng.choice(["reshape", "permute", "pad", "slice", "mean"])
        if kind == "reshape":
            total, token = math.prod(shape), self.metric == "token_max"
            options = [(total,), (total // shape[-1], shape[-1]), (1, *shape), (shape[-1], total // shape[-1])]
            new = options[rng.integers(1, 3) if token else rng.integers(4)]
            return self.add("reshape", [v], new, 1.0, shape=list(new))
        if kind == "permute":
            order = rng.permutation(len(shape)).tolist()
            if self.metric == "token_max":
                order = [*(a for a in order if a < len(shape) - 1), len(shape) - 1]
            return self.add("permute", [v], tuple(shape[a] for a in order), 1.0, order=order)
        if kind == "pad":
            before, after = (rng.integers(0, 2, len(shape)).tolist() for _ in range(2))
            new = tuple(n + b + a for n, b, a in zip(shape, before, after, strict=True))
            return self.add("pad", [v], new, 1.0, before=before, after=after) if math.prod(new) < 40 else None
        axis = int(rng.integers(len(shape)))
        if kind == "slice":
            start = int(rng.integers(shape[axis]))
            stop = int(rng.integers(start + 1, shape[axis] + 1))
            new = (*shape[:axis], stop - start, *shape[axis + 1 :])
            return self.add("slice", [v], new, 1.0, axis=axis, start=start, stop=stop)
        if len(shape) < 2 or (self.metric == "token_max" and axis == len(shape) - 1):
            return None
        truth = 1 / math.sqrt(shape[axis]) if self.metric == "l2" else 1.0
        return self.add("mean", [v], (*shape[:axis], *shape[axis + 1 :]), truth, axis=axis)

    def merge(self, v: int) -> int:
        """Add or join the value with another one of its shape (itself, if there is no other)."""
        shape = self.shapes[v]
        same = [u for u, s in enumerate(self.shapes) if s == shape]
        others = [int(self.rng.choice(same)) for _ in range(self.rng.integers(1, 3))]
        if self.rng.random() < 0.5 or math.prod(shape) > 12:
            factors = [float(f).hex() for f in self.rng.standard_normal(len(others) + 1)]
            return self.add("sum", [v, *others], shape, None, factors=factors)
        axis = int(self.rng.integers(len(shape)))
        size = shape[axis] * (len(others) + 1)
        return self.add("concat", [v, *others], (*shape[:axis], size, *shape[axis + 1 :]), None, axis=axis)

    def branches(self, v: int) -> int | None:
        """Cut the value into two slices (sometimes overlapping), treat each on its own, and join them again."""
        shape = self.shapes[v]
        axis = int(self.rng.integers(len(shape)))
        if shape[axis] < 2:
            return None
        cut = int(self.rng.integers(1, shape[axis]))
        overlap = int(self.rng.random() < 0.3)
        parts = []
        for start, stop in ((0, min(cut + overlap, shape[axis])), (cut, shape[axis])):
            size = (*shape[:axis], stop - start, *shape[axis + 1 :])
            part = self.add("slice", [v], size, 1.0, axis=axis, start=start, stop=stop)
            parts.append(self.affine(part) if self.rng.random() < 0.5 else self.activation(part))
        size = sum(self.shapes[p][axis] for p in parts)
        return self.add("concat", parts, (*shape[:axis], size, *shape[axis + 1 :]), None, axis=axis)

    def other(self, v: int) -> int:
        shape = self.shapes[v]
        kind = self.rng.choice(["take", "standardize", "softmax", "center", "bounded_norm"])
        n, token, large = shape[-1], self.metric == "token_max", self.metric == "linf"
        if kind == "take":
            axis = int(self.rng.integers(len(shape)))
            index = self.rng.integers(0, shape[axis], int(self.rng.integers(1, shape[axis] + 2))).tolist()
            free = large or (token and axis < len(shape) - 1)
            truth = 1.0 if free else math.sqrt(max(index.count(i) for i in index))
            return self.add("take", [v], (*shape[:axis], len(index), *shape[axis + 1 :]), truth, axis=axis, index=index)
        if kind == "standardize":
            eps, centered = 10.0 ** -self.rng.integers(1, 6), bool(self.rng.integers(2))
            whole = (2 * (n - 1) / n if centered else 1) + math.sqrt((n - 1) / 27) if large else 1.0
            return self.add("standardize", [v], shape, whole / math.sqrt(eps), eps=float(eps).hex(), centered=centered)
        if kind == "softmax":
            return self.add("softmax", [v], shape, 0.5, axis=len(shape) - 1)
        if kind == "center":
            return self.add("center", [v], shape, 2 * (n - 1) / n if large else 1.0)
        truth = 1 + math.sqrt((n - 1) / 27) if large else 1.0
        return self.add("bounded_norm", [v], shape, truth, radius=(2.0).hex())

    def euler(self, v: int) -> int | None:
        shape = self.shapes[v]
        if self.metric == "linf":
            return self.infinity(v)
        width, d = int(self.rng.integers(1, 5)), shape[-1]
        name, A = self.weight(width, d)
        steps, weights = (None, np.ones(width)) if self.rng.random() < 0.5 else self.tensor(self.rng.random(width))
        norm = float(np.linalg.norm(np.sqrt(weights)[:, None] * A, 2))
        operator = {
            "op": "linear",
            "weight": name,
            "bias": self.bias(width),
            "transposed": False,
            "bound": above(norm, 1e-6),
        }
        size = float.fromhex(operator["bound"])
        step = float(self.rng.choice([0.0, 1.0, 2.5])) / size**2 if 1e-9 < size < 1e9 else 0.5
        skew, k, times = None, 0.0, int(self.rng.integers(1, 4))
        if self.rng.random() < 0.5:
            S = self.rng.standard_normal((d, d))
            skew, K = self.tensor(S - S.T)
            k = float.fromhex(above(float(np.linalg.norm(K, 2)), 1e-6))
        decay, a = float(self.rng.choice([1.0, 0.9, -1.0])), step * size**2
        factor = math.hypot(decay - a / 2, k) + a / 2
        if factor > 1e30:
            return None
        sigma = {"op": "activation", "name": str(self.rng.choice(["relu", "tanh", "softplus"]))}
        if sigma["name"] == "softplus":
            sigma["beta"] = (1.0).hex()
        fields = {
            "operator": operator, "steps": steps, "step": step.hex(), "decay": decay.hex(), "skew": skew, "free": None,
            "skew_bound": None if skew is None else k.hex(), "activation": sigma, "times": times,
        }  # fmt: skip
        return self.add("euler", [v], shape, factor**times, **fields)

    def infinity(self, v: int) -> int:
        shape, rng = self.shapes[v], self.rng
        n, c, times = shape[-1], float(rng.random()), int(rng.integers(1, 4))
        name, A = self.tensor(rng.standard_normal((n, n)))
        steps, t = self.tensor(rng.random(n))
        own = np.diag(A)
        rest = np.abs(A).sum(axis=1) - np.abs(own)
        factor = float(np.maximum(np.abs(1 - t * c), np.abs(1 - t * c + t * own) + t * rest).max())
        operator = {"op": "linear", "weight": name, "bias": self.bias(n), "transposed": False}
        sigma = {"op": "activation", "name": "relu"}
        fields = {"operator": operator, "steps": steps, "decay": c.hex(), "activation": sigma, "times": times}
        return self.add("infinity", [v], shape, factor**times, **fields)

    def chain(self, v: int) -> int:
        """Two dense layers with a joint bound."""
        width, d, out = self.rng.integers(1, 4, 3).tolist()[0], self.shapes[v][-1], int(self.rng.integers(1, 4))
        a = self.add_dense(v, width, d)
        b = self.add("activation", [a[0]], self.shapes[a[0]], 1.0, name="relu")
        c = self.add_dense(b, out, width)
        size = max(float(np.linalg.norm(a[1], 2)), 1e-30)
        t = 2.0 / size**2
        middle = t * np.eye(width) - t * t / 4 * a[1] @ a[1].T
        bound = math.sqrt(float(np.linalg.eigvals(np.linalg.solve(middle, c[1].T @ c[1])).real.max()))
        entry = {"nodes": [a[0] - 1, b - 1, c[0] - 1], "multipliers": [[t.hex()] * width], "bound": above(bound, 1e-3)}
        self.joint.append(entry)
        return c[0]

    def add_dense(self, v: int, out: int, width: int) -> tuple[int, Array]:
        name, A = self.tensor(self.rng.standard_normal((out, width)))
        shape = (*self.shapes[v][:-1], out)
        return self.add("linear", [v], shape, float(np.linalg.norm(A, 2)), weight=name, bias=None, transposed=False), A


ACTIVATIONS: list[tuple[str, dict[str, float], float]] = [
    ("identity", {}, 1), ("relu", {}, 1), ("abs", {}, 1), ("tanh", {}, 1), ("softplus", {"beta": 2.0}, 1),
    ("hardtanh", {"min": -0.5, "max": 2.0}, 1), ("leaky_relu", {"slope": -1.5}, 1.5), ("leaky_relu", {"slope": 0.1}, 1),
    ("sigmoid", {}, 0.25), ("elu", {"alpha": 1.3}, 1.3), ("gelu", {}, 1.129), ("silu", {}, 1.1),
]  # fmt: skip


def above(truth: float, excess: float) -> str:
    return float(truth * (1 + excess)).hex()


def row_law(W: Array, groups: int, turned: bool) -> float:
    taps = np.abs(W).reshape(groups, W.shape[0] // groups, W.shape[1], -1).sum(axis=3)
    return float(taps.sum(axis=1 if turned else 2).max())


def riesz(W: Array, groups: int, stride: list[int], dilation: list[int], circular: bool) -> float:
    """An upper bound for every image size that any method of the specification reaches: the symbol on 8 k points, no polyphase."""
    kernel = W.shape[2:]
    sizes = [8 * k if k > 1 else 1 for k in kernel]
    secants = math.prod(1 / math.cos(math.pi * (k - 1) / 2 / n) for k, n in zip(kernel, sizes, strict=True))
    symbol = np.fft.fftn(W.reshape(groups, -1, *W.shape[1:]), sizes, axes=tuple(range(3, 3 + len(kernel))))
    matrices = np.moveaxis(symbol.reshape(*symbol.shape[:3], -1), 3, 1)
    return float(np.linalg.norm(matrices, 2, axis=(2, 3)).max()) * secants


BUILDERS: list[Callable[[Draft, int], int | None]] = [
    Draft.linear, Draft.linear, Draft.conv, Draft.conv, Draft.affine, Draft.scale, Draft.activation, Draft.groupsort, Draft.pool,
    Draft.layout, Draft.layout, Draft.merge, Draft.branches, Draft.other, Draft.euler, Draft.chain,
]  # fmt: skip


def random_draft(rng: np.random.Generator, available: set[str]) -> Draft:
    metric = str(rng.choice(["l2", "l2", "linf", "token_max"]))
    dims = int(rng.integers(1, 4))
    shape = tuple(rng.integers(1, (9, 5, 4)[dims - 1], dims).tolist())
    draft = Draft(rng, metric, shape, str(rng.choice(["F64", "F64", "F32", "F16", "BF16"])))
    value: int = 0
    for _ in range(rng.integers(1, 5)):
        build = BUILDERS[rng.integers(len(BUILDERS))]
        images = build in {Draft.conv, Draft.pool}
        if images and (metric == "token_max" or len(draft.shapes[value]) not in {2, 3, 4}):
            continue
        if (build is Draft.chain and metric == "linf") or math.prod(draft.shapes[value]) > 40:
            continue
        before = copy.deepcopy((draft.shapes, draft.nodes, draft.joint, draft.tensors))
        value = build(draft, value) or value
        if not {n["op"] for n in draft.nodes} <= available or any(math.prod(s) > 64 for s in draft.shapes):
            draft.shapes, draft.nodes, draft.joint, draft.tensors = before
            value = len(draft.nodes)
    if not draft.nodes:
        draft.linear(0)
    return draft


def random_certificate(rng: np.random.Generator, available: set[str]) -> Sample:
    """Draw a program; raise each bound by some excess above the truth, and in half of the cases lower one of them below it."""
    while True:
        draft = random_draft(rng, available)
        weights = safetensors(draft.tensors)
        try:
            with np.errstate(all="ignore"):
                total = [float(k) for k in constants(draft.predicate([]), weights)]
        except RefusedError:  # an excess of 1e-6 was lost in an underflow, or the value before is not used
            continue
        if all(math.isfinite(k) for k in total):
            break
    lower = rng.random() < 0.5
    places = [(node, "bound") for node in [*draft.nodes, *draft.joint] if "bound" in node]
    for node, key in places:
        node[key] = shifted(node[key], 1e-6, float(rng.choice(EXCESSES[3:])))
    constants_ = _constants(draft, weights) or total
    claims = [
        {"id": "lipschitz", "norm": draft.metric, "L": shifted(constants_[-1].hex(), 0.0, float(rng.choice(EXCESSES)))}
    ]
    claims += _extra_claims(draft, rng, constants_)
    lowered = ""
    if lower:
        places += [(claims[0], "L")]
        node, key = places[rng.integers(len(places))]
        lowered = node.get("op", "claim")
        node[key] = shifted(node[key], 0.0, -float(rng.choice([1e-9, 1e-8, 1e-6, 1e-3, 0.5])))
    return Sample(document(draft.predicate(claims), weights), weights, lowered)


def _constants(draft: Draft, weights: bytes) -> list[float] | None:
    try:
        values = [float(k) for k in constants(draft.predicate([]), weights)]
    except RefusedError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _extra_claims(draft: Draft, rng: np.random.Generator, totals: list[float]) -> list[dict[str, Any]]:
    claims, excess = [], float(rng.choice([-1e-6, 1e-8, 1e-3]))
    if rng.random() < 0.3:
        factor = shifted(totals[-1].hex(), 0.0, abs(excess))
        claims.append({"id": "contraction", "from": 0, "to": len(draft.nodes), "factor": factor})
    if rng.random() < 0.2:
        depth = int(rng.integers(1, len(draft.nodes) + 1))
        claims.append(
            {"id": "forward_exponent", "depth": depth, "rate": (totals[-1] ** (1 / depth) * (1 + excess)).hex()}
        )
    last = draft.nodes[-1]
    if last["op"] == "linear" and len(draft.shapes[-1]) == 1 and rng.random() < 0.5:
        rows = draft.values[last["weight"]]
        rows = rows.T if last["transposed"] else rows
        order = 1 if draft.metric == "linf" else 2
        size = np.linalg.norm(rows[:, None] - rows[None], order, axis=2) * totals[last["in"][0]] * (1 + excess)
        if np.isfinite(size).all():
            claims.append({"id": "margin_constants", "L": [[float(v).hex() for v in row] for row in size]})
    for index, node in enumerate(draft.nodes):
        if node["op"] == "linear" and draft.metric != "linf" and rng.random() < 0.5:
            A = draft.values[node["weight"]]
            if A.shape[0] == A.shape[1]:
                top = float(np.linalg.eigvalsh((A + A.T) / 2).max())
                mu = top + excess * float(np.abs(A).max())
                claims.append({"id": "lognorm", "node": index, "mu": mu.hex()})
                break
    return claims


def shifted(text: str, old: float, new: float) -> str:
    value = float.fromhex(text) / (1 + old) * (1 + new)
    return value.hex() if math.isfinite(value) else text
