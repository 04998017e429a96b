"""The plain Lion optimizer, in the manner of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    _default_to_fused_or_foreach,
    _use_grad_for_differentiable,
    _view_as_real,
)

__all__ = ["PlainLion"]

_TORCH: Any = torch
"""The kernels for lists of tensors, which torch exports without types."""


class PlainLion(Optimizer):
    r"""Lion: the sign of an interpolated momentum, with decoupled decay.

    .. math::
        D = \operatorname{sign}(\beta_1 m+(1-\beta_1)\nabla f(\theta)), \quad
        \theta^+ = (1-\eta\omega)\theta-\eta D, \quad m^+ = \beta_2 m+(1-\beta_2)\nabla f(\theta).

    Real and imaginary parts of a complex parameter are parameters of their own.

    Args:
        params: parameters, named parameters or groups, as for torch.
        lr: learning rate :math:`\eta \ge 0`, a number or a tensor with one element; about a tenth of what Adam takes.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        weight_decay: :math:`\omega \ge 0`, decoupled.
        foreach: whether to treat all parameters of a group at once; None for torch's choice. The result is the same.
        maximize: maximize the loss.
        capturable: whether the step is captured in a graph; a tensor lr is then read on its device.
        differentiable: whether autograd records the step.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Chen et al., *Symbolic discovery of optimization algorithms*, 2023.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
        >>> optimizer = PlainLion([w], lr=0.25)
        >>> w.grad = torch.tensor([3.0, -1e-9, 0.0])
        >>> optimizer.step()
        >>> w.tolist()
        [0.75, -1.75, 0.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if foreach and differentiable:
            raise ValueError("`foreach` and `differentiable` cannot be `True` together: autograd does not record it.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in what older states lack."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("foreach", None)
            group.setdefault("maximize", False)
            group.setdefault("capturable", False)
            group.setdefault("differentiable", False)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step.

        Args:
            closure: evaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, means = self._gathered(group)
            if not params:
                continue
            foreach = group["foreach"]
            if foreach is None:
                _, foreach = _default_to_fused_or_foreach(params, group["differentiable"], use_fused=False)
                # as torch: without capturable a tensor lr takes the loop, which reads it once per parameter
                foreach = foreach and not (isinstance(group["lr"], Tensor) and not group["capturable"])
            (_step_together if foreach else _step_one_by_one)(params, grads, means, group)
        return loss

    def _gathered(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return parameters with their gradients and means, making those that are missing."""
        params: list[Tensor] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            params.append(p)
            if len(self.state[p]) == 0:
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return params, [cast("Tensor", p.grad) for p in params], [self.state[p]["exp_avg"] for p in params]


def _step_one_by_one(params: list[Tensor], grads: list[Tensor], means: list[Tensor], group: dict[str, Any]) -> None:
    lr, omega, (beta1, beta2) = _scalar(group["lr"]), group["weight_decay"], group["betas"]
    for p, g, m in zip(params, grads, means, strict=True):
        if torch.is_complex(p):
            p, g, m = torch.view_as_real(p), torch.view_as_real(g), torch.view_as_real(m)  # noqa: PLW2901
        if group["maximize"]:
            g = -g  # noqa: PLW2901
        if omega != 0:
            p.mul_(1 - lr * omega)
        direction = m.lerp(g, 1 - beta1).sign_()
        if isinstance(lr, Tensor) and (group["capturable"] or lr.requires_grad):
            p.addcmul_(direction, lr, value=-1.0)
        else:
            p.add_(direction, alpha=cast("float", -lr))
        m.lerp_(g, 1 - beta2)


def _step_together(params: list[Tensor], grads: list[Tensor], means: list[Tensor], group: dict[str, Any]) -> None:
    lr, omega, (beta1, beta2) = _scalar(group["lr"]), group["weight_decay"], group["betas"]
    lists = cast("list[list[Tensor | None]]", [params, grads, means])
    grouped = Optimizer._group_tensors_by_device_and_dtype(lists)  # noqa: SLF001 - as torch's own optimizers
    for (some, their_grads, their_means), _ in grouped.values():
        ps, gs, ms = (cast("list[Tensor]", list(x)) for x in (some, their_grads, their_means))
        if any(torch.is_complex(p) for p in ps):
            _view_as_real(ps, gs, ms)
        if group["maximize"]:
            gs = list(_TORCH._foreach_neg(gs))  # noqa: SLF001
        if omega != 0:
            _TORCH._foreach_mul_(ps, 1 - lr * omega)
        directions = _TORCH._foreach_lerp(ms, gs, 1 - beta1)  # noqa: SLF001
        _TORCH._foreach_sign_(directions)
        if isinstance(lr, Tensor) and group["capturable"]:
            _TORCH._foreach_addcmul_(ps, directions, [lr] * len(ps), value=-1.0)
        else:
            _TORCH._foreach_add_(ps, directions, alpha=-lr)
        _TORCH._foreach_lerp_(ms, gs, 1 - beta2)


def _scalar(x: Any) -> Any:
    """Return a tensor with one element as a 0-d one."""
    return x.squeeze() if isinstance(x, Tensor) and x.ndim != 0 else x
