"""Two real processes: every row of the catalogue gives on a DTensor what it gives on the whole tensor; FSDP2 training agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stableopt.constraints.sharding import Sharding, is_sharded, part_like
from tests.two_processes import in_two_processes

ROWS_CODE = """
import sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from stableopt.constraints import Constraint
from tests.constraints.catalogue import ROWS, name_of, random, shapes_of
from tests.two_processes import join, leave

torch.set_default_dtype(torch.float64)
join(*sys.argv[1:])
mesh = init_device_mesh("cpu", (2,))
bad, count = [], 0
for row in ROWS:
    g, shapes = row.g, ((5, 7), (1, 3)) if row.shapes is None else shapes_of(row)[:1]
    for shape in shapes:
        x = 2 * random(row, shape, 1)
        for placement in dict.fromkeys((Shard(0), Shard(len(shape) - 1))) if shape != (1, 3) else (Shard(0), Replicate()):
            for dtype in (torch.float64, torch.bfloat16)[: 1 + (isinstance(g, Constraint) and placement == Shard(0))]:
                try:
                    whole = x.to(dtype)
                    with torch.no_grad():
                        part = distribute_tensor(whole, mesh, [placement])
                        step = 0.7
                        if g.diagonal and len(shape) and dtype == torch.float64:
                            step = 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(3))
                        p, wanted = g.prox(part, step), g.prox(whole, step)
                        assert p.placements == part.placements, "placement"
                        full = p.full_tensor()
                        assert full.dtype == dtype and full.shape == wanted.shape, "kind"
                        near = dict(rtol=1e-11, atol=1e-11) if dtype == torch.float64 else dict(rtol=0.02, atol=0.02)
                        torch.testing.assert_close(full, wanted, **near)
                        torch.testing.assert_close(g.value(part).nan_to_num(), g.value(whole).nan_to_num(), rtol=1e-10, atol=1e-10)
                        if isinstance(g, Constraint):
                            assert g.violation(full) == 0.0 and g.violation(p) == 0.0, "infeasible"
                            assert row.exact(full), "infeasible in exact arithmetic"
                            assert abs(g.violation(part) - g.violation(whole)) <= 1e-9 * (1 + g.violation(whole)), "violation"
                    count += 1
                except Exception as error:
                    bad.append(f"{name_of(row)} {shape} {placement} {dtype}: {type(error).__name__} {str(error)[:300]}")
print(f"checked {count}")
print("\\n".join(bad))
leave(bool(bad))
"""

TRAINING_CODE = """
import copy, sys, torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import stableopt as so
from stableopt.constraints import L1, L1Ball, L2Ball, Simplex
from tests.two_processes import join, leave

torch.set_default_dtype(torch.float64)
join(*sys.argv[1:])
mesh = init_device_mesh("cpu", (2,))
for make in (lambda p, **k: so.optim.SGD(p, lr=0.1, momentum=0.9, guard="off", **k),
             lambda p, **k: so.optim.AdamW(p, lr=0.05, guard="off", **k)):
    for extra in ({"constraint": L2Ball(1.0)}, {"constraint": L1Ball(1.5)}, {"prox": L1(0.05)}, {"constraint": Simplex(1.0)}):
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        spread = copy.deepcopy(alone)
        fully_shard(spread, mesh=mesh)
        a, b = make(alone.parameters(), **extra), make(spread.parameters(), **extra)
        x, y = torch.randn(8, 7), torch.randn(8, 3)
        for _ in range(6):
            for model, optimizer in ((alone, a), (spread, b)):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            for p, q in zip(alone.parameters(), spread.parameters(), strict=True):
                torch.testing.assert_close(q.full_tensor(), p, rtol=1e-10, atol=1e-10)
                if "constraint" in extra:
                    assert extra["constraint"].violation(q.detach()) == 0.0
                    assert extra["constraint"].violation(q.full_tensor().detach()) == 0.0
leave()
"""


@pytest.mark.distributed
def test_every_row_gives_the_same_on_two_processes(tmp_path: Path) -> None:
    in_two_processes(ROWS_CODE, tmp_path)


@pytest.mark.distributed
def test_training_with_fully_shard_is_training_in_one_process(tmp_path: Path) -> None:
    in_two_processes(TRAINING_CODE, tmp_path)


def test_without_sharding_there_is_nothing_to_do() -> None:
    x = torch.ones(2, 3)
    assert not is_sharded(x)
    assert part_like(x, torch.tensor([1.0, 2.0, 3.0]), None).shape == (2, 3)
    assert Sharding(None, (), x.shape, x.stride()).groups(None) == []
