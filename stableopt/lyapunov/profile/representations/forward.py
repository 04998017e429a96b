r"""The forward block of the profile: how much every representation amplifies a perturbation of every earlier one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwd
from numpy.typing import NDArray
from torch import Tensor, nn

from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating, replaced
from stableopt.lyapunov.profile.representations.cuts import Chain
from stableopt.lyapunov.profile.representations.depth import DepthGrowth, ForwardProfile
from stableopt.lyapunov.profile.representations.inside import LinearByHand, plain_kernels, primal, private_buffers
from stableopt.lyapunov.profile.representations.jacobians import jacobians, log_diagonals, log_norms_of_products
from stableopt.lyapunov.profile.representations.lanczos import lanes, largest_singular_values
from stableopt.lyapunov.profile.representations.law import log_law
from stableopt.lyapunov.profile.representations.mixed import representation_tangents
from stableopt.lyapunov.profile.representations.survey import INPUT, as_probe, chain_of, in_forward_mode
from stableopt.optim import RandomState

__all__ = ["forward_profile", "growth_along"]

ITERATIONS = 16
"""Products with each derivative and its transpose: usually three digits, and the residual says how many."""
_COLUMNS, _BYTES, _PRODUCTS = 512, 2**28, 2e10
"""What full derivatives may cost where nobody has asked for them: columns, bytes, multiplications for the norms of products."""


def forward_profile(
    model: nn.Module,
    probe: Callable[[], Any] | Tensor | Sequence[Any],
    *,
    layers: Sequence[str] | None = None,
    exact: bool | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> ForwardProfile:
    r"""Measure :math:`\|D_{h_k}h_l\|_2` for all :math:`k \le l`, in the present mode of a model, without changing it.

    The representations are those at the cuts of the trunk: :math:`h_0` is the first tensor that the model gets (or what an
    embedding makes of token indices), :math:`h_l` what the layer :math:`l+1` gets, so that activations and normalizations
    belong to the layer before them, and :math:`h_L` the output. A residual block is one layer.

    If no perturbation of a sample reaches another one, the norms are those of the samples, and the largest is that of the whole
    batch; else (batch statistics, attention over the batch) they are those of the operator of the whole batch. Dropout draws the
    numbers that the next forward pass of the model would draw.

    Args:
        model: the model.
        probe: a function that calls the model, or what the model is called with: a tensor, a tuple of arguments, a mapping.
        layers: names of layers on the trunk at which to look, in order; None for all of them.
        exact: True for full derivatives, False for estimates from below by Lanczos' method, None for full derivatives where
            they have at most 512 columns (or fewer than the other way has passes), fit into 256 MiB, and the norms of their
            products take at most 2e10 multiplications.
        iterations: of Lanczos' method; each costs a tangent and a cotangent for every lane (about a quarter of the squared depth).
        seed: of its first vectors.

    Returns:
        All norms, with their medians over the samples, exponents, the largest one, bounds to compare with, and the cost.

    Raises:
        ProbeError: if the probe does not call the model, or the output does not depend on the input.
        ValueError: if a layer is not on the trunk, or ``iterations < 1``.
        NotImplementedError: if an operation has no derivative in forward mode, nor the one in reverse mode that takes its place
            (for an estimate, a second one).

    Note:
        At a kink the derivative is the one that automatic differentiation chooses. Numbers of float16 or bfloat16 are as coarse as
        their type, see :attr:`ForwardProfile.resolved`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        ...     _ = model[2].weight.copy_(torch.tensor([[0.0, 2.0]]))
        >>> profile = forward_profile(model, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        >>> [round(profile.norm(l, k), 6) for l, k in ((1, 0), (2, 1), (2, 0))], profile.operator
        ([3.0, 2.0, 2.0], 'sample')
        >>> profile.peak.target, round(float(np.exp(profile.log_products[2, 0])), 6)
        (1, 6.0)
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    chain = chain_of(model, probe, layers, forward=False)
    exact = _is_cheap(chain, iterations) if exact is None else exact
    found = _exact(chain) if exact else _estimated(chain, iterations, seed)
    return ForwardProfile(
        names=tuple(cut.name for cut in chain.cuts),
        widths=chain.widths,
        operator="sample" if not chain.mixing else "batch",
        mixing=chain.mixing,
        law=log_law(chain),
        mode="forward" if chain.forward else "reverse",
        eps=max(torch.finfo(cut.dtype).eps for cut in chain.cuts),
        cost=chain.passes.equivalents,
        **found,
    )


def _exact(chain: Chain) -> dict[str, Any]:
    J = jacobians(chain)
    return {
        "how": "jacobian",
        "log_samples": log_norms_of_products(J),
        "residuals": _zeros(len(J) + 1),
        "log_diagonal": log_diagonals(J),
        "memory": sum(j.numel() * j.element_size() for j in J),
    }


def _estimated(chain: Chain, iterations: int, seed: int) -> dict[str, Any]:
    logs, residuals, memory = largest_singular_values(chain, iterations=iterations, seed=seed)
    return {"how": "lanczos", "log_samples": logs, "residuals": residuals, "memory": memory}


def _zeros(size: int) -> NDArray[np.float64]:
    table = np.zeros((size, size))
    table[np.triu_indices(size, 1)] = np.nan
    return table


def _is_cheap(chain: Chain, iterations: int) -> bool:
    widths, samples = chain.widths, chain.samples
    columns, depth = max(widths[:-1]), len(widths) - 1
    if columns > max(_COLUMNS, 2 * iterations * len(lanes(depth))):
        return False
    bytes_ = 8 * samples * sum(n * m for n, m in pairwise(widths))
    products = 0.0
    for k in range(depth):
        for l in range(k + 1, depth + 1):
            n, m = sorted((widths[k], widths[l]))
            products += samples * (n * n * m + 10.0 * n**3 + widths[l] * widths[l - 1] * widths[k])
    return bytes_ <= _BYTES and products <= _PRODUCTS


def growth_along(
    model: nn.Module,
    probe: Callable[[], Any] | Tensor | Sequence[Any],
    direction: Tensor | None = None,
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> DepthGrowth:
    r"""Push one perturbation of the input through all layers: a single evaluation with dual numbers.

    Args:
        model: the model.
        probe: as for :func:`forward_profile`.
        direction: :math:`v`, of the shape of the input (for token indices, of what the embedding makes of them); None for a
            random one with normal entries.
        layers: names of the calls at which to look, as in :attr:`ForwardProfile.names` after the input; None to find them
            first, which takes longer than the rest.
        seed: of the random direction.

    Returns:
        The norms at all layers. The perturbation is scaled at every layer, so that nothing overflows on the way.

    Raises:
        ProbeError: if the probe does not call the model, or a layer is not called.
        ValueError: if the direction has another shape than the input.
        NotImplementedError: if an operation has no derivative in forward mode and a finite difference would lie
            (:mod:`stableopt.lyapunov.profile.representations.difference`).

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = [layer.weight.copy_(3.0 * torch.eye(2)) for layer in model]
        >>> growth = growth_along(model, torch.ones(4, 2))
        >>> growth.names, np.exp(growth.log_norms).round(6).tolist()
        (('input', '0', '1'), [1.0, 3.0, 9.0])
    """
    evaluate, start = as_probe(model, probe), RandomState.capture()
    chosen = chain_of(model, probe, one_by_one=False, forward=False).layers if layers is None else tuple(layers)
    names = (INPUT, *(name or type(model).__name__ for name in chosen))
    along = _Along(chosen, direction, seed)
    for plain in (False, True):
        with private_buffers(model), plain_kernels() if plain else nullcontext(), LinearByHand():
            try:
                in_forward_mode(Walk(model, evaluate, along).run, start)
            except NotImplementedError:
                continue
        return along.result_of(names)
    v = along.direction
    stay = [None] * len(list(model.parameters()))
    found = representation_tangents(model, probe, stay, d_input=v[None], layers=chosen)
    along.start()
    for tangents in found.values():
        along.see([tangents[0]])
    return along.result_of(names, epsilon=found.epsilon, cost=found.cost)


class _Along:
    """Follows a perturbation of the input through the cuts, scaling it at each."""

    def __init__(self, layers: tuple[str, ...], direction: Tensor | None, seed: int) -> None:
        self._layers, self._direction, self._seed = layers, direction, seed
        self._next = {name: i for i, name in enumerate(layers) if i > 0}
        self.start()

    def start(self) -> None:
        self._rows: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def source(self, x: Tensor) -> Tensor:
        v = self._direction
        if v is None:
            v = torch.randn(x.shape, generator=torch.Generator().manual_seed(self._seed), dtype=torch.float32)
        elif v.shape != x.shape:
            raise ValueError(f"the direction must have the shape of the input, {tuple(x.shape)}, got {tuple(v.shape)}.")
        self.direction = v = v.to(x)
        self._batch = x.shape[0] if x.ndim else 0
        self.see([v])
        return fwd.make_dual(x.detach().clone(), v.clone())

    def enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if name not in self._next:
            return None
        if self._next[name] != len(self._sizes):
            raise ProbeError(f"the layer {name!r} was called out of turn")
        duals = [(t, fwd.unpack_dual(t)) for t in floating((args, kwargs))]
        moved = [(t, d.primal, d.tangent) for t, d in duals if d.tangent is not None]
        size = self.see([tangent for _, _, tangent in moved])
        size = size.clamp_min(torch.finfo(size.dtype).tiny)
        others = {id(t): fwd.make_dual(primal, tangent / size.to(tangent.dtype)) for t, primal, tangent in moved}
        return replaced((args, kwargs), others)

    def leave(self, name: str, module: nn.Module, output: Any) -> None: ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        if len(self._sizes) != len(self._layers):
            raise ProbeError(f"the layer {self._layers[len(self._sizes)]!r} was not called this time")
        tangents = [fwd.unpack_dual(y).tangent for y in outputs]
        self.see([t for t in tangents if t is not None])
        return [primal(y).clone() for y in outputs]

    def see(self, tangents: list[Tensor]) -> Tensor:
        """Keep the norm of what is there, of all and of each sample, and return the first."""
        if not tangents:
            raise NotImplementedError("no tangent reached a representation")
        apart = all(t.ndim > 0 and t.shape[0] == self._batch for t in tangents)
        samples = self._batch if apart else 1
        rows = [torch.linalg.vector_norm(t.reshape(samples, -1), dim=1, dtype=_wide(t)) for t in tangents]
        row = rows[0] if len(rows) == 1 else torch.linalg.vector_norm(torch.stack([r.to(rows[0]) for r in rows]), dim=0)
        size = torch.linalg.vector_norm(row)
        self._rows.append(row)
        self._sizes.append(size)
        return size

    def result_of(self, names: tuple[str, ...], *, epsilon: float = 0.0, cost: float = 2.0 / 3.0) -> DepthGrowth:
        logs = torch.stack([size.double() for size in self._sizes]).log().cpu().numpy()
        # what arrives at a layer had the length 1 at the cut before, but for a difference
        least = math.log(torch.finfo(self._sizes[0].dtype).tiny)
        lengths = np.maximum(logs[1:-1], least) * (epsilon == 0.0)
        taken = np.concatenate([[0.0, 0.0], np.cumsum(lengths)])
        same = len({len(row) for row in self._rows}) == 1
        rows = torch.stack([row.double() for row in self._rows]).log().cpu().numpy() if same else logs[:, None]
        rows, logs = rows + taken[:, None], logs + taken
        return DepthGrowth(names, logs - logs[0], rows - rows[0], cost, epsilon)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in {torch.float16, torch.bfloat16} else t.dtype
