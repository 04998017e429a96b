r"""The way back to the orthogonal matrices after a small step, by a few products and with a proof.

Let :math:`X` be tall (a wide matrix is transposed) with :math:`E = I - X^\top X`, :math:`\|E\|_2 \le \delta < 1`. Its polar factor,
the nearest matrix with orthonormal columns, is :math:`X (I - E)^{-1/2}`. Cut the binomial series after degree :math:`d`:

.. math:: Y = X p_d(E), \qquad p_d(e) = \sum_{k=0}^{d} a_k e^k, \quad a_k = \binom{2k}{k} 4^{-k}
          \quad (1, \tfrac12, \tfrac38, \tfrac5{16}, \tfrac{35}{128}).

**Theorem.** Y has the same polar factor as X, and :math:`\|I - Y^\top Y\|_2 \le \delta^{d+1}`, so that Y is nearer to it than
:math:`\delta^{d+1}` in the spectral norm. For :math:`d = 1` this is the step of Newton and Schulz with its quadratic convergence.

*Proof.* X and p_d(E) have common singular vectors, so the eigenvalues of :math:`I - Y^\top Y` are
:math:`r_d(e) = 1 - (1 - e) p_d(e)^2` at those of E. From :math:`2(k+1)a_{k+1} = (2k+1)a_k` all coefficients of
:math:`p_d - 2(1-e)p_d'` vanish but the last, and

.. math:: r_d'(e) = p_d\,(p_d - 2(1-e)\,p_d') = (2d+1)\,a_d\, e^d\, p_d(e).

With :math:`r_d(0) = 0`, the coefficients of :math:`r_d` are therefore nonnegative and begin at :math:`e^{d+1}`; their sum is
:math:`r_d(1) = 1`. Hence :math:`|r_d(e)| \le r_d(\delta) \le \delta^{d+1}`. On :math:`[-1, 1]` one has :math:`p_d > 0` (for
:math:`e < 0` the terms alternate and shrink), so the singular values stay positive, which fixes the polar factor; and
:math:`|\sigma - 1| \le |\sigma^2 - 1|`. After j rounds the residual is :math:`\delta^{(d+1)^j}` at most. ∎

That is exact arithmetic. What is promised about the stored numbers is proved afterwards: one more Gram matrix, in float64, of the
matrix as it is stored, and a Cholesky factorization (:mod:`stableopt.linalg.below`) prove its norm; the same Gram matrix bounds the
residual. With the degree 4 these are five products: :math:`X^\top X`, :math:`E^2`, one of polynomials of E, :math:`X(\cdot)`, and
the proof. The two Gram matrices are float64; the others only shape a correction of size :math:`\delta`, so float32 is enough for
them. With TF32 the result is still a proved member, but off the *nearest* one by the rounding of the correction, about
:math:`2^{-11}\delta`. The residual is measured anew in each step and starts from nothing, so it cannot accumulate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.linalg.below import relative_slack
from stableopt.linalg.proved import gamma

__all__ = ["orthogonality_residual", "polar_retraction", "stated_tolerance"]

_SERIES = (0.5, 0.375, 0.3125, 0.2734375)  # a_1, a_2, a_3, a_4
_REACH = 0.9  # of the norm of E; farther away the exact projection is as good
_ROUNDS = 5
_HOPELESS = 2.0**10  # times the target: the bound of the norm of E is too large by the fourth root of the size
_RANGE = 100  # radii within 2^±100: nothing overflows, and what underflows is far below the slack
_BLOCK_COLUMNS = 512
_HAIR = 2.0**-48
_U = 2.0**-53


@torch.no_grad()
def polar_retraction(x: Tensor, radius: float = 1.0) -> Tensor | None:
    r"""Return a stored matrix next to the nearest one with :math:`W^\top W = r^2 I`, with proved norm at most r, if x is near.

    .. math:: W = \operatorname{round}\bigl((1 - s)\, X p_d(E)\bigr), \qquad E = I - X^\top X / r^2,

    where s is about the precision of the dtype, so that the proof of :math:`\|W\|_2 \le r` succeeds. The degree d is the smallest
    of 0, 1, 2, 4 whose residual :math:`\delta^{d+1}` is below that precision, with a bound :math:`\delta` of :math:`\|E\|_2`; on a
    GPU it is always 4, because choosing would wait for the device. After the last round the residual may also be a few
    dozen units of the dtype, if that is within what :class:`~stableopt.constraints.Orthogonal` allows.

    Args:
        x: matrix of shape ``(m, n)``, float64, float32, bfloat16 or float16; never changed. Wide ones get orthonormal rows.
        radius: :math:`r > 0`.

    Returns:
        The matrix, contiguous; ``x`` itself if it is one already; None if x is so far away (:math:`\delta > 0.9`, NaN, infinite) or
        so unfortunately rounded that nothing was proved: then take the exact projection.

    Note:
        On a CPU the cost of a step with :math:`\delta` up to 0.03 (float32) is 2 to 5 products, with larger ones another round of
        2 to 4. On a GPU everything runs there, and for such a step one transfer of a few numbers decides; the proof then
        assumes that the float64 products of the device are conventional, too, which holds for those of cuBLAS unless their
        emulation was switched on. :func:`stableopt.linalg.spectral_norm` proves the norm on the CPU.

    References:
        Kovarik, *Some iterative methods for improving orthonormality*, 1970; Björck and Bowie, *An iterative algorithm for
        computing the best estimate of an orthogonal matrix*, 1971 (the series); Higham, *Functions of Matrices*, 2008, chapter 8.

    Examples:
        >>> W = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0]
        >>> V = polar_retraction(W + 0.01 * torch.randn(6, 3, dtype=torch.float64))
        >>> orthogonality_residual(V) < 1e-12, polar_retraction(V) is V, polar_retraction(3 * V) is None
        (True, True, True)
    """
    if x.ndim != 2 or not x.numel() or not 2.0**-_RANGE < radius < 2.0**_RANGE:
        return None
    wide = x.shape[0] < x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        stored = _retracted(x, (x.mT if wide else x).double().contiguous(), radius)
    if stored is None or stored is x:
        return stored
    return (stored.mT if wide else stored).contiguous()


def _retracted(x: Tensor, A: Tensor, radius: float) -> Tensor | None:
    """Return the tall matrix next to A in the dtype of x, x itself if it is one already, or None."""
    eps, hair = torch.finfo(x.dtype).eps, _hair(x)
    target, shrink = max(eps / 8, hair / 2), eps + 2.5 * hair
    tolerance = _kept_tolerance(x)
    for attempt in range(_ROUNDS):
        gram = _Gram(A, radius)
        near = None
        if not (x.is_cuda and attempt == 0):
            near = gram.facts()
            if attempt == 0 and gram.belongs(near, 0.0, tolerance):
                return x
        degree = 4 if near is None else _degree(near.residual, target)
        correction, root = gram.correction(degree, torch.float64 if x.dtype == torch.float64 else torch.float32)
        A = A + correction
        if near is not None and degree == 4:
            distance = min(near.residual, float(root))
            if not distance <= _REACH:
                return None
            if distance**5 > _HOPELESS * target:  # another round is needed, and no proof before it
                continue
        stored = (A * (1.0 - shrink)).to(x.dtype)
        proof = _Gram(stored.double(), radius)
        read = [root, proof.exceeds(hair), *proof.numbers(), *([] if near else gram.numbers())]
        distance, exceeds, *rest = torch.stack(read).tolist()  # the one time that this waits for the device
        if near is None:
            near = gram.facts(rest[len(rest) // 2 :])
            if gram.belongs(near, 0.0, tolerance):
                return x
        distance = min(near.residual, distance)
        if not distance <= _REACH:
            return None
        found = proof.facts(rest[: len(_Gram.NUMBERS)])
        if exceeds == 0.0 and proof.is_close(found, tolerance - relative_slack(*x.shape)):
            return stored
        if distance ** (degree + 1) <= target:  # it was the rounding that expands
            shrink *= 2.0
    return None


@torch.no_grad()
def orthogonality_residual(x: Tensor, radius: float = 1.0) -> float:
    r"""Bound :math:`\|W^\top W / r^2 - I\|_2` of the stored matrix from above, by a Frobenius norm with all rounding counted.

    Args:
        x: matrix of shape ``(m, n)``; of a wide one :math:`WW^\top` is taken. The proof runs on the CPU.
        radius: :math:`r > 0`.

    Returns:
        A bound :math:`\rho`, so that all singular values lie in :math:`r\sqrt{1 \pm \rho}`; NaN or infinity for such a matrix.

    Raises:
        ValueError: if ``x`` does not have two dimensions, or the radius is not within :math:`2^{\pm 100}`.

    Examples:
        >>> orthogonality_residual(torch.eye(3)) < 1e-14, orthogonality_residual(2 * torch.eye(3), 2.0) < 1e-14
        (True, True)
        >>> 3.0 <= orthogonality_residual(2 * torch.eye(3)) < 3.0 + 1e-13
        True
    """
    if x.ndim != 2:
        raise ValueError(f"orthogonality_residual needs a matrix of shape (m, n), got shape {tuple(x.shape)}.")
    if not 2.0**-_RANGE < radius < 2.0**_RANGE:
        raise ValueError(f"orthogonality_residual needs a radius between 2^-{_RANGE} and 2^{_RANGE}, got {radius!r}.")
    if not x.numel():
        return 0.0
    return _Gram((x.mT if x.shape[0] < x.shape[1] else x).double().cpu().contiguous(), radius).facts().residual


def stated_tolerance(x: Tensor) -> float:
    r"""Return within which distance of 1 the squared singular values of an orthogonal matrix may lie, see :class:`Orthogonal`.

    Examples:
        >>> stated_tolerance(torch.zeros(2, 2, dtype=torch.float64)) < 1e-13
        True
    """
    stored = torch.finfo(x.dtype).eps
    computed = min(stored, torch.finfo(torch.float32).eps)
    m, n = x.shape
    worst = min(4.0 * stored * math.sqrt(max(m, n)), 0.25)
    return worst + 8.0 * computed * max(m, n) + 8.0 * relative_slack(m, n)


def _kept_tolerance(x: Tensor) -> float:
    """Return within which distance a matrix is returned as it is: what rounding explains, without room for a calculation."""
    eps = torch.finfo(x.dtype).eps
    rounding = 4.0 * eps * math.sqrt(max(x.shape)) + 32.0 * eps + 16.0 * relative_slack(*x.shape)
    return min(stated_tolerance(x), rounding)


def _hair(x: Tensor) -> float:
    """Return the relative distance from the radius at which every other proof succeeds, too."""
    return max(_HAIR, relative_slack(*x.shape))


def _degree(delta: float, target: float) -> int:
    """Return the smallest degree whose residual reaches the target; 4 if none does."""
    return next((d for d in (0, 1, 2) if delta ** (d + 1) <= target), 4)


@dataclass(frozen=True)
class _Facts:
    """What the numbers of a Gram matrix prove.

    Args:
        residual: an upper bound of the norm of ``A.T A / r**2 - I``; infinite or NaN for such a matrix.
        top: the largest diagonal entry of ``A.T A / r**2``, which its norm exceeds, up to rounding.
    """

    residual: float
    top: float


class _Gram:
    r"""The Gram matrix :math:`G \approx A^\top A` of a tall float64 matrix on its device, and what it proves.

    The computed G differs from the exact one by at most :math:`\gamma_m \|A\|_F^2` in norm.
    """

    NUMBERS = ("trace", "top", "spread")

    def __init__(self, A: Tensor, radius: float) -> None:
        self.A, self.square = A, radius * radius
        n = A.shape[1]
        if A.is_cuda or n <= _BLOCK_COLUMNS:
            self.G = A.mT @ A
            return
        self.G = A.new_empty(n, n)  # block columns of the lower triangle, mirrored: that saves up to half of the work
        for start in range(0, n, _BLOCK_COLUMNS):
            stop = min(start + _BLOCK_COLUMNS, n)
            self.G[start:, start:stop] = A[:, start:].mT @ A[:, start:stop]
            self.G[start:stop, stop:] = self.G[stop:, start:stop].mT

    def numbers(self) -> tuple[Tensor, ...]:
        """Return trace, largest diagonal entry and distance from the nearest multiple of the identity, of G over r squared."""
        diagonal = self.G.diagonal() / self.square
        mean = diagonal.mean()
        apart = self.G / self.square
        apart.diagonal().sub_(mean)
        return diagonal.sum(), diagonal.max(), torch.linalg.vector_norm(apart)

    def facts(self, numbers: list[float] | None = None) -> _Facts:
        r"""Bound the residual from above by :math:`\|G - tI\|_F + |t - 1|` and all rounding.

        Each entry of the difference is off by 3u of the entry of G, which together is 3u of the trace; sums and norms are off by
        :math:`\gamma_{n^2}`, the mean by n + 2 roundings, and the square of the radius by one.
        """
        trace, top, spread = torch.stack(self.numbers()).tolist() if numbers is None else numbers
        m, n = self.A.shape
        size = trace * (1.0 + gamma(m + n + 8))
        computed = spread * (1.0 + gamma(n * n + 8)) + abs(trace / n - 1.0)
        rounding = (gamma(m) + (n + 16) * _U) * size + 8.0 * _U
        return _Facts((computed + rounding) * (1.0 + 8.0 * _U), top)

    def correction(self, degree: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        r"""Return :math:`A (p_d(E) - I)`, and a bound of the norm of E that needs :math:`E^2`; infinity without it.

        The bound is an estimate only in that its rounding is not counted: it decides what is tried, not what is true.
        """
        E = self.G / -self.square
        E.diagonal().add_(1.0)
        E, a = E.to(dtype), _SERIES
        nothing = E.new_full((), math.inf, dtype=torch.float64)
        if degree == 0:
            return self.A.new_zeros(()), nothing
        if degree == 1:
            return (self.A.to(dtype) @ (a[0] * E)).double(), nothing
        square = E @ E
        if degree == 2:
            series = a[0] * E + a[1] * square
        else:
            inner = a[2] * E + a[3] * square
            inner.diagonal().add_(a[1])
            series = (square @ inner).add_(E, alpha=a[0])
        root = torch.linalg.vector_norm(square.double()).sqrt()
        return (self.A.to(dtype) @ series).double(), root

    def belongs(self, facts: _Facts, hair: float, tolerance: float) -> bool:
        """Return whether the matrix is proved to be within the radius and close to the set, the cheap refusals first."""
        n = self.A.shape[1]
        return (
            facts.top <= 1.0 + 16.0 * self.A.shape[0] * _U
            and facts.residual <= math.sqrt(n) * tolerance * (1.0 + 2.0**-20)
            and float(self.exceeds(hair)) == 0.0
            and self.is_close(facts, tolerance)
        )

    def exceeds(self, hair: float) -> Tensor:
        r"""Return 0 if :math:`\|A\|_2 \le r (1 - \text{hair})` is proved, else another number."""
        level = self.square * (1.0 - hair) ** 2 * (1.0 - 8.0 * _U)
        return self._is_indefinite(level, sign=-1.0)

    def is_close(self, facts: _Facts, tolerance: float) -> bool:
        r"""Return whether :math:`\sigma_i^2 \ge r^2 (1 - \text{tolerance})` is proved, by the residual or a factorization."""
        if facts.residual <= tolerance:
            return True
        return float(self._is_indefinite(self.square * (1.0 - tolerance) * (1.0 + 8.0 * _U), sign=1.0)) == 0.0

    def _is_indefinite(self, level: float, sign: float) -> Tensor:
        r"""Return 0 if ``sign * (A.T A - level * I)`` is proved to be positive semidefinite, as :mod:`stableopt.linalg.below` does.

        With c the sum of all errors, the computed ``M = sign * (G - level I) - c I`` is factorized. Its factor proves that M is no
        less than :math:`-\gamma / (1 - \gamma) \operatorname{tr}(M)`, G is off by :math:`\gamma_m \|A\|_F^2`, and the diagonal was
        rounded twice.
        """
        m, n = self.A.shape
        diagonal = self.G.diagonal()
        trace = (sign * (diagonal - level)).clamp_min(0.0).sum() * (1.0 + gamma(n + 8))
        size = diagonal.sum() * (1.0 + gamma(m + n + 8))
        growth = gamma(n + 9)
        largest = diagonal.amax() + level
        c = growth / (1.0 - growth) * trace + gamma(m) * size + 4.0 * _U * largest
        M = self.G * sign
        M.diagonal().sub_(sign * level).sub_(c * (1.0 + 16.0 * _U))
        return torch.linalg.cholesky_ex(M)[1].double()
