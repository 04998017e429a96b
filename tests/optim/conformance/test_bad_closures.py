"""One test for each mistake that a user can make with an optimizer, numbered as in the project's table of bad input: closures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.optim.conformance.runs import Problem, assert_same, problem_for, states
from tests.optim.conformance.subjects import JUDGING, Case, cases, each_case


def _snapshot(problem: Problem, optimizer: Any) -> Any:
    clone = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states(optimizer)]
    return problem.values(), clone


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@cases(*JUDGING)
def test_row_20_a_loss_that_is_not_finite_touches_nothing(case: Case, value: float) -> None:
    problem = problem_for(case)
    optimizer = case.make(problem.params)
    first = _snapshot(problem, optimizer)
    closure = problem.closure(optimizer)
    optimizer.step(lambda: closure().detach() * value)
    assert optimizer.last_step.verdict == "nonfinite"
    assert optimizer.param_groups[0]["skipped"] == 1
    assert_same(_snapshot(problem, optimizer), first)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["skipped"] == 1
    assert not torch.equal(problem.weight, first[0][0])


@each_case
def test_row_21_without_a_closure_the_step_is_plain_or_the_closure_is_asked_for(case: Case) -> None:
    problem = problem_for(case)
    optimizer = case.make(problem.params, lr=0.01)
    problem.closure(optimizer)()
    if case.needs_closure:
        with pytest.raises((ValueError, RuntimeError), match="closure"):
            optimizer.step()
        return
    optimizer.step()
    assert optimizer.last_step.verdict == "unobserved"
    assert ("closure" in optimizer.last_step.reason) == (case.mode != "off")
    twin = problem_for(case)
    if case.subject.reference is not None:
        reference = case.make_reference(twin.params, lr=0.01)
        twin.closure(reference)()
        reference.step()
        assert_same(problem.values(), twin.values())


@cases("monitor", *JUDGING)
def test_row_22_a_closure_that_gives_no_number_is_refused_by_name(case: Case) -> None:
    for wrong in (torch.ones(3), "low", [1.0], torch.tensor(1.0 + 2.0j), True):
        problem = problem_for(case)
        optimizer = case.make(problem.params)
        closure = problem.closure(optimizer)
        before = problem.values()

        def spoiled(closure: Any = closure, wrong: Any = wrong) -> Any:
            closure()
            return wrong

        with pytest.raises((TypeError, ValueError), match="closure"):
            optimizer.step(spoiled)
        assert_same(problem.values(), before)
    for wrong in (3.0, "closure"):
        with pytest.raises(TypeError, match="closure"):
            case.make(problem_for(case).params).step(wrong)


@cases("monitor", *JUDGING)
def test_row_22_a_closure_that_returns_nothing_or_a_detached_loss_is_no_mistake(case: Case) -> None:
    """Nothing: the step is torch's and not judged. A detached loss has all that the guard reads."""
    problem = problem_for(case)
    optimizer = case.make(problem.params, lr=0.01)
    closure, before = problem.closure(optimizer), problem.values()
    if not case.needs_closure:

        def silent() -> None:
            closure()

        optimizer.step(silent)
        assert not torch.equal(problem.weight, before[0])
        assert optimizer.last_step.verdict == "unobserved"
        assert "None" in optimizer.last_step.reason
    for _ in range(2):
        optimizer.step(lambda: closure().detach())
    assert optimizer.last_step.verdict == "decreased"


@cases("backtrack", "strict")
def test_row_23_a_closure_that_is_not_a_function_of_the_parameters_is_found_in_debug_mode(case: Case) -> None:
    def one_that_draws(problem: Problem, optimizer: Any) -> Any:
        batch = iter(range(1, 1000))
        closure = problem.closure(optimizer)
        return lambda: closure() / next(batch)

    def one_that_moves(problem: Problem, optimizer: Any) -> Any:
        def closure() -> Tensor:
            with torch.no_grad():
                problem.weight.mul_(0.999)
            return problem.closure(optimizer)()

        return closure

    for make in (one_that_draws, one_that_moves):
        problem = problem_for(case)
        optimizer = case.make(problem.params, debug=True)
        closure = make(problem, optimizer)
        with pytest.warns(UserWarning, match="closure"):
            optimizer.step(closure)
        optimizer.step(closure)  # once only: a second warning would be an error here


@cases("monitor", "backtrack", "strict")
def test_row_23_dropout_draws_the_same_mask_for_both_energies(case: Case) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Dropout(0.5), nn.Linear(8, 1, bias=False))
    optimizer = case.make(
        model.parameters(),
        lr=1e-12 if case.subject.name in {"Rprop", "SparseAdam"} else 0.0,
        debug=case.mode != "monitor",
    )
    x = torch.linspace(-1, 1, 20).view(5, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x[:, :1])
        loss.backward()
        if case.sparse:
            for p in model.parameters():
                p.grad = p.grad.to_sparse()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.last_step.verdict in {"undecided", "decreased"}
        assert abs(optimizer.last_step.dissipation) < 1e-5


@each_case
def test_row_24_a_scaler_that_is_given_a_closure_is_refused_with_advice(case: Case) -> None:
    problem = problem_for(case, dtype=torch.float32)
    optimizer = case.make(problem.params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    closure = problem.closure(optimizer)
    scaler.scale(problem.loss()).backward()
    if case.sparse:
        for p in problem.params:
            p.grad = p.grad.to_sparse()
    before = problem.values()
    with pytest.raises(RuntimeError, match=r"GradScaler.*trial"):
        scaler.step(optimizer, closure)
    assert_same(problem.values(), before)


@cases(*JUDGING, "monitor")
def test_row_25_a_step_that_a_scaler_skips_is_no_decrease(case: Case) -> None:
    if case.needs_closure or case.sparse:
        pytest.skip("torch's scaler takes neither closures nor these sparse gradients")
    problem = problem_for(case, dtype=torch.float32)
    optimizer = case.make(problem.params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, verdicts = problem.values(), []
    for poison in (True, False):
        optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        if poison:
            assert problem.weight.grad is not None
            problem.weight.grad[0, 0] = math.inf
        scaler.step(optimizer, trial=problem.loss)
        scaler.update()
        verdicts.append(None if optimizer.last_step is None else optimizer.last_step.verdict)
        if poison:
            assert_same(problem.values(), before)
    assert verdicts[0] in {None, "nonfinite"}
    assert verdicts[1] == "decreased"
    assert not torch.equal(problem.weight, before[0])


@cases("monitor", "backtrack", "strict")
def test_row_26_an_accumulated_step_is_judged_on_the_whole_batch(case: Case) -> None:
    if case.needs_closure or case.sparse:
        pytest.skip("torch's class evaluates its closure itself, or takes sparse gradients only")
    problem, other = problem_for(case), Problem(seed=1, scale=-4.0)
    optimizer = case.make(problem.params, lr=0.01)

    def both() -> Tensor:
        again = problem.weight @ other.x + problem.bias - other.target
        return (problem.loss() + again.square().sum()) / 2

    for given in (None, both().item()):
        optimizer.zero_grad()
        (problem.loss() / 2).backward()
        again = problem.weight @ other.x + problem.bias - other.target
        (again.square().sum() / 2).backward()
        here = both().item()
        optimizer.step(trial=both, loss=here if given is not None else None)
        report = optimizer.last_step
        assert report.loss == pytest.approx(here, rel=1e-12)
        assert report.verdict == "decreased"
