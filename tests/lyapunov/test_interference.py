"""The run with a monitor is the run without one, bit for bit."""

from __future__ import annotations

import pytest
import torch

from stableopt import optim
from stableopt.lyapunov import Monitor
from tests.lyapunov.training import batches, equal, make_closure, make_model, picture, seed_everything

OPTIMIZERS = {
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "torch LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "SGD off": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, guard="off"),
    "SGD monitor": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, guard="monitor"),
    "SGD backtrack": lambda p: optim.SGD(p, lr=0.5, momentum=0.9),
    "AdamW off": lambda p: optim.AdamW(p, lr=0.01, guard="off"),
    "AdamW strict": lambda p: optim.AdamW(p, lr=0.1, guard="strict"),
}


def run(make, *, monitored: bool, with_closure: bool, steps: int = 50, zero_in_place: bool = False):
    """Train and return the picture of every step, with the identity of the gradients across the step."""
    seed_everything()
    model = make_model()
    optimizer = make(model.parameters())
    if zero_in_place:
        original = optimizer.zero_grad
        optimizer.zero_grad = lambda: original(set_to_none=False)
    monitor = Monitor(model, optimizer, norms_every=7)
    if monitored:
        monitor.attach()
    pictures = []
    for x, y in batches(steps):
        model.train()
        model[6].eval()  # one module in another mode than the rest
        closure = make_closure(model, optimizer, x, y)
        if with_closure:
            before = []

            def watched(closure=closure, before=before):
                loss = closure()
                before[:] = before or [p.grad for p in model.parameters()]  # of the first evaluation
                return loss

            optimizer.step(watched)
            if not isinstance(optimizer, torch.optim.LBFGS):
                pictures.append([a is p.grad for a, p in zip(before, model.parameters(), strict=True)])
        else:
            closure()
            gradients = [p.grad for p in model.parameters()]
            optimizer.step()
            assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
        pictures.append(picture(model, optimizer))
    monitor.close()
    return pictures, monitor


WITH_CLOSURE = [(name, True) for name in OPTIMIZERS]
WITHOUT = [(name, False) for name in OPTIMIZERS if name != "torch LBFGS"]  # which has no step without a closure


@pytest.mark.parametrize(("name", "with_closure"), WITH_CLOSURE + WITHOUT)
def test_fifty_steps_are_the_same_bit_for_bit(name, with_closure):
    make = OPTIMIZERS[name]
    alone, _ = run(make, monitored=False, with_closure=with_closure)
    watched, monitor = run(make, monitored=True, with_closure=with_closure)
    for step, (a, b) in enumerate(zip(alone, watched, strict=True)):
        if isinstance(a, dict):
            assert [key for key in a if not equal(a[key], b[key])] == [], step
    assert monitor.summary()["steps"] == 50
    seen = monitor.summary()["verdicts"]
    assert ("unobserved" in seen) == (not with_closure)
    assert sum(bool(record.norms) for record in monitor.records) == 8  # steps 1, 8, 15, …, 50


def test_the_comparison_would_notice_a_careless_monitor():
    make = OPTIMIZERS["torch SGD"]
    alone, _ = run(make, monitored=False, with_closure=True, steps=2)

    def careless(parameters):
        optimizer = make(parameters)
        optimizer.register_step_post_hook(lambda *_: torch.rand(1))
        return optimizer

    watched, _ = run(careless, monitored=False, with_closure=True, steps=2)
    assert not equal(alone[-1], watched[-1])


def test_gradients_that_are_zeroed_in_place_are_the_same():
    make = OPTIMIZERS["torch SGD"]
    alone, _ = run(make, monitored=False, with_closure=True, steps=10, zero_in_place=True)
    watched, _ = run(make, monitored=True, with_closure=True, steps=10, zero_in_place=True)
    assert all(map(equal, alone, watched))


def test_gradients_are_the_same_objects_after_the_step():
    pictures, _ = run(OPTIMIZERS["torch SGD"], monitored=True, with_closure=True, steps=5)
    assert all(all(same) for same in pictures[::2])


def test_a_closed_monitor_leaves_no_hook():
    model = make_model()
    optimizer = OPTIMIZERS["torch SGD"](model.parameters())
    hooks = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
    with Monitor(model, optimizer) as monitor:
        assert monitor.attach() is monitor
        assert len(optimizer._optimizer_step_pre_hooks) == hooks[0] + 1
    monitor.close()
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks


def test_an_error_in_the_loop_detaches_and_passes():
    model = make_model()
    optimizer = OPTIMIZERS["torch SGD"](model.parameters())
    with pytest.raises(KeyboardInterrupt), Monitor(model, optimizer):
        raise KeyboardInterrupt
    assert not optimizer._optimizer_step_pre_hooks
