"""Every scheduler of torch drives the rate as it drives torch's optimizers, and the guard leaves the rate to it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

from tests.optim.conformance.runs import problem_for
from tests.optim.conformance.subjects import Case, Subject, each_case

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: s.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: s.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [1, 3], gamma=0.5),
    "ConstantLR": lambda o: s.ConstantLR(o, factor=0.4, total_iters=3),
    "LinearLR": lambda o: s.LinearLR(o, start_factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: s.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: s.PolynomialLR(o, total_iters=4, power=0.9),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, T_0=3),
    "SequentialLR": lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.5, 2), s.ExponentialLR(o, 0.9)], milestones=[2]),
    "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.5, 2), s.ExponentialLR(o, 0.9)]),
    "CyclicLR": lambda o: s.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: s.OneCycleLR(o, 1e-2, total_steps=10, cycle_momentum="betas" in o.defaults),
    "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, patience=0, threshold=2.0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=3),
}


def test_the_table_names_every_scheduler_of_torch() -> None:
    known = {name for name in s.__all__ if inspect.isclass(getattr(s, name))} - {"LRScheduler"}
    assert known | {"SWALR"} == set(SCHEDULERS)


def _advance(scheduler: Any, loss: float) -> None:
    if isinstance(scheduler, s.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def _drive(optimizer: Any, problem: Any, name: str, steps: int = 4) -> list[tuple[float, Any]]:
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for _ in range(steps):
        loss = optimizer.step(problem.closure(optimizer))
        _advance(scheduler, loss.item())
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
    return seen


_seen: dict[tuple[str, str], list[tuple[float, Any]]] = {}


def _reference(subject: Subject, name: str) -> list[tuple[float, Any]]:
    """What the class behind gets from the scheduler; the same for all modes, so it runs once."""
    key = subject.name, name
    if key not in _seen:
        plain = Case(subject, "off")
        twin = problem_for(plain)
        cls = subject.reference or torch.optim.AdamW
        _seen[key] = _drive(cls(twin.params, lr=0.01, **subject.always), twin, name)
    return _seen[key]


@each_case
def test_rates_and_momenta_are_those_that_torchs_class_gets(case: Case) -> None:
    for name in SCHEDULERS:
        problem = problem_for(case)
        ours = _drive(case.make(problem.params, lr=0.01), problem, name)
        theirs = _reference(case.subject, name)
        if case.subject.reference is None:  # then rates only
            ours, theirs = [o[:1] for o in ours], [t[:1] for t in theirs]
        assert ours == theirs, name
        assert len({o[0] for o in ours}) > 1, name


@each_case
def test_a_tensor_rate_is_scheduled_in_place(case: Case) -> None:
    for name in ("StepLR", "LambdaLR", "CosineAnnealingLR", "ReduceLROnPlateau"):
        problem = problem_for(case)
        rate = torch.tensor(0.01)
        kwargs: dict[str, Any] = {"foreach": False} if "foreach" in case.info.supported_impls else {}
        optimizer = case.make(problem.params, lr=rate, **kwargs)
        seen = _drive(optimizer, problem, name)
        assert optimizer.param_groups[0]["lr"] is rate, name
        assert rate.item() != 0.01, name
        assert seen[-1][0] == rate.item()


@each_case
def test_the_guard_keeps_its_scale_apart_from_the_scheduled_rate(case: Case) -> None:
    """No try can lower this loss, so the guard shrinks as far as it may: the schedule goes on from the user's rate."""
    problem = problem_for(case)
    optimizer = case.make(problem.params, lr=0.01, max_shrinks=1)
    scheduler = s.ExponentialLR(optimizer, gamma=0.5)
    height = iter(range(1, 10_000))

    def closure() -> Tensor:
        loss = problem.closure(optimizer)() + 1e6 * next(height)
        return loss.detach()

    for k in range(7):  # lazy: one try in each step
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**k)
        optimizer.step(closure)
        scheduler.step()
    scale = optimizer.param_groups[0]["step_scale"]
    assert (scale == 1.0) == (case.mode in {"off", "monitor"})


@each_case
def test_a_schedule_and_the_optimizer_resume_together(case: Case) -> None:
    runs = []
    for interrupted in (False, True):
        problem = problem_for(case)
        optimizer = case.make(problem.params, lr=0.01)
        scheduler = s.OneCycleLR(optimizer, 0.01, total_steps=8, cycle_momentum=False)
        for k in range(6):
            if interrupted and k == 3:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                optimizer = case.make(problem.params, lr=0.7)
                scheduler = s.OneCycleLR(optimizer, 0.5, total_steps=8, cycle_momentum=False)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            optimizer.step(problem.closure(optimizer))
            scheduler.step()
        runs.append((problem.values(), optimizer.param_groups[0]["lr"]))
    assert runs[0][1] == runs[1][1]
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)


@each_case
def test_schedulers_of_torchs_own_table_go_in_the_right_direction(case: Case) -> None:
    for makers in case.info.scheduler_inputs:
        problem = problem_for(case)
        optimizer = case.make(problem.params, lr=0.01)
        schedulers = [make(optimizer) for make in makers]
        before = problem.loss().item()
        for _ in range(4):
            loss = optimizer.step(problem.closure(optimizer))
            for scheduler in schedulers:
                _advance(scheduler, loss.item())
        assert problem.loss().item() < before
