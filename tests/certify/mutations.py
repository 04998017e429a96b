"""Thousands of ways to tamper with a certificate: its JSON, field by field and byte by byte, and the bytes of its weights."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.certify.random_programs import Draft, Sample, document, safetensors, shifted
from tests.certify.second_verifier import constants

__all__ = ["Mutation", "bases", "json_mutations", "text_mutations", "weight_mutations"]

Path = tuple[Any, ...]
IMAGE_SEED = 26
"""With this one there are circular, grouped and transposed convolutions, a pool and branches."""


@dataclass(frozen=True)
class Mutation:
    """What was done, and the bytes that came out."""

    name: str
    certificate: bytes
    weights: bytes


# ------------------------------------------------------------------------------------------------------ what is tampered with


def _finish(draft: Draft, extra: Callable[[list[float]], list[dict[str, Any]]] = lambda _: []) -> Sample:
    weights = safetensors(draft.tensors)
    totals = [float(k) for k in constants(draft.predicate([]), weights)]
    assert totals[-1] > 0
    claims = [{"id": "lipschitz", "norm": draft.metric, "L": (totals[-1] * (1 + 1e-9)).hex()}, *extra(totals)]
    return Sample(document(draft.predicate(claims), weights), weights)


def _dense(dtype: str) -> Sample:
    """Dense layers with a joint bound, and claims of every kind."""
    draft = Draft(np.random.default_rng(1), "l2", (3,), dtype)
    a, A = draft.add_dense(0, 4, 3)
    b = draft.add("activation", [a], (4,), 1.0, name="leaky_relu", slope=(0.25).hex())
    c, C = draft.add_dense(b, 3, 4)
    t = 0.5 / float(np.linalg.norm(A, 2)) ** 2
    middle = t * np.eye(4) - t * t / 4 * A @ A.T
    bound = float(np.sqrt(np.linalg.eigvals(np.linalg.solve(middle, C.T @ C)).real.max()))
    draft.joint.append({"nodes": [0, 1, 2], "multipliers": [[t.hex()] * 4], "bound": (bound * (1 + 1e-3)).hex()})
    d = draft.add("activation", [c], (3,), 1.0, name="tanh")
    e = draft.add("affine", [d], (3,), 2.5, scale=draft.tensor(np.array([0.5, -2.5, 1.0]))[0], bias=None, axis=-1)
    name, E = draft.tensor(draft.rng.standard_normal((3, 3)))
    draft.add(
        "linear", [e], (3,), float(np.linalg.norm(E, 2)), weight=name, bias=draft.tensor(np.ones(3))[0], transposed=True
    )

    def claims(totals: list[float]) -> list[dict[str, Any]]:
        columns = np.linalg.norm(E.T[:, None] - E.T[None], axis=2) * totals[-2] * (1 + 1e-9)
        mu = float(np.linalg.eigvalsh((E + E.T) / 2).max())
        return [
            {"id": "margin_constants", "L": [[float(v).hex() for v in row] for row in columns]},
            {"id": "contraction", "from": 3, "to": 5, "factor": (2.5001).hex()},
            {"id": "forward_exponent", "depth": 6, "rate": (totals[-1] ** (1 / 6) * (1 + 1e-9)).hex()},
            {"id": "lognorm", "node": 5, "mu": (mu + 1e-8).hex()},
        ]

    return _finish(draft, claims)


def _image() -> Sample:
    """Convolutions of all kinds, pools, branches."""
    rng = np.random.default_rng(IMAGE_SEED)
    draft = Draft(rng, "l2", (2, 4, 4), "F32")
    value, ops = 0, [Draft.conv, Draft.groupsort, Draft.pool, Draft.conv, Draft.branches, Draft.layout]
    for op in ops:
        for _ in range(20):
            made = op(draft, value)
            if made is not None:
                value = made
                break
    value = draft.add(
        "reshape", [value], (int(np.prod(draft.shapes[value])),), 1.0, shape=[int(np.prod(draft.shapes[value]))]
    )
    draft.linear(value, 2)
    return _finish(draft)


def _branches(metric: str) -> Sample:
    """Residual sums, concatenations of slices, blocks."""
    rng = np.random.default_rng(5)
    draft = Draft(rng, metric, (2, 4), "F64")
    value = draft.activation(0)
    for op in (Draft.branches, Draft.merge, Draft.euler, Draft.other, Draft.layout, Draft.merge):
        for _ in range(20):
            made = op(draft, value)
            if made is not None and int(np.prod(draft.shapes[made])) <= 24:
                value = made
                break
    draft.linear(value, 3)
    return _finish(draft)


def bases() -> list[Sample]:
    """Certificates that are true."""
    return [_dense("F32"), _dense("BF16"), _image(), _branches("l2"), _branches("linf"), _branches("token_max")]


# --------------------------------------------------------------------------------------------------------------- JSON, by path


def _paths(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    yield at, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*at, key))


def _replaced(root: Any, path: Path, value: Any) -> Any:
    root = copy.deepcopy(root)
    if not path:
        return value
    place = root
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return root


def _without(root: Any, path: Path) -> Any:
    root = copy.deepcopy(root)
    place = root
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return root


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


ANYTHING: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2**39, 2**63, 10**40, 1.0, -0.5, 1e308, "", "x", "../x", [], {}, [1], [[]], _nested(60),
    "0x0.0p+0", "0x1.0p+0", "1.0",
]  # fmt: skip
HEX = [
    "-0x0.0p+0",
    "0x1p+9999",
    "0x1p-9999",
    "0x1.8p-1074",
    "0x2.0p+0",
    "0X1.0P+3",
    "inf",
    "nan",
    "0x1.0p+0 ",
    "0x1p+1_0",
]
NAMES = [
    "relu",
    "abs",
    "gelu",
    "max",
    "avg",
    "circular",
    "zeros",
    "l2",
    "linf",
    "token_max",
    "linear",
    "scale",
    "sum",
    "concat",
]


def _variants(value: Any, tensors: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield other values for a place: of any type, and such as fit it."""
    yield from ((f"= {other!r:.20}", other) for other in ANYTHING)
    if isinstance(value, str) and value.lstrip("-").startswith("0x"):
        for change in (-1e-8, -1e-3, -0.5, -2.0, 0.5):
            yield f"times 1 {change:+}", shifted(value, 0.0, change)
        yield from ((f"= {text}", text) for text in HEX)
    elif isinstance(value, str):
        yield from ((f"= {text}", text) for text in [*NAMES, *tensors, value.upper(), value + " ", value + "\u0000"])
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from ((f"= {n}", n) for n in (value + 1, value - 1, -value, value * 2, float(value), str(value)))
    elif isinstance(value, list):
        yield "reversed", value[::-1]
        yield "longer", [*value, *value[-1:]]
        yield "very long", (value or [1]) * 300
        yield "shorter", value[:-1]
        yield "rotated", [*value[1:], *value[:1]]
    elif isinstance(value, dict):
        yield "an unknown field", {**value, "note": 1}
        yield "every bound doubled", {**value, "bound": "0x1.0p+9"}


def _packed(root: Any) -> bytes:
    return json.dumps(root).encode("utf-8", "surrogatepass")


def json_mutations(sample: Sample) -> Iterator[Mutation]:
    """Change, delete, move and copy every part of the statement."""
    root = sample.document
    graph = root["predicate"]["graph"]
    names = [name for name, _ in sorted(_tensor_names(sample).items())]
    for path, value in _paths(root):
        where = ".".join(map(str, path))
        if path:
            yield Mutation(f"{where} deleted", _packed(_without(root, path)), sample.weights)
        for what, other in _variants(value, names):
            yield Mutation(f"{where} {what}", _packed(_replaced(root, path, other)), sample.weights)
    for i in range(len(graph)):
        for j in range(len(graph)):
            nodes = copy.deepcopy(graph)
            nodes[i], nodes[j] = nodes[j], nodes[i]
            if i < j:
                yield Mutation(f"operations {i} and {j} swapped", _graph(root, nodes), sample.weights)
            nodes = copy.deepcopy(graph)
            nodes.insert(i, nodes[j])
            yield Mutation(f"operation {j} copied to {i}", _graph(root, nodes), sample.weights)
            for key in ("weight", "bias", "bound", "in"):
                if key in graph[i] and key in graph[j] and i < j:
                    nodes = copy.deepcopy(graph)
                    nodes[i][key], nodes[j][key] = nodes[j][key], nodes[i][key]
                    yield Mutation(f"{key} of {i} and {j} swapped", _graph(root, nodes), sample.weights)


def _graph(root: Any, nodes: list[Any]) -> bytes:
    return _packed(_replaced(root, ("predicate", "graph"), nodes))


def _tensor_names(sample: Sample) -> dict[str, Any]:
    size = int.from_bytes(sample.weights[:8], "little")
    return json.loads(sample.weights[8 : 8 + size])


def text_mutations(sample: Sample, rng: np.random.Generator, count: int) -> Iterator[Mutation]:
    """Other encodings, duplicate keys, trailing bytes, constants, truncations, and random bytes."""
    text = sample.certificate
    yield from (
        Mutation(name, data, sample.weights)
        for name, data in [
            ("byte order mark", b"\xef\xbb\xbf" + text),
            ("UTF-16", text.decode().encode("utf-16")),
            ("UTF-32", text.decode().encode("utf-32")),
            ("UTF-7", b"+AHsAfQ-"),
            ("bad UTF-8", text.replace(b"R^n", b"R^\xff")),
            ("overlong UTF-8", text.replace(b"R^n", b"R\xc1\x9en")),
            ("trailing brace", text + b"}"),
            ("trailing NUL", text + b"\0"),
            ("second document", text + text),
            ("comment", text.replace(b"{", b"{/* */", 1)),
            ("single quotes", text.replace(b'"', b"'")),
            ("trailing comma", text[:-1] + b",}"),
            ("NaN", text.replace(b'"schema": 2', b'"schema": NaN')),
            ("Infinity", text.replace(b'"schema": 2', b'"schema": 2, "x": Infinity')),
            ("huge exponent", text.replace(b'"schema": 2', b'"schema": 2e0')),
            ("huge number", text.replace(b'"schema": 2', b'"schema": 2, "x": ' + b"9" * 5000)),
            ("infinite number", text.replace(b'"schema": 2', b'"schema": 2, "x": 1e99999')),
            ("lone surrogate", text.replace(b"R^n", b"\\ud800")),
            ("deep", text.replace(b'"schema": 2', b'"schema": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000)),
            ("deep objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
            ("empty", b""),
            ("spaces", b" " * 1000),
            ("nothing", b"null"),
        ]
    )
    for key in (
        b'"schema"',
        b'"graph"',
        b'"bound"',
        b'"L"',
        b'"_type"',
        b'"weight"',
        b'"op"',
        b'"sha256"',
        b'"claims"',
    ):
        places = [i for i in range(len(text)) if text.startswith(key + b": ", i)]
        for place in places[:6]:
            copy_ = text[:place] + key + b': "0x1.0p+9", ' + text[place:]
            yield Mutation(f"duplicate {key.decode()} at {place}", copy_, sample.weights)
    for size in rng.integers(0, len(text), count // 10):
        yield Mutation(f"cut at {size}", text[:size], sample.weights)
    for index in range(count):
        data = bytearray(text)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.choice(list(b'0123456789abcdef-+.px{}[]":, \x00\xff'))
        yield Mutation(f"random bytes {index}", bytes(data), sample.weights)


# -------------------------------------------------------------------------------------------------------------------- weights


def signed(sample: Sample, weights: bytes) -> bytes:
    """Return the certificate with the digest of other weights."""
    digest = hashlib.sha256(weights).hexdigest()
    return _packed(_replaced(sample.document, ("subject", 0, "digest", "sha256"), digest))


def _with_header(sample: Sample, header: Any) -> bytes:
    size = int.from_bytes(sample.weights[:8], "little")
    text = header if isinstance(header, bytes) else _packed(header)
    return len(text).to_bytes(8, "little") + text + sample.weights[8 + size :]


def weight_mutations(sample: Sample, rng: np.random.Generator, count: int) -> Iterator[Mutation]:
    """Flip bits with the digest corrected and not, edit the header, shift, cut and lengthen the file."""
    weights = sample.weights
    start = 8 + int.from_bytes(weights[:8], "little")
    for index in range(count):
        data = bytearray(weights)
        place = int(rng.integers(0 if index % 4 == 0 else start, len(data)))
        data[place] ^= 1 << int(rng.integers(8))
        yield Mutation(f"bit in byte {place}, digest kept", sample.certificate, bytes(data))
        yield Mutation(f"bit in byte {place}, digest corrected", signed(sample, bytes(data)), bytes(data))
    for name, data in _other_files(sample, start):
        yield Mutation(name, signed(sample, data), data)
    header = _tensor_names(sample)
    for path, value in _paths(header):
        if path:
            data = _with_header(sample, _without(header, path))
            yield Mutation(f"header {path} deleted", signed(sample, data), data)
        for what, other in _variants(value, list(header)[:2]):
            data = _with_header(sample, _replaced(header, path, other))
            yield Mutation(f"header {path} {what}", signed(sample, data), data)
    for first in header:
        for second in header:
            swapped = {**header, first: header[second], second: header[first]}
            renamed = {(first + "x" if name == first else name): entry for name, entry in header.items()}
            for name, other in (("swapped", swapped), ("renamed", renamed)):
                data = _with_header(sample, other)
                yield Mutation(f"tensors {first}, {second} {name}", signed(sample, data), data)


def _other_files(sample: Sample, start: int) -> Iterator[tuple[str, bytes]]:
    weights = sample.weights
    header = weights[8:start]
    yield "trailing byte", weights + b"\0"
    yield "padded header", _with_header(sample, header + b"   ")
    yield "header after a space", _with_header(sample, b" " + header)
    yield "header twice", _with_header(sample, header + header)
    yield "byte order mark", _with_header(sample, b"\xef\xbb\xbf" + header)
    yield "empty", b""
    yield "only a length", weights[:8]
    yield "a length of 2^63", (2**63).to_bytes(8, "little") + weights[8:]
    yield "a length of 0", bytes(8) + weights[8:]
    yield "a gap", _with_header(sample, _moved(sample, 4)) + b"\0\0\0\0"
    yield "metadata", _with_header(sample, {"__metadata__": {"a": "b"}, **_tensor_names(sample)})
    yield "metadata of numbers", _with_header(sample, {"__metadata__": {"a": 1}, **_tensor_names(sample)})
    yield "a duplicate tensor", _with_header(sample, header[:-1] + b"," + header[1:])
    for size in (1, 7, 9, start - 1, start, start + 1, len(weights) - 1, len(weights) // 2):
        yield f"cut at {size}", weights[:size]


def _moved(sample: Sample, by: int) -> dict[str, Any]:
    return {
        name: {**entry, "data_offsets": [o + by for o in entry["data_offsets"]]}
        for name, entry in _tensor_names(sample).items()
    }
