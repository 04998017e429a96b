r"""Activation that reflects groups of channels at a learned hyperplane."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound, round_up
from stableopt.nn.activations import at_least_float32
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.precision import full_precision
from stableopt.nn.uniform import uniform_rule

__all__ = ["Householder"]


class Householder(nn.Module):
    r"""Reflect each group of channels at a learned hyperplane if it lies on the negative side.

    .. math::
        z \mapsto z - 2 \min(v^\top z, 0)\, v =
        \begin{cases} z & v^\top z \ge 0 \\ (I - 2vv^\top)\, z & v^\top z \le 0 \end{cases}
        \qquad v = d / \|d\|_2 ,

    for each group :math:`z \in \mathbb R^g` of consecutive channels and its learned direction :math:`d`. The two pieces agree on
    the hyperplane :math:`v^\top z = 0` and both are orthogonal, so along any segment the map is a chain of isometries: the l2
    constant is exactly 1 for all :math:`d`, and the norm of every gradient is kept. With :math:`d = (-1, 1)` it is :class:`MaxMin`.

    In linf and l1 the constant is the largest absolute row sum of :math:`I - 2vv^\top` over the groups (the matrix is symmetric, so
    rows and columns agree), at most :math:`\sqrt g`; for pairs it is :math:`|\cos\theta| + |\sin\theta|`.

    Args:
        channels: number of channels.
        group_size: number :math:`g \ge 2` of channels in a group; it must divide ``channels``.

    Raises:
        ValueError: if the sizes are no such integers; in ``forward``, if the input has another number of channels.

    Note:
        Parameter ``direction`` has the shape ``(channels / g, g)``; only its direction matters. Pairs start as MaxMin, larger
        groups at random. Half precision is computed in float32 and rounded at the end. A direction of zero gives the identity.

    References:
        Singla, Singla and Feizi, *Improved Deterministic l2 Robustness on CIFAR-10 and CIFAR-100*, 2022, section 4.

    Examples:
        >>> Householder(4)(torch.tensor([[3.0, 1.0, -1.0, 0.0]])).round(decimals=4)
        tensor([[ 1.,  3., -1.,  0.]], grad_fn=...)
    """

    def __init__(self, channels: int, group_size: int = 2) -> None:
        super().__init__()
        for name, size, least in (("channels", channels, 1), ("group_size", group_size, 2)):
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {size!r}.")
        if channels % group_size:
            raise ValueError(f"channels must be divisible by group_size, got {channels} and {group_size}.")
        self.direction = nn.Parameter(torch.empty(channels // group_size, group_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start pairs as MaxMin and larger groups with a random direction."""
        if self.direction.shape[1] == 2:
            with torch.no_grad():
                self.direction[:, 0].fill_(-math.sqrt(0.5))
                self.direction[:, 1].fill_(math.sqrt(0.5))
        else:
            nn.init.normal_(self.direction)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the input with each group on the positive side of its hyperplane."""
        groups, size = self.direction.shape
        if input.ndim == 0 or input.shape[dim := min(1, input.ndim - 1)] != groups * size:
            raise ValueError(
                f"Householder was built for {groups * size} channels (dimension 1, or 0 of a vector), "
                f"got an input of shape {tuple(input.shape)}."
            )
        with full_precision(input):
            z = at_least_float32(input).unflatten(dim, (groups, size))
            v = unit_rows(self.direction).to(z.dtype).reshape(groups, size, *[1] * (z.ndim - dim - 2))
            side = (v * z).sum(dim + 1, keepdim=True)
            return (z - 2 * side.clamp_max(0) * v).flatten(dim, dim + 1).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        groups, size = self.direction.shape
        return f"{groups * size}, group_size={size}"


def unit_rows(weight: Tensor) -> Tensor:
    r"""Divide each row by its l2 norm, in at least float32; a row of zeros stays.

    Args:
        weight: shape ``(rows, n)``.

    Returns:
        A tensor of the same shape whose rows have norm 1 up to rounding. A row is first divided by its largest entry, so neither
        tiny nor huge entries are lost. The gradient is finite everywhere, and 0 at a row of zeros.

    Examples:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    rows = at_least_float32(weight)
    largest = rows.detach().abs().amax(1, keepdim=True)  # a factor that cancels: no gradient needed
    rows = rows / torch.where(largest == 0, torch.ones_like(largest), largest)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(0.5)  # at least 1, or 0


@lipschitz_rule.register(Householder)
def _householder(module: Householder, norm: str) -> Bound:
    if not bool(module.direction.isfinite().all()):
        raise ValueError("no bound holds for a Householder activation with NaN or infinite directions.")
    if norm == "l2":
        return Bound.point(1.0)
    return Bound(1.0, max([1.0, *(_row_sum(row) for row in module.direction.detach().double().tolist())]))


def _row_sum(direction: list[float]) -> float:
    r"""Return the largest absolute row sum of :math:`I - 2dd^\top/\|d\|^2`, computed exactly and rounded up."""
    d = [abs(Fraction(entry)) for entry in direction]
    square, total = sum(e * e for e in d), sum(d)
    if square == 0:
        return 1.0
    return round_up(max(abs(square - 2 * e * e) + 2 * e * (total - e) for e in d) / square)


@uniform_rule.register(Householder)
def _householder_uniform(module: Householder, norm: str) -> Bound:
    r"""In linf and l1 a reflection of :math:`g` entries is at most :math:`\sqrt g` times its l2 norm."""
    return Bound(0.0, 1.0 if norm == "l2" else Bound.point(module.direction.shape[1]).sqrt().upper)
