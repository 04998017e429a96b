"""Models with a forward of their own: what ``torch.export`` records is certified, and what it cannot say is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from stableopt.certify.extract import extract
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


def of(function: Callable[..., Tensor], **parts: nn.Module) -> nn.Module:
    return Map(function, **parts)


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

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: of(lambda m, x: x + 0.5 * torch.relu(m.f(x)), f=nn.Linear(6, 6)), V),
    "weights used directly": (lambda: of(lambda m, x: F.linear(x, 2 * m.f.weight, m.f.bias), f=nn.Linear(6, 3)), V),
    "matmul": (lambda: of(lambda m, x: x @ m.f.weight.T - m.f.bias, f=nn.Linear(6, 3)), V),
    "matmul from the left": (lambda: of(lambda m, x: m.f.weight @ x, f=nn.Linear(4, 3)), S),
    "addmm": (lambda: of(lambda m, x: torch.addmm(m.f.bias, x, m.f.weight.T), f=nn.Linear(6, 3)), V),
    "numbers": (lambda: of(lambda m, x: (1.0 - x) / 3.0 + numbers * x - 0.5 + 2 * numbers), V),
    "channels": (
        lambda: of(lambda m, x: x * m.c.weight.reshape(4, 1, 1) / 2 + m.c.bias.reshape(4, 1, 1), c=nn.BatchNorm2d(4)),
        I,
    ),
    "pixels": (lambda: of(lambda m, x: x + torch.arange(64.0, dtype=x.dtype).reshape(8, 8)), I),
    "negative, absolute": (lambda: of(lambda m, x: -x.abs()), V),
    "branches": (lambda: of(lambda m, x: torch.cat([m.a(x), m.b(x), x], 1), a=nn.Linear(6, 2), b=nn.Tanh()), V),
    "stack": (lambda: of(lambda m, x: torch.stack([x, x.tanh()], -1).sum(-1)), V),
    "chunks": (lambda: of(lambda m, x: torch.cat([b := x.chunk(2, 1)[1], 2 * x.split([1, 3], 1)[1], b], 1)), I),
    "selects": (lambda: of(lambda m, x: x[:, 1:2] + x.select(1, -1).unsqueeze(1) + x[..., 0:1] + x.narrow(2, 3, 1)[:, :1]), I),
    "steps": (lambda: of(lambda m, x: x[:, :, ::2] + x.flip(2)[:, :, 1::2] + torch.roll(x, 3, 2)[:, :, ::2]), I),
    "shapes": (lambda: of(lambda m, x: x.view(x.size(0), 2, 2, -1).transpose(1, 3).permute(0, 2, 1, 3).reshape(len(x), -1)), I),
    "axes": (
        lambda: of(lambda m, x: x.unsqueeze(2).movedim(1, -1).squeeze(1).mT.contiguous().flatten(2).unflatten(2, (4, 8))),
        I,
    ),
    "means": (
        lambda: of(lambda m, x: x.mean((2, 3)) + x.mean(1).sum((1, 2), keepdim=True).squeeze(2) + x.amax((1, 3)).mean(1, True)),
        I,
    ),
    "smallest": (lambda: of(lambda m, x: x.amin(1) + x.amax(1)), S),
    "pools": (lambda: of(lambda m, x: F.max_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 4)), I),
    "one axis": (lambda: of(lambda m, x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 4)), S),
    "convolutions": (
        lambda: of(lambda m, x: F.conv2d(x, m.c.weight, m.c.bias, 2, 1) + m.c(x)[:, :, ::2, ::2], c=nn.Conv2d(4, 4, 3, 1, 1)),
        I,
    ),
    "transposed": (lambda: of(lambda m, x: F.conv_transpose2d(x, m.c.weight, None, 2, 1, 1), c=nn.ConvTranspose2d(4, 3, 3)), I),
    "paddings": (lambda: of(lambda m, x: F.pad(x, (1, 2, 0, 1), value=0.5) + F.pad(x, (1, 2, 1, 0), mode="circular")), I),
    "reflected": (lambda: of(lambda m, x: F.pad(x, (1, 2), mode="reflect") + F.pad(x, (3, 0), mode="replicate")), S),
    "upsampled": (lambda: of(lambda m, x: F.interpolate(x, scale_factor=2) + F.interpolate(x, (16, 16), mode="bilinear")), I),
    "statistics": (
        lambda: of(lambda m, x: F.batch_norm(x, m.n.running_mean, m.n.running_var, m.n.weight, None), n=nn.BatchNorm2d(4)),
        I,
    ),
    "of a sample": (
        lambda: of(lambda m, x: F.layer_norm(x, (9,), m.n.weight, m.n.bias) + F.group_norm(x, 2), n=nn.LayerNorm(9)),
        S,
    ),
    "clamps": (lambda: of(lambda m, x: x.clamp(-0.5, 0.25) + x.clamp(min=-1) + x.clamp_max(0.5) + F.relu6(x)), V),
    "activations": (
        lambda: of(lambda m, x: F.silu(x) + F.gelu(x) + F.elu(x, 0.5) + F.leaky_relu(x, 0.2) + F.mish(x) + F.selu(x)),
        V,
    ),
    "more of them": (
        lambda: of(lambda m, x: F.hardtanh(x) + F.hardswish(x) + F.softplus(x, 2.0, 60.0) + F.logsigmoid(x) + F.tanh(x)),
        V,
    ),
    "still more": (
        lambda: of(lambda m, x: F.prelu(x, m.p.weight) + F.softmax(x, 1) + F.celu(x) + F.softshrink(x), p=nn.PReLU(6)),
        V,
    ),
    "dropped": (
        lambda: of(lambda m, x: F.dropout(x, 0.5, m.training) + F.dropout2d(x, 0.5, m.training) + m.d(x), d=nn.Dropout()),
        I,
    ),
    "in place": (lambda: of(lambda m, x: F.relu_(x + 1).mul_(2.0).add_(x), r=nn.ReLU()), V),
    "layer twice": (lambda: of(lambda m, x: m.f(torch.tanh(m.f(x))), f=nn.Linear(6, 6)), V),
    "nested": (
        lambda: nn.Sequential(nn.Linear(6, 6), Map(lambda m, x: x + m.f(x), f=nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))),
        V,
    ),
    "pairs": (lambda: of(lambda m, x: x - m.f(x), f=GroupSort(2)), V),
    "block": (lambda: BasicBlock(4, 6, 2), I),
    "small resnet": (lambda: ResNet(2), (3, 8, 8)),
}  # fmt: skip
QUICK = {"residual", "block"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_recorded_model_computes_what_the_module_computes(name: str) -> None:
    make, shape = MODELS[name]
    model = randomized(make(), 4)
    program = extract(model, shape)
    x = 3 * torch.randn(4, *shape)
    with torch.no_grad():
        expected = model(x)
    assert (computed(program, x) - expected).abs().max() <= 1e-11 * (1 + expected.abs().max())


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "a product": (lambda: of(lambda m, x: x * x), V, "multiplied or divided, so the slope grows"),
    "an unknown operation": (lambda: of(lambda m, x: torch.exp(x)), V, r"the operation exp has no rule \(in test_exported.py:"),
    "control flow": (lambda: of(lambda m, x: x if x.sum() > 0 else -x), V, "could not be recorded"),
    "a number read": (lambda: of(lambda m, x: x * x.amax().item()), V, "reduces the batch"),
    "a mixed batch": (lambda: of(lambda m, x: x - x.mean(0)), V, "the batch"),
    "a shape that mixes it": (lambda: of(lambda m, x: x.reshape(6, -1).T), V, "the batch"),
    "items of a batch": (lambda: of(lambda m, x: x.flip(0)), V, "the batch"),
    "numbers per item": (lambda: of(lambda m, x: x + torch.arange(2.0)[:, None]), V, "differ between the items"),
    "random numbers": (lambda: of(lambda m, x: x + torch.rand(6)), V, "draws random numbers"),
    "dropout left on": (lambda: of(lambda m, x: F.dropout(x)), V, "drops entries at random"),
    "statistics of the batch": (lambda: of(lambda m, x: F.batch_norm(x, None, None, training=True)), I, "cannot be certified"),
    "two results": (lambda: of(lambda m, x: (x, x)), V, "one tensor"),  # pyright: ignore[reportArgumentType]
    "no result": (lambda: of(lambda m, x: torch.zeros(2, 6)), V, "one tensor"),
    "a buffer changed": (lambda: of(lambda m, x: x + m.n.running_mean.add_(1.0), n=nn.BatchNorm1d(6)), V, "two runs may differ"),
    "integers": (lambda: of(lambda m, x: x.long().to(x.dtype)), V, "step function"),
    "a layer in place": (lambda: of(lambda m, x: x + m.f(x), f=nn.Sequential(nn.ReLU(inplace=True))), V, "inplace=False"),
    "a layer without a rule": (lambda: of(lambda m, x: x[:, :3] + m.f(x), f=nn.GLU()), V, r"'f' \(GLU\) cannot be certified"),
    "a layer with two inputs": (lambda: of(lambda m, x: m.f(x, x), f=nn.Bilinear(6, 6, 6)), V, "multiplies its two inputs"),
    "a last state": (lambda: of(lambda m, x: m.f(x)[1][0], f=nn.RNN(9, 3, batch_first=True)), S, "the last states"),
}  # fmt: skip
QUICK_REFUSED = {"a product", "a mixed batch"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK_REFUSED else pytest.param(n, marks=pytest.mark.slow) for n in REFUSED]
)
def test_what_cannot_be_said_is_refused(name: str) -> None:
    make, shape, words = REFUSED[name]
    with pytest.raises(UncertifiableError, match=words):
        extract(make().eval(), shape)


@pytest.mark.slow
def test_a_hook_on_a_recorded_module_is_refused() -> None:
    model = ResNet(2).eval()
    model.get_submodule("layers.1.0").register_forward_hook(lambda *_: None)
    with pytest.raises(UncertifiableError, match=r"'layers.1.0' \(BasicBlock\) has a forward hook"):
        extract(model, (3, 8, 8))


def test_the_recorded_graph_of_a_chain_is_its_tree() -> None:
    """A chain wrapped into a module with a forward of its own gives the same operations and numbers."""
    model = randomized(
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), GroupSort(2), nn.Flatten(), nn.Linear(216, 3)), 5
    )
    wrapped = of(lambda m, x: m.f[4](m.f[3](m.f[2](m.f[1](m.f[0](x))))), f=nn.ModuleList(model.children())).eval()
    tree, recorded = extract(model, I), extract(wrapped, I)
    strip = [{k: v for k, v in node.items() if k not in {"weight", "bias"}} for node in tree.nodes]
    assert strip == [{k: v for k, v in node.items() if k not in {"weight", "bias"}} for node in recorded.nodes]
    assert {f"f.{name}" for name in tree.tensors} == set(recorded.tensors)
    assert all(torch.equal(value, recorded.tensors[f"f.{name}"]) for name, value in tree.tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_parametrized_weights_are_the_numbers_that_they_give(folded: bool) -> None:
    """Of a layer by its rule, and of a weight used directly by evaluating the parametrization."""
    layer = parametrizations.weight_norm(nn.Linear(6, 6))
    layer = stabilize(layer, 2.0) if folded else layer
    model = of(lambda m, x: F.linear(m.f(x), m.f.weight), f=layer).eval()
    program = extract(model, V)
    found = [program.tensors[node["weight"]] for node in program.nodes if node["op"] == "linear"]
    assert len(found) == 2
    assert all(torch.equal(weight, torch.as_tensor(layer.weight)) for weight in found)


@pytest.mark.slow
def test_the_model_is_left_as_it_is() -> None:
    model = ResNet(2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(part)) for name, part in model.named_modules()}
    extract(model, (3, 8, 8))
    assert all(part.training for part in model.modules())
    assert attributes == {name: set(vars(part)) for name, part in model.named_modules()}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with pytest.raises(UncertifiableError):
        extract(of(lambda m, x: m.f(x) * x, f=nn.Linear(6, 6)), V)
    assert "forward" not in vars(model.get_submodule("layers.0.0.conv1"))
