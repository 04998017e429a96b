"""Which modules a certificate covers, that it says the same as the module, and the sentence for those that it does not cover."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import stableopt
from stableopt.certify.coverage import KNOWN, uncovered
from stableopt.errors import UncertifiableError
from stableopt.nn import (
    SLL,
    Abs,
    BallProjection,
    BatchCentering,
    Concat,
    Householder,
    InputNormalization,
    InvertibleDownsampling,
    L2NormPool,
    LayerCentering,
    LinearSpline,
    MaxMin,
    Merge,
    NActivation,
    Parallel,
    Residual,
    Sandwich,
    ScaledAvgPool,
    SoftAbs,
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


BRANCH = r"without branches\. Write the model as a chain"
TOGETHER = r"proved for its parts together.*Use a GradientBlock or stabilized Linear"
ACTIVATION = r"activation is not in the format\. Use Abs, GroupSort"
NOT_COVERED: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (lambda: SLL(4), (4,), TOGETHER),
    (lambda: SLL(4).folded(), (4,), TOGETHER),
    (lambda: Sandwich(4, 4), (4,), TOGETHER),
    (lambda: Sandwich(4, 4).folded(), (4,), TOGETHER),
    (lambda: Householder(4), (4,), ACTIVATION),
    (lambda: LinearSpline(4), (4,), ACTIVATION),
    (lambda: NActivation(4), (4,), ACTIVATION),
    (SoftAbs, (4,), ACTIVATION),
    (lambda: Residual(nn.ReLU()), (4,), BRANCH),
    (lambda: Concat(nn.ReLU(), nn.Tanh()), (4,), BRANCH),
    (lambda: Parallel(nn.ReLU(), nn.Tanh(), sizes=(2, 2)), (4,), BRANCH),
    (lambda: Merge(nn.ReLU(), nn.Tanh()), (4,), BRANCH),
    (lambda: L2NormPool(2), (1, 4, 4), "average and max pooling only. Use ScaledAvgPool"),
    (lambda: LayerCentering(4), (4,), "Use BatchCentering"),
    (lambda: InvertibleDownsampling(2), (1, 4, 4), "no rearrangement of pixels. Use a convolution with a stride"),
    (lambda: BallProjection(1.0), (4,), "apply it to the inputs before"),
    (lambda: nn.ConvTranspose2d(1, 1, 2), (1, 4, 4), "ConvTranspose2d has no rule.*Those with one are Linear"),
    (lambda: nn.Conv3d(1, 1, 2), (1, 3, 3, 3), r"Conv3d has no rule.*fold\.register\(Conv3d\)"),
    (nn.Mish, (4,), "Mish has no rule"),
    (lambda: nn.GRU(4, 4), (3, 4), "GRU has no rule"),
    (lambda: nn.BatchNorm1d(4, track_running_stats=False), (4,), "without running statistics"),
    (lambda: ScaledAvgPool(None), (1, 4, 4), "with a kernel_size"),
    (lambda: ScaledAvgPool(2, dims=3), (1, 4, 4, 4), "for one or two axes"),
    (lambda: InputNormalization(0.5, 0.5), (1, 2, 2, 2), "neither signals nor images"),
]


@pytest.mark.parametrize(("make", "shape", "sentence"), NOT_COVERED)
def test_a_module_that_is_not_covered_has_a_sentence(
    make: Callable[[], nn.Module], shape: tuple[int, ...], sentence: str
) -> None:
    module = make()
    for model, where in ((module, "the module "), (nn.Sequential(nn.Identity(), module), "'1' ")):
        start = rf"(?s)^{where}\({type(module).__name__}\) cannot be certified: "
        with pytest.raises(UncertifiableError, match=rf"{start}.*{sentence}") as info:
            stableopt.certify(model, shape)
        assert "overrides" not in str(info.value)
        assert "None" not in str(info.value)


def test_the_sentence_points_to_a_bound_only_where_there_is_one() -> None:
    assert uncovered(SLL(2), "").endswith("Its bound without a file is stableopt.nn.lipschitz(module).")
    assert "lipschitz(module)" not in uncovered(nn.GRU(2, 2), "")
    assert KNOWN in uncovered(nn.GRU(2, 2), "3")
    assert "(GRU)" in uncovered(stabilize_quietly(nn.GRU(2, 2)), "").replace("ParametrizedGRU", "GRU")


def stabilize_quietly(module: nn.Module) -> nn.Module:
    with pytest.warns(UserWarning, match="no Lipschitz bound of the whole"):
        return stabilize(module, radius=1.0)


def test_a_subclass_that_changes_the_map_is_still_refused_for_that() -> None:
    class Twice(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 the name that torch gives it
            return 2 * super().forward(input)

    with pytest.raises(UncertifiableError, match=r"Twice.*overrides forward of Linear"):
        stableopt.certify(Twice(2, 2), (2,))


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if norm_of(m) == "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
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
    assert cert.lipschitz == pytest.approx(lipschitz(model).upper, rel=1e-6)
    assert math.isfinite(cert.lipschitz)
    x = torch.rand(4, 2, 4, 4)
    torch.testing.assert_close(cert.module()(x), model.eval()(x))
    assert cert.margin_constants is not None
    assert cert.margin_constants.shape == (3, 3)
