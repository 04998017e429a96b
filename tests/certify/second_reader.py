"""A second reader of certificates, written from the format alone: JSON and safetensors to exact numbers.

Nothing here comes from the verifier, from numpy or from the json module, so that the two can only share an error of the format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from flint import fmpq, fmpz

__all__ = ["RefusedError", "Tensor", "parse_json", "parse_real", "parse_weights"]


class RefusedError(Exception):
    """What is not provably true."""


@dataclass(frozen=True)
class Tensor:
    """Exact numbers: entry i is integers[i] * 2^exponent, in row-major order."""

    shape: tuple[int, ...]
    integers: list[int]
    exponent: int

    @property
    def unit(self) -> fmpq:
        return power_of_two(self.exponent)

    def rows(self) -> list[list[int]]:
        width = self.shape[-1]
        return [self.integers[i : i + width] for i in range(0, len(self.integers), width)]


def power_of_two(exponent: int) -> fmpq:
    return fmpq(1 << exponent, 1) if exponent >= 0 else fmpq(1, 1 << -exponent)


_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS = {"true": True, "false": False, "null": None}


class _Json:
    """Recursive descent over RFC 8259; each method returns a value and the position after it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def skip(self, at: int) -> int:
        found = _SPACE.match(self.text, at)
        return found.end() if found else at

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        at = self.skip(at)
        if depth > 100 or at >= len(self.text):
            raise RefusedError("JSON ends too early or nests too deep")
        head = self.text[at]
        if head in '{["':
            return {"{": self.object, "[": self.array, '"': self.string}[head](at + 1, depth + 1)
        for word, meaning in _WORDS.items():
            if self.text.startswith(word, at):
                return meaning, at + len(word)
        number = _NUMBER.match(self.text, at)
        if number is None or len(number[0]) > 4000:
            raise RefusedError("no JSON value")
        return (float if number[2] or number[3] else int)(number[0]), number.end()

    def string(self, at: int, _depth: int = 0) -> tuple[str, int]:
        parts = []
        while True:
            plain = _PLAIN.match(self.text, at)
            assert plain is not None
            parts.append(plain[0])
            at = plain.end()
            mark = self.text[at : at + 1]
            if mark == '"':
                return "".join(parts), at + 1
            kind = self.text[at + 1 : at + 2]
            if mark == "\\" and kind == "u" and re.fullmatch(r"[0-9a-fA-F]{4}", self.text[at + 2 : at + 6]):
                parts.append(chr(int(self.text[at + 2 : at + 6], 16)))
                at += 6
            elif mark == "\\" and kind in _ESCAPES and kind:
                parts.append(_ESCAPES[kind])
                at += 2
            else:
                raise RefusedError("bad JSON string")

    def array(self, at: int, depth: int) -> tuple[list[Any], int]:
        items, at = [], self.skip(at)
        if self.text[at : at + 1] == "]":
            return items, at + 1
        while True:
            item, at = self.value(at, depth)
            items.append(item)
            at = self.skip(at) + 1
            if self.text[at - 1 : at] == "]":
                return items, at
            if self.text[at - 1 : at] != ",":
                raise RefusedError("bad JSON array")

    def object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        items: dict[str, Any] = {}
        at = self.skip(at)
        if self.text[at : at + 1] == "}":
            return items, at + 1
        while True:
            at = self.skip(at)
            if self.text[at : at + 1] != '"':
                raise RefusedError("bad JSON key")
            key, at = self.string(at + 1)
            at = self.skip(at) + 1
            if self.text[at - 1 : at] != ":" or key in items:
                raise RefusedError("bad or duplicate JSON key")
            items[key], at = self.value(at, depth)
            at = self.skip(at) + 1
            if self.text[at - 1 : at] == "}":
                return items, at
            if self.text[at - 1 : at] != ",":
                raise RefusedError("bad JSON object")


def parse_json(data: bytes) -> Any:
    """Return the value of strict JSON in UTF-8 without a byte order mark."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedError("not UTF-8") from None
    reader = _Json(text)
    value, end = reader.value(0, 0)
    if reader.skip(end) != len(text):
        raise RefusedError("text after the JSON value")
    return value


_REAL = re.compile(r"(-?)0x([01])(?:\.([0-9a-f]{1,13}))?p([+-][0-9]{1,4})")


def parse_real(text: Any) -> fmpq:
    """Return the exact value of a hexadecimal float; what float64 cannot hold is refused."""
    found = _REAL.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise RefusedError(f"{text!r} is not a hexadecimal float")
    fraction = found[3] or ""
    mantissa, exponent = int(found[2] + fraction, 16), int(found[4]) - 4 * len(fraction)
    if not mantissa:
        return fmpq(0)
    while mantissa % 2 == 0:
        mantissa, exponent = mantissa // 2, exponent + 1
    if exponent < -1074 or exponent + mantissa.bit_length() > 1024:
        raise RefusedError(f"{text!r} is outside float64")
    value = fmpz(mantissa) * power_of_two(exponent)
    return -value if found[1] else value


_FORMATS = {"F64": (8, 11), "F32": (4, 8), "F16": (2, 5), "BF16": (2, 8)}
"""Bytes and exponent bits; the rest is a sign and the mantissa."""


def decode(kind: str, data: bytes) -> tuple[list[int], int]:
    """Return integers and one exponent: the numbers are integer * 2^exponent."""
    width, exponent_bits = _FORMATS[kind]
    mantissa_bits = 8 * width - 1 - exponent_bits
    bias, top = (1 << (exponent_bits - 1)) - 1, (1 << exponent_bits) - 1
    pairs = []
    for at in range(0, len(data), width):
        bits = int.from_bytes(data[at : at + width], "little")
        mantissa, power = bits & ((1 << mantissa_bits) - 1), bits >> mantissa_bits & top
        if power == top:
            raise RefusedError("NaN or infinity among the weights")
        mantissa |= (power > 0) << mantissa_bits
        pairs.append((-mantissa if bits >> (8 * width - 1) else mantissa, max(power, 1) - bias - mantissa_bits))
    least = min((e for m, e in pairs if m), default=0)
    return [m << (e - least) if m else 0 for m, e in pairs], least


def parse_weights(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; gaps, overlaps and trailing bytes are refused."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or length > len(data) - 8 or data[8:9] != b"{":
        raise RefusedError("no safetensors header")
    header, body = parse_json(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise RefusedError("bad metadata")
    tensors, covered = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise RefusedError("bad tensor header")
        kind, shape, offsets = entry["dtype"], naturals(entry["shape"], 1), naturals(entry["data_offsets"], 0)
        if not isinstance(kind, str) or kind not in _FORMATS or len(offsets) != 2:
            raise RefusedError("bad tensor header")
        start, end = offsets
        if not start < end <= len(body) or end - start != prod(shape) * _FORMATS[kind][0]:
            raise RefusedError("a tensor has the wrong size")
        covered.append((start, end))
        tensors[name] = Tensor(shape, *decode(kind, body[start:end]))
    at = 0
    for start, end in sorted(covered):
        if start != at:
            raise RefusedError("gap or overlap")
        at = end
    if at != len(body):
        raise RefusedError("trailing bytes")
    return tensors


def naturals(value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and least <= v < 1 << 48 for v in value):
        raise RefusedError(f"{value!r} is no list of integers >= {least}")
    return tuple(value)
