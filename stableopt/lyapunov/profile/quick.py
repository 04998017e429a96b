r"""The tangents of the most common steps by their formulas, in a few passes over the memory.

SGD, with :math:`g = \pm\nabla f + \omega\theta`:

.. math:: \dot b^+ = \beta\dot b + (1-\delta)\dot g, \qquad \dot\theta^+ = \dot\theta - \eta\,\dot b^+
          \quad (-\eta(\dot g + \beta\dot b^+) \text{ with Nesterov's momentum}).

Adam and AdamW, with :math:`P = c_1(\sqrt{v^+/c_2} + \epsilon)`, :math:`c_i = 1 - \beta_i^t`:

.. math:: \dot m^+ = \beta_1\dot m + (1-\beta_1)\dot g, \quad \dot v^+ = \beta_2\dot v + 2(1-\beta_2)\,g\,\dot g, \quad
          \dot\theta^+ = (1-\eta\omega)\dot\theta
          - \frac{\eta}{P}\Bigl(\dot m^+ - \frac{m^+}{P}\,\frac{c_1\,\dot v^+}{2\sqrt{c_2 v^+}}\Bigr),

the last term zero where :math:`v^+ = 0`, which is its limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor

from stableopt.lyapunov.profile.push import Pushed
from stableopt.optim import Adaptive, HeavyBall, UpdateRule
from stableopt.optim.rules.adaptive import count_of
from stableopt.optim.rules.base import Group, State, number

__all__ = ["push_quickly"]

Tangents = Mapping[str, Tensor]


@singledispatch
def push_quickly(
    rule: UpdateRule,  # noqa: ARG001 - dispatched on
    group: Group,  # noqa: ARG001
    parameter: Tensor,  # noqa: ARG001
    gradient: Tensor,  # noqa: ARG001
    state: State,  # noqa: ARG001
    d_parameter: Tensor,  # noqa: ARG001
    d_gradient: Tensor,  # noqa: ARG001
    d_state: Tangents,  # noqa: ARG001
) -> Pushed | None:
    """Do what :func:`stableopt.lyapunov.profile.push.push` does, for a step without regularizer and a rule with formulas.

    Args:
        rule: of the optimizer.
        group: hyper-parameters.
        parameter: before the step.
        gradient: dense, of the loss at it.
        state: of the parameter before the step.
        d_parameter: ``(k, *shape)``.
        d_gradient: ``(k, *shape)``.
        d_state: the tangents of entries of the state; a name that is left out has none.

    Returns:
        The same as :func:`push`; None where there are no formulas.

    Examples:
        >>> w, one = torch.tensor([2.0]), torch.ones(1, 1)
        >>> pushed = push_quickly(HeavyBall(), {"lr": 0.25, "momentum": 0.5}, w, w, {}, one, one, {})
        >>> pushed.parameter.item(), pushed.d_parameter.item()
        (1.5, 0.75)
    """
    return None


@push_quickly.register
def _(
    rule: HeavyBall, group: Group, parameter: Tensor, gradient: Tensor, state: State,
    d_parameter: Tensor, d_gradient: Tensor, d_state: Tangents,
) -> Pushed | None:  # fmt: skip
    lr, beta, omega = number(group["lr"]), rule.momentum(group), number(group.get("weight_decay", 0.0))
    g, dg = _driven(parameter, gradient, d_parameter, d_gradient, group, omega)
    if beta == 0.0:
        moved = torch.sub(parameter, g, alpha=lr)
        return Pushed(moved, dict(state), torch.sub(d_parameter, dg, alpha=lr), {})
    old, d_old = state.get("momentum_buffer"), d_state.get("momentum_buffer")
    let_in = 1.0 if old is None else 1.0 - float(group.get("dampening", 0.0))
    b = g if old is None else torch.add(old * beta, g, alpha=let_in)
    db = dg * let_in if d_old is None else torch.add(d_old * beta, dg, alpha=let_in)
    step, d_step = (torch.add(g, b, alpha=beta), torch.add(dg, db, alpha=beta)) if group.get("nesterov") else (b, db)
    moved, d_moved = torch.sub(parameter, step, alpha=lr), torch.sub(d_parameter, d_step, alpha=lr)
    return Pushed(moved, state | {"momentum_buffer": b}, d_moved, {"momentum_buffer": db})


@push_quickly.register
def _(
    rule: Adaptive, group: Group, parameter: Tensor, gradient: Tensor, state: State,
    d_parameter: Tensor, d_gradient: Tensor, d_state: Tangents,
) -> Pushed | None:  # fmt: skip
    t = count_of(state["step"]) if state else 0.0
    if parameter.is_complex() or group.get("amsgrad") or isinstance(t, Tensor):
        return None
    lr, omega, eps, (beta1, beta2) = number(group["lr"]), number(group.get("weight_decay", 0.0)), group["eps"], group["betas"]
    kept = 1.0
    if group.get("decoupled_weight_decay", False):
        kept, omega = 1.0 - lr * omega, 0.0
    g, dg = _driven(parameter, gradient, d_parameter, d_gradient, group, omega)
    new: State = dict(state)
    new["step"] = (state["step"] if state else torch.zeros(())) + 1
    m = g * (1 - beta1) if not state else state["exp_avg"].lerp(g, 1 - beta1)
    v = (g * g).mul_(1 - beta2) if not state else torch.addcmul(state["exp_avg_sq"] * beta2, g, g, value=1 - beta2)
    dm = _faded(d_state.get("exp_avg"), beta1, dg, 1 - beta1)
    dv = _faded(d_state.get("exp_avg_sq"), beta2, g * dg, 2 * (1 - beta2))
    c1, c2 = 1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1)
    root = (v / c2).sqrt_()
    P = (root + eps).mul_(c1)
    bend = m / (P * root).mul_(2 * c2 / c1)  # times dv: m/P times the derivative of P along dv
    bend = torch.where(root > 0, bend, torch.zeros_like(bend))
    d_moved = torch.sub(d_parameter * kept, (dm - bend * dv).div_(P), alpha=lr)
    moved = torch.addcdiv(parameter * kept, m, P, value=-lr)
    new |= {"exp_avg": m, "exp_avg_sq": v}
    return Pushed(moved, new, d_moved, {"exp_avg": dm, "exp_avg_sq": dv})


def _driven(
    parameter: Tensor, gradient: Tensor, d_parameter: Tensor, d_gradient: Tensor, group: Group, omega: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient of loss and coupled decay, with its tangents."""
    g, dg = (-gradient, -d_gradient) if group.get("maximize") else (gradient, d_gradient)
    if not omega:
        return g, dg
    return torch.add(g, parameter, alpha=omega), torch.add(dg, d_parameter, alpha=omega)


def _faded(old: Tensor | None, kept: float, new: Tensor, let_in: float) -> Tensor:
    return new * let_in if old is None else torch.add(old * kept, new, alpha=let_in)
