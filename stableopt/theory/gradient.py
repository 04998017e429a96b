r"""T4, the linear laws of gradient methods: factors, and the edges beyond which a quadratic diverges.

An *edge* is the learning rate at which the method leaves stability on a quadratic of the given curvature: sharp, predictive,
local.
It is not an energy limit (:mod:`stableopt.theory.energies`): for heavy ball with beta = 0.9 the two differ 19-fold. The one-step
matrices whose spectral radius reaches 1 at the edge are in :mod:`stableopt.theory.one_step`.

Curvature means an eigenvalue of the Hessian H, and for preconditioned methods of :math:`P^{-1/2}HP^{-1/2}` with the
preconditioner P frozen.
"""

from __future__ import annotations

from fractions import Fraction

from stableopt.linalg.bound import Real, lower, upper
from stableopt.theory._arguments import exact_upper, finite, fraction, joined, limit, nonnegative, positive

__all__ = [
    "adam_edge",
    "adamw_edge",
    "decayed_norm_bound",
    "gradient_descent_edge",
    "gradient_descent_factor",
    "heavy_ball_edge",
    "nadam_edge",
    "nesterov_edge",
    "newton_schulz_norm",
    "rmsprop_edge",
    "sgd_edge",
]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The quintic coefficients of ``torch.optim.Muon``."""


def gradient_descent_factor(lr: Real, smallest_curvature: Real, smoothness: Real) -> Real:
    r"""Bound how one gradient step amplifies perturbations: :math:`\max(|1-\eta\mu|, |1-\eta L|)`.

    Args:
        lr: :math:`\eta \ge 0`.
        smallest_curvature: :math:`\mu`, below the spectrum of the Hessian; negative for a nonconvex loss, which then expands
            by :math:`1+\eta|\mu|` or more.
        smoothness: L, above the spectrum, at least :math:`\mu`.

    Returns:
        The factor in the Euclidean norm; a Bound if an operand is one.

    Raises:
        ValueError: if lr is negative, an argument is not finite, or :math:`\mu > L`.

    Examples:
        >>> gradient_descent_factor(0.5, smallest_curvature=1.0, smoothness=3.0)
        0.5
        >>> gradient_descent_factor(0.5, smallest_curvature=-1.0, smoothness=3.0)
        1.5
    """
    eta = nonnegative("lr", lr)
    mu, L = finite("smallest_curvature", smallest_curvature), finite("smoothness", smoothness)
    if lower(mu) > upper(L):
        raise ValueError(f"smallest_curvature cannot exceed smoothness, got {smallest_curvature!r} > {smoothness!r}.")
    return joined(abs(1.0 - eta * mu), abs(1.0 - eta * L))


def gradient_descent_edge(curvature: Real) -> float:
    r"""Return the edge of gradient descent: :math:`2/\lambda`.

    Args:
        curvature: :math:`\lambda \ge 0`, the largest eigenvalue (the upper end is used).

    Returns:
        The learning rate, rounded down; infinity without curvature.

    Raises:
        ValueError: if the curvature is negative or not finite.

    Examples:
        >>> gradient_descent_edge(4.0)
        0.5
    """
    return sgd_edge(curvature)


def heavy_ball_edge(curvature: Real, beta: float) -> float:
    r"""Return the edge of heavy ball: :math:`2(1+\beta)/\lambda`.

    Args:
        curvature: :math:`\lambda \ge 0`.
        beta: momentum in [0, 1).

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        Local to a quadratic: on other strongly convex losses heavy ball can cycle below its edge.

    Examples:
        >>> heavy_ball_edge(4.0, beta=0.5)
        0.75
    """
    return sgd_edge(curvature, momentum=beta)


def nesterov_edge(curvature: Real, beta: float) -> float:
    r"""Return the edge of Nesterov's method: :math:`2(1+\beta)/((1+2\beta)\lambda)`.

    Args:
        curvature: :math:`\lambda \ge 0`.
        beta: momentum in [0, 1).

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> nesterov_edge(4.0, beta=0.5)
        0.375
    """
    return sgd_edge(curvature, momentum=beta, nesterov=True)


def sgd_edge(
    curvature: Real, *, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False
) -> float:
    r"""Return the edge of ``torch.optim.SGD`` with coupled weight decay: :math:`\frac{2(1+\beta)}{(1-d)(\lambda+\omega)}`.

    With Nesterov's momentum :math:`\frac{2(1+\beta)}{(1+2\beta)(\lambda+\omega)}`.

    Args:
        curvature: :math:`\lambda \ge 0`, without the weight decay.
        momentum: :math:`\beta` in [0, 1).
        dampening: d in [0, 1); as in torch it acts only with momentum, and not with Nesterov's.
        weight_decay: :math:`\omega \ge 0`.
        nesterov: whether the gradient is taken ahead.

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range, or Nesterov's momentum is combined with dampening.

    Examples:
        >>> sgd_edge(3.0, momentum=0.5, dampening=0.5, weight_decay=1.0)
        1.5
    """
    beta, d = Fraction(fraction("momentum", momentum)), Fraction(fraction("dampening", dampening))
    if nesterov and (d != 0 or beta == 0):
        raise ValueError(f"nesterov needs momentum > 0 and dampening = 0, got {momentum!r} and {dampening!r}.")
    gain = 1 + 2 * beta if nesterov else 1 - d if beta else Fraction(1)
    total = exact_upper(nonnegative("curvature", curvature)) + exact_upper(nonnegative("weight_decay", weight_decay))
    return limit(2 * (1 + beta), gain * total)


def adam_edge(curvature: Real, beta1: float = 0.9) -> float:
    r"""Return the edge of Adam with a frozen preconditioner.

    :math:`\frac{2(1+\beta_1)}{(1-\beta_1)\lambda}`, 38/:math:`\lambda` for 0.9.

    Args:
        curvature: :math:`\lambda \ge 0` of :math:`P^{-1/2}HP^{-1/2}`.
        beta1: in [0, 1).

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        Adam adapts P while it trains: the edge speaks of the preconditioner of the current step.

    References:
        Cohen et al., Adaptive gradient methods at the edge of stability, 2022.

    Examples:
        >>> adam_edge(4.0, beta1=0.5)
        1.5
    """
    return adamw_edge(curvature, beta1, weight_decay=0.0)


def adamw_edge(curvature: Real, beta1: float = 0.9, weight_decay: float = 0.01) -> float:
    r"""Return the edge of AdamW with a frozen preconditioner: :math:`\frac{2(1+\beta_1)}{(1-\beta_1)\lambda+(1+\beta_1)\omega}`.

    This is :math:`\eta\lambda < (2-\eta\omega)(1+\beta_1)/(1-\beta_1)` solved for :math:`\eta`.

    Args:
        curvature: :math:`\lambda` of :math:`P^{-1/2}HP^{-1/2}`, at least :math:`-\omega`: decay bears that much negative
        curvature.
        beta1: in [0, 1).
        weight_decay: :math:`\omega \ge 0`, decoupled.

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> adamw_edge(4.0, beta1=0.5, weight_decay=0.5)
        1.0909090909090908
    """
    beta, omega = Fraction(fraction("beta1", beta1)), exact_upper(nonnegative("weight_decay", weight_decay))
    if lower(finite("curvature", curvature)) < -omega:
        raise ValueError(
            f"curvature below -weight_decay is unstable at every lr, got {curvature!r} and {weight_decay!r}."
        )
    return limit(2 * (1 + beta), (1 - beta) * exact_upper(curvature) + (1 + beta) * omega)


def nadam_edge(curvature: Real, beta1: float = 0.9) -> float:
    r"""Return the edge of NAdam with a frozen preconditioner and constant momentum.

    :math:`\frac{2(1+\beta_1)}{(1-\beta_1)(1+2\beta_1)\lambda}`.

    Args:
        curvature: :math:`\lambda \ge 0` of :math:`P^{-1/2}HP^{-1/2}`.
        beta1: in [0, 1).

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> nadam_edge(4.0, beta1=0.5)
        0.75
    """
    beta = Fraction(fraction("beta1", beta1))
    return limit(2 * (1 + beta), (1 - beta) * (1 + 2 * beta) * exact_upper(nonnegative("curvature", curvature)))


def rmsprop_edge(curvature: Real, momentum: float = 0.0) -> float:
    r"""Return the edge of RMSprop with a frozen preconditioner: :math:`2(1+\beta)/\lambda`.

    Args:
        curvature: :math:`\lambda \ge 0` of :math:`P^{-1/2}HP^{-1/2}`.
        momentum: :math:`\beta` in [0, 1).

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> rmsprop_edge(4.0)
        0.5
    """
    return sgd_edge(curvature, momentum=momentum)


def decayed_norm_bound(initial_norm: Real, direction_norm: Real, weight_decay: Real, adjustment: Real = 1.0) -> Real:
    r"""Bound the iterates of a normalized method with decoupled decay: :math:`\|W_t\| \le \max(\|W_0\|, c\,a/\omega)` for all t.

    Sign descent, Lion and Muon have no linear limit; this invariant is what holds instead. It needs :math:`\eta\omega \le 1`.

    Args:
        initial_norm: :math:`\|W_0\|`, in the norm that the method normalizes.
        direction_norm: c, above the norm of every normalized direction: 1 for signs, :func:`newton_schulz_norm` for Muon.
        weight_decay: :math:`\omega > 0`.
        adjustment: a >= 0, the factor between lr of the decay and lr of the direction (Muon's shape adjustment).

    Returns:
        The bound; a Bound if an operand is one.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        Exact arithmetic; Newton-Schulz in bfloat16 can exceed c by its rounding.

    Examples:
        >>> decayed_norm_bound(3.0, direction_norm=1.0, weight_decay=0.25)
        4.0
    """
    reach = nonnegative("direction_norm", direction_norm) * nonnegative("adjustment", adjustment)
    return joined(nonnegative("initial_norm", initial_norm), reach / positive("weight_decay", weight_decay))


def newton_schulz_norm(coefficients: tuple[float, float, float] = NEWTON_SCHULZ, steps: int = 5) -> float:
    r"""Bound the norm of a direction made by Newton-Schulz steps :math:`s \mapsto as+bs^3+cs^5` on singular values in [0, 1].

    The image of an interval [0, u] is found from the critical points, step by step.

    Args:
        coefficients: (a, b, c); the default is that of ``torch.optim.Muon``.
        steps: how many times the polynomial is applied, >= 0.

    Returns:
        The largest modulus that a singular value can have after the steps, computed in floating point; 1.2024 by default, not 1.

    Raises:
        ValueError: if a coefficient is not finite or steps is negative.

    Examples:
        >>> round(newton_schulz_norm(), 4)
        1.2024
    """
    a, b, c = (float(upper(finite("coefficients", x))) for x in coefficients)
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}.")
    reach = 1.0
    for _ in range(steps):
        # the polynomial is odd, so the image of [-u, u] is symmetric
        reach = max(abs(a * s + b * s**3 + c * s**5) for s in (reach, *_critical_points(a, b, c)) if s <= reach)
    return reach


def _critical_points(a: float, b: float, c: float) -> list[float]:
    """Return the positive roots of a + 3 b s^2 + 5 c s^4."""
    if c == 0:
        squares = [-a / (3 * b)] if b != 0 else []
    else:
        discriminant = 9 * b * b - 20 * a * c
        squares = [(-3 * b + sign * discriminant**0.5) / (10 * c) for sign in (-1, 1)] if discriminant >= 0 else []
    return [x**0.5 for x in squares if x > 0]
