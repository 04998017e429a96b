r"""Sparsity penalties that do not shrink large entries: L0, lq with q < 1, MCP, SCAD. None is convex.

Each prox is a **global** minimizer of its scalar problem :math:`p(u) + (u - x)^2 / (2s)`, for every step: where the step is so long
that the problem is not convex, the candidates are compared in closed form. The maps jump at a threshold; there the
smaller of the two minimizers is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number
from stableopt.constraints.kinds import Elementwise

__all__ = ["L0", "MCP", "SCAD", "Lq"]

_NEWTON_STEPS = 12


@dataclass(frozen=True)
class L0(Elementwise):
    r"""The number of nonzero entries, :math:`g(x) = w\, |\{i : x_i \ne 0\}|`; prox: keep :math:`|x_i| > \sqrt{2sw}`, drop the rest.

    Args:
        weight: :math:`w`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if the weight is not a real number.
        ValueError: if it is negative or not finite.

    Note:
        At :math:`|x_i| = \sqrt{2sw}` both are minimizers, and the entry is dropped. The derivative is 1 where an entry is kept,
        else 0. Complex tensors work.

    References:
        Blumensath and Davies, *Iterative thresholding for sparse approximations*, 2008.

    Examples:
        >>> import torch
        >>> L0(2.0).prox(torch.tensor([3.0, 2.0, -1.0]))
        tensor([3., 0., 0.])
        >>> L0(2.0).value(torch.tensor([3.0, 0.0, -1.0])).item()
        4.0
    """

    weight: float
    complex_too: ClassVar[bool] = True
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L0", "weight", self.weight, low=0.0))

    def _value(self, x: Tensor) -> Tensor:
        return self.weight * (x != 0.0).double()

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        threshold = (step * (2.0 * self.weight)) ** 0.5
        dropped = (x.abs() <= threshold) & (threshold > torch.zeros_like(x.real))
        return torch.where(dropped, 0.0, x)


@dataclass(frozen=True)
class MCP(Elementwise):
    r"""The minimax concave penalty :math:`g(x) = \sum_i p(|x_i|)`, flat beyond :math:`\gamma\lambda`.

    .. math:: p(a) = \lambda a - \frac{a^2}{2\gamma} \text{ if } a \le \gamma\lambda, \quad \tfrac12 \gamma\lambda^2 \text{ beyond.}

    For :math:`s < \gamma` the prox is 0 up to :math:`s\lambda`, :math:`(a - s\lambda) / (1 - s/\gamma)` up to
    :math:`\gamma\lambda`, and a beyond; for :math:`s \ge \gamma` it is 0 up to :math:`\lambda\sqrt{s\gamma}` and a beyond.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        gamma: :math:`\gamma`, finite, :math:`> 0`.

    Raises:
        TypeError: if an argument is not a real number.
        ValueError: if it is out of range.

    Note:
        Not convex. For :math:`s \ge \gamma` the map jumps. Derivatives at borders are those of the side nearer to 0.

    References:
        Zhang, *Nearly unbiased variable selection under minimax concave penalty*, Annals of Statistics 38, 2010.

    Examples:
        >>> import torch
        >>> MCP(1.0, 2.0).prox(torch.tensor([0.5, 1.5, 3.0]))
        tensor([0., 1., 3.])
        >>> MCP(1.0, 2.0).prox(torch.tensor([2.8, 2.9]), step=4.0)
        tensor([0.0000, 2.9000])
    """

    weight: float
    gamma: float = 3.0
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("MCP", "weight", self.weight, low=0.0))
        object.__setattr__(self, "gamma", check_number("MCP", "gamma", self.gamma, low=0.0, strict=True))

    def _value(self, x: Tensor) -> Tensor:
        inner = x.abs().clamp_max(self.gamma * self.weight)
        return inner * (self.weight - inner / (2.0 * self.gamma))

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        s, size = torch.as_tensor(step, dtype=x.dtype, device=x.device), x.abs()
        short = s < self.gamma
        middle = (size - s * self.weight).clamp_min(0.0) / torch.where(short, 1.0 - s / self.gamma, 1.0)
        least = torch.where(short, self.gamma * self.weight, self.weight * (s * self.gamma).sqrt())
        return torch.where((size <= least) & (least > 0.0), torch.where(short, x.sgn() * middle, 0.0), x)


@dataclass(frozen=True)
class SCAD(Elementwise):
    r"""The smoothly clipped absolute deviation :math:`g(x) = \sum_i p(|x_i|)`, flat beyond :math:`a\lambda`.

    .. math::
        p(u) = \lambda u \ (u \le \lambda), \qquad
        \frac{2a\lambda u - u^2 - \lambda^2}{2(a - 1)} \ (\lambda < u \le a\lambda), \qquad
        \tfrac12 (a + 1) \lambda^2 \ (u > a\lambda).

    For :math:`s < a - 1` the prox is the soft threshold up to :math:`(1 + s)\lambda`,
    :math:`((a - 1) u - s a \lambda) / (a - 1 - s)` up to :math:`a\lambda`, and u beyond. For longer steps it is the soft threshold
    up to :math:`\tfrac12 (a + 1 + s) \lambda`, or 0 up to :math:`\lambda \sqrt{s (a + 1)}` if :math:`s \ge a + 1`, and u beyond.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.
        a: where the penalty becomes flat, in units of the weight; finite, :math:`> 2`.

    Raises:
        TypeError: if an argument is not a real number.
        ValueError: if it is out of range.

    Note:
        Not convex. For :math:`s \ge a - 1` the map jumps. Derivatives at borders are those of the side nearer to 0.

    References:
        Fan and Li, *Variable selection via nonconcave penalized likelihood and its oracle properties*, JASA 96, 2001.

    Examples:
        >>> import torch
        >>> SCAD(1.0, 3.0).prox(torch.tensor([0.5, 1.5, 2.5, 4.0]))
        tensor([0.0000, 0.5000, 2.0000, 4.0000])
        >>> SCAD(1.0, 3.0).prox(torch.tensor([4.8, 5.0]), step=6.0)
        tensor([0., 5.])
    """

    weight: float
    a: float = 3.7
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("SCAD", "weight", self.weight, low=0.0))
        object.__setattr__(self, "a", check_number("SCAD", "a", self.a, low=2.0, strict=True))

    def _value(self, x: Tensor) -> Tensor:
        size = x.abs()
        bent = (size.clamp_max(self.a * self.weight) - self.weight).clamp_min(0.0)
        return self.weight * (size.clamp_max(self.weight) + bent) - bent.square() / (2.0 * (self.a - 1.0))

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        s, size, edge = torch.as_tensor(step, dtype=x.dtype, device=x.device), x.abs(), self.a - 1.0
        short = s < edge
        soft = (size - s * self.weight).clamp_min(0.0)
        middle = (edge * size - s * (self.a * self.weight)) / torch.where(short, edge - s, 1.0)
        jump = torch.where(s < self.a + 1.0, 0.5 * (self.a + 1.0 + s), (s * (self.a + 1.0)).sqrt()) * self.weight
        inner = torch.where(short & (size > (1.0 + s) * self.weight), middle, soft)
        least = torch.where(short, self.a * self.weight, jump)
        return torch.where((size <= least) & (s * self.weight > 0.0), x.sgn() * inner, x)


@dataclass(frozen=True)
class Lq(Elementwise):
    r"""The bridge penalty :math:`g(x) = w \sum_i |x_i|^q` with :math:`0 < q < 1`.

    With :math:`t = sw` the prox is 0 up to the threshold

    .. math:: \tau = \frac{2 - q}{2 (1 - q)}\, \beta, \qquad \beta = (2 t (1 - q))^{1/(2 - q)},

    and beyond it the larger root of :math:`u + t q u^{q-1} = |x|`, which is at least :math:`\beta`.

    Args:
        weight: :math:`w`, finite, :math:`\ge 0`.
        q: the exponent, between 0 and 1, both excluded.

    Raises:
        TypeError: if an argument is not a real number.
        ValueError: if it is out of range.

    Note:
        Not convex; the map jumps from 0 to :math:`\beta` at :math:`\tau`. The root is found by Newton's method from the right,
        where the equation is convex and increasing, with a fixed number of steps.

    References:
        Marjanovic and Solo, *On lq optimization and matrix completion*, IEEE TSP 60, 2012, theorem 1.

    Examples:
        >>> import torch
        >>> Lq(1.0, 0.5).prox(torch.tensor([1.4, 1.6]))
        tensor([0.0000, 1.1295])
        >>> Lq(2.0, 0.5).value(torch.tensor([4.0, -9.0])).item()
        10.0
    """

    weight: float
    q: float = 0.5
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("Lq", "weight", self.weight, low=0.0))
        q = check_number("Lq", "q", self.q, low=0.0, strict=True)
        if q >= 1.0:
            raise ValueError(f"Lq needs 0 < q < 1, got {q!r}; use L1 for q = 1.")
        object.__setattr__(self, "q", q)

    def _value(self, x: Tensor) -> Tensor:
        away = x != 0.0  # at 0 the slope is infinite: there the derivative 0 is taken
        return torch.where(away, self.weight * torch.where(away, x, 1.0).abs() ** self.q, 0.0)

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        t, size, q = torch.as_tensor(step, dtype=x.dtype, device=x.device) * self.weight, x.abs(), self.q
        threshold = (2.0 - q) / (2.0 * (1.0 - q)) * (2.0 * (1.0 - q) * t) ** (1.0 / (2.0 - q))
        large = (size > threshold) & (size < torch.inf) & (t > 0.0)
        y = torch.where(large, size, 1.0)
        weight = torch.where(large, t, 0.0)
        u = y.detach()
        for _ in range(_NEWTON_STEPS):
            u = _step_to_root(u, y.detach(), weight, q)
        kept = x.sgn() * _step_to_root(u, y, weight, q)
        return torch.where(large, kept, torch.where((size <= threshold) & (t > 0.0), 0.0, x))


def _step_to_root(u: Tensor, y: Tensor, weight: Tensor, q: float) -> Tensor:
    """Return a step of Newton's method for u + weight q u^(q-1) = y; with u at the root its derivative is that of the root."""
    pull = weight * q * u ** (q - 1.0)
    return u - (u + pull - y) / (1.0 + (q - 1.0) * pull / u)
