r"""Activations and fixed maps with Lipschitz constant known exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["GroupSort", "Scale"]


class GroupSort(nn.Module):
    r"""Sort the channels within groups of consecutive channels, in ascending order.

    .. math:: (x_{kg}, \dots, x_{kg+g-1}) \mapsto \text{the same numbers, sorted}.

    Locally it is a permutation: it keeps the norm of every gradient, and its Lipschitz constant is exactly 1 in l2 and in linf.
    That is why it suits models with a Lipschitz limit, where ReLU loses half of the gradient.

    Args:
        group_size: number :math:`g \ge 2` of channels in a group; it must divide the number of channels.

    Raises:
        ValueError: if ``group_size`` is no integer of at least 2, or the channels of an input are not divisible by it.

    Note:
        The channels are dimension 1 of an input with two or more dimensions (so an image without batch dimension needs one) and
        dimension 0 of a vector.

    References:
        Anil, Lucas and Grosse, *Sorting Out Lipschitz Function Approximation*, 2019.

    Examples:
        >>> GroupSort(2)(torch.tensor([[3.0, 1.0, -1.0, 0.0]]))
        tensor([[ 1.,  3., -1.,  0.]])
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 2:
            raise ValueError(f"group_size must be an integer >= 2, got {group_size!r}.")
        self.group_size = group_size

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the input with each group of channels sorted."""
        if input.ndim == 0:
            raise ValueError("GroupSort needs an input with a channel dimension, got a 0-d tensor.")
        dim = min(1, input.ndim - 1)
        channels = input.shape[dim]
        if channels % self.group_size:
            raise ValueError(
                f"GroupSort(group_size={self.group_size}) needs a number of channels divisible by {self.group_size}, "
                f"got {channels} in dimension {dim} of shape {tuple(input.shape)}."
            )
        groups = input.unflatten(dim, (channels // self.group_size, self.group_size))
        if self.group_size == 2:  # faster than sorting
            ordered = torch.stack([groups.amin(dim + 1), groups.amax(dim + 1)], dim + 1)
        else:
            ordered = groups.sort(dim + 1).values
        return ordered.flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"group_size={self.group_size}"


class Scale(nn.Module):
    r"""Multiply by a fixed number, :math:`x \mapsto cx`; its Lipschitz constant is exactly :math:`|c|`.

    Args:
        factor: the number :math:`c`, finite.

    Raises:
        ValueError: if ``factor`` is not finite.

    Note:
        The factor is a setting like the slope of a LeakyReLU: it is not trained and not part of ``state_dict()``.

    Examples:
        >>> Scale(0.5)(torch.tensor([2.0]))
        tensor([1.])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not math.isfinite(factor):
            raise ValueError(f"factor must be finite, got {factor!r}.")
        self.factor = float(factor)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return ``factor * input``."""
        return self.factor * input

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return f"factor={self.factor}"
