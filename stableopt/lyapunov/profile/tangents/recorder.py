"""When the directions of a profile are made orthonormal, and what is kept of it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.tangents.system import System

__all__ = ["Recorder"]

_APART = {torch.float32: 1e3, torch.float64: 1e6}
"""How far the lengths of directions may part before they are made orthonormal again."""
_MOST = 8
"""The largest cadence that is chosen by itself."""
_LITTLE = 1 << 17
"""Numbers in the directions up to which a factor of each step costs next to nothing, and says more."""


class Recorder:
    """Keep the triangular factors of a run, and the inner products of the parameter parts of its directions.

    Args:
        system: the perturbations.
        cadence: number of steps between two factors, or ``auto``: one while the directions hold no more than 131072 numbers, for
            larger ones as many as they need to part by a thousand in float32 and a million in float64, at most 8.

    Attributes:
        rows: how many of the perturbations are directions.

    Examples:
        >>> from stableopt.lyapunov.profile.tangents.system import System
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> system = System(torch.optim.SGD([w], lr=0.1))
        >>> system.begin(1, seed=0)
        >>> recorder = Recorder(system, "auto")
        >>> recorder.rows = 1
        >>> recorder.begin(0)
        >>> recorder.pieces()[0].count
        0
    """

    def __init__(self, system: System, cadence: int | Literal["auto"]) -> None:
        self.rows = 0
        self._system, self._cadence = system, cadence
        self._next = cadence if cadence != "auto" else 1
        self._R: list[list[NDArray[np.float64]]] = []
        self._steps: list[list[int]] = []
        self._theta: list[list[NDArray[np.float64]]] = []

    @property
    def count(self) -> int:
        """The number of pieces."""
        return len(self._R)

    def begin(self, step: int) -> None:
        """Begin a piece: the directions are orthonormal at this step.

        Args:
            step: how many steps were taken.
        """
        self._R.append([])
        self._steps.append([step])
        self._theta.append([self._system.gram(self.rows)])

    def advanced(self, step: int) -> None:
        """Note that a step was followed, and factor if it is time.

        Args:
            step: how many steps were taken.

        Raises:
            ValueError: if a direction is not finite.
        """
        if step - self._steps[-1][-1] >= self._next:
            self.settle(step)

    def settle(self, step: int) -> None:
        """Factor now, unless that was done at this step.

        Args:
            step: how many steps were taken.
        """
        since = step - self._steps[-1][-1]
        if since == 0:
            return
        R = self._system.orthonormalize(self.rows)
        self._R[-1].append(R)
        self._steps[-1].append(step)
        self._theta[-1].append(self._system.gram(self.rows))
        if self._cadence == "auto":
            self._next = self._chosen(R, since)

    def pieces(self) -> tuple[Factors, ...]:
        """Return the factors of each piece: one, unless there are windows."""
        shape = (0, self.rows, self.rows)
        dimension = self._system.dimension
        return tuple(
            Factors(np.array(R) if R else np.zeros(shape), np.array(steps, dtype=np.int64), dimension)
            for R, steps in zip(self._R, self._steps, strict=True)
        )

    def theta(self) -> tuple[NDArray[np.float64], ...]:
        """Return the inner products of the parameter parts of the directions of each piece, ``(n + 1, k, k)``."""
        return tuple(np.array(grams) for grams in self._theta)

    def _chosen(self, R: NDArray[np.float64], since: int) -> int:
        """Return how many steps the directions may go until the next factor."""
        if self.rows * self._system.dimension <= _LITTLE:
            return 1
        lengths = np.linalg.norm(R, axis=0)
        diagonal = np.diag(R)
        if not (diagonal > 0.0).all():
            return 1
        # how far the longest direction and the part of the shortest that is its own have parted, per step
        parted = math.log(max(float(lengths.max()), 1.0)) - math.log(min(float(diagonal.min()), 1.0))
        limit = math.log(min(_APART.get(p.real.dtype, 1e3) for p in self._system.parameters))
        return max(1, min(_MOST, 2 * since, int(limit * since / max(parted, 1e-12))))
