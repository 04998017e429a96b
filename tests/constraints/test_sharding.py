"""Two real processes: every row of the catalogue gives on a DTensor what it gives on the whole tensor; FSDP2 training agrees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from stableopt import optim
from stableopt.constraints import L1, Constraint, L1Ball, L2Ball, Simplex
from stableopt.constraints.sharding import Sharding, is_sharded, part_like
from tests.constraints.catalogue import ROWS, name_of, random, shapes_of
from tests.constraints.rows import Row
from tests.two_processes import shared_outcomes

DTYPE = torch.float64
CHECKS: dict[str, Callable[[], None]] = {}


def check_row(row: Row, shape: tuple[int, ...], placement: Placement, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    g = row.g
    whole = (2 * random(row, shape, 1)).to(dtype)
    near = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    part = distribute_tensor(whole, mesh, [placement])
    step: float | Tensor = 0.7
    if g.diagonal and len(shape) and dtype == torch.float64:
        step = 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(3))
    p, wanted = g.prox(part, step), g.prox(whole, step)
    assert p.placements == part.placements
    full = p.full_tensor()
    assert (full.dtype, full.shape) == (dtype, wanted.shape)
    torch.testing.assert_close(full, wanted, **near)  # type: ignore[arg-type]
    torch.testing.assert_close(g.value(part).nan_to_num(), g.value(whole).nan_to_num(), rtol=1e-10, atol=1e-10)
    if isinstance(g, Constraint):
        assert g.violation(full) == g.violation(p) == 0.0
        assert row.exact is not None
        assert row.exact(full), "infeasible in exact arithmetic"
        assert abs(g.violation(part) - g.violation(whole)) <= 1e-9 * (1 + g.violation(whole))


@torch.no_grad()
def check_rows(*, first: bool) -> None:
    """Each row along its first dimension, or along its last one, replicated, and where one process has nothing."""
    mesh = init_device_mesh("cpu", (2,))
    bad = []
    for row in ROWS:
        for shape in ((5, 7), (1, 3)) if row.shapes is None else shapes_of(row)[:1]:
            ways = (Shard(0), Replicate() if shape == (1, 3) else Shard(len(shape) - 1))
            for placement in dict.fromkeys(ways):
                if first != (placement == Shard(0) and shape != (1, 3)):
                    continue
                coarse = isinstance(row.g, Constraint) and placement == Shard(0)
                for dtype in (torch.float64, torch.bfloat16) if coarse else (torch.float64,):
                    try:
                        check_row(row, shape, placement, dtype, mesh)
                    except Exception as error:  # both processes go on with the next one
                        bad.append(
                            f"{name_of(row)} {shape} {placement} {dtype}: {type(error).__name__} {str(error)[:300]}"
                        )
    assert not bad, "\n".join(bad)


CHECKS["every row"] = lambda: check_rows(first=True)
CHECKS["every row in other layouts"] = lambda: check_rows(first=False)


def check_training() -> None:
    mesh = init_device_mesh("cpu", (2,))
    settings: list[dict[str, Any]] = [
        {"constraint": L2Ball(1.0)}, {"constraint": L1Ball(1.5)}, {"prox": L1(0.05)}, {"constraint": Simplex(1.0)},
    ]  # fmt: skip
    for cls, options in ((optim.SGD, {"lr": 0.1, "momentum": 0.9}), (optim.AdamW, {"lr": 0.05})):
        for extra in settings:
            torch.manual_seed(0)
            alone = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
            spread = copy.deepcopy(alone)
            fully_shard(spread, mesh=mesh)
            a, b = (cls(m.parameters(), guard="off", **options, **extra) for m in (alone, spread))
            x, y = torch.randn(8, 7), torch.randn(8, 3)
            for _ in range(6):
                for model, optimizer in ((alone, a), (spread, b)):
                    optimizer.zero_grad()
                    (model(x) - y).square().mean().backward()
                    optimizer.step()
                for p, q in zip(alone.parameters(), spread.parameters(), strict=True):
                    torch.testing.assert_close(q.full_tensor(), p, rtol=1e-10, atol=1e-10)  # type: ignore[operator]
                    if "constraint" in extra:
                        assert extra["constraint"].violation(q.detach()) == 0.0
                        assert extra["constraint"].violation(q.full_tensor().detach()) == 0.0  # type: ignore[operator]


CHECKS["training with fully_shard"] = check_training


FURTHER = ["every row in other layouts"]
FIRST = [name for name in CHECKS if name not in FURTHER]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FIRST, tmp_path_factory)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FURTHER, tmp_path_factory)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FIRST)
def test_two_processes_give_the_same_as_one(name: str, first: list[dict[str, str]]) -> None:
    for outcome in first:
        assert not outcome[name], outcome[name][-4000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FURTHER)
def test_two_processes_in_other_layouts(name: str, further: list[dict[str, str]]) -> None:
    for outcome in further:
        assert not outcome[name], outcome[name][-4000:]


def test_without_sharding_there_is_nothing_to_do() -> None:
    x = torch.ones(2, 3)
    assert not is_sharded(x)
    assert part_like(x, torch.tensor([1.0, 2.0, 3.0]), None).shape == (2, 3)
    assert Sharding(None, (), x.shape, x.stride()).groups(None) == []
