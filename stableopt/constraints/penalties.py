"""Penalties that are convex and separable: their prox is one formula per coordinate, in any diagonal metric."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stableopt.constraints.arguments import check_number
from stableopt.constraints.base import Regularizer
from stableopt.constraints.kinds import Elementwise
from stableopt.constraints.sets import LinfBall

__all__ = ["L1", "L2Squared"]


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
        The prox is rounded to nearest in the dtype of ``x`` (half precision is computed in float32). Its derivative at the kink
        :math:`|x_i| = s\lambda` is 0, an element of the Clarke Jacobian.

    References:
        Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.5.2.

    Examples:
        >>> import torch
        >>> L1(2.0).prox(torch.tensor([3.0, -0.5]), step=0.5)
        tensor([2., 0.])
        >>> L1(2.0).value(torch.tensor([3.0, -0.5])).item()
        7.0
    """

    weight: float

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L1", "weight", self.weight, low=0.0))

    def conjugate(self) -> Regularizer:
        """Return the ball of the maximum norm with the weight as radius."""
        return LinfBall(self.weight)

    def _value(self, x: Tensor) -> Tensor:
        return self.weight * x.abs()

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        threshold = step * self.weight
        return x - x.clamp(-threshold, threshold)


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

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L2Squared", "weight", self.weight, low=0.0))

    def _value(self, x: Tensor) -> Tensor:
        return 0.5 * self.weight * x.square()

    def _prox(self, x: Tensor, step: float | Tensor) -> Tensor:
        return x / (1.0 + step * self.weight)
