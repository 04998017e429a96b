"""Every module with a Lipschitz rule, on an input shape: the laws of test_rules.py run on each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from stableopt.nn import (
    AntisymmetricCell,
    AveragedResidual,
    BackwardEulerBlock,
    BoundedNorm,
    CappedLinear,
    ClippedAttention,
    CompensatedPair,
    ContinuousDepth,
    ContractingCell,
    ConvGradientBlock,
    DiagonalMetricCell,
    DiagonalStateSpace,
    DissipativeBlock,
    DissipativeField,
    ForwardBackward,
    GradientBlock,
    GradientField,
    GroupSort,
    HamiltonianBlock,
    InfNormBlock,
    InfNormField,
    JoinTokens,
    LastStep,
    LeakyCell,
    MeanOverTime,
    Positions,
    ProximalBlock,
    Recurrence,
    ResidualStack,
    ResolventBlock,
    RungeKuttaBlock,
    Scale,
    SkewBlock,
    SkewEulerBlock,
    StateSpaceBlock,
    StateSpaceStack,
    TransformerBlock,
    cfl,
)


@dataclass(frozen=True)
class Row:
    """A module, the shape of an input with batch dimension, and by what factor the l2 bound may exceed the norm.

    Args:
        make: builds the module; None as tightness means that only validity is promised.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tightness: float | None = None
    norms: tuple[str, ...] = ("l2", "linf", "l1")


CONVS = [
    Row("conv1d", lambda: nn.Conv1d(3, 4, 3), (1, 3, 12), 1.35),
    Row("conv1d same", lambda: nn.Conv1d(2, 3, 5, padding="same"), (1, 2, 12), 1.35),
    Row(
        "conv1d valid circular", lambda: nn.Conv1d(2, 3, 3, padding="valid", padding_mode="circular"), (1, 2, 12), 1.35
    ),
    Row("conv1d same circular", lambda: nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"), (1, 2, 12), 1.35),
    Row("conv1d stride 2 dilation 2", lambda: nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=2), (1, 2, 11)),
    Row("conv1d stride 3 dilation 3", lambda: nn.Conv1d(2, 2, 3, stride=3, dilation=3, padding=4), (1, 2, 12)),
    Row("conv1d one tap", lambda: nn.Conv1d(3, 5, 1), (1, 3, 4), 1.0 + 1e-9),
    Row("conv2d", lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 7, 7), 1.35),
    Row("conv2d no bias", lambda: nn.Conv2d(2, 3, (3, 2), padding=(2, 0), bias=False), (1, 2, 6, 5), 1.6),
    Row("conv2d wide zeros", lambda: nn.Conv2d(1, 2, 3, padding=4), (1, 1, 4, 4), 1.6),
    Row("conv2d circular", lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (1, 2, 6, 6), 1.35),
    Row(
        "conv2d circular dilation",
        lambda: nn.Conv2d(1, 2, 3, padding=2, dilation=2, padding_mode="circular"),
        (1, 1, 7, 6),
        1.6,
    ),
    Row("conv2d stride", lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (1, 2, 7, 7)),
    Row("conv2d groups", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (1, 4, 5, 5), 1.6),
    Row("conv2d depthwise", lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), (1, 3, 5, 5), 1.6),
    Row(
        "conv2d reflect",
        lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        (1, 1, 5, 5),
        None,
    ),
    Row(
        "conv2d replicate",
        lambda: nn.Conv2d(1, 2, 3, padding=2, padding_mode="replicate"),
        (1, 1, 5, 5),
        None,
    ),
]

AFFINE = [
    Row("linear square", lambda: nn.Linear(5, 5), (1, 5), 1.0 + 1e-10),
    Row("linear wide", lambda: nn.Linear(9, 2), (1, 9), 1.0 + 1e-10),
    Row("linear tall", lambda: nn.Linear(1, 7, bias=False), (1, 1), 1.0 + 1e-10),
    Row("linear on a sequence", lambda: nn.Linear(3, 4), (1, 2, 3), 1.0 + 1e-10),
    *CONVS,
    Row("avg 1d", lambda: nn.AvgPool1d(3), (1, 2, 9), 1.0 + 1e-12),
    Row("avg 1d overlapping", lambda: nn.AvgPool1d(3, stride=2), (1, 1, 41), 1.01),
    Row("avg 1d stride 1", lambda: nn.AvgPool1d(4, stride=1), (1, 1, 60), 1.02),
    Row("avg 1d gaps", lambda: nn.AvgPool1d(2, stride=3), (1, 1, 11), 1.0 + 1e-12),
    Row("avg 1d padded", lambda: nn.AvgPool1d(5, stride=3, padding=2), (1, 1, 40), 1.02),
    Row("avg 2d", lambda: nn.AvgPool2d(2), (1, 2, 5, 4), 1.0 + 1e-12),
    Row("avg 2d mixed", lambda: nn.AvgPool2d((3, 2), stride=(2, 1), padding=(1, 0)), (1, 1, 17, 17), 1.1),
    Row("scale", lambda: Scale(-2.5), (1, 3), 1.0),
    Row("flatten", nn.Flatten, (1, 2, 3), 1.0),
    Row("unflatten", lambda: nn.Unflatten(1, (2, 3)), (1, 6), 1.0),
    Row("identity", nn.Identity, (1, 4), 1.0),
    Row("dropout", nn.Dropout, (1, 4), 1.0),
    Row("dropout2d", nn.Dropout2d, (1, 4, 2, 2), 1.0),
]

ACTIVATIONS = [
    Row("relu", nn.ReLU, (1, 6)),
    Row("leaky relu", lambda: nn.LeakyReLU(0.3), (1, 6)),
    Row("leaky relu steep", lambda: nn.LeakyReLU(-1.7), (1, 6)),
    Row("tanh", nn.Tanh, (1, 6)),
    Row("softplus", nn.Softplus, (1, 6)),
    Row("softplus beta", lambda: nn.Softplus(beta=3.0, threshold=30.0), (1, 6)),
    Row("hardtanh", nn.Hardtanh, (1, 6)),
    Row("relu6", nn.ReLU6, (1, 6)),
    Row("sigmoid", nn.Sigmoid, (1, 6)),
    Row("elu", nn.ELU, (1, 6)),
    Row("elu steep", lambda: nn.ELU(1.5), (1, 6)),
    Row("gelu", nn.GELU, (1, 6)),
    Row("gelu tanh", lambda: nn.GELU(approximate="tanh"), (1, 6)),
    Row("silu", nn.SiLU, (1, 6)),
    Row("groupsort 2", lambda: GroupSort(2), (1, 6)),
    Row("groupsort 3", lambda: GroupSort(3), (1, 6, 2)),
    Row("max 1d", lambda: nn.MaxPool1d(2), (1, 2, 6)),
    Row("max 1d overlapping", lambda: nn.MaxPool1d(3, stride=1), (1, 1, 9)),
    Row("max 1d dilated", lambda: nn.MaxPool1d(4, stride=2, dilation=2, padding=1), (1, 1, 16)),
    Row("max 2d", lambda: nn.MaxPool2d(2), (1, 2, 4, 4)),
    Row("max 2d overlapping", lambda: nn.MaxPool2d((3, 2), stride=(1, 2), padding=1, ceil_mode=True), (1, 1, 6, 7)),
]

COMPOSED = [
    Row("gradient block", lambda: GradientBlock(5, 7), (1, 5)),
    Row("gradient block damped", lambda: GradientBlock(5, 3, strong=0.7, activation="tanh", step=0.99), (1, 5)),
    Row("gradient block leaky", lambda: GradientBlock(4, activation="leaky_relu", step=0.9), (1, 4)),
    Row("gradient block softplus", lambda: GradientBlock(4, activation="softplus", step=0.9), (1, 4)),
    Row("gradient block frobenius", lambda: GradientBlock(5, 7, bound="frobenius", step=0.9), (1, 5)),
    Row("gradient block schur", lambda: GradientBlock(5, 3, bound="schur", strong=0.2, limit_gradient=False), (1, 5)),
    Row("gradient block rows", lambda: GradientBlock(5, 7, bound="rows", strong=0.2, step=0.9), (1, 5)),
    Row("conv gradient block 1d", lambda: ConvGradientBlock(2, 3, dims=1, strong=0.2, step=0.9), (1, 2, 7)),
    Row("conv gradient block 2d", lambda: ConvGradientBlock(2, 4, groups=2, bound="rows", step=0.9), (1, 2, 4, 5)),
    Row(
        "conv gradient block circular",
        lambda: ConvGradientBlock(2, dims=1, padding_mode="circular", dilation=2, step=0.9),
        (1, 2, 6),
    ),
    Row(
        "conv gradient block 3d", lambda: ConvGradientBlock(1, 2, 2, dims=3, padding=1, bound="schur"), (1, 1, 2, 3, 2)
    ),
    Row("gradient block hardtanh", lambda: GradientBlock(4, activation="hardtanh", step=0.9), (1, 4)),
    Row("mlp", lambda: nn.Sequential(nn.Linear(4, 6), GroupSort(), nn.Linear(6, 3)), (1, 4)),
    Row("empty", nn.Sequential, (1, 4)),
    Row(
        "cnn",
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)), nn.Flatten(), nn.Linear(18, 2)
        ),
        (1, 1, 6, 6),
    ),
]


def normalized(layer: nn.Module) -> nn.Module:
    """Give a normalization statistics and factors that are not those of a new one."""
    for name, value in layer.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.2 if name == "running_var" else torch.randn_like(value))
    return layer


NORMALIZATIONS = [
    Row("batch 1d", lambda: normalized(nn.BatchNorm1d(3)), (1, 3), 1.0 + 1e-14),
    Row("batch 2d", lambda: normalized(nn.BatchNorm2d(2, eps=0.1)), (1, 2, 2, 2), 1.0 + 1e-14),
    Row("batch 3d plain", lambda: normalized(nn.BatchNorm3d(2, affine=False)), (1, 2, 1, 2, 2), 1.0 + 1e-14),
    Row("instance tracked", lambda: normalized(nn.InstanceNorm1d(2, track_running_stats=True)), (1, 2, 3), 1.0 + 1e-14),
]

OF_SAMPLE = [
    Row("layer norm", lambda: normalized(nn.LayerNorm(5, eps=0.1)), (1, 5)),
    Row("layer norm plain", lambda: nn.LayerNorm((2, 3), elementwise_affine=False, eps=0.5), (1, 2, 3)),
    Row("rms norm", lambda: normalized(nn.RMSNorm(6, eps=0.2)), (1, 6)),
    Row("group norm", lambda: normalized(nn.GroupNorm(2, 4, eps=0.1)), (1, 4, 3), None, ("l2",)),
    Row("instance norm", lambda: normalized(nn.InstanceNorm2d(2, affine=True, eps=0.1)), (1, 2, 2, 2), None, ("l2",)),
]

COPIES = [
    Row("zero pad", lambda: nn.ZeroPad2d((1, 2, 0, 1)), (1, 1, 3, 2), 1.0),
    Row("crop", lambda: nn.ConstantPad1d((-1, 2), 3.5), (1, 2, 4), 1.0),
    Row("replicate pad", lambda: nn.ReplicationPad2d((1, 2, 0, 1)), (1, 1, 1, 1), 1.0 + 1e-14),
    Row("replicate pad 3d", lambda: nn.ReplicationPad3d(1), (1, 1, 1, 1, 1), 1.0 + 1e-14),
    Row("reflect pad", lambda: nn.ReflectionPad1d((1, 1)), (1, 1, 3), 1.0 + 1e-14),
    Row("reflect pad one side", lambda: nn.ReflectionPad2d((2, 0, 1, 1)), (1, 1, 3, 3), 1.0 + 1e-14),
    Row("reflect pad wide", lambda: nn.ReflectionPad1d((3, 2)), (1, 1, 4), 1.0 + 1e-14),
    Row("circular pad", lambda: nn.CircularPad2d((1, 1, 2, 0)), (1, 1, 2, 1), 1.0 + 1e-14),
    Row("nearest", lambda: nn.Upsample(scale_factor=(3.0, 2.0)), (1, 1, 3, 2), 1.5),
    Row("nearest 2", lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 1, 3, 2), 1.0 + 1e-14),
    Row("nearest 2.5", lambda: nn.Upsample(scale_factor=(2.5,)), (1, 1, 6)),
    Row("nearest exact", lambda: nn.Upsample(scale_factor=(4.0,), mode="nearest-exact"), (1, 1, 3), 1.0 + 1e-14),
    Row("nearest size", lambda: nn.Upsample(size=(3, 2)), (1, 1, 1, 1), 1.0 + 1e-14),
    Row("linear", lambda: nn.Upsample(scale_factor=3, mode="linear"), (1, 1, 4), 1.0 + 1e-14),
    Row("bilinear", lambda: nn.Upsample(scale_factor=(2, 3), mode="bilinear"), (1, 1, 3, 2), 1.0 + 1e-14),
    Row("trilinear", lambda: nn.Upsample(scale_factor=2, mode="trilinear"), (1, 1, 2, 2, 1), 1.0 + 1e-14),
    Row("bilinear size", lambda: nn.UpsamplingBilinear2d(size=(3, 4)), (1, 1, 2, 2)),
    Row("unfold", lambda: nn.Unfold(2, stride=1), (1, 1, 4, 4), 1.0 + 1e-14),
    Row("unfold gcd", lambda: nn.Unfold((2, 1), stride=2, dilation=2), (1, 2, 9, 3), 1.0 + 1e-14),
    Row("fold", lambda: nn.Fold((4, 4), 2), (1, 4, 9), 1.0 + 1e-14),
    Row("pixel shuffle", lambda: nn.PixelShuffle(2), (1, 4, 2, 2), 1.0),
    Row("pixel unshuffle", lambda: nn.PixelUnshuffle(2), (1, 1, 4, 2), 1.0),
    Row("channel shuffle", lambda: nn.ChannelShuffle(2), (1, 4, 2), 1.0),
    Row("adaptive avg", lambda: nn.AdaptiveAvgPool2d((3, 2)), (1, 1, 1, 1), 1.0 + 1e-14),
    Row("adaptive avg kept", lambda: nn.AdaptiveAvgPool2d((None, 2)), (1, 1, 3, 1), 1.0 + 1e-14),
    Row("adaptive avg 5", lambda: nn.AdaptiveAvgPool1d(4), (1, 2, 5)),
    Row("avg uncounted", lambda: nn.AvgPool1d(3, stride=2, padding=1, count_include_pad=False), (1, 1, 1), 1.5),
    Row("avg ceil", lambda: nn.AvgPool2d(3, stride=2, ceil_mode=True), (1, 1, 4, 6), 2.0),
    Row("avg ceil padded", lambda: nn.AvgPool1d(4, stride=3, padding=2, ceil_mode=True), (1, 1, 8)),
    Row("avg divisor", lambda: nn.AvgPool2d(2, stride=1, divisor_override=3), (1, 1, 20, 20), 1.05),
    Row("avg 3d", lambda: nn.AvgPool3d(2), (1, 1, 4, 2, 2), 1.0 + 1e-14),
    Row("sum by LPPool", lambda: nn.LPPool1d(1.0, 3, stride=3), (1, 1, 6), 1.0 + 1e-14),
]

TRANSPOSED = [
    Row("transposed 1d", lambda: nn.ConvTranspose1d(2, 3, 3), (1, 2, 12), 1.35),
    Row("transposed stride", lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, output_padding=2), (1, 3, 8), 1.6),
    Row(
        "transposed 2d",
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
        (1, 4, 4, 4),
    ),
    Row("transposed 3d", lambda: nn.ConvTranspose3d(1, 2, 2, dilation=2), (1, 1, 3, 3, 3)),
    Row("conv3d", lambda: nn.Conv3d(1, 2, 2, padding=1), (1, 1, 3, 3, 3)),
    Row("conv circular wide", lambda: nn.Conv1d(1, 1, 3, padding=2, padding_mode="circular"), (1, 1, 4)),
    Row("conv3d replicate", lambda: nn.Conv3d(1, 1, 3, padding=1, padding_mode="replicate"), (1, 1, 3, 3, 3)),
]

POOLS = [
    Row("max 3d", lambda: nn.MaxPool3d(2, stride=1), (1, 1, 3, 3, 3)),
    Row("adaptive max", lambda: nn.AdaptiveMaxPool2d(2), (1, 1, 3, 3)),
    Row("l2 pool", lambda: nn.LPPool2d(2, 3, stride=2), (1, 1, 7, 7)),
    Row("l4 pool", lambda: nn.LPPool1d(4, 2), (1, 1, 6)),
]

RECURRENCES = [
    Row("contracting cell", lambda: Recurrence(ContractingCell(2, 3, memory=4)), (1, 4, 2)),
    Row("contracting cell weighted", lambda: Recurrence(ContractingCell(2, 3, weighted=True, gain=1.0)), (1, 3, 2)),
    Row("leaky cell", lambda: Recurrence(LeakyCell(2, 3, memory=4), length=4), (1, 4, 2)),
    Row("leaky cell linf", lambda: Recurrence(LeakyCell(2, 3, norm="linf"), reverse=True), (1, 3, 2)),
    Row("diagonal metric cell", lambda: Recurrence(DiagonalMetricCell(2, 3, activation="relu")), (1, 3, 2)),
    Row("antisymmetric cell", lambda: Recurrence(AntisymmetricCell(2, 3, memory=4)), (1, 3, 2)),
    Row("last step", LastStep, (1, 3, 2), 1.0),
    Row("mean over time", lambda: MeanOverTime(3), (1, 3, 2), 1.0 + 1e-12),
]

STATE_SPACES = [
    Row("state space", lambda: DiagonalStateSpace(2, 3), (1, 4, 2)),
    Row(
        "state space both ways",
        lambda: DiagonalStateSpace(2, 2, 3, gain=2.0, skip=False, bidirectional=True),
        (1, 3, 2),
    ),
    Row("state space block", lambda: StateSpaceBlock(3, 2), (1, 3, 3)),
    Row("state space stack", lambda: StateSpaceStack(2, 3, 2, layers=2, d_out=2, gain=3.0), (1, 3, 2)),
    Row("capped linear", lambda: CappedLinear(3, 4, limit=2.0), (1, 3), 1.0 + 1e-10),
]

IMPLICIT = [
    Row("proximal", lambda: ProximalBlock(4, 6, strong=0.3, step=3.0), (1, 4)),
    Row("proximal tanh", lambda: ProximalBlock(4, activation="tanh", solver=ForwardBackward(2)), (1, 4)),
    Row("resolvent", lambda: ResolventBlock(4, 3, strong=0.1, step=5.0), (1, 4)),
    Row("backward euler", lambda: BackwardEulerBlock(GradientField(4, strong=0.2), iterations=3), (1, 4)),
    Row("hamiltonian", lambda: HamiltonianBlock(4, 5, growth=3.0, damping=0.1), (1, 4)),
]

ROTATIONS = [
    Row("skew", lambda: SkewBlock(4, 0.3), (1, 4), 1.0 + 1e-12),
    Row("skew expm", lambda: SkewBlock(3, method="expm", bias=False), (1, 3), 1.0 + 1e-12),
    Row("skew euler", lambda: SkewEulerBlock(4, 0.3, step=0.9), (1, 4), 1.0 + 1e-12),
]

TOKENS = [
    Row("clipped attention", lambda: ClippedAttention(4, 2), (1, 3, 4), None, ("l2",)),
    Row("transformer block", lambda: TransformerBlock(4, 2), (1, 3, 4), None, ("l2",)),
    Row("bounded norm", lambda: normalized(BoundedNorm(5, 2.0)), (1, 5)),
    Row("positions", lambda: Positions(4, 3), (1, 4, 3), 1.0),
    Row("joined tokens", lambda: JoinTokens(3), (1, 3, 2), 1.0 + 1e-14),
]

AFFINE += [*ROTATIONS, *NORMALIZATIONS, *COPIES, *TRANSPOSED]
ALONG_FIELDS = [
    Row("gradient field", lambda: GradientField(4, 5, strong=0.2), (1, 4)),
    Row("dissipative field", lambda: DissipativeField(4, 5, activation="softplus"), (1, 4)),
    Row("maximum-norm field", lambda: InfNormField(4, rate=0.2), (1, 4)),
    Row("dissipative block", lambda: DissipativeBlock(4, rate=0.5, step=0.8), (1, 4)),
    Row("maximum-norm block", lambda: InfNormBlock(5, activation="leaky_relu", step=0.9), (1, 5)),
    Row("maximum-norm block, images", lambda: InfNormBlock(2, 3, step=0.9), (1, 2, 4, 3)),
    Row("Runge-Kutta block", lambda: RungeKuttaBlock(GradientField(4), method="rk4_38", step=0.9), (1, 4)),
    Row("continuous depth", lambda: ContinuousDepth(DissipativeField(4), time=2.0, steps=8), (1, 4)),
]

BUDGETED = [
    Row("averaged", lambda: AveragedResidual(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 0.7), (1, 4)),
    Row("stack", lambda: ResidualStack([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)], 3.0), (1, 4)),
    Row("pair", lambda: CompensatedPair(GradientBlock(4, strong=0.5, step=0.9), nn.Linear(4, 4), step=0.9), (1, 4)),
    Row("cfl averaged", lambda: cfl(nn.Linear(4, 4), "averaged", step=0.9), (1, 4)),
    Row("cfl growth", lambda: cfl(nn.Linear(4, 4), "lipschitz", growth=1.5, step=0.9), (1, 4)),
]

CATALOGUE = [
    *AFFINE,
    *ACTIVATIONS,
    *POOLS,
    *OF_SAMPLE,
    *COMPOSED,
    *ALONG_FIELDS,
    *IMPLICIT,
    *RECURRENCES,
    *STATE_SPACES,
    *TOKENS,
    *BUDGETED,
]


def jacobian(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The dense Jacobian of the map at ``x``, built column by column through autograd."""
    y = torch.autograd.functional.jacobian(lambda flat: module(flat.view_as(x)).flatten(), x.flatten())
    return torch.as_tensor(y)


ORDERS = {"l2": 2, "linf": float("inf"), "l1": 1}


def operator_norm(J: torch.Tensor, norm: str) -> float:
    """The oracle: largest singular value, largest row sum, or largest column sum."""
    return float(torch.linalg.matrix_norm(J, ORDERS[norm])) if J.numel() else 0.0
