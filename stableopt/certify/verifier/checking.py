r"""Check a certificate of a neural network: numpy and the standard library only, without torch and stableopt.

The certificate names a weight file beside it (safetensors), lists the operations of a network, and claims numbers. Everything it
claims to be *proved* is proved again here from the bytes of the weights, with every rounding error counted; nothing is taken on
trust but the assumptions H1-H5, which are printed. What is not understood is rejected. The proofs are in docs/soundness.md, in
steps S0, S1, ... to which the code refers.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import activations, blocks, gates, sequences
from .claims import check_claims
from .files import choice, ints, parse_json, parse_weights, to_float64
from .joint import read_joint
from .numbers import Array, RejectedError, need
from .operations import Graph
from .program import Walk
from .replay import replay

__all__ = ["ASSUMPTIONS", "PREDICATE_TYPE", "Result", "check", "read_program", "self_test", "verify"]

_ = activations, blocks, gates, sequences  # their rules are registered when they are imported

ASSUMPTIONS = (
    "H1: float64 is IEEE-754, rounds to nearest and underflows gradually (spot-checked; with --exact: conversions are exact).",
    "H2: a matrix product sums its products in some order, with or without fused multiply-add (spot-checked; not with --exact).",
    "H3: SHA-256 has no collisions.",
    "H4: Python integers and fractions, and 64-bit integers that do not overflow, are exact.",
    "H5: what is run is the listed program with the stored weights; the bounds are for exact arithmetic on them.",
)
PREDICATE_TYPE = "https://stableopt.dev/certificate/v2"
_MAX_CERTIFICATE, _MAX_NODES = 2**27, 10_000


@dataclass(frozen=True)
class Result:
    """The verdict: whether everything is proved, why not, the bound, the claims by tier, one line per operation."""

    verified: bool
    reason: str = ""
    lipschitz: float | None = None
    norm: str = ""
    digest: str = ""
    claims: dict[str, Any] | None = None
    layers: tuple[str, ...] = ()
    replayed: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ASSUMPTIONS


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


def read_program(predicate: Any, tensors: dict[str, Array], *, exact: bool = False) -> Walk:
    """Check the program of a certificate: every operation, every bound, every joint bound, and that each tensor is used."""
    need(isinstance(predicate, dict) and type(predicate.get("schema")) is int, "there is no predicate")
    need(predicate["schema"] == 2, "the schema is unknown; version 2 is known")
    given: Any = predicate.get("input")
    nodes: Any = predicate.get("graph")
    joint: Any = predicate.get("joint", [])
    need(isinstance(given, dict) and given.get("domain") == "R^n", "the input is malformed")
    norm = choice(given.get("metric"), ("l2", "linf", "token_max"), "the metric")
    need(
        isinstance(nodes, list) and 0 < len(nodes) <= _MAX_NODES and isinstance(joint, list), "the program is malformed"
    )
    shape = ints(given.get("shape"), 1, "input shape")
    need(shape and math.prod(shape) < 2**40, "the input shape is empty or too large")
    walk = Walk(nodes, Graph(tensors, norm, exact), shape)
    for entry in joint:
        read_joint(walk, entry)
    unused = sorted(set(tensors) - walk.g.used)
    need(not unused, f"tensors outside the program: {unused[:3]}")
    return walk


def _lines(walk: Walk) -> tuple[str, ...]:
    names = [f"{i}: {node['op']} {node.get('name') or node.get('weight') or ''}" for i, node in enumerate(walk.nodes)]
    return tuple(n if b is None else f"{n} <= {float(b)!r}" for n, b in zip(names, walk.bounds, strict=True))


def check(certificate: bytes, read_weights: Callable[[str], bytes], *, exact: bool = False) -> Result:
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
            walk = read_program(statement.get("predicate"), tensors, exact=exact)
            total = check_claims(statement["predicate"].get("claims"), walk)
    except RejectedError as error:
        return Result(False, str(error), digest=digest)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        return Result(False, f"malformed ({type(error).__name__}: {error})", digest=digest)
    return Result(True, "", total, walk.g.norm, digest, statement["predicate"]["claims"], _lines(walk))


def verify(path: str | Path, *, exact: bool = False, data: str | Path | None = None) -> Result:
    """Check a certificate file, or the model.cert.json of a folder, and the weight file beside it; each is read once.

    With ``data``, an npz file with arrays x and y, the claims about these data are repeated too.

    Raises:
        OSError: if the certificate or the data cannot be read, or if the arithmetic of this machine fails its self-test.
    """
    self_test(np.matmul)
    path, weights = Path(path), b""
    path = path / "model.cert.json" if path.is_dir() else path

    def read_weights(name: str) -> bytes:
        nonlocal weights
        weights = (path.parent / name).read_bytes()
        return weights

    certificate = path.read_bytes()
    result = check(certificate, read_weights, exact=exact)
    if data is None or not result.verified:
        return result
    try:
        return replace(result, replayed=tuple(replay(certificate, weights, Path(data).read_bytes())))
    except (RejectedError, ArithmeticError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        return replace(result, verified=False, reason=f"the claims cannot be replayed: {error}")


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
