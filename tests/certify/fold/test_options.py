"""Certificates of layers with unusual options, of every method of stabilize, and sentences for what does not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import stableopt
from stableopt.errors import UncertifiableError
from stableopt.nn import (
    Abs,
    BatchCentering,
    GradientBlock,
    GroupSort,
    InputNormalization,
    MaxMin,
    Scale,
    ScaledAvgPool,
    UnitRowLinear,
    export,
    lipschitz,
    release,
    stabilize,
)
from tests.nn.methods import CASES, LIMIT, limited, norm_of

SLACK = 1 + 1e-8  # each proved claim of a file is rounded up by 1e-9

COVERED: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: UnitRowLinear(4, 3), (4,)),
    (lambda: UnitRowLinear(4, 3, bias=False), (4,)),
    (Abs, (4,)),
    (MaxMin, (4,)),
    (lambda: InputNormalization(0.4, 0.3), (3,)),
    (lambda: InputNormalization([0.1, 0.2], [0.5, 0.25]), (2,)),
    (lambda: InputNormalization([0.1, 0.2], [0.5, 0.25]), (2, 5)),
    (lambda: InputNormalization([0.1, 0.2, 0.3], [0.5, 0.25, 2.0]), (3, 4, 5)),
    (lambda: InputNormalization(0.4, 0.3), (1, 4, 4)),
    (lambda: BatchCentering(3), (3,)),
    (lambda: BatchCentering(2, bias=False), (2, 4, 4)),
    (lambda: nn.BatchNorm1d(3), (3,)),
    (lambda: nn.BatchNorm1d(3), (3, 4)),
    (lambda: nn.BatchNorm2d(2, affine=False), (2, 4, 4)),
    (lambda: ScaledAvgPool(2), (2, 4, 6)),
    (lambda: ScaledAvgPool((2, 3)), (2, 5, 7)),
    (lambda: ScaledAvgPool(3, dims=1), (2, 7)),
]


@pytest.mark.parametrize(("make", "shape"), COVERED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_covered_module_is_certified_as_what_it_computes(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    x = torch.randn(5, *shape, dtype=dtype)
    for _ in range(3):  # running statistics that are not those of the beginning
        model(torch.randn(7, *shape, dtype=dtype) * 2 + 1)
    for p in model.parameters():
        nn.init.normal_(p)
    cert = stableopt.certify(model, shape)
    torch.testing.assert_close(cert.module()(x), model.eval()(x))
    near = 1e-5 if dtype == torch.float32 else 1e-8  # the certified numbers are rounded to the dtype of the module
    assert cert.lipschitz == pytest.approx(lipschitz(model).upper, rel=near)
    exact = cert.module().double()
    J = torch.autograd.functional.jacobian(lambda v: exact(v[None])[0].flatten(), x[0].double()).flatten(1)
    assert torch.linalg.matrix_norm(J, 2) <= cert.lipschitz


OPTIONS: dict[type[nn.Module], list[tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    nn.Linear: [(lambda: nn.Linear(4, 3, bias=False), (4,)), (lambda: nn.Linear(4, 3), (2, 4))],
    nn.Conv1d: [
        (lambda: nn.Conv1d(4, 2, 3, stride=2, padding=1, dilation=2, groups=2), (4, 9)),
        (lambda: nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular", bias=False), (2, 6)),
        (lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="replicate"), (2, 6)),
    ],
    nn.Conv2d: [
        (lambda: nn.Conv2d(4, 2, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2), (4, 6, 5)),
        (lambda: nn.Conv2d(1, 2, 3, padding="valid"), (1, 4, 4)),
        (lambda: nn.Conv2d(1, 2, (3, 5), padding=(1, 2), padding_mode="circular"), (1, 5, 6)),
        (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4, 4)),
    ],
    nn.ReLU: [(lambda: nn.ReLU(inplace=True), (4,))],
    nn.LeakyReLU: [(lambda s=s: nn.LeakyReLU(s), (4,)) for s in (0, -1.5, 3)],
    nn.Tanh: [(nn.Tanh, (4,))],
    nn.Sigmoid: [(nn.Sigmoid, (4,))],
    nn.Hardtanh: [(lambda: nn.Hardtanh(-1, 1), (4,)), (lambda: nn.Hardtanh(-0.25, 3.5), (4,))],
    nn.ReLU6: [(lambda: nn.ReLU6(inplace=True), (4,))],
    nn.ELU: [(lambda: nn.ELU(2), (4,)), (lambda: nn.ELU(0.3), (4,)), (lambda: nn.ELU(-0.5), (4,))],
    nn.Softplus: [
        (lambda: nn.Softplus(1), (4,)), (lambda: nn.Softplus(3.0), (4,)), (lambda: nn.Softplus(0.5, 40.0), (4,)),
        (lambda: nn.Softplus(1.0, 0.5), (4,)), (lambda: nn.Softplus(1.0, 19.0), (4,)), (lambda: nn.Softplus(-1.0), (4,)),
    ],
    nn.SiLU: [(lambda: nn.SiLU(inplace=True), (4,))],
    nn.GELU: [(nn.GELU, (4,)), (lambda: nn.GELU("tanh"), (4,))],
    GroupSort: [(lambda: GroupSort(3), (6,)), (MaxMin, (4, 3))],
    Abs: [(Abs, (4,)), (lambda: Abs(0.5), (4,)), (lambda: Abs(0.1), (4,))],
    Scale: [(lambda: Scale(-3), (4,))],
    UnitRowLinear: [(lambda: UnitRowLinear(4, 3, bias=False), (4,))],
    InputNormalization: [
        (lambda: InputNormalization(0.5, [0.5, 0.25]), (2,)),
        (lambda: InputNormalization(0.5, 0.25), (3, 4, 4)),
        (lambda: InputNormalization([0.1, 0.2], 0.25), (2, 5)),
    ],
    BatchCentering: [(lambda: BatchCentering(2, momentum=1.0, bias=False), (2, 3)), (lambda: BatchCentering(3), (3,))],
    nn.BatchNorm1d: [
        (lambda: nn.BatchNorm1d(3, eps=0.5, momentum=None, affine=False), (3, 4)),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), (3,)),
        (lambda: nn.BatchNorm1d(3, momentum=0.9), (3,)),
    ],
    nn.BatchNorm2d: [(lambda: nn.BatchNorm2d(2, eps=0.1), (2, 3, 3))],
    ScaledAvgPool: [
        (lambda: ScaledAvgPool((1, 3)), (2, 4, 7)), (lambda: ScaledAvgPool(2, dims=1), (2, 5)),
        (lambda: ScaledAvgPool(None), (2, 4, 4)),
    ],
    nn.Identity: [(lambda: nn.Sequential(nn.Identity(), nn.Tanh()), (4,))],
    nn.Dropout: [(lambda: nn.Sequential(nn.Dropout(0.9), nn.Tanh()), (4,))],
    nn.Dropout1d: [(lambda: nn.Sequential(nn.Dropout1d(0.9), nn.Tanh()), (4, 2))],
    nn.Dropout2d: [(lambda: nn.Sequential(nn.Dropout2d(0.9), nn.Tanh()), (4, 2, 2))],
    nn.AlphaDropout: [(lambda: nn.Sequential(nn.AlphaDropout(0.9), nn.Tanh()), (4,))],
    nn.Flatten: [
        (lambda: nn.Flatten(1, 3), (2, 3, 4)), (lambda: nn.Flatten(2), (2, 3, 4)), (lambda: nn.Flatten(1, 2), (2, 3, 4)),
    ],
    nn.AvgPool1d: [
        (lambda: nn.AvgPool1d(3, stride=2, padding=1), (2, 7)), (lambda: nn.AvgPool1d(3, ceil_mode=True), (2, 7)),
        (lambda: nn.AvgPool1d(3, padding=1, count_include_pad=False), (2, 7)), (lambda: nn.AvgPool1d(np.int64(2)), (2, 7)),
    ],
    nn.AvgPool2d: [
        (lambda: nn.AvgPool2d((3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 5)),
        (lambda: nn.AvgPool2d(2, divisor_override=3), (2, 5, 5)),
    ],
    nn.MaxPool1d: [
        (lambda: nn.MaxPool1d(3, stride=1, padding=1), (2, 7)), (lambda: nn.MaxPool1d(2, dilation=2), (2, 7)),
        (lambda: nn.MaxPool1d(2, return_indices=True), (2, 7)),
    ],
    nn.MaxPool2d: [(lambda: nn.MaxPool2d((3, 2), stride=(2, 1)), (2, 5, 5)), (lambda: nn.MaxPool2d(2, ceil_mode=True), (2, 5, 5))],
    nn.AdaptiveAvgPool1d: [(lambda: nn.AdaptiveAvgPool1d(1), (2, 5)), (lambda: nn.AdaptiveAvgPool1d(3), (2, 5))],
    nn.AdaptiveAvgPool2d: [(lambda: nn.AdaptiveAvgPool2d((1, 1)), (2, 5, 3)), (lambda: nn.AdaptiveAvgPool2d((1, None)), (2, 5, 3))],
    GradientBlock: [
        (lambda a=a: GradientBlock(4, 6, strong=0.3, step=0.8, activation=a), (4,))
        for a in ("relu", "leaky_relu", "tanh", "softplus", "hardtanh")
    ] + [
        (lambda a=a, m=m: GradientBlock(4, 6, strong=m, activation=a, bound="rows"), (4,))
        for a in ("relu", "leaky_relu", "tanh") for m in (0.0, 0.3)
    ],
}  # fmt: skip
"""Each class with a rule, with options that are not the defaults: those that the format has, and others."""


def steepness(model: nn.Module, x: torch.Tensor) -> float:
    """The norm of the Jacobian; the copy is for models that overwrite their input."""
    J = torch.autograd.functional.jacobian(lambda v: model(v.clone()).flatten(), x)
    return float(torch.linalg.matrix_norm(torch.as_tensor(J).reshape(-1, x.numel()), 2))


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_a_certificate_is_about_the_function_of_the_model_or_is_refused(kind: type[nn.Module]) -> None:
    """For every option: the certified module computes the same in float64, up to rounding."""
    jump = 3e-9 / 0.5 if kind in {nn.Softplus, GradientBlock} else 0.0  # where torch switches to the identity
    accepted = 0
    for make, shape in OPTIONS[kind]:
        model = make().double()
        for p in model.parameters():
            nn.init.normal_(p)
        for _ in range(3):
            model(torch.randn(7, *shape, dtype=torch.float64) * 2 + 1)
        try:
            cert = stableopt.certify(model, shape)
        except UncertifiableError:
            continue
        accepted += 1
        x = torch.cat([scale * torch.randn(40, *shape, dtype=torch.float64) for scale in (0.1, 1.0, 10.0, 100.0)])
        torch.testing.assert_close(cert.module()(x.clone()), model.eval()(x.clone()), rtol=1e-12, atol=1e-11 + jump)
        assert steepness(model, x[50:51]) <= cert.lipschitz * (1.0 + 1e-14)  # the singular value is rounded
    assert accepted


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (nn.BatchNorm1d(4), (5,), r"the module \(BatchNorm1d\).*built for 4 channels, got 5"),
        (nn.BatchNorm1d(1), (5,), "built for 1 channels, got 5"),
        (nn.Sequential(nn.Tanh(), BatchCentering(3)), (5,), r"'1' \(BatchCentering\).*built for 3 channels, got 5"),
        (BatchCentering(1), (5, 4), "built for 1 channels, got 5"),
        (InputNormalization([0.5] * 3, [1.0] * 3), (5,), "built for 3 channels, got 5"),
        (InputNormalization([0.5], [1.0]), (5, 4), "built for 1 channels, got 5"),
        (nn.BatchNorm2d(3), (3,), "is for images, got the shape"),
        (nn.BatchNorm1d(3), (3, 4, 4), "is for features or signals, got the shape"),
    ],
)
def test_a_model_that_cannot_run_on_the_shape_is_not_certified(
    model: nn.Module, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"{words}"):
        stableopt.certify(model, shape)
    with pytest.raises((ValueError, RuntimeError)):
        model.eval()(torch.zeros(2, *shape))


@pytest.mark.parametrize(
    "module", [nn.Softplus(1), nn.Hardtanh(-1, 1), nn.ELU(2), nn.LeakyReLU(0), nn.MaxPool1d(np.int64(2))], ids=str
)
def test_options_that_are_integers_are_certified(module: nn.Module) -> None:
    cert = stableopt.certify(module, (2, 4))
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(cert.module()(x), module(x), rtol=1e-14, atol=0)
    assert cert.lipschitz == lipschitz(module).upper


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Softplus(threshold=1.0), "jumps where it switches"),
        (nn.Softplus(beta=math.inf), "finite beta"),
    ],
)
def test_options_that_the_format_cannot_say_are_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(UncertifiableError, match=rf"'0' \({type(module).__name__}\) cannot be certified: .*{words}"):
        stableopt.certify(nn.Sequential(module), (4,))


def test_a_subclass_that_changes_the_map_is_still_refused_for_that() -> None:
    class Twice(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 the name that torch gives it
            return 2 * super().forward(input)

    with pytest.raises(UncertifiableError, match=r"Twice.*overrides forward of Linear"):
        stableopt.certify(Twice(2, 2), (2,))


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if norm_of(m) == "l2"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float64, torch.bfloat16))],
    ids=str,
)
def test_every_method_is_certified_within_its_limit(method: str, kind: str, dtype: torch.dtype) -> None:
    model = limited(method, kind).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    plain, x = export(model), torch.randn(3, 9, dtype=dtype)
    if kind == "conv":
        del plain[0], model[0]  # a rearrangement that has no rule
        x = x.view(-1, 1, 3, 3)
    before, training = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    exported = stableopt.certify(plain, tuple(x.shape[1:]))
    # the verifier bounds a kernel on a grid of frequencies, which does not see that an orthogonal one is exact
    limit = LIMIT * (1.05 if method == "bcop" else 1.0) * SLACK
    assert exported.lipschitz <= limit
    if dtype in {torch.float64, torch.float32}:
        torch.testing.assert_close(exported.module()(x), plain.eval()(x))
    if (
        dtype != torch.bfloat16
    ):  # without export() the weights are those of evaluation, up to rounding within their limits
        assert stableopt.certify(model, tuple(x.shape[1:])).lipschitz <= limit * (1 + 32 * torch.finfo(dtype).eps)
    assert [part.training for part in model.modules()] == training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_model_of_many_kinds_of_layers() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        InputNormalization([0.5, 0.4], [0.25, 0.5]), nn.Conv2d(2, 4, 3, padding=1), MaxMin(), ScaledAvgPool(2), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(16, 6), Abs(), UnitRowLinear(6, 3),
    )  # fmt: skip
    model(torch.rand(8, 2, 4, 4))
    stabilize_head = release(stabilize(copy.deepcopy(model[6]), 1.0))
    model[6] = stabilize_head
    cert = stableopt.certify(model, (2, 4, 4))
    assert cert.lipschitz <= lipschitz(model).upper * SLACK  # normalizations are joined with the weights before them
    assert math.isfinite(cert.lipschitz)
    x = torch.rand(4, 2, 4, 4)
    torch.testing.assert_close(cert.module()(x), model.eval()(x))
    assert cert.margin_constants is not None
    assert cert.margin_constants.shape == (3, 3)
