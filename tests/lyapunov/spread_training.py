"""Trainings over two processes that run alike with a monitor and without one: checks for ``test_distributed``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt import optim
from stableopt.lyapunov import Every, Monitor
from stableopt.lyapunov.budget import TIERS
from tests.optim.spread import (
    SPREADS,
    Net,
    Noisy,
    batches,
    inner,
    loss_of,
    mine,
    momenta,
    numbers,
    same_everywhere,
    seeded,
)

CHECKS: dict[str, Callable[[], None]] = {}

MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "SGD strict": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, guard="strict"),
    "SGD lazy": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, guard="lazy"),
}
ALL = Every(**dict.fromkeys(TIERS, 1))


def trained(
    spread: str, make: str, *, watch: bool, closed: bool, net: type[nn.Module] = Net, bad: int = -1, **settings: Any
) -> tuple[dict[str, Tensor], Monitor]:
    """Return the numbers at the end of a run, and its monitor, which has seen nothing if it was not to watch."""
    torch.manual_seed(dist.get_rank())
    model = SPREADS[spread](seeded(net))
    optimizer = MAKES[make](model.parameters())
    monitor = Monitor(model, optimizer, **{"every": ALL, "max_overhead": None, "policy": "observe", **settings})
    if watch:
        monitor.attach()
    for i, batch in enumerate(batches(5, one="lazy" in make)):
        x, y = mine(batch)
        x = x * math.nan if i == bad and dist.get_rank() == 1 else x

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, (x, y))
            loss.backward()
            return loss

        if closed:
            optimizer.step(closure)
        else:
            loss = closure()
            if watch:
                monitor.observe(loss)
            optimizer.step()
    monitor.close()
    grads = {f"{n}.grad": p.grad for n, p in inner(model).named_parameters() if p.grad is not None}
    whole = {k: (g.full_tensor() if hasattr(g, "full_tensor") else g) for k, g in grads.items()}
    return numbers(model) | momenta(model, optimizer) | whole | {"random": torch.get_rng_state()}, monitor


def check_watched(spread: str, make: str, closed: bool, net: type[nn.Module], bad: int) -> None:
    """All tiers at every step change no bit, and both processes record the same steps, verdicts and energies."""
    options: dict[str, Any] = {"closed": closed, "net": net, "bad": bad}
    alone, _ = trained(spread, make, watch=False, **options)
    watched, monitor = trained(spread, make, watch=True, **options)
    assert alone.keys() == watched.keys()
    for key, value in alone.items():
        assert torch.equal(value.nan_to_num(7.0), watched[key].nan_to_num(7.0)), key
    records = monitor.records
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    assert all(record.norms for record in records)
    if bad < 0:
        assert any(record.verdict not in {"unobserved", "nonfinite"} for record in records) == closed
        same_everywhere(
            [(r.verdict, r.energy_before, r.energy_after, r.trust, r.weight_norm, r.norms) for r in records]
        )
        same_everywhere([r.grad_norms for r in records])
        assert not closed or all(math.isfinite(r.loss) for r in records)
    else:
        same_everywhere([(r.step, r.verdict) for r in records])
        assert any(record.nonfinite for record in list(records)[bad:])
    same_everywhere([(event.step, event.channel, event.action) for event in monitor.events if event.kind == "action"])


for _spread in SPREADS:
    for _make in MAKES if _spread in {"ddp", "fsdp"} else ("AdamW",):
        CHECKS[f"{_spread} {_make} watched"] = lambda s=_spread, m=_make: check_watched(s, m, True, Net, -1)
for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} watched without a closure"] = lambda s=_spread: check_watched(s, "AdamW", False, Net, -1)
    CHECKS[f"{_spread} watched as it turns nan on one"] = lambda s=_spread: check_watched(s, "AdamW", True, Net, 2)
CHECKS["ddp watched with statistics and dropout"] = lambda: check_watched("ddp", "AdamW", True, Noisy, -1)


def check_timed() -> None:
    """Each process has a clock of its own, and yet they look at the same steps."""
    for spread in ("ddp", "fsdp"):
        _, monitor = trained(spread, "AdamW", watch=True, closed=True, max_overhead=1e-3, every=Every())
        same_everywhere([record.step for record in monitor.records])


CHECKS["watched by clocks"] = check_timed


def check_overhead() -> None:
    """A run long enough to be planned: the intervals of both processes stay the same, and shares of time are kept apart."""
    model = SPREADS["ddp"](seeded(Net))
    optimizer = MAKES["AdamW"](model.parameters())
    from stableopt.lyapunov import budget

    grace, budget.GRACE = budget.GRACE, 0.0
    try:
        with Monitor(model, optimizer, max_overhead=0.2 + 0.2 * dist.get_rank(), policy="observe") as monitor:
            for batch in batches(40):
                x, y = mine(batch)

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    optimizer.zero_grad()
                    loss = loss_of(model, (x, y))
                    loss.backward()
                    return loss

                optimizer.step(closure)
    finally:
        budget.GRACE = grace
    same_everywhere([record.step for record in monitor.records])
    assert 5 < len(monitor.records) < 40


CHECKS["watched within a share of the time"] = check_overhead
