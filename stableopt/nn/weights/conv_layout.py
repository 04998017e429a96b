r"""How the numbers of an orthogonal convolution kernel are arranged in a product of factors: shapes, phases, channels.

A kernel with stride becomes one without on more channels (:mod:`stableopt.linalg.conv_correlation`); then some channels (phases)
must not have the last tap. A factor at the right end whose projector lives on the channels that may have it does just that. The
channels are ordered such that these sets are intervals; channels that exist only inside of the product come first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.linalg.conv_correlation import polyphase_axis
from stableopt.linalg.conv_symbol import riesz_factor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    r"""How the numbers of a kernel are arranged in a product of factors.

    Args:
        groups: groups of the convolution.
        out: output channels of one group (of a transposed convolution: input channels).
        channels: input channels of one group.
        kernel: taps per axis.
        stride: stride per axis.
        dilation: dilation per axis.

    Examples:
        >>> layout = Layout(1, 8, 4, (3, 3), (2, 2), (1, 1))
        >>> layout.phases, layout.taps, layout.rows, layout.columns
        ((2, 2), (2, 2), 8, 16)
        >>> layout.shape  # 8 rows of H, 4 x 8 + 2 x 4 + 2 x 4 numbers of the factors
        (11, 16)
    """

    groups: int
    out: int
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def __post_init__(self) -> None:
        """Compute all properties now: their first use takes a lock, which a compiler cannot follow."""
        for name, member in vars(type(self)).items():
            if isinstance(member, cached_property):
                getattr(self, name)

    @cached_property
    def _axes(self) -> list[tuple[int, int, int]]:
        return [polyphase_axis(*axis) for axis in zip(self.kernel, self.stride, self.dilation, strict=True)]

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """Phases per axis."""
        return tuple(phases for phases, _, _ in self._axes)

    @cached_property
    def taps(self) -> tuple[int, ...]:
        """Taps per axis after the reduction to stride 1."""
        return tuple(taps for _, taps, _ in self._axes)

    @cached_property
    def full(self) -> tuple[int, ...]:
        """Phases per axis that have the last tap."""
        return tuple(full for _, _, full in self._axes)

    @cached_property
    def inner(self) -> int:
        """Input channels after the reduction: channels times phases."""
        return self.channels * math.prod(self.phases)

    @cached_property
    def restricted(self) -> bool:
        """Whether some phases lack the last tap."""
        return self.full != self.phases

    @cached_property
    def swapped(self) -> bool:
        """Whether the product is the transpose of the kernel, so that its matrices are wide."""
        return not self.restricted and self.out > self.inner

    @cached_property
    def columns(self) -> int:
        """Channels on which the factors act; at least 2, because projectors of one channel have no parameters."""
        return max(self.out, self.inner, 2)

    @cached_property
    def grid_factor(self) -> float:
        """What the proof of a norm by :func:`stableopt.linalg.conv_norm` loses at most on its grid."""
        return riesz_factor(self.taps, [8 * k for k in self.taps]).upper

    @cached_property
    def rows(self) -> int:
        """Rows of the matrix H."""
        return self.inner if self.swapped else self.out

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Free factors per axis."""
        return tuple(
            taps - 1 - (full < phases) for taps, full, phases in zip(self.taps, self.full, self.phases, strict=True)
        )

    @cached_property
    def rank(self) -> int:
        """Rank of the free projectors."""
        return self.columns // 2

    @cached_property
    def octants(self) -> list[tuple[tuple[int, int], ...]]:
        """Ranges of phases, one per axis, in the order of the channels; an axis without restriction has one range."""
        ranges: list[tuple[tuple[int, int], ...]] = [()]
        for phases, full in zip(self.phases, self.full, strict=True):
            halves = [(0, full), (full, phases)] if full < phases else [(0, phases)]
            ranges = [(*octant, half) for octant in ranges for half in halves]
        return ranges

    @cached_property
    def blocks(self) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
        """The restricted factors: the axis and the intervals of channels on which its projectors live, in order."""
        extra = self.columns - self.inner
        sizes = [self.channels * math.prod(high - low for low, high in octant) for octant in self.octants]
        blocks: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        for axis, (full, phases) in enumerate(zip(self.full, self.phases, strict=True)):
            if full == phases:
                continue
            spans: dict[tuple[tuple[int, int], ...], list[int]] = {}
            start = 0
            for octant, size in zip(self.octants, sizes, strict=True):
                stop = start + size + (extra if start == 0 else 0)
                if octant[axis] == (0, full):
                    spans.setdefault(octant[:axis], [start, stop])[1] = stop
                start = stop
            blocks.append((axis, tuple((low, high) for low, high in spans.values() if high - low > 1)))
        return blocks

    @cached_property
    def _bound_shapes(self) -> list[tuple[int, int, int]]:
        widths = [high - low for _, spans in self.blocks for low, high in spans]
        return [(self.groups, n // 2, n) for n in widths]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Shape of the original: the rows of H, those of the free factors, then the numbers of the restricted ones in a row."""
        rows = self.groups * (self.rows + sum(self.lengths) * self.rank)
        return rows + -(-sum(map(math.prod, self._bound_shapes)) // self.columns), self.columns

    def split(self, V: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return the parts of an original: ``(groups, rows, columns)``, ``(groups * number, rank, columns)`` or None, the rest."""
        height, number = self.groups * self.rows, self.groups * sum(self.lengths)
        sizes = [height, number * self.rank, V.shape[0] - height - number * self.rank]
        H, free, rest = V.split(sizes) if any(sizes[1:]) else (V, V[:0], V[:0])
        bound = []
        if self._bound_shapes:
            used = [math.prod(shape) for shape in self._bound_shapes]
            pieces = rest.flatten().split([*used, rest.numel() - sum(used)])[: len(used)]
            bound = [piece.view(shape) for piece, shape in zip(pieces, self._bound_shapes, strict=True)]
        return (
            H.unflatten(0, (self.groups, self.rows)),
            free.unflatten(0, (number, self.rank)) if number else None,
            bound,
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the original of which ``split`` gives the parts; numbers that are left over are 0.

        Args:
            parts: matrices in the order of ``split``, each batch flattened or not.
        """
        flat = torch.cat([part.flatten() for part in parts])
        return F.pad(flat, (0, math.prod(self.shape) - flat.numel())).view(self.shape)

    @cached_property
    def is_co_isometry(self) -> bool:
        """Whether the kernel is a co-isometry: the adjoint keeps every norm."""
        return self.columns == self.inner

    @cached_property
    def is_isometry(self) -> bool:
        """Whether the kernel keeps every norm, which needs that it reads every pixel."""
        reads_all = all(
            phases == s and math.gcd(s, d) == 1
            for phases, s, d in zip(self.phases, self.stride, self.dilation, strict=True)
        )
        return reads_all and self.columns == self.out

    def unfold(self, product: Tensor) -> Tensor:
        """Return the product ``(groups, rows, *taps, columns)`` as a kernel ``(groups * out, channels, *kernel)``."""
        dims = len(self.kernel)
        if self.swapped:
            product = product.swapaxes(1, -1)
        product = product[..., product.shape[-1] - self.inner :]
        if self.restricted:
            product = self._gather(list(product.split(self._sizes, dim=-1)))
        product = product.unflatten(-1, (self.channels, *self.phases))  # (groups, out, *taps, channels, *phases)
        order = [0, 1, 2 + dims]
        for axis in range(dims):
            order += [2 + axis, 3 + dims + axis]
        long = [t * p for t, p in zip(self.taps, self.phases, strict=True)]
        kernel = product.permute(order).reshape(self.groups * self.out, self.channels, *long)
        for axis, (k, n) in enumerate(zip(self.kernel, long, strict=True)):
            kernel = kernel if k == n else kernel.narrow(2 + axis, 0, k)
        return kernel

    def fold(self, kernel: Tensor) -> Tensor:
        """Return the kernel as a product, with zeros in the channels that exist only there: the inverse of ``unfold``."""
        dims = len(self.kernel)
        for axis, (k, t, p) in enumerate(zip(self.kernel, self.taps, self.phases, strict=True)):
            pad = [0, 0] * dims
            pad[2 * (dims - 1 - axis) + 1] = t * p - k
            kernel = F.pad(kernel, pad)
        split = [n for pair in zip(self.taps, self.phases, strict=True) for n in pair]
        parts = kernel.reshape(self.groups, self.out, self.channels, *split)
        order = [0, 1, *(3 + 2 * a for a in range(dims)), 2, *(4 + 2 * a for a in range(dims))]
        parts = parts.permute(order)  # (groups, out, *taps, channels, *phases)
        first = 3 + dims
        pieces = []
        for octant in self.octants:
            piece = parts
            for axis, (low, high) in enumerate(octant):
                piece = piece.narrow(first + axis, low, high - low)
            pieces.append(piece.flatten(2 + dims))
        product = torch.cat(pieces, dim=-1)
        if self.swapped:
            return product.swapaxes(1, -1)
        return F.pad(product, (self.columns - self.inner, 0))

    @cached_property
    def _sizes(self) -> list[int]:
        return [self.channels * math.prod(high - low for low, high in octant) for octant in self.octants]

    def _gather(self, pieces: list[Tensor]) -> Tensor:
        """Join the octants to channels in their natural order."""
        tensors = [
            piece.unflatten(-1, (self.channels, *(high - low for low, high in octant)))
            for piece, octant in zip(pieces, self.octants, strict=True)
        ]
        for a in reversed(range(len(self.kernel))):
            if self.full[a] < self.phases[a]:
                dim = a - len(self.kernel)
                tensors = [torch.cat(pair, dim=dim) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
        return tensors[0].flatten(-len(self.kernel) - 1)
