"""``torch.compile`` takes the step where it takes torch's, with the same numbers, in as few graphs, and once for all steps.

torch breaks the graph itself where it switches gradients off around its steps, so ``fullgraph=True`` refuses its own classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.conformance.runs import outcome
from tests.optim.conformance.subjects import Case, Subject, cases, each_subject

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr.*Tensor.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Count:
    """A backend that runs the graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def _parameters() -> list[nn.Parameter]:
    torch.manual_seed(2)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 2))]


def _compiled_run(make: Any, backend: Any, *, steps: int = 4) -> list[torch.Tensor]:
    """Steps with given gradients; with no backend, not compiled."""
    params = _parameters()
    optimizer = make(params)
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
    for k in range(steps):
        for p in params:
            p.grad = torch.cos(p.detach() + k)
        step()
    return [p.detach() for p in params]


def _close(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@each_subject
def test_the_step_compiles_into_no_more_graphs_than_torchs(subject: Subject) -> None:
    if subject.info.step_requires_closure or subject.info.only_supports_sparse_grads:
        pytest.skip("torch does not compile the step of its own class")
    for rate in (0.01, torch.tensor(0.01)):
        counts = {}
        for who, cls, extra in (("torch", subject.reference, {}), ("ours", subject.cls, {"guard": "off"})):
            if cls is None:
                continue
            count = _Count()

            def make(p: Any, cls: Any = cls, extra: Any = extra, rate: Any = rate) -> Any:
                return cls(p, lr=rate, **extra)

            torch._dynamo.reset()
            result = outcome(lambda make=make, count=count: _compiled_run(make, count))
            if isinstance(result, type) and who == "torch":
                break
            assert not isinstance(result, type), result
            _close(result, _compiled_run(make, None))
            counts[who] = count.graphs
        else:
            assert counts["ours"] <= counts.get("torch", 2), rate


@cases("monitor", "lazy", "backtrack", "strict")
def test_a_step_without_closure_compiles_in_every_mode(case: Case) -> None:
    """Graphs may break at the guard, but the numbers are the same and later steps compile nothing anew."""
    if case.subject.name not in {"SGD", "AdamW", "Lion"}:
        pytest.skip("the modes are the same code for every class")
    count = _Count()

    def make(p: Any) -> Any:
        return case.make(p, lr=0.01)

    _close(_compiled_run(make, count, steps=8), _compiled_run(make, None, steps=8))
    assert count.graphs <= 6


@each_subject
def test_the_compiler_of_torch_itself_gives_the_same_steps(subject: Subject) -> None:
    """inductor, which needs a C++ compiler; two classes, for the time it takes."""
    if subject.name not in {"SGD", "AdamW"}:
        pytest.skip("two classes are enough for the backend")

    def make(p: Any) -> Any:
        return subject.cls(p, lr=torch.tensor(0.01), guard="off")

    _close(_compiled_run(make, "inductor"), _compiled_run(make, None))


@cases("backtrack", "strict")
def test_a_compiled_model_goes_through_the_guard(case: Case) -> None:
    if case.subject.name not in {"SGD", "AdamW", "Muon"}:
        pytest.skip("the closure is the same for every class")
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    model.compile(backend="aot_eager")
    optimizer = case.make(model.parameters(), lr=0.01)
    x = torch.linspace(-1, 1, 15).view(5, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 3.0).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    assert optimizer.last_step.action == "accepted"
