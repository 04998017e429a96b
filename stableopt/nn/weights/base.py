r"""What operator a weight is, and the interface of a map that keeps its norm within a radius."""

from __future__ import annotations

import copy
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound, conv_norm, gram_conv_norm, gram_norm, inf_norm, spectral_norm
from stableopt.linalg.conv_geometry import padding_multiplicity
from stableopt.linalg.conv_grid import Grid, block_matrices, fold_tensor, layer_grids, specialized
from stableopt.linalg.conv_symbol import symbol_slack

__all__ = ["KINDS", "NORMS", "Geometry", "WeightMap", "slack"]

NORMS = ("l2", "linf", "l1")
KINDS = ("linear", "conv", "conv_transpose")


@dataclass(frozen=True)
class Geometry:
    r"""The operator that a layer makes of its weight: data only.

    Args:
        kind: ``"linear"`` for a matrix, ``"conv"`` or ``"conv_transpose"`` for a kernel as torch's layers store it.
        stride: of a convolution, one per axis; empty for 1.
        dilation: the same.
        groups: groups of a convolution.
        padding: pixels on either side per axis, ``"same"`` or ``"valid"``; empty for 0.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        output_padding: of a transposed convolution; empty for 0.

    Raises:
        ValueError: if the kind is unknown.

    Examples:
        >>> Geometry.of(nn.Linear(2, 3))
        Geometry(kind='linear', stride=(), dilation=(), groups=1, padding=(), padding_mode='zeros', output_padding=())
        >>> bool(7.0 <= Geometry("linear").proved(torch.tensor([[3.0, -4.0]]), "linf").upper < 7.0 + 1e-12)
        True
    """

    kind: str
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding: tuple[int, ...] | str = ()
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")

    @classmethod
    def of(cls, layer: nn.Module, name: str = "weight") -> Geometry:
        """Read the geometry of a layer of torch.

        Args:
            layer: a Linear, a convolution or a transposed convolution with one to three axes.
            name: the parameter; such layers have one, ``"weight"``.

        Raises:
            TypeError: for any other module.
            ValueError: for another parameter.

        Examples:
            >>> Geometry.of(nn.Conv1d(1, 1, 3, stride=2)).stride
            (2,)
        """
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | _TRANSPOSED):
            raise TypeError(f"Geometry.of needs a Linear, Conv1d-3d or ConvTranspose1d-3d, got {type(layer).__name__}.")
        if name != "weight":
            raise ValueError(f"the operator of a {type(layer).__name__} is made of its 'weight', got {name!r}.")
        if isinstance(layer, nn.Linear):
            return cls("linear")
        transposed = isinstance(layer, _TRANSPOSED)
        padding = layer.padding if isinstance(layer.padding, str) else tuple(int(p) for p in layer.padding)
        return cls(
            "conv_transpose" if transposed else "conv",
            tuple(layer.stride),
            tuple(layer.dilation),
            layer.groups,
            padding,
            layer.padding_mode,
            tuple(layer.output_padding) if transposed else (),
        )

    def spec(self) -> str:
        """Return the geometry as text.

        Examples:
            >>> Geometry.from_spec(Geometry("conv", stride=(2,)).spec())
            Geometry(kind='conv', stride=(2,), dilation=(), groups=1, padding=(), padding_mode='zeros', output_padding=())
        """
        return json.dumps(vars(self), sort_keys=True)

    @classmethod
    def from_spec(cls, spec: str) -> Geometry:
        """Return the geometry that :meth:`spec` has written.

        Args:
            spec: the text.

        Raises:
            ValueError: if the text is none.

        Examples:
            >>> Geometry.from_spec('{"kind": "linear"}').kind
            'linear'
        """
        fields: dict[str, Any] = {}
        for key, value in json.loads(spec).items():
            fields[key] = tuple(value) if isinstance(value, list) else value
        return cls(**fields)

    def proved(self, W: Tensor, norm: str = "l2") -> Bound:
        """Return a proved bound of the operator norm of the stored numbers; see :mod:`stableopt.linalg`.

        Args:
            W: the weight.
            norm: ``"l2"``, ``"linf"`` or ``"l1"``, of input and output.

        Raises:
            TypeError: if the weight is not real and floating.
            ValueError: if its shape or an option does not fit, an entry is not finite, or the norm is unknown.

        Examples:
            >>> bool(1.0 <= Geometry("linear").proved(torch.eye(2)).upper < 1.0 + 1e-12)
            True
        """
        check_norm(norm)
        if norm != "l2":
            self.check(W)
            rows, copies = self._rows(W.detach(), norm)
            return Bound(0.0, max((inf_norm(r).upper for r in rows), default=0.0)) * copies
        return spectral_norm(W) if self.kind == "linear" else conv_norm(W, **self.options(W.ndim - 2))

    def upper(self, W: Tensor, norm: str = "l2") -> Tensor:
        """Return an upper bound in exact arithmetic, differentiable and without state (0-d; half precision in float32).

        Args:
            W: the weight.
            norm: ``"l2"``, ``"linf"`` or ``"l1"``.

        Raises:
            TypeError: if the weight is not real and floating.
            ValueError: if the shape or an option does not fit, or the norm is unknown.

        Examples:
            >>> float(Geometry("linear").upper(torch.tensor([[3.0, -4.0]]), "l1"))
            4.0
        """
        check_norm(norm)
        self.check(W)
        if not W.numel():
            return W.sum()
        if norm != "l2":
            rows, copies = self._rows(W, norm)
            return copies * torch.stack([r.abs().sum(dim=1).amax() for r in rows]).amax()
        return gram_norm(W) if self.kind == "linear" else gram_conv_norm(W, **self.options(W.ndim - 2))

    def options(self, dims: int) -> dict[str, Any]:
        """Return the keyword arguments of :func:`stableopt.linalg.conv_norm` for a kernel with so many axes.

        Examples:
            >>> Geometry("conv", groups=2).options(1)["groups"]
            2
        """
        ones, zeros = (1,) * dims, (0,) * dims
        return {
            "stride": self.stride or ones,
            "dilation": self.dilation or ones,
            "groups": self.groups,
            "padding": self.padding or zeros,
            "padding_mode": self.padding_mode,
            "transposed": self.kind == "conv_transpose",
            "output_padding": self.output_padding or zeros,
        }

    def check(self, W: Tensor) -> None:
        """Refuse what is no weight of such a layer.

        Args:
            W: the weight.

        Raises:
            TypeError: if it is not real and floating.
            ValueError: if its shape does not fit, or no such layer exists.

        Examples:
            >>> Geometry("conv", groups=2).check(torch.zeros(4, 1, 3))
        """
        if self.kind != "linear":
            self._grids(W)
            return
        if not W.is_floating_point():
            raise TypeError(f"a weight is a real floating matrix, got dtype {W.dtype}.")
        if W.ndim != 2:
            raise ValueError(f"the weight of a linear layer has 2 dimensions, got shape {tuple(W.shape)}.")

    def folded(self, W: Tensor) -> tuple[Tensor, float]:
        r"""Return matrices the largest norm of which, times a number, is an upper bound of the operator norm.

        See :func:`stableopt.linalg.conv_grid.block_matrices`.

        Args:
            W: the weight.

        Returns:
            Shape ``(groups, rows, columns)``, and the number. They are linear in the weight.

        Examples:
            >>> Geometry("conv").folded(torch.ones(1, 1, 4))[1]
            2.0
        """
        if self.kind == "linear":
            return W[None], 1.0
        grids = self._grids(W)
        factors = [_copies(grid) * math.prod(grid.taps) for grid in grids]
        grid = grids[factors.index(min(factors))]
        matrices, factor = block_matrices(fold_tensor(W, self.groups, grid.axes), grid.taps)
        return matrices, factor * math.sqrt(_copies(grid))

    def proof_slack(self, W: Tensor) -> float:
        """Return what a proof of the norm of a kernel loses on its grid by rounding, relatively; 0 for matrices.

        Examples:
            >>> Geometry("conv").proof_slack(torch.zeros(2, 2, 3)) < 1e-12
            True
        """
        if self.kind == "linear":
            return 0.0
        rows, losses = W.shape[0] // self.groups, []
        for grid in self._grids(W):
            taps = math.prod(grid.taps)
            phases = math.prod([min(axis.stride, k) for axis, k in zip(grid.axes, W.shape[2:], strict=True)])
            losses.append(symbol_slack(rows, W.shape[1] * phases, taps))
        return max(losses)

    def spread(self, W: Tensor, norm: str = "l2") -> float:
        r"""Return the largest quotient of the norm and of the root of the sum of all squares, at most.

        Args:
            W: the weight, not empty; only its shape matters.
            norm: ``"l2"``, ``"linf"`` or ``"l1"``.

        Examples:
            >>> Geometry("linear").spread(torch.zeros(2, 9)), Geometry("linear").spread(torch.zeros(2, 9), "linf")
            (1.0, 3.0)
        """
        if norm == "l2":
            return math.sqrt(math.prod(W.shape[2:]) * self.repeated(W))
        if (norm == "linf") != (self.kind == "conv_transpose"):
            return math.sqrt(W[0].numel())
        return math.sqrt(W.shape[0] // self.groups * math.prod(W.shape[2:])) * self.repeated(W)

    def _grids(self, W: Tensor) -> tuple[Grid, ...]:
        """Return the ways to reduce a kernel to stride 1, and check it."""
        options = self.options(W.ndim - 2)
        return layer_grids(W, options.pop("groups"), None, **options)

    def repeated(self, W: Tensor) -> int:
        """Return how often the padding shows one pixel of an image to a kernel of this shape, at most; 1 for zero padding.

        Examples:
            >>> Geometry("conv", padding=(1,), padding_mode="reflect").repeated(torch.zeros(1, 1, 3))
            3
        """
        if self.kind != "conv" or self.padding_mode == "zeros":
            return 1
        options = self.options(W.ndim - 2)
        wanted = (options[key] for key in ("stride", "dilation", "padding", "padding_mode"))
        return _multiplicity(specialized(tuple(W.shape[2:])), *wanted)

    def _rows(self, W: Tensor, norm: str) -> tuple[list[Tensor], int]:
        r"""Return matrices the largest absolute row sum of which, times an integer, is the operator norm or bounds it.

        In linf an output of a convolution sums over its kernel, whatever pixels the padding repeats. In l1 a pixel is read through
        the taps :math:`t` with the same :math:`dt` modulo the stride, and the padding reads copies of it. A transposed
        convolution is the adjoint, which exchanges the two norms.
        """
        if self.kind == "linear":
            return [W if norm == "linf" else W.mT], 1
        if (norm == "linf") == (self.kind == "conv"):
            return [W.flatten(1)], 1
        dims = W.ndim - 2
        # (groups, other channels, own channels, *kernel): sums over the first axis that is stored, one per second and class
        parts = W.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        classes = [
            _tap_classes(k, s, d)
            for k, s, d in zip(W.shape[2:], self.stride or (1,) * dims, self.dilation or (1,) * dims, strict=True)
        ]
        rows = [
            parts[(..., *torch.meshgrid(*map(torch.tensor, c), indexing="ij"))].flatten(1)
            for c in itertools.product(*classes)
        ]
        if self.kind == "conv_transpose" or self.padding_mode == "zeros":
            return rows, 1
        return [parts.flatten(1)], self.repeated(W)


_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


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


def check_norm(norm: str) -> None:
    """Refuse a norm that is not known.

    Raises:
        ValueError: unless it is ``"l2"``, ``"linf"`` or ``"l1"``.

    Examples:
        >>> check_norm("l2")
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


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


@torch.compiler.assume_constant_result
def _multiplicity(kernel: tuple[int, ...], stride: Any, dilation: Any, padding: Any, padding_mode: str) -> int:
    return padding_multiplicity(kernel, stride=stride, dilation=dilation, padding=padding, padding_mode=padding_mode)


def _copies(grid: Grid) -> int:
    return math.prod([axis.copies for axis in grid.axes])


def _tap_classes(kernel: int, stride: int, dilation: int) -> Sequence[list[int]]:
    """Return the taps of one axis, those together that read the same pixels.

    Examples:
        >>> _tap_classes(3, 2, 1)
        [[0, 2], [1]]
    """
    classes: dict[int, list[int]] = {}
    for tap in range(kernel):
        classes.setdefault(tap * dilation % stride, []).append(tap)
    return list(classes.values())
