r"""The Birkhoff polytope of doubly stochastic matrices, with exact row and column sums of the stored numbers.

**Projection.** By duality the nearest matrix is :math:`X = \max(A + \alpha 1^T + 1 \beta^T, 0)` with multipliers that make all
sums 1; they minimize the convex function :math:`\psi = \tfrac12 \|X\|^2 - \sum_i \alpha_i - \sum_j \beta_j`. A sweep solves
exactly for all :math:`\alpha_i` (each row is a projection onto a simplex), then for all :math:`\beta_j`, so :math:`\psi` never
rises. A Newton step on the entries above 0, of the best length, comes before it and is kept where it helps. As :math:`\psi` is
piecewise quadratic, this ends after finitely many steps, usually ten. For large data few entries are above 0 and Newton is
blind, so the multipliers are followed from smaller multiples of the data.

**Rounding.** On the grid :math:`2^{-p}`, with :math:`p` bits of the dtype, every multiple in :math:`[0, 1]` can be stored. The
entries are rounded down to it; lines whose sum is still above 1, by an error of the projection, are lowered in proportion. What
the sums lack now are integers with one total for rows and columns. Row by row, missing units go to the entries whose columns
have lost the most so far; what does not fit that way is distributed by the northwest-corner rule: with :math:`R_i, C_j` the
prefix sums of the deficits, entry (i, j) gets the length of :math:`[R_{i-1}, R_i] \cap [C_{j-1}, C_j]`. All sums are then
exactly 1, and integers decide about feasibility as for the simplex.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.constraints.apportion import exactly_sums_to
from stableopt.constraints.arguments import check_dims, check_tensor
from stableopt.constraints.base import Constraint
from stableopt.constraints.layout import Matrices, Vectors, carries_derivative, substitute
from stableopt.constraints.sharding import is_sharded, on_whole
from stableopt.constraints.threshold import soft_level

__all__ = ["DoublyStochastic"]

_LARGEST = 2.0**30  # entries beyond it are scaled down: the nearest matrix is then, but for ties, the best assignment
_EASY, _GROWTH = 8.0, 4.0
_MOST_STEPS = 80
_DAMPING = 1e-10
_BISECTIONS = 60


@dataclass(frozen=True)
class DoublyStochastic(Constraint):
    r"""The square matrices with :math:`X_{ij} \ge 0` whose rows and columns all sum to 1, exactly, as stored.

    Args:
        dims: the dimensions of the rows and of the columns; ``None`` for a tensor with exactly two.

    Raises:
        TypeError: if ``dims`` has the wrong type.
        ValueError: if ``dims`` is not a pair.

    Note:
        The nearest matrix is found iteratively, until all sums are within :math:`2 \sqrt n \cdot 10^{-15} \max(1, |A|_{\max})`
        of 1 (or 80 steps, which no data have needed so far), and then rounded to multiples of :math:`2^{-p}`: entries move by
        about one such unit, in float64 by the error of the sums, which may also make zeros positive. The loop looks at the
        numbers, so an accelerator is waited for, and nothing can be traced or mapped over. A matrix with entries beyond
        :math:`2^{30}` is scaled down to that first. A row or column that uses bits below :math:`2^{-60}` counts as infeasible.
        The derivative is the implicit one on the entries above 0; it needs the eigenvalues of a symmetric matrix of order 2n. A
        DTensor is gathered.

    References:
        Li, Sun and Toh, *On the efficient computation of a generalized Jacobian of the projector over the Birkhoff polytope*,
        2020. Altschuler, Weed and Rigollet, *Near-linear time approximation algorithms for optimal transport via Sinkhorn
        iteration*, 2017 (rounding).

    Examples:
        >>> DoublyStochastic().project(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        tensor([[1., 0.],
                [0., 1.]])
        >>> X = DoublyStochastic().project(torch.ones(3, 3, dtype=torch.bfloat16))
        >>> X.double().sum(0), DoublyStochastic().violation(X)
        (tensor([1., 1., 1.], dtype=torch.float64), 0.0)
    """

    dims: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the dimensions."""
        dims = check_dims("DoublyStochastic", self.dims)
        if dims is not None and (not isinstance(dims, tuple) or len(dims) != 2):
            raise ValueError(f"DoublyStochastic needs two dimensions, rows and columns, as dims, got {dims!r}.")
        object.__setattr__(self, "dims", dims)

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest doubly stochastic matrix, rounded to exact sums; NaN for a matrix with NaN or infinity.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if its matrices are not square.
        """
        check_tensor("DoublyStochastic", x)
        if is_sharded(x):
            return on_whole("DoublyStochastic", self.project, x)
        m = self._matrices(x)
        if x.numel() == 0:
            return x
        finite = m.data.detach().isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True)
        outside = ~(self._excess(m) <= 0)
        A = torch.where(finite & outside, m.data, torch.eye(m.data.shape[1], dtype=m.data.dtype, device=x.device))
        X = _nearest(A)
        moved = substitute(X.to(x.dtype), _rounded(X.detach(), x.dtype))
        return m.fold(torch.where(outside, torch.where(finite, moved, math.nan), m.stored))

    def violation(self, x: Tensor) -> float:
        """Return how far a sum is off or an entry negative, at most; 0.0 exactly if all matrices are proved feasible.

        Raises:
            TypeError: if ``x`` is not a real floating tensor.
            ValueError: if its matrices are not square.
        """
        check_tensor("DoublyStochastic", x)
        if is_sharded(x):
            return self.violation(x.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        m = self._matrices(x.detach())
        if x.numel() == 0:
            return 0.0
        return float(self._excess(m).nan_to_num(nan=math.inf, posinf=math.inf).amax())

    def _matrices(self, x: Tensor) -> Matrices:
        m = Matrices("DoublyStochastic", x, self.dims)
        if m.data.shape[1] != m.data.shape[2]:
            raise ValueError(
                f"DoublyStochastic needs square matrices, got {m.data.shape[1]} x {m.data.shape[2]} in shape {tuple(x.shape)}; "
                "for a batch say which two dimensions hold one, as in dims=(-2, -1)."
            )
        return m

    def _excess(self, m: Matrices) -> Tensor:
        """Return how far each matrix is outside, ``(batch, 1, 1)``, 0 only if it is proved feasible."""
        wide, n = m.data.detach(), m.data.shape[1]
        off = torch.maximum((wide.sum(1) - 1.0).abs(), (wide.sum(2) - 1.0).abs()).amax(1)
        amount = torch.maximum(off, -wide.amin((1, 2))).clamp_min(math.ulp(0.0))
        lines = torch.cat((m.stored, m.stored.mT), dim=1).reshape(-1, n)
        proved = exactly_sums_to(lines, 1.0).reshape(-1, 2 * n).all(dim=1)
        return torch.where(proved, 0.0, amount)[:, None, None]


def _nearest(A: Tensor) -> Tensor:
    """Return the projections in float64, with the implicit derivative."""
    top = A.detach().abs().amax((1, 2), keepdim=True)
    A = A * torch.where(top > _LARGEST, _LARGEST / top, 1.0)
    alpha, beta = _multipliers(A.detach())
    S = A.detach() + alpha + beta
    if not carries_derivative(A):
        return S.clamp_min(0.0)
    # One more Newton step on the entries above 0: its derivative is that of the solution.
    mask = (S > 0).double()
    X = mask * (A + alpha + beta)
    n = A.shape[1]
    H = torch.diag_embed(torch.cat((mask.sum(2), mask.sum(1)), dim=1))
    H[:, :n, n:], H[:, n:, :n] = mask, mask.mT
    rest = torch.cat((1.0 - X.sum(2), 1.0 - X.sum(1)), dim=1)[:, :, None]
    step = torch.linalg.pinv(H, rtol=1e-11, hermitian=True) @ rest
    return (mask * (A + alpha + beta + step[:, :n] + step[:, n:].mT)).clamp_min(0.0)


def _multipliers(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multipliers of rows ``(batch, n, 1)`` and columns ``(batch, 1, n)``."""
    top = A.abs().amax((1, 2), keepdim=True)
    beta = torch.zeros_like(A[:, :1])
    scale = _EASY
    while bool((top > scale).any()):  # solve for smaller data first, for which more entries are above 0
        factor = (scale / top).clamp_max(1.0)
        longer = (scale * _GROWTH / top).clamp_max(1.0) / factor
        beta = longer * _improved(A * factor, beta, 1e-2)[1]
        scale *= _GROWTH
    return _improved(A, beta, 2e-15 * math.sqrt(A.shape[1]) * top.clamp_min(1.0))


def _improved(A: Tensor, beta: Tensor, tolerance: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return multipliers, from those of the columns on, until the sums are within the tolerance of 1."""
    alpha, beta = _sweep(A, beta)
    for _ in range(_MOST_STEPS):
        S = A + alpha + beta
        rest = 1.0 - S.clamp_min(0.0).sum(2, keepdim=True)  # the columns are exact after a sweep
        done = rest.abs().amax((1, 2), keepdim=True) <= tolerance
        if bool(done.all()):
            break
        rows, columns = _newton_direction(S, rest)
        moved = _sweep(A, beta + columns)
        halved = _off(A, *moved) < 0.5 * rest.abs().amax((1, 2), keepdim=True)
        # A part that nothing holds moves any distance for free, until the digits of the rest are lost.
        near = columns.abs().amax(2, keepdim=True) <= 1.0 + S.abs().amax((1, 2), keepdim=True)
        better = near & halved & _not_above(_dual(A, *moved), _dual(A, alpha, beta))
        if not bool((better | done).all()):
            moved = _cautious(A, beta, moved, better, beta + _best_length(S, rows, columns) * columns)
        alpha, beta = (torch.where(done, old, new) for old, new in zip((alpha, beta), moved, strict=True))
    return alpha, beta


def _cautious(
    A: Tensor, beta: Tensor, bold: tuple[Tensor, Tensor], better: Tensor, measured: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a bold step where it was good, else the better one of a step of the best length and none, all with a sweep."""
    swept, stepped = _sweep(A, beta), _sweep(A, measured)
    level = _dual(A, *swept)
    halved = (_off(A, *stepped) < 0.5 * _off(A, *swept)) & _not_above(_dual(A, *stepped), level)
    lower = halved | (_dual(A, *stepped) <= level)
    chosen = [torch.where(better, b, torch.where(lower, m, s)) for b, m, s in zip(bold, stepped, swept, strict=True)]
    return chosen[0], chosen[1]


def _sweep(A: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best row multipliers for given ones of the columns, then the best of the columns for these."""
    alpha = -_levels(A + beta)
    return alpha, -_levels((A + alpha).mT).mT


def _levels(lines: Tensor) -> Tensor:
    """Return the levels of the projections of all rows onto the simplex, ``(batch, n, 1)``."""
    rows = lines.reshape(-1, lines.shape[2])
    return soft_level(Vectors("DoublyStochastic", rows, 1), rows, None, 1.0).theta.reshape(lines.shape[0], -1, 1)


def _newton_direction(S: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the changes of the multipliers that would make all sums 1 if the entries above 0 stayed the same."""
    mask = (S > 0).double()
    count = mask.sum(2, keepdim=True).clamp_min(1.0)
    schur = torch.diag_embed(mask.sum(1)) - mask.mT @ (mask / count)
    schur = schur + _DAMPING * torch.eye(
        S.shape[1], dtype=S.dtype, device=S.device
    )  # a shift of a part changes nothing
    columns = torch.linalg.solve_ex(schur, -(mask.mT @ (rest / count)))[0]
    columns = torch.where(columns.isfinite(), columns, 0.0)
    return (rest - mask @ columns) / count, columns.mT


def _best_length(S: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the length at which the dual function is smallest along a direction.

    The entries above 0 may fall into parts with more rows than columns, which no multipliers balance. Then the direction
    shifts these parts against each other, and the length says how far until another entry counts.
    """
    size = torch.maximum(rows.abs(), columns.abs().mT).amax(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    slope = (rows + columns) / size
    needed = (rows.sum(1, keepdim=True) + columns.sum(2, keepdim=True)) / size
    low, high = torch.zeros_like(size), 4.0 * (S.abs().amax((1, 2), keepdim=True) + 1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        falls = ((S + middle * slope).clamp_min(0.0) * slope).sum((1, 2), keepdim=True) < needed
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    return low / size


def _dual(A: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    squares = (A + alpha + beta).clamp_min(0.0).square().sum((1, 2), keepdim=True)
    return 0.5 * squares - alpha.sum(1, keepdim=True) - beta.sum(2, keepdim=True)


def _not_above(new: Tensor, old: Tensor) -> Tensor:
    """Return whether one value of the dual function is not above another, but for rounding."""
    return new <= old + 1e-13 * (1.0 + old.abs())


def _off(A: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return ((A + alpha + beta).clamp_min(0.0).sum(2, keepdim=True) - 1.0).abs().amax((1, 2), keepdim=True)


def _rounded(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices of a dtype near ``X`` with exact sums."""
    one = round(2.0 / torch.finfo(dtype).eps)
    units = X * float(one)
    k = _lowered(_lowered(units.floor().to(torch.int64), 2, one), 1, one)
    k = _raised(k, units - k, one)
    rows, columns = (one - k.sum(2)).cumsum(1), (one - k.sum(1)).cumsum(1)
    before_rows, before_columns = (torch.cat((torch.zeros_like(t[:, :1]), t[:, :-1]), dim=1) for t in (rows, columns))
    ends = torch.minimum(rows[:, :, None], columns[:, None, :])
    starts = torch.maximum(before_rows[:, :, None], before_columns[:, None, :])
    return ((k + (ends - starts).clamp_min(0)).double() / one).to(dtype)


def _lowered(k: Tensor, dim: int, one: int) -> Tensor:
    """Return integers of which those in lines that sum to more than ``one`` are lowered in proportion, rounded up."""
    total = k.sum(dim, keepdim=True)
    over = (total - one).clamp_min(0)
    cut = (k.double() * (over.double() / total.clamp_min(1).double())).to(torch.int64) + 1
    return torch.where(over > 0, k - torch.minimum(cut, k), k)


def _raised(k: Tensor, lost: Tensor, one: int) -> Tensor:
    """Return integers of which some that lost a part of a unit are raised by one, so that no sum exceeds ``one``."""
    rows, columns = one - k.sum(2, keepdim=True), one - k.sum(1)
    owed = torch.zeros_like(columns, dtype=lost.dtype)  # what each column has lost so far, less what it got back
    raised = []
    for i in range(k.shape[1]):
        owed = owed + lost[:, i]
        allowed = (lost[:, i] > 0) & (columns > 0)
        rank = torch.where(allowed, owed, -math.inf).argsort(dim=1, descending=True).argsort(dim=1)
        up = allowed & (rank < rows[:, i])
        columns, owed = columns - up.long(), owed - up.double()
        raised.append(k[:, i] + up)
    return torch.stack(raised, dim=1)
