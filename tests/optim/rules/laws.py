"""The catalogue of rules, and what the tests of all of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.constraints import L1, Box
from stableopt.optim.lion_step import PlainLion
from stableopt.optim.rules import UpdateRule

PENALTIES = {"none": None, "L1": L1(0.3), "box": Box(-0.5, 0.5)}

SGDS: list[dict[str, Any]] = [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.7, "weight_decay": 0.1}, {"momentum": 0.9, "maximize": True}, {"weight_decay": 0.2},
    {"momentum": 0.5, "dampening": 1.5},
]  # fmt: skip
ADAMS: list[dict[str, Any]] = [
    {}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}, {"eps": 0.1},
    {"amsgrad": True, "weight_decay": 0.3}, {"betas": (0.0, 0.5)},
]  # fmt: skip
RADAMS: list[dict[str, Any]] = [
    {}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"maximize": True}, {"eps": 0.1}, {"betas": (0.0, 0.5)},
    {"weight_decay": 0.3, "decoupled_weight_decay": True}, {"betas": (0.9, 0.6)},
]  # fmt: skip
NADAMS: list[dict[str, Any]] = [*RADAMS, {"momentum_decay": 0.0}, {"momentum_decay": 3.0, "weight_decay": 0.2}]
RMSPROPS: list[dict[str, Any]] = [
    {}, {"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.5, "weight_decay": 0.2}, {"alpha": 0.5},
    {"maximize": True, "momentum": 0.3}, {"eps": 0.1}, {"weight_decay": 0.1},
]  # fmt: skip
LIONS: list[dict[str, Any]] = [
    {}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"maximize": True}, {"betas": (0.95, 0.98), "weight_decay": 1.0},
]  # fmt: skip
MUONS: list[dict[str, Any]] = [
    {}, {"nesterov": False}, {"weight_decay": 0.5}, {"momentum": 0.0}, {"ns_steps": 3}, {"adjust_lr_fn": "match_rms_adamw"},
]  # fmt: skip
CATALOGUE: list[tuple[type[Optimizer], dict[str, Any]]] = [
    *((torch.optim.SGD, o) for o in SGDS),
    *((cls, o) for cls in (torch.optim.Adam, torch.optim.AdamW) for o in ADAMS),
    *((torch.optim.RAdam, o) for o in RADAMS),
    *((torch.optim.NAdam, o) for o in NADAMS),
    *((torch.optim.RMSprop, o) for o in RMSPROPS),
    *((PlainLion, o) for o in LIONS),
    *((torch.optim.Muon, o) for o in MUONS),
]


def group_of(cls: type[Optimizer], **options: Any) -> dict[str, Any]:
    """The hyper-parameters of an optimizer with everything filled in."""
    return cls([nn.Parameter(torch.ones(1, 1))], **options).param_groups[0]


def symmetric(n: int) -> Tensor:
    """A random matrix with eigenvalues in [-1.5, 1.5]."""
    Q = torch.linalg.qr(torch.randn(n, n))[0]
    return Q @ torch.diag(torch.rand(n) * 3 - 1.5) @ Q.T


def smoothness_in(H: Tensor, metric: Tensor | float) -> float:
    """The largest modulus of an eigenvalue of P^-1/2 H P^-1/2."""
    P = torch.as_tensor(metric).expand(len(H))
    return float(torch.linalg.eigvalsh(H / P.sqrt() / P.sqrt()[:, None]).abs().max())


def one_step(
    rule: UpdateRule, group: dict[str, Any], H: Tensor, w: Tensor, state: dict[str, Any], prox: Any = None
) -> tuple[float, float, float]:
    """Energy before and after a step on w'Hw/2, and |d|_P^2 / eta', with P fixed to that of the step."""
    new, after = rule.update(w, H @ w, state, group)
    metric, first = rule.metric(after, group), rule.buffer(state) is None
    eta = rule.effective_lr(group, first=first)
    after = {k: v.clone() for k, v in after.items()}
    penalty = [0.0, 0.0]
    if prox is not None:
        reached = new
        new = prox.prox(reached, eta / metric)
        rule.realign(reached - new, after, metric, group)
        penalty = [float(prox.value(w)), float(prox.value(new))]
    before = 0.5 * w @ H @ w + rule.energy(w, rule.buffer(state), metric, group, first=first) + penalty[0]
    later = 0.5 * new @ H @ new + rule.energy(new, rule.buffer(after), metric, group, first=first) + penalty[1]
    d = new - w
    return float(before), float(later), float((d * metric * d).sum()) / eta


def growth_at(
    cls: type[Optimizer], options: dict[str, Any], rule: UpdateRule, frozen: dict[str, Any], factor: float
) -> float:
    """Run the real optimizer on f = h w^2/2, with h at a multiple of the limit, its metric and its clock frozen.

    The second moment hardly moves if its beta is near 1. The size of w is kept near 1 by rescaling w and the momentum, which a
    linear map does not notice; the result is the mean log-growth of a step.
    """
    w = nn.Parameter(torch.ones(1))
    optimizer = cls([w], **options)
    group, buffer = optimizer.param_groups[0], {"m": torch.zeros(1)}
    name = "exp_avg" if "betas" in group else "momentum_buffer"
    coupled = 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]
    curvature = factor * rule.limit(group) * rule.metric(frozen, group) - coupled
    total, size, steps = 0.0, 1.0, 400
    for step in range(steps):
        at = {k: v.clone() for k, v in frozen.items()}
        at["step"] = at["step"] - 1.0  # torch counts before it uses the number
        if "mu_product" in at:
            at["mu_product"] = at["mu_product"] / _mu(at["step"] + 1, group)
        optimizer.state[w].update(at | {name: buffer["m"]})
        w.grad = curvature * w.detach()
        optimizer.step()
        buffer["m"] = optimizer.state[w][name]
        size = float((w.detach().abs() + buffer["m"].abs()).sum())
        with torch.no_grad():
            w.div_(size)
            buffer["m"].div_(size)
        if step >= steps // 3:
            total += float(torch.tensor(size).log())
    return total / (steps - steps // 3)


def _mu(t: Tensor, group: dict[str, Any]) -> Tensor:
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
