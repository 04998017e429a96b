r"""T4, the linear laws of gradient methods: factors, and the edges beyond which a quadratic diverges.

An *edge* is the learning rate at which the method leaves stability on a quadratic of the given curvature: sharp, predictive,
local.
It is not an energy limit (:mod:`stableopt.theory.energies`): for heavy ball with beta = 0.9 the two differ 19-fold. The one-step
matrices whose spectral radius reaches 1 at the edge are in :mod:`stableopt.theory.one_step`.

Curvature means an eigenvalue of the Hessian H, and for preconditioned methods of :math:`P^{-1/2}HP^{-1/2}` with the
preconditioner P frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import inf, isqrt

from stableopt.linalg.bound import Bound, Real, lower, round_up, upper
from stableopt.theory._arguments import (
    exact_lower,
    exact_upper,
    finite,
    fraction,
    joined,
    limit,
    nonnegative,
    positive,
)

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
    "sam_edge",
    "schedule_free_edge",
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


def schedule_free_edge(curvature: Real, beta: float = 0.9, weight: float = 0.0) -> float:
    r"""Return the edge of schedule-free gradient descent: :math:`\frac{2(2-c)}{\lambda((2-c)(1-\beta)+c\beta)}`.

    The method keeps a base point z and an average x, and takes the gradient between them:
    :math:`y = (1-\beta)z+\beta x`, :math:`z^+ = z-\eta\nabla f(y)`, :math:`x^+ = (1-c)x+cz^+`.

    Args:
        curvature: :math:`\lambda \ge 0`; of :math:`P^{-1/2}HP^{-1/2}` for the variant of Adam.
        beta: the interpolation :math:`\beta` in [0, 1).
        weight: c in [0, 1], the weight of the newest point in the average. The optimizers let it fall like 1/t; the edge rises as
            it falls, to :math:`2/((1-\beta)\lambda)` at 0.

    Returns:
        The learning rate, rounded down.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        *Proof* by Jury's test: with :math:`h = \eta\lambda` the step on (x, z) has the trace :math:`2-c-h(1-\beta)-ch\beta` and the
        determinant :math:`(1-c)(1-h(1-\beta))`. Both roots lie inside the unit circle iff 1 - trace + det = ch > 0, det < 1, and
        1 + trace + det :math:`= 2(2-c)-h((2-c)(1-\beta)+c\beta) > 0`; the last implies det > -1, since at its edge
        :math:`1+\det = 2-c-(1-c)(1-\beta)h = c(2-c)/((2-c)(1-\beta)+c\beta) \ge 0`.

    References:
        Defazio et al., The road less scheduled, 2024 (the method); Song et al., Through the river, 2025 (the edge for c = 0).

    Examples:
        >>> schedule_free_edge(4.0, beta=0.5), schedule_free_edge(4.0, beta=0.5, weight=1.0)
        (1.0, 0.5)
    """
    b, c = Fraction(fraction("beta", beta)), Fraction(fraction("weight", weight, closed=True))
    return limit(2 * (2 - c), ((2 - c) * (1 - b) + c * b) * exact_upper(nonnegative("curvature", curvature)))


def sam_edge(curvature: Real, gradient_norm: Real, radius: Real) -> float:
    r"""Return the edge of sharpness-aware minimization: :math:`\frac{2}{\lambda(1+\rho\lambda/\|g\|)}`.

    One step :math:`\theta^+ = \theta-\eta\nabla f(\theta+\rho g/\|g\|)`, :math:`g = \nabla f(\theta)`, on a quadratic multiplies
    the component along an eigenvector of the curvature :math:`\lambda` by :math:`1-\eta\lambda(1+\rho\lambda/\|g\|)`: it shrinks
    below the edge and grows beyond it.

    Args:
        curvature: :math:`\lambda \ge 0`.
        gradient_norm: :math:`\|g\| > 0`, of the whole gradient at the start of the step (the lower end is used).
        radius: :math:`\rho \ge 0`, how far the ascent goes.

    Returns:
        The learning rate, rounded down; below :func:`gradient_descent_edge`, and towards 0 as the gradient vanishes.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        It depends on the state: it speaks of the step from the point where the gradient has this norm.

    References:
        Long and Bartlett, Sharpness-aware minimization and the edge of stability, 2024, where it is solved for the curvature.

    Examples:
        >>> sam_edge(4.0, gradient_norm=2.0, radius=0.5)
        0.25
    """
    lam, rho = exact_upper(nonnegative("curvature", curvature)), exact_upper(nonnegative("radius", radius))
    return limit(2, lam * (1 + rho * lam / exact_lower(positive("gradient_norm", gradient_norm))))


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


def newton_schulz_norm(
    coefficients: tuple[float, float, float] | Sequence[tuple[float, float, float]] = NEWTON_SCHULZ,
    steps: int | None = None,
    *,
    slack: float = 0.0,
) -> float:
    r"""Bound the norm of a direction made by steps :math:`s \mapsto as+bs^3+cs^5` on singular values in [0, 1].

    The image of an interval [0, u] is found from the critical points, step by step, in rational arithmetic.

    Args:
        coefficients: (a, b, c) of a polynomial that is iterated, by default that of ``torch.optim.Muon``; or a sequence of such,
            one for each step.
        steps: how many times the one polynomial is applied, >= 0; 5 if None. With a sequence: how many of its first, all if None.
        slack: by how much, relatively, singular values may grow before each step: rounding, of the normalization or of the step
            before. >= 0.

    Returns:
        A bound on the modulus of a singular value after the steps, rounded up; 1.2024 by default, not 1.

    Raises:
        ValueError: if a coefficient is not finite, steps is negative or more than there are polynomials, or slack is negative.

    Note:
        The last step is not followed by slack: what it rounds is added by the caller.

    Examples:
        >>> round(newton_schulz_norm(), 4)
        1.2024
        >>> newton_schulz_norm([(1.5, -0.5, 0.0)] * 3), newton_schulz_norm([(1.5, -0.5, 0.0)] * 3, slack=0.5)
        (1.0, 1.0)
    """
    reach = Fraction(1)
    growth = 1 + exact_upper(nonnegative("slack", slack))
    for a, b, c in _polynomials(coefficients, steps):
        largest = round_up(_largest_modulus(a, b, c, reach * growth))
        if largest == inf:
            return inf
        reach = Fraction(largest)
    return float(reach)


def _polynomials(
    coefficients: tuple[float, float, float] | Sequence[tuple[float, float, float]], steps: int | None
) -> list[tuple[Fraction, ...]]:
    """Return the exact coefficients of each step."""
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}.")
    one = isinstance(coefficients[0], Bound | float | int) if len(coefficients) else False
    listed = [coefficients] * (5 if steps is None else steps) if one else list(coefficients)[:steps]
    if steps is not None and len(listed) < steps:
        raise ValueError(f"steps must be at most the number of polynomials, {len(listed)}, got {steps}.")
    for triple in listed:
        if not isinstance(triple, Sequence) or len(triple) != 3:
            raise ValueError(f"coefficients must be triples (a, b, c), got {triple!r}.")
    return [tuple(exact_upper(finite("coefficients", x)) for x in triple) for triple in listed]  # type: ignore[union-attr]


def _largest_modulus(a: Fraction, b: Fraction, c: Fraction, end: Fraction) -> Fraction:
    """Bound |a s + b s^3 + c s^5| on [0, end]: at the end, and at the critical points, which are enclosed."""
    largest = abs(end * (a + end**2 * (b + end**2 * c)))
    curvature = end * (6 * abs(b) + 20 * abs(c) * end**2)
    for s, width in _critical_points(a, b, c):
        if s - width <= end:
            # the slope vanishes within the width, where the value is that at s up to curvature * width^2 / 2
            s_inside = min(s, end)
            value = abs(s_inside * (a + s_inside**2 * (b + s_inside**2 * c)))
            largest = max(largest, value + 2 * curvature * width**2)
    return largest


def _critical_points(a: Fraction, b: Fraction, c: Fraction) -> list[tuple[Fraction, Fraction]]:
    """Enclose the positive roots of a + 3 b s^2 + 5 c s^4: pairs of a point and a width around it."""
    discriminant = 9 * b * b - 20 * a * c
    if discriminant < 0:
        return []
    root, width = _root(discriminant, Fraction(0))
    q = -(3 * b + (root if b >= 0 else -root)) / 2  # of the two forms of each root, the one without cancellation
    if q == 0:
        return []  # b = 0 and ac = 0: no root but 0
    squares = [(a / q, abs(a) * width / (2 * abs(q) * (abs(q) - width / 2)))]
    if c != 0:
        squares.append((q / (5 * c), width / (10 * abs(c))))
    return [_root(square, spread) for square, spread in squares if square + spread > 0]


def _root(square: Fraction, width: Fraction) -> tuple[Fraction, Fraction]:
    """Enclose the root of a number that lies within a width of ``square``; exact roots have the width 0 if it has."""
    square = max(square, Fraction(0))
    unit = 1 << (160 + max(0, square.denominator.bit_length() - square.numerator.bit_length()))
    below = Fraction(isqrt(square.numerator * unit * unit // square.denominator), unit)
    if below * below == square and width == 0:
        return below, Fraction(0)
    if width == 0:
        return below, Fraction(1, unit)  # what the integer root has lost
    # |sqrt(x) - sqrt(y)| is at most |x - y| / sqrt(x), and at most sqrt(|x - y|)
    spread = (
        width / below if below > 0 else Fraction(isqrt(width.numerator * unit * unit // width.denominator) + 2, unit)
    )
    return below, 2 * spread + Fraction(1, unit)
