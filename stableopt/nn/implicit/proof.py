"""A proved bound of the residual of an implicit equation, in float64, for outputs that any solver returned."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stableopt.linalg import Bound
from stableopt.linalg.proved import as_matrix, gamma
from stableopt.nn.implicit.equation import Equation
from stableopt.nn.unit_slopes import UNIT_SLOPES

__all__ = ["residual_upper"]

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_ULPS = 16.0 * 2.0**-53
"""What one activation may be wrong by, relative to its value: 8 units in the last place."""
_TINY = 2.0**-1000
"""More than all products that underflow can lose."""


def residual_upper(equation: Equation, activation: str, x: Tensor, y: Tensor) -> Bound:
    r"""Bound the largest :math:`\|(1 + hm)\,y - hKy + hA^\top\sigma(Ay + b) - x\|` over all vectors, counting all rounding.

    A computed product :math:`\hat C` of matrices obeys :math:`|\hat C - AB| \le \gamma_n |A||B|` entrywise, and slopes of
    :math:`\sigma` in [0, 1] hand an error on at most as it is.

    Args:
        equation: the equation with its stored numbers.
        activation: name of the activation.
        x: right-hand sides, of shape ``(..., dim)``.
        y: the outputs.

    Returns:
        A bound from 0 to a proved upper end.

    Raises:
        ValueError: if a number is NaN or infinite.

    Examples:
        >>> equation = Equation(torch.ones(1, 1), None, None, torch.tensor(3.0), 0.0, torch.relu)
        >>> error = residual_upper(equation, "relu", torch.tensor([2.0]), torch.tensor([0.75]))  # 0.75 + 3 * 0.75 - 2
        >>> 1.0 <= error.upper < 1.0 + 1e-13
        True
    """
    X, Y = (as_matrix(v.reshape(-1, v.shape[-1])) for v in (x, y))
    A = as_matrix(equation.weight)
    b = np.zeros(len(A)) if equation.bias is None else as_matrix(equation.bias[None])[0]
    h, m = float(equation.step.detach()), equation.strong
    z, z_error = _product(Y, A.T)
    z_error = _up(z_error + 2.0**-52 * (np.abs(z) + np.abs(b)))
    active = UNIT_SLOPES[activation](torch.from_numpy(z + b)).numpy()
    active_error = _up(z_error + _ULPS * np.abs(active))
    field, error = _product(active, A)
    error = _up(error + active_error @ np.abs(A) * (1 + gamma(len(A) + 2)))
    if equation.skew is not None:
        rotated, more = _product(Y, as_matrix(equation.skew).T)
        error = _up(error + more + 2.0**-52 * (np.abs(field) + np.abs(rotated)))
        field = field - rotated
    residual = (Y - X) + h * (field + m * Y)
    # of the eight operations of the last line, each relative to at most the sum of the sizes of its terms
    error = _up(_up(h * error) + 2.0**-49 * (np.abs(X) + np.abs(Y) + h * (np.abs(field) + m * np.abs(Y))))
    sizes = np.sqrt((_up(np.abs(residual) + error) ** 2).sum(-1)) * (1 + gamma(Y.shape[-1] + 6))
    return Bound(0.0, float(_up(sizes).max(initial=0.0)))


def _product(A: Array, B: Array) -> tuple[Array, Array]:
    """Return a matrix product and an entrywise bound of its error."""
    size = (np.abs(A) @ np.abs(B)) * (1 + gamma(A.shape[1] + 2))
    return A @ B, _up(gamma(A.shape[1]) * size)


def _up(values: Array) -> Array:
    """Round sums and products of a few non-negative terms up."""
    return values * (1.0 + 2.0**-49) + _TINY
