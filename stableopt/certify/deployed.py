r"""Certified radii of a network as it runs: with the rounding of its runtime folded in."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stableopt.certify.arguments import check_inputs, checked_labels
from stableopt.certify.network import CertifiedNetwork
from stableopt.certify.program import Program, nested_tensors
from stableopt.certify.rounding import Analysis
from stableopt.certify.rounding_margins import Margins, margins
from stableopt.certify.runtime import Runtime, find_runtime, require
from stableopt.errors import CertificateError

__all__ = ["CertifiedModel", "Prediction"]

_ROWS = 256
_UNDEFINED = ("the input is not finite", "overflow", "a single class")
"""Reasons for which there is no predicted class to speak of."""


class Certified(Protocol):
    """What a :class:`CertifiedModel` needs of a certificate."""

    @property
    def program(self) -> Program:
        """The operations, each with its proved ``bound``."""
        ...

    @property
    def margin_constants(self) -> Tensor | None:
        """Proved bounds of the constants of the differences of outputs, or None."""
        ...

    @property
    def lipschitz(self) -> float:
        """The proved Lipschitz constant of the whole."""
        ...


@dataclass(frozen=True)
class Prediction:
    """What a model answered, and how far its inputs may move before any run of it answers something else.

    Args:
        labels: predicted classes, shape ``(batch,)``.
        radii: certified radii, shape ``(batch,)``, float64 on the CPU.
        reasons: for each sample why its radius is 0, or an empty string.
        logits: the outputs of the run, shape ``(batch, classes)``.

    Examples:
        >>> Prediction(torch.tensor([1]), torch.tensor([0.5]), ("",), torch.zeros(1, 2)).labels
        tensor([1])
    """

    labels: Tensor
    radii: Tensor
    reasons: tuple[str, ...]
    logits: Tensor


class CertifiedModel:
    r"""A certified network in a given runtime: predictions, and radii that hold for what this runtime computes.

    For every real input x' with :math:`\|x' - x\| < r`, rounded to the dtype of the runtime, and every execution in the runtime
    (any batch, any order of the sums, with or without fused multiply-add), the largest output is that of the predicted class.

    .. math:: r = \min_{j \ne i} \frac{m_{ij} - e_{ij}}{L_{ij} + e'_{ij}}

    with the margins :math:`m_{ij}` of the network with the weights that run, evaluated in float64 (its own rounding is part of
    :math:`e_{ij}`), proved constants :math:`L_{ij}`, and a bound :math:`e_{ij} + e'_{ij} r` of the rounding of the difference of
    two outputs on the ball (:mod:`stableopt.certify.rounding`).

    Args:
        certificate: a certificate: what it needs are ``program``, ``margin_constants`` and ``lipschitz``.
        runtime: name of the runtime, one of :data:`~stableopt.certify.runtime.RUNTIMES`, or a :class:`Runtime`.

    Raises:
        CertificateError: if this process does not run in the runtime, or the runtime rounds the weights of a block whose bound is
            proved for the unrounded ones.
        ValueError: for an unknown runtime.

    Note:
        The weights of dense layers and convolutions are rounded once to the format of the operands, and the certified bounds are
        replaced by those of the rounded weights. Convolutions run as matrix products. Elementary functions are assumed to be
        computed within 4 units in the last place.

    Examples:
        >>> from stableopt.certify import certify
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(layer.weight)  # the boundary is the diagonal
        >>> answer = CertifiedModel(certify(layer, (2,)), "float32").predict(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        >>> answer.labels.tolist(), answer.reasons
        ([0, 0], ('', 'a tie'))
        >>> bool(2**0.5 * (1 - 1e-5) < answer.radii[0] <= 2**0.5)
        True
    """

    def __init__(self, certificate: Certified, runtime: str | Runtime) -> None:
        program = certificate.program
        self.runtime = find_runtime(runtime)
        require(self.runtime, self.runtime.device)
        self.norm = program.norm
        self._size = math.prod(program.shape)
        stored = {name: value.detach().double().cpu() for name, value in program.tensors.items()}
        self.network = CertifiedNetwork(program, plain=True).to(self.runtime.dtype)
        _round_operands(self.network, self.runtime)
        read = {name for node in self.network.nodes for name in nested_tensors(node)}  # the others are parts of proofs
        tensors = {name: v.double() if name in read else stored[name] for name, v in self.network.tensors().items()}
        changed = frozenset(name for name, value in tensors.items() if not torch.equal(value, stored[name]))
        self._analysis = Analysis(program.nodes, tensors, self.runtime, self.norm, changed)
        self._constants, self._lipschitz = certificate.margin_constants, certificate.lipschitz
        self._unchanged = not (changed & _weights(self.network))
        self._copies = copy.deepcopy((self.network.nodes, {k: v.clone() for k, v in self.network.state_dict().items()}))
        self.network.to(self.runtime.device)

    def predict(self, x: Tensor, labels: Tensor | None = None, *, norm: str | None = None) -> Prediction:
        r"""Run the network on a batch and return classes and radii.

        Args:
            x: inputs, shape ``(batch, *shape)``, floating; they are cast to the dtype of the runtime.
            labels: true classes, shape ``(batch,)``; a sample of another predicted class gets the radius 0. None: all count.
            norm: the norm of the radii: that of the certificate, or ``"linf"`` for a certificate in l2, by
                :math:`\|v\|_2 \le \sqrt n\,\|v\|_\infty`. None: that of the certificate.

        Raises:
            CertificateError: if this process does not run in the runtime, or the network has been changed.
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if a shape does not fit, or the norm cannot be had.

        Examples:
            >>> from stableopt.certify import certify
            >>> model = CertifiedModel(certify(torch.nn.Linear(2, 1), (2,)), "float64")
            >>> model.predict(torch.zeros(1, 2)).reasons
            ('a single class',)
        """
        require(self.runtime, self.runtime.device)
        self._check_unchanged()
        share = self._share(norm)
        logits = self.run(x)
        if logits.ndim != 2:
            raise ValueError(f"radii need an output of shape (batch, classes), got {tuple(logits.shape)}.")
        labels = None if labels is None else checked_labels(labels, len(x), logits.shape[1])
        best = logits.argmax(1).cpu() if logits.numel() else torch.zeros(len(x), dtype=torch.int64)
        radii, reasons = [torch.zeros(0, dtype=torch.float64)], list[str]()
        doubles = x.detach().double().cpu()
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            found = self._radii(doubles[rows], logits[rows].cpu(), best[rows], None if labels is None else labels[rows])
            radii.append(found[0])
            reasons += found[1]
        reach = torch.cat(radii)
        if share != 1.0:
            reach = torch.nextafter(reach / share, torch.zeros_like(reach))
        return Prediction(best.to(logits.device), reach, tuple(reasons), logits)

    def run(self, x: Tensor) -> Tensor:
        """Return the outputs of the network in the runtime, without radii.

        Examples:
            >>> from stableopt.certify import certify
            >>> CertifiedModel(certify(torch.nn.ReLU(), (1,)), "bfloat16").run(torch.tensor([[-1.0]]))
            tensor([[0.]])
        """
        check_inputs(x, self.network.shape)
        kind = self.runtime.autocast
        with torch.no_grad(), torch.autocast(self.runtime.device, dtype=kind, enabled=kind is not None):
            return self.network(x.detach().to(self.runtime.device, self.runtime.dtype))

    def _radii(self, x: Tensor, logits: Tensor, best: Tensor, labels: Tensor | None) -> tuple[Tensor, list[str]]:
        found = margins(self._analysis, x, best, self._constants, self._lipschitz, exact=self._unchanged)
        reach = found.radii()
        why = self._reasons(x, logits.double(), best, found, reach)
        if labels is not None:
            hits = zip((labels == best).tolist(), why, strict=True)
            why = [text if hit or text in _UNDEFINED else "another class" for hit, text in hits]
        zero = torch.tensor([text != "" for text in why], dtype=torch.bool)
        return reach.masked_fill(zero, 0.0), why

    def _reasons(self, x: Tensor, logits: Tensor, best: Tensor, found: Margins, reach: Tensor) -> list[str]:
        top = logits.gather(1, best[:, None])
        tied = (logits == top).sum(1) > 1
        inside = x.flatten(1).isfinite().all(1)
        finite = logits.isfinite().all(1) & found.logits.isfinite().all(1)
        strayed = ((top - logits) - found.margins).abs() > found.errors * (1.0 + 1e-6)
        tests = [
            (~inside, _UNDEFINED[0]),
            (~finite | (found.cap <= 0), _UNDEFINED[1]),
            (torch.full_like(tied, logits.shape[1] < 2), _UNDEFINED[2]),
            (tied, "a tie"),
            (strayed.any(1), "the run is farther from the exact network than its runtime allows"),
            (~(reach > 0), "the margin is below the rounding"),
        ]
        words = [""] * len(x)
        for test, text in reversed(tests):
            words = [text if hit else old for hit, old in zip(test.tolist(), words, strict=True)]
        return words

    def _share(self, norm: str | None) -> float:
        """Return by what to divide the radii of the certificate."""
        if norm is None or norm == self.norm:
            return 1.0
        if norm == "linf" and self.norm == "l2":
            return math.nextafter(math.sqrt(self._size), math.inf)
        raise ValueError(
            f"a certificate in {self.norm} has radii in {self.norm}, and one in l2 also in linf; got {norm!r}."
        )

    def _check_unchanged(self) -> None:
        nodes, tensors = self._copies
        now = self.network.state_dict()
        same = self.network.nodes == nodes and now.keys() == tensors.keys()
        if not (
            same
            and all(
                now[name].dtype == value.dtype and torch.equal(now[name].cpu(), value)
                for name, value in tensors.items()
            )
        ):
            raise CertificateError(
                "the network of this CertifiedModel has been changed since it was made; make it again."
            )


def _round_operands(network: CertifiedNetwork, runtime: Runtime) -> None:
    """Round weights to numbers of the format of operands, so that the runtime has nothing left to round."""
    if runtime.operands == runtime.wide:
        return
    names = {
        node[key]
        for node in network.nodes
        if node["op"] in {"linear", "conv"}
        for key in ("weight", "bias")  # the bias of a convolution is an operand too: a factor 1 multiplies it
        if node[key] is not None and (key == "weight" or runtime.autocast is not None or node["op"] == "conv")
    }
    for name, value in network.tensors().items():
        if name in names:
            value.copy_(_truncated(value) if runtime.autocast is None else value.to(runtime.autocast))


def _truncated(value: Tensor) -> Tensor:
    """Round float32 to the nearest number with 11 significant bits."""
    bits = value.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _weights(network: CertifiedNetwork) -> set[str]:
    """Return the tensors on which a bound depends: all but biases."""
    return {
        value
        for node in network.nodes
        for key, value in node.items()
        if isinstance(value, str) and key not in {"op", "name", "bias"}
    }
