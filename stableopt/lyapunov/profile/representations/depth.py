r"""What the forward block of the profile says: norms of :math:`D_{h_k}h_l` for all :math:`k \le l`, exponents, peak, bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["DepthGrowth", "ForwardProfile", "Peak"]


@dataclass(frozen=True)
class Peak:
    r"""The largest norm of a table.

    Args:
        log_norm: its logarithm, 0 if nothing grows (:math:`D_{h_k}h_k = I`).
        source: :math:`k`, where the perturbation begins.
        target: :math:`l`, where it is seen.

    Examples:
        >>> Peak(0.0, 0, 0).target
        0
    """

    log_norm: float
    source: int
    target: int


@dataclass(frozen=True)
class ForwardProfile:
    r"""Sensitivities of all representations of a model to all earlier ones, at one batch.

    With the representations :math:`h_0` (the input), :math:`h_1, \dots, h_L` (the output), for every sample :math:`x`

    .. math:: K_{lk}(x) = \|D_{h_k} h_l\|_2, \quad k \le l, \qquad \Lambda_{lk} = \frac{\log \max_x K_{lk}(x)}{l - k} .

    All norms are kept as natural logarithms: products over many layers have no other form that every number fits in.

    Args:
        names: of the representations: ``"input"``, then the layer that makes each.
        widths: number of entries of each: of one sample, or of the batch.
        log_samples: ``(samples, L + 1, L + 1)``, :math:`\log K_{lk}(x)` at ``[x, l, k]``; NaN above the diagonal.
        operator: ``"sample"`` if the samples were looked at one by one; ``"batch"`` for the operator of the whole batch, one sample
            then, because samples depend on each other.
        mixing: what makes them depend on each other; empty for ``"sample"``.
        how: ``"jacobian"`` for the full derivatives of the layers and their products; ``"lanczos"`` for an estimate from below.
        residuals: ``(L + 1, L + 1)``: a singular value lies within this share of the estimate, for every sample; 0 for
            ``"jacobian"``.
        law: per layer the logarithm of a bound of its Lipschitz constant that follows from its weights; NaN where none is known.
        eps: rounding unit of the numbers that the model computes with.
        mode: ``"forward"`` for tangents; ``"reverse"`` where an operation has none and cotangents took their place.
        cost: work in units of one forward and one backward pass, counted: a backward pass is two forward ones, a tangent or a
            cotangent of the representations one.
        memory: bytes of the derivatives, or of the vectors, that were held at once.
        log_diagonal: ``(samples, L, directions)``: logarithms of the diagonals of the triangular factors that the derivatives
            leave, :math:`J_l Q_l = Q_{l+1} R_l`; None for an estimate.

    Examples:
        >>> table = np.array([[[0.0, np.nan], [np.log(2.0), 0.0]]])
        >>> profile = ForwardProfile(("input", "0"), (1, 1), table, law=np.array([np.nan]), residuals=np.zeros((2, 2)))
        >>> round(profile.norm(1, 0), 12), round(profile.exponent / math.log(2.0), 12), profile.peak.target
        (2.0, 1.0, 1)
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    log_samples: NDArray[np.float64] = field(repr=False)
    operator: str = "sample"
    mixing: str = ""
    how: str = "jacobian"
    residuals: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    law: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), repr=False)
    eps: float = 2.0**-52
    mode: str = "forward"
    cost: float = 0.0
    memory: int = 0
    log_diagonal: NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def depth(self) -> int:
        """The number of layers, :math:`L`."""
        return len(self.names) - 1

    @property
    def exact(self) -> bool:
        """Whether the norms are those of the derivatives up to rounding; else they are estimates from below."""
        return self.how == "jacobian"

    @cached_property
    def log_norms(self) -> NDArray[np.float64]:
        r"""``(L + 1, L + 1)``: :math:`\log \max_x K_{lk}(x)` at ``[l, k]``, NaN above the diagonal."""
        return self.log_samples.max(axis=0)

    @cached_property
    def log_medians(self) -> NDArray[np.float64]:
        r"""``(L + 1, L + 1)``: the logarithm of the median of :math:`K_{lk}(x)` over the samples (the upper one of two)."""
        return np.sort(self.log_samples, axis=0)[len(self.log_samples) // 2]

    @cached_property
    def exponents(self) -> NDArray[np.float64]:
        r"""``(L + 1, L + 1)``: :math:`\Lambda_{lk}`, growth per layer; NaN on and above the diagonal."""
        layers = np.arange(self.depth + 1)
        between = (layers[:, None] - layers[None, :]).astype(float)
        return np.divide(self.log_norms, between, out=np.full_like(self.log_norms, np.nan), where=between > 0.0)

    @property
    def exponent(self) -> float:
        r""":math:`\Lambda = \frac1L\log K_{L0}`, from the input to the output."""
        return float(self.exponents[-1, 0])

    @property
    def gains(self) -> NDArray[np.float64]:
        r"""``(L,)``: :math:`\log K_{l+1,l}` of every layer."""
        return self.log_norms.diagonal(-1)

    @cached_property
    def peak(self) -> Peak:
        """The largest norm over all pairs: what a perturbation can grow to on its way, wherever it begins."""
        if np.isnan(self.log_norms[np.tril_indices(self.depth + 1)]).any():
            return Peak(math.nan, 0, 0)
        target, source = divmod(int(np.nanargmax(self.log_norms)), self.depth + 1)
        return Peak(float(self.log_norms[target, source]), source, target)

    @cached_property
    def log_products(self) -> NDArray[np.float64]:
        r"""``(L + 1, L + 1)``: logarithms of :math:`\prod_{k \le j < l} K_{j+1,j}`, bounds of ``log_norms`` at this batch.

        The difference is what is lost by multiplying norms: layers that do not amplify the same direction. For estimates it is no
        bound.
        """
        return _partial_products(self.gains)

    @cached_property
    def log_law(self) -> NDArray[np.float64]:
        r"""``(L + 1, L + 1)``: logarithms of the products of the layers' bounds from their weights (T2), valid for all inputs.

        NaN where a layer between has no bound.
        """
        return _partial_products(self.law)

    @cached_property
    def resolved(self) -> NDArray[np.bool_]:
        r"""``(L + 1, L + 1)``: whether a norm stands out of the rounding of the products it is computed with.

        A product of :math:`n` layers is known up to :math:`n\,w\,\varepsilon \prod_j\|J_j\|`, :math:`w` the largest width: where
        layers annihilate what others amplify, less than this is noise.
        """
        layers = np.arange(self.depth + 1)
        between = np.maximum(layers[:, None] - layers[None, :], 1)
        with np.errstate(invalid="ignore"):
            return self.log_norms > np.log(self.eps * max(self.widths) * between) + self.log_products

    def norm(self, target: int, source: int = 0) -> float:
        r"""Return :math:`\max_x K_{lk}(x)`.

        Args:
            target: :math:`l`.
            source: :math:`k \le l`.

        Raises:
            ValueError: if ``source > target``; the later representation does not act on the earlier one.
        """
        if not 0 <= source <= target <= self.depth:
            raise ValueError(f"0 <= source <= target <= {self.depth} is needed, got source={source}, target={target}.")
        with np.errstate(over="ignore"):
            return float(np.exp(self.log_norms[target, source]))

    def __str__(self) -> str:
        """Say in one line what was found."""
        kind = "exact" if self.exact else f"estimates from below, residual <= {np.nanmax(self.residuals):.1e}"
        return (
            f"{self.depth} layers, exponent {self.exponent:+.4f} per layer, largest log norm {self.peak.log_norm:.4f} "
            f"from {self.names[self.peak.source]} to {self.names[self.peak.target]} (per {self.operator}; {kind}; "
            f"{self.cost:.1f} forward+backward)"
        )


@dataclass(frozen=True)
class DepthGrowth:
    r"""How one perturbation of the input grows from layer to layer.

    Args:
        names: of the representations: ``"input"``, then the layer that makes each.
        log_norms: ``(L + 1,)``: :math:`\log\|D_{h_0}h_l\,v\|/\|v\|` over the whole batch.
        log_samples: ``(L + 1, samples)``: the same for each sample; one column where the first dimension is not the batch.
        cost: work in units of one forward and one backward pass.
        epsilon: size of a central difference, relative to the input; 0 for a derivative.

    Examples:
        >>> DepthGrowth(("input", "0"), np.array([0.0, 2.0]), np.zeros((2, 1))).exponent
        2.0
    """

    names: tuple[str, ...]
    log_norms: NDArray[np.float64]
    log_samples: NDArray[np.float64] = field(repr=False)
    cost: float = 0.0
    epsilon: float = 0.0

    @property
    def exponent(self) -> float:
        """Growth per layer from the input to the output."""
        return float(self.log_norms[-1]) / (len(self.names) - 1)

    @property
    def gains(self) -> NDArray[np.float64]:
        """``(L,)``: the share of each layer."""
        return np.diff(self.log_norms)


def _partial_products(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the table of sums over consecutive layers; NaN and infinity stay within the products that they are part of."""
    size = len(logs) + 1
    table = np.full((size, size), np.nan)
    for source in range(size):
        table[source:, source] = np.concatenate([[0.0], np.cumsum(logs[source:])])
    return table
