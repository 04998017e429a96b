r"""Matrices whose norm is capped while they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, inf_norm, one_norm, spectral_norm
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["CappedLinear", "capped"]


def capped(weight: Tensor, limit: float = 1.0) -> Tensor:
    r"""Return :math:`\ell\,W / \max(1, U)` with :math:`U \ge \|W\|_2`, differentiable, in at least float32.

    Args:
        weight: a matrix.
        limit: :math:`\ell`.

    Returns:
        A matrix with an l2 norm of at most the limit, also after the rounding of its entries.

    Examples:
        >>> bool(capped(torch.full((2, 2), 5.0)).norm() < 1.0)
        True
        >>> bool((capped(torch.full((2, 2), 0.25), 2.0) > 0.499).all())  # a norm below 1 is left as it is
        True
    """
    weight = wide(weight)
    with full_precision(weight):
        U = gram_norm(weight)
    return weight * (limit * (1.0 - rounding_slack(weight)) / U.clamp_min(1.0))


class CappedLinear(nn.Module):
    r"""Affine map of the last dimension whose l2 constant cannot exceed a limit.

    .. math:: x \mapsto \ell\,\frac{W}{\max(1, U)}\,x + b, \qquad U \ge \|W\|_2 .

    Args:
        d_in: number of features of the input.
        d_out: of the output.
        limit: :math:`\ell > 0`.
        bias: whether there is a :math:`b`.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        :math:`U` comes from Gram iteration with a margin for rounding; :func:`stableopt.nn.lipschitz` proves the norm of the matrix
        that is used. The matrix may have a smaller norm than the limit, so that a layer can learn to be quiet. Half precision is
        computed in float32 and cast back.

    References:
        Delattre, Barthélemy, Araujo and Allauzen, 2023 (Gram iteration).

    Examples:
        >>> from stableopt.nn import lipschitz
        >>> layer = CappedLinear(3, 2, limit=5.0)
        >>> _ = nn.init.normal_(layer.weight, std=100.0)
        >>> 4.8 < lipschitz(layer).upper <= 5.0
        True
    """

    def __init__(self, d_in: int, d_out: int, *, limit: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        check_sizes(d_in=d_in, d_out=d_out)
        check_positive(limit=limit)
        self.limit = float(limit)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a weight with orthonormal rows or columns and set the bias to zero."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        """Return the matrix that ``forward`` uses.

        Examples:
            >>> CappedLinear(3, 2).matrix().shape
            torch.Size([2, 3])
        """
        return capped(self.weight, self.limit)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the image; the features are the last dimension of the input."""
        with full_precision(input):
            weight = self.matrix()
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return F.linear(wide(input), weight, bias).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        d_out, d_in = self.weight.shape
        return f"{d_in}, {d_out}, limit={self.limit}, bias={self.bias is not None}"


@lipschitz_rule.register(CappedLinear)
def _capped_linear(module: CappedLinear, norm: str) -> Bound:
    if module.bias is not None and not bool(module.bias.isfinite().all()):
        raise ValueError("no bound holds for a CappedLinear with NaN or infinite parameters.")
    weight = module.matrix().detach()
    return {"linf": inf_norm, "l1": one_norm}.get(norm, spectral_norm)(weight)


@token_rule.register(CappedLinear)
def _token(module: CappedLinear) -> Bound:
    return Bound(0.0, _capped_linear(module, "l2").upper)


@uniform_rule.register(CappedLinear)
def _uniform(module: CappedLinear, norm: str) -> Bound | None:
    return Bound(0.0, module.limit) if norm in {"l2", TOKEN_MAX} else None
