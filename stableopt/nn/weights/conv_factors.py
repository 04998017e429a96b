r"""Orthogonal convolutions as products of small factors: their product and their factorization.

A kernel without stride is written as a polynomial of matrices in one variable :math:`z_i` per axis. The product

.. math:: K(z) = H \prod_{i} \prod_{j=1}^{k_i - 1} \bigl((I - Z_{ij}) + z_i Z_{ij}\bigr)

of a matrix :math:`H` with :math:`HH^\top = I` and orthogonal projectors :math:`Z_{ij}` has :math:`k_i` taps along the axis
:math:`i` and satisfies :math:`\hat K(\omega)\hat K(\omega)^* = I` for every frequency, since :math:`(I - Z) + e^{i\omega}Z` is
unitary. If :math:`Z` is only symmetric with spectrum in :math:`[0, 1]` each factor is an average of :math:`I` and
:math:`e^{i\omega}I` in the eigenbasis, hence still at most 1, and so is the product: nothing that goes wrong with a projector can
make the kernel expand.

A kernel with stride is the same product after the reduction of :mod:`stableopt.nn.weights.conv_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt.nn.weights.conv_layout import Layout

__all__ = ["Factors", "factorize", "orthonormal_rows", "product"]

_MORE_SWEEPS = 100


@dataclass(frozen=True)
class Factors:
    """The matrices of a product.

    Args:
        H: matrices with orthonormal rows, ``(groups, rows, columns)``.
        free: projectors ``(groups, number, columns, columns)``, axis after axis, or None.
        bound: projectors of the restricted factors, ``(groups, n, n)`` each, in the order of ``Layout.blocks``.
    """

    H: Tensor
    free: Tensor | None
    bound: tuple[Tensor, ...]


def orthonormal_rows(A: Tensor, passes: int = 1) -> Tensor:
    r"""Return matrices with the row space of ``A`` and orthonormal rows; at most 1 in norm whatever ``A`` is.

    :math:`Q_0 = L^{-1}A` with :math:`LL^\top = AA^\top + \varepsilon \operatorname{tr}(AA^\top) I` has the singular values
    :math:`\sigma/\sqrt{\sigma^2 + \dots} < 1`, and a second pass brings those up that were too small for the first. Then Björck's
    step :math:`Q \mapsto \tfrac32 Q - \tfrac12 QQ^\top Q` brings them to 1. It maps [0, 2] into [0, 1], so it also undoes what the
    rounding of an ill-conditioned :math:`L` did.

    Args:
        A: batch of shape ``(b, r, n)`` with ``r <= n``.
        passes: factorizations; 2 for square matrices, whose smallest singular value often is very small.

    Examples:
        >>> Q = orthonormal_rows(torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)))
        >>> bool((Q[0] @ Q[0].mT - torch.eye(3)).abs().max() < 1e-5)
        True
    """
    with torch.no_grad():  # the result does not depend on the scale of A, so no derivative is lost
        size = torch.linalg.vector_norm(A, ord=torch.inf, dim=(-2, -1), keepdim=True)
        scale = torch.where(size > 0, size, 1.0).reciprocal()
    Q = A * scale
    eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    for _ in range(passes):
        trace = torch.linalg.vector_norm(Q.detach(), dim=(-2, -1), keepdim=True).square()
        shift = eye * torch.where(
            trace < 0.5, 1.0, 8.0 * torch.finfo(A.dtype).eps * trace
        )  # 1: for zero, a mild derivative
        L = torch.linalg.cholesky_ex(torch.baddbmm(shift, Q, Q.mT)).L
        Q = torch.linalg.solve_triangular(L, Q, upper=False)
    return torch.baddbmm(Q, Q @ Q.mT, Q, beta=1.5, alpha=-0.5)


def product(layout: Layout, factors: Factors) -> Tensor:
    """Multiply the factors: the kernel polynomial of shape ``(groups, rows, *taps, columns)``.

    Examples:
        >>> layout = Layout(1, 2, 2, (2,), (1,), (1,))
        >>> Z = torch.diag(torch.tensor([1.0, 0.0]))
        >>> product(layout, Factors(torch.eye(2)[None], Z[None, None], ()))[0, :, 1]
        tensor([[1., 0.],
                [0., 0.]])
    """
    groups, rows, columns = factors.H.shape
    K = factors.H
    shape = [groups, rows]
    for X in _axis_kernels(layout, factors.free):
        if X is not None:
            taps = X.shape[1]
            K = K.reshape(groups, -1, columns) @ X.transpose(1, 2).reshape(groups, columns, taps * columns)
            shape.append(taps)
        else:
            shape.append(1)
    K = K.reshape(*shape, columns)
    used = 0
    for axis, spans in layout.blocks:
        moved = torch.zeros_like(K)
        for low, high in spans:
            part = K[..., low:high].flatten(1, -2) @ factors.bound[used]
            moved = moved + F.pad(part.reshape(*K.shape[:-1], high - low), (low, columns - high))
            used += 1
        K = _delay(K - moved, moved, 2 + axis)
    return K


def _axis_kernels(layout: Layout, free: Tensor | None) -> list[Tensor | None]:
    """Multiply the free factors of each axis: ``(groups, taps, columns, columns)``, or None for an axis without."""
    if free is None:
        return [None] * len(layout.lengths)
    groups, _, n, _ = free.shape
    if len(set(layout.lengths)) == 1:  # all axes at once
        dims = len(layout.lengths)
        kernels = _axis_kernel(free.reshape(groups * dims, -1, n, n)).unflatten(0, (groups, dims))
        return list(kernels.unbind(1))
    parts = free.split(list(layout.lengths), dim=1)
    return [_axis_kernel(part) if part.shape[1] else None for part in parts]


def _axis_kernel(Z: Tensor) -> Tensor:
    """Return the taps of the product of ``(I - Z_j) + z Z_j`` for ``Z`` of shape ``(b, number, n, n)``."""
    eye = torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
    if Z.shape[1] == 1:
        return torch.cat([eye - Z, Z], dim=1)
    first, second = Z[:, 0], Z[:, 1]
    both = first @ second
    sum_ = first + second
    X = torch.stack([eye - sum_ + both, sum_ - 2.0 * both, both], dim=1)
    for j in range(2, Z.shape[1]):
        moved = (X.flatten(1, 2) @ Z[:, j]).view_as(X)
        X = _delay(X - moved, moved, 1)
    return X


def _delay(kept: Tensor, moved: Tensor, dim: int) -> Tensor:
    """Add ``moved``, one tap later along ``dim``, to ``kept``."""
    behind = 2 * (kept.ndim - 1 - dim)
    before, after = [0] * (behind + 2), [0] * (behind + 2)
    after[behind + 1] = before[behind] = 1
    return F.pad(kept, after) + F.pad(moved, before)


def _ranks(layout: Layout) -> list[int]:
    """Ranks of the free projectors Z: half of the channels; for an odd number the smaller and the larger half in turn."""
    return [layout.rank if j % 2 == 0 else layout.columns - layout.rank for n in layout.lengths for j in range(n)]


@torch.no_grad()
def factorize(layout: Layout, kernel: Tensor, sweeps: int = 3) -> Factors:
    r"""Return factors whose product is the kernel, or close to it if there are none.

    First the factors are split off one by one from the right. For :math:`K = K'\,((I - Z) + zZ)` the last tap lives in the range
    of :math:`Z` and the first one in its kernel, so :math:`Z` is the projector on the leading eigenvectors of
    :math:`K_{last}^\top K_{last} - K_0^\top K_0`: exact for a product, and a good start for other kernels. If the product is not
    the kernel yet, each matrix in turn is replaced by the best one for fixed others; the distance is never larger afterwards,
    because :math:`\|K\|_F` is the same for all products and :math:`\langle \text{kernel}, K\rangle` is affine in each matrix:
    leading eigenvectors and a polar factor maximize it.

    Args:
        layout: the arrangement.
        kernel: a kernel ``(groups * out, channels, *kernel)``, float64.
        sweeps: passes over all matrices; more are made, up to 100, while the kernel seems to be a product, and none if 0.

    Returns:
        The factors, float64. They are a local best approximation, not the global one.

    Examples:
        >>> layout = Layout(1, 2, 2, (2,), (1,), (1,))
        >>> kernel = torch.tensor(
        ...     [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]
        ... ).double()  # delays the second channel
        >>> (layout.unfold(product(layout, factorize(layout, kernel))) - kernel).norm() < 1e-12
        tensor(True)
    """
    target = layout.fold(kernel)
    size = torch.linalg.vector_norm(target.flatten(1), dim=1).clamp_min(torch.finfo(target.dtype).tiny)
    target = target / size.view(-1, *[1] * (target.ndim - 1))
    factors = _peel(layout, target)
    aim = layout.groups * math.sqrt(min(layout.out, layout.inner))  # the value at a kernel that is a product
    value = _value(layout, factors, target)
    for sweep in range(max(sweeps, _MORE_SWEEPS if sweeps else 0)):
        if value >= aim * (1.0 - 1e-14) or (sweep >= sweeps and value < 0.97 * aim):
            break
        factors = _sweep(layout, factors, target)
        value = _value(layout, factors, target)
    return factors


def _peel(layout: Layout, K: Tensor) -> Factors:
    bound: list[Tensor] = []
    for axis, spans in reversed(layout.blocks):
        whole = torch.zeros(K.shape[0], K.shape[-1], K.shape[-1], dtype=K.dtype, device=K.device)
        own = []
        for low, high in spans:
            Z = _leading(_difference(K[..., low:high], 2 + axis), (high - low) // 2)
            whole[:, low:high, low:high] = Z
            own.append(Z)
        bound = own + bound
        K = _advance(K, whole, 2 + axis)
    free: list[Tensor] = []
    ranks = _ranks(layout)
    for axis in reversed(range(len(layout.lengths))):
        for _ in range(layout.lengths[axis]):
            Z = _leading(_difference(K, 2 + axis), ranks[len(ranks) - 1 - len(free)])
            free.insert(0, Z)
            K = _advance(K, Z, 2 + axis)
    H = _polar(K.flatten(1, -2))
    return Factors(H, torch.stack(free, dim=1) if free else None, tuple(bound))


def _difference(K: Tensor, dim: int) -> Tensor:
    last, first = (K.select(dim, t).flatten(1, -2) for t in (-1, 0))
    return last.mT @ last - first.mT @ first


def _advance(K: Tensor, Z: Tensor, dim: int) -> Tensor:
    moved = (K.flatten(1, -2) @ Z).view_as(K)
    n = K.shape[dim] - 1
    return (K - moved).narrow(dim, 0, n) + moved.narrow(dim, 1, n)


def _leading(S: Tensor, rank: int) -> Tensor:
    vectors = torch.linalg.eigh((S + S.mT) / 2)[1][..., S.shape[-1] - rank :]
    return vectors @ vectors.mT


def _polar(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def _value(layout: Layout, factors: Factors, target: Tensor) -> float:
    return float((product(layout, factors) * target).sum())


def _sweep(layout: Layout, factors: Factors, target: Tensor) -> Factors:
    """Replace every matrix once by the best one for fixed others."""
    ranks = _ranks(layout)
    free = [] if factors.free is None else list(factors.free.unbind(1))
    matrices = [factors.H, *free, *factors.bound]
    for index, old in enumerate(matrices):
        leaf = old.clone().requires_grad_()
        trial = [*matrices[:index], leaf, *matrices[index + 1 :]]
        with torch.enable_grad():
            value = (product(layout, _as_factors(trial, len(free))) * target).sum()
        (slope,) = torch.autograd.grad(value, leaf)
        if index == 0:
            matrices[0] = _polar(slope)
        elif index <= len(free):
            matrices[index] = _leading(slope, ranks[index - 1])
        else:
            matrices[index] = _leading(slope, old.shape[-1] // 2)
    return _as_factors(matrices, len(free))


def _as_factors(matrices: Sequence[Tensor], free: int) -> Factors:
    middle = torch.stack(list(matrices[1 : 1 + free]), dim=1) if free else None
    return Factors(matrices[0], middle, tuple(matrices[1 + free :]))
