"""Laws of the constants that steps are computed from: above what is proved, tight, differentiable, refused where unknown."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import (
    ConvGradientBlock,
    DissipativeBlock,
    GradientBlock,
    GroupSort,
    InfNormBlock,
    lipschitz,
    stabilize,
    training_constant,
)
from stableopt.nn.training_constants import BranchConstant


def number(constant: torch.Tensor | float) -> float:
    return float(torch.as_tensor(constant).detach())


LAYERS: list[tuple[Callable[[], nn.Module], tuple[str, ...], float]] = [
    (lambda: nn.Linear(5, 3), ("l2", "linf", "l1", "token_max"), 1.02),
    (lambda: nn.Conv1d(2, 3, 3, padding=1), ("l2", "linf", "l1"), 1.3),
    (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2), ("l2", "linf", "l1"), 1.3),
    (lambda: nn.ConvTranspose2d(3, 2, 3, padding=1), ("l2", "linf", "l1"), 1.3),
    (lambda: GradientBlock(4, strong=0.7, step=0.8), ("l2", "token_max"), 1.0 + 1e-5),
    (lambda: GradientBlock(4, strong=0.7, step=0.8, bound="rows"), ("l2", "token_max"), 1.0 + 1e-5),
    (lambda: ConvGradientBlock(2, 2, 3, strong=0.7, step=0.8), ("l2",), 1.0 + 1e-5),
    (lambda: DissipativeBlock(4, rate=0.5, step=0.7), ("l2", "token_max"), 1.02),
    (lambda: InfNormBlock(4, rate=0.5, step=0.7), ("linf",), 1.3),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "norms", "tight"), LAYERS)
def test_it_is_above_what_is_proved_and_not_by_much(
    make: Callable[[], nn.Module], norms: tuple[str, ...], tight: float, dtype: torch.dtype
) -> None:
    for scale in (1.0, 1e-3, 30.0):
        layer = make()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "raw" not in name:
                    parameter.mul_(scale)
        layer.to(dtype)
        for norm in norms:
            value = number(training_constant(layer, norm))
            proved = lipschitz(layer, norm).upper
            assert proved <= value
            if scale == 1.0:
                assert value <= tight * proved * (1.0 + 1e-2 * (dtype is torch.bfloat16))


@settings(max_examples=20)
@given(
    m=st.integers(1, 8), n=st.integers(1, 8), rank_one=st.booleans(), log_scale=st.integers(-8, 8), seed=st.integers(0, 99)
)  # fmt: skip
def test_rounding_is_counted_for_every_matrix(m: int, n: int, rank_one: bool, log_scale: int, seed: int) -> None:
    torch.manual_seed(seed)
    W = torch.randn(m, 1) @ torch.randn(1, n) if rank_one else torch.randn(m, n)
    for dtype in (torch.float64, torch.float32):
        layer = nn.Linear(n, m).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(10.0**log_scale * W)
        for norm in ("l2", "linf", "l1"):
            assert lipschitz(layer, norm).upper <= number(training_constant(layer, norm))


def test_a_limited_weight_has_its_limit_and_is_not_measured() -> None:
    layer = stabilize(nn.Linear(4, 4), 0.5)
    assert training_constant(layer, "l2") == training_constant(layer, "token_max") == 0.5
    measured = training_constant(layer, "linf")
    assert isinstance(measured, torch.Tensor)
    assert number(measured) >= lipschitz(layer.eval(), "linf").upper
    learned = stabilize(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), 2.0, budget="learned")
    with torch.no_grad():
        next(p for name, p in learned.named_parameters() if "shares" in name).normal_()
    constant = BranchConstant(learned, "l2", "a test").now(learned)
    assert lipschitz(learned).upper <= number(constant) <= 2.0
    assert isinstance(constant, torch.Tensor)
    constant.backward()  # the shares of the budget are trained through it
    assert any("shares" in name and p.grad is not None for name, p in learned.named_parameters())


def test_a_branch_has_the_product_of_its_layers() -> None:
    branch = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Sigmoid(), nn.Linear(5, 3)), GroupSort(3))
    constant = BranchConstant(branch, "l2", "a test")
    assert constant.fixed == {"1.0": 0.25, "2": 1.0}
    expected = 0.25 * training_constant(branch[0], "l2") * training_constant(branch[1][1], "l2")  # type: ignore[index]
    assert number(constant.now(branch)) == number(expected)
    assert lipschitz(branch).upper <= number(expected)
    layer = nn.Linear(3, 3)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    assert number(BranchConstant(twice, "l2", "a test").now(twice)) == pytest.approx(
        number(training_constant(layer, "l2")) ** 2
    )
    alone = nn.Tanh()
    assert BranchConstant(alone, "linf", "a test").now(alone) == 1.0


def test_the_gradient_is_that_of_the_norm() -> None:
    layer = nn.Linear(3, 3, bias=False)
    assert torch.autograd.gradcheck(
        lambda W: torch.func.functional_call(Wrapped(layer), {"layer.weight": W}, ()), (layer.weight,)
    )


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return training_constant(self.layer, "l2")  # type: ignore[return-value]


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_what_cannot_be_relied_on_is_refused_with_a_way_out() -> None:
    for branch, words in (
        (Unknown(), r"in a branch of a test: no l2 Lipschitz rule is known for Unknown"),
        (nn.Sequential(nn.Tanh(), nn.PReLU()), r"'1' \(PReLU\).*has no constant that holds for all values.*Replace it"),
        (nn.Sequential(nn.GRU(2, 2)), "GRU"),
        (nn.ModuleList([nn.ReLU()]), "in an order that only its forward knows"),
    ):
        with pytest.raises(UncertifiableError, match=words):
            BranchConstant(branch, "l2", "a test")
    with pytest.raises(UncertifiableError, match="Conv1d"):
        BranchConstant(nn.Conv1d(2, 2, 1), "token_max", "a test")
    with pytest.raises(UncertifiableError, match="known not to expand in l2 and token_max, and 'linf'"):
        training_constant(GradientBlock(2), "linf")
    with pytest.raises(
        UncertifiableError, match="no bound of a Tanh is known that holds while its weights are trained"
    ):
        training_constant(nn.Tanh(), "l2")
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(UncertifiableError, match="forward hook"):
        BranchConstant(hooked, "l2", "a test")


def test_a_layer_that_is_replaced_by_a_steeper_one_is_noticed() -> None:
    branch = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    constant = BranchConstant(branch, "l2", "a test")
    assert constant.still_holds(branch, "a test")
    branch[1] = nn.Sigmoid()
    assert constant.still_holds(branch, "a test")
    branch[1] = nn.GELU()
    assert not constant.still_holds(branch, "a test")
    branch[1] = Unknown()
    assert not constant.still_holds(branch, "a test")


def test_nan_stays_nan() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, math.nan)
    assert math.isnan(number(training_constant(layer, "l2")))
