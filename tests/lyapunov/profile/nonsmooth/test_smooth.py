"""What is not known to be smooth is named, and takes every upper bound with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.lyapunov.profile.nonsmooth.clarke import clarke_bounds
from stableopt.lyapunov.profile.nonsmooth.smooth import Watch
from stableopt.nn.activations import GroupSort


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x + 0.0

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return 5.0 * grads[0]


def branch(z: Tensor) -> Tensor:
    return z if z.detach().sum().item() > 0 else -z


def written(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[..., 0] = z[..., 0].maximum(z[..., 1])
    return out * 2.0


def within_no_grad(z: Tensor) -> Tensor:
    with torch.no_grad():
        scale = z.exp()
    return z * scale


def out_of_sight(z: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return z * z.detach()


def hooked(z: Tensor) -> Tensor:
    y = z * 1.0
    y.register_hook(lambda g: 3.0 * g)
    return y


KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum": lambda z: torch.maximum(z, -z),
    "gt": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "ge": lambda z: z * (z >= 0),
    "lt": lambda z: z.masked_fill(z < 0, 0.0),
    "norm": lambda z: z.norm(dim=1, keepdim=True),
    "linalg_vector_norm": lambda z: torch.linalg.vector_norm(z, ord=1, dim=1),
    "amax": lambda z: torch.amax(z, 1),
    "max": lambda z: z.max(1).values,
    "median": lambda z: z.median(1).values,
    "sort": lambda z: z.sort(1).values,
    "fmax": lambda z: torch.fmax(z, -z),
    "cummax": lambda z: z.cummax(1).values,
    "topk": lambda z: z.topk(1).values,
    "clamp": lambda z: torch.clamp(z, min=torch.zeros(())),
    "std": lambda z: z.std(1),
    "normalize": lambda z: F.normalize(z, dim=1),
    "sign": lambda z: z * z.sign(),
    "round": lambda z: z.round() + z,
    "argmax": lambda z: z[:, z.argmax(1)],
    "item": branch,
    "cdist": lambda z: torch.cdist(z, torch.zeros_like(z)),
    "hardswish": F.hardswish,
    "rnn_relu": lambda z: torch.ops.aten.relu(z),
    "detach": lambda z: z * z.detach(),
    "data": lambda z: z * z.data,
    "detach out of sight": out_of_sight,
    "abs of complex numbers": lambda z: torch.complex(z, z).abs(),
    "gumbel": lambda z: F.gumbel_softmax(z, hard=True),
    "checkpoint": lambda z: torch.utils.checkpoint.checkpoint(torch.sort, z, use_reentrant=False)[0],
    "tolist": lambda z: z * (z.detach().tolist()[0][0] + 1.0),
    "exp": within_no_grad,
    "register_hook": hooked,
    "mul": lambda z: Straight.apply(z) * z,  # pyright: ignore[reportOperatorIssue]
    "maximum written": written,
    "div": lambda z: torch.div(z, 2.0, rounding_mode="floor") + z,
    "long": lambda z: z * z.long(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", KINKED)
def test_what_is_not_known_to_be_smooth_has_no_upper_bound(name: str, dtype: torch.dtype) -> None:
    """Also with relu after it, which is opened."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        for function in (KINKED[name], lambda z: F.relu(KINKED[name](z))):
            reading = clarke_bounds(Calls(function), torch.zeros(1, 2, dtype=dtype))
            assert reading.left
            assert reading.exact == (False,)
            assert not reading.proved
            ends = (reading.worst.upper, reading.interval[0], reading.entrywise[0], reading.product[0])
            assert all(end == math.inf for end in ends)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize(
    "name",
    ["maximum", "gt", "ge", "amax", "max", "sort", "fmax", "normalize", "detach", "data", "tolist", "register_hook"],
)
def test_names_are_those_of_the_functions_that_are_called(name: str) -> None:
    assert name in clarke_bounds(Calls(KINKED[name]), torch.zeros(1, 2)).left


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda z: F.scaled_dot_product_attention(z[None], z[None], z[None])[0],
    "layer norm": lambda z: F.layer_norm(z, (2,)),
    "root mean square": lambda z: z / (z.square().mean(1, keepdim=True) + 1e-3).sqrt(),
    "norm away from zero": lambda z: (1.0 + z).norm(dim=1),
    "mask": lambda z: z.masked_fill(torch.tensor([True, False]), 0.0),
    "where": lambda z: torch.where(torch.tensor([True, False]), z, -z),
    "celu": lambda z: F.celu(z, 2.0),
    "power": lambda z: z**3 + 2.0**z,
    "gelu": lambda z: F.gelu(z) + F.silu(z) + F.mish(z) + F.softplus(z) + F.logsigmoid(z),
    "written": lambda z: torch.zeros(1, 3).index_copy(1, torch.tensor([0]), torch.zeros(1, 1)) * z.sum(),
    "shapes": lambda z: torch.cat([z.T.reshape(1, 2), z.flip(1), z[:, :1].expand(1, 2)]).unbind(0)[1],
    "einsum": lambda z: torch.einsum("bi,bj->bij", z, z).flatten(1),
    "made of the shape": lambda z: z + torch.zeros_like(z).abs() + torch.arange(z.shape[1]),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_smooth_has_its_derivative(name: str) -> None:
    x = torch.tensor([[0.3, -0.2]])
    reading = clarke_bounds(Calls(SMOOTH[name]), x)
    assert reading.left == ()
    assert reading.exact == (True,)
    J = torch.autograd.functional.jacobian(SMOOTH[name], x).reshape(-1, 2)
    assert reading.worst.upper == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_modules_with_gates_are_smooth_and_those_with_relu_are_not(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for cell, known in (
        (nn.LSTM, True),
        (nn.GRU, True),
        (nn.RNN, True),
        (lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), False),
    ):
        torch.manual_seed(0)
        cell = cell(2, 2, batch_first=True).to(dtype)
        assert (clarke_bounds(Calls(lambda z, cell=cell: cell(z)[0]), x).left == ()) is known


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (lambda z: torch.clamp(z, min=0.0), 0.0, 1.0),
        (lambda z: z.clamp_max(0.0), 0.0, 1.0),
        (lambda z: z.clip(-1.0, 0.0), 0.0, 1.0),
        (lambda z: z.clamp_min(-1.0), 1.0, 1.0),
        (torch.abs, -1.0, 1.0),
    ],
)
def test_clamps_by_numbers_are_opened(function: Callable[[Tensor], Tensor], low: float, high: float) -> None:
    reading = clarke_bounds(Calls(function), torch.zeros(1, 1))
    assert reading.left == ()
    (_, lower, upper) = reading.slopes[""]
    assert (lower.item(), upper.item()) == (low, high)


def test_a_root_is_smooth_beyond_the_reach_only() -> None:
    x = torch.tensor([[0.1, 1.0]])
    model = Calls(lambda z: (z * z).sqrt())
    assert clarke_bounds(model, x).left == ()
    assert clarke_bounds(model, x, reach=0.2).left == ("sqrt",)


def test_what_works_in_place_is_seen_by_all_that_hold_it() -> None:
    def function(z: Tensor) -> Tensor:
        y = z * 2.0
        F.relu_(y)
        return y

    reading = clarke_bounds(Calls(function), torch.tensor([[0.0, -1.0]]))
    assert reading.left == ()
    assert 2.0 in reading.worst
    assert reading.undecided.tolist() == [1]


def test_what_changes_a_derivative_on_its_way_back_is_named() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh())
    assert clarke_bounds(model, torch.zeros(1, 1)).left == ()
    model[0].register_full_backward_hook(lambda _module, grads, _outputs: (5.0 * grads[0],))
    reading = clarke_bounds(model, torch.zeros(1, 1))
    assert "backward hook" in reading.left
    assert reading.worst.upper == math.inf


class Kinky(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 torch's name
        return super().forward(input).maximum(torch.zeros(()))


@pytest.mark.parametrize("of", ["class", "instance"])
def test_a_layer_of_a_known_class_that_computes_something_else_is_no_chain(of: str) -> None:
    layer = Kinky(1, 2) if of == "class" else nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    if of == "instance":
        layer.forward = lambda x: F.linear(x, layer.weight, layer.bias).maximum(torch.zeros(()))
    reading = clarke_bounds(nn.Sequential(layer), torch.zeros(1, 1), reach=10.0)
    assert (reading.proved, reading.exact, "maximum" in reading.left) == (False, (False,), True)


def test_a_hook_that_replaces_an_output_makes_no_chain() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        [p.fill_(1.0) for p in model.parameters()]
    model[0].register_forward_hook(lambda _module, _args, output: torch.maximum(output, torch.zeros(())))
    reading = clarke_bounds(model, torch.zeros(1, 1), reach=10.0)
    assert (reading.proved, reading.exact, "maximum" in reading.left) == (False, (False,), True)


def test_chains_stay_proved_and_modules_with_kinks_of_their_own_are_named() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(2, 2), GroupSort(2), nn.Linear(2, 1))
    assert clarke_bounds(chain, torch.zeros(1, 2)).proved
    other = clarke_bounds(nn.Sequential(chain, Calls(lambda z: z * 1.0)), torch.zeros(1, 2))
    assert "GroupSort" in other.left
    assert other.worst.upper == math.inf


@pytest.mark.parametrize("function", [lambda z: (z * z).sqrt(), lambda z: (z * z) ** 0.5])
def test_a_derivative_that_is_no_number_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UncertifiableError, match="no set of derivatives"):
        clarke_bounds(Calls(function), torch.zeros(1, 2))


def test_what_does_not_come_from_the_source_is_not_looked_at() -> None:
    z, other = torch.ones(2), torch.ones(2)
    with Watch(z, 0.0) as watch:
        _ = (other > 0) * z, other.abs(), other.sort()
        view = z[:1]
        _ = view.exp().abs()
    assert watch.left == ["abs"]
    assert watch.follows(view)
    assert not watch.follows(other)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), (1, 2, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.GroupNorm(1, 2), nn.AvgPool2d(2), nn.Flatten()
        ),
        (2, 1, 4, 4),
    ),
    "norms": (lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.ReLU(), nn.LayerNorm(4), nn.Softmax(1)), (1, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_day_have_bounds(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    reading = clarke_bounds(make().eval().float(), torch.randn(shape, dtype=torch.float32), reach=1e-3)
    assert reading.left == ()
    assert all(reading.exact)
    assert reading.worst.upper < 100.0
