"""The use of a step limit is 1 where the block begins to expand, on both sides of the limit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import stableopt.nn as stable
from stableopt.lyapunov.layers import LayerProbe, NormEstimator, StepLaw, step_law
from stableopt.lyapunov.layers.cfl import constant_of, has_law
from stableopt.nn import SLL, AveragedResidual, ConvGradientBlock, GradientBlock


class FreeStep(nn.Module):
    """A gradient step whose step size nobody limits."""

    def __init__(self, dim: int, share: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim))
        self.share = share

    @property
    def size(self) -> torch.Tensor:
        return self.share * 2.0 / torch.linalg.matrix_norm(self.weight.detach(), 2) ** 2

    def forward(self, x):
        return x - self.size * torch.relu(x @ self.weight.T + 100.0) @ self.weight  # all units active


@step_law.register(FreeStep)
def _(module: FreeStep) -> StepLaw:
    return StepLaw(module.size / 2.0)


def expansion(block: nn.Module, dim: int) -> float:
    jacobian = torch.autograd.functional.jacobian(block, torch.randn(dim))
    return float(torch.linalg.matrix_norm(jacobian, 2))


def settled(model: nn.Module) -> dict[str, float]:
    estimator = NormEstimator(model)
    return [estimator.measure() for _ in range(60)][-1].cfl


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99, 1.01, 1.3, 2.0])
def test_a_block_expands_exactly_when_it_uses_more_than_its_limit(share):
    torch.manual_seed(0)
    block = FreeStep(5, share)
    (use,) = settled(nn.Sequential(block)).values()
    assert use == pytest.approx(share, rel=1e-6)
    if share > 1.0:
        assert expansion(block, 5) == pytest.approx(2.0 * share - 1.0)
    else:
        assert expansion(block, 5) <= 1.0


@pytest.mark.parametrize("stretch", [0.5, 1.0, 1.5])
def test_the_use_of_an_sll_layer_is_that_of_its_steps(stretch):
    torch.manual_seed(0)
    layer = SLL(4, 6)
    nn.init.normal_(layer.raw_q)
    nn.init.constant_(layer.bias, 100.0)
    folded = layer.folded()
    folded.step.mul_(stretch)
    W, s = layer.weight.detach(), layer.step_sizes().detach() * stretch
    exact = float(torch.linalg.matrix_norm(s.sqrt().unsqueeze(1) * W, 2) ** 2 / 2.0)
    assert settled(nn.Sequential(folded)) == {"0": pytest.approx(exact, rel=1e-6)}
    if stretch == 1.0:
        assert settled(nn.Sequential(layer)) == {"0": pytest.approx(exact, rel=1e-6)}
        assert exact <= 1.0
    assert (expansion(folded, 4) <= 1.0 + 1e-12) == (exact <= 1.0)


@pytest.mark.parametrize("strong", [0.0, 0.7])
def test_the_use_of_a_block_with_steps_per_unit_counts_each_step(strong):
    torch.manual_seed(0)
    block = GradientBlock(5, 7, strong=strong, bound="rows", step=0.6)
    for name in ("weight", "raw_q", "raw_step"):
        nn.init.normal_(block.get_parameter(name))
    nn.init.constant_(block.bias, 100.0)
    W, s, kappa = block.weight.detach(), block.step_sizes().detach(), float(block.damping().detach())
    exact = kappa + float(torch.linalg.matrix_norm(s.sqrt().unsqueeze(1) * W, 2) ** 2 / 2.0)
    assert settled(nn.Sequential(block)) == {"0": pytest.approx(exact, rel=1e-6)}
    smallest = float(torch.linalg.eigvalsh(torch.autograd.functional.jacobian(block, torch.randn(5)))[0])
    assert smallest == pytest.approx(1.0 + kappa - 2.0 * exact)  # all units are active: 1 - kappa - |S^(1/2) W|^2
    assert 0.0 < exact <= 1.0


@pytest.mark.parametrize("bound", ["gram", "rows"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_use_of_a_convolutional_block_is_that_of_its_kernel_on_images_of_any_size(bound, mode):
    torch.manual_seed(0)
    block = ConvGradientBlock(2, 3, dims=1, bound=bound, strong=0.2, step=0.9, padding_mode=mode)
    nn.init.normal_(block.weight)
    nn.init.constant_(block.bias, 100.0)
    (use,) = settled(nn.Sequential(block)).values()
    kappa, n = float(block.damping().detach()), 60
    J = torch.autograd.functional.jacobian(lambda x: block(x.view(2, n)).flatten(), torch.randn(2 * n))
    shown = (1.0 + kappa - float(torch.linalg.eigvalsh(J)[0])) / 2.0  # the use of a signal of 60 pixels
    assert shown == pytest.approx(use, rel=0.02)
    assert 0.3 < use <= 1.0


def test_a_convex_mix_uses_its_weight_while_its_branch_does_not_expand():
    model = nn.Sequential(AveragedResidual(nn.Linear(3, 3, bias=False), 0.25, learnable=False))
    with torch.no_grad():
        model[0].branch.weight.copy_(torch.diag(torch.tensor([1.0, -0.5, 0.2])))
    assert LayerProbe(model).measure().cfl == {"0": 0.25}
    with torch.no_grad():
        model[0].branch.weight.mul_(3.0)
    reading = LayerProbe(model).measure()
    assert reading.cfl == {}
    assert reading.growth == {"0": pytest.approx(1.0 + 0.25 * 2.0)}
    assert expansion(model, 3) == pytest.approx(reading.growth["0"])


def test_what_is_said_about_a_constant_is_never_less_than_the_map_shows():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.LeakyReLU(2.0),
        GradientBlock(4),
        AveragedResidual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
        nn.Dropout(0.5),
    )
    norms = NormEstimator(model.eval()).measure().norms
    found = constant_of(model, "", norms)
    assert found >= expansion(model, 4)
    assert constant_of(model.train(), "", norms) == pytest.approx(2.0 * found)  # what dropout keeps is doubled
    assert math.isnan(constant_of(nn.Sequential(nn.LayerNorm(4)), "", {}))
    assert math.isnan(constant_of(nn.Linear(2, 2), "", {}))
    assert not has_law(nn.Linear(2, 2))


def test_blocks_whose_step_is_a_fraction_of_its_limit_and_stacks_with_a_budget_are_read() -> None:
    """Use of the limit, growth that the steps allow, and a finite exponent from what the blocks promise."""
    branch = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    blocks = {
        "1": (stable.InfNormBlock(3, step=0.3), 0.3),
        "2": (stable.DissipativeBlock(3, step=0.4), 0.4),
        "3": (stable.CompensatedPair(GradientBlock(3, strong=1.0), branch, step=0.6), 0.6),
        "4": (stable.cfl(copy.deepcopy(branch), "averaged", step=0.2), 0.2),
    }
    stack = stable.ResidualStack([copy.deepcopy(branch) for _ in range(4)], 3.0, allocate="uniform", step=0.5)
    grown = stable.cfl(copy.deepcopy(branch), "lipschitz", growth=1.5, step=0.5)
    model = nn.Sequential(nn.Linear(3, 3), *(block for block, _ in blocks.values()), stack, grown)
    x = torch.randn(4, 3)
    before = copy.deepcopy(model.state_dict())
    reading = LayerProbe(model, lambda: model(x).sum()).measure()
    assert reading.reason == ""
    for path, (_, use) in blocks.items():
        assert reading.cfl[path] == pytest.approx(use, rel=1e-5)
    assert 0.0 < reading.cfl["3.contractive"] < 1.0
    assert reading.growth["5"] == pytest.approx((1 + 0.5 * math.log(3.0) / 4) ** 4, rel=1e-5)
    assert reading.growth["6"] == pytest.approx(1.25, rel=1e-5)
    assert math.isfinite(reading.forward_exponent)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert constant_of(stack, "5", {}) == 3.0
    assert constant_of(blocks["3"][0], "3", {}) == 1.0
    assert math.isnan(constant_of(stable.cfl(nn.Tanh(), "gradient", smoothness=2.0), "", {}))
