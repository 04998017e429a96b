r"""How much of its step limit a residual block uses, for the blocks whose law is known from their weights.

A block :math:`h^+ = h - \tau\nabla\varphi(h)` with a convex, L-smooth :math:`\varphi` is nonexpansive if and only if
:math:`\tau L/2 \le 1` (T3, class c): this number is its *use*. Beyond 1 the block overshoots the minimum along its steepest
direction by more than it was away. Every law below is of this class, also that of the convex mix :math:`(1 - a)h + a\,g(h)`
(class g): for :math:`\operatorname{Lip} g \le 1` its branch :math:`g - I` is that of a convex step with :math:`L = 2`, and
the use is :math:`a`. A branch of which only a Lipschitz constant is known (class a) has no step limit at all, and no use: such a
block has a *growth*, at most :math:`1 + \tau L`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from stableopt.constraints.sharding import is_sharded, whole
from stableopt.errors import UncertifiableError
from stableopt.linalg import lower
from stableopt.nn.residual import (
    AveragedResidual,
    CFLBlock,
    CompensatedPair,
    InfNormBlock,
    ResidualStack,
    RungeKuttaBlock,
)
from stableopt.nn.residual.gradient_step import GradientStep
from stableopt.nn.residual.sll import SLL, FoldedSLL
from stableopt.nn.rules import lipschitz
from stableopt.nn.sharded import class_of
from stableopt.nn.uniform import uniform_rule
from stableopt.nn.weights.geometry import Geometry

Block = TypeVar("Block", bound=nn.Module)

__all__ = ["StepLaw", "constant_of", "fraction_of_limit", "growth_of_steps", "has_law", "mix_of", "step_law"]

_MATRIX = Geometry("linear")


@dataclass(frozen=True, eq=False)
class StepLaw:
    r"""The use of a block as a function of the norm of one operator: :math:`c + s\,\|\operatorname{diag}(r) W\|_2^2`.

    Args:
        scale: :math:`s`, for a step :math:`\tau` half of it.
        damping: :math:`c`, that of a linear part of the branch.
        rows: :math:`r`, one entry per row or output channel; None for ones, so that the operator is that of the weight itself.
        geometry: the operator that the weight is: a matrix, or a convolution.

    Examples:
        >>> import torch
        >>> StepLaw(torch.tensor(0.5)).use(torch.tensor(2.0))
        tensor(2.)
    """

    scale: Tensor | float
    damping: Tensor | float = 0.0
    rows: Tensor | None = None
    geometry: Geometry = _MATRIX

    @property
    def is_weight(self) -> bool:
        """Whether the norm is that of the weight of the block."""
        return self.rows is None

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the matrix or kernel whose norm counts."""
        return weight if self.rows is None else self.rows.to(weight).view(-1, *[1] * (weight.ndim - 1)) * weight

    def use(self, norm: Tensor) -> Tensor:
        """Return the use of the step limit for a norm of the matrix; an estimate from below gives one from below."""
        return self.damping + self.scale * norm.square()


@functools.singledispatch
def step_law(module: nn.Module) -> StepLaw | None:  # noqa: ARG001 for classes that are registered
    r"""Return the law of a residual block; register a function here for a class of your own.

    Args:
        module: a block whose matrix or kernel :math:`W` is its attribute ``weight``; of ours
            :class:`stableopt.nn.GradientBlock` and :class:`stableopt.nn.ConvGradientBlock`, with the use
            :math:`\tau\,(2m + \|A\|^2)/2` or, for a step per unit, :math:`\tau m + \|S^{1/2}A\|^2/2`, and
            :class:`stableopt.nn.SLL`, with :math:`\|S^{1/2}W\|^2/2`.

    Returns:
        The law; None for a class that is not known.

    Examples:
        >>> import torch
        >>> from stableopt.nn import GradientBlock
        >>> block = GradientBlock(3, step=0.25, strong=0.5)
        >>> use = step_law(block).use(torch.linalg.matrix_norm(block.weight, 2))
        >>> bool(0.24 < use <= 0.25), step_law(nn.Linear(2, 2)) is None
        (True, True)
    """
    return None


@step_law.register(GradientStep)
def _(module: GradientStep) -> StepLaw:
    block = _gathered(module)
    if block.bound == "rows":
        return StepLaw(0.5, block.damping(), block.step_sizes().sqrt(), module.geometry)
    return StepLaw(block.step_size() / 2.0, block.damping(), geometry=module.geometry)


@step_law.register(SLL)
def _(module: SLL) -> StepLaw:
    return StepLaw(0.5, rows=_gathered(module).step_sizes().sqrt())


@step_law.register(FoldedSLL)
def _(module: FoldedSLL) -> StepLaw:
    return StepLaw(0.5, rows=whole(module.step).clamp_min(0.0).sqrt())


def has_law(module: nn.Module) -> bool:
    """Return whether the class of a module has a law, without computing it.

    Examples:
        >>> has_law(SLL(2)), has_law(nn.Linear(2, 2))
        (True, False)
    """
    return step_law.dispatch(type(module)) is not step_law.dispatch(object)


@functools.singledispatch
def fraction_of_limit(module: nn.Module) -> Tensor | None:  # noqa: ARG001 for classes that are registered
    """Return the use of the step limit of a block whose step is a learned fraction of it; None for another.

    Args:
        module: of ours :class:`stableopt.nn.RungeKuttaBlock`, :class:`stableopt.nn.InfNormBlock`,
            :class:`stableopt.nn.CompensatedPair` and :class:`stableopt.nn.CFLBlock`, for what is declared of its branch.

    Examples:
        >>> from stableopt.nn import InfNormBlock
        >>> round(float(fraction_of_limit(InfNormBlock(3, step=0.25))), 6)
        0.25
    """
    return None


@fraction_of_limit.register(RungeKuttaBlock)
@fraction_of_limit.register(InfNormBlock)
@fraction_of_limit.register(CompensatedPair)
def _(module: RungeKuttaBlock | InfNormBlock | CompensatedPair) -> Tensor:
    return whole(module.raw_step.detach()).sigmoid().amax()


@fraction_of_limit.register(CFLBlock)
def _(module: CFLBlock) -> Tensor | None:
    return None if module.kind == "lipschitz" else whole(module.raw_step.detach()).sigmoid().amax()


@functools.singledispatch
def growth_of_steps(module: nn.Module) -> Tensor | None:  # noqa: ARG001 for classes that are registered
    r"""Return :math:`\prod_l(1 + \tau_lL_l)` of a block with a budget of growth, which its steps allow; None for another.

    Args:
        module: of ours :class:`stableopt.nn.ResidualStack`, and a :class:`stableopt.nn.CFLBlock` with a growth.

    Examples:
        >>> from stableopt.nn import ResidualStack
        >>> stack = ResidualStack([nn.Tanh(), nn.Tanh()], budget=math.e, step=0.5)
        >>> round(float(growth_of_steps(stack)), 3)
        1.562
    """
    return None


@growth_of_steps.register(ResidualStack)
def _(module: ResidualStack) -> Tensor:
    return _gathered(module).exponents().detach().log1p().sum().exp()


@growth_of_steps.register(CFLBlock)
def _(module: CFLBlock) -> Tensor | None:
    if module.kind != "lipschitz":
        return None
    return 1.0 + whole(module.raw_step.detach()).sigmoid().amax() * (module.declared("growth", lower) - 1.0)


def mix_of(module: AveragedResidual) -> Tensor | float:
    """Return the weight of the branch in the convex mix of a :class:`stableopt.nn.AveragedResidual`.

    Examples:
        >>> mix_of(AveragedResidual(nn.Identity(), 0.25, learnable=False))
        0.25
    """
    return module.weight if module.raw_weight is None else whole(module.raw_weight.detach())[0].sigmoid()


def constant_of(module: nn.Module, path: str, known: Mapping[str, float]) -> float:
    """Return what the norms of the weights say about the Lipschitz constant of a module, NaN if they say nothing.

    Args:
        module: chains of linear maps and of modules without parameters that have a Lipschitz rule, and blocks of ours.
        path: its name in the model.
        known: weight name -> norm; with estimates the result is an estimate, with limits that hold it is a bound.

    Examples:
        >>> constant_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "f", {"f.0.weight": 3.0})
        3.0
    """
    prefix = f"{path}." if path else ""
    if isinstance(module, nn.Sequential):
        return math.prod(constant_of(child, f"{prefix}{name}", known) for name, child in module.named_children())
    if isinstance(module, AveragedResidual):
        return 1.0 + float(mix_of(module)) * (constant_of(module.branch, f"{prefix}branch", known) - 1.0)
    if f"{prefix}weight" in known and not has_law(module):
        return known[f"{prefix}weight"]
    return _own_constant(module)


def _own_constant(module: nn.Module) -> float:
    """Return the constant of a module that needs no weights to be known, NaN if there is none."""
    if has_law(module) or isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten):
        return 1.0
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training:  # noqa: SLF001 torch has no other name for all of them
        return 1.0 / (1.0 - module.p) if module.p < 1.0 else 0.0
    try:
        if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
            return lipschitz(module).upper
        if not class_of(module).__module__.startswith("stableopt."):  # running statistics promise their worst case only
            return math.nan
        always = uniform_rule(module, "l2")
    except (UncertifiableError, ValueError):
        return math.nan
    return math.nan if always is None else always.upper


def _gathered(module: Block) -> Block:
    """Return a module whose own parameters are whole: itself, or of a sharded one a copy."""
    own = module._parameters  # noqa: SLF001 torch has no public access
    if not any(is_sharded(p) for p in own.values()):
        return module
    twin: Any = object.__new__(class_of(module))  # fully_shard puts a class in front whose copies are made anew
    vars(twin).update(vars(module))
    vars(twin)["_parameters"] = {
        name: None if p is None else nn.Parameter(whole(p.detach())) for name, p in own.items()
    }
    return twin
