"""The rule of ``torch.optim.RAdam``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.optim.rules.adaptive import Moments, count_of
from stableopt.optim.rules.base import Group, State, number, real_view

__all__ = ["Rectified"]


@dataclass(frozen=True)
class Rectified(Moments):
    r"""RAdam: Adam that trusts its second moment only once enough of it has been seen.

    With :math:`\rho_\infty = \frac{2}{1-\beta_2}-1` and :math:`\rho_t = \rho_\infty-\frac{2t\beta_2^t}{1-\beta_2^t}` the metric is

    .. math::
        P = (1-\beta_1^t)\,\frac{\sqrt v+\epsilon}{r_t\sqrt{1-\beta_2^t}} \quad (\rho_t > 5), \qquad P = 1-\beta_1^t
        \quad\text{before}, \qquad
        r_t^2 = \frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}.

    Both factors tend to 1, so that P becomes that of Adam.

    References:
        Liu et al., *On the variance of the adaptive learning rate and beyond*, 2020.

    Examples:
        >>> state = {"step": torch.tensor(1.0), "exp_avg_sq": torch.ones(2)}
        >>> Rectified().metric(state, {"betas": (0.5, 0.999), "eps": 0.0}).tolist()
        [0.5, 0.5]
    """

    def limit(self, group: Group) -> float:
        r"""Return :math:`(2-\eta\omega)(1+\beta_1)/((1-\beta_1)\eta)`, in the metric P of the step."""
        lr, beta1 = number(group["lr"]), group["betas"][0]
        return (1.0 + self._kept(group)) * ((1 + beta1) / (1 - beta1)) / lr if lr else math.inf

    def metric(self, state: State, group: Group) -> Tensor:
        """Return P for the state after the step."""
        beta1, beta2 = group["betas"]
        t, v = count_of(state["step"]), real_view(state["exp_avg_sq"])
        corrected = 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / corrected
        if not isinstance(t, Tensor):
            if length <= 5.0:
                return torch.as_tensor(1 - beta1**t, dtype=v.dtype, device=v.device).expand(v.shape)
            square = _rectification(length, longest) * corrected
            rectified = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
            return (1 - beta1**t) / rectified * (v.sqrt() + group["eps"])
        square = _rectification(length, longest) * corrected
        learned = (v.sqrt() + group["eps"]) / square.clamp(min=0.0).sqrt().to(v.dtype)
        return (1 - beta1**t).to(v.dtype) * torch.where(length > 5.0, learned, 1.0)


def _rectification(length: float | Tensor, longest: float) -> float | Tensor:
    return (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
