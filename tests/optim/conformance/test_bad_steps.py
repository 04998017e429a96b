"""One test for each mistake that a user can make with an optimizer, numbered as in the project's table of bad input: steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt as so
from stableopt.constraints import Box
from tests.optim.conformance.runs import Problem, assert_same, outcome, problem_for, states
from tests.optim.conformance.subjects import JUDGING, Case, cases, each_case


def _snapshot(problem: Problem, optimizer: Any) -> Any:
    clone = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states(optimizer)]
    return problem.values(), clone


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@each_case
def test_row_15_sparse_gradients_step_or_are_refused_by_name(case: Case) -> None:
    """Where torch's class takes them, ours does; where it does not, nothing moves."""
    if case.needs_closure:
        pytest.skip("torch's LBFGS makes them dense")
    problem = Problem(sparse=True)
    optimizer = case.make(problem.params, lr=0.01)
    before = _snapshot(problem, optimizer)
    takes = case.info.supports_sparse or case.info.only_supports_sparse_grads
    if takes:
        twin = Problem(sparse=True)
        problem.run(optimizer, 2)
        twin.run(case.make_reference(twin.params, lr=0.01), 2)
        assert_same(problem.values(), twin.values())
        return
    with pytest.raises(RuntimeError, match="sparse"):
        problem.run(optimizer, 1)
    assert_same(problem.values(), before[0])


@each_case
def test_row_16_a_parameter_without_gradient_is_left_alone(case: Case) -> None:
    problem = problem_for(case)
    unused = nn.Parameter(torch.full((2, 2), 5.0))
    optimizer = case.make([*problem.params, unused], lr=0.01)
    before = problem.loss().item()
    problem.run(optimizer, 3)
    assert problem.loss().item() < before
    assert unused.tolist() == [[5.0, 5.0], [5.0, 5.0]]


@each_case
def test_row_17_no_gradient_at_all_is_no_step_and_no_violation(case: Case) -> None:
    problem = problem_for(case)
    optimizer = case.make(problem.params)
    before = problem.values()
    for _ in range(3):
        optimizer.step(lambda: torch.tensor(2.0))
        assert_same(problem.values(), before)
        assert optimizer.last_step.verdict in {"undecided", "unobserved"}
        assert optimizer.last_step.action in {"accepted", "unguarded"}
    assert optimizer.param_groups[0]["step_scale"] == 1.0
    if case.mode in {"monitor", "backtrack", "strict"}:
        assert "no gradient" in optimizer.last_step.reason


@each_case
def test_row_18_zero_gradients_leave_the_energy_and_are_undecided(case: Case) -> None:
    if case.subject.name == "ASGD":
        pytest.skip("ASGD decays with zero gradients")
    problem = problem_for(case)
    decay = {"weight_decay": 0.0} if "weight_decay" in case.make([nn.Parameter(torch.ones(1, 1))]).defaults else {}
    optimizer = case.make(problem.params, **decay)
    for _ in range(2):
        for p in problem.params:
            p.grad = torch.zeros_like(p).to_sparse() if case.sparse else torch.zeros_like(p)
        optimizer.step(lambda: torch.tensor(2.0))
    report = optimizer.last_step
    if case.mode == "off":
        assert report.verdict == "unobserved"
    else:
        assert report.verdict == "undecided"
        assert report.energy_before == report.energy_after


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@cases(*JUDGING)
def test_row_19_a_gradient_that_is_not_finite_touches_nothing(case: Case, value: float) -> None:
    if case.mode == "lazy" and case.needs_closure:
        pytest.skip("a step that evaluates the closure itself meets the gradient within: row 20")
    for policy in ("skip", "raise"):
        problem = problem_for(case)
        optimizer = case.make(problem.params, on_nonfinite=policy)
        problem.run(optimizer, 2)
        poison: list[int] = []

        def closure(problem: Problem = problem, optimizer: Any = optimizer, poison: list[int] = poison) -> Tensor:
            loss = problem.closure(optimizer)()
            if poison and problem.bias.grad is not None:
                grad = problem.bias.grad.to_dense()
                grad[0, 0] = value
                problem.bias.grad = grad.to_sparse() if case.sparse else grad
            return loss

        before = _snapshot(problem, optimizer)
        poison.append(1)
        if (
            case.mode == "lazy"
        ):  # a step waits for this loss: it is undone and tried shorter, and nothing is skipped yet
            optimizer.step(closure)
            assert optimizer.last_step.action == "undone"
            assert optimizer.param_groups[0]["skipped"] == 0
        elif policy == "raise":
            with pytest.raises(so.errors.StabilityError, match="gradient is not finite"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
            assert optimizer.last_step.verdict == "nonfinite"
            assert optimizer.param_groups[0]["skipped"] == 1
        if case.mode == "lazy":  # the step that waited for this loss is gone, too
            assert all(p.isfinite().all() for p in problem.params)
        else:
            assert_same(_snapshot(problem, optimizer), before)
        poison.clear()
        at = problem.loss().item()
        for _ in range(6):
            optimizer.step(closure)
        assert problem.loss().item() < max(at, 1e-12)  # LBFGS may have arrived


@each_case
def test_row_27_scalars_and_empty_tensors_are_parameters(case: Case) -> None:
    shapes: list[tuple[int, ...]] = [(), (0, 3)]
    if case.subject.name == "Muon":  # takes matrices only
        shapes = [(0, 3)]
    if case.subject.name == "Adafactor":  # torch's own divides by the number of elements
        shapes = [()]
    problem = problem_for(case)
    extra = [nn.Parameter(torch.full(shape, 2.0)) for shape in shapes]
    optimizer = case.make([*problem.params, *extra], lr=0.01)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss() + sum((p - 9.0).square().sum() for p in extra)
        loss.backward()
        if case.sparse:
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.grad.to_sparse()
        return loss

    if case.sparse:
        del optimizer.param_groups[0]["params"][2]  # a scalar has no sparse gradient that torch's class can index
        extra = extra[1:]
    before = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < before
    assert [tuple(p.shape) for p in extra] == (shapes if not case.sparse else shapes[1:])


@each_case
def test_row_28_memory_layout_changes_no_result_and_is_kept(case: Case) -> None:
    if case.subject.name in {"Muon", "LBFGS"}:
        pytest.skip("takes matrices only (strided ones are in the tests of steps), or views gradients as vectors")
    torch.manual_seed(4)
    start, results = torch.randn(2, 3, 2, 2), []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = nn.Parameter(start.clone(memory_format=layout))
        optimizer = case.make([w], lr=0.01)

        def closure(w: nn.Parameter = w, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (w - 3.0).square().sum()
            loss.backward()
            if case.sparse:
                w.grad = w.grad.to_sparse()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert w.is_contiguous(memory_format=layout)
        results.append(w.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
def test_row_29_half_precision_is_one_rounding_away_from_single(case: Case, dtype: torch.dtype) -> None:
    """The first step from the same point: within two units in the last place of the larger of start and end."""
    if case.subject.name in {"Adafactor", "LBFGS"}:
        pytest.skip("constants that depend on the dtype, or several inner steps")
    for kwargs in case.subject.implementations():
        half, single = (problem_for(case, dtype=d) for d in (dtype, torch.float32))
        with torch.no_grad():
            for p, q in zip(single.params, half.params, strict=True):
                p.copy_(q)
        start = half.values()
        for problem in (half, single):
            problem.run(case.make(problem.params, **kwargs), 1)
        for h, s, at in zip(half.params, single.params, start, strict=True):
            unit = torch.finfo(dtype).eps * torch.maximum(at.float().abs(), s.abs()).clamp_min(torch.finfo(dtype).tiny)
            step = (s - at.float()).abs()
            bound = 2 * unit + 8 * torch.finfo(dtype).eps * step  # the step itself is computed in the dtype by torch
            assert ((h.float() - s).abs() <= bound).all(), (kwargs, h, s)


@each_case
def test_row_30_dtypes_that_differ_in_a_group_work_or_are_refused_with_a_sentence(case: Case) -> None:
    problem = problem_for(case, dtype=(torch.float32, torch.float64))
    optimizer = case.make(problem.params, lr=0.01)
    before = problem.loss().item()
    result = outcome(lambda: problem.run(optimizer, 3))
    if isinstance(result, type):
        assert case.needs_closure
        assert issubclass(result, (TypeError, ValueError, RuntimeError))
    else:
        assert problem.loss().item() < before


@each_case
def test_row_32_frozen_parameters_are_ignored(case: Case) -> None:
    """Even outside of the set of their group."""
    problem = problem_for(case)
    frozen = nn.Parameter(torch.full((2, 2), 500.0), requires_grad=False)
    plain = case.subject.name in {"NAdam", "LBFGS", "SparseAdam"}
    extra: dict[str, Any] = {} if plain else {"constraint": Box(-100.0, 100.0)}
    optimizer = case.make([*problem.params, frozen], **extra)
    before, state = problem.loss().item(), copy.deepcopy(dict(optimizer.state.get(frozen, {})))
    problem.run(optimizer, 2)
    assert problem.loss().item() < before
    assert frozen.eq(500.0).all()
    assert_same(dict(optimizer.state.get(frozen, {})), state)


@cases("backtrack", "strict")
def test_row_37_a_schedule_that_lifts_the_rate_over_the_limit_is_caught_in_its_step(case: Case) -> None:
    """A curved bowl: in strict mode the energy never rises, whenever the rate becomes absurd; in backtrack never silently."""
    w = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = case.make([w], lr=1e-3)
    factors = [1.0, 1.0, 1e7, 1e7, 1e7, 1e7, 1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: factors[min(k, 6)])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        if case.sparse:
            w.grad = w.grad.to_sparse()
        return loss

    losses = []
    for factor in factors:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor)
        losses.append(optimizer.step(closure).item())
        report = optimizer.last_step
        if report.energy_after > report.energy_before + report.tolerance:  # never silently
            assert (case.mode, report.action) == ("backtrack", "restarted")
            assert "no try" in report.reason
        scheduler.step()
    assert w.isfinite().all()
    assert case.mode == "backtrack" or closure().item() <= losses[0]


@cases("strict")
def test_row_37_a_proved_limit_is_checked_in_every_step(case: Case) -> None:
    if case.subject.name not in {"SGD", "Adam", "AdamW", "RMSprop"}:
        pytest.skip("no proved limit is known for the class")
    problem = problem_for(case)
    optimizer = case.make(problem.params, lr=1e-4, smoothness=10.0, over_limit="raise")
    problem.run(optimizer, 2)
    optimizer.param_groups[0]["lr"] = 1e9
    before = problem.values()
    with pytest.raises(so.errors.StabilityError, match="exceeds"):
        problem.run(optimizer, 1)
    assert_same(problem.values(), before)
