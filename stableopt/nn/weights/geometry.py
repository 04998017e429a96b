r"""What operator a weight is: the geometry of a layer, and the bounds of the norm that follow."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound, conv_norm, gram_conv_norm, gram_norm, inf_norm, spectral_norm
from stableopt.linalg.conv_geometry import padding_multiplicity
from stableopt.linalg.conv_grid import Grid, block_matrices, fold_tensor, layer_grids, specialized
from stableopt.linalg.conv_symbol import symbol_slack

__all__ = ["KINDS", "NORMS", "Geometry", "check_norm"]

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


def check_norm(norm: str) -> None:
    """Refuse a norm that is not known.

    Raises:
        ValueError: unless it is ``"l2"``, ``"linf"`` or ``"l1"``.

    Examples:
        >>> check_norm("l2")
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


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
