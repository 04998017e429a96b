"""The branch of a block of unknown make is measured at the data, with its true strength, and pulls back or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.layers import LayerProbe, is_residual
from stableopt.lyapunov.layers.probe import _random_state
from stableopt.nn import AveragedResidual, GradientBlock


class Euler(nn.Module):
    """One explicit Euler step of a linear field, of a module, or of a function."""

    def __init__(self, field, step: float) -> None:
        super().__init__()
        self.field, self.step_size = field, step

    def forward(self, x):
        return x + self.step_size * self.field(x)


def linear(matrix) -> nn.Linear:
    layer = nn.Linear(*matrix.shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    return layer


def readings(model: nn.Module, x, count: int = 1):
    probe = LayerProbe(model, lambda: model(x).square().sum())
    return [probe.measure() for _ in range(count)][-1]


@pytest.mark.parametrize("share", [0.4, 0.95, 1.05, 1.7])
def test_a_branch_that_pulls_back_has_a_use_and_expands_beyond_1(share):
    model = nn.Sequential(Euler(linear(-torch.diag(torch.tensor([3.0, 1.0, 0.1]))), share * 2.0 / 3.0))
    reading = readings(model, torch.randn(5, 3), 6)
    assert reading.cfl == {"0": pytest.approx(share, rel=1e-6)}
    assert reading.growth == {}
    jacobian = torch.autograd.functional.jacobian(model, torch.randn(3))
    assert (float(torch.linalg.matrix_norm(jacobian, 2)) > 1.0) == (reading.cfl["0"] > 1.0)


@pytest.mark.parametrize(
    "matrix", [torch.tensor([[0.0, -2.0], [2.0, 0.0]]), torch.eye(2) * 2.0], ids=["skew", "outward"]
)
def test_a_branch_that_does_not_has_a_growth_that_bounds_the_block(matrix):
    model = nn.Sequential(Euler(linear(matrix), 0.25))
    reading = readings(model, torch.randn(5, 2), 5)
    assert reading.growth == {"0": pytest.approx(1.5, rel=1e-6)}
    assert reading.cfl == {}
    assert float(torch.linalg.matrix_norm(torch.eye(2) + 0.25 * matrix, 2)) <= reading.growth["0"] + 1e-9


def test_the_strength_is_that_at_the_data():
    model = nn.Sequential(Euler(nn.Softplus(), -1.0))  # slope sigmoid(x), so the strength is that of the largest entry
    x = torch.tensor([[-3.0, 1.0], [0.0, -1.0]])
    assert readings(model, x, 25).cfl == {"0": pytest.approx(float(torch.sigmoid(torch.tensor(1.0))) / 2.0, rel=1e-3)}


@pytest.mark.parametrize("way", ["functional", "no forward mode"])
def test_a_branch_without_derivatives_in_forward_mode_is_measured_by_differences(way):
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return -2.0 * x

        @staticmethod
        def backward(ctx, g):
            return -2.0 * g

    field = Custom.apply if way == "no forward mode" else (lambda x: -2.0 * x)
    model = nn.Sequential(nn.Linear(3, 3), Euler(field, 0.5))
    reading = readings(model, torch.randn(4, 3))
    assert reading.how == ("difference" if way == "no forward mode" else "forward")
    assert reading.cfl == {"1": pytest.approx(0.5, rel=1e-6)}


def test_random_blocks_draw_the_same_numbers_each_time():
    torch.manual_seed(0)
    block, x = Euler(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), 0.5), torch.randn(1, 6)
    found = readings(nn.Sequential(block), x, 20).growth["0"]
    _random_state(0, 0).restore()  # that of the readings
    jacobian = torch.autograd.functional.jacobian(block, x).reshape(6, 6)
    assert found == pytest.approx(1.0 + float(torch.linalg.matrix_norm(jacobian - torch.eye(6), 2)), rel=1e-3)


def test_a_block_that_writes_into_its_input_or_runs_in_autocast_is_measured():
    class InPlace(Euler):
        def forward(self, x):
            x += self.step_size * self.field(x)
            return x

    model = nn.Sequential(nn.Linear(3, 3), InPlace(linear(-torch.eye(3)).requires_grad_(False), 0.5)).float()
    x = torch.randn(4, 3, dtype=torch.float32)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().sum()

    reading = LayerProbe(model, loss).measure()
    assert reading.reason == ""
    assert reading.cfl == {"1": pytest.approx(0.25, rel=0.05)}


def test_a_block_that_cannot_be_differentiated_is_left_out():
    class Numpy(Euler):
        def forward(self, x):
            return x + torch.from_numpy(x.detach().numpy())

    model = nn.Sequential(Numpy(None, 1.0), nn.Linear(3, 1))
    reading = readings(model, torch.randn(4, 3))
    assert "0" not in reading.cfl
    assert reading.growth.get("0", 1.0) == pytest.approx(1.0)


def test_what_is_recognized():
    step, tensor, index = Euler(None, 0.5), Euler(None, torch.tensor(0.5)), Euler(None, 3)
    assert is_residual(step)
    assert is_residual(tensor)
    assert not is_residual(index)  # a counter
    assert not is_residual(GradientBlock(2))  # its law is known
    assert not is_residual(AveragedResidual(nn.Identity()))
    assert not is_residual(nn.TransformerEncoderLayer(4, 2, 8))

    class Mine(nn.Module):
        pass

    assert not is_residual(Mine())
    is_residual.register(Mine, lambda module: True)
    assert is_residual(Mine())


class Gumbel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tau = 1.0

    def forward(self, x):
        return nn.functional.gumbel_softmax(x, tau=self.tau)


def test_a_step_alone_makes_no_residual_block():
    layer = nn.Linear(3, 3)
    layer.step = 0.5
    for module in (layer, Gumbel()):
        assert is_residual(module)  # a candidate
        reading = readings(nn.Sequential(nn.Linear(3, 3), module), torch.randn(4, 3))
        assert (reading.cfl, reading.growth, reading.reason) == ({}, {}, "")


def test_a_class_that_is_registered_is_taken_at_its_word():
    class Turned(Euler):
        def forward(self, x):
            return torch.cat([super().forward(x)[:, :1], super().forward(x)[:, 1:]], 1)

    model = nn.Sequential(Turned(linear(-torch.eye(2)), 0.5))
    assert readings(model, torch.randn(4, 2)).cfl == {}
    is_residual.register(Turned, lambda module: True)
    assert readings(model, torch.randn(4, 2)).cfl == {"0": pytest.approx(0.25)}


def test_hooks_on_the_backward_pass_see_nothing_and_stay():
    block, seen = Euler(linear(-torch.eye(2)), 0.5), []
    handles = [
        block.register_full_backward_hook(lambda *_: seen.append("block")),
        block.field.register_full_backward_pre_hook(lambda *_: seen.append("before")),
        nn.modules.module.register_module_full_backward_hook(lambda *_: seen.append("any")),
    ]
    try:
        model, x = nn.Sequential(block), torch.randn(4, 2)
        assert readings(model, x).cfl == {"0": pytest.approx(0.25)}
        assert seen == []
        model(x.requires_grad_()).sum().backward()
        assert set(seen) == {"block", "before", "any"}
    finally:
        for handle in handles:
            handle.remove()
    assert not block._backward_hooks


def test_an_encoder_layer_that_normalizes_first_grows():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, norm_first=True, batch_first=True, dropout=0.0)
    x = torch.randn(1, 3, 4)
    reading = readings(nn.Sequential(layer), x, 15)
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(12, 12)
    strength = float(torch.linalg.matrix_norm(jacobian - torch.eye(12), 2))
    assert reading.growth == {"0": pytest.approx(1.0 + strength, rel=0.01)}
