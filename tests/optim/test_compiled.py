"""A compiled step with a soft threshold is the eager one, and one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box
from stableopt.optim import SGD, Adam
from stableopt.optim.compiled import traced_step

SETTINGS: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.5, "maximize": True},
]


THRESHOLD = L1(0.05)


def made(prox: L1 | None = THRESHOLD, **options: Any) -> tuple[SGD, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 3), (7,), (), (0, 2))]
    return SGD(params, lr=0.1, guard="off", prox=prox, **options), params


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("prox", [L1(0.05), None])
def test_the_traced_step_is_the_eager_one(options: dict[str, Any], prox: L1 | None) -> None:
    (eager, a), (traced, b) = made(prox, **options), made(prox, **options)
    for step in range(6):
        gradients(a, step)
        gradients(b, step)
        eager.step()
        assert traced_step(traced)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-14, atol=1e-15)
            if options["momentum"]:
                torch.testing.assert_close(
                    traced.state[q]["momentum_buffer"], eager.state[p]["momentum_buffer"], rtol=1e-13, atol=1e-14
                )


def test_what_does_not_fit_is_left_to_the_eager_step() -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    for optimizer in (
        SGD([w], lr=0.1, constraint=Box(0.0, 1.0), guard="off"),
        Adam([w], lr=0.1, prox=L1(0.1), guard="off"),
        SGD([nn.Parameter(torch.ones(1, dtype=torch.complex128))], lr=0.1, guard="off"),
    ):
        assert not traced_step(optimizer)
        assert w.tolist() == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own compiler
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_run_is_one_graph_with_the_numbers_of_the_eager_run(backend: str) -> None:
    (eager, a), (compiled, b) = made(momentum=0.9), made(momentum=0.9)
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend=backend)
    for k in range(4):
        gradients(a, k)
        gradients(b, k)
        eager.step()
        step()
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-12, atol=1e-14)
