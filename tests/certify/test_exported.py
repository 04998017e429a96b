"""Models with a forward of their own: what ``torch.export`` records is certified, and what it cannot say is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stableopt.certify.exported import fold_exported
from stableopt.certify.extract import extract, live
from stableopt.certify.fold.registry import checked_fold, fold
from stableopt.certify.program import Builder
from stableopt.errors import UncertifiableError
from stableopt.nn import GroupSort, stabilize
from tests.certify.fold.test_layers import computed, randomized


class Map(nn.Module):
    """A module that computes a given function of its parts and the input."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += skip
        return self.relu(x)


class ResNet(nn.Module):
    """The ResNet-18 for CIFAR, of any width."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        stages, before = [], width
        for stage, after in enumerate(widths):
            stages.append(nn.Sequential(BasicBlock(before, after, 1 + (stage > 0)), BasicBlock(after, after, 1)))
            before = after
        self.layers = nn.ModuleList(stages)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))


V, S, I = (6,), (4, 9), (4, 8, 8)
numbers = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

MODELS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("residual", lambda: Map(lambda m, x: x + 0.5 * torch.relu(m.f(x)), f=nn.Linear(6, 6)), V),
    ("weights used directly", lambda: Map(lambda m, x: F.linear(x, 2 * m.f.weight, m.f.bias), f=nn.Linear(6, 3)), V),
    ("matmul", lambda: Map(lambda m, x: x @ m.f.weight.T - m.f.bias, f=nn.Linear(6, 3)), V),
    ("matmul from the left", lambda: Map(lambda m, x: m.f.weight @ x, f=nn.Linear(4, 3)), S),
    ("addmm", lambda: Map(lambda m, x: torch.addmm(m.f.bias, x, m.f.weight.T), f=nn.Linear(6, 3)), V),
    ("numbers", lambda: Map(lambda m, x: (1.0 - x) / 3.0 + numbers * x - 0.5 + 2 * numbers), V),
    ("channels", lambda: Map(lambda m, x: x * m.c.weight.reshape(4, 1, 1) / 2 + m.c.bias.reshape(4, 1, 1), c=nn.BatchNorm2d(4)), I),
    ("pixels", lambda: Map(lambda m, x: x + torch.arange(64.0, dtype=x.dtype).reshape(8, 8)), I),
    ("negative, absolute", lambda: Map(lambda m, x: -x.abs()), V),
    ("branches", lambda: Map(lambda m, x: torch.cat([m.a(x), m.b(x), x], 1), a=nn.Linear(6, 2), b=nn.Tanh()), V),
    ("stack", lambda: Map(lambda m, x: torch.stack([x, x.tanh()], -1).sum(-1)), V),
    ("chunks", lambda: Map(lambda m, x: torch.cat([b := x.chunk(2, 1)[1], 2 * x.split([1, 3], 1)[1], b], 1)), I),
    ("selects", lambda: Map(lambda m, x: x[:, 1:2] + x.select(1, -1).unsqueeze(1) + x[..., 0:1] + x.narrow(2, 3, 1)[:, :1]), I),
    ("steps", lambda: Map(lambda m, x: x[:, :, ::2] + x.flip(2)[:, :, 1::2] + torch.roll(x, 3, 2)[:, :, ::2]), I),
    ("shapes", lambda: Map(lambda m, x: x.view(x.size(0), 2, 2, -1).transpose(1, 3).permute(0, 2, 1, 3).reshape(len(x), -1)), I),
    ("axes", lambda: Map(lambda m, x: x.unsqueeze(2).movedim(1, -1).squeeze(1).mT.contiguous().flatten(2).unflatten(2, (4, 8))), I),
    ("means", lambda: Map(lambda m, x: x.mean((2, 3)) + x.mean(1).sum((1, 2), keepdim=True).squeeze(2) + x.amax((1, 3)).mean(1, True)), I),
    ("smallest", lambda: Map(lambda m, x: x.amin(1) + x.amax(1)), S),
    ("pools", lambda: Map(lambda m, x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 4)), I),
    ("one axis", lambda: Map(lambda m, x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 4)), S),
    ("convolutions", lambda: Map(lambda m, x: F.conv2d(x, m.c.weight, m.c.bias, 2, 1) + m.c(x)[:, :, ::2, ::2], c=nn.Conv2d(4, 4, 3, 1, 1)), I),
    ("transposed", lambda: Map(lambda m, x: F.conv_transpose2d(x, m.c.weight, None, 2, 1, 1), c=nn.ConvTranspose2d(4, 3, 3)), I),
    ("paddings", lambda: Map(lambda m, x: F.pad(x, (1, 2, 0, 1), value=0.5) + F.pad(x, (1, 2, 1, 0), mode="circular")), I),
    ("reflected", lambda: Map(lambda m, x: F.pad(x, (1, 2), mode="reflect") + F.pad(x, (3, 0), mode="replicate")), S),
    ("upsampled", lambda: Map(lambda m, x: F.interpolate(x, scale_factor=2) + F.interpolate(x, (16, 16), mode="bilinear")), I),
    ("statistics", lambda: Map(lambda m, x: F.batch_norm(x, m.n.running_mean, m.n.running_var, m.n.weight, None), n=nn.BatchNorm2d(4)), I),
    ("of a sample", lambda: Map(lambda m, x: F.layer_norm(x, (9,), m.n.weight, m.n.bias) + F.group_norm(x, 2), n=nn.LayerNorm(9)), S),
    ("clamps", lambda: Map(lambda m, x: x.clamp(-0.5, 0.25) + x.clamp(min=-1) + x.clamp_max(0.5) + F.relu6(x)), V),
    ("activations", lambda: Map(lambda m, x: F.silu(x) + F.gelu(x) + F.elu(x, 0.5) + F.leaky_relu(x, 0.2) + F.mish(x) + F.selu(x)), V),
    ("more of them", lambda: Map(lambda m, x: F.hardtanh(x) + F.hardswish(x) + F.softplus(x, 2.0, 60.0) + F.logsigmoid(x) + F.tanh(x)), V),
    ("still more", lambda: Map(lambda m, x: F.prelu(x, m.p.weight) + F.softmax(x, 1) + F.celu(x) + F.softshrink(x), p=nn.PReLU(6)), V),
    ("dropped", lambda: Map(lambda m, x: F.dropout(x, 0.5, m.training) + F.dropout2d(x, 0.5, m.training) + m.d(x), d=nn.Dropout()), I),
    ("in place", lambda: Map(lambda m, x: F.relu_(x + 1).mul_(2.0).add_(x), r=nn.ReLU()), V),
    ("layer twice", lambda: Map(lambda m, x: m.f(torch.tanh(m.f(x))), f=nn.Linear(6, 6)), V),
    ("nested", lambda: nn.Sequential(nn.Linear(6, 6), Map(lambda m, x: x + m.f(x), f=nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))), V),
    ("pairs", lambda: Map(lambda m, x: x - m.f(x), f=GroupSort(2)), V),
    ("block", lambda: BasicBlock(4, 6, 2), I), ("small resnet", lambda: ResNet(2), (3, 8, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "shape"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_a_recorded_model_computes_what_the_module_computes(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = randomized(make(), 4)
    program = extract(model, shape)
    x = 3 * torch.randn(4, *shape)
    with torch.no_grad():
        expected = model(x)
    assert (computed(program, x) - expected).abs().max() <= 1e-11 * (1 + expected.abs().max())
