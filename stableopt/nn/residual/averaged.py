r"""The convex mix of the input and a branch: nonexpansive in every norm in which the branch is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.branches import (
    branch_constant,
    branches_of,
    check_branches,
    part_bound,
    refuse_in_place,
    same_shape,
    uniform_of_branches,
)
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.precision import wide
from stableopt.nn.residual.steps import initial_fraction, raw_fraction
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["AveragedResidual"]


class AveragedResidual(nn.Module):
    r"""Convex mix of the input and a branch.

    .. math:: x \mapsto (1 - a)\, x + a\, g(x), \qquad 0 \le a \le 1 .

    In every norm the constant is at most :math:`(1 - a) + a L_g`, so at most 1 if the branch has :math:`L_g \le 1`; it is attained
    where the branch acts as :math:`L_g` times the identity. A plain sum :math:`x + g(x)` has :math:`1 + L_g` instead, which doubles
    with every block. The norm may be l2, linf, l1 or, for a branch with a bound in it, ``"token_max"``.

    Args:
        branch: :math:`g`, a module whose output has the shape of its input.
        weight: :math:`a`, in [0, 1], or in (0, 1) if it is learned; None for :math:`1/\max(2, \text{depth})`.
        depth: number of blocks in the stack, for the weight to start from. With larger weights a deep stack forgets its input at
            the start and never learns: beside the branches, :math:`(1 - a)^d` of it is left after :math:`d` blocks.
        learnable: whether :math:`a = \operatorname{sigmoid}(r)` is learned, through the parameter ``raw_weight``.

    Raises:
        TypeError: if ``branch`` is no module.
        ValueError: if ``weight`` or ``depth`` is out of range or a part of the branch has ``inplace=True``; in ``forward``, if the
            branch changes the shape.

    Note:
        The block is no contraction: where the branch is the identity, so is the block. A learned weight is computed in at least
        float32.

    References:
        Serrurier et al., 2021 (1-Lipschitz branches); Krasnoselskii, 1955, and Mann, 1953 (averaged maps).

    Examples:
        >>> block = AveragedResidual(nn.Identity(), weight=0.25, learnable=False)
        >>> block(torch.tensor([2.0])).tolist(), lipschitz_rule(block, "l2").upper
        ([2.0], 1.0)
        >>> round(float(AveragedResidual(nn.Tanh(), depth=64).step_size().detach()), 6)
        0.015625
    """

    raw_weight: nn.Parameter | None

    def __init__(
        self, branch: nn.Module, weight: float | None = None, *, depth: int = 1, learnable: bool = True
    ) -> None:
        super().__init__()
        check_branches([branch], "AveragedResidual")
        start = initial_fraction(None, depth)
        weight = start if weight is None else weight
        if not (0.0 < weight < 1.0 or (weight in {0.0, 1.0} and not learnable)):
            interval = "(0, 1) to be learned" if learnable else "[0, 1]"
            raise ValueError(f"weight must lie in {interval}, got {weight!r}.")
        self.branch = branch
        self.weight = float(weight)
        self.raw_weight = raw_fraction(weight) if learnable else None

    def step_size(self) -> Tensor | float:
        """Return the weight :math:`a` of the branch that ``forward`` uses now; if it is learned, a 0-d tensor.

        Examples:
            >>> AveragedResidual(nn.Tanh(), 0.25, learnable=False).step_size()
            0.25
        """
        return self.weight if self.raw_weight is None else wide(self.raw_weight)[0].sigmoid()

    def forward(self, input: Tensor, *others: Any, **options: Any) -> Tensor:  # noqa: A002 the name torch uses
        """Return the mix of the input and the branch; further arguments, such as masks, go to the branch."""
        output = same_shape(self.branch(input, *others, **options), input, "the branch of an AveragedResidual")
        return input + self.step_size() * (output - input)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"weight={self.weight}, learnable={self.raw_weight is not None}"


@lipschitz_rule.register(AveragedResidual)
def _averaged(module: AveragedResidual, norm: str) -> Bound:
    refuse_in_place(module)
    inner = part_bound(module.branch, "branch", norm)
    if module.raw_weight is not None and not math.isfinite(raw := float(module.raw_weight.detach())):
        raise ValueError(f"no bound holds for an AveragedResidual with the raw weight {raw}.")
    with torch.no_grad():
        a = float(module.step_size())
    excess = Bound.point(a) * (
        Bound.point(inner.upper) - 1.0
    )  # (1 - a) + a L = 1 + a (L - 1), with a in one place only
    return Bound(0.0, (1.0 + excess).upper, inner.proved)


@token_rule.register(AveragedResidual)
def _token(module: AveragedResidual) -> Bound:
    return _averaged(module, TOKEN_MAX)


@branches_of.register(AveragedResidual)
def _branches(module: AveragedResidual) -> dict[str, nn.Module]:
    return {"branch": module.branch}


@branch_constant.register(AveragedResidual)
def _constant(module: AveragedResidual, parts: list[Bound], norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    refuse_in_place(module)
    return Bound(0.0, max(1.0, parts[0].upper), parts[0].proved)


uniform_rule.register(AveragedResidual, uniform_of_branches)
