"""Vectors over many parameters as few long tensors, so that an operation on them is few operations on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.optim.rules.base import real_view

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """How one real tensor for each parameter becomes one long tensor for each device, dtype and owner.

    Args:
        shapes: of the real view of each parameter.
        places: the numbers of the parameters in each long tensor.
        keys: owner, device and dtype of each long tensor; half precision is held in float32.

    Examples:
        >>> packing = Packing.of([torch.zeros(2), torch.zeros(1, 3)])
        >>> packing.pack([torch.ones(2), torch.zeros(1, 3)])
        [tensor([1., 1., 0., 0., 0.])]
        >>> [x.shape for x in packing.unpack([torch.arange(5.0)])]
        [torch.Size([2]), torch.Size([1, 3])]
    """

    shapes: tuple[torch.Size, ...]
    places: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, torch.device, torch.dtype], ...]

    @classmethod
    def of(cls, parameters: Sequence[Tensor], owners: Sequence[int] | None = None) -> Packing:
        """Return the packing of vectors over parameters.

        Args:
            parameters: complex ones count as pairs of real ones.
            owners: of each parameter; those of different owners stay apart.

        Examples:
            >>> len(Packing.of([torch.zeros(1), torch.zeros(1)], owners=[0, 1]).places)
            2
        """
        views = [real_view(p.detach()) for p in parameters]
        found: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}
        for i, view in enumerate(views):
            key = (owners[i] if owners else 0, view.device, torch.promote_types(view.dtype, torch.float32))
            found.setdefault(key, []).append(i)
        return cls(tuple(view.shape for view in views), tuple(map(tuple, found.values())), tuple(found))

    def pack(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the long tensors.

        Args:
            tensors: a real one for each parameter.

        Examples:
            >>> Packing.of([torch.zeros(1), torch.zeros(1)]).pack([torch.ones(1), torch.zeros(1)])
            [tensor([1., 0.])]
        """
        each = list(tensors)
        return [
            torch.cat([each[i].detach().reshape(-1) for i in place]).to(device, dtype)
            for place, (_, device, dtype) in zip(self.places, self.keys, strict=True)
        ]

    def unpack(self, packed: Sequence[Tensor]) -> list[Tensor]:
        """Return a view for each parameter.

        Args:
            packed: the long tensors.

        Examples:
            >>> Packing.of([torch.zeros(1), torch.zeros(1)]).unpack([torch.tensor([1.0, 0.0])])
            [tensor([1.]), tensor([0.])]
        """
        views: dict[int, Tensor] = {}
        for place, x in zip(self.places, packed, strict=True):
            parts = x.split([self.shapes[i].numel() for i in place])
            views |= {i: part.view(self.shapes[i]) for i, part in zip(place, parts, strict=True)}
        return [views[i] for i in range(len(self.shapes))]

    def fits(self, packed: Sequence[Tensor]) -> bool:
        """Say whether tensors have the shapes of the long ones.

        Args:
            packed: the tensors.

        Examples:
            >>> Packing.of([torch.zeros(1)]).fits([torch.zeros(2)])
            False
        """
        sizes = [sum(self.shapes[i].numel() for i in place) for place in self.places]
        return [tuple(x.shape) for x in packed] == [(size,) for size in sizes]
