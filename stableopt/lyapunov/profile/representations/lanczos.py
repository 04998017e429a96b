r"""Largest singular values of :math:`D_{h_k}h_l` for all pairs at once, by tangents and cotangents alone.

Golub and Kahan's bidiagonalization from a random vector, for every pair :math:`k < l` and every sample: after :math:`m` steps

.. math:: J V_m = U_m B_m, \qquad J^\top U_m = V_m B_m^\top + \beta_m v_{m+1} e_m^\top, \qquad \sigma_1(B_m) \le \sigma_1(J) .

It needs as many products with :math:`J` and :math:`J^\top` as a power iteration, and is better after each number of them.
Pairs that do not overlap share a *lane*: one perturbation that is replaced where one pair ends and another begins, so that an
evaluation serves :math:`L^2/2` pairs with about :math:`L^2/4` lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stableopt.lyapunov.profile.representations.cuts import Chain
from stableopt.lyapunov.profile.representations.pull import Pull

__all__ = ["lanes", "largest_singular_values"]

Pair = tuple[int, int]


def lanes(depth: int) -> list[list[Pair]]:
    r"""Distribute all pairs :math:`k < l` over as few lanes as possible, so that those in a lane do not overlap.

    Args:
        depth: the largest :math:`l`.

    Examples:
        >>> lanes(2)
        [[(0, 1), (1, 2)], [(0, 2)]]
    """
    found: list[list[Pair]] = []
    for k in range(depth):
        for l in range(k + 1, depth + 1):
            lane = next((one for one in found if one[-1][1] <= k), None)
            if lane is None:
                found.append([(k, l)])
            else:
                lane.append((k, l))
    return found


@dataclass
class _Run:
    """The bidiagonalization of one pair: the last two vectors, and the scalars so far, for each sample."""

    v: Tensor  # (samples, n_k)
    u: Tensor | None = None  # (samples, n_l)
    log_scale: Tensor | None = None  # (samples,): J over this scale is what the scalars belong to
    alphas: list[Tensor] = field(default_factory=list)
    betas: list[Tensor] = field(default_factory=list)

    def forward(self, image: Tensor, log_length: Tensor) -> None:
        r"""Take :math:`Jv = e^c\,` image."""
        image = image.double()
        if self.log_scale is None or self.u is None:
            size = torch.linalg.vector_norm(image, dim=1)
            self.log_scale = log_length + torch.where(size > 0.0, size, torch.ones_like(size)).log()
            w = image * (log_length - self.log_scale).exp()[:, None]
        else:
            w = image * (log_length - self.log_scale).exp()[:, None] - self.betas[-1][:, None] * self.u
        self.u, alpha = _unit(w)
        self.alphas.append(alpha)

    def backward(self, image: Tensor, log_length: Tensor) -> None:
        r"""Take :math:`J^\top u = e^c\,` image."""
        assert self.log_scale is not None  # noqa: S101 forward comes first
        w = image.double() * (log_length - self.log_scale).exp()[:, None] - self.alphas[-1][:, None] * self.v
        self.v, beta = _unit(w)
        self.betas.append(beta)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the estimate and its relative residual, for each sample."""
        assert self.log_scale is not None  # noqa: S101
        B = torch.diag_embed(torch.stack(self.alphas, 1))
        if len(self.betas) > 1:
            B = B + torch.diag_embed(torch.stack(self.betas[:-1], 1), 1)
        finite = B.isfinite().all(2).all(1)
        P, S, _ = torch.linalg.svd(torch.where(finite[:, None, None], B, 0.0))
        sigma = torch.where(finite, S[:, 0], torch.nan)
        residual = self.betas[-1] * P[:, -1, 0].abs() / torch.where(sigma > 0.0, sigma, torch.ones_like(sigma))
        return sigma.log() + self.log_scale, residual


def largest_singular_values(
    chain: Chain, *, iterations: int, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    r"""Estimate :math:`\|D_{h_k}h_l\|_2` from below, for all pairs and every sample.

    Args:
        chain: of which.
        iterations: products with each derivative, and with its transpose.
        seed: of the first vectors.

    Returns:
        :math:`\log` of the estimates ``(samples, L + 1, L + 1)``, NaN above the diagonal; relative residuals ``(L + 1, L +
        1)``, the largest of all samples: a singular value lies within this share of the estimate; the bytes of all vectors.

    Examples:
        >>> from torch import nn
        >>> from stableopt.lyapunov.profile.representations.survey import chain_of
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
        >>> logs, residuals, _ = largest_singular_values(
        ...     chain_of(model, torch.ones(2, 3, dtype=torch.float64)), iterations=3
        ... )
        >>> norm = torch.linalg.matrix_norm(model[1].weight @ model[0].weight, 2).item()
        >>> bool(abs(np.exp(logs[0, 2, 0]) / norm - 1.0) < 1e-12)
        True
    """
    depth, tracks = len(chain.layers), lanes(len(chain.layers))
    generator = torch.Generator().manual_seed(seed)
    runs: dict[Pair, _Run] = {}
    for lane in tracks:
        for k, l in lane:
            v = torch.randn(chain.samples, chain.widths[k], generator=generator, dtype=torch.float64)
            runs[k, l] = _Run(_unit(v.to(chain.cuts[k].device))[0])
    pull = Pull(chain)
    for _ in range(iterations):
        if chain.forward:
            _forward(chain, tracks, runs)
        else:
            _forward_by_graph(chain, pull, runs)
        _backward(chain, pull, tracks, runs)
    logs, residuals = np.full((chain.samples, depth + 1, depth + 1), np.nan), np.full((depth + 1, depth + 1), np.nan)
    for k in range(depth + 1):
        logs[:, k, k] = residuals[k, k] = 0.0
    memory = 0
    for (k, l), run in runs.items():
        log_norm, residual = run.result()
        logs[:, l, k], residuals[l, k] = log_norm.cpu().numpy(), float(residual.max())
        memory += 8 * chain.samples * (chain.widths[k] + chain.widths[l])
    return logs, residuals, memory


def _forward(chain: Chain, tracks: list[list[Pair]], runs: dict[Pair, _Run]) -> None:
    """Give every pair the image of its vector."""
    count, device = len(tracks), chain.cuts[0].device
    seeds = {
        k: torch.zeros(count, chain.samples, chain.widths[k], dtype=chain.cuts[k].dtype, device=device)
        for k in range(len(chain.layers))
    }
    keep = {j: torch.zeros(count, device=device) for j in range(1, len(chain.layers))}
    for i, lane in enumerate(tracks):
        for k, l in lane:
            seeds[k][i] = runs[k, l].v.to(seeds[k].dtype)
            for j in range(k + 1, l):
                keep[j][i] = 1.0
    arrived, lengths = chain.push(seeds, keep)
    for i, lane in enumerate(tracks):
        for k, l in lane:
            runs[k, l].forward(arrived[l - 1][i], lengths[i, k : l - 1].sum(0))


def _forward_by_graph(chain: Chain, pull: Pull, runs: dict[Pair, _Run]) -> None:
    """Give every pair the image of its vector where there is no forward mode."""
    carried: dict[Pair, tuple[Tensor, Tensor]] = {}
    for j in range(len(chain.layers)):
        pairs = [pair for pair in runs if pair[0] <= j < pair[1]]
        for pair in pairs:
            if pair[0] == j:
                carried[pair] = runs[pair].v, runs[pair].v.new_zeros(chain.samples)
        images = pull.forward(j, torch.stack([carried[pair][0] for pair in pairs]))
        for pair, image in zip(pairs, images, strict=True):
            if pair[1] == j + 1:
                runs[pair].forward(image, carried.pop(pair)[1])
            else:
                carried[pair] = _onwards(image, carried[pair][1])


def _backward(chain: Chain, pull: Pull, tracks: list[list[Pair]], runs: dict[Pair, _Run]) -> None:
    """Give every pair what its image is pulled back to; only through the layers between."""
    carried: dict[Pair, tuple[Tensor, Tensor]] = {}
    for j in range(len(chain.layers) - 1, -1, -1):
        pairs = [(k, l) for lane in tracks for k, l in lane if k <= j < l]
        for k, l in pairs:
            u = runs[k, l].u
            if l == j + 1 and u is not None:
                carried[k, l] = u, u.new_zeros(chain.samples)
        dtype = chain.cuts[j + 1].dtype
        pulled = pull.back(j, torch.stack([carried[pair][0].to(dtype) for pair in pairs]))
        for (k, l), image in zip(pairs, pulled, strict=True):
            log_length = carried[k, l][1]
            if k == j:
                runs[k, l].backward(image, log_length)
                del carried[k, l]
            else:
                carried[k, l] = _onwards(image, log_length)


def _onwards(image: Tensor, log_length: Tensor) -> tuple[Tensor, Tensor]:
    """Take the length of the rows out."""
    unit, size = _unit(image.double())
    return unit, log_length + torch.where(size > 0.0, size, torch.ones_like(size)).log()


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of length 1 and the lengths; zero stays zero."""
    size = torch.linalg.vector_norm(x, dim=1)
    return x / torch.where(size > 0.0, size, torch.ones_like(size))[:, None], size
