"""Certificates: what is proved about a network, the numbers it is proved for, and the two files that say so."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stableopt._version import __version__
from stableopt.certify import verify as verifier
from stableopt.certify.bounds import WEIGHTED, from_file, layer_limits, publish, shrink, to_file, weight_bound, within
from stableopt.certify.files import decode_weights, encode_weights
from stableopt.certify.graph import extract
from stableopt.certify.modules import build
from stableopt.certify.radius import evaluate, radii
from stableopt.errors import CertificateError, UncertifiableError
from stableopt.files import write_atomically
from stableopt.linalg import Bound
from stableopt.nn.layers import layers
from stableopt.nn.stabilize import layer_limit

__all__ = ["CERTIFICATE_NAME", "Certificate", "WEIGHTS_NAME", "certify", "load"]

Node = dict[str, Any]

WEIGHTS_NAME, CERTIFICATE_NAME = "model.safetensors", "model.cert.json"
_MOST_CLASSES = 256
"""Beyond this many classes the table of margin constants is left out: it would outgrow the weights."""
_ROWS = 256
_NOT_CLAIMED = (
    "accuracy",
    "norms other than l2",
    "the rounding of the arithmetic in which the network is run later",
    "anything about the data or the training",
)


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""A proved Lipschitz bound of a network, together with exactly the numbers for which it is proved.

    For all inputs :math:`x, y`, the certified network :math:`f` in exact arithmetic has
    :math:`\|f(x) - f(y)\|_2 \le L \|x - y\|_2`.
    Certificates are made by :func:`certify` and :func:`load`; both run the independent verifier on the bytes.

    Args:
        certificate: the bytes of the certificate file.
        weights: the bytes of the weight file.

    Raises:
        CertificateError: if the verifier rejects the pair; the message is its reason.

    Examples:
        >>> cert = certify(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), (2,))
        >>> [layer["op"] for layer in cert.layers]
        ['linear', 'activation']
        >>> Certificate(cert.certificate, cert.weights[:-1])
        Traceback (most recent call last):
        stableopt.errors.CertificateError: the certificate is rejected: the digest of 'model.safetensors' does not match.
    """

    certificate: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    lipschitz: float = field(init=False)
    """The proved bound :math:`L`."""

    def __post_init__(self) -> None:
        """Refuse bytes that the verifier rejects."""
        result = verifier.check(self.certificate, lambda _: self.weights)
        if result.lipschitz is None:
            raise CertificateError(f"the certificate is rejected: {result.reason}.")
        object.__setattr__(self, "lipschitz", result.lipschitz)

    @cached_property
    def _predicate(self) -> dict[str, Any]:
        return json.loads(self.certificate)["predicate"]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return decode_weights(self.weights)

    @cached_property
    def _doubles(self) -> dict[str, Tensor]:
        return {name: value.double() for name, value in self._tensors.items()}

    @property
    def layers(self) -> tuple[Node, ...]:
        """The operations in order, each with its settings, the names of its tensors and its proved ``bound``."""
        return tuple(from_file(node) for node in self._predicate["graph"])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch dimension."""
        return tuple(self._predicate["input"]["shape"])

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the weight file."""
        return hashlib.sha256(self.weights).hexdigest()

    @cached_property
    def margin_constants(self) -> Tensor | None:
        r"""Proved bounds of the Lipschitz constants of the differences of two outputs, shape ``(classes, classes)``.

        None if the network does not end with a dense layer of at most 256 outputs; then :math:`\sqrt2 L` bounds each of them.
        """
        for claim in self._predicate["claims"]["proved"]:
            if claim["id"] == "margin_constants":
                return torch.tensor([[float.fromhex(v) for v in row] for row in claim["L"]], dtype=torch.float64)
        return None

    def module(self) -> nn.Sequential:
        """Return the certified network as plain modules in evaluation mode, holding copies of exactly the certified numbers.

        Note:
            The bounds are for exact arithmetic. Run in float32, the outputs carry rounding errors that the certificate does not
            cover; the radii are for the exact network.

        Examples:
            >>> cert = certify(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)), (2,))
            >>> list(cert.module())
            [Linear(in_features=2, out_features=2, bias=True)]
        """
        copies = {name: value.clone() for name, value in self._tensors.items()}
        return nn.Sequential(*(build(node, copies) for node in self.layers)).eval()

    def radius(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        r"""Return radii within which the predicted class cannot change.

        For every real input :math:`x'` with :math:`\|x' - x\|_2 < r` the exact network with the stored weights predicts the same
        class as for :math:`x`. The logits are evaluated in float64, and the rounding of this evaluation is subtracted.

        Args:
            x: inputs, shape ``(batch, *input_shape)``, floating.
            labels: true classes, shape ``(batch,)``; wrongly classified inputs get 0. None: all inputs count.

        Returns:
            Radii in the 2-norm of the whole input, shape ``(batch,)``, float64 on the CPU. 0 means that nothing is certified: a
            tie, a margin below the rounding, an overflow, NaN, or a single class.

        Raises:
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if a shape does not fit.

        Note:
            This is about the exact network. Smooth activations are assumed to be computed within 16 units in the last place.

        Examples:
            >>> layer = torch.nn.Linear(2, 2, bias=False)
            >>> _ = torch.nn.init.eye_(layer.weight)  # the boundary is the diagonal
            >>> cert = certify(layer, (2,))
            >>> r = cert.radius(torch.tensor([[3.0, 1.0]]))
            >>> bool(2**0.5 * (1 - 1e-8) < r <= 2**0.5)
            True
        """
        best, reach = self._classify(x)
        if labels is None:
            return reach
        return torch.where(_labels(labels, len(x)) == best, reach, torch.zeros_like(reach))

    def certified_accuracy(self, x: Tensor, y: Tensor, eps: float) -> float:
        r"""Return the fraction of inputs that are classified rightly on the whole ball :math:`\|x' - x\|_2 \le \epsilon`.

        Args:
            x: inputs, shape ``(batch, *input_shape)``.
            y: true classes, shape ``(batch,)``.
            eps: the radius :math:`\epsilon \ge 0`, in the unit of the inputs.

        Raises:
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if a shape does not fit, the batch is empty, or ``eps`` is negative or NaN.

        Examples:
            >>> layer = torch.nn.Linear(1, 2, bias=False)
            >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
            >>> _ = layer.weight.data[1].neg_()
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> certify(layer, (1,)).certified_accuracy(x, torch.tensor([0, 0]), 2.0)
            0.5
        """
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps!r}.")
        if len(x) == 0:
            raise ValueError("the accuracy of an empty batch is undefined.")
        return float((self.radius(x, y) > eps).double().mean())

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``model.safetensors`` and then ``model.cert.json`` into a folder, each whole or not at all.

        Args:
            folder: the folder; it is created if it is missing. Old files of these names are replaced.

        Returns:
            The paths of the weight file and of the certificate.

        Raises:
            OSError: if the folder cannot be written.

        Note:
            If the process dies between the two files, the old certificate does not fit the new weights and is rejected.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     [path.name for path in certify(torch.nn.Linear(2, 2), (2,)).save(folder)]
            ['model.safetensors', 'model.cert.json']
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS_NAME, self.weights)
        write_atomically(folder / CERTIFICATE_NAME, self.certificate)
        return folder / WEIGHTS_NAME, folder / CERTIFICATE_NAME

    def _classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"the inputs must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}.")
        if tuple(x.shape[1:]) != self.input_shape or x.ndim == 0:
            raise ValueError(f"expected inputs of shape (batch, {str(self.input_shape)[1:-1]}), got {tuple(x.shape)}.")
        best, reach = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
        with torch.no_grad():
            for rows in x.detach().to("cpu", torch.float64).split(_ROWS) if len(x) else ():
                logits, error = evaluate(self.layers, self._doubles, rows)
                if logits.ndim != 2:
                    raise ValueError(f"radii need an output of shape (batch, classes), got {tuple(logits.shape)}.")
                constants = self.margin_constants
                if constants is None:
                    root = (Bound.point(2.0).sqrt() * self.lipschitz).upper
                    constants = torch.full(logits.shape[1:] * 2, root, dtype=torch.float64)
                labels, r = radii(logits, error, constants)
                best.append(labels)
                reach.append(r)
        return torch.cat(best), torch.cat(reach)


def certify(model: nn.Module, input_shape: Sequence[int], *, lipschitz: float | None = None) -> Certificate:
    r"""Prove a Lipschitz bound of a model and return it as a certificate.

    What is certified is the map in evaluation mode, whatever mode the model is in: dropout is left out, parametrizations are folded
    into the numbers that they produce now. The model is not changed. A weight with an enforced limit (by
    :func:`stableopt.nn.stabilize` or a :class:`~stableopt.constraints.SpectralBall`) is scaled down, in its own dtype, until its
    proved bound is within that limit.

    Args:
        model: nested ``nn.Sequential`` of layers that have a rule in :func:`stableopt.certify.fold`.
        input_shape: shape of one input, without the batch dimension.
        lipschitz: a Lipschitz constant that the certificate must reach; the largest weights are scaled down until it does. None:
            only the enforced limits count.

    Returns:
        The certificate, already checked by the independent verifier.

    Raises:
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
    if lipschitz is not None and not (math.isfinite(lipschitz) and lipschitz > 0):
        raise ValueError(f"lipschitz must be positive and finite, got {lipschitz!r}.")
    nodes, tensors = extract(model, shape)
    _keep_limits(model, nodes, tensors)
    if lipschitz is not None:
        _reach(nodes, tensors, lipschitz)
    published = [publish(node, tensors) for node in nodes]
    total = math.prod((Bound.point(node["bound"]) for node in published), start=Bound.point(1.0)).upper
    if lipschitz is not None and total > lipschitz:
        raise UncertifiableError(f"the proved Lipschitz constant is {total!r}, above the {lipschitz!r} asked for.")
    weights = encode_weights(tensors)
    return Certificate(_statement(weights, shape, published, total, tensors), weights)


def load(folder: str | Path) -> Certificate:
    """Read a certificate and its weights from a folder and verify them.

    Args:
        folder: a folder written by :meth:`Certificate.save`.

    Raises:
        CertificateError: if a file is missing, or the verifier rejects them.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = certify(torch.nn.ReLU(), (2,)).save(folder)
        ...     load(folder).lipschitz
        1.0
    """
    folder = Path(folder)
    try:
        return Certificate((folder / CERTIFICATE_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes())
    except OSError as error:
        raise CertificateError(
            f"expected {CERTIFICATE_NAME} and {WEIGHTS_NAME} in '{folder}', but {error.filename!r} cannot be read: "
            f"{error.strerror}. Write them with Certificate.save."
        ) from None


def _keep_limits(model: nn.Module, nodes: list[Node], tensors: dict[str, Tensor]) -> None:
    limits = {f"{path}.weight" if path else "weight": layer_limit(module) for path, module in layers(model)}
    for node in nodes:
        limit = limits.get(str(node.get("weight")))
        if node["op"] in WEIGHTED and limit is not None:
            tensors[node["weight"]] = shrink(node, tensors[node["weight"]], within(limit))


def _reach(nodes: list[Node], tensors: dict[str, Tensor], target: float) -> None:
    weighted = [node for node in nodes if node["op"] in WEIGHTED]
    others = [publish(node, tensors)["bound"] for node in nodes if node["op"] not in WEIGHTED]
    bounds = [weight_bound(node, tensors[node["weight"]]) for node in weighted]
    limit = layer_limits(bounds, math.prod(others), target)
    for node, bound in zip(weighted, bounds, strict=True):
        if bound > limit:
            tensors[node["weight"]] = shrink(node, tensors[node["weight"]], limit)


def _statement(
    weights: bytes, shape: tuple[int, ...], nodes: list[Node], total: float, tensors: dict[str, Tensor]
) -> bytes:
    proved: list[dict[str, Any]] = [{"id": "lipschitz_l2", "L": total.hex()}]
    last = nodes[-1]
    if last["op"] == "linear" and _is_vector(nodes, shape) and 2 <= len(tensors[last["weight"]]) <= _MOST_CLASSES:
        before = math.prod((Bound.point(node["bound"]) for node in nodes[:-1]), start=Bound.point(1.0)).upper
        table = verifier.margin_constants(tensors[last["weight"]].double().numpy(), Fraction(before)) * (1 + 1e-9)
        if np.isfinite(table).all():
            table = np.maximum(table, table.T)
            proved.append({"id": "margin_constants", "L": [[value.hex() for value in row] for row in table.tolist()]})
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": WEIGHTS_NAME, "digest": {"sha256": hashlib.sha256(weights).hexdigest()}}],
        "predicateType": verifier.PREDICATE_TYPE,
        "predicate": {
            "schema": 1,
            "producer": {
                "stableopt": __version__, "torch": str(torch.__version__), "python": platform.python_version(),
            },
            "input": {"shape": list(shape), "metric": "l2", "domain": "R^n"},
            "graph": [to_file(node) for node in nodes],
            "claims": {"proved": proved, "replayable": [], "attested": []},
            "assumptions": list(verifier.ASSUMPTIONS),
            "not_claimed": list(_NOT_CLAIMED),
        },
    }  # fmt: skip
    return (json.dumps(statement, indent=1, sort_keys=True) + "\n").encode()


def _is_vector(nodes: list[Node], shape: tuple[int, ...]) -> bool:
    """Return whether the output is a vector: a flatten or a vector input, and no image layer after it."""
    flat = len(shape) == 1
    for node in nodes:
        flat = flat or node["op"] == "flatten"
    return flat


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape):
        raise ValueError(
            f"input_shape must be a tuple of integers >= 1, without the batch dimension, got {input_shape!r}."
        )
    return shape


def _labels(labels: Tensor, batch: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.shape != (batch,):
        raise ValueError(
            f"labels must be an integer tensor of shape ({batch},), got {getattr(labels, 'shape', labels)!r}."
        )
    return labels.detach().to("cpu", torch.int64)
