r"""Certified accuracy: the share of a data set that is classified rightly on a whole ball, with what is needed to repeat it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.arguments import checked_eps, checked_labels
from stableopt.certify.certificate import Certificate
from stableopt.certify.dataset import Digest, batches, dataset_sha256
from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.produce import certify

__all__ = ["CertifiedAccuracy", "certified_accuracy", "dataset_sha256"]

EXACT = "real arithmetic"
"""The name of the runtime of :meth:`Certificate.radius`: the exact network, whatever runs it."""


@dataclass(frozen=True, eq=False)
class CertifiedAccuracy:
    r"""What :func:`certified_accuracy` found.

    A sample counts as certified at :math:`\varepsilon` if it is classified rightly and its radius is *above* it: the class is
    proved for all inputs at a distance below the radius, so it holds on the closed ball. Ties have the radius 0 and are certified
    at no :math:`\varepsilon`, not at 0 either.

    Args:
        eps: the radii :math:`\varepsilon` asked for, in the unit of the inputs.
        radii: the radius of each sample in the order of the data, float64; 0 where it is classified wrongly or nothing is proved.
        labels: the true classes.
        correct: whether each sample is classified rightly.
        norm: in which the radii are.
        runtime: the arithmetic that the radii are for.
        dataset_sha256: digest of the data, see :func:`dataset_sha256`.
        reasons: how often a CertifiedModel gave each reason for a radius of 0.

    Examples:
        >>> found = CertifiedAccuracy(
        ...     (0.5,), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1, 1]), torch.tensor([True, True, False])
        ... )
        >>> found.clean, found.certified
        (0.6666666666666666, (0.3333333333333333,))
        >>> print(found.to_markdown())
        | class | n | clean | ε = 0.5 | median radius |
        |---|---|---|---|---|
        | 0 | 1 | 100.00 | 100.00 | 1.0000 |
        | 1 | 2 | 50.00 | 0.00 | 0.0000 |
        | all | 3 | 66.67 | 33.33 | 0.5000 |
    """

    eps: tuple[float, ...]
    radii: Tensor
    labels: Tensor
    correct: Tensor
    norm: str = "l2"
    runtime: str = EXACT
    dataset_sha256: str = ""
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.radii)

    @property
    def clean(self) -> float:
        """The share of samples that are classified rightly."""
        return int(self.correct.sum()) / self.n

    @property
    def certified(self) -> tuple[float, ...]:
        """The certified accuracy at each of ``eps``."""
        return tuple(self.at(eps) for eps in self.eps)

    @property
    def mean_radius(self) -> float:
        """The mean of the radii; a sample that is classified wrongly counts 0."""
        return float(self.radii.mean())

    @property
    def median_radius(self) -> float:
        """The median of the radii, the lower one of two; a sample that is classified wrongly counts 0."""
        return float(self.radii.median())

    @cached_property
    def _sorted(self) -> Tensor:
        return self.radii.sort().values

    def count(self, eps: float) -> int:
        r"""Return how many samples are certified at :math:`\varepsilon`.

        Args:
            eps: :math:`\varepsilon \ge 0`.

        Raises:
            ValueError: if ``eps`` is negative or NaN.

        Examples:
            >>> ones = torch.ones(2)
            >>> found = CertifiedAccuracy((), ones, torch.zeros(2), ones > 0)
            >>> found.count(0.999), found.count(1.0)
            (2, 0)
        """
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps!r}.")
        at = torch.tensor(float(eps), dtype=self.radii.dtype)
        return self.n - int(torch.searchsorted(self._sorted, at, right=True))

    def at(self, eps: float) -> float:
        r"""Return the certified accuracy at :math:`\varepsilon`, the share of all samples with a radius above it.

        Args:
            eps: :math:`\varepsilon \ge 0`, any, not only one that was asked for.

        Raises:
            ValueError: if ``eps`` is negative or NaN.

        Examples:
            >>> found = CertifiedAccuracy((), torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([True, True]))
            >>> found.at(0.0), found.at(1.0), found.at(2.0)
            (1.0, 0.5, 0.0)
        """
        return self.count(eps) / self.n

    def curve(self, points: int | None = None) -> list[tuple[float, float]]:
        r"""Return the curve of the certified accuracy over :math:`\varepsilon`, for a plot.

        It is constant between the radii, and drops at each of them.

        Args:
            points: at how many equally spaced :math:`\varepsilon` from 0 to the largest finite radius; None for all the steps.

        Returns:
            Pairs :math:`(\varepsilon, \text{accuracy})` with rising :math:`\varepsilon`, beginning with 0.

        Raises:
            ValueError: if there are fewer than two points.

        Examples:
            >>> found = CertifiedAccuracy((), torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([True, True]))
            >>> found.curve()
            [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0)]
        """
        finite = self._sorted[self._sorted.isfinite()]
        if points is not None:
            if points < 2:
                raise ValueError(f"a curve needs at least 2 points, got {points!r}.")
            last = float(finite[-1]) if len(finite) else 1.0
            return [(eps, self.at(eps)) for eps in (last * k / (points - 1) for k in range(points))]
        steps = torch.cat([finite.new_zeros(1), finite]).unique().tolist()
        return [(eps, self.at(eps)) for eps in steps]

    def rows(self) -> list[dict[str, Any]]:
        """Return the table of the classes that the data hold, and of all together, last.

        Returns:
            For each ``class``, ``n``, ``correct`` and ``clean``, ``certified`` with the count and ``accuracy`` with the share at
            each of ``eps``, ``mean_radius`` and ``median_radius``.

        Examples:
            >>> found = CertifiedAccuracy(
            ...     (0.5,), torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.tensor([True])
            ... )
            >>> [(row["class"], row["certified"]) for row in found.rows()]
            [(0, [1]), ('all', [1])]
        """
        parts: list[tuple[int | str, CertifiedAccuracy]] = [
            (int(label), self._part(self.labels == label)) for label in self.labels.unique()
        ]
        return [
            {
                "class": name,
                "n": part.n,
                "correct": int(part.correct.sum()),
                "clean": part.clean,
                "certified": [part.count(eps) for eps in self.eps],
                "accuracy": list(part.certified),
                "mean_radius": part.mean_radius,
                "median_radius": part.median_radius,
            }
            for name, part in [*parts, ("all", self)]
        ]

    def to_markdown(self) -> str:
        """Return the table in percent, as markdown.

        Examples:
            >>> found = CertifiedAccuracy((), torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.tensor([True]))
            >>> print(found.to_markdown().splitlines()[-1])
            | all | 1 | 100.00 | 1.0000 |
        """
        head = ["class", "n", "clean", *(f"ε = {eps:g}" for eps in self.eps), "median radius"]
        lines = [head, ["---"] * len(head)]
        for row in self.rows():
            shares = [f"{100 * share:.2f}" for share in (row["clean"], *row["accuracy"])]
            lines.append([str(row["class"]), str(row["n"]), *shares, f"{row['median_radius']:.4f}"])
        return "\n".join(
            "| " + " | ".join(line) + " |" if line[0] != "---" else "|---" * len(head) + "|" for line in lines
        )

    def claims(self) -> list[dict[str, Any]]:
        """Return what is found as replayable claims of a certificate: whoever has the data can repeat them.

        Returns:
            ``accuracy``, and ``certified_accuracy`` for each of ``eps``, each with the digest of the data, the runtime, the share
            ``value`` (both reals as hexadecimal floats), the ``count`` of samples that it is of and the number of them that pass.

        Examples:
            >>> found = CertifiedAccuracy((0.5,), torch.ones(2), torch.zeros(2), torch.tensor([True, True]))
            >>> [(claim["id"], claim["passed"], claim["count"]) for claim in found.claims()]
            [('accuracy', 2, 2), ('certified_accuracy', 2, 2)]
        """
        common = {"dataset_sha256": self.dataset_sha256, "runtime": self.runtime, "count": self.n}
        right = int(self.correct.sum())
        claims = [{"id": "accuracy", **common, "passed": right, "value": (right / self.n).hex()}]
        for eps in self.eps:
            passed = self.count(eps)
            entry = {"id": "certified_accuracy", **common, "norm": self.norm, "eps": eps.hex(), "passed": passed}
            claims.append({**entry, "value": (passed / self.n).hex()})
        return claims

    def __str__(self) -> str:
        """Return what is found in a few lines."""
        lines = [f"{self.n} samples, {self.norm}, {self.runtime}", f"clean accuracy {100 * self.clean:.2f} %"]
        lines += [f"certified at {eps:g}: {100 * self.at(eps):.2f} %" for eps in self.eps]
        return "\n".join([*lines, f"median radius {self.median_radius:.4g}, mean {self.mean_radius:.4g}"])

    def _part(self, rows: Tensor) -> CertifiedAccuracy:
        return CertifiedAccuracy(
            self.eps, self.radii[rows], self.labels[rows], self.correct[rows], self.norm, self.runtime
        )


Data = tuple[Tensor, Tensor] | Iterable[Any]


def certified_accuracy(
    model: nn.Module | Certificate | CertifiedModel,
    loader: Data,
    eps: Sequence[float] | float = (0.0,),
    *,
    norm: str | None = None,
    runtime: str | None = None,
    input_shape: Sequence[int] | None = None,
) -> CertifiedAccuracy:
    r"""Measure which share of a data set is classified rightly, with proof, on the whole ball around each sample.

    .. math:: \frac1n \#\{i : \text{the label of } x_i \text{ is predicted and } r_i > \varepsilon\}

    Args:
        model: a :class:`Certificate`, whose radii are those of the exact network; a :class:`CertifiedModel`, whose radii hold for
            the network as it runs, all rounding counted; or a model, which is certified first.
        loader: batches ``(x, y)``, such as a DataLoader, or one pair of tensors ``(X, Y)`` of all inputs and labels.
        eps: the radii :math:`\varepsilon \ge 0`, in the unit of the inputs.
        norm: of the ball, ``"l2"``, ``"linf"`` or ``"token_max"``. A model is certified in it, None for ``"l2"``; the radii of a
            certificate in another norm are converted as in :meth:`Certificate.radius`, None for its own.
        runtime: name of the arithmetic in which a model or a certificate is run, such as ``"float32"``, see
            :meth:`Certificate.deploy`. None for the exact network, or for the runtime of a CertifiedModel.
        input_shape: of one input, for a model; None reads it off the data.

    Returns:
        The accuracies, per radius and per class, with the radius of each sample.

    Raises:
        TypeError: if the model, the batches or the labels are of another kind.
        ValueError: if the data are empty, a shape, a label, the norm or the runtime does not fit, or ``eps`` is negative or not
            finite.
        UncertifiableError: if a model cannot be certified.

    Note:
        A model is certified in evaluation mode and not changed. Augmentation and shuffling in a loader change the digest.

    Examples:
        >>> layer = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight[0].data, 1.0), torch.nn.init.constant_(layer.weight[1].data, -1.0)
        >>> x, y = torch.tensor([[1.0], [3.0], [-2.0]]), torch.tensor([0, 0, 0])  # the boundary is 0
        >>> certified_accuracy(layer, (x, y), eps=[0.5, 2.0]).certified
        (0.6666666666666666, 0.3333333333333333)
    """
    wanted = _checked_eps(eps)
    pairs = batches(loader)
    first = next(pairs, None)
    if first is None:
        raise ValueError("certified_accuracy needs at least one sample, and the data are empty.")
    if isinstance(model, nn.Module):
        model = certify(model, tuple(first[0].shape[1:]) if input_shape is None else input_shape, norm=norm or "l2")
    predict, norm, name = _prepared(model, norm, runtime)
    classes = _classes(model)
    digest, reasons = Digest(), Counter[str]()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for x, labels in itertools.chain([first], pairs):
        digest.update(x, labels)
        predicted, radii, why = predict(x)
        y, radii = checked_labels(labels, len(x), classes), radii.cpu().double()
        right = predicted.cpu() == y
        found.append((torch.where(right, radii, torch.zeros_like(radii)), y, right))
        reasons.update(reason for reason in why if reason)
    radii, y, correct = (torch.cat(column) for column in zip(*found, strict=True))
    return CertifiedAccuracy(wanted, radii, y, correct, norm, name, digest.hexdigest(), dict(reasons))


Predict = Callable[[Tensor], tuple[Tensor, Tensor, Iterable[str]]]


def _prepared(model: Any, norm: str | None, runtime: str | None) -> tuple[Predict, str, str]:
    """Return the function from a batch to labels, radii and reasons, the norm of its radii, and the name of its arithmetic."""
    if isinstance(model, Certificate) and runtime is None:
        return _exact(model, norm or model.norm), norm or model.norm, EXACT
    if isinstance(model, Certificate):
        model = model.deploy(str(runtime))
    if not isinstance(model, CertifiedModel):
        raise TypeError(
            f"certified_accuracy needs a model, a Certificate or a CertifiedModel, got {type(model).__name__}."
        )
    if runtime not in {None, model.runtime.name}:
        raise ValueError(
            f"the CertifiedModel runs in {model.runtime.name!r}, and the accuracy is asked for in {runtime!r}."
        )
    return _deployed(model, norm or model.norm), norm or model.norm, model.runtime.name


def _exact(certificate: Certificate, norm: str) -> Predict:
    def predict(x: Tensor) -> tuple[Tensor, Tensor, Iterable[str]]:
        labels, radii = certificate._classify(x)  # noqa: SLF001
        return labels, radii if norm == certificate.norm else certificate.radius(x, norm=norm), ()

    return predict


def _deployed(model: CertifiedModel, norm: str) -> Predict:
    def predict(x: Tensor) -> tuple[Tensor, Tensor, Iterable[str]]:
        found = model.predict(x, norm=norm)
        return found.labels, found.radii, found.reasons

    return predict


def _classes(model: Any) -> int | None:
    table = model.margin_constants if isinstance(model, Certificate) else None
    return None if table is None else len(table)


def _checked_eps(eps: Any) -> tuple[float, ...]:
    several = isinstance(eps, Iterable) and not isinstance(eps, str) and not (isinstance(eps, Tensor) and eps.ndim == 0)
    wanted: Iterable[Any] = eps if several else [eps]
    return tuple(checked_eps(e) for e in wanted)
