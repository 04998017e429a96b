"""Piecewise-linear functions: their slopes at a point, between kinks that are within reach, and what the derivative takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.lyapunov.layers.kinked import Kinked, functions_of
from stableopt.nn.activations import Abs, GroupSort

__all__ = ["FUNCTIONS", "Pieces", "group_options", "groups_of", "pieces", "slopes_of"]


@dataclass(frozen=True)
class Pieces:
    r"""A continuous piecewise-linear function of one number, for each unit.

    Args:
        kinks: :math:`c_1 < \dots < c_k`, each a number or a tensor that broadcasts with the units.
        slopes: of the k + 1 pieces.

    Examples:
        >>> lower, upper = Pieces((0.0,), (0.0, 1.0)).interval(torch.tensor([-1.0, 0.0, 0.5]), 0.1)
        >>> lower.tolist(), upper.tolist()
        ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    """

    kinks: tuple[Any, ...]
    slopes: tuple[Any, ...]

    def interval(self, z: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest slope within a distance of each unit, kinks at that distance included.

        Args:
            z: pre-activations.
            reach: the distance; 0 for the Clarke derivative at the point itself.

        Returns:
            Two tensors of the shape of ``z``, in float64.
        """
        stored = z.detach()
        z = stored.double()
        # kinks and slopes are what the dtype of the activation makes of them, never by way of the default dtype
        kinks, slopes = (
            [torch.as_tensor(c, dtype=torch.float64).to(stored).double() for c in places]
            for places in (self.kinks, self.slopes)
        )
        lower, upper = torch.full_like(z, torch.inf), torch.full_like(z, -torch.inf)
        for i, value in enumerate(slopes):
            here = torch.ones_like(z, dtype=torch.bool)
            if i > 0:
                here &= z + reach >= kinks[i - 1]
            if i < len(kinks):
                here &= z - reach <= kinks[i]
            slope = value.expand_as(z)
            lower = torch.where(here, torch.minimum(lower, slope), lower)
            upper = torch.where(here, torch.maximum(upper, slope), upper)
        return lower, upper


def _opened(row: Kinked) -> Callable[..., Pieces | None]:
    def function(*args: Any, **kwargs: Any) -> Pieces | None:
        slopes = row.slopes(*args, **kwargs) if row.slopes is not None else None
        return None if slopes is None or row.places is None else Pieces(row.places(*args, **kwargs), slopes)

    return function


FUNCTIONS: dict[Any, Callable[..., Pieces | None]] = {
    function: _opened(row) for function, row in functions_of().items() if row.slopes is not None
}
"""What is piecewise linear among the functions of torch, by the function and its arguments."""


@functools.singledispatch
def pieces(module: nn.Module, z: Tensor) -> Pieces | None:  # noqa: ARG001 for classes that are registered
    """Return an activation as a piecewise-linear function; None for a module that is none. Register a class of your own.

    Args:
        module: ReLU, LeakyReLU, PReLU, Hardtanh, ReLU6, Softshrink, a Threshold without a jump, RReLU in evaluation
            mode, or :class:`stableopt.nn.Abs`.
        z: its input.

    Examples:
        >>> pieces(nn.LeakyReLU(0.2), torch.zeros(1)).slopes
        (0.2, 1.0)
        >>> pieces(nn.Tanh(), torch.zeros(1)) is None
        True
    """
    return None


@pieces.register(nn.ReLU)
def _(module: nn.ReLU, z: Tensor) -> Pieces | None:  # noqa: ARG001 dispatched on
    return FUNCTIONS[F.relu](z)


@pieces.register(nn.LeakyReLU)
def _(module: nn.LeakyReLU, z: Tensor) -> Pieces | None:
    return FUNCTIONS[F.leaky_relu](z, module.negative_slope)


@pieces.register(nn.PReLU)
def _(module: nn.PReLU, z: Tensor) -> Pieces | None:
    return FUNCTIONS[F.prelu](z, module.weight)


@pieces.register(nn.Hardtanh)
def _(module: nn.Hardtanh, z: Tensor) -> Pieces | None:
    return FUNCTIONS[F.hardtanh](z, module.min_val, module.max_val)


@pieces.register(nn.Softshrink)
def _(module: nn.Softshrink, z: Tensor) -> Pieces | None:
    return FUNCTIONS[F.softshrink](z, module.lambd)


@pieces.register(nn.Threshold)
def _(module: nn.Threshold, z: Tensor) -> Pieces | None:
    return FUNCTIONS[F.threshold](z, module.threshold, module.value)


@pieces.register(nn.RReLU)
def _(module: nn.RReLU, z: Tensor) -> Pieces | None:
    return FUNCTIONS[F.rrelu](z, module.lower, module.upper, module.training)


@pieces.register(Abs)
def _(module: Abs, z: Tensor) -> Pieces | None:
    if module.fraction == 1.0:
        return FUNCTIONS[torch.abs](z)
    channels = z.shape[1]
    left = torch.where(torch.arange(channels) < round(module.fraction * channels), -1.0, 1.0).double()
    return Pieces((0.0,), (left.reshape(-1, *[1] * (z.ndim - 2)), 1.0))


def slopes_of(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return the slope of an elementwise function that automatic differentiation takes at each unit.

    Args:
        function: of a tensor.
        z: where.

    Examples:
        >>> slopes_of(torch.relu, torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0.0, 0.0, 1.0]
    """
    with torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        return torch.autograd.grad(function(z * 1.0).sum(), z)[0].double()  # z * 1: it may work in place


def groups_of(module: GroupSort, shape: tuple[int, ...]) -> Tensor:
    """Return the places of the groups of an input of one sample, of shape ``(groups, g)``, in the order in which they are sorted.

    Args:
        module: sorts channels.
        shape: of a sample, channels first.

    Examples:
        >>> groups_of(GroupSort(2), (4,)).tolist()
        [[0, 1], [2, 3]]
    """
    places = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    return places.unflatten(0, (-1, module.group_size)).movedim(1, -1).reshape(-1, module.group_size)


def group_options(z: tuple[float, ...], reach: float) -> list[tuple[int, ...]]:
    r"""Return all orders that the numbers of a group may have when each moves by at most ``reach``.

    They are the orders in which i comes before j wherever :math:`z_i + r < z_j - r`.

    Args:
        z: the numbers.
        reach: r.

    Returns:
        Tuples p: the k-th smallest is number ``p[k]``.

    Examples:
        >>> group_options((1.0, 2.0), 0.4), group_options((1.0, 2.0), 0.5)
        ([(0, 1)], [(0, 1), (1, 0)])
    """

    def extend(rest: frozenset[int]) -> list[tuple[int, ...]]:
        if not rest:
            return [()]
        first = [i for i in sorted(rest) if not any(z[j] + reach < z[i] - reach for j in rest)]
        return [(i, *tail) for i in first for tail in extend(rest - {i})]

    return extend(frozenset(range(len(z))))
