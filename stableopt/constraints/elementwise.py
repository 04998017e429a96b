r"""Convex penalties of single entries beyond the two norms: elastic net, Huber, hinge, logarithmic barrier, entropy.

Each prox solves one scalar equation per entry, so a diagonal metric only gives every entry its own step. In the formulas
:math:`t = s \cdot \text{weight}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number
from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import Elementwise
from stableopt.constraints.penalties import L2Squared, in_range, shrink
from stableopt.constraints.sets import LinfBall

__all__ = ["ElasticNet", "Entropy", "Hinge", "Huber", "LogBarrier"]

_NEWTON_STEPS = 6
_LARGE = 1e15  # from it on the logarithm changes by less than a rounding
_SMALL = -36.0  # below it omega(z) is exp(z) to double precision


@dataclass(frozen=True)
class ElasticNet(Elementwise):
    r"""Sparsity and shrinkage together, :math:`g(x) = \sum_i \lambda_1 |x_i| + \tfrac{\lambda_2}{2} |x_i|^2`.

    .. math:: \operatorname{prox}_{sg}(x)_i = \frac{\operatorname{sign}(x_i) \max(|x_i| - s\lambda_1,\ 0)}{1 + s\lambda_2}.

    Args:
        l1: :math:`\lambda_1`, finite, :math:`\ge 0`.
        l2: :math:`\lambda_2`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if a weight is not a real number.
        ValueError: if it is negative or not finite.

    Note:
        At the kink :math:`|x_i| = s\lambda_1` the derivative is 0, an element of the Clarke Jacobian. Complex tensors work.

    References:
        Zou and Hastie, *Regularization and variable selection via the elastic net*, JRSS B 67, 2005.

    Examples:
        >>> import torch
        >>> ElasticNet(1.0, 1.0).prox(torch.tensor([5.0, 0.5]))
        tensor([2., 0.])
        >>> ElasticNet(1.0, 2.0).value(torch.tensor([3.0, -1.0])).item()
        14.0
    """

    l1: float
    l2: float
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weights."""
        for name in ("l1", "l2"):
            object.__setattr__(self, name, check_number("ElasticNet", name, getattr(self, name), low=0.0))

    def conjugate(self) -> Regularizer:
        """Return the conjugate where one of the weights is 0.

        Raises:
            ValueError: if both are positive.
        """
        if self.l2 == 0.0:
            return LinfBall(self.l1)
        return L2Squared(self.l2).conjugate() if self.l1 == 0.0 else super().conjugate()

    def _value(self, x: Tensor) -> Tensor:
        size = x.abs()
        return self.l1 * size + 0.5 * self.l2 * size.square()

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        return shrink(x, step * self.l1) / (1.0 + step * self.l2)


@dataclass(frozen=True)
class Huber(Elementwise):
    r"""The absolute value, rounded off at 0.

    The penalty is :math:`g(x) = w \sum_i h(x_i)` with

    .. math:: h(a) = \frac{a^2}{2\delta} \ \text{ if } |a| \le \delta, \qquad |a| - \frac{\delta}{2} \ \text{ otherwise.}

    The prox is :math:`a \delta / (\delta + t)` where :math:`|a| \le \delta + t`, else :math:`a - t \operatorname{sign}(a)`.

    Args:
        weight: :math:`w`, finite, :math:`\ge 0`.
        delta: :math:`\delta`, where the parabola ends, finite, :math:`> 0`.

    Raises:
        TypeError: if an argument is not a real number.
        ValueError: if it is out of range.

    Note:
        The border of the prox is :math:`\delta + t`, not :math:`\delta`; with the latter the map jumps. There the derivative is
        that of the parabola, an element of the Clarke Jacobian. Complex tensors work, with moduli.

    References:
        Huber, *Robust estimation of a location parameter*, Annals of Mathematical Statistics 35, 1964.

    Examples:
        >>> import torch
        >>> Huber(1.0, 1.0).prox(torch.tensor([1.2, 3.0]), step=0.5)
        tensor([0.8000, 2.5000])
        >>> Huber(1.0, 1.0).value(torch.tensor([1.0, -3.0])).item()
        3.0
    """

    weight: float
    delta: float = 1.0
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "weight", check_number("Huber", "weight", self.weight, low=0.0))
        object.__setattr__(self, "delta", check_number("Huber", "delta", self.delta, low=0.0, strict=True))

    def _value(self, x: Tensor) -> Tensor:
        size = x.abs()
        inner = size.clamp_max(in_range(self.delta, x.dtype))
        return self.weight * (inner * (inner / (2.0 * self.delta)) + (size - inner))

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        t = step * self.weight
        ratio = 1.0 / (1.0 + step * min(self.weight / self.delta, 1e300))  # 0 times infinity would be NaN
        flat = x.abs() > in_range(self.delta + t, x.dtype)
        return torch.where(flat, x - x.sgn() * in_range(t, x.dtype), x * ratio)


@dataclass(frozen=True)
class Hinge(Elementwise):
    r"""The margin loss :math:`g(x) = w \sum_i \max(0, 1 - x_i)`; the prox moves entries below 1 up by t, and no further than 1.

    Args:
        weight: :math:`w`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if the weight is not a real number.
        ValueError: if it is negative or not finite.

    Note:
        At :math:`x_i = 1 - t` and :math:`x_i = 1` the derivative is an element of the Clarke Jacobian.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.1.

    Examples:
        >>> import torch
        >>> Hinge(1.0).prox(torch.tensor([0.0, 0.8, 2.0]), step=0.5)
        tensor([0.5000, 1.0000, 2.0000])
        >>> Hinge(1.0).value(torch.tensor([0.0, 0.5, 2.0])).item()
        1.5
    """

    weight: float

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("Hinge", "weight", self.weight, low=0.0))

    def _value(self, x: Tensor) -> Tensor:
        return self.weight * (1.0 - x).clamp_min(0.0)

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        moved = x + step * self.weight
        return torch.where(x < 1.0, moved.clamp_max(1.0), x)


@dataclass(frozen=True)
class LogBarrier(Elementwise):
    r"""The barrier :math:`g(x) = -w \sum_i \log x_i` of the positive numbers, infinite elsewhere.

    .. math:: \operatorname{prox}_{sg}(x)_i = \tfrac12 \Bigl(x_i + \sqrt{x_i^2 + 4t}\Bigr) > 0.

    Args:
        weight: :math:`w`, finite, :math:`> 0`.

    Raises:
        TypeError: if the weight is not a real number.
        ValueError: if it is not positive or not finite.

    Note:
        For negative entries :math:`2t / (\sqrt{x^2 + 4t} - x)` is computed, without cancellation. Where the result is too small for
        the dtype it is the smallest normal number, so that the penalty stays finite.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.1.3.

    Examples:
        >>> import torch
        >>> LogBarrier(2.0).prox(torch.tensor([1.0, -1.0])).round(decimals=5)
        tensor([2., 1.])
        >>> LogBarrier(2.0).value(torch.tensor([1.0, -1.0])).item()
        inf
    """

    weight: float

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("LogBarrier", "weight", self.weight, low=0.0, strict=True))

    def _value(self, x: Tensor) -> Tensor:
        inside = x > 0.0
        return torch.where(inside, -self.weight * torch.where(inside, x, 1.0).log(), torch.inf)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the proximal point of each entry, which is positive; the arguments and errors of every elementwise prox.

        Examples:
            >>> import torch
            >>> LogBarrier(1.0).prox(torch.tensor(-1e30, dtype=torch.float16).double()).item() > 0
            True
        """
        p = super().prox(x, step, metric)
        return torch.where(p <= 0.0, torch.finfo(x.dtype).smallest_normal, p)

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        root = step**0.5 * self.weight**0.5  # the product itself may overflow
        length = torch.hypot(x, torch.zeros_like(x) + 2.0 * root)
        below = length - x.clamp_max(0.0)
        product = 2.0 * root / torch.where(below > 0.0, below, 1.0) * root
        return torch.where(x < 0.0, product, 0.5 * x + 0.5 * length)


@dataclass(frozen=True)
class Entropy(Elementwise):
    r"""The negative entropy :math:`g(x) = w \sum_i x_i \log x_i` of nonnegative numbers (:math:`0 \log 0 = 0`), infinite elsewhere.

    The prox solves :math:`u + t \log u = x - t`, that is :math:`u = t\, \omega(x/t - 1 - \log t)` with Wright's function
    :math:`\omega + \log \omega = z` (:math:`\omega(z) = W(e^z)` with Lambert's W).

    Args:
        weight: :math:`w`, finite, :math:`> 0`.

    Raises:
        TypeError: if the weight is not a real number.
        ValueError: if it is not positive or not finite.

    Note:
        The sum without the term :math:`-x_i`, so its minimizer is :math:`1/e`, not 1. Computed in float64 by Newton's
        method on a logarithmic form, a fixed number of steps from a starting value that is never further off than a factor of
        two: nothing overflows. A result below the range of the dtype is 0, where the penalty is 0.

    References:
        Corless, Gonnet, Hare, Jeffrey and Knuth, *On the Lambert W function*, 1996; Lawrence, Corless and Jeffrey, *Algorithm 917:
        complex double-precision evaluation of the Wright omega function*, ACM TOMS 38, 2012.

    Examples:
        >>> import torch
        >>> Entropy(1.0).prox(torch.tensor([2.0, -700.0], dtype=torch.float64))
        tensor([ 1.0000e+00, 3.6272e-305], dtype=torch.float64)
        >>> Entropy(1.0).value(torch.tensor([0.0, 1.0])).item()
        0.0
    """

    weight: float

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("Entropy", "weight", self.weight, low=0.0, strict=True))

    def _value(self, x: Tensor) -> Tensor:
        inside = x > 0.0  # at 0 the slope is infinite: there the derivative 0 is taken
        amount = self.weight * torch.where(inside, x, 1.0) * torch.where(inside, x, 1.0).log()
        return torch.where(inside, amount, torch.where(x == 0.0, 0.0, torch.inf))

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        wide = x.double()
        t = torch.as_tensor(step, dtype=torch.float64, device=x.device) * self.weight
        safe = torch.where(t > 0.0, t, 1.0)
        z = wide / safe - 1.0 - safe.log()
        large = z >= _LARGE
        small = z < _SMALL  # there omega(z) is exp(z); the product with t is taken inside
        inner = safe * _wright_omega(torch.where(large | small, 0.0, z))
        inner = torch.where(small, (torch.where(small, wide, safe) / safe - 1.0).exp(), inner)
        far = torch.where(large, wide, 1.0)
        moved = far.detach()
        for _ in range(2):  # u + t log u = x - t, and log u is as good as constant
            moved = far - safe - safe * moved.log()
        result = torch.where(large, torch.where(far < torch.inf, moved, far), inner)
        return torch.where(t > 0.0, result, wide.clamp_min(0.0)).to(x.dtype)


def _wright_omega(z: Tensor) -> Tensor:
    r"""Return :math:`\omega` with :math:`\omega + \log \omega = z`; its derivative is :math:`\omega / (1 + \omega)`."""
    point = z.detach()
    large = point > 1.0
    guess = torch.where(large, point - torch.where(large, point, 1.0).log(), point.clamp_max(1.0).exp())
    for _ in range(_NEWTON_STEPS):
        guess = _newton(guess, point)
    return _newton(guess, z)


def _newton(w: Tensor, z: Tensor) -> Tensor:
    """Return a step of Newton's method in log w, which cannot leave the positive numbers."""
    safe = w.clamp_min(torch.finfo(w.dtype).tiny)
    return safe * (1.0 + z - safe.log()) / (1.0 + safe)
