"""Derivatives of the gradient of a step: every way agrees, and the step is as it would have been."""

import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.tangents.products import GradientTap


def model_with_everything():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def closure_of(model, x, y, accumulate=1):
    def closure():
        model.zero_grad()
        total = 0.0
        for xs, ys in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            loss = nn.functional.cross_entropy(model(xs), ys) / accumulate
            loss.backward()
            total += loss.detach()
        return total

    return closure


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (16,), generator=generator)


def directions(model, k=2):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(k, *p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["auto", "graph", "exact", "forward", "difference"])
def test_all_ways_agree_with_a_difference_of_gradients(method, accumulate):
    model, (x, y) = model_with_everything(), data()
    along = directions(model)
    tap = GradientTap(list(model.parameters()), method)
    torch.manual_seed(3)
    tap.evaluate(closure_of(model, x, y, accumulate), along)
    made = tap.gradient
    assert made.backend == ("graph" if method in {"auto", "graph"} else method)
    h, start = 1e-5, [p.detach().clone() for p in model.parameters()]
    for r in range(2):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, p0, d in zip(model.parameters(), start, along, strict=True):
                    p.copy_(p0 + sign * h * d[r])
            torch.manual_seed(3)
            closure_of(model, x, y, accumulate)()
            found.append([p.grad.clone() for p in model.parameters()])
        for d, a, b in zip(made.along, *found, strict=True):
            assert torch.allclose(d[r], (a - b) / (2 * h), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("method", ["auto", "exact", "forward", "difference"])
def test_the_step_is_bit_for_bit_the_same(method):
    runs = []
    for tapped in (False, True):
        model, (x, y) = model_with_everything(), data()
        torch.manual_seed(3)
        closure = closure_of(model, x, y)
        if tapped:
            GradientTap(list(model.parameters()), method).evaluate(closure, directions(model))
        else:
            closure()
        grads = [p.grad for p in model.parameters()]
        assert all(g.grad_fn is None and not g.requires_grad for g in grads)
        runs.append([*grads, *model.buffers(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["everything", "lstm"])
def test_products_together_are_those_one_by_one(kind):
    found = []
    for together in (True, False):
        if kind == "lstm":
            torch.manual_seed(0)
            model, x = nn.LSTM(4, 3), torch.randn(5, 4)
            closure = lambda model=model, x=x: (model.zero_grad(), model(x)[0].square().sum().backward())  # noqa: E731
        else:
            model, (x, y) = model_with_everything(), data()
            closure = closure_of(model, x, y)
        tap = GradientTap(list(model.parameters()))
        assert tap._together
        tap._together = together
        torch.manual_seed(3)
        tap.evaluate(closure, directions(model, 3))
        found.append(tap.gradient)
    assert [f.backend for f in found] == ["graph", "graph"]
    for a, b in zip(found[0].along, found[1].along, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_gradients_that_are_there_are_added_to():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    w.grad = torch.ones_like(w)
    tap, d = GradientTap([w]), [torch.ones(1, 2, dtype=torch.float64)]
    tap.backward((w**3).sum(), d)
    tap.backward((w**2).sum(), d)
    assert w.grad.tolist() == [1 + 3 + 2, 1 + 12 + 4]
    assert tap.gradient.along[0].tolist() == [[6 + 2, 12 + 2]]
    assert tap.gradient.values[0].tolist() == [3 + 2, 12 + 4]


def test_another_way_is_taken_where_the_graph_has_no_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def closure():
        w.grad = None
        loss = Once.apply(w).sum()
        loss.backward()
        return loss

    tap, d = GradientTap([w]), [torch.ones(1, 2, dtype=torch.float64)]
    tap.evaluate(closure, d)
    assert tap.gradient.backend == "difference"
    assert "the graph is not used" in tap.reason
    assert torch.allclose(tap.gradient.along[0], torch.tensor([[6.0, 12.0]], dtype=torch.float64), rtol=1e-6)
    assert w.grad.tolist() == [3.0, 12.0]
    with pytest.raises(RuntimeError, match="cannot be used"):
        GradientTap([w], "graph").evaluate(closure, d)


def test_a_method_that_evaluates_again_needs_a_closure():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="evaluates the loss again"):
        GradientTap([w], "exact").backward(w.square().sum(), [torch.ones(1, 1)])
