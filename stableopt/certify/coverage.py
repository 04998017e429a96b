"""Which modules a certificate can speak about, and the sentence for those that it cannot."""

from __future__ import annotations

from torch import nn

from stableopt.nn import (
    SLL,
    AntisymmetricCell,
    AveragedResidual,
    BackwardEulerBlock,
    BallProjection,
    CFLBlock,
    ClippedAttention,
    CompensatedPair,
    Concat,
    ContinuousDepth,
    ContractingCell,
    ConvGradientBlock,
    DiagonalMetricCell,
    DiagonalStateSpace,
    HamiltonianBlock,
    Householder,
    InfNormBlock,
    InvertibleDownsampling,
    L2NormPool,
    LayerCentering,
    LeakyCell,
    LinearSpline,
    Merge,
    NActivation,
    Parallel,
    ProximalBlock,
    Recurrence,
    ResidualStack,
    ResolventBlock,
    RungeKuttaBlock,
    Sandwich,
    SkewBlock,
    SkewEulerBlock,
    SoftAbs,
    StateSpaceBlock,
    StateSpaceStack,
    TransformerBlock,
)
from stableopt.nn.dispatch import named, registered_class
from stableopt.nn.parametrized import plain_class
from stableopt.nn.residual.sll import FoldedSLL
from stableopt.nn.sandwich import FoldedSandwich

__all__ = ["KNOWN", "is_foreign", "uncovered"]

KNOWN = (
    "Linear, Conv1d, Conv2d, UnitRowLinear, GradientBlock, BatchNorm, BatchCentering, InputNormalization, average and max pooling, "
    "Flatten, Scale, Dropout, and the activations ReLU, LeakyReLU, Abs, GroupSort, Tanh, Sigmoid, Hardtanh, ELU, Softplus, SiLU, "
    "GELU"
)
"""What has a rule, for messages."""

_BRANCHES = "a certificate describes a chain of operations, without branches. Write the model as a chain"
_TOGETHER = (
    "its constant is proved for its parts together, and a certificate bounds one operation at a time, which would lose a part of "
    "the bound. Use a GradientBlock or stabilized Linear layers instead"
)
_EQUATION = (
    "it is the solution of an equation, and the format has operations without iteration only. Use a GradientBlock"
)
_SEQUENCE = (
    "a certificate describes a chain of operations on a vector or an image, without recurrence and attention. Certify the part "
    "of the model before or behind it"
)
_ACTIVATION = "this activation is not in the format. Use Abs, GroupSort or another activation of the format"
_REASONS: dict[type[nn.Module], str] = {
    **dict.fromkeys((AveragedResidual, ResidualStack, CompensatedPair, CFLBlock, Concat, Parallel, Merge), _BRANCHES),
    **dict.fromkeys((SLL, FoldedSLL, Sandwich, FoldedSandwich), _TOGETHER),
    **dict.fromkeys(
        (HamiltonianBlock, InfNormBlock, RungeKuttaBlock, SkewBlock, SkewEulerBlock, ContinuousDepth), _TOGETHER
    ),
    **dict.fromkeys((BackwardEulerBlock, ProximalBlock, ResolventBlock), _EQUATION),
    **dict.fromkeys(
        (
            AntisymmetricCell,
            ClippedAttention,
            ContractingCell,
            DiagonalMetricCell,
            DiagonalStateSpace,
            LeakyCell,
            Recurrence,
            StateSpaceBlock,
            StateSpaceStack,
            TransformerBlock,
        ),
        _SEQUENCE,
    ),
    **dict.fromkeys((Householder, LinearSpline, NActivation, SoftAbs), _ACTIVATION),
    ConvGradientBlock: "the format has gradient blocks of matrices only. Use a GradientBlock, or stabilized convolutions",
    L2NormPool: "the format has average and max pooling only. Use ScaledAvgPool",
    LayerCentering: "it is not in the format. Use BatchCentering, which is a translation in evaluation",
    InvertibleDownsampling: "the format has no rearrangement of pixels. Use a convolution with a stride",
    BallProjection: "it is not in the format. Leave it out of the model and apply it to the inputs before",
}


def uncovered(module: nn.Module, path: str) -> str:
    """Return the sentence for a module without a rule: which, why, and what to do.

    Args:
        module: the module.
        path: its dotted name, empty for the model itself.

    Examples:
        >>> print(uncovered(SLL(2), "1"))
        '1' (SLL) cannot be certified: its constant is proved for its parts together, ... Its bound without a file is
        stableopt.nn.lipschitz(module).
    """
    kind = plain_class(module)
    reason = next((_REASONS[base] for base in kind.__mro__ if base in _REASONS), None)
    if reason is None:
        reason = (
            f"{kind.__name__} has no rule for certificates. Those with one are {KNOWN}. Replace it, or register a rule that "
            "returns "
            f"the operations it computes: @stableopt.certify.fold.register({kind.__name__})"
        )
    bound = (
        " Its bound without a file is stableopt.nn.lipschitz(module)." if registered_class(module) is not None else ""
    )
    return f"{named(module, path)} cannot be certified: {reason}.{bound}"


def is_foreign(module: nn.Module) -> bool:
    """Return whether a module is of somebody else's class, or a list of modules: its forward may be recorded.

    Args:
        module: the module.

    Examples:
        >>> class Mine(nn.Module):
        ...     pass
        >>> is_foreign(Mine()), is_foreign(nn.ModuleList()), is_foreign(nn.GLU())
        (True, True, False)
    """
    kind = plain_class(module)
    lists = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return kind in lists or kind.__module__.split(".")[0] not in {"torch", "stableopt"}
