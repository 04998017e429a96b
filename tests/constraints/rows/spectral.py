"""The spectral ball; its plain form is among the first classes."""

from __future__ import annotations

import mpmath
from torch import Tensor

from stableopt.constraints.spectral import SpectralBall
from tests.constraints.oracle import singular_values
from tests.constraints.rows import Row


def inside(ball: SpectralBall, x: Tensor) -> bool:
    """Whether every matrix of the batch has a norm within the radius, with 60 digits."""
    moved = x.movedim(ball.dims, (-2, -1)) if ball.dims else x
    if x.numel() == 0:
        return True
    return all(singular_values(W)[0] <= mpmath.mpf(ball.radius) for W in moved.reshape(-1, *moved.shape[-2:]))


def row(ball: SpectralBall, *shapes: tuple[int, ...]) -> Row:
    return Row(ball, shapes=shapes, exact=lambda x: inside(ball, x))


ROWS: list[Row] = [
    row(SpectralBall(1.7), (4, 3), (3, 4), (2, 2), (1, 5)),
    row(SpectralBall(0.9, dims=(-2, -1)), (2, 3, 2), (4, 3), (2, 1, 2, 2)),
]
