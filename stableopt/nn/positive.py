r"""Positive numbers out of free parameters."""

from __future__ import annotations

from torch import Tensor

__all__ = ["bounded_exp"]


def bounded_exp(raw: Tensor, limit: float = 15.0) -> Tensor:
    r"""Return :math:`e^{\ell\tanh(x/\ell)}` with the limit :math:`\ell`: positive, smooth, neither zero nor infinite.

    Examples:
        >>> import torch
        >>> bounded_exp(torch.tensor([0.0, -1e9]), 1.0).tolist()
        [1.0, 0.3678794503211975]
    """
    return (limit * (raw / limit).tanh()).exp()
