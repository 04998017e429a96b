"""Penalties that are convex and separable: their prox is one formula per coordinate, in any diagonal metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.constraints.arguments import check_dims, check_number, check_numbers
from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import Elementwise, VectorPenalty
from stableopt.constraints.layout import Vectors, weight_rows
from stableopt.constraints.sets import LinfBall

__all__ = ["L1", "L2Squared", "WeightedL1", "shrink"]


@dataclass(frozen=True)
class L1(Elementwise):
    r"""The sparsity penalty :math:`g(x) = \lambda \sum_i |x_i|`.

    .. math:: \operatorname{prox}_{sg}(x)_i = \operatorname{sign}(x_i) \max(|x_i| - s\lambda,\ 0).

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if the weight is not a real number.
        ValueError: if it is negative or not finite.

    Note:
        The prox is rounded to nearest in the dtype of ``x`` (half precision is computed in float32). Complex tensors work, with
        moduli. Its derivative at the kink
        :math:`|x_i| = s\lambda` is 0, an element of the Clarke Jacobian.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.5.2.

    Examples:
        >>> import torch
        >>> L1(2.0).prox(torch.tensor([3.0, 0.5]), step=0.5)
        tensor([2., 0.])
        >>> L1(2.0).value(torch.tensor([3.0, -0.5])).item()
        7.0
    """

    weight: float
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L1", "weight", self.weight, low=0.0))

    def conjugate(self) -> Regularizer:
        """Return the ball of the maximum norm with the weight as radius."""
        return LinfBall(self.weight)

    def _value(self, x: Tensor) -> Tensor:
        return self.weight * x.abs()

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        return shrink(x, step * self.weight)


@dataclass(frozen=True)
class L2Squared(Elementwise):
    r"""The ridge penalty :math:`g(x) = \tfrac{\lambda}{2} \|x\|^2`, that is weight decay taken implicitly.

    .. math:: \operatorname{prox}_{sg}(x) = \frac{x}{1 + s\lambda}.

    Args:
        weight: :math:`\lambda`, finite, :math:`\ge 0`.

    Raises:
        TypeError: if the weight is not a real number.
        ValueError: if it is negative or not finite.

    Note:
        The prox contracts by :math:`1/(1 + s\lambda)` at every step size; explicit decay :math:`x - s\lambda x` diverges past
        :math:`s\lambda = 2`.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.1.1.

    Examples:
        >>> import torch
        >>> L2Squared(2.0).prox(torch.tensor([3.0, -4.0]), step=0.5)
        tensor([ 1.5000, -2.0000])
        >>> L2Squared(2.0).value(torch.tensor([3.0, -4.0])).item()
        25.0
    """

    weight: float
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L2Squared", "weight", self.weight, low=0.0))

    def conjugate(self) -> Regularizer:
        """Return the same function with the inverse weight; for weight 0 the set that holds 0 alone.

        Raises:
            ValueError: if the weight is so small that its inverse is infinite.
        """
        if self.weight == 0.0:
            return LinfBall(0.0)
        if 1.0 / self.weight == float("inf"):
            return super().conjugate()
        return L2Squared(1.0 / self.weight)

    def _value(self, x: Tensor) -> Tensor:
        return 0.5 * self.weight * x.abs().square()

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        return x / (1.0 + step * self.weight)


@dataclass(frozen=True)
class WeightedL1(VectorPenalty):
    r"""The sparsity penalty with a weight for each entry of a vector, :math:`g(x) = \sum_i w_i |x_i|` (adaptive lasso).

    Args:
        weights: :math:`w_i \ge 0`, finite, one per entry of a vector in the order of ``dims``.
        dims: the dimensions along which the entries of one vector lie; ``None`` for all entries together.

    Raises:
        TypeError: if the weights are not numbers, or ``dims`` are not dimensions.
        ValueError: if a weight is negative or not finite; in use, if there are not as many as entries.

    Note:
        As :class:`L1`, with threshold :math:`s w_i`; computed in float64. Complex tensors work, with moduli.

    References:
        Zou, *The adaptive lasso and its oracle properties*, JASA 101, 2006.

    Examples:
        >>> import torch
        >>> WeightedL1((1.0, 2.0), dims=-1).prox(torch.tensor([[3.0, 3.0], [-0.5, 4.0]]))
        tensor([[2., 1.],
                [0., 2.]])
    """

    weights: tuple[float, ...]
    dims: int | tuple[int, ...] | None = None
    separable: ClassVar[bool] = True
    complex_too: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "weights", check_numbers("WeightedL1", "weights", self.weights, low=0.0))
        object.__setattr__(self, "dims", check_dims("WeightedL1", self.dims))

    def conjugate(self) -> LinfBall:
        """Return the box with the weights as bounds of the moduli."""
        return LinfBall(1.0, weights=self.weights, dims=self.dims)

    def _value(self, v: Vectors) -> Tensor:
        return v.sum(weight_rows("WeightedL1", "weights", v, self.weights) * v.data.abs())

    def _prox(self, v: Vectors, step: Tensor) -> Tensor:
        return shrink(v.data, step * weight_rows("WeightedL1", "weights", v, self.weights))


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    r"""Return the soft threshold :math:`x_i \max(1 - \tau_i / |x_i|,\ 0)`, complex too; the derivative at the kink is 0.

    Args:
        x: floating or complex tensor.
        threshold: :math:`\tau \ge 0`, a number (one kernel for real tensors) or a tensor that broadcasts to ``x``.

    Examples:
        >>> shrink(torch.tensor([3.0, 0.5]), 1.0), shrink(torch.tensor(-3.0), 1.0)
        (tensor([2., 0.]), tensor(-2.))
    """
    if not isinstance(threshold, Tensor) and threshold == 0.0:
        return x.clone()  # also at 0 the identity has the derivative 1
    if x.is_complex():
        size = x.abs()
        above = size > threshold
        return torch.where(above, x * (1.0 - threshold / torch.where(above, size, 1.0)), x * 0.0)
    bound = in_range(threshold, x.dtype)  # an infinite one would make NaN of an infinite entry
    return x - x.clamp(-bound, bound) if isinstance(bound, Tensor) else F.softshrink(x, bound)


def in_range(number: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return the number, but no more than the largest finite one of the dtype.

    Examples:
        >>> import torch
        >>> in_range(1e10, torch.float16), in_range(2.0, torch.float16)
        (65504.0, 2.0)
    """
    most = torch.finfo(dtype).max
    return number.clamp_max(most) if isinstance(number, Tensor) else min(number, most)
