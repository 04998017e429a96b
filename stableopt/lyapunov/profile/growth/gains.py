r"""T6 on measured gains: does the coupled representation-parameter system contract, in which weights, and did it really?

One coupled step of a learning system obeys, entry by entry,

.. math:: \begin{pmatrix}\|\delta h^+\|\\ \|\delta\theta^+\|\end{pmatrix} \le
    \begin{pmatrix}a_t & b_t\\ c_t & d_t\end{pmatrix} \begin{pmatrix}\|\delta h\|\\ \|\delta\theta\|\end{pmatrix},

and :math:`V = v_1\|\delta h\| + v_2\|\delta\theta\|` satisfies :math:`V^+ \le r_tV` with
:math:`r_t = \max\!\big((v_1a_t+v_2c_t)/v_1,\ (v_1b_t+v_2d_t)/v_2\big)`. T6 takes the four suprema, which may be attained at
different steps. The *joint* rate does not: it is the least :math:`\max_tr_t` over all weights, never above T6's, and found exactly,
since with :math:`u = v_2/v_1` the one term, :math:`\max_t(a_t+uc_t)`, rises and the other, :math:`\max_t(b_t/u+d_t)`, falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopt.linalg.bound import upper
from stableopt.lyapunov.profile.growth.scaled import HALF_ULP
from stableopt.theory import small_gain_holds, small_gain_radius, small_gain_weights

__all__ = ["CoupledGains", "GainCheck", "coupled_gains"]

Array = NDArray[np.float64]
Verdict = Literal["holds", "triangular", "not excluded", "fails"]


@dataclass(frozen=True)
class GainCheck:
    r"""The energy :math:`V_t = v_1\|\delta h_t\| + v_2\|\delta\theta_t\|` along measured norms.

    Args:
        energies: ``(T + 1,)`` :math:`V_t`.
        violations: how many steps raise V by more than the rate, beyond the rounding of the two sums.
        undominated: how many steps exceed the gains themselves: there the hypothesis of T6 fails, and not its conclusion.
        worst: the largest :math:`V_{t+1}/V_t`, 0 if V vanishes throughout; at most the rate if there is no violation.

    Examples:
        >>> GainCheck(np.array([1.0, 0.5]), violations=0, undominated=0, worst=0.5).holds
        True
    """

    energies: Array
    violations: int
    undominated: int
    worst: float

    @property
    def holds(self) -> bool:
        """Whether no step violates the decay.

        Examples:
            >>> GainCheck(np.array([1.0, 2.0]), violations=1, undominated=1, worst=2.0).holds
            False
        """
        return self.violations == 0


@dataclass(frozen=True)
class CoupledGains:
    r"""The measured gains of a coupled system, T6's verdict on them, and the weights in which it decays.

    All numbers are about the steps that were measured: suprema over more steps can be larger.

    Args:
        a: ``(T,)`` gains of the representation on itself, per step.
        b: ``(T,)`` gains of the parameters on the representation.
        c: ``(T,)`` gains of the representation on the parameters.
        d: ``(T,)`` gains of the parameters on themselves.
        matrix: ``(2, 2)`` the suprema.
        radius: the spectral radius of that matrix, T6's rate.
        verdict: ``holds`` if it is below 1; ``triangular`` if so and b or c vanishes, when it is max(a, d) and no product of
            gains has to be small; ``not excluded`` in place of both for gains that are estimates from below; else ``fails``, which
            the true gains do as well, since the radius rises with each of them.
        weights: :math:`(v_1, v_2)` of T6, positive with the sum 1; NaN if there are none, for a triangular matrix that fails.
        rate: by which V decays per step in these weights: the radius, or the middle between it and 1 for a triangular matrix, whose
            Perron vector may vanish somewhere.
        joint_rate: the least rate over all weights that one V has at every step.
        joint_weights: weights in which V decays by at most the joint rate, up to rounding; NaN if only a limit of weights has it.
        exact: whether the gains are the true ones; else estimates from below, and so are the radius and the rates.

    Examples:
        >>> gains = coupled_gains(a=[0.5, 0.2], b=[0.25, 0.9], c=[0.25, 0.05], d=[0.5, 0.1])
        >>> gains.verdict, round(gains.radius, 4), round(gains.joint_rate, 4)
        ('holds', 0.9743, 0.8148)
    """

    a: Array
    b: Array
    c: Array
    d: Array
    matrix: Array
    radius: float
    verdict: Verdict
    weights: tuple[float, float]
    rate: float
    joint_rate: float
    joint_weights: tuple[float, float]
    exact: bool = True

    @property
    def contracts(self) -> bool:
        """Whether the coupled system decays in one energy: T6 holds, or at least the joint rate is below 1.

        Gains that are estimates from below do not show it: False.

        Examples:
            >>> gains = coupled_gains(a=[0.9, 0.1], b=0.3, c=[0.0, 0.5], d=0.2)
            >>> gains.verdict, round(gains.radius, 4), round(gains.joint_rate, 4)
            ('fails', 1.072, 0.9)
            >>> gains.contracts
            True
        """
        return self.exact and (self.verdict != "fails" or self.joint_rate < 1)

    def check(self, representation: ArrayLike, parameters: ArrayLike, *, joint: bool = False) -> GainCheck:
        r"""Check the decay of V along measured norms.

        Args:
            representation: :math:`\|\delta h_t\| \ge 0`, ``(T + 1,)``.
            parameters: :math:`\|\delta\theta_t\| \ge 0`, ``(T + 1,)``.
            joint: whether to take the joint weights and rate in place of T6's.

        Returns:
            The energies and what violates their decay.

        Raises:
            ValueError: if the sequences do not have T + 1 finite entries >= 0, or there are no weights.

        Examples:
            >>> gains = coupled_gains(a=[0.5], b=[0.25], c=[0.25], d=[0.5])
            >>> gains.check([1.0, 0.75], [1.0, 0.75]).violations, gains.check([1.0, 0.8], [1.0, 0.75]).violations
            (0, 1)
        """
        h, theta = (_sequence(n, x) for n, x in (("representation", representation), ("parameters", parameters)))
        if len(h) != len(self.a) + 1 or len(theta) != len(self.a) + 1:
            raise ValueError(f"{len(self.a)} steps have {len(self.a) + 1} norms, got {len(h)} and {len(theta)}.")
        (v1, v2), rate = (self.joint_weights, self.joint_rate) if joint else (self.weights, self.rate)
        if math.isnan(v1):
            raise ValueError("these gains have no positive weights: there is no energy to check.")
        V = v1 * h + v2 * theta
        allowance = 1 + 16 * HALF_ULP  # products and sums on either side, the rate, and the weights themselves
        exceeding = (h[1:] > (self.a * h[:-1] + self.b * theta[:-1]) * allowance) | (
            theta[1:] > (self.c * h[:-1] + self.d * theta[:-1]) * allowance
        )
        ratios = V[1:][V[:-1] > 0] / V[:-1][V[:-1] > 0]
        worst = math.inf if (V[1:][V[:-1] == 0] > 0).any() else float(ratios.max(initial=0.0))
        return GainCheck(V, int((V[1:] > rate * V[:-1] * allowance).sum()), int(exceeding.sum()), worst)


def coupled_gains(a: ArrayLike, b: ArrayLike, c: ArrayLike, d: ArrayLike, *, exact: bool = True) -> CoupledGains:
    r"""Judge the coupled representation-parameter system by its measured gains.

    Args:
        a: gain of the representation on itself: :math:`\|D_{h_0}h_L\|`, or that of a recurrent cell; per step, or one number.
        b: :math:`\|D_\theta h\|`, the gain of the parameters on the representation.
        c: the gain of the representation on the parameters, 0 if the batch does not depend on it.
        d: :math:`\|D_\theta\theta^+\|`, the gain of the parameters on themselves.
        exact: False for gains that may be estimates from below: they can refute a contraction, and cannot show one.

    Returns:
        The matrix of suprema, its radius, weights and verdict, and the joint rate.

    Raises:
        ValueError: if a gain is negative or not finite, or the lengths differ.

    Examples:
        >>> coupled_gains(a=0.5, b=3.0, c=0.0, d=[0.75, 0.5]).verdict
        'triangular'
        >>> coupled_gains(a=0.5, b=0.5, c=0.5, d=0.5).verdict  # a radius of 1 is no decay
        'fails'
        >>> coupled_gains(a=0.5, b=3.0, c=0.0, d=[0.75, 0.5], exact=False).verdict
        'not excluded'
    """
    A, B, C, D = _gains(a, b, c, d)
    suprema = (float(A.max()), float(B.max()), float(C.max()), float(D.max()))
    radius = float(upper(small_gain_radius(*suprema)))
    holds, triangular = small_gain_holds(*suprema), suprema[1] == 0 or suprema[2] == 0
    verdict: Verdict = (
        "fails" if not holds else "not excluded" if not exact else "triangular" if triangular else "holds"
    )
    rate = (1 + radius) / 2 if triangular and holds else radius
    weights = (math.nan, math.nan)
    if not triangular:
        weights = _perron(*suprema)
    elif holds:
        weights = small_gain_weights(*suprema, rate=rate)
    joint_rate, joint_weights = _joint(A, B, C, D)
    matrix = np.array(suprema).reshape(2, 2)
    return CoupledGains(A, B, C, D, matrix, radius, verdict, weights, rate, joint_rate, joint_weights, exact)


def _gains(*gains: ArrayLike) -> list[Array]:
    arrays = [_sequence(name, np.atleast_1d(x)) for name, x in zip("abcd", gains, strict=True)]
    lengths = {len(x) for x in arrays} - {1}
    if len(lengths) > 1:
        raise ValueError(f"the gains must have one length, or be single numbers, got {[len(x) for x in arrays]}.")
    return [np.broadcast_to(x, (max(lengths, default=1),)) for x in arrays]


def _sequence(name: str, x: ArrayLike) -> Array:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{name} must be finite numbers >= 0, one per step, got {x!r}.")
    return values


def _perron(a: float, b: float, c: float, d: float) -> tuple[float, float]:
    """Return the left Perron vector of a matrix with b, c > 0; each of its two formulas cancels on one side of a = d."""
    half = (a - d) / 2
    root = math.hypot(half, math.sqrt(b) * math.sqrt(c))
    return _weights(b / (root + half) if half > 0 else (root - half) / c)


def _weights(u: float) -> tuple[float, float]:
    return 1 / (1 + u), u / (1 + u) if u < 1 else 1 / (1 + 1 / u)


def _joint(a: Array, b: Array, c: Array, d: Array) -> tuple[float, tuple[float, float]]:
    r"""Return :math:`\inf_u \max(\max_t(a_t+uc_t), \max_t(b_t/u+d_t))`, u > 0, and weights if it is attained.

    If b or c vanishes throughout, one of the two terms is constant, and the infimum is max(a, d): attained unless a gain that only
    u towards an end makes small stands beside one that is equal to it. Else the terms cross exactly once, and bisection goes on
    until no float is left between.
    """
    if not b.any() or not c.any():
        rate = max(float(a.max()), float(d.max()))
        if (b[d >= rate] > 0).any() or (c[a >= rate] > 0).any():
            return rate, (math.nan, math.nan)
        least = max((b[b > 0] / (rate - d[b > 0])).tolist(), default=0.0)
        most = min(((rate - a[c > 0]) / c[c > 0]).tolist(), default=math.inf)
        return rate, _weights(least or (most if math.isfinite(most) else 1.0))

    def larger(u: float) -> tuple[float, bool]:
        rising, falling = float((a + u * c).max()), float((b / u + d).max())
        return max(rising, falling), rising < falling

    left = right = 1.0
    with np.errstate(over="ignore"):
        while not larger(left)[1] and left > 1e-300:
            left /= 2
        while larger(right)[1] and right < 1e300:
            right *= 2
        while left < (u := left + (right - left) / 2) < right:
            left, right = (u, right) if larger(u)[1] else (left, u)
    u = min((left, right), key=lambda u: larger(u)[0])
    return larger(u)[0], _weights(u)
