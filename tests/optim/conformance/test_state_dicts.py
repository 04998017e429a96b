"""State dicts: torch's plus ours. They round-trip, load old versions, survive files, copies and distributed checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from stableopt.constraints import L1, Box
from tests.optim.conformance.runs import Problem, assert_same, problem_for, public, states
from tests.optim.conformance.subjects import Case, cases, each_case


def _trained(case: Case, steps: int = 3, **kwargs: Any) -> tuple[Problem, Any]:
    problem = problem_for(case)
    optimizer = case.make(problem.params, **kwargs)
    problem.run(optimizer, steps)
    return problem, optimizer


def _copy_of(problem: Problem, case: Case) -> Problem:
    """The same problem at the same point, with parameters of its own."""
    other = problem_for(case)
    with torch.no_grad():
        for p, q in zip(other.params, problem.params, strict=True):
            p.copy_(q)
    return other


@each_case
def test_a_loaded_optimizer_goes_on_bit_for_bit(case: Case) -> None:
    for kwargs in case.subject.inputs():
        problem, optimizer = _trained(case, **kwargs)
        other = _copy_of(problem, case)
        second = case.make(other.params, **kwargs)
        state = copy.deepcopy(optimizer.state_dict())
        given = copy.deepcopy(state)
        second.load_state_dict(given)
        assert_same(given["state"], state["state"], str(kwargs))  # loading does not change what it is given
        assert_same(given["param_groups"], state["param_groups"], str(kwargs))
        for _ in range(3):
            problem.run(optimizer, 1)
            other.run(second, 1)
            assert_same(other.values(), problem.values(), str(kwargs))
        assert_same(second.state_dict(), optimizer.state_dict(), str(kwargs))


@each_case
def test_state_dicts_do_not_depend_on_which_tensors_the_parameters_are(case: Case) -> None:
    first, second = (_trained(case)[1].state_dict() for _ in range(2))
    assert list(first["state"]) == list(second["state"])
    assert_same(first, second)


@each_case
def test_a_checkpoint_of_the_reference_loads_and_training_goes_on_and_back_again(case: Case) -> None:
    if case.subject.reference is None:
        pytest.skip("no other class has this state")
    for kwargs in case.subject.inputs():
        extra = kwargs
        theirs = problem_for(case)
        reference = case.make_reference(theirs.params, **extra)
        theirs.run(reference, 3)
        ours = _copy_of(theirs, case)
        optimizer = case.make(ours.params, **extra)
        optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
        assert optimizer.param_groups[0]["guard"] == case.mode
        ours.run(optimizer, 2)
        theirs.run(reference, 2)
        assert_same(ours.values(), theirs.values(), str(kwargs))

        back = _copy_of(ours, case)
        again = case.make_reference(back.params, **extra)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        back.run(again, 2)
        theirs.run(reference, 2)
        assert_same(back.values(), theirs.values(), str(kwargs))


@cases("off", "strict")
def test_a_checkpoint_of_torchs_muon_loads_and_the_bound_of_ours_stays_true(case: Case) -> None:
    """The momentum is taken over, the coefficients whose composite exceeds 1 are not; and back again."""
    if case.subject.name != "Muon":
        pytest.skip("other classes take the step of the reference")
    theirs = problem_for(case)
    reference = torch.optim.Muon(theirs.params, lr=0.01, weight_decay=0.0)
    theirs.run(reference, 3)
    ours = _copy_of(theirs, case)
    optimizer = case.make(ours.params, lr=0.5)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert_same(states(optimizer), states(reference))
    for _ in range(5):
        before = ours.values()
        ours.run(optimizer, 1)
        for old, new in zip(before, ours.values(), strict=True):
            widest = max(1.0, old.shape[0] / old.shape[1]) ** 0.5  # torch's adjustment of the rate to the shape
            assert torch.linalg.matrix_norm(new - old, 2) <= 0.01 * widest * (1 + 1e-6)
    back = _copy_of(ours, case)
    again = torch.optim.Muon(back.params, lr=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    at = back.loss().item()
    back.run(again, 2)
    assert back.loss().item() < at


@each_case
def test_older_states_that_lack_later_arguments_load_and_step(case: Case) -> None:
    problem, optimizer = _trained(case)
    later = [] if case.sparse else [k for k in case.info.not_og_supported_flags if k in optimizer.param_groups[0]]
    ours = ["guard", "every", "prox", "constraint", "step_scale", "step_count", "skipped"]
    for missing in ([k] for k in [*later, *ours]):
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for key in missing:
                del group[key]
        fresh = _copy_of(problem, case)
        second = case.make(fresh.params)
        second.load_state_dict(state)
        fresh.run(second, 1)
        assert set(missing) <= set(second.param_groups[0]), missing


@each_case
def test_states_with_a_number_for_the_step_load_and_step(case: Case) -> None:
    problem, optimizer = _trained(case)
    state = copy.deepcopy(optimizer.state_dict())
    changed = 0
    for values in state["state"].values():
        if isinstance(values.get("step"), torch.Tensor):
            values["step"] = values["step"].item()
            changed += 1
    if not changed:
        pytest.skip("the state has no tensor for the step")
    other = _copy_of(problem, case)
    second = case.make(other.params)
    second.load_state_dict(state)
    other.run(second, 2)
    problem.run(optimizer, 2)
    assert_same(other.values(), problem.values())


@pytest.mark.parametrize("saved", [True, False], ids=["named", "unnamed"])
@each_case
def test_states_with_and_without_names_load_into_each_other(case: Case, saved: bool) -> None:
    problem = problem_for(case)
    names = list(zip(("w", "b"), problem.params, strict=True))
    optimizer = case.make(names if saved else problem.params)
    problem.run(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    assert ("param_names" in state["param_groups"][0]) == saved
    for named in (True, False):
        other = _copy_of(problem, case)
        pairs = list(zip(("x", "y"), other.params, strict=True))
        second = case.make(pairs if named else other.params)
        second.load_state_dict(copy.deepcopy(state))
        assert_same(states(second), states(optimizer))
        if named:
            assert second.param_groups[0]["param_names"] == (["w", "b"] if saved else ["x", "y"])
        other.run(second, 1)


@each_case
def test_states_survive_a_file_that_is_read_without_trusting_it(case: Case) -> None:
    for kwargs in case.subject.inputs()[::2]:
        problem, optimizer = _trained(case, **kwargs)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert_same(state, optimizer.state_dict(), str(kwargs))
        other = _copy_of(problem, case)
        second = case.make(other.params, **kwargs)
        second.load_state_dict(state)
        other.run(second, 2)
        problem.run(optimizer, 2)
        assert_same(other.values(), problem.values(), str(kwargs))


@each_case
def test_states_are_cast_to_the_dtype_and_device_of_the_parameters(case: Case, device: torch.device) -> None:
    """All but the step, as torch does it."""
    _, optimizer = _trained(case)
    state = copy.deepcopy(optimizer.state_dict())
    problem = problem_for(case, device, dtype=torch.float32)
    second = case.make(problem.params)
    second.load_state_dict(state)
    if case.subject.reference is not None:
        twin = problem_for(case, device, dtype=torch.float32)
        reference = case.make_reference(twin.params)
        reference.load_state_dict(copy.deepcopy(state))
        assert_same(states(second), states(reference))
    before = problem.loss().item()
    problem.run(second, 2)
    assert problem.loss().item() < before


@each_case
def test_the_checkpoint_carries_the_settings_and_the_scale_of_the_guard(case: Case) -> None:
    problem, optimizer = _trained(case)
    optimizer.param_groups[0]["step_scale"] = 0.25
    other = _copy_of(problem, case)
    second = case.make(other.params, guard="off")
    second.load_state_dict(optimizer.state_dict())
    group = second.param_groups[0]
    assert (group["guard"], group["step_scale"], group["step_count"]) == (case.mode, 0.25, 3)


@cases("off", "backtrack")
def test_regularizers_are_plain_data_in_the_state(case: Case) -> None:
    if case.subject.name in {"NAdam", "LBFGS", "SparseAdam"}:
        pytest.skip("takes no regularizer")
    problem = problem_for(case)
    optimizer = case.make(problem.params, constraint=Box(-1.0, float("inf")))
    problem.run(optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = case.make(problem_for(case).params)
    second.load_state_dict(state)
    assert second.param_groups[0]["constraint"] == Box(-1.0, float("inf"))
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["constraint"] == Box(-1.0, float("inf"))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@each_case
def test_copies_have_all_public_attributes_and_carry_on(case: Case, how: Any) -> None:
    for kwargs in case.subject.inputs():
        problem, optimizer = _trained(case, **kwargs)
        twin = how(optimizer)
        assert type(twin) is type(optimizer)
        assert public(twin) == public(optimizer), kwargs
        other = problem_for(case)
        other.weight, other.bias = twin.param_groups[0]["params"]
        problem.run(optimizer, 2)
        other.run(twin, 2)
        assert_same(other.values(), problem.values(), str(kwargs))
        twin.register_step_post_hook(lambda *_: None)
        if case.info.supports_param_groups:
            twin.add_param_group({"params": [nn.Parameter(torch.ones(1, 1))]})
            assert twin.param_groups[1]["guard"] == case.mode


class _Model(nn.Module):
    """Two matrices and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4, bias=False)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(torch.tanh(self.first(x))))


def _train(model: _Model, optimizer: Any, steps: int = 2) -> None:
    x = torch.linspace(-1, 1, 15).view(5, 3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 3.0).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@each_case
def test_distributed_checkpoints_move_nothing_and_carry_everything(case: Case, flat: bool) -> None:
    """torch creates missing state by a step with zero gradients at rate zero: it must change no weight and count no step."""
    if case.needs_closure or case.sparse:
        pytest.skip("torch's own class has no distributed checkpoint: its step needs a closure or sparse gradients")
    if case.subject.name == "Adafactor" and flat:
        pytest.skip("torch's own flat checkpoint leaves out states that some parameters lack")
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    trained, fresh = _Model(), _Model()
    optimizer = case.make([p for p in trained.parameters() if p.requires_grad], lr=0.01)
    before = [p.detach().clone() for p in trained.parameters()]
    get_optimizer_state_dict(trained, optimizer, options=options)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))
    assert optimizer.param_groups[0]["step_count"] == 0

    _train(trained, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(trained, optimizer, options=options))
    fresh.load_state_dict(trained.state_dict())
    other = case.make([p for p in fresh.parameters() if p.requires_grad], lr=0.7, guard="off")
    set_optimizer_state_dict(fresh, other, saved, options=options)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))
    assert_same(states(other), states(optimizer))
    group = other.param_groups[0]
    assert (group["lr"], group["guard"], group["step_count"]) == (0.01, case.mode, 2)
    _train(trained, optimizer)
    _train(fresh, other)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))


def test_distributed_checkpoints_carry_regularizers() -> None:
    import stableopt as so

    for regularizer in ({"prox": L1(0.1)}, {"constraint": Box(-1.0, 1.0)}):
        model = _Model()
        optimizer = so.optim.SGD(model.first.parameters(), lr=0.1, **regularizer)
        saved = get_optimizer_state_dict(model, optimizer)
        other = so.optim.SGD(model.first.parameters(), lr=0.1)
        set_optimizer_state_dict(model, other, saved)
        for key, value in regularizer.items():
            assert other.param_groups[0][key] == value
