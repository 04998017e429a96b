r"""A flow :math:`\dot h = f(t, h)` with its derivative and its logarithmic norm: what residual blocks tend to.

Along a solution the derivative :math:`X(t)` of :math:`h(t)` by :math:`h(0)` obeys :math:`\dot X = Df\,X`, and
:math:`\|X(T)\|_2 \le \exp\int_0^T \mu_2(Df)\,dt` with the logarithmic norm :math:`\mu_2(J)`, the largest eigenvalue of
:math:`(J+J^\top)/2` (THEORY T7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Flow", "FlowEnd", "follow", "jacobian"]

Flow: TypeAlias = Callable[[float, Tensor], Tensor]
Array: TypeAlias = NDArray[np.float64]

_FIRST, _LAST = 16, 1024
"""Steps of the first and of the finest integration."""
_ENOUGH = (1e-8, 1e-8, 1e-6)
"""Relative change of state, derivative and logarithmic norm, from one integration to the next, at which no finer one is made.

It is part of the error."""


@dataclass(frozen=True)
class FlowEnd:
    r"""A solution at the horizon T, by Runge and Kutta's method of order 4, with steps halved until that changes little.

    Args:
        state: :math:`h(T)`, flat.
        derivative: :math:`X(T)`, ``(d, k)``.
        log_norm: :math:`\frac1T\int_0^T\mu_2(Df)\,dt`.
        largest_log_norm: the largest :math:`\mu_2(Df)` that was met.
        errors: how far state, derivative (Frobenius norm) and log_norm can be off.
        steps: how many the finest integration took.
    """

    state: Array = field(repr=False)
    derivative: Array = field(repr=False)
    log_norm: float
    largest_log_norm: float
    errors: tuple[float, float, float]
    steps: int


def jacobian(function: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Array, Array]:
    """Return a function's value and its derivative at a point, both flat, in float64; row by row, by reverse mode.

    Args:
        function: of a tensor, which returns a tensor; modules are called with gradients on.
        h: the point.

    Examples:
        >>> value, J = jacobian(lambda x: torch.stack([x[0] * x[1], x[0]]), torch.tensor([2.0, 3.0]))
        >>> value, J
        (array([6., 2.]), array([[3., 2.],
               [1., 0.]]))
    """
    point = h.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(point).reshape(-1)
        rows = []
        for i in range(value.numel()):
            made = (
                torch.autograd.grad(value[i], point, retain_graph=True, allow_unused=True)[0]
                if value.requires_grad
                else None
            )
            rows.append(torch.zeros_like(point) if made is None else made)
    J = torch.stack([row.detach().reshape(-1) for row in rows])
    return value.detach().double().cpu().numpy(), J.double().cpu().numpy()


def follow(flow: Flow, start: Tensor, columns: Array, horizon: float) -> FlowEnd:
    """Follow a flow and the derivative of its solution.

    Args:
        flow: f(t, h), of the shape of h.
        start: h(0).
        columns: X(0), ``(d, k)``.
        horizon: T > 0.

    Returns:
        The end; its errors are the changes from the integration before, which had steps twice as large, and rounding. Where a
        logarithmic norm has kinks in time they are what limits it.

    Examples:
        >>> end = follow(lambda t, h: -h, torch.ones(2, dtype=torch.float64), np.eye(2), 1.0)
        >>> bool(np.allclose(end.derivative, math.exp(-1) * np.eye(2), rtol=1e-8)), round(end.log_norm, 12)
        (True, -1.0)
    """
    shape = start.shape

    def field_at(t: float, h: Array) -> tuple[Array, Array]:
        return jacobian(lambda x: flow(t, x.reshape(shape)), torch.from_numpy(h).to(start).reshape(shape))

    h0 = start.detach().double().cpu().numpy().reshape(-1)
    before = _integrate(field_at, h0, columns, horizon, _FIRST)
    steps = 2 * _FIRST
    while True:
        now = _integrate(field_at, h0, columns, horizon, steps)
        gaps = tuple(float(np.linalg.norm(np.subtract(a, b))) for a, b in zip(now[:3], before[:3], strict=True))
        sizes = tuple(float(np.linalg.norm(part)) for part in now[:3])
        if steps >= _LAST or all(g <= e * s for g, s, e in zip(gaps, sizes, _ENOUGH, strict=True)):
            rounding = 4.0 * steps * np.finfo(np.float64).eps
            errors = tuple(g + rounding * s for g, s in zip(gaps, sizes, strict=True))
            return FlowEnd(now[0], now[1], float(now[2]), now[3], (errors[0], errors[1], errors[2]), steps)
        before, steps = now, 2 * steps


def _integrate(
    field_at: Callable[[float, Array], tuple[Array, Array]], h: Array, X: Array, horizon: float, steps: int
) -> tuple[Array, Array, float, float]:
    """Return h(T), X(T), the mean of the logarithmic norm (by Simpson's rule, which the method is there) and its largest value."""
    tau = horizon / steps
    total, largest = 0.0, -math.inf
    for n in range(steps):
        t = n * tau
        kh, kX, mu = [], [], []
        for c in (0.0, 0.5, 0.5, 1.0):
            hc = h + c * tau * kh[-1] if kh else h
            Xc = X + c * tau * kX[-1] if kX else X
            f, J = field_at(t + c * tau, hc)
            kh.append(f)
            kX.append(J @ Xc)
            mu.append(float(np.linalg.eigvalsh(0.5 * (J + J.T))[-1]))
        h = h + tau / 6.0 * (kh[0] + 2 * kh[1] + 2 * kh[2] + kh[3])
        X = X + tau / 6.0 * (kX[0] + 2 * kX[1] + 2 * kX[2] + kX[3])
        total += (mu[0] + 2 * mu[1] + 2 * mu[2] + mu[3]) / 6.0
        largest = max(largest, *mu)
    return h, X, total / steps, largest
