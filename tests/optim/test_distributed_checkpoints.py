"""Distributed checkpoints of guarded optimizers: settings, penalties and sets go with the state, into any layout.

Both processes are started once. They run every check below in the same order; each check is one test here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.optim.spread import (
    OPTIMIZERS,
    REGULARIZERS,
    SPREADS,
    Net,
    agree,
    grouped,
    inner,
    momenta,
    numbers,
    on_my_half,
    same,
    seeded,
    train,
)
from tests.two_processes import shared_outcomes

CHECKS: dict[str, Callable[[], None]] = {}


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups; torch makes lists of tuples when it gathers a state."""
    return [
        {k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k != "params"}
        for g in optimizer.param_groups
    ]


def check_fresh_state(spread: str) -> None:
    """torch creates missing state by a step with zero gradients and learning rate zero: it changes nothing and does not count."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for name in ("SGD", "AdamW"):
        for kind, regularizer in REGULARIZERS.items():
            model = SPREADS[spread](seeded(Net))
            optimizer = OPTIMIZERS[name][0](grouped(model, regularizer), lr=0.1, guard="strict")
            optimizer.project_()
            before, settings = numbers(model), settings_of(optimizer)
            get_optimizer_state_dict(inner(model), optimizer)
            same(numbers(model), before)
            assert settings_of(optimizer) == settings, (name, kind)
            assert all(p.grad is None for p in model.parameters())


def check_checkpoint(spread: str, name: str, *, flat: bool) -> None:
    """Through files and back into a fresh optimizer with other settings: training goes on as it would have, bit for bit."""
    import tempfile

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    make, lr = OPTIMIZERS[name]
    for kind in ("L1", "L2Ball"):
        regularizer = REGULARIZERS[kind]
        model = SPREADS[spread](seeded(Net))
        optimizer = make(grouped(model, regularizer), lr=30 * lr, guard="strict", every=2)
        train(model, optimizer, on_my_half, 5)
        folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        dcp.save(
            {
                "model": get_model_state_dict(inner(model)),
                "optimizer": get_optimizer_state_dict(inner(model), optimizer, options=options),
            },
            checkpoint_id=folder[0],
        )
        again = SPREADS[spread](seeded(Net, 1))
        other = make(grouped(again, regularizer), lr=7.0, guard="off")
        parts = {
            "model": get_model_state_dict(inner(again)),
            "optimizer": get_optimizer_state_dict(inner(again), other, options=options),
        }
        dcp.load(parts, checkpoint_id=folder[0])
        set_model_state_dict(inner(again), parts["model"])
        set_optimizer_state_dict(inner(again), other, parts["optimizer"], options=options)
        assert settings_of(other) == settings_of(optimizer), (kind, settings_of(other), settings_of(optimizer))
        same(numbers(again), numbers(model))
        same(momenta(again, other), momenta(model, optimizer))
        first, second = (train(m, o, on_my_half, 3) for m, o in ((model, optimizer), (again, other)))
        agree(second)
        assert first.decisions == second.decisions
        same(first.state, second.state)


def check_full_checkpoint(spread: str) -> None:
    """Gathered into one file that is read with weights_only, it loads into one process, and from there into any spreading."""
    import io

    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    for name in ("SGD", "AdamW"):
        make, lr = OPTIMIZERS[name]
        for regularizer in (REGULARIZERS["L1"], REGULARIZERS["L2Ball"]):
            model = SPREADS[spread](seeded(Net))
            optimizer = make(grouped(model, regularizer), lr=30 * lr, guard="strict")
            train(model, optimizer, on_my_half, 3)
            file = io.BytesIO()
            torch.save(get_optimizer_state_dict(inner(model), optimizer, options=options), file)
            file.seek(0)
            saved, weights = torch.load(file, weights_only=True), numbers(model)
            for spreading in (nn.Module.train, *SPREADS.values()):
                again = spreading(seeded(Net, 1))
                other = make(grouped(again, regularizer), lr=7.0, guard="off")
                set_model_state_dict(inner(again), dict(weights), options=options)
                set_optimizer_state_dict(inner(again), other, copy.deepcopy(saved), options=options)
                assert settings_of(other) == settings_of(optimizer), (settings_of(other), settings_of(optimizer))
                same(numbers(again), weights)
                same(momenta(again, other), momenta(model, optimizer))


for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} fresh state"] = lambda s=_spread: check_fresh_state(s)
    CHECKS[f"{_spread} full checkpoint"] = lambda s=_spread: check_full_checkpoint(s)
    for _name in ("SGD", "AdamW"):
        for _flat in (False, True):
            CHECKS[f"{_spread} checkpoint {_name}{' flat' if _flat else ''}"] = lambda s=_spread, n=_name, f=_flat: (
                check_checkpoint(s, n, flat=f)
            )


FURTHER = [name for name in CHECKS if name.endswith(("checkpoint SGD flat", "checkpoint AdamW"))]
FIRST = [name for name in CHECKS if name not in FURTHER]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FIRST, tmp_path_factory)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FURTHER, tmp_path_factory)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_two_processes(name: str, first: list[dict[str, str]]) -> None:
    for outcome in first:
        assert not outcome[name], outcome[name][-4000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FURTHER)
def test_two_processes_with_the_other_forms(name: str, further: list[dict[str, str]]) -> None:
    for outcome in further:
        assert not outcome[name], outcome[name][-4000:]
