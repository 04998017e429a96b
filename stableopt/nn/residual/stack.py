r"""A stack of residual blocks with any Lipschitz branches, whose growth stays within a budget (T3i)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, upper
from stableopt.nn.branches import (
    branch_constant,
    branches_of,
    check_branches,
    part_bound,
    refuse_in_place,
    same_shape,
)
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule, require_norm
from stableopt.nn.precision import wide
from stableopt.nn.residual.steps import floored, initial_fraction, raw_fraction
from stableopt.nn.tokens import token_rule
from stableopt.nn.training_constants import BranchConstant
from stableopt.nn.uniform import uniform_rule
from stableopt.theory import depth_growth

__all__ = ["ResidualStack"]


class ResidualStack(nn.Module):
    r"""Residual blocks with any branches, and one budget for how much they may expand together.

    .. math::
        x_{l+1} = x_l + \tau_l f_l(x_l), \qquad \tau_l = s\, w_l \frac{\log G}{L_l}, \qquad
        s = \operatorname{sigmoid}(r), \quad w = \operatorname{softmax}(a), \quad L_l \ge \operatorname{Lip} f_l .

    A branch of which only a Lipschitz constant is known has no step that keeps its block from expanding (class a of T3): the block
    has the constant :math:`1 + \tau_l L_l`, attained by :math:`f_l = L_l I`. But :math:`\sum_l \tau_l L_l = s\log G` for every
    value of the parameters, hence, in the norm of the stack,

    .. math:: \prod_l (1 + \tau_l L_l) \le \exp\sum_l \tau_l L_l \le G .

    What is proved about the stored numbers is the product on the left; with equal shares it is :math:`(1 + \log G / d)^d`, 0.76 G
    for 8 branches and G = 10, and 0.96 G for 64.

    Args:
        branches: :math:`f_l`, each with the shape of its input as the shape of its output: nested Sequentials of layers that
            :func:`stableopt.nn.training_constant` knows (Linear, convolutions), or that have a constant for all values of
            their parameters (activations, other blocks).
        budget: :math:`G > 1`, the limit of the constant of the whole stack.
        allocate: ``"softmax"`` to learn the shares :math:`w` through the parameter ``raw_shares``, ``"uniform"`` for equal ones.
        norm: in which the budget holds: ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.
        step: initial part :math:`s` of the budget that is used, in (0, 1); None for a half.

    Raises:
        TypeError: if a branch is no module.
        ValueError: if there is no branch, ``budget`` is not above 1, another argument is out of range, or a part of a branch has
            ``inplace=True``; in ``forward``, if a branch changes the shape.
        UncertifiableError: if a layer of a branch has no constant that can be relied on during training.

    Note:
        It is a bound of growth, no contraction. While a branch is limited by a method of :func:`stableopt.nn.stabilize` that
        trains with an estimate, the budget may be exceeded a little in training mode; the map of evaluation obeys it. The
        constant of a frozen layer is read once, when the stack is built. The denominator :math:`L_l` has a floor of 1e-6; the
        steps are computed in at least float32 and shrunk by a small multiple of its precision.

    References:
        Hayou et al., *Stable ResNet*, 2021 (steps that shrink with depth keep signals and gradients finite).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> stack = ResidualStack([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)], budget=2.0)
        >>> lipschitz_rule(stack, "l2").upper <= 2.0
        True
        >>> stack.step_sizes().shape
        torch.Size([8])
    """

    raw_shares: nn.Parameter | None

    def __init__(
        self,
        branches: Iterable[nn.Module],
        budget: float,
        *,
        allocate: Literal["softmax", "uniform"] = "softmax",
        norm: str = "l2",
        step: float | None = None,
    ) -> None:
        super().__init__()
        branches = list(branches)
        check_branches(branches, "ResidualStack")
        _check_budget(budget)
        require_norm(norm)
        if allocate not in {"softmax", "uniform"}:
            raise ValueError(f"allocate must be 'softmax' or 'uniform', got {allocate!r}.")
        self.budget, self.allocate, self.norm = float(budget), allocate, norm
        self.constants = [BranchConstant(branch, norm, "ResidualStack") for branch in branches]
        self.branches = nn.ModuleList(branches)
        self.raw_step = raw_fraction(initial_fraction(step, 1))
        self.raw_shares = nn.Parameter(torch.zeros(len(branches))) if allocate == "softmax" else None

    def step_sizes(self) -> Tensor:
        r"""Return the steps :math:`\tau_l` that ``forward`` uses now, one per branch, at least float32 and differentiable.

        Examples:
            >>> stack = ResidualStack([nn.Tanh(), nn.Sigmoid()], budget=math.e, allocate="uniform")
            >>> [round(step, 4) for step in stack.step_sizes().tolist()]
            [0.25, 1.0]
        """
        return torch.stack(self._steps())

    def exponents(self) -> Tensor:
        r"""Return what each block may use of :math:`\log G`: :math:`s\,w_l \log G \ge \tau_l L_l`, one per branch.

        Examples:
            >>> stack = ResidualStack([nn.Tanh(), nn.Sigmoid()], budget=math.e)
            >>> [round(exponent, 4) for exponent in stack.exponents().tolist()]
            [0.25, 0.25]
        """
        raw, depth = wide(self.raw_step), len(self.branches)
        # the sum of a softmax, the exponential and the products below are off by less than this
        total = math.log(self.budget) * (1.0 - 2.0 * (depth + 16) * torch.finfo(raw.dtype).eps)
        used = total * raw[0].sigmoid()
        if self.raw_shares is None:
            return (used / depth).expand(depth)
        return used * wide(self.raw_shares).softmax(0)

    def _steps(self) -> list[Tensor]:
        exponents = self.exponents().unbind()
        pairs = zip(self.branches, self.constants, strict=True)
        return [e / floored(constant.now(branch)) for e, (branch, constant) in zip(exponents, pairs, strict=True)]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the state after all blocks."""
        for index, (branch, step) in enumerate(zip(self.branches, self._steps(), strict=True)):
            input = input + step * same_shape(branch(input), input, f"branch {index} of a ResidualStack")  # noqa: A001
        return input

    def budget_use(self) -> float:
        r"""Return a proved bound of the used part of the budget, :math:`\sum_l \log(1 + \tau_l L_l) / \log G \le 1`.

        Raises:
            ValueError: if a parameter is NaN or infinite.

        Examples:
            >>> stack = ResidualStack([nn.Tanh()] * 100, budget=2.0, step=0.9)
            >>> round(stack.budget_use(), 2)
            0.9
        """
        growth = lipschitz_rule(self, self.norm) if self.norm != TOKEN_MAX else token_rule(self)
        return min(1.0, math.log(growth.upper) / math.log(self.budget) * (1.0 + 2.0**-49))

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"budget={self.budget}, allocate={self.allocate!r}, norm={self.norm!r}"


def _check_budget(budget: float) -> None:
    if not (math.isfinite(budget) and budget > 1.0):
        at_one = (
            " With a budget of 1 every step is zero: a branch that is only Lipschitz has no step that keeps its block from "
            "expanding. Use GradientBlock, InfNormBlock or AveragedResidual, which need no budget."
        )
        raise ValueError(f"budget must be finite and above 1, got {budget!r}.{at_one if budget == 1.0 else ''}")


@lipschitz_rule.register(ResidualStack)
def _stack(module: ResidualStack, norm: str) -> Bound:
    r"""Bound :math:`\prod_l(1 + \tau_l L_l)` for the steps that are used and the proved constants of the branches."""
    refuse_in_place(module)
    parts = [part_bound(branch, f"branches.{i}", norm) for i, branch in enumerate(module.branches)]
    with torch.no_grad():
        steps = module.step_sizes().tolist()
    if not all(math.isfinite(step) for step in steps):
        raise ValueError(f"no bound holds for a ResidualStack with NaN or infinite parameters (steps {steps}).")
    growth = depth_growth([Bound.point(step) for step in steps], parts)
    return Bound(0.0, upper(growth), all(part.proved for part in parts))


@uniform_rule.register(ResidualStack)
def _uniform(module: ResidualStack, norm: str) -> Bound | None:
    return Bound(0.0, module.budget) if norm == module.norm and _is_current(module) else None


def _is_current(module: ResidualStack) -> bool:
    pairs = zip(module.branches, module.constants, strict=True)
    return all(constant.still_holds(branch, "ResidualStack") for branch, constant in pairs)


@branches_of.register(ResidualStack)
def _branches(module: ResidualStack) -> dict[str, nn.Module]:
    return {f"branches.{i}": branch for i, branch in enumerate(module.branches)}


@branch_constant.register(ResidualStack)
def _constant(module: ResidualStack, parts: list[Bound], norm: str) -> Bound:  # noqa: ARG001 the steps make up for them
    refuse_in_place(module)
    if norm != module.norm or not _is_current(module):
        raise UncertifiableError(
            f"a ResidualStack keeps its budget in the norm that it was built with, {module.norm!r}, with the layers that it was "
            f"built with; a limit in {norm!r} was asked for. Build it anew, with norm={norm!r}."
        )
    return Bound(0.0, module.budget)


@token_rule.register(ResidualStack)
def _token(module: ResidualStack) -> Bound:
    return _stack(module, TOKEN_MAX)
