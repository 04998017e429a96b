"""Tensors that are spread over several processes (DTensor, as FSDP2 makes them): how to work on the local part and put it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Sharding", "is_sharded", "on_whole", "part_like", "whole"]


def is_sharded(x: object) -> bool:
    """Return whether a tensor is a DTensor, so that this process holds only a part of it.

    Examples:
        >>> is_sharded(torch.ones(2))
        False
    """
    if type(x) is Tensor or type(x) is torch.nn.Parameter:  # at once for what nearly every tensor is
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


@dataclass(frozen=True)
class Sharding:
    """How a DTensor is laid out, enough to make another one of the same layout from a local part.

    Args:
        mesh: the device mesh.
        placements: one for each dimension of the mesh; shards and replicas, no partial sums.
        shape: global shape.
        stride: global stride.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, owner: str, x: DTensor) -> Sharding:
        """Read the layout of a DTensor.

        Raises:
            ValueError: if it holds partial sums, or autograd would have to pass through the communication.
        """
        if any(p.is_partial() for p in x.placements):
            raise ValueError(
                f"{owner} needs the entries themselves, got a DTensor of partial sums {x.placements}; redistribute it first."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{owner} does not differentiate through communication: call it on a DTensor under torch.no_grad(), as an "
                "optimizer does, or before the model is sharded."
            )
        return cls(x.device_mesh, tuple(x.placements), x.shape, x.stride())

    def groups(self, dims: tuple[int, ...] | None) -> list[Any]:
        """Return the process groups over which vectors along ``dims`` (``None``: all dimensions) are split."""
        return [
            self.mesh.get_group(i)
            for i, p in enumerate(self.placements)
            if not p.is_replicate() and (dims is None or p.dim in dims) and self.mesh.size(i) > 1
        ]

    def wrap(self, local: Tensor) -> DTensor:
        """Return the DTensor of this layout whose part here is ``local``."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local.contiguous(), self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def part_of(self, whole: Tensor) -> Tensor:
        """Return the part that belongs here of a tensor that every process holds; nothing is sent."""
        from torch.distributed.tensor import DTensor, Replicate

        replicas = [Replicate()] * self.mesh.ndim
        spread = DTensor.from_local(whole.contiguous(), self.mesh, replicas, run_check=False)
        return spread.redistribute(placements=self.placements).to_local()


def whole(x: Tensor) -> Tensor:
    """Return a tensor with all its numbers; of one that is spread over processes, all of them must ask together.

    Args:
        x: a tensor.

    Examples:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return x.full_tensor() if is_sharded(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def on_whole(owner: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function that needs all entries, such as a singular value decomposition, to a DTensor.

    Every process gathers the whole tensor and computes the same result, so all parts fit together.

    Args:
        owner: the class that asks, for messages.
        function: maps a plain tensor to one of the same shape.
        x: a DTensor.

    Returns:
        A DTensor with the layout of ``x``.

    Raises:
        ValueError: as :meth:`Sharding.of`.
    """
    layout = Sharding.of(owner, x)  # pyright: ignore[reportArgumentType]  callers have asked is_sharded
    with torch.no_grad():
        result = function(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        return layout.wrap(layout.part_of(result))


def part_like(x: Tensor, other: Tensor, layout: Sharding | None) -> Tensor:
    """Return the part of ``other``, broadcast to the shape of ``x``, that lies on this process.

    Args:
        x: the tensor whose shape and layout count.
        other: a tensor that broadcasts to ``x``, sharded or not.
        layout: the layout of ``x``, ``None`` if it is not sharded.

    Examples:
        >>> part_like(torch.zeros(2, 2), torch.tensor([1.0, 2.0]), None)
        tensor([[1., 2.],
                [1., 2.]])
    """
    if layout is None:
        return other.expand(x.shape)
    if is_sharded(other):
        if other.shape == x.shape and tuple(other.placements) == layout.placements:  # pyright: ignore[reportAttributeAccessIssue]
            return other.to_local()  # pyright: ignore[reportAttributeAccessIssue]
        other = other.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    return layout.part_of(other.expand(x.shape))
