r"""The interface of a map that keeps the norm of a weight within a radius, and what rounding takes of it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.weights.geometry import Geometry, check_norm

__all__ = ["WeightMap", "check_radius", "grain", "slack"]


class WeightMap(nn.Module, ABC):
    r"""A parametrization :math:`V \mapsto W` that keeps the operator norm of a weight within a radius.

    To be registered with :func:`torch.nn.utils.parametrize.register_parametrization`. A subclass sets the class variables and
    defines ``forward`` and, where it can, ``right_inverse``.

    Attributes:
        name: what the method is called in :data:`stableopt.nn.weights.METHODS`.
        norms: the norms that it can limit.
        dependencies: modules, beside its own parameters, that its result depends on; with this attribute the map promises to depend
            on nothing else, so that evaluation may keep a result.
        by_construction: whether the limit holds for every original, in training as well. Otherwise training uses an estimate,
            and evaluation and export a proved rescale.
        factorized: whether an original has another shape than its weight.

    Args:
        geometry: the operator.
        radius: the limit, positive and finite.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.

    Raises:
        TypeError: if the geometry is none.
        ValueError: if the radius is not positive and finite, or the method cannot limit that norm.

    Examples:
        >>> from stableopt.nn.weights import METHODS, Geometry
        >>> METHODS["gram"](Geometry("linear"), 2.0)
        Gram(kind=linear, radius=2.0, norm=l2)
    """

    name: ClassVar[str]
    norms: ClassVar[frozenset[str]] = frozenset({"l2"})
    by_construction: ClassVar[bool] = True
    factorized: ClassVar[bool] = False
    dependencies: ClassVar[tuple[nn.Module, ...]] = ()

    def __init__(self, geometry: Geometry, radius: float = 1.0, norm: str = "l2") -> None:
        super().__init__()
        if not isinstance(geometry, Geometry):
            raise TypeError(f"{type(self).__name__} needs a Geometry, got {type(geometry).__name__}.")
        if (
            isinstance(radius, bool)
            or not isinstance(radius, int | float)
            or not (math.isfinite(radius) and radius > 0)
        ):
            raise ValueError(f"radius must be positive and finite, got {radius!r}.")
        check_norm(norm)
        if norm not in self.norms:
            raise ValueError(f"the method {self.name!r} limits {', '.join(sorted(self.norms))}, not {norm!r}.")
        self.geometry = geometry
        self.radius = float(radius)
        self.norm = norm

    @abstractmethod
    def forward(self, V: Tensor) -> Tensor:
        """Return the weight of an original: contiguous, of the same dtype, within the radius also after rounding.

        Args:
            V: the original.
        """

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return an original that is mapped to ``W`` if that is within the limit, else to a member near it. Here: ``W``."""
        return W

    @torch.no_grad()
    def gap(self, V: Tensor) -> Bound:
        """Return a proved bound of the norm of the weight in training over the radius, without a change of the map.

        Args:
            V: the original.

        Raises:
            ValueError: if the weight holds NaN or infinity.

        Examples:
            >>> from stableopt.nn.weights import METHODS
            >>> bool(METHODS["gram"](Geometry("linear")).gap(3.0 * torch.eye(4)).upper <= 1.0)
            True
        """
        W = copy.deepcopy(self).train()(V)
        return self.geometry.proved(W, self.norm) * (1.0 / self.radius)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"kind={self.geometry.kind}, radius={self.radius}, norm={self.norm}"


def check_radius(radius: float, dtype: torch.dtype) -> None:
    """Refuse a radius that a dtype cannot hold.

    Raises:
        ValueError: if it is above the largest number.

    Examples:
        >>> check_radius(1e30, torch.float32)
    """
    if radius > torch.finfo(dtype).max:
        raise ValueError(
            f"the radius {radius:.4g} is above the largest number of {dtype}, {torch.finfo(dtype).max:.4g}; use a wider dtype or a "
            "smaller radius."
        )


def slack(stored: Tensor, computed: torch.dtype) -> float:
    r"""Return the relative rounding to allow for: of the stored product, of the computed norm, and of the proof in float64.

    Rounding each entry by :math:`u` relative changes the norm of a matrix by at most :math:`u\|W\|_F \le u\sqrt n\|W\|_2`. For a
    kernel of :math:`T` taps it is :math:`u\sum_j\|W_j\|_F \le u\sqrt{nT}\|W\|_2`, for which the term of the computed norm has room
    where that is computed in the dtype that is stored. Half precision has no such room: there
    :func:`stableopt.nn.weights.isometry.stored` measures.

    Args:
        stored: the weight in the dtype that is stored; only its shape and dtype matter.
        computed: the dtype in which the norm is computed.

    Examples:
        >>> 0.0 < slack(torch.zeros(3, 3, dtype=torch.float64), torch.float64) < 1e-13
        True
    """
    if not stored.numel():
        return 0.0
    rank, terms = min(stored.shape[0], stored[0].numel()), stored.shape[0] + stored[0].numel()
    rounding = torch.finfo(stored.dtype).eps * math.sqrt(rank)
    return rounding + 2.0 * (terms + 8) * torch.finfo(computed).eps + 2.0**-52 * rank * terms


def grain(dtype: torch.dtype, numel: int, radius: float, factor: float = 1.0) -> float:
    r"""Return what the absolute rounding of subnormal numbers can add to a norm, relative to the radius.

    An error of half of the smallest number :math:`e` in each entry has a norm of at most :math:`e\sqrt{\text{numel}}/2`. A factor
    that is computed in the same dtype may be subnormal itself, and is off by as much for each of the entries, of size about 1.

    Args:
        dtype: the dtype that is stored.
        numel: number of entries.
        radius: the limit.
        factor: from the Frobenius norm of the entries to the norm.

    Examples:
        >>> grain(torch.float16, 1024, 0.01) > 9e-5 > 1e-30 > grain(torch.float32, 1024, 0.01)
        True
    """
    kind = torch.finfo(dtype)
    share = 0.51 if kind.bits == 16 else 2.0
    return share * kind.smallest_normal * kind.eps * math.sqrt(numel) * factor / radius
