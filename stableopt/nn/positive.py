r"""Positive numbers out of free parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.nn.precision import wide

__all__ = ["bounded_exp", "positive", "raw_positive"]

_LEAST, _LARGEST = 1e-6, 1e6
"""The range of :func:`positive`, in which nothing overflows."""


def bounded_exp(raw: Tensor, limit: float = 15.0) -> Tensor:
    r"""Return :math:`e^{\ell\tanh(x/\ell)}` with the limit :math:`\ell`: positive, smooth, neither zero nor infinite.

    Examples:
        >>> import torch
        >>> bounded_exp(torch.tensor([0.0, -1e9]), 1.0).tolist()
        [1.0, 0.3678794503211975]
    """
    return (limit * (raw / limit).tanh()).exp()


def positive(raw: Tensor) -> Tensor:
    r"""Return :math:`\operatorname{softplus}(r)`, clamped to [1e-6, 1e6], in at least float32: a step without a limit.

    Args:
        raw: the free parameter.

    Examples:
        >>> positive(torch.tensor([-1e9, 1e9])).tolist()
        [9.999999974752427e-07, 1000000.0]
    """
    return F.softplus(wide(raw), threshold=40.0).clamp(_LEAST, _LARGEST)


def raw_positive(value: float) -> nn.Parameter:
    r"""Return the parameter :math:`r` of shape ``(1,)`` with ``positive(r)`` equal to a step.

    Args:
        value: the step, in [1e-6, 1e6].

    Raises:
        ValueError: if it is outside of that range.

    Examples:
        >>> positive(raw_positive(0.25)).tolist()
        [0.25]
    """
    if not _LEAST <= value <= _LARGEST:
        raise ValueError(f"step must lie in [{_LEAST:g}, {_LARGEST:g}], got {value!r}.")
    return nn.Parameter(torch.full((1,), value + math.log(-math.expm1(-value))))
