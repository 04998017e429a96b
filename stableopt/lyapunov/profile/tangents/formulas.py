r"""The derivatives of the update maps of SGD, RMSprop, Lion and Adam's family, written out.

They are what forward mode gives for the rules of :mod:`stableopt.optim.rules`, in about a fourth of its time, and in far less
for small parameters. With g the gradient with its sign and its coupled decay, a dot for tangents and :math:`R = \sqrt w+\epsilon`:

* *SGD*: :math:`\dot b^+ = \beta\dot b+(1-\delta)\dot g`, :math:`\dot\theta^+ = \dot\theta-\eta\dot b^+`
  (Nesterov: :math:`\dot g+\beta\dot b^+`).
* *Adam's family*: the direction is :math:`n/R`, :math:`n = \nu_m m^++\nu_g g`, so that
  :math:`\dot\theta^+ = (1-\eta\omega)\dot\theta-\eta(\dot n/R-nR^{-2}\dot R)`, with
  :math:`\dot m^+ = \beta_1\dot m+(1-\beta_1)\dot g` and :math:`\dot v^+ = \beta_2\dot v+2(1-\beta_2)g\dot g`.
* *RMSprop*: the same with :math:`n = g`, and :math:`\dot b^+ = \beta\dot b+(g/R)^\cdot`.
* *Lion*: :math:`\dot\theta^+ = (1-\eta\omega)\dot\theta`, :math:`\dot m^+ = \beta_2\dot m+(1-\beta_2)\dot g`.

:math:`\dot R = \dot w/(2\sqrt w)`, and 0 where w = 0 (see :mod:`stableopt.lyapunov.profile.tangents.push`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from stableopt.optim.rules import Adaptive, AdaptiveNesterov, HeavyBall, Rectified, RootMeanSquare, SignDescent
from stableopt.optim.rules.adaptive import count_of
from stableopt.optim.rules.base import Group, State, UpdateRule, number, real_view, unviewed
from stableopt.optim.rules.nadam import _weights
from stableopt.optim.rules.radam import _rectification

__all__ = ["Stage", "has_formula", "realigned", "written"]

Rows: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One step of one parameter, whose tangents are asked for.

    Args:
        rule: of the optimizer.
        group: hyper-parameters, none of which has a tangent.
        parameter: before the step.
        gradient: of the loss at it.
        state: before the step.
        after: the state after the step.
        weighs: whether the tangents of the metric are asked for as well.
    """

    rule: UpdateRule
    group: Group
    parameter: Tensor
    gradient: Tensor
    state: State
    after: State
    weighs: bool = False

    def entry(self, name: str) -> Tensor:
        """Return an entry of the state after the step, as a real tensor."""
        return real_view(self.after[name])

    def __getitem__(self, name: str) -> float:
        """Return a hyper-parameter as a float, 0 where there is none."""
        return number(self.group.get(name, 0.0))

    @property
    def sign(self) -> float:
        """-1 where the loss is maximized, else 1."""
        return -1.0 if self.group.get("maximize") else 1.0


def written(
    stage: Stage, d_parameter: Tensor, d_gradient: Tensor, d_state: Mapping[str, Tensor]
) -> tuple[Tensor, Rows] | None:
    """Push tangents through the step by formula.

    Args:
        stage: the step.
        d_parameter: ``(k, *shape)``.
        d_gradient: ``(k, *shape)``.
        d_state: those of the entries of the state, each ``(k, *shape)``; none is zero.

    Returns:
        The tangents of the parameter, and those of the entries of the state that the step sets, with a learned metric as
        ``metric`` among them if it is asked for; None if there is no formula.

    Examples:
        >>> w, rows = torch.ones(2), torch.ones(1, 2)
        >>> stage = Stage(HeavyBall(), {"lr": 0.5, "momentum": 0.5}, w, w, {}, {"momentum_buffer": w})
        >>> written(stage, rows, rows, {})
        (tensor([[0.5000, 0.5000]]), {'momentum_buffer': tensor([[1., 1.]])})
    """
    make = _FORMULAS.get(type(stage.rule))
    if make is None or isinstance(count_of(stage.after.get("step", 0.0)), Tensor):
        return None
    given = {name: real_view(d) for name, d in d_state.items()}
    rows = make(stage)(real_view(d_parameter), real_view(d_gradient), given)
    rows = {name: d if name == "metric" else unviewed(d, stage.parameter) for name, d in rows.items()}
    return rows.pop("parameter"), rows


def has_formula(rule: UpdateRule) -> bool:
    """Say whether the derivative of a rule is written out here; such a rule acts on every entry of a parameter alone.

    Args:
        rule: of an optimizer.

    Examples:
        >>> from stableopt.optim.rules import SpectralDescent
        >>> has_formula(HeavyBall()), has_formula(SpectralDescent())
        (True, False)
    """
    return type(rule) in _FORMULAS


def realigned(
    rule: UpdateRule,
    group: Group,
    correction: Tensor,
    d_correction: Tensor,
    metric: Tensor | None,
    d_metric: Tensor | None,
) -> tuple[str, Tensor] | None:
    r"""Return what the realignment of the momentum adds to its tangents, by formula.

    Args:
        rule: of the optimizer.
        group: hyper-parameters, none of which has a tangent.
        correction: what the prox took off.
        d_correction: its tangents, ``(k, *shape)``.
        metric: P of the step, where it is learned.
        d_metric: its tangents.

    Returns:
        The name of the momentum and :math:`(\dot P c+P\dot c)/\eta`, None if there is no formula.

    Examples:
        >>> realigned(HeavyBall(), {"lr": 0.5}, torch.ones(2), torch.ones(1, 2), None, None)
        ('momentum_buffer', tensor([[2., 2.]]))
    """
    name = _MOMENTA.get(type(rule))
    if name is None:
        return None
    lr = number(group["lr"])
    if name == "exp_avg" and metric is not None and d_metric is not None:
        d_correction = (d_metric * correction).addcmul_(metric, d_correction)
    return name, d_correction / lr if lr > 0 else torch.zeros_like(d_correction)


_Push: TypeAlias = Callable[[Tensor, Tensor, Rows], Rows]


def _heavy_ball(stage: Stage) -> _Push:
    lr, beta, delta, omega = stage["lr"], stage["momentum"], stage["dampening"], stage["weight_decay"]
    first, nesterov, sign = stage.state.get("momentum_buffer") is None, stage.group.get("nesterov"), stage.sign

    def push(d: Tensor, dg: Tensor, d_state: Rows) -> Rows:
        if beta == 0:
            return {"parameter": torch.add(d * (1 - lr * omega), dg, alpha=-sign * lr)}
        dg = _gradient(d, dg, sign, omega)
        db = dg.clone() if first else dg * (1 - delta)
        if not first and "momentum_buffer" in d_state:
            db.add_(d_state["momentum_buffer"], alpha=beta)
        moved = d.sub(dg, alpha=lr).sub_(db, alpha=lr * beta) if nesterov else d.sub(db, alpha=lr)
        return {"parameter": moved, "momentum_buffer": db}

    return push


def _moments(stage: Stage) -> _Push:
    lr, omega, (b1, b2), sign = stage["lr"], stage["weight_decay"], stage.group["betas"], stage.sign
    decoupled = bool(stage.group.get("decoupled_weight_decay"))
    coupled, kept = (0.0, 1 - lr * omega) if decoupled else (omega, 1.0)
    g = _gradient(real_view(stage.parameter), real_view(stage.gradient), sign, coupled)
    of_mean, of_gradient, R, slope, scale = _direction(stage)
    per_mean, per_gradient = -lr * of_mean / R, -lr * of_gradient / R if of_gradient else None
    of_direction = stage.entry("exp_avg") * per_mean  # -lr n / R
    if per_gradient is not None:
        of_direction.addcmul_(g, per_gradient)
    per_square, twice = of_direction.div_(R).mul_(slope).neg_(), g * (2 * (1 - b2))
    largest = _largest(stage) if stage.group.get("amsgrad") and isinstance(stage.rule, Adaptive) else None

    def push(d: Tensor, dg: Tensor, d_state: Rows) -> Rows:
        dg = _gradient(d, dg, sign, coupled)
        dm, dv = dg * (1 - b1), dg * twice
        if "exp_avg" in d_state:
            dm.add_(d_state["exp_avg"], alpha=b1)
        if "exp_avg_sq" in d_state:
            dv.add_(d_state["exp_avg_sq"], alpha=b2)
        rows, dw = {"exp_avg": dm, "exp_avg_sq": dv}, dv
        if largest is not None:
            dw = rows["max_exp_avg_sq"] = dv * largest
            if "max_exp_avg_sq" in d_state:
                dw.addcmul_(d_state["max_exp_avg_sq"], 1 - largest)
        moved = torch.addcmul(d * kept if kept != 1.0 else d, per_mean, dm).addcmul_(per_square, dw)
        if per_gradient is not None:
            moved.addcmul_(per_gradient, dg)
        return rows | {"parameter": moved} | ({"metric": scale * slope * dw} if stage.weighs else {})

    return push


def _direction(stage: Stage) -> tuple[float, float, Tensor, Tensor, float]:
    r"""Return :math:`\nu_m`, :math:`\nu_g`, R, the derivative of R, and the metric over R."""
    (b1, b2), eps, t = stage.group["betas"], stage.group["eps"], float(count_of(stage.after["step"]))
    v = stage.entry(
        "max_exp_avg_sq" if isinstance(stage.rule, Adaptive) and stage.group.get("amsgrad") else "exp_avg_sq"
    )
    bias, corrected = 1 - b1**t, 1 - b2**t
    if isinstance(stage.rule, Rectified):
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * b2**t / corrected
        if length <= 5.0:
            return 1 / bias, 0.0, torch.ones_like(v), torch.zeros_like(v), bias
        weight = math.sqrt(_rectification(length, longest) * corrected) / bias
        root = v.sqrt()
        return weight, 0.0, root + eps, _slope(root, 1.0), 1 / weight
    root = (v / corrected).sqrt_()
    R, slope = root + eps, _slope(root, 1 / corrected)
    if isinstance(stage.rule, AdaptiveNesterov):
        a, b = _weights(stage.after, stage.group)
        return b, a, R, slope, 1.0
    return 1 / bias, 0.0, R, slope, bias


def _largest(stage: Stage) -> Tensor:
    """Return the derivative of the larger of two moments with respect to the new one: half where they tie."""
    new, old = stage.entry("exp_avg_sq"), stage.state.get("max_exp_avg_sq")
    old = torch.zeros_like(new) if old is None else real_view(old)
    return torch.where(new == old, 0.5, (new > old).to(new.dtype))


def _slope(root: Tensor, factor: float) -> Tensor:
    """Return the derivative of a root by what is under it times a factor, 0 at 0; overwrites nothing."""
    return (0.5 * factor / root).masked_fill_(root == 0, 0.0)


def _gradient(d: Tensor, dg: Tensor, sign: float, omega: float) -> Tensor:
    """Return the gradient with its sign and its coupled decay; its tangents in the same way."""
    dg = dg if sign == 1.0 else -dg
    return dg.add(d, alpha=omega) if omega else dg


def _root_mean_square(stage: Stage) -> _Push:
    lr, alpha, beta, omega, sign = stage["lr"], stage["alpha"], stage["momentum"], stage["weight_decay"], stage.sign
    g = sign * real_view(stage.gradient) + omega * real_view(stage.parameter)
    v, mean = stage.entry("square_avg"), stage.entry("grad_avg") if stage.group.get("centered") else None
    w = v if mean is None else v.addcmul(mean, mean, value=-1.0)
    root = w.sqrt()
    R, slope, twice = root + stage["eps"], _slope(root, 1.0), 2 * (1 - alpha) * g
    per_gradient, per_square = 1 / R, -(g / R / R) * slope

    def push(d: Tensor, dg: Tensor, d_state: Rows) -> Rows:
        dg = _gradient(d, dg, sign, omega)
        dv = dg * twice
        if "square_avg" in d_state:
            dv.add_(d_state["square_avg"], alpha=alpha)
        rows, dw = {"square_avg": dv}, dv
        if mean is not None:
            d_mean = rows["grad_avg"] = dg * (1 - alpha)
            if "grad_avg" in d_state:
                d_mean.add_(d_state["grad_avg"], alpha=alpha)
            dw = dv.addcmul(mean, d_mean, value=-2.0)
        moved = (dg * per_gradient).addcmul_(per_square, dw)
        if beta > 0:
            rows["momentum_buffer"] = moved
            if "momentum_buffer" in d_state:
                moved.add_(d_state["momentum_buffer"], alpha=beta)
        return rows | {"parameter": d.sub(moved, alpha=lr)} | ({"metric": slope * dw} if stage.weighs else {})

    return push


def _sign_descent(stage: Stage) -> _Push:
    kept, beta, sign = 1 - stage["lr"] * stage["weight_decay"], stage.group["betas"][1], stage.sign

    def push(d: Tensor, dg: Tensor, d_state: Rows) -> Rows:
        dm = dg * (sign * (1 - beta))
        if "exp_avg" in d_state:
            dm.add_(d_state["exp_avg"], alpha=beta)
        return {"parameter": d * kept, "exp_avg": dm}

    return push


_FORMULAS: dict[type[UpdateRule], Callable[[Stage], _Push]] = {
    HeavyBall: _heavy_ball,
    Adaptive: _moments,
    AdaptiveNesterov: _moments,
    Rectified: _moments,
    RootMeanSquare: _root_mean_square,
    SignDescent: _sign_descent,
}

_MOMENTA: dict[type[UpdateRule], str] = {
    HeavyBall: "momentum_buffer",
    RootMeanSquare: "momentum_buffer",
    Adaptive: "exp_avg",
    Rectified: "exp_avg",
}
