"""Products with the Hessian, each way of making them against the Hessian itself, and the order in which they are tried."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import weight_norm

from stableopt.nn import Sandwich
from stableopt.optim.curvature import (
    Choice,
    Curvature,
    Difference,
    Exact,
    Forward,
    Graph,
    acceptable_asymmetry,
    asymmetry,
    dot,
    no_second_derivative,
)
from stableopt.optim.modules import buffers_put_back
from stableopt.optim.sharpness import Sharpness
from tests.optim.test_sharpness import NoSecond, attention_loss, everything, full_hessian, problem, same


def graph_of(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Graph:
    return Graph(loss(), parameters)


WAYS: dict[str, Callable[[Callable[[], Tensor], list[Tensor]], Curvature]] = {
    "graph": graph_of,
    "exact": Exact,
    "forward": Forward,
    "difference": Difference,
}
every_way = pytest.mark.parametrize("way", WAYS)


class Swirl(torch.autograd.Function):
    """A backward that is no gradient of anything: the field w -> (w2, -w1)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].flip(0) * torch.tensor([1.0, -1.0])


class Recurrent(nn.Module):
    """A network whose weights are packed in a list beside the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(3, 2),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm and dropout": (convolutions, (12, 1, 5, 5)),
    "lstm": (Recurrent, (12, 4, 3)),
    "sandwich": (lambda: nn.Sequential(Sandwich(3, 4), nn.Tanh(), nn.Linear(4, 2)), (12, 3)),
}


@every_way
def test_a_product_is_that_of_the_hessian(way: str) -> None:
    model, loss = problem()
    parameters = list(model.parameters())
    H = full_hessian(loss, parameters)
    with WAYS[way](loss, parameters) as product:
        for _ in range(3):
            v = [torch.randn_like(p) for p in parameters]
            Hv = torch.cat([h.flatten() for h in product(v)])
            torch.testing.assert_close(Hv, H @ torch.cat([x.flatten() for x in v]), rtol=1e-6, atol=1e-8)
        assert (product.count, product.name) == (3, way)
        assert all(not h.any() for h in product([torch.zeros_like(p) for p in parameters]))
        assert dot(v, [2 * x for x in v]) == pytest.approx(2 * sum(float(x.square().sum()) for x in v))


@pytest.mark.parametrize("network", NETWORKS)
def test_all_ways_agree_and_none_leaves_a_trace(network: str) -> None:
    make, shape = NETWORKS[network]
    model, x, y = make(), torch.randn(shape), torch.randint(2, shape[:1])
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    start = torch.get_rng_state()
    with buffers_put_back(loss):
        pending = loss()
    torch.set_rng_state(start)
    before, versions = everything(model, optimizer), [p._version for p in parameters]
    v = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    products = {}
    for way, kind in WAYS.items():
        opened = Graph(pending, parameters) if way == "graph" else kind(loss, parameters)
        with opened as product:
            products[way] = product(v)
        assert same(before, everything(model, optimizer)), way
        assert [p._version for p in parameters] == versions, way
        assert all(p.grad is None for p in parameters), way
    for way in WAYS:
        if (network, way) != ("sandwich", "forward"):
            torch.testing.assert_close(products[way], products["exact"], rtol=1e-5, atol=1e-7)


@every_way
def test_a_product_that_fails_leaves_no_trace(way: str) -> None:
    """The second gradient fails, wherever it is made."""
    w, norm, calls = nn.Parameter(torch.randn(4, 1)), nn.BatchNorm1d(1), []

    class Ends(torch.autograd.Function):
        """Nothing of it can be differentiated."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            calls.append(torch.rand(1))
            if way == "difference" and len(calls) == 2:
                raise KeyboardInterrupt
            return x.clone()

        @staticmethod
        def jvp(ctx: Any, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise KeyboardInterrupt

    class Once(torch.autograd.Function):
        """What can be differentiated once."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def jvp(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return Ends.apply(g)  # type: ignore[return-value]

    def loss() -> Tensor:
        return Once.apply(norm(w)).pow(3).sum()  # type: ignore[union-attr]

    buffers = copy.deepcopy(norm.state_dict())
    with buffers_put_back(loss):
        opened = WAYS[way](loss, [w])
    before, bits = torch.get_rng_state(), w.detach().clone()
    with pytest.raises(KeyboardInterrupt), opened as product:
        product([torch.ones_like(w)])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(w, bits)
    assert w._version == 0
    assert w.grad is None
    assert same(buffers, norm.state_dict())
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(w).tangent is None


def test_a_graph_that_is_handed_over_stays_good_and_no_gradient_is_accumulated() -> None:
    model, loss = problem()
    parameters, accumulated = list(model.parameters()), []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda _: accumulated.append(1))
    pending = loss()
    expected = torch.autograd.grad(loss(), parameters)
    v = [torch.randn_like(p) for p in parameters]
    with Graph(pending, parameters) as product:
        first = product(v)
        assert all(torch.equal(a, b) for a, b in zip(first, product(v), strict=True))
    assert accumulated == []
    pending.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))  # type: ignore[arg-type]
    assert len(accumulated) == len(parameters)


def test_a_graph_that_recomputes_its_layers_does_not_move_their_statistics() -> None:
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh())
    x = torch.randn(8, 3)
    pending: Any = checkpoint(block, x, use_reentrant=False)
    before = everything(block, torch.optim.SGD(block.parameters()))
    with Graph(pending.square().mean(), list(block.parameters())) as product:
        product([torch.ones_like(p) for p in block.parameters()])
    assert same(before, everything(block, torch.optim.SGD(block.parameters())))


def test_the_first_way_that_works_is_taken_and_what_it_took_is_said() -> None:
    model, loss = problem()
    parameters, choice = list(model.parameters()), Choice(loss)

    def name(product: Curvature) -> str:
        product([torch.ones_like(p) for p in parameters])
        return product.name

    pending = loss()
    assert (choice.run(parameters, name, pending), choice.reason) == ("graph", "")
    pending.backward()
    assert choice.run(parameters, name, pending) == "exact"  # that graph is spent
    assert choice.reason.startswith("by exact, since graph said: Trying to backward through the graph a second time")
    assert choice.run(parameters, name, loss()) == "graph"  # the next is not
    moved = loss()
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1)
    assert choice.run(parameters, name, moved) == "exact"
    assert "modified by an inplace operation" in choice.reason
    assert (choice.run(parameters, name), choice.reason, choice.refused) == ("exact", "", {})
    for method in ("exact", "forward", "difference"):
        assert Choice(loss, method).run(parameters, name) == method  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a graph is used by method='auto' only"):
            Choice(loss, method).run(parameters, name, loss())  # type: ignore[arg-type]


def test_a_refusal_is_remembered_and_the_loss_is_not_tried_that_way_again() -> None:
    calls = []
    w = nn.Parameter(torch.randn(3))

    def loss() -> Tensor:
        calls.append(1)
        return NoSecond.apply(w)  # type: ignore[return-value]

    choice = Choice(loss)
    for evaluations in (
        8,
        2,
        2,
    ):  # exact, forward, and two of each difference, of which the first two look for symmetry
        calls.clear()
        Hv = choice.run([w], lambda product: product([torch.ones(3)]))[0]
        torch.testing.assert_close(Hv, torch.full((3,), 2.0))
        assert len(calls) == evaluations
    assert list(choice.refused) == ["exact", "forward"]
    assert choice.reason.startswith("by difference, which also sees kinks, since exact said: ")


@pytest.mark.parametrize(("layer", "wrong"), [("sandwich", Forward), ("weight norm", Exact)])
def test_second_derivatives_that_are_silently_wrong_are_found_out(layer: str, wrong: type[Curvature]) -> None:
    """Torch 2.13 raises nothing for a tangent through ``linalg.solve`` and for the second backward of ``weight_norm``."""
    model: nn.Module = Sandwich(3, 4) if layer == "sandwich" else weight_norm(nn.Linear(3, 4))
    x, parameters = torch.randn(12, 3), list(model.parameters())

    def loss() -> Tensor:
        return model(x).tanh().square().mean()

    with Difference(loss, parameters) as product:
        assert asymmetry(product) < 1e-7
    right = ({Exact, Forward} - {wrong}) if layer == "sandwich" else set()  # weight norm has no forward derivative
    for kind in right:
        with kind(loss, parameters) as product:
            assert asymmetry(product) < 1e-13
    with wrong(loss, parameters) as product:
        found, acceptable = asymmetry(product), acceptable_asymmetry(product)
    if found <= acceptable:
        pytest.skip("this torch has mended it")
    assert found > 100 * acceptable
    with pytest.raises(RuntimeError, match="are not symmetric"):
        Choice(loss, wrong.name).run(parameters, lambda product: product.name)  # type: ignore[arg-type]
    choice = Choice(loss)
    name = choice.run(parameters, lambda product: product.name)
    assert (name, "not symmetric" in choice.reason) == (
        ("exact", False) if layer == "sandwich" else ("difference", True)
    )


def test_differences_that_kinks_drown_are_refused_and_those_of_many_samples_are_not() -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    parameters = list(model.parameters())
    for samples, accepted in ((32, False), (8192, True)):
        x, y = torch.randn(samples, 8), torch.randint(3, (samples,))
        choice = Choice(lambda x=x, y=y: F.cross_entropy(model(x), y))
        choice.refused |= {"exact": "no", "forward": "no"}
        if accepted:
            assert choice.run(parameters, lambda product: product.name) == "difference"
        else:
            with pytest.raises(RuntimeError, match="kinks or rounding are larger"):
                choice.run(parameters, lambda product: product.name)
        asked_for = Choice(choice.loss, "difference")
        assert asked_for.run(parameters, lambda product: product.name) == "difference"


def test_a_loss_that_is_not_finite_decides_nothing() -> None:
    w, scale = nn.Parameter(torch.ones(2)), [math.nan]
    choice = Choice(lambda: scale[0] * Swirl.apply(w), "exact")  # type: ignore[operator]
    assert choice.run([w], lambda product: product.name) == "exact"
    scale[0] = 1.0
    with pytest.raises(RuntimeError, match="the products by exact are not symmetric"):
        choice.run([w], lambda product: product.name)
    smooth = Choice(lambda: scale[0] * (w**2).sum())
    assert smooth.run([w], lambda product: product([torch.ones(2)]))[0].tolist() == [2.0, 2.0]
    scale[0] = math.nan
    assert smooth.run([w], lambda product: product.name) == "exact"
    with Exact(lambda: w.sub(1).pow(4).sum(), [w]) as product:
        assert asymmetry(product) == 0.0


def test_fused_attention_gives_way_to_its_formula_for_the_second_derivative_only() -> None:
    model, loss = attention_loss()
    parameters, flash = list(model.parameters()), torch.backends.cuda.flash_sdp_enabled()
    v = [torch.randn_like(p) for p in parameters]
    products = []
    for kind in (Exact, Forward, Difference):
        with kind(loss, parameters) as product:
            products.append(product(v))
        assert torch.backends.cuda.flash_sdp_enabled() == flash
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0], rtol=1e-2, atol=1e-4)
    assert Choice(loss).run(parameters, lambda product: product(v) and product.name) == "exact"


@pytest.mark.slow
def test_compiled_code_is_run_as_written_and_not_compiled_again() -> None:
    model, _ = problem()
    x, y, compiled = torch.randn(10, 5), torch.randint(3, (10,)), []
    parameters = list(model.parameters())

    aot = torch._dynamo.lookup_backend("aot_eager")  # which has no second derivative

    def backend(module: Any, inputs: Any) -> Any:
        compiled.append(1)
        return aot(module, inputs)

    fast = torch.compile(model, backend=backend)
    for p in parameters:
        p.grad = None
    F.cross_entropy(fast(x), y).backward()
    v, count = [torch.randn_like(p) for p in parameters], len(compiled)
    products = []
    for network in (model, fast):
        for kind in (Exact, Forward):
            with kind(lambda network=network: F.cross_entropy(network(x), y), parameters) as product:
                products.append(product(v))
    F.cross_entropy(fast(x), y).backward()
    assert len(compiled) == count == 1
    for other in products[1:]:
        torch.testing.assert_close(other, products[0])


def test_parameters_that_the_loss_does_not_use_have_no_curvature() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    for kind in WAYS.values():
        with kind(lambda: (used**2).sum(), [used, unused]) as product:
            first, second = product([torch.ones(2), torch.ones(3)])
        assert first.tolist() == pytest.approx([2.0, 2.0])
        assert second.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_of_the_difference_balances_its_two_errors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    x, y = torch.randn(50, 6, dtype=dtype), torch.randint(3, (50,))
    parameters = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    v = [torch.randn_like(p) for p in parameters]
    with Exact(loss, parameters) as product:
        exact = product(v)
        again = product(v)
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    with Difference(loss, parameters) as product:
        near = product(v)
    error = [a - b for a, b in zip(near, exact, strict=True)]
    assert math.sqrt(dot(error, error) / dot(exact, exact)) < 20 * torch.finfo(dtype).eps ** (2 / 3)


def test_other_failures_are_not_mistaken_for_a_missing_derivative() -> None:
    w = nn.Parameter(torch.randn(3))

    def broken() -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Sharpness(torch.optim.SGD([w], 0.5), broken).measure()
    assert not no_second_derivative(RuntimeError("CUDA out of memory"))
