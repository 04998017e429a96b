"""Every class of torch.nn has a rule or a reason, and the rules of layers that copy or normalize are attained."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stableopt.nn.structure  # noqa: F401 registers the rules of Embedding
from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz
from stableopt.nn.dispatch import lipschitz_rule, refused_classes
from stableopt.nn.rules.pooling import _root_up
from tests.nn.catalogue import ORDERS, jacobian, operator_norm

CLASSES = sorted(
    {kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)},
    key=lambda k: k.__name__,
)
INHERIT = {"ReLU6", "ZeroPad1d", "ZeroPad2d", "ZeroPad3d", "NonDynamicallyQuantizableLinear", "Sequential"}
NORMS = ("l2", "linf", "l1")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_class_of_torch_has_a_rule_or_a_reason(kind: type[nn.Module]) -> None:
    own, refused = kind in lipschitz_rule.registry, kind in refused_classes()
    lazy = kind.__name__.startswith("Lazy")  # becomes its parent when it gets a shape, and is refused before
    inherited = any(k in lipschitz_rule.registry for k in kind.__mro__[1:-1])
    assert own + refused + (lazy or (kind.__name__ in INHERIT and inherited and not own)) == 1


@pytest.mark.parametrize("kind", sorted(refused_classes(), key=lambda k: k.__name__), ids=lambda kind: kind.__name__)
def test_a_reason_is_a_sentence_that_says_what_to_do(kind: type[nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # NLLLoss2d and Container are deprecated
        module = kind.__new__(kind)
    nn.Module.__init__(module)
    with pytest.raises(
        UncertifiableError, match=rf"^no l1 Lipschitz rule is known for {kind.__name__}: .*\. [A-Z].*\.$"
    ):
        lipschitz(module, "l1")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stored_normalization_has_its_exact_constant(norm: str, dtype: torch.dtype) -> None:
    layer = nn.BatchNorm1d(3, eps=1e-3).to(dtype).eval()
    layer.running_var.copy_(torch.tensor([0.1, 2.0, 0.3]))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-0.7, 2.9, 1.0]))
    exact = max(
        Fraction(float(w)) ** 2 / (Fraction(float(v)) + Fraction(1e-3))
        for w, v in zip(layer.weight.detach(), layer.running_var, strict=True)
    )
    bound = lipschitz(layer, norm)
    assert Fraction(bound.lower) ** 2 <= exact <= Fraction(bound.upper) ** 2
    assert bound.upper <= bound.lower * (1 + 2.0**-47)
    layer.train()
    assert lipschitz(layer, norm) == bound
    assert layer.training


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(6, eps=0.25), lambda: nn.GroupNorm(1, 6, eps=0.25)])
def test_a_normalization_by_the_sample_attains_its_constant_without_spread(make: object) -> None:
    layer = make().double()  # type: ignore[operator]
    exact = operator_norm(jacobian(layer, torch.full((1, 6), 3.0)), "l2")
    assert exact == pytest.approx(2.0, rel=1e-12)
    assert exact <= lipschitz(layer).upper * (1 + 1e-14)
    assert lipschitz(layer).upper == pytest.approx(exact, rel=1e-12)
    assert lipschitz(nn.LayerNorm(1, eps=0.25), "linf").upper == 0.0


def test_rms_norm_attains_its_constant_at_zero() -> None:
    layer = nn.RMSNorm(4, eps=0.25)
    assert operator_norm(jacobian(layer, torch.zeros(1, 4)), "l2") == pytest.approx(lipschitz(layer).upper, rel=1e-12)


@given(n=st.integers(1, 40), seed=st.integers(0, 99), norm=st.sampled_from(NORMS), centered=st.booleans())
def test_no_normalization_exceeds_its_bound_near_the_worst_spread(n: int, seed: int, norm: str, centered: bool) -> None:
    torch.manual_seed(seed)
    layer = nn.LayerNorm(n, eps=0.04) if centered else nn.RMSNorm(n, eps=0.04)
    with torch.no_grad():
        layer.weight.copy_(torch.where(torch.rand(n) < 0.7, 1.3, -1.3))
    x = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    x[0] *= math.sqrt(n)
    x = x / x.norm() * math.sqrt(n) * 0.2 * float(torch.rand(()) * 2.5)
    norm_of_jacobian = operator_norm(jacobian(layer, x[None]), norm)
    assert norm_of_jacobian <= lipschitz(layer, norm).upper * (1 + 1e-13)
    if norm != "l2" and n > 1:
        assert lipschitz(layer, norm).upper <= (2.0 + math.sqrt(n / 27)) * 1.3 / 0.2 * (1 + 1e-12)


@given(k=st.integers(1, 5), s=st.integers(1, 5), p=st.integers(0, 2), counted=st.booleans(), ceil=st.booleans())
def test_the_columns_of_an_uneven_average_are_those_of_torch(k: int, s: int, p: int, counted: bool, ceil: bool) -> None:
    pool = nn.AvgPool1d(k, stride=s, padding=min(p, k // 2), ceil_mode=ceil, count_include_pad=counted)
    largest = {"l1": 0.0, "linf": 0.0, "l2": 0.0}
    for n in range(1, 25):
        try:
            J = jacobian(pool, torch.zeros(1, 1, n))
        except RuntimeError:  # torch refuses a window larger than the image
            continue
        for norm in NORMS:
            largest[norm] = max(largest[norm], operator_norm(J, norm))
    for norm in NORMS:
        assert largest[norm] <= lipschitz(pool, norm).upper * (1 + 1e-13)
    assert lipschitz(pool, "l1").upper == pytest.approx(largest["l1"], rel=1e-12)


@given(left=st.integers(0, 3), right=st.integers(0, 3), mode=st.sampled_from(["Replication", "Reflection", "Circular"]))
def test_the_copies_of_a_padding_are_counted_exactly(left: int, right: int, mode: str) -> None:
    pad = getattr(nn, f"{mode}Pad1d")((left, right))
    least = {"Replication": 1, "Reflection": max(left, right) + 1, "Circular": max(left, right, 1)}[mode]
    worst = dict.fromkeys(NORMS, 0.0)
    for n in range(least, least + 8):
        J = jacobian(pad, torch.zeros(1, 1, n))
        worst = {norm: max(worst[norm], operator_norm(J, norm)) for norm in NORMS}
    for norm in NORMS:
        assert lipschitz(pad, norm).upper == pytest.approx(worst[norm], rel=1e-13)


@given(
    left=st.integers(-2, 0), right=st.integers(-2, 0), mode=st.sampled_from(["Replication", "Reflection", "Circular"])
)
def test_a_padding_that_only_crops_has_the_constant_one(left: int, right: int, mode: str) -> None:
    pad = getattr(nn, f"{mode}Pad1d")((left, right))
    assert [lipschitz(pad, norm).upper for norm in NORMS] == [1.0, 1.0, 1.0]
    assert operator_norm(jacobian(pad, torch.zeros(1, 1, 6)), "l2") == 1.0


@given(left=st.integers(-2, 3), right=st.integers(-2, 3), mode=st.sampled_from(["Replication", "Reflection"]))
def test_a_padding_that_also_crops_is_bounded(left: int, right: int, mode: str) -> None:
    pad = getattr(nn, f"{mode}Pad1d")((left, right))
    for n in range(5, 9):
        for norm in NORMS:
            assert operator_norm(jacobian(pad, torch.zeros(1, 1, n)), norm) <= lipschitz(pad, norm).upper * (1 + 1e-14)


@given(
    factor=st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 7.0, 49.0, 0.5]),
    mode=st.sampled_from(["nearest", "nearest-exact"]),
)
def test_no_pixel_is_copied_more_often_than_counted(factor: float, mode: str) -> None:
    layer = nn.Upsample(scale_factor=(factor,), mode=mode)
    for dtype in (torch.float32, torch.float64):
        for n in (2, 3, 7, 30):
            out = layer(torch.arange(float(n), dtype=dtype).reshape(1, 1, n))
            most = int(out.flatten().long().bincount().max()) if out.numel() else 0
            assert most <= lipschitz(layer, "l1").upper
            assert math.sqrt(most) <= lipschitz(layer).upper * (1 + 1e-15)


@pytest.mark.parametrize(("norm", "expected"), [("l2", 3.0), ("linf", 3.0), ("l1", 9.0)])
def test_a_pool_of_norms_attains_its_constant(norm: str, expected: float) -> None:
    pool = nn.LPPool2d(2, 3, stride=1)
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 3] = 1.0
    if norm == "linf":
        x = torch.ones(1, 1, 7, 7)
    ratio = torch.linalg.vector_norm(pool(2 * x) - pool(x), ORDERS[norm]) / torch.linalg.vector_norm(x, ORDERS[norm])
    assert float(ratio) == pytest.approx(expected)
    assert lipschitz(pool, norm).upper == pytest.approx(expected)
    assert Fraction(_root_up(10, 6)) ** 6 >= 10


@pytest.mark.parametrize(
    "make", [lambda: nn.LazyBatchNorm1d(), lambda: nn.LazyInstanceNorm1d(affine=True), lambda: nn.LazyConv2d(2, 3)]
)
def test_a_lazy_layer_is_refused_until_it_has_its_weights(make: object) -> None:
    with pytest.raises(UncertifiableError, match="run it once"):
        lipschitz(make())  # type: ignore[operator]


def test_nan_and_bad_statistics_are_refused() -> None:
    for layer in (nn.LayerNorm(2), nn.LayerNorm(1), nn.BatchNorm1d(2), nn.GroupNorm(1, 2)):
        with torch.no_grad():
            layer.weight[0] = math.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            lipschitz(layer)
    layer = nn.BatchNorm1d(2)
    layer.running_var[0] = -1.0
    with pytest.raises(ValueError, match="running_var"):
        lipschitz(layer)
