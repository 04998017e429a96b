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
    assert np.array_equal(np.random.get_state()[1], state.numpy[1])  # noqa: NPY002


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
