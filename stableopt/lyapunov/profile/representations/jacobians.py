r"""Full derivatives of the layers of a chain, and the norms of all their products.

With :math:`J_l = D_{h_l} h_{l+1}`, :math:`D_{h_k}h_l = J_{l-1} \cdots J_k`. Products are kept as a matrix of moderate entries times
:math:`e^c`, and the norm of a matrix is the root of the largest eigenvalue of its smaller Gram matrix, in float64.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stableopt.lyapunov.profile.representations.cuts import Chain
from stableopt.lyapunov.profile.representations.pull import Pull

__all__ = ["jacobians", "log_diagonals", "log_norms_of_products"]


def jacobians(chain: Chain) -> list[Tensor]:
    """Return the derivative of every layer, for every sample.

    One tangent shows one column of all of them: at every cut the perturbation is replaced by a unit vector. Where there is no
    forward mode, a cotangent shows one row of one.

    Args:
        chain: of which.

    Returns:
        For each layer ``(samples, width after, width before)``, in float64.

    Examples:
        >>> from torch import nn
        >>> from stableopt.lyapunov.profile.representations.survey import chain_of
        >>> layer = nn.Linear(2, 3).double()
        >>> J = jacobians(chain_of(layer, torch.ones(4, 2, dtype=torch.float64)))
        >>> len(J), bool((J[0] == layer.weight).all())
        (1, True)
    """
    if not chain.forward:
        return _by_rows(chain)
    columns, widths = max(chain.widths[:-1]), chain.widths
    device = chain.cuts[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    found = [torch.zeros(chain.samples, n, m, dtype=wide, device=device) for m, n in pairwise(widths)]
    step = chain.chunk
    for first in range(0, columns, step):
        last = min(first + step, columns)
        seeds = {
            k: torch.zeros(last - first, 1, width, dtype=chain.cuts[k].dtype, device=device)
            for k, width in enumerate(widths[:-1])
        }
        for k, width in enumerate(widths[:-1]):
            for i in range(first, min(last, width)):
                seeds[k][i - first, 0, i] = 1.0
        arrived, _ = chain.push(seeds)
        for J, part, width in zip(found, arrived, widths, strict=False):
            here = min(last, width) - first
            if here > 0:
                J[:, :, first : first + here] = part[:here].permute(1, 2, 0).to(wide)
    return found


def _by_rows(chain: Chain) -> list[Tensor]:
    pull, found = Pull(chain), []
    for layer, width in enumerate(chain.widths[1:]):
        parts = []
        for first in range(0, width, chain.chunk):
            count = min(chain.chunk, width - first)
            unit = torch.zeros(count, 1, width, dtype=chain.cuts[layer + 1].dtype, device=chain.cuts[layer + 1].device)
            unit[:, 0, first : first + count] = torch.eye(count)
            parts.append(pull.back(layer, unit.expand(-1, chain.samples, -1)))
        found.append(torch.cat(parts).transpose(0, 1).double())
    return found


def log_norms_of_products(J: list[Tensor]) -> NDArray[np.float64]:
    r"""Return :math:`\log\|J_{l-1}\cdots J_k\|_2` for all :math:`k \le l`.

    Args:
        J: ``(samples, n_{l+1}, n_l)`` for each layer.

    Returns:
        ``(samples, L + 1, L + 1)``, at ``[:, l, k]``; NaN for :math:`k > l` and where an entry is not finite, minus infinity
        for zero.

    Examples:
        >>> J = [
        ...     torch.diag(torch.tensor([2.0, 1.0])).double()[None],
        ...     torch.diag(torch.tensor([1.0, 3.0])).double()[None],
        ... ]
        >>> np.exp(log_norms_of_products(J)[0]).round(12)
        array([[ 1., nan, nan],
               [ 2.,  1., nan],
               [ 3.,  3.,  1.]])
    """
    layers, samples = len(J), J[0].shape[0]
    table = np.full((samples, layers + 1, layers + 1), np.nan)
    for k in range(layers + 1):
        table[:, k, k] = 0.0
    for k in range(layers):
        product, log_scale = _scaled(J[k], J[k].new_zeros(samples))
        table[:, k + 1, k] = (_log_norms(product) + log_scale).cpu().numpy()
        for l in range(k + 1, layers):
            product, log_scale = _scaled(J[l] @ product, log_scale)
            table[:, l + 1, k] = (_log_norms(product) + log_scale).cpu().numpy()
    return table


def log_diagonals(J: list[Tensor], *, seed: int = 0) -> NDArray[np.float64]:
    r"""Return the logarithms of the diagonals of :math:`R_l` in :math:`J_l Q_l = Q_{l+1}R_l`, from a random basis.

    Their means over the layers estimate all exponents of the product (Benettin et al. 1980), also the small ones, which a product
    of matrices in floating point has lost after a few layers.

    Args:
        J: ``(samples, n_{l+1}, n_l)`` for each layer.
        seed: of the basis, which is the same for all samples.

    Returns:
        ``(samples, L, r)``, :math:`r` the smallest width; minus infinity where a direction is annihilated.

    Examples:
        >>> J = [torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))[None]] * 40
        >>> (log_diagonals(J)[0, -1] / np.log(2.0)).round(12).tolist()
        [1.0, -1.0]
    """
    samples, rank = J[0].shape[0], min(min(j.shape[1:]) for j in J)
    basis = torch.randn(J[0].shape[2], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(basis.to(J[0]))[0].expand(samples, -1, -1)
    logs = []
    for j in J:
        Q, R = torch.linalg.qr(j @ Q)
        logs.append(R.diagonal(dim1=1, dim2=2).abs().log())
    return torch.stack(logs, 1).cpu().numpy()


def _scaled(matrix: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Take the largest entry out of each matrix: then neither their products nor their squares overflow."""
    largest = matrix.abs().amax((1, 2))
    # a power of two changes no digit
    exponent = torch.frexp(torch.where(largest > 0.0, largest, torch.ones_like(largest))).exponent
    return torch.ldexp(matrix, -exponent[:, None, None]), log_scale + exponent * torch.log(matrix.new_tensor(2.0))


def _log_norms(matrix: Tensor) -> Tensor:
    """Return the logarithm of the spectral norm of each matrix, whose largest entry is about 1."""
    gram = matrix @ matrix.mT if matrix.shape[1] <= matrix.shape[2] else matrix.mT @ matrix
    finite = gram.isfinite().all(2).all(1)
    largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], gram, 0.0))[:, -1].clamp_min(0.0)
    return torch.where(finite, 0.5 * largest.log(), torch.nan)
