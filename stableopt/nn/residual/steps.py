r"""Learnable steps under a cap: :math:`\tau = \operatorname{sigmoid}(r)\,\tau_{\max}`, started where a deep stack still learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stableopt.nn.arguments import check_sizes

__all__ = ["SMALLEST", "floored", "initial_fraction", "raw_fraction", "rounding_slack"]

SMALLEST = 1e-6
"""Floor of the denominator of a step limit, so that a block with a zero weight has a finite step."""


def initial_fraction(step: float | None, depth: int) -> float:
    r"""Return the initial step as a fraction of its limit, :math:`1/\max(2, \text{depth})` where none is given.

    With larger fractions a deep stack of contracting blocks loses the signal before it learns: the product of the Jacobians of
    ``depth`` blocks stays near :math:`e^{-1}` or above for this one.

    Args:
        step: a fraction in (0, 1), or None for the one that fits the depth.
        depth: number of blocks in the stack.

    Raises:
        ValueError: if the step is outside (0, 1) or the depth is no positive integer.

    Examples:
        >>> initial_fraction(None, 64), initial_fraction(0.25, 1)
        (0.015625, 0.25)
    """
    check_sizes(depth=depth)
    fraction = 1.0 / max(2, depth) if step is None else step
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"step is a fraction of the limit and must lie in (0, 1), got {step!r}.")
    return fraction


def raw_fraction(fraction: float, size: int = 1) -> nn.Parameter:
    r"""Return the parameter :math:`r` with :math:`\operatorname{sigmoid}(r)` equal to a fraction, of shape ``(size,)``.

    It has an axis also for a single number, which ``fully_shard`` wants.

    Args:
        fraction: in (0, 1).
        size: how many.

    Examples:
        >>> raw_fraction(0.5).tolist()
        [0.0]
    """
    return nn.Parameter(torch.full((size,), math.log(fraction / (1.0 - fraction))))


def rounding_slack(weight: Tensor) -> float:
    """Return by what fraction a step made from the Gram bound of a matrix is shrunk against rounding.

    It covers the rounding of the norm in the dtype of the weight, of the step itself, and the excess of the proof
    of the norm of the stored numbers, so that the proved limit holds for the step that is used.

    Args:
        weight: the matrix, or a kernel with its output channels first, in the dtype in which the norm is computed.

    Examples:
        >>> 0.0 < rounding_slack(torch.zeros(8, 8)) < 1e-4
        True
    """
    shape = (weight.shape[0], math.prod(weight.shape[1:]))
    terms, rank = sum(shape), min(shape)
    return 4.0 * (terms + 8) * torch.finfo(weight.dtype).eps + 2.0**-50 * rank * terms


def floored(denominator: Tensor | float) -> Tensor | float:
    """Return the denominator of a step limit, at least :data:`SMALLEST`.

    Args:
        denominator: a 0-d tensor, or a number.

    Examples:
        >>> floored(0.0), floored(torch.tensor(2.0))
        (1e-06, tensor(2.))
    """
    return denominator.clamp_min(SMALLEST) if isinstance(denominator, Tensor) else max(denominator, SMALLEST)
