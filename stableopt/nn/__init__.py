r"""Models whose amplification of perturbations is limited by construction, and the rules that prove it.

:func:`stabilize` gives a model a Lipschitz limit for the whole training, :func:`constrain` keeps a single parameter in a set,
:func:`lipschitz` proves a bound for a model as it is. :class:`GroupSort` and :class:`GradientBlock` are layers that waste none of
it, :class:`MarginCrossEntropy` is the loss that goes with it.
"""

from stableopt.nn.activation_constants import activation_constant
from stableopt.nn.activations import Abs, GroupSort, MaxMin, NActivation, Scale, SoftAbs
from stableopt.nn.attention import BoundedNorm, ClippedAttention, JoinTokens, Positions, TransformerBlock
from stableopt.nn.budget import LearnedBudget
from stableopt.nn.centering import BallProjection, BatchCentering, InputNormalization, LayerCentering
from stableopt.nn.constrain import constrain, parameter_groups
from stableopt.nn.continuous import ContinuousDepth, FlowBound, flow_bound
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.export import export, plain_state_dict, release
from stableopt.nn.gap import norm_gap
from stableopt.nn.heads import UnitRowLinear, margin_constants, margin_radii
from stableopt.nn.householder import Householder
from stableopt.nn.implicit import (
    Anderson,
    BackwardEulerBlock,
    Fista,
    ForwardBackward,
    ProximalBlock,
    ResolventBlock,
)
from stableopt.nn.input_clip import clip_input
from stableopt.nn.isometric import HamiltonianBlock, SkewBlock, SkewEulerBlock
from stableopt.nn.layers import layers
from stableopt.nn.losses import (
    CertificateRegularizer,
    CertifiedMarginLoss,
    GloRoLoss,
    HKRLoss,
    KRLoss,
    MarginBounds,
    MarginCrossEntropy,
)
from stableopt.nn.pooling import InvertibleDownsampling, L2NormPool, ScaledAvgPool
from stableopt.nn.recurrent import (
    AntisymmetricCell,
    CellBound,
    ContractingCell,
    DiagonalMetricCell,
    LastStep,
    LeakyCell,
    MeanOverTime,
    Recurrence,
    RecurrentCell,
    cell_bound,
    cell_rule,
    contracting,
    layer_bounds,
    sequence_gain,
)
from stableopt.nn.residual import (
    SLL,
    AveragedResidual,
    CFLBlock,
    CompensatedPair,
    ConvGradientBlock,
    DissipativeBlock,
    DissipativeField,
    Field,
    FieldBound,
    FoldedBlock,
    GradientBlock,
    GradientField,
    InfNormBlock,
    InfNormField,
    ResidualStack,
    RungeKuttaBlock,
    cfl,
    damped_bound,
    field_bound,
)
from stableopt.nn.rules import lipschitz
from stableopt.nn.sandwich import Sandwich
from stableopt.nn.splines import LinearSpline
from stableopt.nn.stabilize import layer_limit, stabilize
from stableopt.nn.statespace import (
    CappedLinear,
    DiagonalStateSpace,
    LinearSystem,
    StateSpaceBlock,
    StateSpaceStack,
    discretize,
    peak_gain,
    stable_eigenvalues,
)
from stableopt.nn.structure import Concat, Merge, Parallel
from stableopt.nn.table import table
from stableopt.nn.tokens import token_rule
from stableopt.nn.training_constants import training_constant
from stableopt.nn.uniform import uniform_bound
from stableopt.nn.weights import METHODS, Geometry, WeightMap

__all__ = [
    "Abs",
    "Anderson",
    "AntisymmetricCell",
    "AveragedResidual",
    "BackwardEulerBlock",
    "BallProjection",
    "BatchCentering",
    "BoundedNorm",
    "CFLBlock",
    "CappedLinear",
    "CellBound",
    "CertificateRegularizer",
    "CertifiedMarginLoss",
    "ClippedAttention",
    "CompensatedPair",
    "Concat",
    "ConvGradientBlock",
    "ContractingCell",
    "DiagonalMetricCell",
    "ContinuousDepth",
    "DiagonalStateSpace",
    "DissipativeBlock",
    "DissipativeField",
    "Field",
    "FieldBound",
    "Fista",
    "FlowBound",
    "FoldedBlock",
    "ForwardBackward",
    "Geometry",
    "GradientBlock",
    "GradientField",
    "GloRoLoss",
    "GroupSort",
    "HKRLoss",
    "HamiltonianBlock",
    "Householder",
    "InfNormBlock",
    "InfNormField",
    "InputNormalization",
    "InvertibleDownsampling",
    "L2NormPool",
    "LastStep",
    "JoinTokens",
    "KRLoss",
    "LayerCentering",
    "LeakyCell",
    "LearnedBudget",
    "LinearSpline",
    "LinearSystem",
    "METHODS",
    "MarginBounds",
    "MarginCrossEntropy",
    "MaxMin",
    "MeanOverTime",
    "Merge",
    "NActivation",
    "Parallel",
    "Positions",
    "ProximalBlock",
    "Recurrence",
    "RecurrentCell",
    "ResidualStack",
    "ResolventBlock",
    "RungeKuttaBlock",
    "SLL",
    "Sandwich",
    "Scale",
    "ScaledAvgPool",
    "SkewBlock",
    "SkewEulerBlock",
    "SoftAbs",
    "StateSpaceBlock",
    "StateSpaceStack",
    "TransformerBlock",
    "UnitRowLinear",
    "WeightMap",
    "activation_constant",
    "cell_bound",
    "cfl",
    "cell_rule",
    "clip_input",
    "constrain",
    "contracting",
    "damped_bound",
    "discretize",
    "export",
    "field_bound",
    "layer_bounds",
    "flow_bound",
    "layer_limit",
    "layers",
    "lipschitz",
    "lipschitz_rule",
    "margin_constants",
    "margin_radii",
    "norm_gap",
    "parameter_groups",
    "peak_gain",
    "plain_state_dict",
    "release",
    "sequence_gain",
    "stabilize",
    "stable_eigenvalues",
    "table",
    "token_rule",
    "training_constant",
    "uniform_bound",
]
