"""The largest eigenvalue of a symmetric operator that is known by its products, with one product per round (LOBPCG)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from stableopt.optim.curvature import dot

__all__ = ["Direction", "ascend"]

Pair: TypeAlias = tuple[list[Tensor], list[Tensor]]
"""A vector and its image."""


@dataclass
class Direction:
    """A unit vector u and what is known of it.

    Args:
        vector: u.
        image: Bu.
        value: the quotient u'Bu.
        lowest: the smallest Ritz value seen so far, 0 if none is negative.
        count: how many measurements led to it.
        second: a direction towards the runner-up, None if nothing is known of one.

    Examples:
        >>> import torch
        >>> u = [torch.tensor([1.0, 0.0])]
        >>> Direction(u, [torch.tensor([3.0, 4.0])], 3.0, 0.0).residual()
        [tensor([0., 4.])]
    """

    vector: list[Tensor]
    image: list[Tensor]
    value: float
    lowest: float
    count: int = 1
    second: list[Tensor] | None = None

    def moved(self, count: int, *, keep_second: bool = True) -> Direction:
        """Do a step of the power iteration on B + shift, whose largest eigenvalue in modulus is the largest of B."""
        vector = _power_step(self.vector, self.image, self.lowest)
        return Direction(
            vector or self.vector, [], self.value, self.lowest, count, self.second if keep_second else None
        )

    def residual(self) -> list[Tensor]:
        """Return Bu - value u: some eigenvalue of B lies within its length of the value."""
        return [image - self.value * u for image, u in zip(self.image, self.vector, strict=True)]


def ascend(
    product: Callable[[list[Tensor]], list[Tensor]],
    start: list[Tensor],
    count: int,
    lowest: float,
    tolerance: float,
    second: list[Tensor] | None = None,
) -> Direction | None:
    """Climb to the largest eigenvalue of a symmetric operator B.

    Each direction is the best one in the span of the last, its residual and the last correction. A second direction that is given
    joins that span once the residual is small, if a product is left for it: an eigenvalue that has overtaken the first shows there.

    Args:
        product: returns Bu for a list of tensors.
        start: where to begin, not zero.
        count: the largest number of products, at least 1.
        lowest: the smallest Ritz value known before.
        tolerance: where to end: when the residual is this fraction of the value.
        second: a direction towards the runner-up, None to look at none.

    Returns:
        The direction; its value is at most the largest eigenvalue. None if B is not finite there, or the start is zero.

    References:
        Knyazev, Toward the optimal preconditioned eigensolver, 2001.

    Examples:
        >>> import torch
        >>> scale = torch.tensor([-9.0, 1.0, 4.0])
        >>> found = ascend(lambda u: [scale * u[0]], [torch.ones(3)], 10, 0.0, 1e-3)
        >>> round(found.value, 4), round(found.lowest, 4)
        (4.0, -9.0)
        >>> overtaken = ascend(lambda u: [scale * u[0]], [torch.eye(3)[1]], 2, 0.0, 1e-3, [torch.eye(3)[2]])
        >>> overtaken.value
        4.0
    """
    u, _ = _normalized(start, [])
    if u is None:
        return None
    Bu = product(u)
    here = Direction(u, Bu, dot(u, Bu), min(lowest, dot(u, Bu)), second=second)
    last: Pair | None = None
    runner_up: Pair | None = None
    for _ in range(count - 1):
        if not math.isfinite(here.value):
            return None
        known = [here.vector, *([last[0]] if last else [])]
        r, size = _normalized(here.residual(), known)
        if r is None or size <= max(tolerance, 1e-7) * abs(here.value):
            r, second = None if second is None else _normalized(second, known)[0], None
            if r is None:
                break
        pairs = [(here.vector, here.image), (r, product(r)), *([last] if last else [])]
        gram = np.array([[dot(x, By) for _, By in pairs] for x, _ in pairs])
        if not np.isfinite(gram).all():
            return None
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        here = Direction(*_spanned(pairs, vectors[:, -1]), float(values[-1]), min(here.lowest, float(values[0])))
        runner_up, last = _spanned(pairs, vectors[:, -2]), _correction(pairs, vectors[:, -1])
    if runner_up is not None:
        here.second = _power_step(*runner_up, here.lowest)
    return here if math.isfinite(here.value) else None


def _power_step(vector: list[Tensor], image: list[Tensor], lowest: float) -> list[Tensor] | None:
    """Return (B + shift) u of length 1, None if it vanishes."""
    shift = max(0.0, -lowest)
    moved = [Bx + shift * x for Bx, x in zip(image, vector, strict=True)]
    norm = math.sqrt(dot(moved, moved))
    return [x / norm for x in moved] if 0 < norm < math.inf else None


def _correction(pairs: list[Pair], best: np.ndarray) -> Pair | None:
    """Return the unit vector in the span that is orthogonal to the new direction and, with it, spans the last move."""
    new = best * np.sign(best[0] or 1.0)
    c = np.zeros_like(new)
    c[0] = 1.0
    c = c - new[0] * new  # the old direction without the new one
    norm = float(np.linalg.norm(c))
    if norm < 1e-8:
        return None
    return _spanned(pairs, c / norm)


def _spanned(pairs: list[Pair], weights: np.ndarray) -> Pair:
    return _combined([x for x, _ in pairs], weights), _combined([Bx for _, Bx in pairs], weights)


def _normalized(x: list[Tensor], others: list[list[Tensor]]) -> tuple[list[Tensor] | None, float]:
    """Return x made orthogonal to unit vectors and of length 1, and its length before."""
    size = math.sqrt(dot(x, x))
    if not 0 < size < math.inf:
        return None, size
    x = [a / size for a in x]
    for _ in range(2):  # twice is enough
        for y in others:
            along = dot(x, y)
            x = [a - along * b for a, b in zip(x, y, strict=True)]
        norm = math.sqrt(dot(x, x))
        if norm < 1e-6:
            return None, size
        x = [a / norm for a in x]
    return x, size


def _combined(vectors: list[list[Tensor]], weights: np.ndarray) -> list[Tensor]:
    combined = []
    for xs in zip(*vectors, strict=True):
        total = float(weights[0]) * xs[0]
        for w, x in zip(weights[1:], xs[1:], strict=True):
            total = total.add(x, alpha=float(w))
        combined.append(total)
    return combined
