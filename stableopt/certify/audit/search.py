r"""Inputs that a map moves apart as far as can be found: lower bounds of a Lipschitz constant, with the pair that attains them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from stableopt.certify.audit.findings import Witness

__all__ = ["Map", "dense_operator", "generator", "linear_gain", "quotient", "steepest", "symmetry_defect"]

Map: TypeAlias = Callable[[Tensor], Tensor]

_DENSE = 768
_STEP = 1e-5


def generator(seed: int = 0) -> torch.Generator:
    """Return random numbers of our own, so that those of the user are not drawn.

    Examples:
        >>> torch.rand(1, generator=generator()).equal(torch.rand(1, generator=generator()))
        True
    """
    return torch.Generator().manual_seed(seed)


def quotient(f: Map, x: Tensor, y: Tensor) -> Witness:
    r"""Return the pair with :math:`\|f(x)-f(y)\|_2 / \|x-y\|_2`; 0 for equal inputs or where the quotient is not finite.

    Examples:
        >>> quotient(lambda x: 3 * x, torch.zeros(1, 1), torch.ones(1, 1)).gain
        3.0
    """
    with torch.no_grad():
        distance = float((x - y).norm())
        gain = float((f(x) - f(y)).norm()) / distance if distance > 0 else 0.0
    return Witness(x.detach(), y.detach(), gain if math.isfinite(gain) else 0.0)


def steepest(
    f: Map,
    x: Tensor,
    *,
    iterations: int = 20,
    ascent: int = 0,
    scale: float = 1.0,
    seed: int = 0,
    step: float | None = None,
) -> Witness:
    r"""Search near ``x`` for a pair that ``f`` moves far apart.

    At a point the direction is found by power iteration on :math:`J^\top J`, with :math:`Jv \approx (f(x+tv)-f(x-tv))/2t`; with
    ``ascent`` steps the point itself then climbs, by the gradient of :math:`\log\|f(x+tv)-f(x-tv)\|`.

    Args:
        f: a map of one tensor, run in float64.
        x: where to begin, with the batch dimension.
        iterations: of the power method at the start, and a few at the end.
        ascent: steps of the climb, each about ``scale / 10`` long.
        scale: the size of the inputs.
        seed: of the first direction.
        step: :math:`t`; None for 1e-5 of the scale.

    Returns:
        The best pair that was met. It bounds the constant from below, whether or not the search went well.

    Examples:
        >>> A = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> abs(steepest(lambda x: x @ A, torch.zeros(1, 2, dtype=torch.float64)).gain - 3.0) < 1e-8
        True
    """
    t, x = _STEP * scale if step is None else step, x.detach().clone()
    v = _unit(torch.randn(x.shape, generator=generator(seed), dtype=x.dtype))
    v = _power(f, x, v, t, iterations)
    best = quotient(f, x + t * v, x - t * v)
    if ascent:
        momentum = torch.zeros_like(x)
        for _ in range(ascent):
            slope = _climb(f, x, v, t)
            if slope is None:
                break
            momentum = 0.8 * momentum + _unit(slope)
            x = x + 0.05 * scale * momentum
            v = _power(f, x, v, t, 2)
            found = quotient(f, x + t * v, x - t * v)
            best = max(best, found, key=lambda pair: pair.gain)
        x = (best.x + best.y) / 2
        v = _power(f, x, _unit(best.x - best.y), t, iterations)
        best = max(best, quotient(f, x + t * v, x - t * v), key=lambda pair: pair.gain)
    return best


def linear_gain(f: Map, x: Tensor, *, iterations: int = 200) -> Witness:
    """Return the pair that an affine map moves apart most: from its singular vectors, or by power iteration if it is large.

    Args:
        f: an affine map of one tensor.
        x: an input of it, of which the shape counts.
        iterations: of the power method.

    Examples:
        >>> A = torch.tensor([[3.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
        >>> found = linear_gain(lambda x: x @ A, torch.zeros(1, 2, dtype=torch.float64))
        >>> abs(found.gain - float(torch.linalg.matrix_norm(A, 2))) < 1e-12
        True
    """
    zero = torch.zeros_like(x)
    if x.numel() <= _DENSE:
        v = torch.linalg.svd(dense_operator(f, x), full_matrices=False)[2][0]
        return quotient(f, v.view(x.shape), zero)
    v = _unit(torch.randn(x.shape, generator=generator(), dtype=x.dtype))
    v = _power(f, zero, v, 1.0, iterations)
    return quotient(f, v, zero)


def dense_operator(f: Map, x: Tensor) -> Tensor:
    """Return the matrix of an affine map, one column per entry of the input.

    Args:
        f: maps a batch of inputs, each for itself.
        x: an input with a batch dimension of 1, of which the shape counts.

    Examples:
        >>> dense_operator(lambda x: 2 * x + 1, torch.zeros(1, 2, dtype=torch.float64)).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    n = x.numel()
    units = torch.eye(n, dtype=x.dtype).view(n, *x.shape[1:])
    with torch.no_grad():
        return (f(units) - f(torch.zeros_like(x))).reshape(n, -1).T


def symmetry_defect(f: Map, x: Tensor, *, seed: int = 0) -> float:
    r"""Return :math:`|u^\top Jv - v^\top Ju|` over :math:`\|Jv\|\|u\| + \|Ju\|\|v\|`: 0 where the Jacobian of ``f`` is symmetric.

    The differences by which it is measured are themselves off by about 1e-9. A map with symmetric Jacobians is a gradient.

    Examples:
        >>> x = torch.ones(1, 2, dtype=torch.float64)
        >>> symmetry_defect(torch.tanh, x) < 1e-8 < symmetry_defect(lambda x: x.flip(1) * torch.tensor([1.0, 2.0]), x)
        True
    """
    draw = generator(seed)
    u, v = (_unit(torch.randn(x.shape, generator=draw, dtype=x.dtype)) for _ in range(2))
    t = _STEP * max(1.0, float(x.norm()))
    with torch.no_grad():
        Ju, Jv = ((f(x + t * w) - f(x - t * w)) / (2 * t) for w in (u, v))
    size = float(Ju.norm() + Jv.norm())
    return abs(float((u * Jv).sum() - (v * Ju).sum())) / size if size > 0 else 0.0


def _power(f: Map, x: Tensor, v: Tensor, t: float, iterations: int) -> Tensor:
    for _ in range(iterations):
        with torch.no_grad():
            Jv = (f(x + t * v) - f(x - t * v)) / (2 * t)
        pulled = _pull(f, x, Jv)
        if pulled is None or not float(pulled.norm()) > 0:
            return v
        v = _unit(pulled)
    return v


def _pull(f: Map, x: Tensor, w: Tensor) -> Tensor | None:
    r"""Return :math:`J^\top w`, None where the map has no gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = f(x)
        if not out.requires_grad:
            return None
        (pulled,) = torch.autograd.grad(out, x, w.to(out.dtype), allow_unused=True)
    return pulled if pulled is not None and bool(pulled.isfinite().all()) else None


def _climb(f: Map, x: Tensor, v: Tensor, t: float) -> Tensor | None:
    """Return the gradient, with respect to the point, of the logarithm of how far the pair is moved apart."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        moved = (f(x + t * v) - f(x - t * v)).norm()
        if not moved.requires_grad or not float(moved.detach()) > 0:
            return None
        (slope,) = torch.autograd.grad(moved.log(), x, allow_unused=True)
    return slope if slope is not None and bool(slope.isfinite().all()) and float(slope.norm()) > 0 else None


def _unit(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
