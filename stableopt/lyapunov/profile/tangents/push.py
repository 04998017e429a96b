r"""One parameter's update map :math:`(\theta, u) \mapsto (\theta^+, u^+)` and its exact derivative in k directions at once.

The map is that of :mod:`stableopt.optim` as a pure function: the rule's ``update`` to a point y, then the prox of g in the metric P
of the step, or the projection, then the momentum set to the realised displacement. Update and realignment are differentiated in
forward mode, for all directions in one pass, or by the formulas that this gives (``formulas``), the
prox by what is known of any prox (``proximal``).

*Where there is no derivative*, the result is the element that autograd takes: 0 for the sign of Lion; half of both where two
moments of amsgrad tie; that of :mod:`stableopt.constraints` on the kinks of a prox. Two are chosen here.

* The square root has the derivative 0 at 0. A second moment is 0 where all gradients so far were (or vanish when squared), and
  there the derivative of Adam's direction :math:`m/(\sqrt v+\epsilon)` is :math:`\dot m/\epsilon`: the root moves in first order,
  but it is multiplied by :math:`m = 0`.
* Rounding to bfloat16 has no derivative at all: torch's Muon is differentiated as if its polynomials were not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.func import jvp, vmap
from torch.overrides import TorchFunctionMode

from stableopt.constraints import Constraint, Regularizer
from stableopt.lyapunov.layers.forward import dual_numbers
from stableopt.lyapunov.profile.tangents.formulas import Stage, realigned, written
from stableopt.lyapunov.profile.tangents.proximal import pushed_through
from stableopt.optim.rules.base import Group, State, UpdateRule
from stableopt.optim.rules.unknown import Unknown

__all__ = ["Pushed", "push", "tangent_names"]

_COUNTS = frozenset({"step", "mu_product"})
"""Entries of a state that depend on the number of steps alone; those of a 0-d parameter have its shape."""
_NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "betas", "alpha", "eps")
"""Hyper-parameters with respect to which there is a derivative."""


@dataclass(frozen=True)
class Pushed:
    """Where an update map leads, and where k tangents go.

    Args:
        parameter: after the step.
        state: after the step.
        d_parameter: ``(k, *shape)``.
        d_state: the tangents of those entries of the state that carry some, each ``(k, *shape)``.
    """

    parameter: Tensor
    state: State
    d_parameter: Tensor
    d_state: dict[str, Tensor]


def tangent_names(rule: UpdateRule, state: State, parameter: Tensor) -> tuple[str, ...]:  # noqa: ARG001 - all rules alike so far
    """Return the entries of a state that carry tangents: floating tensors shaped like the parameter, but no counts of steps.

    Args:
        rule: of the optimizer.
        state: of the parameter; an empty one, before the first step, has none.
        parameter: the parameter.

    Examples:
        >>> from stableopt.optim.rules import Adaptive
        >>> w = torch.zeros(2)
        >>> tangent_names(Adaptive(), {"step": torch.ones(()), "exp_avg": w, "exp_avg_sq": w}, w)
        ('exp_avg', 'exp_avg_sq')
    """
    return tuple(
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.shape == parameter.shape
        and (value.is_floating_point() or value.is_complex())
        and name not in _COUNTS
    )


@torch.no_grad()
def push(
    rule: UpdateRule | None,
    group: Group,
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    d_parameter: Tensor,
    d_gradient: Tensor,
    d_state: Mapping[str, Tensor],
    *,
    regularizer: Regularizer | None = None,
    d_hyper: Mapping[str, Tensor] | None = None,
) -> Pushed:
    r"""Do one step of one parameter and push k tangents through it.

    Args:
        rule: of the optimizer.
        group: hyper-parameters.
        parameter: :math:`\theta` before the step, of any shape; with a set it lies inside, where a step begins.
        gradient: of the loss at it.
        state: of the parameter before the step, empty before the first one. Nothing of it is changed.
        d_parameter: ``(k, *shape)``.
        d_gradient: ``(k, *shape)``, what the tangents make of the gradient: :math:`H\dot\theta` and what else it depends on.
        d_state: the tangents of entries of the state, each ``(k, *shape)``; a name that is left out has none.
        regularizer: the penalty or the set of the parameter.
        d_hyper: the tangents of hyper-parameters that are numbers, such as ``lr``, each ``(k,)``, of ``betas`` ``(k, 2)``.

    Returns:
        The parameter and the state after the step, and their tangents.

    Raises:
        ValueError: if nothing is known about the update, something does not fit together, or a prox has no derivative.

    Note:
        A parameter outside of its set is first projected by an optimizer; here it is not.

    Examples:
        >>> from stableopt.optim.rules import HeavyBall
        >>> w, one = torch.tensor([2.0]), torch.ones(1, 1)
        >>> pushed = push(HeavyBall(), {"lr": 0.25, "momentum": 0.5}, w, w, {}, one, one, {})
        >>> pushed.parameter.item(), pushed.d_parameter.item(), pushed.d_state["momentum_buffer"].item()
        (1.5, 0.75, 1.0)
        >>> push(HeavyBall(), {"lr": 0.25}, w, w, {}, 0 * one, 0 * one, {}, d_hyper={"lr": torch.ones(1)}).d_parameter
        tensor([[-2.]])
    """
    d_hyper = d_hyper or {}
    known = _checked(rule, group, parameter, gradient, state, d_parameter, d_gradient, d_state, d_hyper, regularizer)
    if len(d_parameter) == 0:  # vmap wants a row
        rows = [{name: _padded(d) for name, d in named.items()} for named in (d_state, d_hyper)]
        first, second, options = _padded(d_parameter), _padded(d_gradient), {"regularizer": regularizer}
        one = push(rule, group, parameter, gradient, state, first, second, rows[0], d_hyper=rows[1], **options)
        return Pushed(one.parameter, one.state, one.d_parameter[:0], {n: d[:0] for n, d in one.d_state.items()})
    step = _Step(known, group, {name: _plain(value) for name, value in state.items()}, regularizer)
    at: dict[str, Any] = {"parameter": _plain(parameter), "gradient": _plain(gradient)}
    d: dict[str, Any] = {"parameter": d_parameter, "gradient": d_gradient, "state": dict(d_state)}
    hyper, d["hyper"] = _hyper(group, d_hyper, parameter)
    at["state"] = {name: step.state[name] for name in d_state}
    plain, after = step.plain(at)
    d_plain = step.written(plain, after, at, d) if not d_hyper else None
    if d_plain is None:
        d_plain = _tangents(lambda at: step.plain(at)[0], at | {"hyper": hyper}, d)
    if regularizer is None:
        return Pushed(plain["parameter"], after, d_plain["parameter"], d_plain["state"])
    moved, d_moved = step.regularized(plain, d_plain, after)
    if not step.realigns(after):
        return Pushed(moved, after, d_moved, d_plain["state"])
    at = plain | {"parameter": plain["parameter"] - moved}
    d_at = d_plain | {"parameter": d_plain["parameter"] - d_moved, "hyper": d["hyper"]}
    settled = step.realigned(at, after)
    d_settled = step.realignment_written(at, d_at) if not d_hyper else None
    if d_settled is None:
        d_settled = _tangents(lambda at: step.realigned(at, after), at | {"hyper": hyper}, d_at)
    return Pushed(moved, after | settled, d_moved, d_settled)


@dataclass(frozen=True)
class _Step:
    """The parts of one step, as functions of nested dictionaries of tensors, which jvp and vmap take."""

    rule: UpdateRule
    group: Group
    state: State
    regularizer: Regularizer | None

    def plain(self, at: dict[str, Any]) -> tuple[dict[str, Any], State]:
        """Return the step without regularizer, with metric and step size for a prox after it, and the whole state."""
        group = {**self.group, **at.get("hyper", {})}
        moved, after = self.rule.update(at["parameter"], at["gradient"], self.state | at["state"], group)
        names = tangent_names(self.rule, after, moved)
        result: dict[str, Any] = {"parameter": moved, "state": {name: after[name] for name in names}}
        if self.regularizer is not None:
            size = self.rule.effective_lr(group, first=self.rule.buffer(self.state) is None)
            metric = self._metric(after, group)
            result |= {"size": torch.as_tensor(size, dtype=torch.float64)}
            result |= {"metric": _spread(metric)} if isinstance(metric, Tensor) else {}
        return result, after

    def written(
        self, plain: dict[str, Any], after: State, at: dict[str, Any], d: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the tangents of :meth:`plain` by formula, None if there is none."""
        stage = Stage(self.rule, self.group, at["parameter"], at["gradient"], self.state, after, "metric" in plain)
        known = written(stage, d["parameter"], d["gradient"], d["state"])
        if known is None:
            return None
        parameter, rows = known
        rows = d["state"] | rows  # what a step leaves alone keeps its tangents
        held = {name: rows[name] if name in rows else torch.zeros_like(parameter) for name in plain["state"]}
        result = {"parameter": parameter, "state": held, "size": torch.zeros(len(parameter), dtype=torch.float64)}
        return result | ({"metric": rows["metric"]} if "metric" in plain else {})

    def realignment_written(self, at: dict[str, Any], d: dict[str, Any]) -> dict[str, Tensor] | None:
        """Return the tangents of :meth:`realigned` by formula, None if there is none."""
        rows = (at["parameter"], d["parameter"], at.get("metric"), d.get("metric"))
        known = realigned(self.rule, self.group, *rows)
        if known is None:
            return None
        name, added = known
        return d["state"] | {name: d["state"][name] + added}

    def _metric(self, after: State, group: Group) -> Tensor | float:
        """Return the metric of the step where it has a part, as :func:`stableopt.optim.regularize.regularize` does."""
        g = self.regularizer
        needed = self.rule.momentum(group) or not isinstance(g, Constraint) or g.diagonal
        return self.rule.metric(after, group) if needed else 0.0

    def regularized(self, plain: dict[str, Any], d_plain: dict[str, Any], after: State) -> tuple[Tensor, Tensor]:
        """Return the proximal point, or the projection, and its tangents."""
        metric = plain["metric"] if "metric" in plain else self._metric(after, self.group)
        size, d_size, d_metric = float(plain["size"]), d_plain["size"], d_plain.get("metric")
        g: Any = self.regularizer
        return pushed_through(g, plain["parameter"], d_plain["parameter"], size, d_size, metric, d_metric)

    def realigns(self, after: State) -> bool:
        """Return whether the momentum is set to the realised displacement."""
        return bool(self.rule.momentum(self.group)) and self.rule.buffer(after) is not None

    def realigned(self, at: dict[str, Any], after: State) -> State:
        """Return the entries of the state with the momentum that stands for the realised displacement."""
        group = {**self.group, **at.get("hyper", {})}
        held = after | {name: value.clone() for name, value in at["state"].items()}
        metric = at["metric"] if "metric" in at else self._metric(after, self.group)
        self.rule.realign(at["parameter"], held, metric, group)
        return {name: held[name] for name in at["state"]}


def _tangents(function: Callable[[Any], Any], point: dict[str, Any], tangents: dict[str, Any]) -> Any:
    """Return the derivative of a function at a point along each row of the tangents."""
    tangents = {name: tangents[name] for name in point}
    with dual_numbers():  # loads what the first dual number needs
        pass
    with _Differentiable(refuse_floats=bool(point["hyper"])):
        return vmap(lambda direction: jvp(function, (point,), (direction,))[1])(tangents)


class _Differentiable(TorchFunctionMode):
    """Choose derivatives where torch has none: 0 for the square root at 0, and no rounding to bfloat16.

    Args:
        refuse_floats: whether to refuse that a number with a tangent is read as a float, which loses the tangent.
    """

    def __init__(self, *, refuse_floats: bool) -> None:
        super().__init__()
        self._refuse_floats = refuse_floats

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ROOTS and not kwargs:
            x: Tensor = args[0]
            flat = x == 0
            return torch.where(flat, torch.zeros_like(x), torch.where(flat, torch.ones_like(x), x).sqrt())
        if func is torch.Tensor.bfloat16:
            return args[0]
        if func in _READS and self._refuse_floats and unpack_dual(args[0]).tangent is not None:
            raise ValueError(
                "push has no derivative with respect to a hyper-parameter that the rule reads as a float; leave it out of "
                "d_hyper, or let the rule read it with stableopt.optim.rules.base.number."
            )
        return func(*args, **kwargs)


_ROOTS = (torch.sqrt, torch.Tensor.sqrt)
_READS = (torch.Tensor.item, torch.Tensor.__float__)


def _hyper(group: Group, d_hyper: Mapping[str, Tensor], parameter: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return hyper-parameters as tensors, and their tangents to go with them."""
    dtype = parameter.dtype.to_real() if parameter.ndim == 0 else torch.float64  # 0-d tensors leave the dtype of others

    def tensor(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=parameter.device).reshape(())

    values: dict[str, Any] = {}
    tangents: dict[str, Any] = {}
    for name, d in d_hyper.items():
        several, rows = isinstance(group[name], tuple | list), d.to(parameter.device, dtype)
        values[name] = tuple(map(tensor, group[name])) if several else tensor(group[name])
        tangents[name] = tuple(rows.unbind(1)) if several else rows
    return values, tangents


def _plain(value: Any) -> Any:
    """Return a tensor without graph, dense, and with memory of its own for every entry."""
    if not isinstance(value, Tensor):
        return value
    return _spread(value.detach().to_dense() if value.is_sparse else value.detach())


def _spread(x: Tensor) -> Tensor:
    """Return an expanded tensor as a plain one, as dual numbers want it."""
    return x.contiguous() if any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)) else x


def _padded(rows: Tensor) -> Tensor:
    return rows.new_zeros(1, *rows.shape[1:])


def _checked(
    rule: UpdateRule | None,
    group: Group,
    parameter: Tensor,
    gradient: Tensor,
    state: State,
    d_parameter: Tensor,
    d_gradient: Tensor,
    d_state: Mapping[str, Tensor],
    d_hyper: Mapping[str, Tensor],
    regularizer: Regularizer | None,
) -> UpdateRule:
    """Refuse what cannot be pushed; return the rule."""
    if rule is None or isinstance(rule, Unknown):
        raise ValueError(
            f"push needs the rule of an optimizer, got {rule!r}, of which no update is known; register one with "
            "stableopt.optim.rule_for.register."
        )
    refusal = None if regularizer is None else rule.takes(group, regularizer)
    if refusal:
        raise ValueError(refusal)
    k, shape = len(d_parameter), parameter.shape
    rows = {"d_parameter": d_parameter, "d_gradient": d_gradient} | {f"d_state[{n!r}]": d for n, d in d_state.items()}
    for name, d in rows.items():
        if d.shape != (k, *shape) or d.dtype != parameter.dtype:
            raise ValueError(
                f"push needs {name} of shape {(k, *shape)} and dtype {parameter.dtype}, got {tuple(d.shape)} and {d.dtype}."
            )
    if gradient.shape != shape:
        raise ValueError(
            f"push needs a gradient of the shape of its parameter, {tuple(shape)}, got {tuple(gradient.shape)}."
        )
    names = tangent_names(rule, state, parameter)
    for name in d_state:
        if name not in names:
            raise ValueError(
                f"push needs d_state for entries of the state that carry tangents, which are {names}, got {name!r}; "
                "before the first step there are none."
            )
    for name, d in d_hyper.items():
        value = group.get(name)
        if name not in _NUMBERS or value is None or (name == "betas" and "momentum_decay" in group):
            raise ValueError(f"push needs hyper-parameters of {_NUMBERS} that the update has in d_hyper, got {name!r}.")
        wanted = (k, len(value)) if isinstance(value, tuple | list) else (k,)
        if d.shape != wanted:
            raise ValueError(f"push needs d_hyper[{name!r}] of shape {wanted}, got {tuple(d.shape)}.")
    return rule
