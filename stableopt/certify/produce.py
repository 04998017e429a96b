"""From a model to its certificate: fold, keep the limits, publish bounds, state the claims, and have it all verified."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stableopt._version import __version__
from stableopt.certify import verifier
from stableopt.certify.attested import attest_run
from stableopt.certify.certificate import WEIGHTS_NAME, Certificate
from stableopt.certify.extract import extract
from stableopt.certify.files import encode_weights
from stableopt.certify.joint import find_joint
from stableopt.certify.program import Node, Program
from stableopt.certify.publish import WEIGHTED, layer_limits, publish, shapes, shrink, to_file, within
from stableopt.certify.runtime import RUNTIMES, find_runtime
from stableopt.certify.verifier.checking import read_program
from stableopt.certify.verifier.claims import check_claims, needed_margins
from stableopt.certify.verifier.files import parse_json, parse_weights, to_float64
from stableopt.certify.verifier.program import Walk
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_up
from stableopt.nn.stabilize import layer_limit

__all__ = ["certify"]

_MOST_CLASSES = 256
"""Beyond this many classes the table of margin constants is left out: it would outgrow the weights."""
_SLACK = 1e-9
_TRIES = 24
_NOT_CLAIMED = (
    "accuracy",
    "norms other than that of the certificate",
    "the rounding of the arithmetic in which the network is run later, unless a runtime is named",
    "anything about the data or the training beyond the attested claims, which nobody but their author vouches for",
)


def certify(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    norm: str = "l2",
    lipschitz: float | None = None,
    joint: bool = False,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    run: str | os.PathLike[str] | None = None,
) -> Certificate:
    r"""Prove a Lipschitz bound of a model and return it as a certificate.

    What is certified is the map in evaluation mode, whatever mode the model is in: dropout is left out, parametrizations are folded
    into the numbers that they produce now. The model is not changed. A weight with an enforced limit (by
    :func:`stableopt.nn.stabilize` or a :class:`~stableopt.constraints.SpectralBall`) is scaled down, in its own dtype, until its
    proved bound is within that limit.

    Args:
        model: layers that have a rule in :func:`stableopt.certify.fold`, in containers that have one, or with a ``forward`` of your
            own that :func:`torch.export.export` can trace.
        input_shape: shape of one input, without the batch dimension.
        norm: of inputs and outputs: ``"l2"``, ``"linf"``, or for sequences ``"token_max"``, the largest 2-norm of a token.
        lipschitz: a Lipschitz constant that the certificate must reach; the largest weights, or in a program with branches all of
            them, are scaled down until the product of the bounds does, ``joint`` or not. None: only the enforced limits count.
        joint: whether to search for bounds of whole chains of dense layers, below the product of their norms. It takes seconds.
        runtimes: the arithmetics in which the network may be deployed, see :meth:`Certificate.deploy`; what each is assumed to
            compute is written into the certificate.
        run: a run folder; its energy record and ledger, where it holds them, are attested in the certificate, not proved.

    Returns:
        The certificate, already checked by the independent verifier.

    Raises:
        TypeError: if ``model`` is no module.
        UncertifiableError: if a layer has no rule, or no weight can be scaled down to reach ``lipschitz``.
        ValueError: if a weight is NaN or infinite, or an argument or a shape does not fit.

    Note:
        The certified weights can differ from those of the model: by the scaling, of relative size 1e-9 up to the precision of the
        dtype for a stabilized model, more if ``lipschitz`` is far below what the model has. Run :meth:`Certificate.module`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> cert = certify(model, (4,), lipschitz=0.25)
        >>> 0.249999 < cert.lipschitz <= 0.25
        True
    """
    shape = _checked_shape(input_shape)
    if norm not in ("l2", "linf", "token_max"):
        raise ValueError(f"norm must be 'l2', 'linf' or 'token_max', got {norm!r}.")
    lipschitz = None if lipschitz is None else _checked_limit(lipschitz)
    models = [find_runtime(name).record() for name in runtimes]
    attested = [] if run is None else attest_run(run)
    program = _within_limits(model, extract(model, shape, norm))
    certificate = _certificate(publish(program), attested, models, joint=joint)
    if lipschitz is None or certificate.lipschitz <= lipschitz:
        return certificate
    certificate = _certificate(_reaching(program, certificate, lipschitz), attested, models, joint=joint)
    if certificate.lipschitz > lipschitz:
        raise UncertifiableError(
            f"the proved Lipschitz constant is {certificate.lipschitz!r}, above the {lipschitz!r} asked for."
        )
    return certificate


def _within_limits(model: nn.Module, program: Program) -> Program:
    """Scale each weight with an enforced limit down, in its own dtype, until its bound is within it."""
    limits = {f"{path}.weight" if path else "0.weight": layer_limit(module) for path, module in model.named_modules()}
    return _scaled(program, {name: within(limit) for name, limit in limits.items() if limit is not None})


def _scaled(program: Program, limits: dict[str, float]) -> Program:
    if not limits:
        return program
    sizes, tensors = shapes(program), dict(program.tensors)
    for node in program.nodes:
        limit = limits.get(node.get("weight", ""))
        if node["op"] in WEIGHTED and limit is not None:
            tensors[node["weight"]] = shrink(node, tensors[node["weight"]], limit, sizes[node["in"][0]], program.norm)
    return replace(program, tensors=tensors)


def _reaching(program: Program, certificate: Certificate, target: float) -> Program:
    """Lower the largest weights of a chain to a common limit, those of another program by a common factor."""
    published = certificate.program
    weighted = [node for node in published.nodes if node["op"] in WEIGHTED]
    if all(node["in"] == [index] and "bound" in node for index, node in enumerate(published.nodes)):
        fixed = math.prod(node["bound"] for node in published.nodes if node["op"] not in WEIGHTED)
        limit = layer_limits([node["bound"] for node in weighted], fixed, target)
        return publish(_scaled(program, {node["weight"]: limit for node in weighted if node["bound"] > limit}))
    if not weighted:
        raise UncertifiableError(
            f"no weight can be shrunk to reach the Lipschitz constant {target!r}: the rest has {certificate.lipschitz!r}."
        )
    limits = {node["weight"]: node["bound"] for node in weighted}

    def at(factor: float) -> Program:
        return publish(_scaled(program, {name: bound * factor for name, bound in limits.items()}))

    return _search(at, certificate.lipschitz, target)


def _search(at: Callable[[float], Program], start: float, target: float) -> Program:
    """Find the factor of the weights at which the constant, no product in a program with branches, is just within the target."""
    low, high, best = (0.0, 0.0), (1.0, start), None
    for tried in range(_TRIES):
        first = high[0] * min(target / high[1], 0.5 if tried else 1.0)
        factor = first if best is None else _between(low, high, target)
        candidate = at(factor)
        reached = _constant(candidate)
        if reached > target:
            high = (factor, reached)
        else:
            low, best = (factor, reached), candidate
        if best is not None and (low[1] >= target * (1.0 - 1e-4) or high[0] - low[0] < 1e-5 * high[0]):
            break
        if not tried and best is None and (rest := _constant(at(0.0))) >= target:
            raise UncertifiableError(
                f"the Lipschitz constant {target!r} cannot be reached by shrinking weights: with all of them at 0 it is {rest!r}, "
                "because of a part without weights, such as the identity of a residual sum."
            )
    if best is None:
        raise UncertifiableError(f"no weight can be shrunk to reach the Lipschitz constant {target!r}.")
    return best


def _between(low: tuple[float, float], high: tuple[float, float], target: float) -> float:
    """Interpolate the logarithm of the factor in that of the constant; the middle where that is no number in between."""
    aim, middle = target * (1.0 - 5e-5), (low[0] + high[0]) / 2
    if not low[1] < aim < high[1] or low[1] <= 0:
        return middle
    part = math.log(aim / low[1]) / math.log(high[1] / low[1])
    found = low[0] * (high[0] / low[0]) ** part
    return found if low[0] < found < high[0] else middle


def _constant(program: Program) -> float:
    return float(_statement(program, [], [])[1].constants()[-1] or 0)


def _certificate(program: Program, attested: list[Node], runtimes: list[Node], *, joint: bool) -> Certificate:
    """State what follows from the bounds, and have the bytes verified."""
    entries = find_joint(program) if joint else []
    statement, walk, weights = _statement(program, entries, attested)
    statement["predicate"]["claims"]["proved"] = _proved(walk)
    statement["predicate"]["runtimes"] = runtimes
    data = (json.dumps(statement, indent=1, sort_keys=True) + "\n").encode()
    total = check_claims(parse_json(data)["predicate"]["claims"], walk)
    return Certificate._verified(data, weights, total, program.norm)  # noqa: SLF001 the program was walked through just now


def _statement(program: Program, joint: list[Node], attested: list[Node]) -> tuple[dict[str, Any], Walk, bytes]:
    weights = encode_weights(program.tensors)
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": WEIGHTS_NAME, "digest": {"sha256": hashlib.sha256(weights).hexdigest()}}],
        "predicateType": verifier.PREDICATE_TYPE,
        "predicate": {
            "schema": 2,
            "producer": {
                "stableopt": __version__, "torch": str(torch.__version__), "python": platform.python_version(),
            },
            "input": {"shape": list(program.shape), "metric": program.norm, "domain": "R^n"},
            "graph": to_file(list(program.nodes)),
            "joint": to_file(joint),
            "claims": {"proved": [], "replayable": [], "attested": attested},
            "assumptions": list(verifier.ASSUMPTIONS),
            "not_claimed": list(_NOT_CLAIMED),
        },
    }  # fmt: skip
    statement = parse_json(json.dumps(statement).encode())
    tensors = {key: to_float64(*entry) for key, entry in parse_weights(weights).items()}
    try:
        with np.errstate(all="ignore"):
            return statement, read_program(statement["predicate"], tensors), weights
    except verifier.RejectedError as error:
        raise UncertifiableError(f"the program has no proof: {error}.") from None


def _proved(walk: Walk) -> list[Node]:
    """Return the claims that follow from a checked program."""
    constants = walk.constants()
    total = round_up(constants[-1] or 0)
    if not math.isfinite(total):
        raise UncertifiableError("the Lipschitz constant is too large for float64.")
    claims: list[Node] = [{"id": "lipschitz", "norm": walk.g.norm, "L": total}]
    last, shape = walk.nodes[-1], walk.shapes[-1]
    if last["op"] == "linear" and len(shape) == 1 and 2 <= shape[0] <= _MOST_CLASSES:
        table = needed_margins(walk) * (1 + _SLACK)
        if np.isfinite(table).all():
            claims.append({"id": "margin_constants", "L": np.maximum(table, table.T).tolist()})
    for index, bound in enumerate(walk.bounds):
        if (
            bound is not None
            and bound < 1
            and walk.nodes[index]["op"] not in {*WEIGHTED, "scale", "activation", "pool"}
        ):
            claims.append(
                {"id": "contraction", "from": walk.nodes[index]["in"][0], "to": index + 1, "factor": float(bound)}
            )
    depth = sum(node["op"] not in {"reshape", "permute", "slice", "concat", "activation"} for node in walk.nodes)
    if total > 0 and depth:
        claims.append({"id": "forward_exponent", "depth": depth, "rate": _rate(total, depth)})
    for index, node in enumerate(walk.nodes):
        mu = _log_norm(walk, node)
        if mu is not None and mu < 0:  # the flow of this matrix contracts
            claims.append({"id": "lognorm", "node": index, "mu": mu})
        rate, gain = walk.g.stable.get(id(node), (None, None))
        if rate is not None and gain is not None and rate < 1:
            claims.append({"id": "stability", "node": index, "rate": round_up(rate), "gain": round_up(gain)})
    return to_file(claims)


def _log_norm(walk: Walk, node: Node) -> float | None:
    """Return a number above the logarithmic 2-norm of a square dense operation of moderate size."""
    weight = walk.g.tensors[node["weight"]] if node["op"] == "linear" and walk.g.norm != "linf" else np.zeros((0, 1))
    if not 1 <= weight.shape[0] == weight.shape[1] <= _MOST_CLASSES:
        return None
    size = float(np.abs(weight).max())
    top = float(np.linalg.eigvalsh(weight / size + (weight / size).T)[-1]) / 2 if size else 0.0
    return (top + _SLACK * len(weight)) * size


def _rate(total: float, depth: int) -> float:
    """Return a number whose power is proved to be at least the constant."""
    return math.exp(math.log(total) / depth) * (1.0 + 1e-12)


def _checked_limit(lipschitz: Any) -> float:
    try:
        limit = math.nan if isinstance(lipschitz, str | bytes | bool) else float(lipschitz)
    except (TypeError, ValueError, RuntimeError):  # the last: a tensor of several numbers
        limit = math.nan
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"lipschitz must be a positive finite number, got {lipschitz!r}.")
    return limit


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape):
        raise ValueError(
            f"input_shape must be a tuple of integers >= 1, without the batch dimension, got {input_shape!r}."
        )
    return shape
