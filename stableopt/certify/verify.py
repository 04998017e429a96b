r"""Check a certificate of a neural network: numpy and the standard library only, one file, usable as a copy.

    python verify.py model.cert.json [--json]      exit status 0 verified, 1 rejected, 2 error

The certificate names a weight file beside it (safetensors), lists the layers, and claims numbers. Everything it claims to be
*proved* is proved again here from the bytes of the weights, with every rounding error counted; nothing is taken on trust
but the assumptions H1-H5 below, which are printed. What is not understood is rejected.

Notation: u = 2^-53 and gamma_k = k u / (1 - k u). A floating-point sum of k products, in any order, with or without fused
multiply-add, differs from the exact one by at most gamma_k sum |a_i b_i| + k 2^-1074 (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1). If s is such a sum of k terms >= 0 then exact <= s / (1 - gamma_k) <= s (1 + gamma_2k).
All scalar arithmetic of the proofs is exact (fractions), so only array arithmetic rounds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ASSUMPTIONS",
    "RejectedError",
    "Result",
    "check",
    "constant_bound",
    "main",
    "margin_constants",
    "parse_weights",
    "verify",
]

Array = npt.NDArray[np.float64]
Node = dict[str, Any]

ASSUMPTIONS = (
    "H1: float64 is IEEE-754, rounds to nearest and underflows gradually (spot-checked at start).",
    "H2: a matrix product sums its products in some order, with or without fused multiply-add (spot-checked at start).",
    "H3: SHA-256 has no collisions.",
    "H4: Python integers and fractions are exact.",
    "H5: what is run is the listed graph with the stored weights; the bounds are for exact arithmetic on them.",
)
PREDICATE_TYPE = "https://stableopt.dev/certificate/v1"
U = Fraction(1, 2**53)
UNDERFLOW = Fraction(1, 2**900)
"""More than all underflow of one proof: fewer than 2^100 products, each off by at most 2^-1074 when it underflows."""
_MAX_CERTIFICATE, _MAX_HEADER, _MAX_NODES = 2**26, 50_000_000, 10_000
_HEX = re.compile(r"-?0x[01](\.[0-9a-f]{1,13})?p[+-][0-9]{1,4}")
_OVERSAMPLING = 8


class RejectedError(Exception):
    """The certificate or its weights have a defect; the message says which."""


@dataclass(frozen=True)
class Result:
    """The verdict of the verifier: whether everything is proved, why not, the bound, one line per layer, the assumptions."""

    verified: bool
    reason: str = ""
    lipschitz: float | None = None
    digest: str = ""
    layers: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ASSUMPTIONS


def need(condition: object, reason: str) -> None:
    """Reject unless the condition holds."""
    if not condition:
        raise RejectedError(reason)


def gamma(k: int) -> Fraction:
    """Return gamma_k exactly."""
    need(k < 2**50, f"a sum of {k} terms is too long for a proof in float64")
    return Fraction(k, 2**53 - k)


# ---------------------------------------------------------------------------------------------------- the norm of a matrix


def norm_at_most(stack: Array, limit: Fraction) -> bool:
    r"""Return True only if ||A||_2 <= limit is proved for every matrix A of the stack (b, m, n).

    1. Scale by a power of two so that max |a| lies in [1/2, 1). Entries that underflow change ||A||_2^2 by less than
       UNDERFLOW. If limit^2 >= m n there is nothing to do: ||A||_F^2 < m n.
    2. G = fl(A^T A), made symmetric by copying one triangle, has |G - A^T A| <= gamma_m |A|^T|A| entrywise, hence
       ||G - A^T A||_2 <= gamma_m || |A| ||_2^2 <= gamma_m ||A||_F^2 =: gram_error.
    3. Take any t and any R (here from a Cholesky factorisation of tI - G, which need not be right). With
       E = tI - G - R^T R exactly, v a unit top eigenvector of G: t - lambda_max(G) = ||Rv||^2 + v^T E v >= -||E||_2.
    4. E = D + (errors): M = fl(tI - G) rounds on the diagonal only, by at most u |M_ii|; P = fl(R^T R) is off by
       gamma_n |R|^T|R|, in norm at most gamma_n ||R||_F^2; D = fl(M - P) is off by u |D|. And || |D| ||_2 is at most the
       larger of its greatest row and column sums, each a computed sum of n terms.
    5. ||A||_2^2 = lambda_max(A^T A) <= t + ||E||_2 + gram_error, which must not exceed limit^2.
    """
    if not stack.any():
        return limit >= 0
    if limit <= 0:
        return False
    a = stack.transpose(0, 2, 1) if stack.shape[1] < stack.shape[2] else stack
    exponent = int(np.frexp(np.abs(a).max())[1])
    a = np.ldexp(a, -exponent)
    target = limit**2 / Fraction(4) ** exponent
    m, n = a.shape[1:]
    if target >= m * n:
        return True
    gram, gram_error = gram_matrix(a)
    trace = Fraction(float(np.trace(gram, axis1=1, axis2=2).min()))
    reserve = 2 * gamma(n) * max(n * target - trace, Fraction(0)) + 64 * n * U * target  # for ||E||_2: a guess
    t = float(target - gram_error - reserve)
    if t <= 0:
        return False
    shifted = -gram
    shifted[:, range(n), range(n)] += t
    try:
        lower: Array = np.linalg.cholesky(shifted).astype(np.float64)
    except np.linalg.LinAlgError:
        return False
    return Fraction(t) + residual_norm(shifted, lower) + gram_error <= target


def gram_matrix(a: Array) -> tuple[Array, Fraction]:
    """Return the symmetric computed A^T A of each matrix and the bound of step 2, gamma_m ||A||_F^2."""
    m, n = a.shape[1:]
    gram = np.triu(a.transpose(0, 2, 1) @ a)
    gram = gram + np.triu(gram, 1).transpose(0, 2, 1)
    squares = _largest(np.square(a).sum(axis=(1, 2))) * (1 + gamma(2 * m * n))
    return gram, gamma(m) * squares + UNDERFLOW


def residual_norm(shifted: Array, lower: Array) -> Fraction:
    """Bound ||tI - G - R^T R||_2 as in step 4; ``shifted`` is M, ``lower`` is R^T."""
    n = shifted.shape[1]
    residual = np.abs(shifted - lower @ lower.transpose(0, 2, 1))
    sums = max(_largest(residual.sum(axis=1)), _largest(residual.sum(axis=2)))
    squares = _largest(np.square(lower).sum(axis=(1, 2))) * (1 + gamma(2 * n * n))
    diagonal = _largest(np.abs(shifted[:, range(n), range(n)]))
    return sums * (1 + gamma(2 * n)) * (1 + U) + U * diagonal + gamma(n) * squares + UNDERFLOW


def _largest(values: Array) -> Fraction:
    """Return the largest entry exactly; NaN and infinity make every proof fail."""
    largest = float(values.max())
    need(math.isfinite(largest), "the arithmetic of a proof overflowed")
    return Fraction(largest)


# ----------------------------------------------------------------------------------------------- the norm of a convolution


def conv_at_most(weight: Array, groups: int, limit: Fraction) -> bool:
    r"""Return True only if the convolution (out, in/groups, *kernel) has operator norm <= limit for every image size.

    On the whole grid Z^d a convolution multiplies by its symbol W^(w) = sum_t W_t e^{i w.t}: its norm is the supremum of
    ||W^(w)||_2. Zero padding embeds an image isometrically into the grid, cropping and striding drop outputs, a dilation
    acts on interleaved sub-grids separately, and groups act on disjoint channels: none of these increases the norm. Circular
    padding with 2p <= dilation (k - 1) picks outputs of the circulant operator, whose norm is a maximum over some frequencies.

    The supremum from a grid: fix unit vectors a, b and a phase, and look along one axis. p(w) = Re(phase a* W^(w) b), with the
    taps centred, is a real trigonometric polynomial of degree m = (k - 1)/2 (if m is a half-integer, p(2w) is one of degree
    2m). By M. Riesz, if |p| is largest at x then |p(x + s)| >= max|p| cos(m s) for |s| <= pi/(2m). A grid of N > 2m points
    has one within pi/N of x, so max|p| <= sec(pi m/N) max over the grid |p|. Choose a, b, the phase and w so that p attains the
    supremum, and move w to the grid axis by axis: sup ||W^||_2 <= prod_d sec(pi m_d/N_d) max over the grid ||W^||_2. Here N = 8k
    (N = 1 for k = 1). The kernel is real, so W^(-w) is the conjugate: half of the first axis is enough.

    Rounding: cosines and sines are computed to 2^-120 with integers and rounded once, so each is off by < 2u; the sum of K taps
    adds gamma_K. Entry by entry, real and imaginary parts are off by (gamma_K + 2u) sum_t |W_t|, so ||W^||_2 is off by at most
    sqrt(2) (gamma_K + 2u) || sum_t |W_t| ||_F. What underflows changes it by less than 2^-900: the root below exceeds the true one
    by 2^-200 at least.
    """
    if not weight.any():
        return limit >= 0
    exponent = int(np.frexp(np.abs(weight).max())[1])
    limit = limit / Fraction(2) ** exponent
    kernel, taps = weight.shape[2:], math.prod(weight.shape[2:])
    parts = np.ldexp(weight, -exponent).reshape(groups, weight.shape[0] // groups, weight.shape[1], taps)
    sizes = [_OVERSAMPLING * k if k > 1 else 1 for k in kernel]
    for k, size in zip(kernel, sizes, strict=True):
        limit *= _cos_sin(k - 1, 4 * size)[0] - Fraction(1, 2**119)  # cos(pi m/N), m = (k - 1)/2, is (k - 1)/(4N) turns
    total = np.abs(parts).sum(axis=3)  # K terms; its squares are summed over one group
    terms = 2 * taps + total[0].size + 1
    squares = _largest(np.square(total).sum(axis=(1, 2))) * (1 + gamma(2 * terms)) + UNDERFLOW
    limit -= Fraction(3, 2) * (gamma(taps) + 2 * U) * _root_up(squares)
    return all(norm_at_most(symbols, limit) for symbols in _symbols(parts, kernel, sizes))


def _symbols(parts: Array, kernel: tuple[int, ...], sizes: list[int]) -> Any:
    """Yield the complex symbols of all groups on the grid as real matrices [[Re, -Im], [Im, Re]] of the same norm."""
    period = math.lcm(*sizes)
    frequencies = np.indices([sizes[0] // 2 + 1, *sizes[1:]]).reshape(len(sizes), -1)
    positions = np.indices(kernel).reshape(len(sizes), -1)
    turns = sum(
        np.outer(f, t) * (period // s) for f, t, s in zip(frequencies, positions, sizes, strict=True)
    )  # the angle of tap t at frequency f, in units of one turn / period: an exact integer
    table = np.array([[float(v) for v in _cos_sin(j, period)] for j in range(period)])
    roots = table[np.asarray(turns) % period]  # (frequencies, taps, 2)
    flat = parts.reshape(-1, parts.shape[3])
    for chunk in np.array_split(roots, max(1, len(roots) * len(flat) // 2**20)):
        values = np.tensordot(flat, chunk, axes=([1], [1])).reshape(*parts.shape[:3], len(chunk), 2)
        real, imag = np.moveaxis(values, 3, 1).transpose(4, 0, 1, 2, 3).reshape(2, -1, *parts.shape[1:3])
        yield np.concatenate([np.concatenate([real, -imag], axis=2), np.concatenate([imag, real], axis=2)], axis=1)


def _cos_sin(numerator: int, denominator: int) -> tuple[Fraction, Fraction]:
    """Return cosine and sine of the given fraction of a turn in [0, 1], off by less than 2^-120.

    Taylor series in integers of unit 2^-160: each of the 80 terms is off by a few units times at most e^(2 pi) < 2^10, and the
    terms left out sum to less than (2 pi)^80/80! < 2^-180.
    """
    bits = 160
    angle = _two_pi(bits) * numerator // denominator
    sums, term = [0, 0, 0, 0], 1 << bits
    for k in range(80):
        sums[k % 4] += term
        term = (term * angle >> bits) // (k + 1)
    return Fraction(sums[0] - sums[2], 1 << bits), Fraction(sums[1] - sums[3], 1 << bits)


def _two_pi(bits: int) -> int:
    """Return 2 pi in units of 2^-bits, off by at most one unit, from pi = 16 arctan(1/5) - 4 arctan(1/239)."""
    one = 1 << (bits + 32)
    arctan = [sum((-1) ** k * (one // ((2 * k + 1) * x ** (2 * k + 1))) for k in range(100)) for x in (5, 239)]
    return (32 * arctan[0] - 8 * arctan[1]) >> 32


def _root_up(value: Fraction) -> Fraction:
    """Return a fraction above sqrt(value) by at least 2^-200 and at most 2^-198."""
    scale = 2**400
    return Fraction(math.isqrt(math.ceil(value * scale)) + 2, 2**200)


# --------------------------------------------------------------------------------------------------------- bytes to numbers


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
        need(
            isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
            f"bad header of tensor {name!r}",
        )
        kind, shape, offsets = entry["dtype"], _ints(entry["shape"], 1, name), _ints(entry["data_offsets"], 0, name)
        need(isinstance(kind, str) and kind in _WIDTH, f"tensor {name!r} has the unknown dtype {kind!r}")
        need(len(offsets) == 2 and 0 <= offsets[0] < offsets[1] <= len(body), f"tensor {name!r} lies outside the file")
        need(
            math.prod(shape) * _WIDTH[kind] == offsets[1] - offsets[0], f"tensor {name!r} has the wrong number of bytes"
        )
        tensors[name] = (kind, shape, body[offsets[0] : offsets[1]])
        spans.append(offsets)
    ends = [0, *(end for _, end in sorted(spans))]
    need([start for start, _ in sorted(spans)] == ends[:-1], "the tensors of the weight file overlap or leave gaps")
    need(ends[-1] == len(body), "the weight file has trailing bytes")
    return tensors


_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def to_float64(kind: str, shape: tuple[int, ...], data: bytes) -> Array:
    """Convert the stored numbers exactly; NaN and infinity are rejected."""
    if kind == "BF16":  # the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[kind])
    need(np.isfinite(values).all(), "the weights are not finite")
    return values.astype(np.float64).reshape(shape)


def _ints(value: Any, least: int, where: str) -> tuple[int, ...]:
    ok = isinstance(value, list) and all(type(v) is int and least <= v < 2**48 for v in value)
    need(ok, f"{where}: expected a list of integers >= {least}")
    return tuple(value)


def _number(node: Node, key: str, *, signed: bool = False) -> Fraction:
    text = node[key]
    ok = isinstance(text, str) and len(text) < 40 and _HEX.fullmatch(text) and (signed or text[0] != "-")
    need(ok, f"{key!r} must be a finite hexadecimal float{'' if signed else ' >= 0'}")
    try:
        return Fraction(float.fromhex(text))
    except OverflowError:
        raise RejectedError(f"{key!r} is not finite") from None


# ------------------------------------------------------------------------------------------------------------- the operations


class Graph:
    """The state of a walk through the layers: the shape reached, the tensors, and which of them were used."""

    def __init__(self, tensors: dict[str, Array], shape: tuple[int, ...]) -> None:
        self.tensors, self.shape, self.used = tensors, shape, set[str]()

    def tensor(self, name: Any, ndim: int) -> Array:
        """Return a tensor of the file and mark it as used."""
        need(isinstance(name, str) and name in self.tensors, f"the tensor {name!r} is not in the weight file")
        need(self.tensors[name].ndim == ndim, f"the tensor {name!r} must have {ndim} dimensions")
        self.used.add(name)
        return self.tensors[name]

    def bias(self, node: Node, size: int) -> None:
        """Check the bias; it does not change any bound."""
        if node["bias"] is not None:
            need(self.tensor(node["bias"], 1).shape == (size,), f"the bias {node['bias']!r} has the wrong shape")

    def features(self, size: int) -> None:
        """Check that a dense layer fits the shape reached."""
        need(self.shape and self.shape[-1] == size, f"a layer for {size} features follows the shape {self.shape}")


def _linear(graph: Graph, node: Node, bound: Fraction) -> bool:
    weight = graph.tensor(node["weight"], 2)
    graph.features(weight.shape[1])
    graph.bias(node, weight.shape[0])
    graph.shape = (*graph.shape[:-1], weight.shape[0])
    return norm_at_most(weight[None], bound)


def _conv(graph: Graph, node: Node, bound: Fraction) -> bool:
    dims, groups, mode = node["dims"], node["groups"], node["padding_mode"]
    need(type(dims) is int and dims in {1, 2}, "a convolution has 1 or 2 dims")
    weight = graph.tensor(node["weight"], dims + 2)
    need(type(groups) is int and groups >= 1 and weight.shape[0] % groups == 0, "groups must divide the channels")
    need(graph.shape[:1] == (groups * weight.shape[1],), "a convolution does not fit the channels before it")
    dilation, padding = _ints(node["dilation"], 1, "dilation"), _ints(node["padding"], 0, "padding")
    need(len(dilation) == dims and len(padding) == dims, "dilation and padding need one entry per axis")
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    need(mode in {"zeros", "circular"}, f"the padding mode {mode!r} has no rule")
    need(mode == "zeros" or all(2 * p <= s for p, s in zip(padding, spans, strict=True)), "too much circular padding")
    graph.bias(node, weight.shape[0])
    _slide(graph, node, [s + 1 for s in spans], channels=weight.shape[0])
    return conv_at_most(weight, groups, bound)


def _slide(graph: Graph, node: Node, window: list[int], channels: int) -> None:
    """Update the shape for windows that slide over the image."""
    stride, padding = _ints(node["stride"], 1, "stride"), _ints(node["padding"], 0, "padding")
    image = graph.shape[1:]
    need(len(image) == len(window) == len(stride) == len(padding), "an image layer needs one entry per axis")
    sizes = [(i + 2 * p - w) // s + 1 for i, p, w, s in zip(image, padding, window, stride, strict=True)]
    need(min(sizes) >= 1, "a window is larger than its padded image")
    graph.shape = (channels, *sizes)


def _pool(graph: Graph, node: Node, bound: Fraction) -> bool:
    kernel, stride = _ints(node["kernel"], 1, "kernel"), _ints(node["stride"], 1, "stride")
    need(
        type(node["dims"]) is int and node["dims"] == len(kernel) == len(stride) and len(kernel) in {1, 2},
        "a pool needs one entry per axis",
    )
    need(node["name"] in {"avg", "max"}, f"the pool {node['name']!r} has no rule")
    _slide(graph, node, list(kernel), channels=graph.shape[0])
    need(
        all(2 * p <= k for p, k in zip(node["padding"], kernel, strict=True)),
        "a pool is padded by at most half its kernel",
    )
    return bound**2 >= _pool_square(node)


def _pool_square(node: Node) -> Fraction:
    """Return the square of the bound of a pool; a pixel lies in at most c = prod ceil(k/s) windows.

    Average: the matrix has entries 1/prod k >= 0, row sums <= 1 and column sums <= c / prod k; its norm is at most
    the square root of their product. Maximum: |max a - max b| <= ||a - b|| per window, and each pixel counts in c windows.
    """
    windows = math.prod(-(-k // s) for k, s in zip(node["kernel"], node["stride"], strict=True))
    return Fraction(windows, math.prod(node["kernel"]) if node["name"] == "avg" else 1)


_ACTIVATIONS: dict[str, tuple[tuple[str, ...], Callable[[Node], Fraction | int]]] = {
    # elementwise: the largest |slope|
    "identity": ((), lambda _: 1),
    "relu": ((), lambda _: 1),  # slopes 0, 1
    "abs": ((), lambda _: 1),  # slopes -1, 1
    "tanh": ((), lambda _: 1),  # 1 - tanh^2
    "softplus": (("beta",), lambda _: 1),  # log(1 + e^{bx})/b has the slope 1/(1 + e^{-bx}) < 1
    "hardtanh": (("min", "max"), lambda _: 1),  # slopes 0, 1
    "leaky_relu": (
        ("slope",),
        lambda node: max(Fraction(1), abs(_number(node, "slope", signed=True))),
    ),  # slopes 1, slope
    "sigmoid": ((), lambda _: Fraction(1, 4)),  # s(1 - s) <= 1/4
    "elu": (("alpha",), lambda node: max(Fraction(1), _number(node, "alpha"))),  # slopes 1 and alpha e^x, x < 0
    # slope P(x) + x p(x), stationary where p(x)(2 - x^2) = 0, there 1.12890... and -0.1289...
    "gelu": ((), lambda _: Fraction(1129, 1000)),
    # slope s(1 + x(1 - s)), stationary where x tanh(x/2) = 2, x = 2.3994..., there 1.09984... and -0.0998...
    "silu": ((), lambda _: Fraction(11, 10)),
    # sorting: the sum of a_(i) b_(i) is at least that of a_i b_i, so ||sort a - sort b|| <= ||a - b||
    "groupsort": (("group_size",), lambda _: 1),
}
_MONOTONE = {"relu", "leaky_relu", "tanh", "hardtanh", "softplus", "sigmoid"}
"""Slopes in [0, 1] (the hardtanh with limits -1 and 1, the softplus with beta 1, the leaky_relu with a slope in [0, 1])."""


def _activation(graph: Graph, node: Node, bound: Fraction) -> bool:
    size = node.get("group_size", 1)
    need(type(size) is int and size >= 1 and graph.shape[0] % size == 0, "group_size must divide the channels")
    return bound >= _slope(node)


def _slope(node: Node) -> Fraction:
    need(node["name"] in _ACTIVATIONS, f"the activation {node['name']!r} has no rule")
    parameters, constant = _ACTIVATIONS[node["name"]]
    need(set(node) - {"bound"} == {"op", "name", *parameters}, f"the activation {node['name']!r} has wrong parameters")
    values = {key: _number(node, key, signed=True) for key in parameters if key != "group_size"}
    need(values.get("beta", 1) > 0, "softplus needs beta > 0")
    need(values.get("min", -1) < values.get("max", 1), "hardtanh needs min < max")
    return Fraction(constant(node))


def constant_bound(node: Node) -> float:
    """Return the bound, rounded up, of an operation without weights; the settings are as in the file."""
    op = node["op"]
    need(op in {"activation", "flatten", "pool", "scale"}, f"the operation {op!r} has no constant bound")
    if op == "pool":
        square = _pool_square(node)
        root = math.sqrt(_float_up(square))
        return root if Fraction(root) ** 2 >= square else math.nextafter(root, math.inf)
    if op == "activation":
        return _float_up(_slope(node))
    return 1.0 if op == "flatten" else _float_up(abs(_number(node, "factor", signed=True)))


def _gradient_block(graph: Graph, node: Node, bound: Fraction) -> bool:
    """Check x - h (m x + A^T s(A x + b)), s nondecreasing with slopes D in [0, 1].

    The Jacobian I - h (m I + A^T D A) is symmetric with eigenvalues in [1 - h (m + ||A||^2), 1 - h m].
    """
    weight, name = graph.tensor(node["weight"], 2), node["activation"]
    graph.features(weight.shape[1])
    graph.bias(node, weight.shape[0])
    need(name in _MONOTONE, f"a gradient block needs an activation with slopes in [0, 1], got {name!r}")
    need(("slope" in node) == (name == "leaky_relu"), "a gradient block has a slope exactly with leaky_relu")
    need("slope" not in node or _number(node, "slope") <= 1, "the slope of a gradient block must lie in [0, 1]")
    step, strong, norm = (_number(node, key) for key in ("step", "strong", "weight_bound"))
    ends = (abs(1 - step * strong), abs(1 - step * (strong + norm**2)))
    return norm_at_most(weight[None], norm) and bound >= max(ends)


def _flatten(graph: Graph, _node: Node, bound: Fraction) -> bool:
    graph.shape = (math.prod(graph.shape),)
    return bound >= 1


def _scale(_graph: Graph, node: Node, bound: Fraction) -> bool:
    return bound >= abs(_number(node, "factor", signed=True))


_OPS: dict[str, tuple[set[str] | None, Callable[[Graph, Node, Fraction], bool]]] = {
    "linear": ({"weight", "bias"}, _linear),
    "conv": ({"dims", "weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode"}, _conv),
    "activation": (None, _activation),  # its keys depend on the name
    "pool": ({"name", "dims", "kernel", "stride", "padding"}, _pool),
    "flatten": (set(), _flatten),
    "scale": ({"factor"}, _scale),
    "gradient_block": ({"weight", "bias", "step", "strong", "activation", "weight_bound"}, _gradient_block),
}


# ------------------------------------------------------------------------------------------------------------- the certificate


def margin_constants(weight: Array, before: Fraction) -> Array:
    """Bound from above the constants before * ||w_i - w_j||_2 of the logit differences, for a dense last layer.

    Each difference rounds once, each square once, n squares are summed: the exact sum of squares is at most the computed
    one times 1 + gamma_{2(n+4)}. Two nextafter steps cover the root and the product; equal rows give exactly 0.
    """
    if not weight.any():
        return np.zeros((len(weight), len(weight)))
    exponent = int(np.frexp(np.abs(weight).max())[1])
    scaled = np.ldexp(weight, -exponent)
    inflate = _float_up(1 + gamma(2 * (weight.shape[1] + 4)))
    factor = _float_up(before * Fraction(2) ** exponent)
    rows = []
    for row, exact in zip(scaled, weight, strict=True):
        squares = np.square(scaled - row).sum(axis=1) * inflate + 2.0**-900
        norms = np.nextafter(np.nextafter(np.sqrt(np.nextafter(squares, np.inf)), np.inf) * factor, np.inf)
        rows.append(np.where((weight == exact).all(axis=1), 0.0, norms))
    return np.array(rows)


def _float_up(value: Fraction) -> float:
    try:
        nearest = float(value)
    except OverflowError:
        return math.inf
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


def _check_claims(claims: Any, product: Fraction, nodes: list[Node], bounds: list[Fraction], graph: Graph) -> float:
    tiers = ("proved", "replayable", "attested")
    need(isinstance(claims, dict) and all(isinstance(claims.get(k), list) for k in tiers), "the claims are malformed")
    proved = claims["proved"]
    need(all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in proved), "the claims are malformed")
    ids = [c["id"] for c in proved]
    need("lipschitz_l2" in ids and len(set(ids)) == len(ids), "there must be one claim of each kind, and lipschitz_l2")
    need(set(ids) <= {"lipschitz_l2", "margin_constants"}, f"an unknown kind of claim cannot be proved: {sorted(ids)}")
    need(all(set(c) == {"id", "L"} for c in proved), "a claim has unknown keys")
    by_id = {c["id"]: c for c in proved}
    total = _number(by_id["lipschitz_l2"], "L")
    need(total >= product, "the claimed Lipschitz constant is below the product of the layer bounds")
    if "margin_constants" in by_id:
        need(nodes[-1]["op"] == "linear" and len(graph.shape) == 1, "margin constants need a dense last layer")
        rows, size = by_id["margin_constants"]["L"], graph.shape[0]
        need(isinstance(rows, list) and len(rows) == size, "the margin constants have the wrong shape")
        need(all(isinstance(r, list) and len(r) == size for r in rows), "the margin constants have the wrong shape")
        claimed = np.array([[float(_number({"L": v}, "L")) for v in row] for row in rows])
        needed = margin_constants(graph.tensors[nodes[-1]["weight"]], math.prod(bounds[:-1], start=Fraction(1)))
        need((claimed == claimed.T).all() and not claimed.diagonal().any(), "the margin constants are not symmetric")
        need((claimed >= needed).all(), "a margin constant is below what can be proved")
    return float(total)


def _subject(statement: Any) -> tuple[str, str]:
    need(isinstance(statement, dict), "the certificate is not a JSON object")
    need(statement.get("_type") == "https://in-toto.io/Statement/v1", "the certificate is not an in-toto statement")
    need(statement.get("predicateType") == PREDICATE_TYPE, "the certificate is of an unknown type")
    subject = statement.get("subject")
    need(isinstance(subject, list) and len(subject) == 1 and isinstance(subject[0], dict), "there must be one subject")
    name, digest = subject[0].get("name"), subject[0].get("digest")
    need(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}", name), "unsafe weight file name")
    need(isinstance(digest, dict) and isinstance(digest.get("sha256"), str), "there is no SHA-256 digest")
    return name, digest["sha256"]


def _walk(predicate: Any, tensors: dict[str, Array]) -> tuple[float, tuple[str, ...]]:
    need(isinstance(predicate, dict), "there is no predicate")
    need(type(predicate.get("schema")) is int and predicate["schema"] == 1, "the schema is unknown; version 1 is known")
    given, nodes = predicate.get("input"), predicate.get("graph")
    need(
        isinstance(given, dict) and given.get("metric") == "l2" and given.get("domain") == "R^n",
        "the input is malformed",
    )
    need(isinstance(nodes, list) and 0 < len(nodes) <= _MAX_NODES, "the graph is malformed")
    graph = Graph(tensors, _ints(given.get("shape"), 1, "input shape"))
    need(graph.shape, "the input shape is empty")
    bounds, lines = [], []
    for index, node in enumerate(nodes):
        op = node.get("op") if isinstance(node, dict) else None
        need(isinstance(op, str) and op in _OPS, f"layer {index}: the operation {op!r} has no rule")
        keys, rule = _OPS[str(op)]
        extra = {"slope"} if node.get("activation") == "leaky_relu" else set[str]()
        need(keys is None or set(node) == keys | extra | {"op", "bound"}, f"layer {index}: {op} has wrong keys")
        need({"name", "bound"} <= set(node) or keys is not None, f"layer {index}: {op} has wrong keys")
        bound = _number(node, "bound")
        try:
            need(rule(graph, node, bound), f"the bound {float(bound)!r} is not proved")
        except RejectedError as error:
            raise RejectedError(f"layer {index} ({op}): {error}") from None
        bounds.append(bound)
        lines.append(f"{index}: {op} {node.get('name') or node.get('weight') or ''} <= {float(bound)!r}")
    unused = sorted(set(tensors) - graph.used)
    need(not unused, f"tensors outside the graph: {unused[:3]}")
    total = _check_claims(predicate.get("claims"), math.prod(bounds, start=Fraction(1)), nodes, bounds, graph)
    return total, tuple(lines)


def check(certificate: bytes, read_weights: Callable[[str], bytes]) -> Result:
    """Check the bytes of a certificate; ``read_weights(name)`` returns those of the weight file it names."""
    digest = ""
    try:
        need(len(certificate) <= _MAX_CERTIFICATE, "the certificate is too large")
        statement = parse_json(certificate)
        name, claimed = _subject(statement)
        try:
            weights = read_weights(name)
        except OSError as error:
            raise RejectedError(f"the weight file {name!r} cannot be read ({type(error).__name__})") from None
        digest = hashlib.sha256(weights).hexdigest()
        need(digest == claimed, f"the digest of {name!r} does not match")
        tensors = {key: to_float64(*entry) for key, entry in parse_weights(weights).items()}
        with np.errstate(all="ignore"):
            total, lines = _walk(statement.get("predicate"), tensors)
    except RejectedError as error:
        return Result(False, str(error), digest=digest)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        return Result(False, f"malformed ({type(error).__name__}: {error})", digest=digest)
    return Result(True, lipschitz=total, digest=digest, layers=lines)


def verify(path: str | Path) -> Result:
    """Check a certificate file and the weight file beside it.

    Raises:
        OSError: if the certificate itself cannot be read, or if the arithmetic of this machine fails its self-test.
    """
    self_test(np.matmul)
    path = Path(path)
    return check(path.read_bytes(), lambda name: (path.parent / name).read_bytes())


def self_test(product: Callable[[Array, Array], Array]) -> None:
    """Spot-check H1 and H2: integer products below 2^53 must be exact, and underflow gradual.

    Raises:
        OSError: if the arithmetic of this machine is not the one the proofs assume.
    """
    numbers = (np.arange(96 * 80) * 7919 % 2097143 - 1048571).reshape(96, 80)
    floats = numbers.astype(np.float64)
    for columns in (80, 48):  # a product with its own transpose may take another path
        if not (product(floats.T, floats[:, :columns]) == numbers.T @ numbers[:, :columns]).all():
            raise OSError("the matrix product of this machine is not exact on integers, so it cannot verify anything")
    if not (np.full(8, 2.0**-1000) * 2.0**-74 == math.ldexp(1.0, -1074)).all():
        raise OSError("this machine flushes small numbers to zero, so it cannot verify anything")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 verified, 1 rejected, 2 error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    paths = [word for word in words if word != "--json"]
    if len(paths) != 1 or paths[0].startswith("-"):
        sys.stderr.write("usage: python verify.py model.cert.json [--json]\n")
        return 2
    try:
        result = verify(paths[0])
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if "--json" in words:
        sys.stdout.write(json.dumps(asdict(result), indent=1) + "\n")
    elif result.verified:
        text = "\n".join([*result.assumptions, *result.layers, f"verified: Lipschitz constant <= {result.lipschitz!r}"])
        sys.stdout.write(text + "\n")
    else:
        sys.stdout.write(f"rejected: {result.reason}\n")
    return 0 if result.verified else 1


if __name__ == "__main__":
    sys.exit(main())
