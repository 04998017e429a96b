"""Every layer with a rule is folded into operations that compute what it computes, and every other one is refused in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stableopt.nn as stable
from stableopt.certify.coverage import uncovered
from stableopt.certify.execute import run
from stableopt.certify.extract import extract
from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Program
from stableopt.nn import (
    Abs,
    BallProjection,
    BatchCentering,
    Concat,
    GroupSort,
    Householder,
    InputNormalization,
    InvertibleDownsampling,
    JoinTokens,
    L2NormPool,
    LayerCentering,
    LinearSpline,
    MaxMin,
    Merge,
    NActivation,
    Parallel,
    Positions,
    Scale,
    ScaledAvgPool,
    SoftAbs,
    UnitRowLinear,
)  # fmt: skip
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.tokens import token_rule

Make = Callable[[], nn.Module]

V, S, I, D = (6,), (4, 9), (4, 8, 9), (2, 4, 5, 6)  # a vector, a signal, an image, a volume

LAYERS: list[tuple[Make, tuple[int, ...]]] = [
    (lambda: nn.Linear(6, 3), V),
    (lambda: nn.Linear(9, 3, bias=False), S),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), S),
    (lambda: nn.Conv1d(4, 6, 4, padding="same"), S),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2)), I),
    (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", bias=False), I),
    (lambda: nn.Conv2d(4, 4, 3, padding="valid"), I),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), I),
    (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), D),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), S),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2, bias=False), I),
    (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), D),
    (lambda: nn.BatchNorm1d(6), V),
    (lambda: nn.BatchNorm1d(4), S),
    (lambda: nn.BatchNorm2d(4, affine=False), I),
    (lambda: nn.BatchNorm3d(2), D),
    (lambda: nn.SyncBatchNorm(4), I),
    (lambda: nn.InstanceNorm1d(4), S),
    (lambda: nn.InstanceNorm2d(4, affine=True), I),
    (lambda: nn.InstanceNorm2d(4, track_running_stats=True), I),
    (lambda: nn.InstanceNorm3d(2), D),
    (lambda: nn.GroupNorm(2, 4), I),
    (lambda: nn.LayerNorm(6), V),
    (lambda: nn.LayerNorm([8, 9], elementwise_affine=True), I),
    (lambda: nn.LayerNorm(9, bias=False), S),
    (lambda: nn.RMSNorm(9, eps=0.1), S),
    (nn.ReLU, V), (nn.ReLU6, V), (nn.Tanh, V), (nn.Sigmoid, V), (nn.SiLU, V), (nn.SELU, V), (nn.Mish, V), (nn.Hardswish, V),
    (nn.Hardsigmoid, V), (nn.Softsign, V), (nn.LogSigmoid, V), (nn.Tanhshrink, V), (nn.GELU, V),
    (lambda: nn.GELU("tanh"), I), (lambda: nn.LeakyReLU(-1.5), V), (lambda: nn.ELU(1.5), V), (lambda: nn.CELU(0.5), V),
    (lambda: nn.Softplus(2.0, threshold=60.0), V), (lambda: nn.Softshrink(0.25), V), (lambda: nn.Hardshrink(0.0), V),
    (lambda: nn.Hardtanh(-0.5, 2.0), V), (lambda: nn.Threshold(0.25, 0.25), V), (nn.RReLU, V),
    (nn.PReLU, V), (lambda: nn.PReLU(4, init=-1.5), I),
    (lambda: nn.Softmax(-1), S), (lambda: nn.Softmax(1), S), (nn.Softmax2d, I), (lambda: nn.Softmin(1), V),
    (lambda: nn.AvgPool1d(2), S), (lambda: nn.AvgPool2d(3, 2, 1), I), (lambda: nn.AvgPool3d(2), D),
    (lambda: nn.AvgPool1d(2, ceil_mode=True), S),
    (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), I),
    (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), I),
    (lambda: nn.AvgPool2d(2, divisor_override=3), I),
    (lambda: nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True, divisor_override=5), I),
    (lambda: nn.MaxPool1d(2), S), (lambda: nn.MaxPool2d(3, 2, 1), I), (lambda: nn.MaxPool3d(2), D),
    (lambda: nn.MaxPool1d(2, ceil_mode=True), S),
    (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), I),
    (lambda: nn.MaxPool2d(2, 3, 1, dilation=(2, 3), ceil_mode=True), I),
    (lambda: nn.LPPool1d(1, 2), S), (lambda: nn.LPPool2d(2, 2), I), (lambda: nn.LPPool2d(2, 3, 1), I),
    (lambda: nn.LPPool3d(2, 2), D),
    (lambda: nn.AdaptiveAvgPool1d(3), S), (lambda: nn.AdaptiveAvgPool1d(4), S), (lambda: nn.AdaptiveAvgPool2d(1), I),
    (lambda: nn.AdaptiveAvgPool2d((None, 4)), I), (lambda: nn.AdaptiveAvgPool3d((2, 5, 4)), D),
    (lambda: nn.AdaptiveMaxPool1d(3), S), (lambda: nn.AdaptiveMaxPool2d((3, 4)), I), (lambda: nn.AdaptiveMaxPool3d(2), D),
    (nn.Flatten, I), (lambda: nn.Flatten(2), I), (lambda: nn.Flatten(1, 2), I), (nn.Flatten, V),
    (lambda: nn.Unflatten(1, (2, 3)), V), (lambda: nn.Unflatten(-1, (3, -1)), S),
    (lambda: nn.PixelShuffle(2), I), (lambda: nn.PixelUnshuffle(2), (4, 8, 6)), (lambda: nn.ChannelShuffle(2), I),
    (lambda: nn.ConstantPad1d((1, 2), 0.5), S), (lambda: nn.ConstantPad2d((1, -2, -1, 3), -0.5), I),
    (lambda: nn.ConstantPad3d(1, 0.25), D), (lambda: nn.ConstantPad2d(-1, 3.0), I),
    (lambda: nn.ZeroPad1d(1), S), (lambda: nn.ZeroPad2d((1, 0, 2, 0)), I), (lambda: nn.ZeroPad3d(1), D),
    (lambda: nn.ReplicationPad1d((2, 0)), S), (lambda: nn.ReplicationPad2d((2, 1, 0, 3)), I), (lambda: nn.ReplicationPad3d(1), D),
    (lambda: nn.ReflectionPad1d((2, 0)), S), (lambda: nn.ReflectionPad2d((2, 1, 0, 3)), I), (lambda: nn.ReflectionPad3d(1), D),
    (lambda: nn.CircularPad1d((2, 0)), S), (lambda: nn.CircularPad2d((2, 1, 0, 3)), I), (lambda: nn.CircularPad3d(1), D),
    (lambda: nn.Upsample(scale_factor=2), I), (lambda: nn.Upsample(size=(5, 12)), I), (lambda: nn.Upsample(scale_factor=2), S),
    (lambda: nn.Upsample(scale_factor=(1.5, 2.0), mode="bilinear"), I),
    (lambda: nn.Upsample(size=7, mode="linear", align_corners=True), S),
    (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), D), (lambda: nn.Upsample(size=5, mode="nearest-exact"), S),
    (lambda: nn.UpsamplingNearest2d(scale_factor=2), I), (lambda: nn.UpsamplingBilinear2d(scale_factor=2), I),
    (lambda: nn.Unfold((2, 3), dilation=(2, 1), padding=(1, 0), stride=(1, 2)), I),
    (lambda: nn.Fold((5, 6), (2, 3), dilation=(2, 1), padding=(1, 0), stride=(1, 3)), (12, 10)),
    (lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.Tanh()), V),
    (lambda: nn.Sequential(nn.Dropout1d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.ReLU()), S),
    (lambda: nn.Sequential(nn.Dropout2d(), nn.ReLU()), I), (lambda: nn.Sequential(nn.Dropout3d(), nn.ReLU()), D),
    (Abs, V), (lambda: Abs(0.5), I), (lambda: Abs(0.4), V), (lambda: SoftAbs(0.3), I), (lambda: NActivation(4, (-0.5, 0.25)), I),
    (GroupSort, V), (lambda: GroupSort(4), I), (MaxMin, I), (lambda: Scale(-0.3), S),
    (lambda: Householder(6), V), (lambda: Householder(4, 4), I),
    (lambda: LinearSpline(6, knots=5, span=1.0), V), (lambda: LinearSpline(4, knots=3, init="relu"), I),
    (lambda: L2NormPool(2), I), (lambda: L2NormPool(None), I), (lambda: L2NormPool((2,), dims=1), S),
    (lambda: ScaledAvgPool(2), I), (lambda: ScaledAvgPool(None), I), (lambda: ScaledAvgPool(2, dims=3), D),
    (lambda: InvertibleDownsampling((2, 3)), I), (lambda: InvertibleDownsampling(3, dims=1), S),
    (lambda: LayerCentering(6), V), (lambda: LayerCentering((8, 9), bias=False), I),
    (lambda: BatchCentering(4), I), (lambda: BatchCentering(6, bias=False), V),
    (lambda: InputNormalization(0.4, 0.3), I), (lambda: InputNormalization([0.1, 0.2], [0.5, 0.25]), (2, 5)),
    (lambda: UnitRowLinear(6, 3), V), (lambda: UnitRowLinear(9, 3, bias=False), S),
    (lambda: BallProjection(1.5), V), (lambda: BallProjection(30.0), I),
    (lambda: Positions(10, 9), S), (lambda: Positions(10, 9, learned=False), (3, 4, 9)), (lambda: JoinTokens(4), S),
    (lambda: Concat(nn.Linear(6, 3), nn.Tanh(), nn.Identity()), V), (lambda: Concat(nn.ReLU(), Scale(2.0), dim=-1), I),
    (lambda: Parallel(nn.Linear(2, 3), nn.Identity(), nn.Tanh(), sizes=(2, 3, 1)), V),
    (lambda: Parallel(nn.Conv2d(1, 2, 1), nn.ReLU(), sizes=(1, 3)), I),
    (lambda: Merge(nn.Linear(6, 6), nn.Tanh(), nn.Identity(), weights=(0.5, -1.0, 2.0)), V),
    (lambda: Merge(nn.Conv2d(4, 4, 1), nn.Tanh(), weights=(0.5, 2.0), by="l2"), I),
]  # fmt: skip


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """Give all parameters and statistics random values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return module.eval()


def computed(program: Program, x: Tensor) -> Tensor:
    return run(program.nodes, {name: value.to(x.dtype) for name, value in program.tensors.items()}, [x])


def ident(case: tuple[Make, tuple[int, ...]]) -> str:
    return f"{type(case[0]()).__name__}-{case[1]}"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", LAYERS, ids=ident)
def test_a_folded_layer_computes_what_the_module_computes(case: tuple[Make, tuple[int, ...]]) -> None:
    module, shape = randomized(case[0](), 3).double(), case[1]
    program = extract(nn.Sequential(module, Scale(1.0)), shape)
    for size in (1.0, 10.0):
        x = size * torch.randn(5, *shape)
        with torch.no_grad():
            expected, got = module(x), computed(program, x)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())


def every_class() -> list[type[nn.Module]]:
    """All module classes of torch.nn and of the package, and all with a Lipschitz rule."""
    found = {
        v
        for space in (vars(nn), vars(stable))
        for v in space.values()
        if inspect.isclass(v) and issubclass(v, nn.Module)
    }
    found |= {k for k in (*lipschitz_rule.registry, *token_rule.registry) if k is not object}
    return sorted((k for k in found if k.__module__.split(".")[0] in {"torch", "stableopt"}), key=lambda k: k.__name__)


def test_every_layer_is_folded_or_refused_with_its_own_sentence() -> None:
    silent = []
    for kind in every_class():
        if inspect.isabstract(kind) or any(base in fold.registry for base in kind.__mro__ if base is not object):
            continue
        module = nn.Module.__new__(kind)
        nn.Module.__init__(module)
        text = uncovered(module, "0")
        assert text.startswith(f"'0' ({kind.__name__}) cannot be certified: ")
        assert text.endswith(".")
        if "has no rule for certificates" in text:
            silent.append(kind.__name__)
    assert silent == []


def test_every_rule_is_in_the_table() -> None:
    tried = {type(part) for make, _ in LAYERS for part in make().modules()}
    owners = {"simple", "stock", "structure", "spatial", "pools", "normalization"}
    rules = {kind for kind, rule in fold.registry.items() if rule.__module__.rpartition(".")[2] in owners}
    assert {kind.__name__ for kind in rules - tried} == set()
