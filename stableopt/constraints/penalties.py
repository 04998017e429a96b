"""Penalties that are convex and separable: their prox is one formula per coordinate, in any diagonal metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stableopt.constraints.arguments import check_number, check_step, check_tensor
from stableopt.constraints.base import Regularizer

__all__ = ["L1", "L2Squared"]


@dataclass(frozen=True)
class L1(Regularizer):
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
        >>> L1(2.0).prox(torch.tensor([3.0, -0.5]), step=0.5)
        tensor([2., 0.])
        >>> L1(2.0).value(torch.tensor([3.0, -0.5])).item()
        7.0
    """

    weight: float
    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L1", "weight", self.weight, low=0.0))

    def value(self, x: Tensor) -> Tensor:
        """Return the penalty, summed in float64.

        Examples:
            >>> L1(1.0).value(torch.tensor([3.0, -4.0])).item()
            7.0
        """
        check_tensor("L1", x)
        return self.weight * x.abs().sum(dtype=torch.float64)

    def prox(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return ``x`` moved toward zero by ``step * weight``, and no further than zero.

        Raises:
            TypeError: if ``x`` or ``step`` has the wrong type.
            ValueError: if ``step`` is negative, not finite, or a tensor that does not broadcast to ``x``.

        Examples:
            >>> L1(1.0).prox(torch.tensor([3.0, -4.0]), step=torch.tensor([1.0, 2.0]))
            tensor([ 2., -2.])
        """
        work, threshold = _scaled_step("L1", x, step, self.weight)
        return (work - work.clamp(-threshold, threshold)).to(x.dtype)


@dataclass(frozen=True)
class L2Squared(Regularizer):
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
        >>> L2Squared(2.0).prox(torch.tensor([3.0, -4.0]), step=0.5)
        tensor([ 1.5000, -2.0000])
        >>> L2Squared(2.0).value(torch.tensor([3.0, -4.0])).item()
        25.0
    """

    weight: float
    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the weight."""
        object.__setattr__(self, "weight", check_number("L2Squared", "weight", self.weight, low=0.0))

    def value(self, x: Tensor) -> Tensor:
        """Return the penalty, summed in float64.

        Examples:
            >>> L2Squared(1.0).value(torch.tensor([3.0, 4.0])).item()
            12.5
        """
        check_tensor("L2Squared", x)
        return 0.5 * self.weight * x.double().square().sum()

    def prox(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return ``x`` divided by ``1 + step * weight``.

        Raises:
            TypeError: if ``x`` or ``step`` has the wrong type.
            ValueError: if ``step`` is negative, not finite, or a tensor that does not broadcast to ``x``.

        Examples:
            >>> L2Squared(1.0).prox(torch.tensor([3.0, -4.0]), step=torch.tensor([1.0, 3.0]))
            tensor([ 1.5000, -1.0000])
        """
        work, amount = _scaled_step("L2Squared", x, step, self.weight)
        return (work / (1.0 + amount)).to(x.dtype)


def _scaled_step(owner: str, x: Tensor, step: float | Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return ``x`` in the dtype to compute in (float32 for half precision), and ``step * weight`` in the same."""
    check_tensor(owner, x)
    check_step(owner, step, x, separable=True)
    work = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
    if isinstance(step, Tensor):
        return work, torch.mul(step, weight).to(work.dtype)
    return work, torch.full((), step * weight, dtype=torch.float64, device=x.device).to(work.dtype)
