r"""A residual layer that is 1-Lipschitz for every value of its parameters: a scaled step for activations with slopes in [0, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, spectral_norm
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.residual.per_unit import damped_factor, rounding_of_rows, row_factor, scaled_rows, unit_steps
from stableopt.nn.unit_slopes import UNIT_SLOPES, check_unit_slopes

__all__ = ["SLL", "FoldedSLL"]


class FoldedSLL(nn.Module):
    r"""The map of an :class:`SLL` layer with its step as stored numbers, for evaluation.

    .. math:: x \mapsto x - W^\top (s \odot \sigma(Wx + b)) .

    Args:
        weight: :math:`W`, of shape ``(hidden, dim)``.
        bias: :math:`b`, of shape ``(hidden,)``.
        step: :math:`s \ge 0`, of shape ``(hidden,)``.
        activation: name of :math:`\sigma`.

    Raises:
        ValueError: if the activation is unknown.

    Examples:
        >>> folded = SLL(3, 5).folded()
        >>> sorted(folded.state_dict())
        ['bias', 'step', 'weight']
    """

    def __init__(self, weight: Tensor, bias: Tensor, step: Tensor, activation: str) -> None:
        super().__init__()
        check_unit_slopes(activation, "SLL")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.step = nn.Parameter(step, requires_grad=False)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input."""
        return _residual(input, self.weight, self.bias, self.step, self.activation)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        return f"{dim}, {hidden}, activation={self.activation!r}"


class SLL(nn.Module):
    r"""SDP-based Lipschitz layer: a residual step, scaled per hidden unit, that never expands.

    .. math:: x \mapsto x - 2 W^\top T^{-1} \sigma(Wx + b), \qquad T_{ii} = \sum_j |WW^\top|_{ij} \frac{q_j}{q_i}, \quad q > 0 .

    **Proof.** :math:`T - WW^\top` is, after the similarity with :math:`\operatorname{diag}(q)`, diagonally dominant with a
    non-negative diagonal, and it is symmetric, so :math:`T \succeq WW^\top` (Gershgorin) and :math:`W^\top T^{-1}W \preceq I`. The
    difference of two outputs is :math:`J(x - y)` with :math:`J = I - 2W^\top T^{-1}DW` and a diagonal :math:`0 \preceq D
    \preceq I` of slopes; hence :math:`-I \preceq I - 2W^\top T^{-1} W \preceq J \preceq I`.

    Args:
        dim: number of features of input and output.
        hidden: rows of :math:`W`; None for ``dim``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"softplus"`` or ``"hardtanh"``: slopes in [0, 1].

    Raises:
        ValueError: if a size is no positive integer, or the activation has slopes outside [0, 1].

    Attributes:
        weight: :math:`W`, of shape ``(hidden, dim)``.
        bias: :math:`b`.
        raw_q: :math:`q = e^{15\tanh(\text{raw}/15)}`; bounded, so that nothing overflows.

    Note:
        Both sums of :math:`T` are in at least float32; the step :math:`2T^{-1}` is rounded down to the dtype of the weight, and the
        map is then 1-Lipschitz for the numbers that are used: :func:`stableopt.nn.lipschitz` proves it. A row of
        zeros has a finite step. There is no plain torch layer with the same map; :meth:`folded` computes the step once.

    References:
        Araujo, Havens, Delattre, Allauzen and Hu, *A Unified Algebraic Perspective on Lipschitz Neural Networks*, 2023.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer = SLL(4, 8)
        >>> x, y = torch.randn(4), torch.randn(4)
        >>> bool((layer(x) - layer(y)).norm() <= (x - y).norm())
        True
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: str = "relu") -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_sizes(dim=dim, hidden=hidden)
        check_unit_slopes(activation, "SLL")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(hidden, dim))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.raw_q = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a weight with orthonormal rows or columns, a bias as :class:`torch.nn.Linear` does, and set q to 1."""
        nn.init.orthogonal_(self.weight)
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.raw_q)

    def step_sizes(self) -> Tensor:
        r"""Return :math:`2T^{-1}` per hidden unit as ``forward`` uses it: in the dtype of the weight, rounded down, differentiable.

        Examples:
            >>> layer = SLL(2)
            >>> _ = nn.init.eye_(layer.weight)
            >>> bool((1.99 < layer.step_sizes()).all() and (layer.step_sizes() <= 2.0).all())
            True
        """
        return unit_steps(self.weight, self.raw_q).units

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the next state; the features are the last dimension of the input."""
        return _residual(input, self.weight, self.bias, self.step_sizes(), self.activation)

    def folded(self) -> FoldedSLL:
        """Return a layer with the same map, bit for bit, that stores the step instead of computing it.

        Examples:
            >>> layer = SLL(3)
            >>> x = torch.ones(3)
            >>> bool((layer.folded()(x) == layer(x)).all())
            True
        """
        with torch.no_grad():
            folded = FoldedSLL(self.weight.clone(), self.bias.clone(), self.step_sizes().clone(), self.activation)
        return folded.train(self.training)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        hidden, dim = self.weight.shape
        return f"{dim}, {hidden}, activation={self.activation!r}"


def _residual(input: Tensor, weight: Tensor, bias: Tensor, step: Tensor, activation: str) -> Tensor:  # noqa: A002
    return input - F.linear(step * UNIT_SLOPES[activation](F.linear(input, weight, bias)), weight.mT)


def _bound(weight: Tensor, bias: Tensor, step: Tensor, norm: str) -> Bound:
    r"""Bound :math:`I - W^\top S D W` for the stored numbers."""
    if not bool(bias.isfinite().all() & step.isfinite().all()) or bool((step < 0).any()):
        raise ValueError("no bound holds for an SLL layer with NaN or infinite parameters, or with a negative step.")
    scaled = scaled_rows(weight, step)
    if norm != "l2":
        return row_factor(scaled[None, :, :, None], Bound.point(0.0))
    curvature = (Bound.point(spectral_norm(scaled).upper) + rounding_of_rows(scaled)) ** 2
    return damped_factor(Bound.point(0.0), curvature)


@lipschitz_rule.register(SLL)
def _sll(module: SLL, norm: str) -> Bound:
    return _bound(module.weight, module.bias, module.step_sizes(), norm)


@lipschitz_rule.register(FoldedSLL)
def _folded_sll(module: FoldedSLL, norm: str) -> Bound:
    return _bound(module.weight, module.bias, module.step, norm)
