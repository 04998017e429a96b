"""From bytes to numbers: strict JSON, strict safetensors, hexadecimal floats (docs/soundness.md, S0)."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np

from .numbers import Array, RejectedError, need

__all__ = ["choice", "ints", "number", "parse_json", "parse_weights", "to_float64"]

_MAX_HEADER = 50_000_000
_HEX = re.compile(r"-?0x[01](\.[0-9a-f]{1,13})?p[+-][0-9]{1,4}")
_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def parse_json(data: bytes) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN or Infinity."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(items)) == len(items), "a JSON object has a duplicate key")
        return dict(items)

    def constant(name: str) -> None:
        raise RejectedError(f"the JSON constant {name} is not allowed")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise RejectedError(f"not valid JSON ({type(error).__name__})") from None


def parse_weights(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Parse a safetensors file strictly into name -> (dtype, shape, bytes): no gap, no overlap, no trailing byte."""
    need(len(data) >= 10, "the weight file is too short to be safetensors")
    length = int.from_bytes(data[:8], "little")
    need(length <= min(len(data) - 8, _MAX_HEADER), "the weight file has an impossible header length")
    header = parse_json(data[8 : 8 + length])
    need(isinstance(header, dict) and data[8:9] == b"{", "the weight file has no safetensors header")
    metadata = header.pop("__metadata__", {})
    need(isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()), "bad weight file metadata")
    body, tensors, spans = data[8 + length :], {}, []
    for name, entry in header.items():
        ok = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
        need(ok, f"bad header of tensor {name!r}")
        kind, shape, offsets = entry["dtype"], ints(entry["shape"], 1, name), ints(entry["data_offsets"], 0, name)
        need(isinstance(kind, str) and kind in _WIDTH, f"tensor {name!r} has the unknown dtype {kind!r}")
        need(len(offsets) == 2 and 0 <= offsets[0] < offsets[1] <= len(body), f"tensor {name!r} lies outside the file")
        size = math.prod(shape) * _WIDTH[kind]
        need(size == offsets[1] - offsets[0] and len(shape) <= 32, f"tensor {name!r} has the wrong number of bytes")
        tensors[name] = (kind, shape, body[offsets[0] : offsets[1]])
        spans.append(offsets)
    ends = [0, *(end for _, end in sorted(spans))]
    need([start for start, _ in sorted(spans)] == ends[:-1], "the tensors of the weight file overlap or leave gaps")
    need(ends[-1] == len(body), "the weight file has trailing bytes")
    return tensors


def to_float64(kind: str, shape: tuple[int, ...], data: bytes) -> Array:
    """Convert the stored numbers exactly; NaN and infinity are rejected."""
    if kind == "BF16":  # the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[kind])
    need(np.isfinite(values).all(), "the weights are not finite")
    return values.astype(np.float64).reshape(shape)


def ints(value: Any, least: int, where: str, count: int | None = None) -> tuple[int, ...]:
    """Read a list of integers, each at least the given one, and if wanted of a given length."""
    ok = isinstance(value, list) and all(type(v) is int and least <= v < 2**40 for v in value)
    need(
        ok and count in {None, len(value)},
        f"{where}: expected a list of {'' if count is None else f'{count} '}integers >= {least}",
    )
    return tuple(value)


def choice(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    """Read one of a few values, of the same type."""
    need(any(type(value) is type(c) and value == c for c in choices), f"{where} must be one of {choices}")
    return value


def number(text: Any, where: str, *, signed: bool = False) -> Fraction:
    """Read a finite hexadecimal float exactly."""
    ok = isinstance(text, str) and len(text) < 40 and _HEX.fullmatch(text) and (signed or text[0] != "-")
    ok = ok and -1022 <= int(text.split("p")[1]) <= 1023  # where 13 digits are exact
    need(ok, f"{where} must be a finite hexadecimal float{'' if signed else ' >= 0'}")
    return Fraction(float.fromhex(text))
