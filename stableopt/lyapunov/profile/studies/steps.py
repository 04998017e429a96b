r"""Steps to zero, as one call: residual blocks to a flow in depth, training steps to a flow in time (THEORY T7).

With the time :math:`T = \tau L` fixed, L blocks :math:`h^+ = h + \tau f(h)` tend to :math:`\dot h = f(h)`, at order 1 in
:math:`\tau`, and what is measured of them to what the flow has: the end :math:`h_L`, and the rate
:math:`\frac1T\log\|D_{h_0}h_L\|_2`, at most the mean of the logarithmic norm of Df. With :math:`T = \eta n` fixed, n steps of
gradient descent tend to :math:`\dot\theta = -\nabla f(\theta)`, whose logarithmic norm is :math:`-\lambda_{\min}` of the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.profile.plain import plain
from stableopt.lyapunov.profile.studies.descent import DENSE, Descent, column_of
from stableopt.lyapunov.profile.studies.flow import Flow, FlowEnd, follow, jacobian
from stableopt.lyapunov.profile.studies.limit import LimitStudy, limit_study

__all__ = ["StepStudy", "depth_study", "lr_study"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class StepStudy:
    r"""What becomes of a system in steps as the step goes to zero in a fixed time.

    Args:
        time: T.
        counts: how many steps each measurement took.
        state: the study of the end of the state.
        rate: the study of :math:`\frac1T\log\|\Phi(T,0)\|_2`, per unit of time; of one direction
            :math:`\frac1T\log(\|\Phi v\|/\|v\|)`.
        log_norm: the mean of the logarithmic norm of the limit along its way, which no rate of the limit exceeds; NaN if unknown.
        log_norm_error: how far that can be off.
        largest_log_norm: the largest one that was met.
        reason: one sentence on why there is no logarithmic norm, else empty.

    Examples:
        >>> h = torch.ones(1, dtype=torch.float64)
        >>> study = depth_study(lambda step, blocks: lambda h: h * (1 - step) ** blocks, h, flow=lambda t, h: -h)
        >>> round(study.rate.order, 1), round(study.rate.limit, 3), study.holds
        (1.0, -1.0, True)
    """

    time: float
    counts: tuple[int, ...]
    state: LimitStudy
    rate: LimitStudy
    log_norm: float = math.nan
    log_norm_error: float = 0.0
    largest_log_norm: float = math.nan
    reason: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the rate is at most the logarithmic norm, within the errors of both; None if that cannot be said."""
        if math.isnan(self.log_norm) or self.rate.verdict == "inconclusive":
            return None
        return bool(float(self.rate.limit) <= self.log_norm + self.log_norm_error + self.rate.limit_error)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what is not known is None."""
        return plain(
            {
                "time": self.time,
                "counts": list(self.counts),
                "state": self.state.as_dict(),
                "rate": self.rate.as_dict(),
                "log_norm": self.log_norm,
                "log_norm_error": self.log_norm_error,
                "largest_log_norm": None if math.isnan(self.log_norm) else self.largest_log_norm,
                "holds": self.holds,
                "reason": self.reason,
            }
        )

    def __str__(self) -> str:
        lines = [str(self.state), str(self.rate)]
        if self.reason:
            lines.append(f"no logarithmic norm: {self.reason}")
        else:
            verdict = {True: "holds", False: "does not hold", None: "cannot be said"}[self.holds]
            lines.append(f"the rate is at most the mean logarithmic norm {self.log_norm:.6g}: {verdict}")
        return "\n".join(lines)


def depth_study(
    make_stack: Callable[[float, int], Callable[[Tensor], Tensor]],
    inputs: Tensor,
    *,
    time: float = 1.0,
    counts: Sequence[int] = (8, 16, 32, 64, 128),
    flow: Flow | None = None,
    direction: Tensor | None = None,
) -> StepStudy:
    r"""Make a residual net deeper and deeper at a fixed :math:`\tau L`, and see what it tends to, and how fast.

    Args:
        make_stack: ``(step, blocks)`` -> the net, from representations to representations of the same shape; weights that depend on
            depth must be a function of the time ``step * l``, not drawn anew, else there is no limit.
        inputs: :math:`h_0`; all its numbers together are the state, so samples in it are one state of many.
        time: :math:`T = \tau L`.
        counts: numbers of blocks L, at least five.
        flow: f(t, h) of the limit :math:`\dot h = f(t, h)`, which is then integrated and compared with the extrapolated limit, and
            whose logarithmic norm is measured; None to extrapolate only.
        direction: :math:`\delta h_0` of the shape of the inputs, to follow it alone; needed above 512 numbers.

    Returns:
        The study; its order is 1 for explicit Euler, 4 for a net whose blocks are steps of Runge and Kutta's method.

    Raises:
        ValueError: if counts or time make no sense, a net changes the shape, or the state is too large for a dense derivative.

    Note:
        Errors of the values are counted as ``4 L`` roundings in the dtype of the inputs, which is an estimate; take float64.

    Examples:
        >>> A = torch.tensor([[-1.0, 2.0], [-2.0, -1.0]], dtype=torch.float64)
        >>> def stack(step, blocks):
        ...     def net(h):
        ...         for _ in range(blocks):
        ...             h = h + step * (A @ h)
        ...         return h
        ...
        ...     return net
        >>> study = depth_study(
        ...     stack, torch.ones(2, dtype=torch.float64), flow=lambda t, h: A @ h, counts=(8, 16, 32, 64, 96)
        ... )
        >>> study.rate.agrees, study.state.agrees, round(study.log_norm, 9), round(study.rate.order, 1)
        (True, True, -1.0, 1.0)
    """
    steps = _steps(time, counts)
    size = inputs.numel()
    if size > DENSE:
        raise ValueError(
            f"the derivative of a state of {size} numbers is not written down, {DENSE} are the limit: study one sample."
        )
    columns = np.eye(size) if direction is None else column_of(direction, size)
    eps = torch.finfo(inputs.dtype).eps
    ends: dict[float, tuple[Array, float]] = {}
    for count, step in zip(counts, steps, strict=True):
        end, J = jacobian(make_stack(step, count), inputs)
        if end.size != size:
            raise ValueError(
                f"a net of residual blocks keeps the shape: {size} numbers went in and {end.size} came out."
            )
        ends[step] = end, _rate(J @ columns, columns, time)
    reference = None if flow is None else follow(flow, inputs, columns, time)
    states, rates = _studies(ends, lambda step: 4.0 * eps * round(time / step), steps, time, reference, columns)
    if reference is None:
        return StepStudy(time, tuple(counts), states, rates, reason="no flow was given")
    bound, error = reference.log_norm, reference.errors[2]
    return StepStudy(time, tuple(counts), states, rates, bound, error, reference.largest_log_norm)


def lr_study(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module, float], Optimizer],
    loss: Callable[[nn.Module], Tensor],
    *,
    time: float,
    counts: Sequence[int] = (16, 32, 64, 128, 256),
    direction: Sequence[Tensor] | None = None,
) -> StepStudy:
    r"""Train with smaller and smaller learning rates for a fixed time :math:`\eta n`, and see what that tends to, and how fast.

    Gradient descent tends to the gradient flow; with a fixed momentum :math:`\beta` to the same flow, faster by
    :math:`1/(1-\beta)`; with :math:`\eta = h^2, \beta = 1-\gamma h` in steps of h to
    :math:`\ddot\theta+\gamma\dot\theta+\nabla f = 0`; Adam to :math:`\dot\theta = -\nabla f/(|\nabla f|+\epsilon)`. The step that
    goes to zero is what ``make_optimizer`` is given, whatever it makes of it.

    Args:
        make_model: returns the model, each time with the same parameters.
        make_optimizer: ``(model, step)`` -> optimizer, one with a rule (:func:`stableopt.optim.rule_for`).
        loss: model -> loss, of all the data: noise of batches has another limit.
        time: T, the step times the number of steps.
        counts: numbers of steps n, at least five.
        direction: :math:`\delta\theta_0`, one tensor per parameter of the optimizer, to follow it alone; needed above 512 numbers.

    Returns:
        The study of :math:`\theta_n` and of :math:`\frac1T\log\|D_{\theta_0}\theta_n\|_2`, the optimizer starting without
        momentum. For SGD with hyper-parameters that keep :math:`\eta(1-\delta)/(1-\beta)` proportional to the step, the mean of
        :math:`-\lambda_{\min}(\nabla^2f)` times that factor is the logarithmic norm, extrapolated as well.

    Raises:
        ValueError: if counts or time make no sense, models differ, the optimizer has no rule, or there are too many parameters.

    Examples:
        >>> def model():
        ...     net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        ...     with torch.no_grad():
        ...         net.weight.fill_(1.0)
        ...     return net
        >>> study = lr_study(
        ...     model,
        ...     lambda m, step: torch.optim.SGD(m.parameters(), lr=step),
        ...     lambda m: m.weight.square().sum(),
        ...     time=1.0,
        ...     counts=(8, 16, 32, 48, 64),
        ... )
        >>> round(study.rate.limit, 2), round(study.rate.order, 1), round(float(study.state.limit[0]), 3), study.holds
        (-2.0, 1.0, 0.135, True)
    """
    steps = _steps(time, counts)
    runs = [Descent(make_model, make_optimizer, loss, step, direction) for step in steps]
    if any(not np.array_equal(run.start, runs[0].start) for run in runs):
        raise ValueError("make_model must return the same parameters each time: seed it inside.")
    ends: dict[float, tuple[Array, float]] = {}
    gains = [run.gain / step for run, step in zip(runs, steps, strict=True)]
    reason = _no_log_norm(runs, gains)
    means: dict[float, tuple[float, float]] = {}
    for run, count, step in zip(runs, counts, steps, strict=True):
        norms = run.train(count, log_norms=not reason)
        end, X = run.end()
        ends[step] = end, _rate(X, run.columns, time)
        means[step] = (gains[0] * _mean(norms), gains[0] * max(norms)) if norms else (math.nan, math.nan)
    bound, error = _extrapolated(steps, means)
    largest = means[min(steps)][1]
    eps = runs[0].eps
    states, rates = _studies(ends, lambda step: 4.0 * eps * round(time / step), steps, time, None, runs[0].columns)
    return StepStudy(time, tuple(counts), states, rates, bound, error, largest, reason)


def _studies(
    ends: dict[float, tuple[Array, float]],
    roundings: Callable[[float], float],
    steps: Sequence[float],
    time: float,
    reference: FlowEnd | None,
    columns: Array,
) -> tuple[LimitStudy, LimitStudy]:
    """Return the studies of the end and of the rate."""
    state = rate = None
    errors = (0.0, 0.0)
    if reference is not None:
        state, rate = reference.state, _rate(reference.derivative, columns, time)
        size = max(np.linalg.norm(reference.derivative, 2), np.finfo(np.float64).tiny)
        errors = reference.errors[0], reference.errors[1] / float(size) / time
    return (
        limit_study(
            lambda h: (ends[h][0], roundings(h) * float(np.linalg.norm(ends[h][0]))),
            steps, predicted=state, predicted_error=errors[0], name="the end of the state",
        ),
        limit_study(
            lambda h: (ends[h][1], roundings(h) * max(1.0 / time, abs(ends[h][1]))),
            steps, predicted=rate, predicted_error=errors[1], name="the rate",
        ),
    )  # fmt: skip


def _steps(time: float, counts: Sequence[int]) -> list[float]:
    if not (math.isfinite(time) and time > 0):
        raise ValueError(f"time must be a finite number > 0, got {time!r}.")
    if len(set(counts)) < len(counts) or any(int(n) != n or n < 1 for n in counts):
        raise ValueError(f"counts must be distinct integers >= 1, got {list(counts)!r}.")
    return [time / n for n in counts]


def _rate(X: Array, columns: Array, time: float) -> float:
    r"""Return :math:`\frac1T\log(\|X\|_2/\|X_0\|_2)`, minus infinity for zero."""
    grown = float(np.linalg.norm(X, 2)) if np.isfinite(X).all() else math.nan
    return math.log(grown / float(np.linalg.norm(columns, 2))) / time if grown != 0.0 else -math.inf


def _no_log_norm(runs: Sequence[Descent], gains: Sequence[float]) -> str:
    if math.isnan(gains[0]):
        return f"the limit of {type(runs[0].optimizer).__name__} with these settings is no gradient flow"
    if max(gains) - min(gains) > 1e-9 * abs(gains[0]) or len({run.momentum for run in runs}) > 1:
        return "the learning rate is not proportional to the step at one momentum: the limit is no gradient flow"
    if runs[0].size > DENSE:
        return f"the Hessian of {runs[0].size} parameters is not written down"
    return ""


def _mean(values: Sequence[float]) -> float:
    """Return the mean over time by the trapezoidal rule."""
    return (math.fsum(values) - 0.5 * (values[0] + values[-1])) / (len(values) - 1)


def _extrapolated(steps: Sequence[float], means: dict[float, tuple[float, float]]) -> tuple[float, float]:
    """Return the limit of a mean and how far it can be off; where it has not settled, the finest value and the last changes."""
    study = limit_study(lambda h: means[h][0], steps)
    if study.verdict != "inconclusive":
        return float(study.limit), study.limit_error
    last = study.values[-3:]
    return float(last[-1]), float(np.max(last) - np.min(last))
