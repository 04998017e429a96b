"""A second evaluation gives the value of the first and leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.optim import RandomState, as_loss, evaluate_again
from tests.optim.problems import Network, network_closure


def test_the_value_is_that_of_the_first_evaluation_with_dropout_and_batch_norm() -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closure = network_closure(optimizer, model)
    start = RandomState.capture()
    first = float(closure().detach())
    assert evaluate_again(closure, start) == first
    assert evaluate_again(closure) != first  # another dropout mask


@pytest.mark.parametrize("set_to_none", [True, False])
def test_nothing_is_left_behind(set_to_none: bool) -> None:
    model = Network()
    stranger = nn.Linear(8, 1)  # its gradients belong to another optimizer
    stranger(torch.ones(1, 8)).sum().backward()
    x = torch.randn(16, 8)

    def closure() -> torch.Tensor:
        for module in (model, stranger):
            module.zero_grad(set_to_none=set_to_none)
        noise = random.random() + torch.rand(()) + np.random.rand()  # noqa: NPY002
        loss = model(x).square().mean() * noise
        loss.backward()
        return loss

    closure()
    stranger(torch.ones(1, 8)).sum().backward()
    parameters = [*model.parameters(), *stranger.parameters()]
    grads = [(p.grad, p.grad.clone()) for p in parameters]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    state = RandomState.capture()
    assert evaluate_again(closure) > 0
    for p, (grad, value) in zip(parameters, grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    for name, b in model.named_buffers():
        assert b is buffers[name][0]
        assert torch.equal(b, buffers[name][1])
    assert torch.equal(torch.get_rng_state(), state.cpu)
    assert random.getstate() == state.python
    assert np.array_equal(np.random.get_state()[1], state.numpy["state"]["key"])  # noqa: NPY002


def test_power_iteration_vectors_are_put_back() -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    evaluate_again(lambda: layer(torch.ones(1, 4)).sum())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_it_costs_one_forward_pass_and_no_backward() -> None:
    model = Network()
    closure = network_closure(torch.optim.SGD(model.parameters(), lr=0.1), model)
    evaluate_again(closure)
    assert model.calls == 1
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_that_needs_a_graph_gets_one() -> None:
    w = nn.Parameter(torch.tensor(2.0))

    def closure() -> torch.Tensor:
        loss = w**2
        (gradient,) = torch.autograd.grad(loss, w)
        w.grad = gradient
        return loss

    assert evaluate_again(closure) == 4.0
    assert w.grad is None


def test_errors_pass_through_and_leave_no_trace() -> None:
    model = Network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = RandomState.capture()

    def closure() -> torch.Tensor:
        model(torch.randn(4, 8))
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        evaluate_again(closure)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state.cpu)
    model(torch.randn(4, 8))  # the hook is gone: buffers move again
    assert not torch.equal(model.layers[1].running_mean, before["layers.1.running_mean"])


@pytest.mark.parametrize("loss", [1, 0.5, np.float32(0.25), torch.tensor(2.0), torch.tensor([3.0])])
def test_one_real_number_is_a_loss(loss: object) -> None:
    assert as_loss(loss) == float(loss)


@pytest.mark.parametrize("loss", [torch.ones(2), "1", True, None, [1.0], 1j, np.ones(2)])
def test_anything_else_is_none(loss: object) -> None:
    with pytest.raises(ValueError, match="closure must return the loss"):
        as_loss(loss)


@pytest.mark.parametrize("backward", [torch.Tensor.backward, torch.autograd.backward])
@pytest.mark.parametrize("needs_graph", [False, True])
def test_no_way_to_call_backward_reaches_the_gradients(backward: object, needs_graph: bool) -> None:
    w = nn.Parameter(torch.tensor(2.0))

    def closure() -> torch.Tensor:
        w.grad = None
        loss = w * w
        if needs_graph:
            (slope,) = torch.autograd.grad(loss, w, create_graph=True)
            loss = loss + 0 * slope
        backward(loss)
        return loss

    closure()
    gradient = w.grad
    assert gradient.item() == 4.0
    assert evaluate_again(closure) == 4.0
    assert w.grad is gradient
    assert gradient.item() == 4.0


def test_a_closure_may_clip_scale_read_and_delete_its_gradients() -> None:
    w, unused = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1))
    seen = []

    def closure() -> torch.Tensor:
        del unused.grad
        w.grad = None
        seen.append(w.grad)
        loss = w.square().sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([w], 1.0)
        w.grad.clamp_(-0.5, 0.5)
        w.grad = w.grad * 2
        seen.append(float(norm))
        seen.append(w.grad.tolist())
        return loss

    closure()
    real, kept = w.grad, w.grad.clone()
    assert evaluate_again(closure) == 25.0
    assert w.grad is real
    assert torch.equal(w.grad, kept)
    assert unused.grad is None
    assert seen == [None, 10.0, [1.0, 1.0], None, 0.0, [0.0, 0.0]]


def test_a_gradient_tensor_does_not_inherit_that_of_a_freed_one() -> None:
    """Ids are used again after a tensor has died; the gradients of temporaries must not meet."""
    found = []

    def closure() -> float:
        for value in range(50):
            temporary = torch.zeros(1, requires_grad=True)
            found.append(temporary.grad)
            temporary.grad = torch.full((1,), float(value))
        return 0.0

    evaluate_again(closure)
    assert found == [None] * 50


def test_an_autocast_around_the_step_does_not_hide_that_the_weights_moved() -> None:
    """autocast keeps the weights it has cast; a second evaluation at other weights must cast again, and leave no cast behind."""
    layer, x = nn.Linear(4, 1, bias=False).float(), torch.ones(1, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first = float(layer(x).sum().detach())
        with torch.no_grad():
            layer.weight.mul_(2.0)
        assert float(layer(x).sum().detach()) == first  # the trap
        assert evaluate_again(lambda: layer(x).sum()) == 2 * first
        with torch.no_grad():  # a step that is undone
            layer.weight.mul_(0.5)
            assert float(layer(x).sum()) == first
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_that_a_closure_needs_a_graph_is_remembered() -> None:
    w, calls = nn.Parameter(torch.tensor(2.0)), []

    def make() -> object:
        def closure() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            loss = w**2
            torch.autograd.grad(loss, w)
            return loss

        return closure

    evaluate_again(make())
    evaluate_again(make())  # another closure of the same code
    assert calls == [False, True, True]


def test_a_failed_attempt_without_gradients_does_not_advance_buffers_twice() -> None:
    """With a vector of a power iteration, the value of the second attempt shows whether the first was put back."""
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4), n_power_iterations=1)
    x = torch.ones(1, 4, requires_grad=True)

    def closure() -> torch.Tensor:
        y = layer(x).sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        return y + slope.square().sum()

    first = evaluate_again(closure)  # two attempts
    assert evaluate_again(closure) == first  # one attempt


def test_any_bit_generator_of_numpy_goes_back() -> None:
    kept = np.random.get_state(legacy=False)  # noqa: NPY002
    generator = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        state = RandomState.capture()
        first = np.random.rand(2)  # noqa: NPY002
        state.restore()
        assert np.array_equal(first, np.random.rand(2))  # noqa: NPY002
    finally:
        np.random.set_bit_generator(generator)
        np.random.set_state(kept)  # noqa: NPY002
