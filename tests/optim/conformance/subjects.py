"""Who is tested: every optimizer of the family and every guarded class of torch, in every mode of the guard.

torch keeps a table of its optimizers with the hyper-parameters and the mistakes that its own tests try. It comes with the wheel;
importing it freezes the flags of ``torch.backends`` and patches scripted functions for the process, so what it changes is put back.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch.optim import Optimizer

import stableopt as so
from stableopt.optim.lion_step import PlainLion

MODES = ("off", "monitor", "lazy", "backtrack", "strict")
JUDGING = ("lazy", "backtrack", "strict")
"""The modes that act on a step whose energy rises."""

FAMILY = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Muon", "Lion")
WRAPPED = ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "LBFGS", "Rprop", "SparseAdam")

FLAGS = torch.backends.flags_frozen.__globals__
FLAG = "__allow_nonbracketed_mutation_flag"
"""Where torch keeps whether the flags of its backends may be set: its test modules forbid it for the process."""


@contextmanager
def unchanged_globals() -> Iterator[None]:
    """Put back what torch's test modules change for the whole process when they are imported."""
    flag = FLAGS[FLAG]
    scripted = (torch._C.ScriptFunction, torch._C.ScriptMethod)
    calls = [c.__call__ for c in scripted]
    random, dtype, always = torch.get_rng_state(), torch.get_default_dtype(), torch.is_warn_always_enabled()
    try:
        with mock.patch.dict(os.environ), warnings.catch_warnings():
            yield
    finally:
        FLAGS[FLAG] = flag
        for c, call in zip(scripted, calls, strict=True):
            c.__call__ = call
        torch.set_rng_state(random)
        torch.set_default_dtype(dtype)
        torch.set_warn_always(always)


with unchanged_globals():
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
        optim_db,
    )

AT_STEP = OptimizerErrorEnum.STEP_ERROR
_INFO = {info.optim_cls.__name__: info for info in optim_db}


def _lion_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs))
        for kwargs in (
            {},
            {"lr": 0.01},
            {"lr": torch.tensor(0.001)},
            {"weight_decay": 0.2},
            {"betas": (0.8, 0.95)},
            {"weight_decay": 0.1, "maximize": True},
        )
    ]


@dataclass(frozen=True)
class Subject:
    """One optimizer class.

    Args:
        name: of the class.
        cls: ours.
        reference: the class whose step ours is, bit for bit; None if there is none.
        info: torch's table row.
        always: arguments of every instance, to keep the tests short.
    """

    name: str
    cls: type[Optimizer]
    reference: type[Optimizer] | None
    info: OptimizerInfo
    always: dict[str, Any] = field(default_factory=dict)

    def inputs(self, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
        """The combinations of hyper-parameters that torch tries."""
        found = [dict(i.kwargs) for i in self.info.optim_inputs_func(device=str(device))]
        return [
            kwargs for kwargs in found if "ns_coefficients" not in kwargs
        ]  # ours are chosen so that their bound is proved

    def implementations(self, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
        """The arguments that choose the loop over parameters, lists of tensors, one kernel."""
        supported, kind = self.info.supported_impls, torch.device(device).type
        chosen: list[dict[str, Any]] = [{}]
        if "foreach" in supported:
            chosen += [{"foreach": False}, {"foreach": True}]
        if "fused" in supported and kind in self.info.supports_fused_on:
            chosen += [{"fused": True}]
        return chosen


@dataclass(frozen=True)
class Case:
    """One optimizer class in one mode of the guard."""

    subject: Subject
    mode: str

    @property
    def info(self) -> OptimizerInfo:
        return self.subject.info

    @property
    def sparse(self) -> bool:
        """Whether gradients must be sparse."""
        return self.info.only_supports_sparse_grads

    @property
    def needs_closure(self) -> bool:
        return self.info.step_requires_closure

    def make(self, params: Any, **kwargs: Any) -> Any:
        return self.subject.cls(params, **{"guard": self.mode} | self.subject.always | kwargs)

    def make_reference(self, params: Any, **kwargs: Any) -> Optimizer:
        assert self.subject.reference is not None
        return self.subject.reference(params, **self.subject.always | kwargs)


def _subjects() -> list[Subject]:
    found = []
    for name in FAMILY:
        cls = getattr(so.optim, name, None)
        if cls is None:
            continue
        reference, info = getattr(torch.optim, name, None), _INFO.get(name)
        if name == "Lion":
            reference = PlainLion
            info = OptimizerInfo(
                cls,
                optim_inputs_func=_lion_inputs,
                optim_error_inputs_func=get_error_inputs_for_all_optims,
                supported_impls=(),
                not_og_supported_flags=(),
                supports_complex=False,
            )
        if name == "Muon":  # its step is not torch's, which overshoots by a fifth
            reference = None
        assert info is not None
        found.append(Subject(name, cls, reference, info))
    guard = getattr(so.optim, "guard", None)
    if isinstance(guard, type(_subjects)):
        for name in WRAPPED:
            short = {"max_iter": 3} if name == "LBFGS" else {}
            torchs = getattr(torch.optim, name)
            found.append(Subject(name, guard(torchs), torchs, _INFO[name], always=short))
    return found


SUBJECTS = _subjects()
CASES = [Case(subject, mode) for subject in SUBJECTS for mode in MODES]

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


def _param(case: Case) -> Any:
    """A case; of the classes that ``guard`` makes, which share their code, three modes are looked at in the longer run only."""
    late = case.mode in {"monitor", "lazy", "strict"} and case.subject.cls.__module__ == so.optim.guard.__module__
    return pytest.param(case, id=f"{case.subject.name}-{case.mode}", marks=[pytest.mark.slow] if late else [])


each_case = pytest.mark.parametrize("case", [_param(case) for case in CASES])


def cases(*modes: str) -> pytest.MarkDecorator:
    """Parametrize over the classes in these modes."""
    return pytest.mark.parametrize("case", [_param(case) for case in CASES if case.mode in modes])
