r"""Proofs that carry over from one training step to the next, so that a projection that has nothing to do costs one pass.

A :class:`ProvedReference` keeps a matrix :math:`W_0` with two proved numbers: :math:`\|W_0\|_2 \le N`, and
:math:`\|W_0 (I - VV^\top)\|_2 \le s` for orthonormal columns :math:`V` that nearly span the leading right singular vectors. For
another matrix :math:`W` with :math:`d = \|W - W_0\|_F`, rounded up,

.. math:: \|W\|_2 \le N + d

is one pass over the numbers. Where that is too coarse, let :math:`V_2` complete :math:`V` to an orthogonal matrix. In these
coordinates

.. math::
    W^\top W = \begin{pmatrix} A & B \\ B^\top & D \end{pmatrix}, \qquad A = (WV)^\top WV, \quad
    BB^\top = E^\top E \text{ with } E = W^\top WV - VA, \quad \|D\|_2 \le (s + d)^2,

and by the Schur complement :math:`\|W\|_2 \le \rho` follows from :math:`s + d < \rho` and

.. math:: \lambda_{\max}\Bigl(A + \frac{E^\top E}{\rho^2 - (s + d)^2}\Bigr) \le \rho^2,

a problem of a few columns. As it uses the gap between :math:`s` and the radius, not the one between :math:`N` and the radius, it
proves matrices that lie close to the sphere. All rounding is counted.

*The result never depends on the history.* A reference only ever answers "proved below, by a relative margin of 1e-6". Such a
matrix is also below for :meth:`SpectralBall.project`, which would have returned it as it is
(:func:`stableopt.linalg.below.relative_slack` is smaller than the margin). Every other matrix goes to that method, which knows
nothing of references. So a run that is interrupted and resumed, without a reference, gives the same numbers; nothing has to be
saved.

In an optimizer the line ``p.copy_(regularizer.prox(reached, step))`` becomes, for a constraint,
``p.copy_(project_tracked(regularizer, p, reached))``; the prox of a set is its projection.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stableopt.constraints.base import Constraint
from stableopt.constraints.deflation import leading_subspace
from stableopt.constraints.sharding import is_sharded
from stableopt.constraints.spectral import SpectralBall, proved_norm
from stableopt.linalg.below import norm_is_below, relative_slack

__all__ = ["ProvedReference", "forget", "project_tracked"]

_MARGIN = 1e-6
_COLUMNS = 16  # of V
_SMALLEST = 64  # smaller matrices are proved anew faster than by V
_U = 2.0**-53


class ProvedReference:
    r"""A matrix whose norm was proved, from which the norms of its neighbors are proved cheaply.

    Attributes:
        norm: proved bound :math:`N` of the norm of the reference; infinite while there is none.
        rest: proved bound :math:`s` of the norm outside the kept subspace; infinite while there is none.

    Note:
        It holds two copies of the matrix at most, and 32 to 128 vectors in float64. It belongs to one radius.

    Examples:
        >>> W, reference = 0.9 * torch.eye(64), ProvedReference()
        >>> reference.proves(W, 1.0), reference.due()
        (False, True)
        >>> reference.renew(W, 1.0)
        True
        >>> reference.proves(W + 1e-3, 1.0), reference.proves(W + 1.0, 1.0)
        (True, False)
    """

    def __init__(self) -> None:
        self.norm = math.inf
        self.rest = math.inf
        self._matrix: Tensor | None = None
        self._space: Tensor | None = None
        self._images: Tensor | None = None
        self._near: Tensor | None = None  # where N was proved: the reference or a later point
        self._spent = False
        self._wait = self._pause = 0

    @torch.no_grad()
    def proves(self, x: Tensor, radius: float) -> bool:
        r"""Return True only if :math:`\|x\|_2 \le (1 - 10^{-6})\,r` is proved from the reference; False means *not proved*.

        Where the subspace was needed, :math:`N` is from then on the norm proved at ``x``; and the subspace grows by the leading
        directions of the drift where that helps.

        Args:
            x: real matrix; of another shape, dtype or device than the reference it is not proved.
            radius: :math:`r`.
        """
        kept = self._matrix
        if kept is None or self._near is None or (kept.shape, kept.dtype, kept.device) != (x.shape, x.dtype, x.device):
            return False
        limit = _limit(x, radius)
        if (self.norm + _distance_upper(x, self._near)) * (1.0 + 4.0 * _U) <= limit:
            self._pause = 0
            return True
        self._spent = True
        drift = _distance_upper(x, kept)
        if self._space is None or not drift <= 8.0 * radius:
            return False
        wide = x.double()
        for enriched in (False, True):
            if enriched:
                self._enrich(wide - kept.double(), drift)
            blocks = _Blocks(wide, self._space)
            self._spent = blocks.inner <= limit * limit
            if not self._spent:  # x is outside, or too near for an answer, whatever the rest
                return False
            for outside in (self._drift_outside, self._gram_outside)[: 1 + enriched]:
                norm = blocks.norm((self.rest + outside(x, blocks, drift)) * (1.0 + 4.0 * _U), limit)
                if norm <= limit:
                    self._near, self.norm = x.detach().clone(), norm
                    self._spent, self._pause = False, 0
                    return True
        return False

    def _enrich(self, D: Tensor, drift: float) -> None:
        """Add to the subspace the leading directions of the drift: what is outside of it can only become smaller by that."""
        V, kept = self._space, self._matrix
        if V is None or kept is None or V.shape[1] >= 4 * _COLUMNS or drift == 0.0:
            return
        narrow = (D / drift).float()
        new = torch.cat([narrow[:2], narrow.mean(dim=0, keepdim=True), narrow.abs().mean(dim=0, keepdim=True)]).mT
        for _ in range(4):
            new = torch.linalg.qr(narrow.mT @ (narrow @ new))[0]
        wider = torch.linalg.qr(torch.cat([V, new.double()], dim=1))[0]
        wider = torch.linalg.qr(wider)[0]
        base = kept.double()
        self._space, self._images = wider, base @ wider
        n, k = wider.shape
        lost = 1.01 * float(torch.linalg.matrix_norm(V - wider @ (wider.mT @ V)))
        skew = 1.01 * float(torch.linalg.matrix_norm(wider.mT @ wider - torch.eye(k, dtype=wider.dtype)))
        size = 1.01 * float(torch.linalg.matrix_norm(base))
        self.rest += 3.0 * (lost + skew + 4.0 * (n + k + 8) * k * _U) * size

    def _drift_outside(self, x: Tensor, blocks: _Blocks, drift: float) -> float:
        r"""Bound :math:`\|(x - W_0)(I - VV^\top)\|_F` from above, by Pythagoras."""
        if self._images is None:
            return drift
        apart = float(torch.linalg.matrix_norm(blocks.X - self._images)) * (1.0 - 2.0**-30)
        inside = max(0.0, apart - 2.1 * blocks.error_of_images - 2.0**-40 * drift)
        return math.sqrt(max(drift * drift * (1.0 + 8.0 * _U) - inside * inside, 0.0)) * (1.0 + 2.0**-40)

    def _gram_outside(self, x: Tensor, blocks: _Blocks, drift: float) -> float:
        r"""Bound :math:`\|D\|_2 \le \|D^\top D\|_F^{1/2}`, :math:`D = (x - W_0)(I - VV^\top)`, by a product in float32."""
        kept, V = self._matrix, self._space
        if kept is None or V is None or drift == 0.0 or max(x.shape) > 2**16:
            return math.inf
        D = x.double() - kept.double()
        D = (D - (D @ V) @ V.mT) / drift  # of norm about 1
        error = 2.0 * (V.shape[0] + V.shape[1] + 8) * V.shape[1] * _U + 3.0 * blocks.skew
        size = float(torch.linalg.matrix_norm(D)) + error
        narrow = D.float() if D.shape[0] >= D.shape[1] else D.mT.float()
        gram = float(torch.linalg.matrix_norm((narrow.mT @ narrow).double()))
        # the product is off by gamma_m of float32 times size^2, D by its rounding to float32, and all by underflow
        square = gram * (1.0 + 2.0**-40) + 2.0 * (narrow.shape[0] + 8) * 2.0**-24 * size * size + 2.0**-60
        return drift * (math.sqrt(square) * (1.0 + 2.0**-40) + error + 2.0**-23 * size)

    def due(self) -> bool:
        """Return whether it is worth while to renew the reference; count how often that was asked.

        It is where there is none, or it failed to prove a point that may be inside. After a failed renewal the pauses double, up
        to 64, until a point inside is seen again.
        """
        if self._matrix is not None and not self._spent:
            return False
        self._wait -= 1
        return self._wait < 0

    def seen_inside(self) -> None:
        """Note that a point lies in the ball that the reference did not prove: a new one would have."""
        self._wait = self._pause = 0

    @torch.no_grad()
    def renew(self, x: Tensor, radius: float) -> bool:
        r"""Make a matrix the reference, by proofs of its own.

        Args:
            x: real matrix.
            radius: :math:`r > 0`.

        Returns:
            Whether :math:`\|x\|_2 \le (1 - 10^{-6})\,r` is proved. If not, there is no reference.
        """
        self._pause = min(2 * self._pause + 1, 64)
        self._wait, self._spent = self._pause, False
        self._matrix, self._space, self._images, self.norm, self.rest = None, None, None, math.inf, math.inf
        wide, limit = x.detach().double(), _limit(x, radius)
        if not math.isfinite(float(wide.abs().amax())):
            return False
        if min(x.shape) < _SMALLEST:
            self.norm = proved_norm(wide)
        elif x.device.type == "cpu":
            self._learn_subspace(wide, limit)
        else:
            self.norm = next((t for t in (0.5 * limit, 0.9 * limit, limit) if norm_is_below(wide, t)), math.inf)
        if not self.norm <= limit:
            return False
        self._matrix = self._near = x.detach().clone()
        self._wait = self._pause = 0
        return True

    def _learn_subspace(self, W: Tensor, limit: float) -> None:
        V, values = leading_subspace(W / limit, _COLUMNS)
        if not values[0] < 1.0:  # a lower bound, up to the rounding of float32: nothing to be proved here
            return
        blocks = _Blocks(W, V)
        outside = W - blocks.X @ V.mT
        # of the two products and the difference, and for the orthonormal matrix that V stands for
        rounding = (16.0 * (W.shape[1] + V.shape[1] + 8) * V.shape[1] * _U + 3.0 * blocks.skew) * blocks.size
        for part in (
            0.3,
            0.7,
        ):  # how far from the estimate to the limit; a smaller one is worth more and proved less often
            level = limit * (values[-1] + part * (1.0 - values[-1]))
            if norm_is_below(outside, level):
                self._space, self._images, self.rest = V, blocks.X, (level + rounding) * (1.0 + 4.0 * _U)
                self.norm = blocks.norm(self.rest, limit)
                return


def project_tracked(constraint: Constraint, key: Tensor, x: Tensor) -> Tensor:
    """Return ``constraint.project(x)``, bit for bit, without its work where an earlier proof for the same parameter carries over.

    Args:
        constraint: any set; only for the spectral ball there is something to carry over.
        key: the parameter to which the point belongs; what is remembered lives as long as it does, and is not saved with it.
        x: the point.

    Raises:
        TypeError: as ``constraint.project``.
        ValueError: as ``constraint.project``.

    Examples:
        >>> W = torch.nn.Parameter(0.5 * torch.eye(3))
        >>> project_tracked(SpectralBall(1.0), W, W.detach())
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.5000]])
    """
    if not _trackable(constraint, x):
        return constraint.project(x)
    references = _REFERENCES.setdefault(key, {})
    reference = references.setdefault(constraint, ProvedReference())
    radius = constraint.radius  # pyright: ignore[reportAttributeAccessIssue]  _trackable asked for a SpectralBall
    if reference.proves(x, radius):
        return x
    if reference.due() and reference.renew(x, radius):
        return x
    projected = constraint.project(x)
    if projected is x:
        reference.seen_inside()
    return projected


def forget(key: Tensor) -> None:
    """Drop what is remembered about a parameter, which frees the memory; projections stay what they are.

    Examples:
        >>> forget(torch.zeros(2, 2))
    """
    if key in _REFERENCES:
        del _REFERENCES[key]


_REFERENCES: Any = WeakTensorKeyDictionary()


def _trackable(constraint: Constraint, x: Tensor) -> bool:
    return (
        isinstance(constraint, SpectralBall)
        and x.ndim == 2
        and x.dtype.is_floating_point
        and x.numel() > 0
        and not is_sharded(x)
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def _limit(x: Tensor, radius: float) -> float:
    """Return the largest norm that is answered for: at it, a proof from nothing succeeds for certain."""
    return radius * (1.0 - max(_MARGIN, 4.0 * relative_slack(*x.shape)))


def _distance_upper(x: Tensor, y: Tensor) -> float:
    r"""Bound :math:`\|x - y\|_F` from above, in the precision of the storage (at least float32) and on its device; NaN for NaN.

    With the unit roundoff u of that precision each difference is off by u relative, and the norm of a row of n by
    :math:`(n/2 + 2) u`; what underflows, even if it is flushed to zero, adds at most the root of the smallest normal per entry.
    """
    half = x.dtype in {torch.float16, torch.bfloat16}
    apart = x.float() - y.float() if half else x - y
    if apart.dtype == torch.float32 and apart.shape[1] > 2**18:
        apart = x.double() - y.double()
    info = torch.finfo(apart.dtype)
    rows = torch.linalg.vector_norm(apart, dim=1)
    total = float(torch.linalg.vector_norm(rows.double()))
    growth = (apart.shape[1] + 16) * info.eps + (apart.shape[0] + 16) * 2.0 * _U
    return total * (1.0 + growth) + 4.0 * math.sqrt(apart.numel() * info.smallest_normal)


class _Blocks:
    r"""The blocks of :math:`W^\top W` that a few orthonormal columns V see, in float64 with bounds of their errors.

    V stands for the orthonormal matrix nearest to it, which is within :math:`\|V^\top V - I\|_F`.

    Attributes:
        X: :math:`WV`.
        inner: an estimate of :math:`\lambda_{\max}(A)`, which is at most the square of the norm.
        size: a bound of the Frobenius norm of W.
        skew: a bound of the distance of V from an orthonormal matrix.
        error_of_images: a bound of the error of X in the Frobenius norm.
    """

    def __init__(self, W: Tensor, V: Tensor) -> None:
        m, n = W.shape
        k = V.shape[1]
        self.X = X = W @ V
        self._A = A = X.mT @ X
        E = W.mT @ X - V @ A
        self._coupling = E.mT @ E
        self.inner = float(torch.linalg.eigvalsh(A)[-1])
        # 1.01 has room to spare for the roundings of these few numbers
        w, x, a, e, skew = (
            1.01 * float(torch.linalg.matrix_norm(t)) for t in (W, X, A, E, V.mT @ V - torch.eye(k, dtype=V.dtype))
        )
        self.size, self.skew = w, skew + 2.0 * (n + 8) * k * _U
        g = 2.0 * (m + n + k + 16) * _U
        of_x = (g * math.sqrt(k) + self.skew) * w
        of_a = 2.0 * x * of_x + of_x * of_x + g * x * x
        of_e = w * of_x + g * w * x + math.sqrt(k) * (of_a + g * a) + self.skew * a
        self.error_of_images = of_x
        self._error, self._error_of_coupling = of_a, 2.0 * e * of_e + of_e * of_e + g * e * e

    def norm(self, rest: float, limit: float) -> float:
        """Return a proved bound of the norm of W, at most ``limit``, given that of its part outside V; infinity if none."""
        if not self._bounded_by(limit, rest):
            return math.inf
        low, high = rest, limit
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if self._bounded_by(middle, rest) else (middle, high)
        return high

    def _bounded_by(self, rho: float, rest: float) -> bool:
        """Return whether the Schur complement proves that the norm is at most rho."""
        gap = (rho - rest) * (rho + rest) * (1.0 - 8.0 * _U)
        if not gap > 0.0:
            return False
        top = float(torch.linalg.eigvalsh(self._A + self._coupling / gap)[-1])
        size = float(torch.linalg.matrix_norm(self._A) + torch.linalg.matrix_norm(self._coupling) / gap)
        error = self._error + self._error_of_coupling / gap + 32.0 * len(self._A) ** 2 * _U * size
        return (top + error) * (1.0 + 8.0 * _U) <= rho * rho * (1.0 - 4.0 * _U)
