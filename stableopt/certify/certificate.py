"""Certificates: what is proved about a network, the numbers it is proved for, and the two files that say so."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableopt.certify import verifier
from stableopt.certify.arguments import check_inputs, checked_eps, checked_labels
from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.files import check_machine, decode_weights
from stableopt.certify.local import local_radii
from stableopt.certify.network import CertifiedNetwork
from stableopt.certify.program import Node, Program
from stableopt.certify.publish import from_file, to_file
from stableopt.certify.rounding import Analysis
from stableopt.certify.rounding_margins import Margins, margins
from stableopt.certify.runtime import RUNTIMES, find_runtime
from stableopt.errors import CertificateError
from stableopt.files import write_atomically

__all__ = ["CERTIFICATE_NAME", "WEIGHTS_NAME", "Certificate", "load"]

WEIGHTS_NAME, CERTIFICATE_NAME = "model.safetensors", "model.cert.json"
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""A proved Lipschitz bound of a network, together with exactly the numbers for which it is proved.

    For all inputs :math:`x, y`, the certified network :math:`f` in exact arithmetic has
    :math:`\|f(x) - f(y)\| \le L \|x - y\|` in the norm of the certificate. Certificates are made by
    :func:`stableopt.certify.certify` and :func:`load`; both run the independent verifier on the bytes.

    Args:
        certificate: the bytes of the certificate file.
        weights: the bytes of the weight file.

    Raises:
        CertificateError: if the verifier rejects the pair; the message is its reason.

    Examples:
        >>> from stableopt.certify import certify
        >>> cert = certify(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), (2,))
        >>> [node["op"] for node in cert.program.nodes]
        ['linear', 'activation']
        >>> Certificate(cert.certificate, cert.weights[:-1])
        Traceback (most recent call last):
        stableopt.errors.CertificateError: the certificate is rejected: the digest of 'model.safetensors' does not match.
    """

    certificate: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    lipschitz: float = field(init=False)
    """The proved bound :math:`L`."""
    norm: str = field(init=False)
    """The norm in which it holds: ``"l2"``, ``"linf"`` or ``"token_max"``."""

    def __post_init__(self) -> None:
        """Refuse bytes that the verifier rejects."""
        check_machine()
        result = verifier.check(self.certificate, lambda _: self.weights)
        if result.lipschitz is None:
            raise CertificateError(f"the certificate is rejected: {result.reason}.")
        object.__setattr__(self, "lipschitz", result.lipschitz)
        object.__setattr__(self, "norm", result.norm)

    @classmethod
    def _verified(cls, certificate: bytes, weights: bytes, lipschitz: float, norm: str) -> Certificate:
        """Make a certificate of bytes whose content the verifier has just walked through."""
        check_machine()
        made = object.__new__(cls)
        for name, value in (
            ("certificate", certificate),
            ("weights", weights),
            ("lipschitz", lipschitz),
            ("norm", norm),
        ):
            object.__setattr__(made, name, value)
        return made

    @cached_property
    def _predicate(self) -> dict[str, Any]:
        return json.loads(self.certificate)["predicate"]

    @property
    def program(self) -> Program:
        """A copy of the operations in order, each with settings, inputs, names of tensors and proved ``bound``, and the tensors."""
        tensors = {name: value.clone() for name, value in self._program.tensors.items()}
        return replace(self._program, nodes=self.layers, tensors=tensors)

    @cached_property
    def _program(self) -> Program:
        nodes = tuple(from_file(node) for node in self._predicate["graph"])
        return Program(nodes, decode_weights(self.weights), self.input_shape, self.norm)

    @property
    def layers(self) -> tuple[Node, ...]:
        """The operations of the program."""
        return copy.deepcopy(self._program.nodes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch dimension."""
        return tuple(self._predicate["input"]["shape"])

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the weight file."""
        return hashlib.sha256(self.weights).hexdigest()

    @property
    def claims(self) -> dict[str, list[dict[str, Any]]]:
        """The claims in their three tiers: ``proved``, ``replayable`` and ``attested``, real numbers as floats."""
        return from_file(self._predicate["claims"])

    @property
    def margin_constants(self) -> Tensor | None:
        r"""Proved bounds of the Lipschitz constants of the differences of two outputs, shape ``(classes, classes)``.

        From the norm of the certificate to absolute values. None if the network does not end with a dense layer of at most 256
        outputs; then :math:`\sqrt2 L` (:math:`2L` in ``"linf"``) bounds each of them.
        """
        return None if self._margin_constants is None else self._margin_constants.clone()

    @cached_property
    def _margin_constants(self) -> Tensor | None:
        for claim in self.claims["proved"]:
            if claim["id"] == "margin_constants":
                return torch.tensor(claim["L"], dtype=torch.float64)
        return None

    def module(self) -> CertifiedNetwork:
        """Return the certified network as a module in evaluation mode that holds copies of exactly the certified numbers.

        Note:
            The bounds are for exact arithmetic. For radii that hold for the outputs of a run in low precision see :meth:`deploy`.

        Examples:
            >>> from stableopt.certify import certify
            >>> cert = certify(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)), (2,))
            >>> cert.module()(torch.zeros(1, 2)).shape
            torch.Size([1, 2])
        """
        return CertifiedNetwork(self._program).eval()

    def radius(self, x: Tensor, labels: Tensor | None = None, *, norm: str | None = None) -> Tensor:
        r"""Return radii within which the predicted class cannot change.

        For every real input :math:`x'` with :math:`\|x' - x\| < r` the exact network with the stored weights predicts the same
        class as for :math:`x`, and so does every run of it in float64: the rounding of both is subtracted.

        Args:
            x: inputs, shape ``(batch, *input_shape)``, floating.
            labels: true classes, shape ``(batch,)``; wrongly classified inputs get 0. None: all inputs count.
            norm: the norm of the ball, ``"l2"`` or ``"linf"``; None for that of the certificate. For another one the radius is
                converted by :math:`\|d\|_2 \le \sqrt n \|d\|_\infty` or :math:`\|d\|_\infty \le \|d\|_2`.

        Returns:
            Radii, shape ``(batch,)``, float64 on the CPU. 0 means that nothing is certified: a tie, a margin below the rounding, an
            overflow, NaN, or a single class.

        Raises:
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if a shape or the norm does not fit.

        Note:
            This is about the exact network. Smooth activations are assumed to be computed within 16 units in the last place.

        Examples:
            >>> from stableopt.certify import certify
            >>> layer = torch.nn.Linear(2, 2, bias=False)
            >>> _ = torch.nn.init.eye_(layer.weight)  # the boundary is the diagonal
            >>> cert = certify(layer, (2,))
            >>> r = cert.radius(torch.tensor([[3.0, 1.0]]))
            >>> bool(2**0.5 * (1 - 1e-8) < r <= 2**0.5)
            True
        """
        best, reach = self._classify(x)
        size = self.input_shape[-1] if self.norm == "token_max" else math.prod(self.input_shape)
        reach = _converted(reach, self.norm, self.norm if norm is None else norm, size)
        if labels is None:
            return reach
        classes = None if self._margin_constants is None else len(self._margin_constants)
        return torch.where(checked_labels(labels, len(x), classes) == best, reach, torch.zeros_like(reach))

    def local_radius(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return radii that are at least those of :meth:`radius`, from bounds of the network in a ball around each input alone.

        In a ball around x most units of a rectifier network cannot switch, so its constant there is smaller than everywhere. For
        chains of linear operations and activations that are linear on either side of 0 (ReLU, LeakyReLU, absolute value).

        Args:
            x: inputs, shape ``(batch, *input_shape)``, floating.
            labels: true classes, shape ``(batch,)``; wrongly classified inputs get 0. None: all inputs count.

        Returns:
            Radii in the norm of the certificate, shape ``(batch,)``, float64 on the CPU, for the exact network.

        Raises:
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if a shape does not fit.
            UncertifiableError: if the program is of another kind.

        Examples:
            >>> from stableopt.certify import certify
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
            >>> cert, x = certify(net, (4,)), torch.ones(1, 4)
            >>> bool(cert.local_radius(x) >= cert.radius(x))
            True
        """
        reach = self.radius(x, labels)
        if not len(reach):
            return reach
        wider = local_radii(self._program, x.detach().to("cpu", torch.float64), reach)
        return torch.where(reach > 0, wider, reach)

    def certified_accuracy(self, x: Tensor, y: Tensor, eps: float) -> float:
        r"""Return the fraction of inputs that are classified rightly on the whole ball :math:`\|x' - x\|_2 \le \epsilon`.

        Args:
            x: inputs, shape ``(batch, *input_shape)``.
            y: true classes, shape ``(batch,)``.
            eps: the radius :math:`\epsilon \ge 0`, in the unit of the inputs.

        Raises:
            TypeError: if ``x`` is not a floating tensor.
            ValueError: if a shape or a label does not fit, the batch is empty, or ``eps`` is negative or not finite.

        Examples:
            >>> from stableopt.certify import certify
            >>> layer = torch.nn.Linear(1, 2, bias=False)
            >>> _ = torch.nn.init.constant_(layer.weight, 1.0)
            >>> _ = layer.weight.data[1].neg_()
            >>> x = torch.tensor([[1.0], [3.0]])
            >>> certify(layer, (1,)).certified_accuracy(x, torch.tensor([0, 0]), 2.0)
            0.5
        """
        limit = checked_eps(eps)
        check_inputs(x, self.input_shape)
        right = self.radius(x, checked_labels(y, len(x)))
        if not len(x):
            raise ValueError("the accuracy of an empty batch is undefined.")
        return float((right > limit).double().mean())

    def with_claims(self, replayable: Sequence[Node] = (), attested: Sequence[Node] = ()) -> Certificate:
        """Return the certificate with more claims of the tiers that are not proved.

        Args:
            replayable: claims that whoever has the data can repeat, as from :meth:`CertifiedAccuracy.claims`.
            attested: claims that rest on the word of their author, as from :func:`stableopt.certify.attest_run`.

        Raises:
            CertificateError: if a claim is malformed, or of a kind that must be proved.

        Examples:
            >>> from stableopt.certify import certify
            >>> cert = certify(torch.nn.ReLU(), (2,)).with_claims(attested=[{"id": "note", "author": "me"}])
            >>> cert.claims["attested"]
            [{'author': 'me', 'id': 'note'}]
        """
        statement = json.loads(self.certificate)
        try:
            for tier, more in (("replayable", replayable), ("attested", attested)):
                statement["predicate"]["claims"][tier] += to_file(list(more))
            content = json.dumps(statement, indent=1, sort_keys=True) + "\n"
        except TypeError as error:
            raise CertificateError(f"claims must be lists of what JSON can say: {error}.") from None
        return Certificate(content.encode(), self.weights)

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
            >>> from stableopt.certify import certify
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
        check_inputs(x, self.input_shape)
        best, reach = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
        with torch.no_grad():
            for rows in x.detach().to("cpu", torch.float64).split(_ROWS) if len(x) else ():
                found = self._margins(rows)
                best.append(found.best)
                reach.append(torch.where(rows.flatten(1).isfinite().all(1), found.radii(), 0.0))
        return torch.cat(best), torch.cat(reach)

    def _margins(self, rows: Tensor) -> Margins:
        logits = self._reference(rows)
        if logits.ndim != 2:
            raise ValueError(f"radii need an output of shape (batch, classes), got {tuple(logits.shape)}.")
        best = logits.nan_to_num(0.0).argmax(1)
        return margins(self._analysis, rows, best, self._margin_constants, self.lipschitz, exact=True)

    @cached_property
    def _analysis(self) -> Analysis:
        doubles = {name: value.double() for name, value in self._program.tensors.items()}
        return Analysis(self._program.nodes, doubles, RUNTIMES["float64"], self.norm)

    @cached_property
    def _reference(self) -> CertifiedNetwork:
        return CertifiedNetwork(self._program, plain=True).double()

    def deploy(self, runtime: str = "float32") -> CertifiedModel:
        """Return the certified network as it runs in an arithmetic, with radii that hold for what it computes there.

        Args:
            runtime: ``"float64"``, ``"float32"``, ``"tf32"``, ``"float16"`` or ``"bfloat16"``, see
                :data:`stableopt.certify.runtime.RUNTIMES`.

        Raises:
            ValueError: if the runtime is unknown.
            CertificateError: if the certificate is not made for it, this process does not compute in it, or an operation has no
                analysis of its rounding.

        Examples:
            >>> from stableopt.certify import certify
            >>> layer = torch.nn.Linear(2, 2, bias=False)
            >>> _ = torch.nn.init.eye_(layer.weight)
            >>> found = certify(layer, (2,)).deploy("float32").predict(torch.tensor([[3.0, 1.0]]))
            >>> found.labels.tolist(), round(float(found.radii), 3)
            ([0], 1.414)
        """
        certified = [entry["name"] for entry in self._predicate.get("runtimes", [])]
        if find_runtime(runtime).name not in certified:
            raise CertificateError(
                f"the certificate is not made for the runtime {runtime!r}, but for {certified}: name it in certify(runtimes=)."
            )
        return CertifiedModel(self, runtime)


def load(folder: str | Path) -> Certificate:
    """Read a certificate and its weights from a folder and verify them.

    Args:
        folder: a folder written by :meth:`Certificate.save`.

    Raises:
        CertificateError: if a file is missing, or the verifier rejects them.

    Examples:
        >>> import tempfile
        >>> from stableopt.certify import certify
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


def _converted(reach: Tensor, given: str, wanted: str, size: int) -> Tensor:
    """Convert radii to another norm of the ball, rounded down."""
    if wanted not in {"l2", "linf", given}:
        raise ValueError(f"norm must be 'l2', 'linf' or that of the certificate ({given!r}), got {wanted!r}.")
    if given in {wanted, "linf"}:  # |d|_inf <= |d|_2
        return reach
    if given == "token_max" and wanted == "l2":  # max over tokens <= |d|_2
        return reach
    return reach / math.nextafter(math.sqrt(size), math.inf) * (1.0 - 2.0**-50)
