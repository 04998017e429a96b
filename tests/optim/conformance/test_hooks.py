"""Hooks run when and as often as torch says, whatever the guard does inside the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optim.conformance.runs import assert_same, problem_for
from tests.optim.conformance.subjects import Case, cases, each_case


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Names of calls in order; the hooks for all optimizers are removed in the end."""
    log: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: log.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: log.append("global post")),
    ]
    yield log
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("first", ["ours", "torchs"])
@each_case
def test_step_hooks_run_once_in_torchs_order(case: Case, first: str, calls: list[str]) -> None:
    """Also when torch has wrapped the step of its own class, which it does with the first instance."""
    problem = problem_for(case)
    if first == "torchs" and case.subject.reference is not None:
        case.make_reference(problem_for(case).params)
    optimizer = case.make(problem.params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    removed = optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    expected = ["global pre", "pre", "post", "global post"]
    problem.run(optimizer, 1)
    assert calls == expected
    problem.run(optimizer, 1)
    assert calls == expected * 2
    removed.remove()
    calls.clear()
    problem.run(optimizer, 1)
    assert calls == ["global pre", "pre", "global post"]
    if not case.needs_closure:
        calls.clear()
        optimizer.step()
        assert calls == ["global pre", "pre", "global post"]


@cases("lazy", "backtrack", "strict")
def test_step_hooks_run_once_when_the_guard_shrinks_or_undoes(case: Case, calls: list[str]) -> None:
    """The loss that the closure gives rises at each call, so that no try can pass."""
    problem = problem_for(case)
    optimizer = case.make(problem.params)
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    height = iter(range(1, 10_000))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.closure(optimizer)() + 1e6 * next(height)
        return loss.detach()

    for _ in range(3):
        calls.clear()
        optimizer.step(closure)
        assert calls == ["global pre", "post", "global post"]
    assert optimizer.last_step.action != "accepted"


@each_case
def test_a_step_pre_hook_may_replace_the_arguments(case: Case) -> None:
    problem = problem_for(case)
    optimizer = case.make(problem.params)
    closure, seen = problem.closure(optimizer), []

    def give_closure(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        seen.append((args[1:], kwargs))
        return (self, closure), {}

    optimizer.register_step_pre_hook(give_closure)
    before = problem.values()
    optimizer.step(None)
    assert seen == [((None,), {})]
    assert problem.calls >= 1
    assert not torch.equal(before[0], problem.weight)


@each_case
def test_a_step_post_hook_sees_the_step_and_its_report(case: Case) -> None:
    problem = problem_for(case)
    optimizer = case.make(problem.params)
    before, seen = problem.values(), []
    optimizer.register_step_post_hook(lambda o, *_: seen.append((problem.weight.detach().clone(), o.last_step)))
    problem.run(optimizer, 1)
    assert not torch.equal(seen[0][0], before[0])
    assert torch.equal(seen[0][0], problem.weight)
    assert seen[0][1] is optimizer.last_step


@each_case
def test_state_dict_hooks_run_in_order_and_may_replace_the_dict(case: Case) -> None:
    problem = problem_for(case)
    optimizer, log = case.make(problem.params), []
    optimizer.register_state_dict_pre_hook(lambda _: log.append("second"))
    optimizer.register_state_dict_pre_hook(lambda _: log.append("first"), prepend=True)

    def replace(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        log.append("post 2")
        return state | {"note": 1}

    def change(_: Any, state: dict[str, Any]) -> None:
        log.append("post 1")
        state["other"] = 2

    handle = optimizer.register_state_dict_post_hook(replace)
    optimizer.register_state_dict_post_hook(change, prepend=True)
    state = optimizer.state_dict()
    assert log == ["first", "second", "post 1", "post 2"]
    assert (state["note"], state["other"]) == (1, 2)
    handle.remove()
    assert "note" not in optimizer.state_dict()


@each_case
def test_load_state_dict_hooks_run_in_order_and_may_replace_the_dict(case: Case) -> None:
    problem = problem_for(case)
    optimizer, log = case.make(problem.params, lr=0.01), []
    state = optimizer.state_dict()

    def replace(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        log.append("second")
        return given | {"param_groups": [g | {"lr": 0.5} for g in given["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_pre_hook(lambda *_: log.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda _: log.append("post 2"))
    optimizer.register_load_state_dict_post_hook(
        lambda o: log.append(f"post 1 {o.param_groups[0]['lr']}"), prepend=True
    )
    optimizer.load_state_dict(state)
    assert log == ["first", "second", "post 1 0.5", "post 2"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert state["param_groups"][0]["lr"] == 0.01


@each_case
def test_a_state_dict_that_hooks_took_apart_loads_once_hooks_put_it_together(case: Case) -> None:
    """Hooks of loading see the dict as it is given, before anything is looked up in it."""
    problem = problem_for(case)
    optimizer = case.make(problem.params)
    problem.run(optimizer, 2)
    optimizer.register_state_dict_post_hook(lambda _, s: {"inner": s})
    optimizer.register_load_state_dict_pre_hook(lambda _, s: s["inner"])
    saved = optimizer.state_dict()
    assert list(saved) == ["inner"]
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["inner"]["state"], saved["inner"]["state"])
