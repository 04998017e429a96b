"""Steps that ``torch.compile`` turns into one kernel: torch's functional step and the regularizer in one graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from stableopt.constraints import L1

if TYPE_CHECKING:
    from stableopt.optim.base import GuardedOptimizer

__all__ = ["traced_step"]


def traced_step(optimizer: GuardedOptimizer) -> bool:
    """Do the step of SGD with soft thresholds in a form that a compiler fuses; elsewhere do nothing.

    Eagerly the prox reads and writes parameters and momentum once more than torch's step does, which costs as much as the step.
    In one
    graph with it, it costs nothing that can be measured.

    Args:
        optimizer: without a guard.

    Returns:
        Whether the step has been done: only for torch's SGD whose penalties are :class:`~stableopt.constraints.L1`, of real
        parameters.

    Examples:
        >>> from stableopt.optim import SGD
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.2]))
        >>> w.grad = torch.zeros(2)
        >>> traced_step(SGD([w], lr=0.5, prox=L1(1.0), guard="off")), w.tolist()
        (True, [0.5, 0.0])
    """
    if optimizer.torch_class is not torch.optim.SGD or not all(_fits(group) for group in optimizer.param_groups):
        return False
    initialize: Any = optimizer
    with torch.no_grad():
        for group in optimizer.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor | None] = []
            initialize._init_group(group, params, grads, buffers)  # noqa: SLF001 - what a compiler knows how to trace
            young = [b is None for b in buffers] or [True] * len(params)
            sgd(
                params,
                grads,
                buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                has_sparse_grad=False,
                foreach=True,
            )
            if group["prox"] is not None:
                _soft_threshold(group, params, buffers, young)
            if group["momentum"]:
                for p, buffer in zip(params, buffers, strict=True):
                    optimizer.state[p]["momentum_buffer"] = buffer
    return True


def _fits(group: dict[str, Any]) -> bool:
    """Whether a group is one of real parameters with dense gradients, whose regularizer, if any, is a soft threshold."""
    plain = group["constraint"] is None and (group["prox"] is None or isinstance(group["prox"], L1))
    return plain and not any(
        p.is_complex() or (p.grad is not None and p.grad.layout is not torch.strided) for p in group["params"]
    )


def _soft_threshold(
    group: dict[str, Any], params: list[Tensor], buffers: list[Tensor | None], young: list[bool]
) -> None:
    lr, kept = group["lr"], 1.0 - group["dampening"] if group["momentum"] else 1.0
    for i, p in enumerate(params):
        bound = lr * group["prox"].weight * (1.0 if young[i] else kept)
        taken = p.clamp(-bound, bound)
        p.sub_(taken)
        buffer = buffers[i] if group["momentum"] else None
        if buffer is not None:  # the realised displacement
            buffers[i] = buffer + taken / lr if young[i] else buffer.add_(taken / lr)
