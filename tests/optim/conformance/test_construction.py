"""Constructors: torch's signatures, torch's mistakes, torch's choice of implementation; and an import without side effects."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from tests.optim.conformance.runs import problem_for
from tests.optim.conformance.subjects import (
    AT_STEP,
    FAMILY,
    SUBJECTS,
    WRAPPED,
    Case,
    Subject,
    cases,
    each_case,
    each_subject,
)


def test_the_family_and_every_other_class_of_torch_are_tested() -> None:
    names = [subject.name for subject in SUBJECTS]
    assert names == [*FAMILY, *WRAPPED]
    torchs = {name for name, thing in vars(torch.optim).items() if inspect.isclass(thing)} - {"Optimizer"}
    assert torchs <= set(names)


@each_subject
def test_they_are_optimizers_of_torch_with_the_reference_among_their_bases(subject: Subject) -> None:
    assert issubclass(subject.cls, torch.optim.Optimizer)
    torchs = getattr(torch.optim, subject.name, None)
    if torchs is not None and subject.name != "Muon":
        assert issubclass(subject.cls, torchs)
    assert subject.cls.__name__.endswith(subject.name)


@each_subject
def test_arguments_have_the_names_the_defaults_and_the_order_of_torchs(subject: Subject) -> None:
    torchs = getattr(torch.optim, subject.name, None)
    if torchs is None:
        pytest.skip("torch has no such class")
    theirs, ours = (inspect.signature(c.__init__).parameters for c in (torchs, subject.cls))
    named = {n: p for n, p in theirs.items() if p.kind is not p.VAR_KEYWORD}
    if subject.name in WRAPPED and "args" in ours:  # a wrapper passes everything on
        return
    assert [n for n, p in ours.items() if n in named and p.kind is p.POSITIONAL_OR_KEYWORD] == [
        n for n, p in named.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    different = {n for n, p in named.items() if ours[n].default != p.default or ours[n].kind is not p.kind}
    assert different <= ({"ns_coefficients"} if subject.name == "Muon" else set())


@pytest.mark.filterwarnings("ignore:.*duplicate parameters.*")
@each_case
def test_the_mistakes_that_torch_refuses_are_refused_with_the_same_error(case: Case, device: torch.device) -> None:
    tried = 0
    for error in case.info.optim_error_inputs_func(device=str(device), dtype=torch.float64):
        given = error.optimizer_error_input
        params = [nn.Parameter(torch.randn(1, 1, device=device))] if given.params is None else given.params
        tried += 1
        if error.error_on is AT_STEP:
            early = (error.error_type, TypeError)  # a guard refuses complex numbers, which have no energy, at once
            with pytest.raises(error.error_type if case.mode == "off" else early, match=r"complex"):
                case.make(params, **given.kwargs).step()
        elif issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                case.make(params, **given.kwargs)
        else:
            try:
                with pytest.raises(error.error_type, match=error.error_regex):
                    case.make(params, **given.kwargs)
            except pytest.fail.Exception as wrong:
                raise AssertionError(f"{given.desc}: {wrong}") from wrong
    assert tried >= 6 or device.type != "cpu"


@each_case
def test_every_combination_of_torchs_arguments_can_be_printed(case: Case) -> None:
    for kwargs in case.subject.inputs():
        problem = problem_for(case)
        text = repr(case.make(problem.params, **kwargs))
        assert "Parameter Group 0" in text
        assert case.subject.name in text
        assert f"guard: {case.mode}" in text
        for key, value in kwargs.items():
            assert f"{key}: {value}" in text


@each_case
def test_parameters_may_have_names(case: Case) -> None:
    problem = problem_for(case)
    optimizer = case.make([("w", problem.weight), ("b", problem.bias)])
    assert optimizer.param_groups[0]["param_names"] == ["w", "b"]
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    before = problem.loss().item()
    problem.run(optimizer, 2)
    assert problem.loss().item() < before
    if case.info.supports_param_groups:
        extra = nn.Parameter(torch.ones(2, 2))
        with pytest.raises(ValueError, match="with/without names"):
            optimizer.add_param_group({"params": [extra]})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [("c", extra)]})
        assert optimizer.param_groups[1]["param_names"] == ["c"]


@each_case
def test_groups_may_come_as_a_generator_a_single_parameter_or_later(case: Case) -> None:
    problem = problem_for(case)
    if not case.info.supports_param_groups:
        assert case.make(p for p in problem.params).param_groups[0]["params"] == problem.params
        return
    optimizer = case.make({"params": p} for p in [problem.weight])
    optimizer.add_param_group({"params": problem.bias, "lr": 0.02})
    assert [g["lr"] for g in optimizer.param_groups] == [optimizer.defaults["lr"], 0.02]
    before = problem.values()
    problem.run(optimizer, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, problem.params, strict=True))
    assert optimizer.param_groups[1]["guard"] == case.mode


_MODULES = {"AdamW": "adam", "Adafactor": "_adafactor"}


@cases("off", "backtrack")
def test_torchs_own_implementation_does_the_step(case: Case, device: torch.device) -> None:
    """Lists of tensors by default on an accelerator and wherever they are asked for, the loop otherwise."""
    name = case.subject.name
    if "foreach" not in case.info.supported_impls:
        pytest.skip("there is one implementation")
    module = importlib.import_module(f"torch.optim.{_MODULES.get(name, name.lower())}")
    function = "adam" if name == "AdamW" else name.lower()
    plain = name == "Adafactor"  # its default is the loop everywhere
    for kwargs, expected in (
        ({}, "single" if device.type == "cpu" or plain else "multi"),
        ({"foreach": True}, "multi"),
        ({"foreach": False}, "single"),
    ):
        problem = problem_for(case, device)
        optimizer = case.make(problem.params, **kwargs)
        target = f"_{expected}_tensor_{function}"
        with mock.patch.object(module, target, wraps=getattr(module, target)) as called:
            problem.run(optimizer, 1)
        assert called.call_count == 1, (kwargs, expected)


def test_importing_torchs_table_has_left_this_process_as_it_was() -> None:
    assert not torch.backends.flags_frozen()
    assert "torch.testing" not in torch._C.ScriptFunction.__call__.__module__


@pytest.mark.slow
def test_importing_torchs_table_leaves_a_fresh_process_as_it_was() -> None:
    """In a fresh process: flags of the backends stay free to set, and generators, dtype, environment, filters stay the same."""
    program = (
        "import os, warnings, torch\n"
        "look = lambda: (torch.backends.flags_frozen(), torch.get_default_dtype(), torch.get_rng_state().sum().item(),\n"
        "    dict(os.environ),\n"
        "    torch.is_warn_always_enabled(), list(warnings.filters), torch._C.ScriptFunction.__call__,\n"
        "    torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)\n"
        "import stableopt.optim, pytest\n"
        "before = look()\n"
        "from tests.optim.conformance import subjects\n"
        "after = look()\n"
        "assert before[:3] == after[:3], (before, after)\n"
        "assert [a == b for a, b in zip(before, after)] == [True] * len(before), (before, after)\n"
        "torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled\n"
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_constructing_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for subject in SUBJECTS:
            subject.cls([nn.Parameter(torch.ones(2, 2))])
    assert not seen
