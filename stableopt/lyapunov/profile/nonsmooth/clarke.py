r"""Bounds that hold for every element of the derivative of a nonsmooth model (T5).

At a kink a model has no derivative, but a set of them. For a chain of affine layers and piecewise-linear activations the chain rule
encloses it in the convex hull of

.. math:: \mathcal{J} = \{A_m D_m A_{m-1} \cdots D_1 A_0 \;:\; D_i \in [\underline D_i, \overline D_i]\},

with an interval of slopes where a pre-activation is at a kink, or within a *reach* of one that an update may take it across; one
slope elsewhere. Automatic differentiation returns one element. What may be said of all of them, from exact to coarse:

* the largest norm over the vertices of the box, which is the largest of all: J is linear in each slope, and a norm is convex;
* the largest norm over all choices of the units that matter most, plus the norm of what the others may add;
* :math:`\|C\|_2 + \|R\|_2` and :math:`\|\,|C| + R\,\|_2` with C at the middle of all intervals and R the entrywise radius;
* :math:`\|\,|A_m| \bar D_m |A_{m-1}| \cdots |A_0|\,\|_2` and :math:`\prod \|A_i\|_2 \|\bar D_i\|_2`.

The set is larger than Clarke's: its bounds are sound, and need not be attained by an element of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.lyapunov.layers.walk import eager, floating
from stableopt.lyapunov.profile.nonsmooth.assemble import Assembled, Layer, assemble, layers_of
from stableopt.lyapunov.profile.nonsmooth.chain import NotAChain, calls_of
from stableopt.lyapunov.profile.nonsmooth.fractional import Fractional
from stableopt.lyapunov.profile.nonsmooth.opened import distances_of, opened
from stableopt.lyapunov.undisturbed import undisturbed

__all__ = ["ClarkeReading", "clarke_bounds", "update_reach"]

_SHARE = 16
"""Part of the vertices that are computed where there are too many for all."""
_FACTOR = 1e4
"""Roundings that automatic differentiation through any model is given, where it is compared with itself."""


@dataclass(frozen=True)
class ClarkeReading:
    r"""What is known of the set of derivatives :math:`D_x h` at each sample of a batch.

    Args:
        reach: within which a kink leaves a unit undecided, relative to the size of its layer's pre-activations.
        kinks: share of the units of each activation, over the batch, that are undecided.
        undecided: how many units (or sorted groups) are undecided, of shape ``(samples,)``.
        chosen: for each sample the norm of the derivative that automatic differentiation takes.
        largest: for each sample the largest norm over the set.
        exact: for each sample whether all vertices were computed: ``largest`` is then as narrow as rounding allows.
        interval: for each sample an upper bound, the middle of all intervals and their radius: :math:`\|C\| + \|R\|`.
        entrywise: for each sample an upper bound, the largest moduli of entries: :math:`\|\,|C| + R\,\|`.
        absolute: for each sample an upper bound from the absolute values of all matrices.
        product: for each sample an upper bound, the product of the norms of all layers.
        slopes: for each elementwise activation the slopes that automatic differentiation takes, smallest and largest ones, each of
            shape ``(samples, units)``.
        left: names of all that was done with the input and is not known to be smooth (other kinks, comparisons, ``detach``). Of
            these only the derivative of automatic differentiation is known: with any, nothing is exact, and no upper end finite.
        reason: why nothing is proved; empty if all is.

    Note:
        Proved is what holds for the stored numbers of the weights in exact arithmetic. Which units are undecided is decided by
        pre-activations as the model computes them.
    """

    reach: float
    kinks: Mapping[str, float]
    undecided: NDArray[np.int64]
    chosen: tuple[Bound, ...]
    largest: tuple[Bound, ...]
    exact: tuple[bool, ...]
    interval: tuple[float, ...]
    entrywise: tuple[float, ...]
    absolute: tuple[float, ...]
    product: tuple[float, ...]
    slopes: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]
    left: tuple[str, ...] = ()
    reason: str = ""

    @property
    def proved(self) -> bool:
        """Whether all bounds count rounding."""
        return not self.reason

    @property
    def worst(self) -> Bound:
        """The largest norm over the sets of all samples."""
        return _join(self.largest)

    @property
    def taken(self) -> Bound:
        """The largest norm that automatic differentiation takes at a sample."""
        return _join(self.chosen)


def clarke_bounds(
    model: nn.Module,
    x: Tensor,
    *,
    reach: float = 0.0,
    vertices: int = 4096,
    samples: int = 64,
    seed: int = 0,
) -> ClarkeReading:
    r"""Bound the norm of every derivative of a model by its input that kinks leave open.

    Args:
        model: a chain of affine layers and piecewise-linear activations (ReLU, LeakyReLU, PReLU, Hardtanh, abs, GroupSort and the
            like), as its modules are called. For any other model, see the note.
        x: a batch of floating inputs; each sample has its own set.
        reach: relative distance to a kink within which a unit is undecided: :math:`|z - c| \le r \sqrt{\operatorname{mean} z^2}`,
            the mean over all units and samples of the activation. 0 for Clarke's set at the point; :func:`update_reach` for what
            the last update may have crossed.
        vertices: up to how many are all computed, which makes the largest norm exact; 4096 for 12 units.
        samples: random vertices beyond that, from the best of which a search begins; its norm is a bound from below.
        seed: of them.

    Returns:
        The reading.

    Note:
        Any other model is opened by automatic differentiation: each call of a piecewise-linear function of torch gets the tangents
        between its slopes, what is smooth has its derivative at the point. Then the norms are estimates, since rounding is not
        counted. All else that is not known to be smooth is named in ``left``, and then there is no upper bound. It takes one
        backward pass for each output and each undecided unit of a sample.

    Raises:
        TypeError: if the input is not floating.
        ValueError: if it has no sample, the reach is negative or not finite, a count is below 1, or a number of the model is NaN or
            infinite; for a model that is no chain, if it mixes samples or draws random numbers, as in training mode.
        UncertifiableError: if the model calls what automatic differentiation sees otherwise than its parts.

    References:
        Clarke, *Optimization and Nonsmooth Analysis*, 1983, theorem 2.6.6 (the chain rule); Bolte and Pauwels, *Conservative set
        valued fields*, 2021 (what automatic differentiation returns).

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [-1.0]])), model[0].bias.zero_()
        ...     _ = model[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
        >>> reading = clarke_bounds(model, torch.zeros(1, 1, dtype=torch.float64))
        >>> reading.taken.upper < 1e-12, 2.0 in reading.worst, reading.worst.proved, int(reading.undecided[0])
        (True, True, True, 2)
    """
    if not x.is_floating_point():
        raise TypeError(f"a derivative needs floating inputs, got {x.dtype}.")
    if x.ndim < 2 or not x.shape[0]:
        raise ValueError(f"clarke_bounds needs a batch of samples, got an input of shape {tuple(x.shape)}.")
    if not 0.0 <= reach < float("inf"):
        raise ValueError(f"reach must be finite and at least 0, got {reach!r}.")
    if vertices < 1 or samples < 1:
        raise ValueError(f"vertices and samples must be at least 1, got {vertices!r} and {samples!r}.")
    settings = _Settings(reach, vertices, samples, seed)
    try:
        layers = layers_of(calls_of(model, x), reach)
        parts = [assemble(layers, i, x[0].numel()) for i in range(len(x))]
        _check(model, x, [(part.form, part.roundings * part.absolute) for part in parts])
    except NotAChain as reason:
        return _of_any_model(model, x, settings, str(reason))
    return _of_chain(layers, parts, settings)


@dataclass(frozen=True)
class _Settings:
    reach: float
    vertices: int
    samples: int
    seed: int


def _of_chain(layers: list[Layer], parts: list[Assembled], settings: _Settings) -> ClarkeReading:
    active = [layer for layer in layers if layer.matrix is None]
    undecided = np.array([sum(layer.undecided(i) for layer in active) for i in range(len(parts))], dtype=np.int64)
    kinks = {
        layer.name: sum(layer.undecided(i) for i in range(len(parts))) / max(1, layer.units * len(parts))
        for layer in active
    }
    slopes = {
        layer.name: (layer.chosen, layer.lower, layer.upper)
        for layer in active
        if layer.chosen is not None and layer.lower is not None and layer.upper is not None
    }
    coarse = [(part.absolute, part.product) for part in parts]
    return _reading([part.form for part in parts], coarse, settings, kinks, undecided, slopes, (), "")


def _of_any_model(model: nn.Module, x: Tensor, settings: _Settings, reason: str) -> ClarkeReading:
    for name, module in model.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0  # noqa: SLF001 the base of all
        if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):  # noqa: SLF001
            raise ValueError(
                f"{type(module).__name__} {name!r} is in training mode, where a sample has no derivative of its own; call "
                "model.eval()."
            )
    distances, kinks, left = distances_of(model, x, settings.reach)
    found = [opened(model, x[i : i + 1], distances) for i in range(len(x))]
    try:
        _check(model, x, [(each.form, _FACTOR * each.form.size()) for each in found])
    except NotAChain as error:
        raise UncertifiableError(f"no set of derivatives is known: {error}, and {reason}.") from error
    names = list(kinks)
    slopes = {
        name: tuple(
            np.stack([np.asarray(getattr(each.openings[k], what).reshape(-1).cpu()) for each in found])
            for what in ("chosen", "lower", "upper")
        )
        for k, name in enumerate(names)
    }
    undecided = np.array([len(each.form.blocks) for each in found], dtype=np.int64)
    coarse = [(math.inf, math.inf)] * len(found)
    why = f"the model is opened by automatic differentiation, whose rounding is not counted: {reason}"
    return _reading([each.form for each in found], coarse, settings, kinks, undecided, slopes, left, why)


def _reading(
    forms: list[Fractional],
    coarse: list[tuple[float, float]],
    settings: _Settings,
    kinks: dict[str, float],
    undecided: NDArray[np.int64],
    slopes: Mapping[str, Any],
    left: tuple[str, ...],
    reason: str,
) -> ClarkeReading:
    fine = [(math.inf, math.inf) if left else (form.interval(), form.entrywise()) for form in forms]
    uppers = [min(*a, *b) for a, b in zip(fine, coarse, strict=True)]
    return ClarkeReading(
        reach=settings.reach,
        kinks=kinks,
        undecided=undecided,
        chosen=tuple(form.chosen() for form in forms),
        largest=tuple(
            _open_above(_largest(form, upper, settings), bool(left)) for form, upper in zip(forms, uppers, strict=True)
        ),
        exact=tuple(form.vertices <= settings.vertices and not left for form in forms),
        interval=tuple(interval for interval, _ in fine),
        entrywise=tuple(entrywise for _, entrywise in fine),
        absolute=tuple(absolute for absolute, _ in coarse),
        product=tuple(product for _, product in coarse),
        slopes=slopes,
        left=left,
        reason=reason,
    )


def _largest(form: Fractional, upper: float, settings: _Settings) -> Bound:
    if form.vertices <= settings.vertices:
        found = form.exact()
        return Bound(found.lower, max(found.lower, min(found.upper, upper)), found.proved)
    found = form.search(settings.samples, settings.seed)
    upper = min(upper, form.branched(max(1, settings.vertices // _SHARE)))
    return Bound(found.lower, max(found.lower, upper), found.proved)


def _open_above(bound: Bound, unknown: bool) -> Bound:
    """Return a bound, without its upper end where there are kinks that were not opened."""
    return Bound(bound.lower, math.inf, False) if unknown else bound


def _check(model: nn.Module, x: Tensor, forms: list[tuple[Fractional, float]]) -> None:
    """Compare one combination of the rows of each derivative with automatic differentiation through the model."""
    eps = torch.finfo(x.dtype).eps
    with torch.enable_grad(), eager(), undisturbed(model):
        leaf = x.detach().clone().requires_grad_()
        output = floating(model(leaf))[0].reshape(len(x), -1)
        u = torch.randn(output.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        rows = torch.autograd.grad((output * u.to(output)).sum(), leaf)[0].double().reshape(len(x), -1).cpu().numpy()
    for row, (form, scale) in zip(rows, forms, strict=True):
        off = float(np.abs(row - u.numpy() @ form.taken()).max(initial=0.0))
        if not off <= 4.0 * eps * float(u.norm()) * scale:
            raise NotAChain("the derivative of the model is not that of what its modules do one after the other")


def update_reach(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    r"""Return the relative size of an update, :math:`\|\theta' - \theta\| / \|\theta\|`.

    A layer that changes by it moves its outputs by about as much.

    Args:
        before: parameters.
        after: the same ones later.

    Raises:
        ValueError: if the parameters are zero before.

    Examples:
        >>> update_reach([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])])
        0.1
    """
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(before, after, strict=True)]
    size = sum(float(a.square().sum()) for a, _ in pairs)
    if not size > 0.0:
        raise ValueError("the relative size of an update of parameters that are zero is not defined.")
    return (sum(float((b - a).square().sum()) for a, b in pairs) / size) ** 0.5


def _join(bounds: tuple[Bound, ...]) -> Bound:
    result = bounds[0]
    for bound in bounds[1:]:
        result = result.join(bound)
    return result
