r"""T4, the energies of Adam and AdamW for a metric P (a positive diagonal, the preconditioner) that is frozen or grows.

Smoothness L is measured in the metric: the largest eigenvalue of :math:`P^{-1/2}HP^{-1/2}` anywhere. Under practical hypotheses P
also shrinks; then the decrease is checked and enforced, not assumed, and :func:`adam_metric_drift` is what P adds.

AdamW in a frozen metric *is* heavy ball. Eliminate the momentum from two steps: with
:math:`\eta' = \eta(1-\beta_1)`, :math:`\beta = \beta_1(1-\eta\omega)` and :math:`\varphi = f+\frac\omega2\|\theta\|_P^2`,

.. math:: \theta^+ - \theta = \beta\,(\theta-\theta_{\text{prev}}) - \eta' P^{-1}\nabla\varphi(\theta).
"""

from __future__ import annotations

from fractions import Fraction

from numpy.typing import ArrayLike

from stableopt.linalg.bound import Real, upper
from stableopt.theory._arguments import Array, exact_upper, finite, fraction, limit, nonnegative, positive, vector

__all__ = [
    "adam_dissipation",
    "adam_energy",
    "adam_energy_limit",
    "adam_metric_drift",
    "adamw_dissipation",
    "adamw_displacement",
    "adamw_energy",
    "adamw_energy_limit",
    "adamw_prox_step",
    "adamw_realized_momentum",
]


def adam_energy(value: Real, lr: Real, beta1: float, momentum_squared: Real) -> Real:
    r"""Return the energy of Adam: :math:`V = f+\frac{\beta_1\eta}{2(1-\beta_1)}\|m\|_{P^{-1}}^2`.

    Args:
        value: f at the parameters.
        lr: :math:`\eta > 0`; with bias correction, the effective rate of the step.
        beta1: in [0, 1).
        momentum_squared: :math:`\|m\|_{P^{-1}}^2 = \sum_i m_i^2/P_i`.

    Returns:
        The energy; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adam_energy(1.0, lr=0.5, beta1=0.5, momentum_squared=4.0)
        2.0
    """
    kinetic = _kinetic(lr, beta1) * nonnegative("momentum_squared", momentum_squared)
    return finite("value", value) + kinetic


def adam_dissipation(lr: Real, smoothness: Real) -> Real:
    r"""Return :math:`\kappa = 1/\eta-L/2` of Adam: :math:`V^+ \le V-\kappa\|\theta^+-\theta\|_P^2` while P does not shrink.

    Args:
        lr: :math:`\eta > 0`.
        smoothness: L >= 0 in the metric P of the step.

    Returns:
        The dissipation, whatever :math:`\beta_1` is; a Bound if an operand is one.

    Raises:
        ValueError: if lr is not positive or L is negative.

    References:
        The descent lemma in the metric P and Young's inequality.

    Examples:
        >>> adam_dissipation(0.25, smoothness=2.0)
        3.0
    """
    return 1.0 / positive("lr", lr) - nonnegative("smoothness", smoothness) / 2.0


def adam_energy_limit(smoothness: Real) -> float:
    r"""Return the largest learning rate at which the energy of Adam never rises while P does not shrink: :math:`2/L`.

    Args:
        smoothness: L >= 0 in the metric P.

    Returns:
        The limit, rounded down.

    Raises:
        ValueError: if L is negative or not finite.

    Examples:
        >>> adam_energy_limit(4.0)
        0.5
    """
    return limit(2, exact_upper(nonnegative("smoothness", smoothness)))


def adam_metric_drift(lr: Real, beta1: float, squared_before: Real, squared_after: Real) -> Real:
    r"""Return what a change of metric adds to the energy.

    :math:`\frac{\beta_1\eta}{2(1-\beta_1)}(\|m\|_{P^{+-1}}^2-\|m\|_{P^{-1}}^2)`.

    Args:
        lr: :math:`\eta > 0`.
        beta1: in [0, 1).
        squared_before: :math:`\|m\|_{P^{-1}}^2` in the old metric.
        squared_after: the same momentum in the new metric.

    Returns:
        The drift, not positive when P grows; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adam_metric_drift(0.5, beta1=0.5, squared_before=4.0, squared_after=2.0)
        -0.5
    """
    change = nonnegative("squared_after", squared_after) - nonnegative("squared_before", squared_before)
    return _kinetic(lr, beta1) * change


def adamw_displacement(
    theta: ArrayLike, momentum: ArrayLike, metric: ArrayLike, lr: float, weight_decay: float
) -> Array:
    r"""Return the displacement that led to a state of AdamW: :math:`d = -\eta(\omega\theta+P^{-1}m)/(1-\eta\omega)`.

    Args:
        theta: the parameters, ``(n,)``.
        momentum: m, ``(n,)``.
        metric: the diagonal of P, positive, ``(n,)``.
        lr: :math:`\eta > 0`, with :math:`\eta\omega < 1`.
        weight_decay: :math:`\omega \ge 0`.

    Returns:
        :math:`\theta_t-\theta_{t-1}` if P and the learning rate were the same one step before.

    Raises:
        ValueError: if an argument is malformed or :math:`\eta\omega \ge 1`.

    Examples:
        >>> adamw_displacement([1.0], [2.0], [2.0], lr=0.5, weight_decay=1.0)
        array([-2.])
    """
    shrink = _shrink(lr, weight_decay)
    x, m, P = vector("theta", theta), vector("momentum", momentum), _metric(metric)
    return -lr * (weight_decay * x + m / P) / shrink


def adamw_energy(
    value: Real,
    theta_squared: Real,
    displacement_squared: Real,
    *,
    lr: float,
    beta1: float,
    weight_decay: float,
    penalty: Real = 0.0,
) -> Real:
    r"""Return the energy of AdamW: :math:`V = f+h+\frac\omega2\|\theta\|_P^2+\frac{\beta}{2\eta'}\|d\|_P^2`.

    Args:
        value: f at the parameters.
        theta_squared: :math:`\|\theta\|_P^2 = \sum_i P_i\theta_i^2`.
        displacement_squared: :math:`\|d\|_P^2` of :func:`adamw_displacement`.
        lr: :math:`\eta > 0`, with :math:`\eta\omega < 1`; :math:`\eta' = \eta(1-\beta_1)`.
        beta1: in [0, 1); :math:`\beta = \beta_1(1-\eta\omega)`.
        weight_decay: :math:`\omega \ge 0`, decoupled.
        penalty: h at the parameters, a convex penalty or the indicator of a set.

    Returns:
        The energy; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range or :math:`\eta\omega \ge 1`.

    Examples:
        >>> adamw_energy(1.0, 4.0, 2.0, lr=0.5, beta1=0.5, weight_decay=0.0)
        3.0
    """
    beta = _shrunk_beta(lr, beta1, weight_decay)
    kinetic = beta / (2.0 * adamw_prox_step(lr, beta1)) * nonnegative("displacement_squared", displacement_squared)
    decay = weight_decay / 2.0 * nonnegative("theta_squared", theta_squared)
    return finite("value", value) + finite("penalty", penalty) + decay + kinetic


def adamw_dissipation(lr: float, smoothness: Real, beta1: float, weight_decay: float) -> Real:
    r"""Return :math:`\kappa = \frac{1-\beta}{\eta'}-\frac{L+\omega}{2}` of AdamW.

    :math:`V^+ \le V-\kappa\|d^+\|_P^2` for a frozen P.

    With a prox it is taken with step :func:`adamw_prox_step` in the metric P, and the momentum reset by
    :func:`adamw_realized_momentum`.

    Args:
        lr: :math:`\eta > 0`, with :math:`\eta\omega < 1`.
        smoothness: L >= 0 of f in the metric P.
        beta1: in [0, 1).
        weight_decay: :math:`\omega \ge 0`, decoupled.

    Returns:
        The dissipation; a Bound if the smoothness is one.

    Raises:
        ValueError: if an argument is out of range or :math:`\eta\omega \ge 1`.

    Examples:
        >>> adamw_dissipation(0.25, smoothness=2.0, beta1=0.5, weight_decay=0.0)
        3.0
    """
    beta = _shrunk_beta(lr, beta1, weight_decay)
    return (1.0 - beta) / adamw_prox_step(lr, beta1) - (nonnegative("smoothness", smoothness) + weight_decay) / 2.0


def adamw_energy_limit(smoothness: Real, beta1: float, weight_decay: float) -> float:
    r"""Return the largest sound learning rate of AdamW.

    :math:`\min\!\big(\frac1\omega, \frac{2(1-\beta_1)}{(1-\beta_1)(L+\omega)-2\beta_1\omega}\big)`.

    Args:
        smoothness: L >= 0 of f in the metric P (the upper end is used).
        beta1: in [0, 1).
        weight_decay: :math:`\omega \ge 0`, decoupled.

    Returns:
        The limit, rounded down: :math:`2/L` without decay. If it is :math:`1/\omega` it is not reached itself.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adamw_energy_limit(4.0, beta1=0.9, weight_decay=0.0)
        0.5
    """
    L, omega = (
        exact_upper(nonnegative("smoothness", smoothness)),
        exact_upper(nonnegative("weight_decay", weight_decay)),
    )
    beta1_exact = Fraction(fraction("beta1", beta1))
    by_energy = limit(2 * (1 - beta1_exact), (1 - beta1_exact) * (L + omega) - 2 * beta1_exact * omega)
    return min(by_energy, limit(1, omega))


def adamw_prox_step(lr: float, beta1: float) -> float:
    r"""Return the step of the prox in the metric P that belongs to AdamW's energy: :math:`\eta' = \eta(1-\beta_1)`.

    Args:
        lr: :math:`\eta > 0`.
        beta1: in [0, 1).

    Returns:
        The step: :math:`\theta^+ = \arg\min_u h(u)+\frac{1}{2\eta'}\|u-y\|_P^2`, y the result of AdamW's own step.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adamw_prox_step(0.5, beta1=0.5)
        0.25
    """
    return float(upper(positive("lr", lr))) * (1.0 - fraction("beta1", beta1))


def adamw_realized_momentum(
    before: ArrayLike, after: ArrayLike, metric: ArrayLike, lr: float, weight_decay: float
) -> Array:
    r"""Return the momentum to store after a prox: :math:`m = P\,((1-\eta\omega)\theta_{\text{old}}-\theta_{\text{new}})/\eta`.

    With it :func:`adamw_displacement` gives the displacement that really happened.

    Args:
        before: parameters before the step, ``(n,)``.
        after: parameters after the prox, ``(n,)``.
        metric: the diagonal of P, positive, ``(n,)``.
        lr: :math:`\eta > 0`.
        weight_decay: :math:`\omega \ge 0`.

    Returns:
        The momentum, ``(n,)``.

    Raises:
        ValueError: if an argument is malformed.

    Examples:
        >>> adamw_realized_momentum([1.0], [0.5], [2.0], lr=0.5, weight_decay=0.0)
        array([2.])
    """
    positive("lr", lr)
    nonnegative("weight_decay", weight_decay)
    return _metric(metric) * ((1.0 - lr * weight_decay) * vector("before", before) - vector("after", after)) / lr


def _kinetic(lr: Real, beta1: float) -> Real:
    b = fraction("beta1", beta1)
    return b * positive("lr", lr) / (2.0 * (1.0 - b))


def _shrink(lr: float, weight_decay: float) -> float:
    shrink = 1.0 - float(upper(positive("lr", lr))) * float(upper(nonnegative("weight_decay", weight_decay)))
    if shrink <= 0:
        raise ValueError(f"lr * weight_decay must be below 1, got lr={lr!r} and weight_decay={weight_decay!r}.")
    return shrink


def _shrunk_beta(lr: float, beta1: float, weight_decay: float) -> float:
    """Return beta = beta1 (1 - lr * weight_decay)."""
    return fraction("beta1", beta1) * _shrink(lr, weight_decay)


def _metric(metric: ArrayLike) -> Array:
    P = vector("metric", metric)
    if P.min() <= 0:
        raise ValueError(f"metric must be a positive diagonal, got the entry {P.min():.6g}.")
    return P
