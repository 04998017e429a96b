"""One test for each mistake that a user can make with an optimizer, numbered as in the project's table of bad input: arguments."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import stableopt as so
from stableopt.constraints import L1, Box
from tests.optim.conformance.runs import assert_same, outcome, problem_for, states
from tests.optim.conformance.subjects import MODES, Case, Subject, cases, each_case, each_subject


def _parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2))


@each_subject
def test_row_01_a_negative_rate_is_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"(?i)(lr|learning rate).*-1"):
        subject.cls([_parameter()], lr=-1)


@each_subject
def test_row_02_a_rate_that_is_no_number_is_refused(subject: Subject) -> None:
    for rate in (math.nan, torch.tensor(math.nan)):
        with pytest.raises(ValueError, match=r"(?i)(lr|learning rate).*nan"):
            subject.cls([_parameter()], lr=rate)


@each_subject
def test_row_03_an_infinite_rate_is_refused(subject: Subject) -> None:
    for rate in (math.inf, torch.tensor(math.inf)):
        with pytest.raises(ValueError, match=r"(?i)(lr|learning rate).*inf"):
            subject.cls([_parameter()], lr=rate)


@each_subject
def test_row_04_a_rate_of_another_type_is_refused_by_name(subject: Subject) -> None:
    for rate in (True, "0.1", None, [0.1]):
        if rate is None and subject.name == "Adafactor":
            continue  # torch documents None there
        with pytest.raises(TypeError, match=r"\blr\b"):
            subject.cls([_parameter()], lr=rate)


@each_subject
def test_row_04_a_group_with_such_a_rate_is_refused_and_not_added(subject: Subject) -> None:
    if not subject.info.supports_param_groups:
        pytest.skip("torch's class takes one group only")
    optimizer = subject.cls([_parameter()], lr=0.1)
    for rate, error in ((-1.0, ValueError), (math.nan, ValueError), (True, TypeError), ("0.1", TypeError)):
        with pytest.raises(error, match=r"(?i)lr|learning rate"):
            optimizer.add_param_group({"params": [_parameter()], "lr": rate})
        assert len(optimizer.param_groups) == 1


@each_case
def test_row_05_a_rate_of_zero_moves_nothing(case: Case) -> None:
    if case.sparse:
        pytest.skip("torch's SparseAdam refuses a rate of zero")
    if case.subject.name == "Rprop":
        pytest.skip("lr is only the first step size of Rprop, whose step sizes have a least value")
    problem = problem_for(case)
    before = problem.values()
    optimizer = case.make(problem.params, lr=0.0)
    problem.run(optimizer, 3)
    assert_same(problem.values(), before)
    assert optimizer.last_step.verdict in {"undecided", "unobserved"}
    assert optimizer.last_step.action not in {"undone", "restarted", "shrunk"}


@each_case
def test_row_06_a_rate_may_be_a_tensor_with_one_element_only(case: Case) -> None:
    for rate in (torch.tensor(0.01), torch.tensor([0.01])):
        problem = problem_for(case)
        before = problem.loss().item()
        problem.run(case.make(problem.params, lr=rate), 2)
        assert problem.loss().item() < before
    for rate in (torch.full((2,), 0.01), torch.zeros(0)):
        with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
            case.make([_parameter()], lr=rate)


def test_row_07_a_rate_above_the_proved_limit_is_treated_by_policy() -> None:
    """The message has the limit and says how it was computed."""
    for policy in ("raise", "clip", "warn"):
        w = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = so.optim.SGD([w], lr=10.0, momentum=0.5, smoothness=1.0, over_limit=policy, guard="strict")

        def closure(w: nn.Parameter = w, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = 0.5 * w.square().sum()
            loss.backward()
            return loss

        if policy == "raise":
            with pytest.raises(so.errors.StabilityError, match=r"lr 10 .*exceeds 1\b.*smoothness"):
                optimizer.step(closure)
            assert w.tolist() == [3.0, -2.0]
            continue
        if policy == "warn":
            with pytest.warns(UserWarning, match=r"exceeds 1\b"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
            assert optimizer.last_step.lr == (1.0,)
            torch.testing.assert_close(w.detach(), torch.zeros(2))
        assert optimizer.param_groups[0]["lr"] == 10.0
        assert optimizer.last_step.energy_after <= optimizer.last_step.energy_before
    below = so.optim.SGD([_parameter()], lr=0.99, momentum=0.5, smoothness=1.0, over_limit="raise")
    below.step(lambda: torch.tensor(0.0))


@each_subject
def test_row_08_a_momentum_outside_its_interval_is_refused(subject: Subject) -> None:
    defaults = subject.cls([_parameter()]).defaults
    tried = 0
    if "momentum" in defaults:
        for value in (-0.1, 1.0, 1.5, math.nan):
            tried += 1
            with pytest.raises(ValueError, match=r"(?i)momentum"):
                subject.cls([_parameter()], momentum=value)
    if "betas" in defaults:
        good = defaults["betas"][0]
        for betas in ((1.0, 0.9), (-0.1, 0.9), (math.nan, 0.9), (good, 1.0), (good, -0.1), (good, math.nan)):
            tried += 1
            with pytest.raises(ValueError, match=r"(?i)beta"):
                subject.cls([_parameter()], betas=betas)
    if not tried:
        pytest.skip("has no momentum")


@each_subject
def test_row_09_a_negative_decay_or_penalty_is_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"-0\.5|-1"):
        L1(-0.5)
    if "weight_decay" not in subject.cls([_parameter()]).defaults:
        pytest.skip("has no weight decay")
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"(?i)weight.decay"):
            subject.cls([_parameter()], weight_decay=value)


@each_subject
def test_row_10_no_parameters_are_refused(subject: Subject) -> None:
    used = iter([_parameter()])
    next(used)
    for nothing in ([], used):
        with pytest.raises(ValueError, match="empty parameter list"):
            subject.cls(nothing)


@each_subject
def test_row_11_a_parameter_twice_is_a_warning_in_a_group_and_an_error_in_two(subject: Subject) -> None:
    p = _parameter()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        subject.cls([p, p])
    with pytest.raises(ValueError, match=r"more than one parameter group"):
        subject.cls([{"params": [p]}, {"params": [p]}])


@each_subject
def test_row_12_a_tensor_that_is_computed_from_others_is_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="non-leaf"):
        subject.cls([_parameter() * 2])


@each_subject
def test_row_13_integers_and_truth_values_are_no_parameters(subject: Subject) -> None:
    for dtype in (torch.int64, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match=f"floating.*{dtype}"):
            subject.cls([nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)])


@each_subject
def test_row_14_complex_parameters_are_refused_with_a_sentence_where_they_have_no_metric(subject: Subject) -> None:
    """What is not refused steps as a pair of real parameters: see the tests of steps."""
    z = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))
    accepted = []
    for mode in MODES:
        result = outcome(lambda mode=mode: subject.cls([z], guard=mode))
        if isinstance(result, type):
            with pytest.raises((TypeError, ValueError, RuntimeError), match=r"complex"):
                subject.cls([z], guard=mode)
        else:
            accepted.append(mode)
    assert "off" in accepted or not subject.info.supports_complex


@each_case
def test_row_31_a_group_may_come_in_the_middle_of_a_run(case: Case) -> None:
    if not case.info.supports_param_groups:
        pytest.skip("torch's class takes one group only")
    problem = problem_for(case)
    optimizer = case.make([problem.weight], lr=0.01)
    problem.run(optimizer, 2)
    first = problem.bias.detach().clone()
    optimizer.add_param_group({"params": [problem.bias]})
    for key in ("guard", "every", "armijo", "step_scale", "step_count"):
        assert optimizer.param_groups[1][key] == optimizer.param_groups[0][key]
    problem.run(optimizer, 3)
    assert not torch.equal(problem.bias, first)
    assert optimizer.last_step.verdict == ("unobserved" if case.mode == "off" else "decreased")


@each_subject
def test_row_33_a_state_of_another_optimizer_is_refused_with_the_keys_that_it_lacks(subject: Subject) -> None:
    other = torch.optim.ASGD if subject.name == "Lion" else torch.optim.SGD
    if subject.name == "SGD":
        other = torch.optim.Adadelta
    optimizer = subject.cls([_parameter()])
    own = set(optimizer.defaults) - set(subject.info.not_og_supported_flags)
    foreign = other([_parameter()], lr=0.25)
    lacking = sorted(k for k in own - set(foreign.defaults) if k in _torch_defaults(subject))
    if not lacking:
        pytest.skip("every hyper-parameter is in the other state")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=lacking[0]):
        optimizer.load_state_dict(foreign.state_dict())
    assert_same(optimizer.state_dict(), before)


def _torch_defaults(subject: Subject) -> set[str]:
    torchs = getattr(torch.optim, subject.name, None)
    return {"betas", "weight_decay"} if torchs is None else set(torchs([_parameter()]).defaults)


@each_subject
def test_row_33_a_state_without_the_rate_is_refused_and_changes_nothing(subject: Subject) -> None:
    optimizer = subject.cls([_parameter()], lr=0.125)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["lr"]
    with pytest.raises(ValueError, match=r"\blr\b"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.125


@each_subject
def test_row_33_a_state_with_other_groups_or_sizes_is_refused(subject: Subject) -> None:
    optimizer = subject.cls([_parameter()])
    state = optimizer.state_dict()
    for wrong in (
        {"state": {}, "param_groups": state["param_groups"] * 2},
        {"state": {}, "param_groups": [state["param_groups"][0] | {"params": [0, 1]}]},
    ):
        with pytest.raises(ValueError, match="group"):
            optimizer.load_state_dict(wrong)


@each_case
def test_row_34_copies_and_pickles_work_with_settings_and_regularizers(case: Case) -> None:
    problem = problem_for(case)
    plain = case.subject.name in {"NAdam", "LBFGS", "SparseAdam"}
    extra: dict[str, Any] = {} if plain else {"constraint": Box(-100.0, 100.0)}
    optimizer = case.make(problem.params, max_shrinks=3, **extra)
    problem.run(optimizer, 2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        group = twin.param_groups[0]
        assert (group["guard"], group["max_shrinks"]) == (case.mode, 3)
        assert group["constraint"] == extra.get("constraint")
        assert_same(states(twin), states(optimizer))
        assert twin.param_groups[0]["params"][0] is not problem.weight


@cases("off")
def test_row_36_flags_that_exclude_each_other_are_refused(case: Case) -> None:
    supported = case.info.supported_impls
    if "fused" in supported:
        for flags in ({"fused": True, "foreach": True}, {"fused": True, "differentiable": True}):
            with pytest.raises(RuntimeError, match="fused"):
                case.make([_parameter()], **flags)
    for flag in ("foreach", "fused", "capturable", "differentiable"):
        known = flag in supported or (flag == "capturable" and case.info.has_capturable_arg)
        result = outcome(lambda flag=flag: case.make([_parameter()], **{flag: True}))
        if not known and flag not in case.make([_parameter()]).defaults:
            assert result in {TypeError, ValueError}, (flag, result)
        elif flag in supported:
            assert not isinstance(result, type), (flag, result)


@each_subject
def test_settings_of_the_guard_out_of_range_are_refused_by_name(subject: Subject) -> None:
    for settings, error in (
        ({"guard": "loud"}, ValueError),
        ({"every": 0}, ValueError),
        ({"max_shrinks": -1}, ValueError),
        ({"shrink": 1.0}, ValueError),
        ({"grow": 0.5}, ValueError),
        ({"armijo": math.nan}, ValueError),
        ({"on_nonfinite": "ignore"}, ValueError),
        ({"over_limit": "ignore"}, ValueError),
        ({"smoothness": -1.0}, ValueError),
        ({"constraint": 3.0}, TypeError),
        ({"prox": "l1"}, TypeError),
        ({"no_such_setting": 1}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(settings))):
            subject.cls([_parameter()], **settings)


def test_coefficients_that_muon_cannot_prove_are_refused() -> None:
    with pytest.raises(ValueError, match="ns_coefficients"):
        so.optim.Muon([_parameter()], ns_coefficients=(3.4, -4.7, 2.0))
