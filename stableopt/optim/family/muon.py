"""Muon with a spectral norm that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from stableopt.optim.base import GuardedOptimizer
from stableopt.optim.orthogonalize import muon_step
from stableopt.optim.rules import SpectralDescent
from stableopt.optim.settings import GuardSettings, check_lr, check_number

__all__ = ["Muon"]


class PolarMuon(torch.optim.Muon):
    """torch's Muon with the polar factor of :func:`stableopt.optim.orthogonalize`, whose spectral norm is at most 1.

    Examples:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> w.grad = torch.eye(2)
        >>> PolarMuon([w], lr=0.5, weight_decay=0.0).step()
        >>> bool((w.diagonal() >= 0.5).all())
        True
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; the argument and the result are torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            muon_step(
                params,
                grads,
                buffers,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                eps=group["eps"],
                adjust_lr_fn=group["adjust_lr_fn"],
                ns_steps=group["ns_steps"],
            )
        return loss


class Muon(GuardedOptimizer, PolarMuon):
    r"""torch's Muon with an honest norm, projection inside the step, and a guard on the loss.

    .. math::
        b^+ = \mu b + (1-\mu)\nabla f(\theta), \quad \theta^+ = P_C\bigl((1-\eta\omega)\theta - \eta a\, O(b^+)\bigr),

    :math:`O` the approximate polar factor of :func:`stableopt.optim.orthogonalize`, a the adjustment for the shape. Its spectral
    norm is at most 1, rounding included, where that of torch's polynomial reaches 1.2024; so :math:`\|\theta\|_2 \le a/\omega`
    is kept for :math:`\eta\omega \le 1`. To have the norm below a bound as stored, whatever the decay, use
    ``constraint=stableopt.constraints.SpectralBall(...)``.

    Args:
        params: matrices, named ones or groups, as for torch.
        lr: learning rate :math:`\eta`, a finite number :math:`\ge 0` or a tensor with one element.
        weight_decay: :math:`\omega \ge 0`, decoupled.
        momentum: :math:`\mu` in [0, 1).
        nesterov: look ahead by one step of the momentum.
        ns_coefficients: None; the polynomials are those whose composite is proved to stay below 1.
        eps: smallest norm of a momentum that is normalized.
        ns_steps: number of polynomials.
        adjust_lr_fn: as for torch.
        **settings: of the guard, and sets: see :class:`GuardSettings`. It takes no penalty: a normalized step has no metric in
            which a prox would solve the penalized problem. The energy is the loss.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, a parameter is not a matrix, or coefficients or a penalty are given.

    References:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024.

    Examples:
        >>> w = torch.nn.Parameter(torch.zeros(3, 2))
        >>> optimizer = Muon([w], lr=0.1, weight_decay=0.5)
        >>> target = torch.randn(3, 2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * ((w - target) ** 2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(20):
        ...     _ = optimizer.step(closure)
        >>> optimizer.last_step.verdict
        'decreased'
    """

    rule = SpectralDescent()
    torch_class = PolarMuon

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: None = None,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **settings: Unpack[GuardSettings],
    ) -> None:
        check_lr(lr)
        if ns_coefficients is not None:
            raise ValueError(
                "Muon chooses its coefficients so that the spectral norm of a step is proved, got "
                f"ns_coefficients={ns_coefficients!r}: "
                "leave them out, or use torch.optim.Muon, which stableopt.optim.guard can guard."
            )
        with self.set_up(settings):
            rate: Any = lr  # torch takes a tensor as well, whatever its annotation says
            PolarMuon.__init__(
                self, params, rate, weight_decay, momentum, nesterov, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn
            )  # fmt: skip

    def check_group(self, group: dict[str, Any], others: Sequence[dict[str, Any]] | None = None) -> None:
        """Refuse what torch's constructor would; :meth:`GuardedOptimizer.check_group` has the rest."""
        check_number("momentum", group["momentum"], high=1.0)
        super().check_group(group, others)
