r"""The limit of a measured value as a step goes to zero: its order, its extrapolated value, and how far both can be trusted.

Whatever is measured at a step h, with :math:`v(h) = v_0 + c h^p (1 + O(h^q))` three steps :math:`h_0 > h_1 > h_2` determine the
order

.. math:: \frac{\|v(h_0)-v(h_1)\|}{\|v(h_1)-v(h_2)\|} = \frac{h_0^p-h_1^p}{h_1^p-h_2^p},

whose right-hand side increases with p, so that there is at most one. What is left out, :math:`O(h^q)`, is seen in how these local
orders change from one three to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopt.lyapunov.profile.plain import plain

__all__ = ["LimitStudy", "limit_study"]

Array: TypeAlias = NDArray[np.float64]
Outcome: TypeAlias = Literal["converges", "exact", "inconclusive"]

_ROUNDINGS = 4.0
"""How many units in the last place a value is taken to be off if nothing is said about its error."""
_SAFETY = 2.0
"""How much wider than what the last changes foretell an interval is."""
_LEAST = 0.25
"""The least relative order of a remainder that is reckoned with."""


@dataclass(frozen=True)
class LimitStudy:
    r"""What :func:`limit_study` found.

    Args:
        name: of what was measured.
        steps: :math:`h_k`, falling.
        values: ``(n,)``, or ``(n, d)`` where the value is a vector.
        errors: ``(n,)``, how far each value can be off.
        orders: ``(n - 2,)``, the local order of each three successive steps; NaN where the differences do not point the same way.
        verdict: ``converges`` (an order above 0 was seen to settle), ``exact`` (no dependence on the step was seen above the
            errors: the order is not defined), or ``inconclusive``.
        order: p of the best three steps; NaN unless it converges.
        order_error: half the width of its interval, an estimate and no enclosure: see :func:`limit_study`.
        limit: :math:`v_0`, a number or a vector; NaN if inconclusive.
        limit_error: how far it is estimated to be off, in the Euclidean norm; infinite if inconclusive.
        predicted: what theory says the limit is; None if nothing was said.
        predicted_error: how far that can be off.
        reason: one sentence if it is inconclusive, else empty.

    Examples:
        >>> study = limit_study(lambda h: 2.0 + h, [0.4, 0.2, 0.1, 0.05, 0.025])
        >>> study.verdict, round(study.order, 6), round(float(study.limit), 6)
        ('converges', 1.0, 2.0)
    """

    name: str
    steps: tuple[float, ...]
    values: Array = field(repr=False)
    errors: Array = field(repr=False)
    orders: tuple[float, ...]
    verdict: Outcome
    order: float
    order_error: float
    limit: float | Array
    limit_error: float
    predicted: float | Array | None = None
    predicted_error: float = 0.0
    reason: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the order, an estimate: it can miss."""
        return self.order - self.order_error, self.order + self.order_error

    @property
    def agrees(self) -> bool | None:
        """Whether the limit is the predicted one, within the errors of both; None if that cannot be said."""
        if self.predicted is None or self.verdict == "inconclusive":
            return None
        return self.distance <= self.limit_error + self.predicted_error

    @property
    def distance(self) -> float:
        """How far the limit is from the predicted one, NaN without a prediction."""
        if self.predicted is None:
            return math.nan
        return float(np.linalg.norm(np.subtract(self.limit, self.predicted)))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON (:func:`~stableopt.lyapunov.profile.plain.plain`); what is not known is None.

        Examples:
            >>> limit_study(lambda h: h, [0.4, 0.2, 0.1, 0.05]).as_dict()["steps"]
            [0.4, 0.2, 0.1, 0.05]
        """
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain(own | {"interval": self.interval, "agrees": self.agrees, "distance": self.distance})

    def __str__(self) -> str:
        finest = f"step {self.steps[-1]:.3g}"
        if self.verdict == "inconclusive":
            return f"{self.name}: inconclusive down to {finest}: {self.reason}"
        where = (
            f"{self.limit:.10g}"
            if isinstance(self.limit, float)
            else f"a vector of norm {np.linalg.norm(self.limit):.6g}"
        )
        law = "it does not depend on the step" if self.verdict == "exact" else self._order_text()
        said = f"{self.name} tends to {where} within about {self.limit_error:.2g}; {law} (down to {finest})"
        if self.agrees is None:
            return said
        relation = "agrees with" if self.agrees else f"is {self.distance:.2g} away from"
        return f"{said}; it {relation} the predicted limit"

    def _order_text(self) -> str:
        low, high = self.interval
        return f"order {self.order:.3f} [{low:.3f}, {high:.3f}]"


def limit_study(
    measure: Callable[[float], Any],
    steps: Sequence[float],
    *,
    predicted: ArrayLike | None = None,
    predicted_error: float = 0.0,
    resolution: float = 0.5,
    name: str = "value",
) -> LimitStudy:
    r"""Measure a value at smaller and smaller steps, and find its limit, the order in which it comes there, and how sure that is.

    Each three successive steps give a local order, :math:`p_k = p + a x_k + \dots` with a remainder of relative order h, where
    :math:`x_k`, of the size of the steps, follows from them (so for steps of any ratios). From the last two of them p is
    extrapolated. Half its interval is twice :math:`x_k\max_j|a_j|/q`, :math:`a_j` the slopes seen so far and :math:`q \le 1` the
    relative order of the remainder that the last two foretell, at least 1/4; the errors of the values add to it. The three steps
    with the narrowest interval are taken, of those that no smaller steps contradict. The limit is extrapolated with the order; its
    error is what the interval of the order amounts to, plus, for vectors, what the differences do not have in common.

    Args:
        measure: step -> value, or (value, error), the error a bound of how far the value can be off, in the Euclidean norm; without
            it that is taken to be four units in the last place. A value is a number or a vector.
        steps: at least three, positive and distinct; five are needed for a verdict, six or more, halved each time, are good.
        predicted: the limit, if theory says what it is: it is compared, and used for nothing else.
        predicted_error: how far that can be off.
        resolution: half-width of the interval above which an order does not count as known; 1/2 tells integers apart.
        name: of the value, for the sentence.

    Returns:
        The study. ``inconclusive`` if fewer than five steps are above the errors, if the order does not settle within the
        resolution, or if it is not positive: then the value was not seen to converge.

    Raises:
        ValueError: if steps are too few or not positive and distinct, or values have different shapes.

    Note:
        Neither the interval nor the error of the limit is an enclosure: nothing of what a few values do not show can be enclosed.
        They are right if what was seen goes on, local orders that change at least as fast as the step, and miss where several
        powers lie close together. On random families :math:`v_0 + ah^p + bh^q + dh^r` with five to eight halved steps the
        interval missed p in 0.1 % of the decided cases where the powers are 1 to 2 apart, in 1.5 % with 1/2 to 2, in 12 % with
        1/4 to 1, in a third with 0.1 to 1/2; the limit was further off than its error in 0, 0.1 %, 0.9 % and 3 %.

    References:
        Richardson, The deferred approach to the limit, 1927; Roache, Perspective: a method for uniform reporting of grid
        refinement studies, 1994 (the practice of intervals from three grids).

    Examples:
        >>> import math
        >>> print(limit_study(math.exp, [2.0**-k for k in range(3, 10)], predicted=1.0, name="exp(h)"))
        exp(h) tends to 0.99999... within about 2...e-05; order 1.000 [0.992, 1.008] (down to step 0.00195); it agrees with the ...
        >>> limit_study(lambda h: math.sin(1 / h), [0.4, 0.2, 0.1, 0.05, 0.025]).verdict
        'inconclusive'
    """
    h = sorted((float(x) for x in steps), reverse=True)
    if len(h) < 3 or len(set(h)) < len(h) or not all(math.isfinite(x) and x > 0 for x in h):
        raise ValueError(f"a study needs at least three steps, positive and distinct, got {list(steps)!r}.")
    values, errors, scalar = _measured(measure, h)
    found = _Threes(h, values, errors).best(resolution)
    shown = values[:, 0] if scalar else values
    limit: Any = found.limit if found.limit is None or not scalar else float(found.limit[0])
    if limit is None:
        limit = math.nan if scalar else np.full(values.shape[1], math.nan)
    target = None if predicted is None else float(np.asarray(predicted)) if scalar else np.asarray(predicted, float)
    return LimitStudy(
        name=name,
        steps=tuple(h),
        values=shown,
        errors=errors,
        orders=found.orders,
        verdict=found.verdict,
        order=found.order,
        order_error=found.order_error,
        limit=limit,
        limit_error=found.limit_error,
        predicted=target,
        predicted_error=float(predicted_error),
        reason=found.reason,
    )


@dataclass(frozen=True)
class _Found:
    """The outcome without its data."""

    verdict: Outcome
    orders: tuple[float, ...]
    order: float = math.nan
    order_error: float = math.inf
    limit: Array | None = None
    limit_error: float = math.inf
    reason: str = ""


class _Threes:
    """All threes of successive steps: local orders with their errors."""

    def __init__(self, h: list[float], values: Array, errors: Array) -> None:
        self.h, self.values, self.errors = h, values, errors
        with np.errstate(invalid="ignore", over="ignore"):
            self.d = values[:-1] - values[1:]
            self.size = np.linalg.norm(self.d, axis=1)
        self.u = errors[:-1] + errors[1:]
        self.local = [self._local(k) for k in range(len(h) - 2)]

    def best(self, resolution: float) -> _Found:
        """Return the outcome of the three whose order is known best."""
        orders = tuple(p for p, _ in self.local)
        if not np.isfinite(self.values[-1]).all():
            return _Found("inconclusive", orders, reason=f"the value at step {self.h[-1]:.3g} is not finite")
        if np.all(self.size <= self.u):
            error = float(np.max(self.u) + np.max(self.errors))
            return _Found("exact", orders, limit=self.values[-1], limit_error=error)
        estimates = [self._borne_out(k, *self._estimate(k)) for k in range(len(self.local))]
        order, width = min(estimates, key=lambda e: e[1])  # the widths of all that are contradicted are infinite
        if not math.isfinite(width):
            return _Found("inconclusive", orders, reason=self._why())
        if width >= resolution:
            reason = f"the order has not settled: {order:.3g} is known to {width:.2g} only; smaller steps may help"
            return _Found("inconclusive", orders, reason=reason)
        if order - width <= 0.0:
            reason = f"the value was not seen to converge: its order {order:.3g} is not above 0"
            return _Found("inconclusive", orders, reason=reason)
        limits = [self._limit(k, p, w) for k, (p, w) in enumerate(estimates) if w < min(resolution, p)]
        limit, error = min(limits, key=lambda x: x[1])
        return _Found("converges", orders, order, width, limit, error)

    def _ratios(self, k: int) -> tuple[float, float]:
        return self.h[k] / self.h[k + 1], self.h[k + 1] / self.h[k + 2]

    def _local(self, k: int) -> tuple[float, float]:
        """Return the local order of the steps k, k+1, k+2 and what the errors of the values do to it."""
        first, second = self.size[k], self.size[k + 1]
        e, f = self.u[k], self.u[k + 1]
        if not (np.isfinite(self.values[k : k + 3]).all() and second > f and float(self.d[k] @ self.d[k + 1]) > 0.0):
            return math.nan, math.inf
        a, b = self._ratios(k)
        p = _order(first / second, a, b)
        low = _order((first - e) / (second + f), a, b) if first > e else -math.inf
        high = _order((first + e) / (second - f), a, b)
        return p, max(p - low, high - p)

    def _estimate(self, k: int) -> tuple[float, float]:
        """Return the order that the local order k is on its way to, and half the width of its interval."""
        if k < 2:  # one change can be small by chance
            return math.nan, math.inf
        (order, rough), noise = self.local[k], self.local[k][1] + self.local[k - 1][1]
        if not order > 0.0:  # nothing converges: no remainder falls
            return order, rough + abs(order - self.local[k - 1][0]) if math.isfinite(order) else math.inf
        x = [self._remainder(j, order) for j in range(k + 1)]
        slopes = [
            (p - q) / (u - v) if v < u else math.nan
            for (q, _), (p, _), u, v in zip(self.local[:k], self.local[1 : k + 1], x[:-1], x[1:], strict=True)
        ]
        if math.isnan(slopes[-1]) or math.isnan(slopes[-2]):
            return math.nan, math.inf
        remainder = 1.0
        if abs(slopes[-1]) * (x[-2] - x[-1]) > noise and abs(slopes[-1]) > abs(
            slopes[-2]
        ):  # else errors say how it changed
            growth = math.log(abs(slopes[-1] / slopes[-2])) if slopes[-2] else math.inf
            remainder = max(1.0 - growth / math.log(x[-2] / x[-1]), _LEAST)
        steepest = max(abs(a) for a in slopes if not math.isnan(a))  # that of one change can be small by chance
        return order + slopes[-1] * x[-1], rough + _SAFETY * x[-1] * steepest / remainder

    def _borne_out(self, k: int, order: float, width: float) -> tuple[float, float]:
        """Return an estimate, without its width if smaller steps contradict it: then something else has become the larger."""
        for j in range(k + 1, len(self.local)):
            p, rough = self.local[j]
            turned = math.isnan(p) and self.size[j] > 4.0 * self.u[j] and self.size[j + 1] > 4.0 * self.u[j + 1]
            if turned or abs(p - order) > width + rough:
                return order, math.inf
        return order, width

    def _remainder(self, k: int, p: float) -> float:
        r"""Return x with :math:`p_k = p + ax` to first order, for values :math:`v_0 + ch^p(1+ah)`."""
        f, g, h = (y / self.h[k + 1] for y in self.h[k : k + 3])
        first = (f ** (p + 1) - g ** (p + 1)) / (f**p - g**p)
        second = (g ** (p + 1) - h ** (p + 1)) / (g**p - h**p)
        a, b = math.log(f / g), math.log(g / h)
        return self.h[k + 1] * (first - second) / (a / -math.expm1(-p * a) - b / math.expm1(p * b))

    def _limit(self, k: int, p: float, width: float) -> tuple[Array, float]:
        r"""Return :math:`v_2 - (v_1-v_2)/(b^p-1)` and how far it can be off if the order is off by the width."""
        d = self.d[k + 1]
        log_b = math.log(self._ratios(k)[1])
        weight, low, high = (1.0 / math.expm1(q * log_b) for q in (p, p + width, p - width))
        error = float(self.errors[k + 2]) + weight * float(self.u[k + 1])
        error += float(self.size[k + 1]) * max(weight - low, high - weight)
        # v = v0 + c h^p + e h^(p+q) with e across c: d_k - g d_{k+1} is ((b^p-1)(b^(p+q)-1)) times what e does to the limit
        across = self.d[k] - (float(self.d[k] @ d) / float(d @ d)) * d
        error += float(np.linalg.norm(across)) * weight * weight
        return self.values[k + 2] - weight * d, error

    def _why(self) -> str:
        """Say why no local order is known."""
        if len(self.local) < 3:
            return "whether an order settles is seen in how two changes differ: five steps at least are needed"
        above = int(np.sum(self.size > self.u))
        if above < min(4, len(self.size)):
            return (
                f"only {above} of {len(self.size)} differences are larger than the errors of the values; take larger steps, or "
                "measure more precisely"
            )
        if sum(math.isfinite(p) for p, _ in self.local) < 3:
            return "the differences do not point the same way from step to step"
        return "the local orders do not settle, or fewer than three in a row are above the errors: " + ", ".join(
            f"{p:.3g}" for p, _ in self.local
        )


def _measured(measure: Callable[[float], Any], h: list[float]) -> tuple[Array, Array, bool]:
    values, errors = [], []
    for step in h:
        got = measure(step)
        value, error = got if isinstance(got, tuple) else (got, None)
        values.append(np.asarray(value, dtype=np.float64))
        rounding = _ROUNDINGS * np.finfo(np.float64).eps * float(np.linalg.norm(values[-1]))
        errors.append(rounding if error is None else float(error))
    shapes = {v.shape for v in values}
    if len(shapes) > 1:
        raise ValueError(f"a measure must return values of one shape, got {sorted(shapes)}.")
    scalar = values[0].ndim == 0
    return np.stack([v.reshape(-1) for v in values]), np.asarray(errors), scalar


def _order(ratio: float, a: float, b: float) -> float:
    r"""Return p with :math:`(a^p-1)/(1-b^{-p}) = \text{ratio}`, a and b the ratios of the steps.

    Examples:
        >>> _order(4.0, 2.0, 2.0), round(_order((9 - 4) / (4 - 1), 3 / 2, 2.0), 12)
        (2.0, 2.0)
    """
    if math.isclose(a, b, rel_tol=1e-12):
        return math.log(ratio) / math.log(a)
    x, y = math.log(a), math.log(b)

    def excess(p: float) -> float:
        quotient = x / y if p == 0.0 else math.expm1(p * x) / -math.expm1(-p * y)
        return quotient - ratio

    low, high = -600.0 / max(x, y), 600.0 / max(x, y)  # where the powers are still floats
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) < 0.0 else (low, middle)
    return 0.5 * (low + high)
