"""The step: torch's bit for bit where the guard is off or has nothing to object to, in every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.conformance.runs import Problem, assert_same, outcome, problem_for, states, untouched
from tests.optim.conformance.subjects import CASES, MODES, Case, Subject, cases, each_case, each_subject


def _twins(case: Case, kwargs: dict[str, Any], device: torch.device, **options: Any) -> tuple[Any, Any]:
    """What ours and the reference make of the same start: parameters and states, or the class of an exception."""

    def ours() -> Any:
        problem = problem_for(case, device, **options)
        optimizer = case.make(problem.params, **kwargs)
        values = problem.run(optimizer)
        untouched(case, optimizer)
        return values, states(optimizer)

    def theirs() -> Any:
        problem = problem_for(case, device, **options)
        optimizer = case.make_reference(problem.params, **kwargs)
        return problem.run(optimizer), states(optimizer)

    expected = outcome(theirs)
    return (outcome(ours) if isinstance(expected, type) else ours()), expected


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@each_case
def test_a_run_is_that_of_the_reference_bit_for_bit(case: Case, strided: bool, device: torch.device) -> None:
    if case.subject.reference is None:
        pytest.skip("no other class takes this step")
    chosen = case.subject.inputs(device)
    for i, kwargs in enumerate(chosen[::3] if strided else chosen):
        every = case.mode == "off" or i == 0
        for implementation in case.subject.implementations(device) if every else [{}]:
            got, expected = _twins(case, kwargs | implementation, device, strided=strided)
            assert_same(got, expected, str(kwargs | implementation))


@cases("off")
def test_tensor_rates_and_capturable_steps_are_those_of_the_reference_too(case: Case, device: torch.device) -> None:
    """Where torch refuses (capturable needs an accelerator, lists of tensors take no tensor rate), ours refuses alike."""
    if case.subject.reference is None:
        pytest.skip("no other class takes this step")
    ran = 0
    for extra in ({}, {"capturable": True}):
        if extra and not case.info.has_capturable_arg:
            continue
        for implementation in case.subject.implementations(device):
            for rate in (torch.tensor(0.002, device=device), torch.tensor([0.002], device=device), 0.002):
                got, expected = _twins(case, {"lr": rate} | extra | implementation, device)
                assert_same(got, expected, str(extra | implementation))
                ran += not isinstance(expected, type)
    assert ran


@each_case
def test_a_tensor_rate_gives_the_steps_of_its_number_and_stays_the_same_object(
    case: Case, device: torch.device
) -> None:
    runs = []
    for rate in (torch.tensor(0.01), 0.01):
        problem = problem_for(case, device)
        kwargs: dict[str, Any] = {"foreach": False} if "foreach" in case.info.supported_impls else {}
        optimizer = case.make(problem.params, lr=rate, **kwargs)
        runs.append(problem.run(optimizer))
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == 0.01
        untouched(case, optimizer)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@each_case
def test_all_implementations_agree(case: Case, device: torch.device) -> None:
    chosen = case.subject.implementations(device)
    if len(chosen) == 1:
        pytest.skip("there is one implementation")
    for kwargs in case.subject.inputs(device)[-3:]:
        if isinstance(kwargs.get("lr"), torch.Tensor):
            continue
        results = []
        for implementation in chosen:
            problem = problem_for(case, device)
            optimizer = case.make(problem.params, **kwargs | implementation)
            results.append(problem.run(optimizer))
            untouched(case, optimizer)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@each_case
def test_steps_go_in_the_right_direction(case: Case, strided: bool, device: torch.device) -> None:
    if strided and case.needs_closure:
        pytest.skip("torch's LBFGS views gradients as vectors")
    inputs = case.subject.inputs(device)
    for kwargs in inputs[::3] if strided else inputs:
        problem = problem_for(case, device, strided=strided)
        optimizer = case.make(problem.params, **kwargs)
        before = problem.loss().item()
        problem.run(optimizer, 3)
        if kwargs.get("maximize"):
            assert problem.loss().item() > before, kwargs
        else:
            assert problem.loss().item() < before, kwargs
        assert problem.weight.stride() == ((1, 3) if strided else (2, 1))


@each_case
def test_a_group_with_its_own_values_steps_as_an_optimizer_of_its_own(case: Case, device: torch.device) -> None:
    if not case.info.supports_param_groups:
        pytest.skip("torch's class takes one group only")
    changed: list[dict[str, Any]] = [{"lr": 0.02}]
    if "weight_decay" in case.make([nn.Parameter(torch.ones(1, 1))]).defaults:
        changed += [{"weight_decay": 0.1}, {"lr": 0.005, "weight_decay": 0.0}]
    for own in changed:
        problem = problem_for(case, device)
        optimizer = case.make([{"params": [problem.weight]}, {"params": [problem.bias]} | own], lr=0.01)
        together = problem.run(optimizer)
        untouched(case, optimizer)

        apart = []
        for which, values in ((0, {"lr": 0.01}), (1, {"lr": 0.01} | own)):
            alone, plain = problem_for(case, device), "off"  # the guard of one would not see the other's loss
            optimizers = [
                case.make([alone.weight], guard=plain, **({"lr": 0.01} if which else values)),
                case.make([alone.bias], guard=plain, **(values if which else {"lr": 0.01} | own)),
            ]
            for _ in range(3):
                alone.closure(optimizers[0])()
                for o in optimizers:
                    o.step()
                alone.weight.grad = alone.bias.grad = None
            apart.append(alone.values()[which])
        assert_same(together, apart, str(own))


def _complex_twins(case: Case, device: torch.device, kwargs: dict[str, Any]) -> None:
    """A step on z is the step on the pair of its parts."""
    torch.manual_seed(1)
    z = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128, device=device))
    pair = nn.Parameter(torch.view_as_real(z.detach()).clone())
    target = 10 * torch.randn(3, 2, dtype=torch.complex128, device=device)

    def f(w: torch.Tensor) -> torch.Tensor:
        w = w if w.is_complex() else torch.view_as_complex(w)
        return ((w - target) * (w - target).conj()).real.sum()

    for w in (z, pair):
        optimizer = case.make([w], **kwargs)

        def closure(w: nn.Parameter = w, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = f(w)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach(), rtol=1e-9, atol=1e-10)


@each_case
def test_complex_parameters_step_as_pairs_or_are_refused_with_a_sentence(case: Case, device: torch.device) -> None:
    z = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128, device=device))

    def first_step() -> None:
        optimizer = case.make([z])
        z.grad = torch.ones_like(z)
        optimizer.step(_constant())

    if isinstance(outcome(first_step), type):
        assert case.mode != "off" or not case.info.supports_complex
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"complex|sparse"):
            first_step()
        return
    assert case.info.supports_complex or case.subject.name == "Lion"
    for kwargs in case.subject.inputs(device)[::2]:
        for implementation in case.subject.implementations(device) if case.mode == "off" else [{}]:
            if "fused" not in implementation:  # torch's one-kernel steps take no complex numbers
                _complex_twins(case, device, kwargs | implementation)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
@each_case
def test_dtypes_may_be_mixed_in_a_group(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    if case.needs_closure:
        pytest.skip("torch's LBFGS flattens all parameters into one vector")
    for implementation in case.subject.implementations(device):
        problem = problem_for(case, device, dtype=dtypes)
        optimizer = case.make(problem.params, lr=0.01, **implementation)
        before = problem.loss().item()
        problem.run(optimizer, 2)
        assert problem.loss().item() < before
        assert (problem.weight.dtype, problem.bias.dtype) == dtypes
        assert all(p.isfinite().all() for p in problem.params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@each_case
def test_devices_may_be_mixed_in_a_group(case: Case) -> None:
    if not case.info.supports_multiple_devices or case.sparse:
        pytest.skip("torch's class takes one device")
    runs = []
    for devices in (("cpu", "cpu"), ("cpu", "cuda")):
        problem = Problem()
        params = [nn.Parameter(p.detach().to(d)) for p, d in zip(problem.params, devices, strict=True)]
        optimizer = case.make(params, lr=0.01)

        def closure(params: list[nn.Parameter] = params, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = sum((p.cpu() - 10).square().sum() for p in params)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        runs.append([p.detach().cpu() for p in params])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def _constant(value: float = 1.0) -> Any:
    """A closure that changes no gradient and always returns the same loss."""
    return lambda: torch.tensor(value)


@each_case
def test_zero_gradients_move_nothing(case: Case, device: torch.device) -> None:
    """ASGD averages, and with it decays, whatever the gradient is; torch's test leaves it out, too."""
    if case.subject.name == "ASGD":
        pytest.skip("ASGD decays with zero gradients")
    for kwargs in case.subject.inputs(device):
        if kwargs.get("weight_decay"):
            continue
        problem = problem_for(case, device)
        before = problem.values()
        plain: dict[str, Any] = {"weight_decay": 0.0} if case.subject.name in {"AdamW", "Muon", "Lion"} else {}
        optimizer = case.make(problem.params, **kwargs | plain)
        for _ in range(3):
            for p in problem.params:
                p.grad = torch.zeros_like(p).to_sparse() if case.sparse else torch.zeros_like(p)
            optimizer.step(_constant())
        assert_same(problem.values(), before, str(kwargs))
        assert optimizer.last_step.verdict in {"undecided", "unobserved"}
        assert optimizer.last_step.action not in {"shrunk", "restarted", "undone"}


@each_case
def test_parameters_without_gradient_move_nothing_and_have_no_state(case: Case, device: torch.device) -> None:
    for kwargs in case.subject.inputs(device):
        problem = problem_for(case, device)
        before = problem.values()
        optimizer = case.make(problem.params, **kwargs)
        for _ in range(2):
            optimizer.step(_constant())
        assert_same(problem.values(), before, str(kwargs))
        if not case.needs_closure:
            assert not any(states(optimizer)) or case.subject.name == "Adagrad"  # which makes it with the optimizer
            optimizer.step()
            assert_same(problem.values(), before, str(kwargs))


@each_case
def test_state_is_there_after_a_step(case: Case, device: torch.device) -> None:
    problem = problem_for(case, device)
    kwargs = {"momentum": 0.9} if case.subject.name == "SGD" else {}
    optimizer = case.make(problem.params, **kwargs)
    assert not any(states(optimizer)) or case.subject.name == "Adagrad"  # which makes it with the optimizer
    problem.run(optimizer, 1)
    found = states(optimizer)[:1] if case.needs_closure else states(optimizer)  # LBFGS keeps one vector
    assert all(found)


@each_subject
def test_differentiable_steps_are_torchs_and_need_a_guard_that_is_off(subject: Subject, device: torch.device) -> None:
    if "differentiable" not in subject.info.supported_impls:
        pytest.skip("torch's class is not differentiable")
    assert subject.reference is not None
    slopes = []
    for make in (lambda p: subject.cls(p, lr=0.1, differentiable=True, guard="off"),
                 lambda p: subject.reference(p, lr=0.1, differentiable=True)):  # fmt: skip
        start = torch.tensor([[2.0, 1.0]], requires_grad=True, device=device)
        w = start.clone()
        w.retain_grad()
        optimizer = make([nn.Parameter(torch.ones(1, 2, device=device))])
        optimizer.param_groups[0]["params"] = [w]  # a constructor takes leaves only
        if subject.name == "Adagrad":
            optimizer.state[w] = next(iter(optimizer.state.values()))
        w.grad = 2 * start * start
        optimizer.step()
        slopes.append(torch.autograd.grad(w.sum(), start)[0])
    assert torch.equal(*slopes)
    if subject.name != "Rprop":  # whose first step is the sign alone
        assert (slopes[0] - 1.0).abs().max() > 0
    for mode in MODES[1:]:
        with pytest.raises(ValueError, match="differentiable"):
            subject.cls([nn.Parameter(torch.ones(1, 2))], differentiable=True, guard=mode)


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
@each_case
def test_a_gradient_scaler_drives_the_step(case: Case, overflow: bool, device: torch.device) -> None:
    """The step is that of the unscaled gradients; an overflow moves nothing and is never called a decrease."""
    if case.needs_closure or case.sparse:
        pytest.skip("torch's scaler takes neither closures nor these sparse gradients")
    fused = [i for i in case.subject.implementations(device) if "fused" in i]
    for implementation in [{}, *fused]:
        runs = []
        for scaled in (True, False):
            problem = problem_for(case, device, dtype=torch.float32)
            optimizer = case.make(problem.params, lr=0.01, **implementation)
            scaler = torch.amp.GradScaler(device.type, init_scale=128.0, enabled=scaled)
            before = problem.values()
            scaler.scale(problem.loss()).backward()
            if overflow:
                assert problem.weight.grad is not None
                problem.weight.grad.fill_(float("inf"))
            if scaled or not overflow:
                scaler.step(optimizer)
                scaler.update()
            if overflow and scaled:
                assert_same(problem.values(), before)
                assert optimizer.last_step is None or optimizer.last_step.verdict != "decreased"
                assert scaler.get_scale() == 64.0
            runs.append(problem.values())
        if not overflow:
            for a, b in zip(*runs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert not torch.equal(runs[0][0], before[0])


def test_the_table_covers_every_class_and_every_mode() -> None:
    assert len(CASES) == 16 * 5
