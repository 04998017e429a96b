"""Certificates of models that somebody else wrote: what is read, and what is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import stableopt
from stableopt.errors import UncertifiableError


class Mapped(nn.Module):
    """A module whose forward is a function of it and its input."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Block(nn.Module):
    """As in every residual network of images: batch normalization, in-place sums, and a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = down if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet() -> nn.Module:
    return Mapped(
        lambda m, x: m.fc(torch.flatten(m.blocks(m.stem(x)).mean((2, 3)), 1)),
        stem=nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
        blocks=nn.Sequential(Block(4, 4, 1), Block(4, 8, 2)),
        fc=nn.Linear(8, 3),
    )


def unet() -> nn.Module:
    return Mapped(
        lambda m, x: m.out(torch.cat([F.relu(m.up(F.relu(m.down(x)))), x], 1)),
        down=nn.Conv2d(1, 4, 3, 2, 1),
        up=nn.ConvTranspose2d(4, 4, 2, 2),
        out=nn.Conv2d(5, 1, 3, padding=1),
    )


def densenet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        found = [x]
        for bn, conv in ((m.bn1, m.conv1), (m.bn2, m.conv2)):
            found.append(conv(F.relu(bn(torch.cat(found, 1)))))
        return m.fc(torch.cat(found, 1).mean((2, 3)))

    parts = {f"conv{i}": nn.Conv2d(2 * i - 1, 2, 3, padding=1) for i in (1, 2)}
    return Mapped(forward, **parts, bn1=nn.BatchNorm2d(1), bn2=nn.BatchNorm2d(3), fc=nn.Linear(5, 3))


def mobilenet() -> nn.Module:
    return Mapped(
        lambda m, x: x + m.narrow(m.act(m.depth(m.act(m.bn(m.wide(x)))))),
        wide=nn.Conv2d(1, 4, 1, bias=False), bn=nn.BatchNorm2d(4), depth=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        narrow=nn.Conv2d(4, 1, 1), act=nn.ReLU6(),
    )  # fmt: skip


@pytest.mark.parametrize("make", [resnet, unet, densenet, mobilenet])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_models_of_images_are_read_in_every_dtype(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make()
    model(torch.randn(8, 1, 8, 8))  # the statistics of the batch normalizations
    model.to(dtype)
    cert = stableopt.certify(model, (1, 8, 8))
    x = torch.randn(3, 1, 8, 8).to(dtype)
    output = cert.module()(x)
    assert output.dtype == dtype
    wanted = copy.deepcopy(model).eval().double()(x.double()).detach()
    assert float((output.double() - wanted).abs().max()) <= 16 * torch.finfo(dtype).eps * float(wanted.abs().max())


def tied_parameter() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def tied_layer() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize("make", [tied_parameter, tied_layer])
def test_tied_weights_are_certified_and_stay_tied(make: Callable[[], nn.Sequential]) -> None:
    model, x = make(), torch.randn(3, 4)
    before = model[0].weight.clone()
    cert = stableopt.certify(model, (4,))
    torch.testing.assert_close(cert.module()(x), model(x))
    assert cert.lipschitz == pytest.approx(float(torch.linalg.matrix_norm(before.detach(), 2)) ** 2)
    assert torch.equal(model[0].weight, before)
    assert model[2].weight is model[0].weight
    assert stableopt.certify(model, (4,), lipschitz=0.1).lipschitz <= 0.1


def test_a_graph_module_is_read() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert [node["op"] for node in stableopt.certify(model, (4,)).program.nodes] == ["linear", "activation"]


@dataclass
class ModelOutput:
    """What the models of some libraries give."""

    logits: Tensor


def linear(function: Callable[[Tensor], Any]) -> nn.Module:
    return Mapped(lambda m, x: function(m.l(x)), l=nn.Linear(4, 3))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: linear(lambda y: {"logits": y}), "one tensor, not dict.*such as the logits"),
    (lambda: linear(lambda y: (y, None)), "one tensor, not tuple"),
    (lambda: linear(ModelOutput), "one tensor, not ModelOutput"),
    (lambda: linear(lambda y: y if y.sum() > 0 else -y), "no control flow that depends on the numbers"),
    (lambda: linear(lambda y: y * float(y.sum())), "no control flow that depends on the numbers"),
    (lambda: linear(lambda y: y.sum(1)), "leaves no dimension beside the batch; pass keepdim=True"),
    (lambda: linear(lambda y: F.dropout(y, 0.5, training=True)), "drops entries at random"),
    (lambda: linear(lambda y: y + torch.randn_like(y)), "randn_like has no rule"),
    (lambda: Mapped(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)), "dot-product attention.*ClippedAttention"),
    (lambda: torch.jit.script(nn.Linear(4, 3)), "it is compiled, so its operations cannot be read"),
    (lambda: stableopt.certify(nn.ReLU(), (4,)).module(), "Use the certificate that it comes from"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_what_cannot_be_read_is_refused_in_a_sentence(
    make: Callable[[], nn.Module], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UncertifiableError, match=rf"(?s)cannot be certified: .*{words}") as info:
        stableopt.certify(make(), (4,))
    assert "\n" not in str(info.value)
    assert "please report" not in str(info.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")  # of torch itself
def test_a_compiled_model_is_refused_with_the_name_of_what_it_was_made_from() -> None:
    with pytest.raises(UncertifiableError, match=r"it is compiled\. Certify the module.*model\._orig_mod"):
        stableopt.certify(torch.compile(nn.Linear(4, 3)), (4,))


@pytest.mark.parametrize(
    "model", [None, "model.pt", nn.ReLU, nn.ReLU().state_dict(), torch.relu], ids=lambda model: type(model).__name__
)
def test_what_is_no_module_is_a_type_error(model: Any) -> None:
    with pytest.raises(TypeError, match=r"the model must be a torch\.nn\.Module, got"):
        stableopt.certify(model, (4,))


@pytest.mark.parametrize("lipschitz", [0, -1.0, float("nan"), float("inf"), "1", True, [1.0], torch.ones(2)], ids=repr)
def test_a_limit_that_is_no_positive_number_is_refused(lipschitz: Any) -> None:
    with pytest.raises(ValueError, match="lipschitz must be a positive finite number, got"):
        stableopt.certify(nn.Linear(4, 3), (4,), lipschitz=lipschitz)


@pytest.mark.parametrize("norm", ["l1", 2, ["l2"], None], ids=repr)
def test_a_norm_that_is_not_known_is_refused(norm: Any) -> None:
    with pytest.raises(ValueError, match="norm must be 'l2', 'linf' or 'token_max', got"):
        stableopt.certify(nn.Linear(4, 3), (4,), norm=norm)


def recurrent() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 0.3 * torch.tanh(m.l(x))
        return x

    return Mapped(forward, l=nn.Linear(4, 4))


@pytest.mark.parametrize(("make", "shape", "targets"), [(recurrent, (4,), (1.01, 1.5)), (unet, (1, 8, 8), (0.5,))])
def test_a_model_with_branches_reaches_its_limit_closely(
    make: Callable[[], nn.Module], shape: tuple[int, ...], targets: tuple[float, ...]
) -> None:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    for target in targets:
        found = stableopt.certify(model, shape, lipschitz=target).lipschitz
        assert target * (1 - 1e-3) <= found <= target
    free = stableopt.certify(model, shape)
    assert stableopt.certify(model, shape, lipschitz=2 * free.lipschitz).lipschitz == free.lipschitz


@pytest.mark.parametrize("target", [0.5, 1.0])
def test_a_limit_below_that_of_a_shortcut_is_refused_with_the_reason(target: float) -> None:
    with pytest.raises(UncertifiableError, match=r"with all of them at 0 it is 1\.0.*identity of a residual sum"):
        stableopt.certify(recurrent(), (4,), lipschitz=target)


def test_means_over_all_dimensions_keep_one() -> None:
    model, x = Mapped(lambda m, x: x - x.mean((1, 2), keepdim=True)), torch.randn(5, 3, 4)
    torch.testing.assert_close(stableopt.certify(model, (3, 4)).module()(x), model(x))
