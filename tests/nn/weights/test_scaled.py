"""Laws of the method that trains with an estimate, where its weight need not be made: derivatives, readers, graphs, histories."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.lyapunov import Every, Monitor
from stableopt.nn import export, lipschitz, norm_gap, plain_state_dict, release, stabilize
from tests.nn.zoo import ANIMALS

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 5), (6, 3)),
    "linear without bias": (lambda: nn.Linear(4, 2, bias=False), (2, 3, 4)),
    "conv": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 6)),
    "grouped, strided": (lambda: nn.Conv2d(4, 4, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 2, 3), (2, 3, 5)),
}


def estimated(name: str = "linear", factor: float = 10.0) -> tuple[nn.Module, Tensor, nn.Parameter]:
    """A layer that is shrunk by a factor, with settled vectors, an input, and the original."""
    make, shape = LAYERS[name]
    layer, x = stabilize(make(), 1.0, method="power"), torch.randn(shape)
    original: Any = layer.parametrizations["weight"].original  # type: ignore[union-attr, index]
    with torch.no_grad():
        original.mul_(factor)
        for _ in range(300):
            layer(x)
    return layer, x, original


def norm(W: Tensor) -> float:
    return float(torch.linalg.matrix_norm(W.detach().double(), 2))


every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@pytest.mark.parametrize("factor", [10.0, 0.3])
def test_the_derivative_is_that_of_the_quotient(name: str, factor: float) -> None:
    """Against central differences of the layer itself, whose vectors have settled."""
    layer, x, original = estimated(name, factor)
    direction, h = torch.randn_like(original), 1e-4
    layer(x).sin().sum().backward()
    along = float((original.grad * direction).sum())  # type: ignore[operator]
    values = []
    for sign in (1.0, -1.0):
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            moved.parametrizations["weight"].original.add_(direction, alpha=sign * h)  # type: ignore[union-attr, index]
            for _ in range(300):
                y = moved(x)
        values.append(float(y.sin().sum()))
    assert along == pytest.approx((values[0] - values[1]) / (2 * h), rel=0.02, abs=0.02 * float(original.grad.norm()))  # type: ignore[union-attr]


@every_layer
def test_a_function_of_the_direction_alone_has_a_homogeneous_gradient(name: str) -> None:
    """For f(V / sigma(V)) Euler's identity gives <grad, V> = 0 and H V = -grad, for vectors that are constant."""
    layer, x, original = estimated(name)
    y = layer(x).tanh().square().sum()
    (g,) = torch.autograd.grad(y, original, create_graph=True)
    assert abs(float((g * original).detach().sum())) <= 1e-10 * float((g.norm() * original.norm()).detach())
    (hv,) = torch.autograd.grad((g * original.detach()).sum(), original)
    torch.testing.assert_close(hv, -g.detach(), rtol=1e-9, atol=1e-9)


def test_the_product_is_that_of_the_weight() -> None:
    layer, x, original = estimated()
    twin = copy.deepcopy(layer)
    bias: Any = layer.bias
    y = layer(x)
    z = F.linear(x, twin.weight, twin.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(y, z, rtol=1e-13, atol=1e-13)
    gy = torch.autograd.grad(y.sin().sum(), [original, bias])
    gz = torch.autograd.grad(z.sin().sum(), [twin.parametrizations["weight"].original, twin.bias])  # type: ignore[union-attr, index]
    torch.testing.assert_close(gy, gz, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3), (2, 2, 3)])
def test_inputs_of_every_shape(shape: tuple[int, ...]) -> None:
    layer, _, original = estimated()
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert original.grad is not None
    with pytest.raises(RuntimeError):
        layer(torch.randn(0, 7))


def test_a_weight_that_was_read_is_a_snapshot_in_the_mode_of_its_reading() -> None:
    layer, x, original = estimated()
    with torch.no_grad():
        silent = layer.weight
    loud: Any = layer.weight
    with torch.no_grad():
        loud.norm()
    assert loud.requires_grad
    assert not silent.requires_grad  # type: ignore[union-attr]
    (g,) = torch.autograd.grad((loud * silent).sum(), original)  # type: ignore[operator]
    (h,) = torch.autograd.grad((layer.weight * silent.clone()).sum(), original)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-10)
    before = loud.detach().clone()
    original.data.mul_(7.0)
    torch.testing.assert_close(loud.detach(), before, rtol=0, atol=0)
    assert F.linear(x, layer.weight).requires_grad  # type: ignore[arg-type]


@every_layer
def test_activations_may_be_computed_again(name: str) -> None:
    """The recomputation saves what the first map saved, whatever was decided in between."""
    from torch.utils.checkpoint import checkpoint

    for factor in (10.0, 1.0):  # at the limit, the decision may fall either way
        layer, x, original = estimated(name, factor)
        for step in range(5):
            checkpoint(layer, x, use_reentrant=False).square().sum().backward()  # type: ignore[union-attr]
            with torch.no_grad():
                original.add_(torch.randn_like(original), alpha=0.3 / (1 + step))
        assert original.grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")  # torch's own derivatives
def test_batched_and_forward_derivatives_and_autocast() -> None:
    from torch.autograd import forward_ad

    layer, x, original = estimated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        J = torch.autograd.functional.jacobian(layer, x[0], vectorize=True)
    torch.testing.assert_close(J, torch.autograd.functional.jacobian(layer, x[0]), rtol=1e-6, atol=1e-8)
    y = layer(x)
    basis = torch.eye(5)[:, None].expand(5, 6, 5).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (batched,) = torch.autograd.grad(y, original, basis, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, original, one, retain_graph=True)[0] for one in basis]
    torch.testing.assert_close(batched, torch.stack(each))
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ export(layer).weight.T, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr, operator]
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            z = single(x.float())
        z.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in single.parameters())


def test_what_evaluation_keeps_follows_the_radius_and_the_assignment() -> None:
    layer, _, _ = estimated()
    layer.eval().requires_grad_(False)
    limit: Any = layer.parametrizations["weight"][0]  # type: ignore[union-attr, index]
    for radius in (1.0, 0.25, 2.0):
        limit.radius = radius
        assert norm(layer.weight) == pytest.approx(radius, rel=1e-6)  # type: ignore[arg-type]
        assert norm(layer.weight) <= radius  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["power", "gram"])
def test_a_weight_that_is_assigned_is_copied(method: str) -> None:
    a, b = (stabilize(nn.Linear(3, 5), 1.0, method=method).eval() for _ in "ab")
    with torch.no_grad():
        b.weight = a.weight
        b.parametrizations["weight"].original.data.mul_(100.0)  # type: ignore[union-attr, index]
        assert norm(a.weight) <= 1.0  # type: ignore[arg-type]
    mine = torch.randn(5, 3)
    b.weight = mine
    mine.mul_(0.0)
    assert norm(b.weight) > 0.1  # type: ignore[arg-type]
    b.weight = nn.Parameter(3.0 * torch.ones(5, 3))
    assert 0.99 < norm(b.weight) <= 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["power", "gram"])
def test_no_view_of_a_kept_weight_can_be_written_through(method: str) -> None:
    layer = stabilize(nn.Linear(3, 5), 1.0, method=method).eval().requires_grad_(False)
    weight: Any = layer.weight
    before = weight.clone()
    layer.weight.data.view(-1).mul_(3.0)  # type: ignore[union-attr, operator]
    layer.weight.data[0].mul_(3.0)  # type: ignore[union-attr]
    weight.numpy()[:] = 7.0
    torch.from_dlpack(weight)[:] = 7.0
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0)
    torch.testing.assert_close(layer(torch.eye(3)) - layer.bias, before.T)  # type: ignore[operator]


WRITES: list[Callable[[Any], object]] = [
    lambda layer: nn.init.constant_(layer.weight, 0.0),
    lambda layer: nn.init.kaiming_uniform_(layer.weight),
    lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    lambda layer: F.relu(layer.weight, inplace=True),
]


@pytest.mark.parametrize("write", WRITES)
def test_58_writes_that_come_as_keywords_or_lists_are_refused(write: Callable[[Any], object]) -> None:
    with pytest.raises(RuntimeError, match="writing into it would have no effect"):
        write(stabilize(nn.Linear(3, 5), 1.0, method="gram"))


# ---------------------------------------------------------------------------------------------------------------------- graphs


@every_layer
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_evaluates_with_the_proof(name: str, backend: str) -> None:
    torch._dynamo.reset()
    layer, x, original = estimated(name)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled(x)
        layer.eval()
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)
                original.mul_(3.0).add_(0.1 * torch.randn_like(original))
        grads = [torch.autograd.grad(f(x).sin().sum(), original)[0] for f in (compiled, layer)]
    # of a kernel several frequencies can be as good, and rounding decides
    near = {"rtol": 1e-8, "atol": 1e-10} if "linear" in name else {"rtol": 0.01, "atol": 1e-4}
    torch.testing.assert_close(grads[0], grads[1], **near)  # type: ignore[arg-type]


def test_equal_layers_share_a_graph() -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="eager")
    for _ in range(12):
        layer = stabilize(nn.Linear(3, 5), 1.0, method="power").eval()
        with torch.no_grad():
            torch.testing.assert_close(run(layer, torch.eye(3)), layer(torch.eye(3)))


@pytest.mark.slow
def test_a_graph_that_is_loaded_elsewhere_keeps_its_own_limit(tmp_path: Path) -> None:
    layer, x, _ = estimated()
    torch.export.save(torch.export.export(layer.eval(), (x,)), tmp_path / "layer.pt2")
    script = f"""
import torch
from torch import nn
from stableopt.nn import stabilize
torch.set_default_dtype(torch.float64)
other = stabilize(nn.Linear(3, 5), 50.0, method="power").eval()
other(torch.eye(3))
run = torch.export.load({str(tmp_path / "layer.pt2")!r}).module()
W = run(torch.cat([torch.eye(3), torch.zeros(3, 3)]))
W = (W[:3] - W[3:]).T
print(float(torch.linalg.matrix_norm(W.detach(), 2)))
"""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, text=True)
    assert 0.999 < float(found.stdout) <= 1.0 + 1e-12


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")  # torch's own derivatives
def test_69_transforms_in_evaluation_need_no_history(name: str) -> None:
    from torch.func import functional_call, grad, jacrev, vmap

    layer, x, original = estimated(name)
    layer.eval()
    fresh = copy.deepcopy(layer)  # without a kept weight
    J = jacrev(fresh)(x)
    torch.testing.assert_close(J, torch.autograd.functional.jacobian(layer, x))
    params = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(copy.deepcopy(layer), p, (x,)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x[:, None])
    layer(x).square().sum().backward()
    torch.testing.assert_close(each["parametrizations.weight.original"].sum(0), original.grad)
    with pytest.raises(RuntimeError, match="vmap over the weights"):
        vmap(lambda p: functional_call(layer, p, (x,)))({key: torch.stack([p, p]) for key, p in params.items()})


# ---------------------------------------------------------------------------------------------------------------- whole models


def test_a_diverged_weight_is_recorded_and_stops_nothing() -> None:
    layer, x, _ = estimated()
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    with Monitor(layer, opt, every=Every(layers=1), max_overhead=None, policy="observe") as monitor:
        for factor in (1.0, float("nan"), 1.0):

            def closure(factor: float = factor) -> Tensor:
                opt.zero_grad()
                loss = layer(x).sum() * factor
                loss.backward()
                return loss

            opt.step(closure)
    assert monitor.last is not None
    assert monitor.last.verdict == "nonfinite"


def test_the_gap_covers_training_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    layer = stabilize(nn.Linear(64, 64, bias=False), 1.0, method="power")
    V: Any = layer.parametrizations["weight"].original  # type: ignore[union-attr, index]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(50):
        compiled(torch.eye(64))
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(V)
        V.add_(4.0 * S[0] * torch.outer(U[:, 32], Vh[32]))
    gap = norm_gap(layer)
    assert norm(compiled(torch.eye(64))) <= gap * (1 + 1e-9)  # type: ignore[operator]


def test_releasing_in_training_gives_the_weights_of_evaluation() -> None:
    model = stabilize(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)), 1.0, method="power")
    x = torch.randn(4, 6)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    expected = copy.deepcopy(model).eval()(x)
    state = plain_state_dict(model)
    assert model.training
    torch.testing.assert_close(release(model)(x), expected, rtol=0, atol=0)
    assert lipschitz(model).upper <= 1.0
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_a_plain_checkpoint_is_assigned_to_a_model_without_numbers() -> None:
    with torch.device("meta"):
        empty = stabilize(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), 1.0, method="power")
    assert len(dict(empty.named_buffers())) == 4  # each layer has its own
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="loaded plain weights"):
        empty.load_state_dict(plain.state_dict(), assign=True)
    empty(torch.ones(1, 3)).sum().backward()
    assert lipschitz(empty).upper <= 1.0


@pytest.mark.parametrize("name", ANIMALS)
def test_every_kind_of_weight_with_the_default_method(name: str, tmp_path: Path) -> None:
    """What the other tests ask of the bounds that hold in training as well, for the method that does not."""
    animal = ANIMALS[name]
    model, x = animal.estimated(0.7), animal.x()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        opt.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        opt.step()
    from stableopt.nn.limits import limited_slots

    slots = list(limited_slots(model))
    assert len(slots) == len(animal.parts)
    for slot, limit in slots:
        assert norm_gap(slot.module, slot.name) < 1.2  # type: ignore[operator]
        assert limit.radius == 0.7
    fresh = animal.estimated(0.7)
    fresh.load_state_dict(model.state_dict())
    for one in (model.eval(), fresh.eval()):
        for slot, limit in limited_slots(one):
            for part in slot.matrices(slot.value):
                assert slot.geometry.proved(part, slot.matrix_norm(limit.norm)).upper <= 0.7
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(export(model)(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)
    half = copy.deepcopy(model).bfloat16()
    for slot, limit in limited_slots(half):
        for part in slot.matrices(slot.value):
            assert slot.geometry.proved(part, slot.matrix_norm(limit.norm)).upper <= 0.7


def test_a_cached_region_sees_every_write() -> None:
    model = stabilize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), 1.0, budget="learned", method="gram").eval()
    budget: Any = model[0].parametrizations.weight[0].shared  # type: ignore[index, union-attr]
    with P.cached(), torch.no_grad():
        _ = model[1].weight  # type: ignore[index]
        budget.shares.copy_(torch.tensor([0.5, -0.5]))
        assert norm(model[0].weight) * norm(model[1].weight) <= 1.0  # type: ignore[index, arg-type]
        before = model[0].weight.clone()  # type: ignore[index, operator]
        original: Any = model[0].parametrizations.weight.original  # type: ignore[index, union-attr]
        original.data.copy_(original.flip(0))  # the same numbers in another order
        assert not torch.equal(model[0].weight, before)  # type: ignore[index, arg-type]
        original.data.mul_(0.1)
        assert norm(model[0].weight) < 0.2  # type: ignore[index, arg-type]
