"""Two processes that train one model: how it is spread over them, what they run, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stableopt import optim
from stableopt.constraints import L1, Box, L2Ball, SpectralBall
from stableopt.optim import GuardedOptimizer, guard

NEAR = 3e-7
STEPS = 6


# --- models and how they are spread ---


class Net(nn.Module):
    """Uneven shards in two processes: 7 rows, 3 rows, 1 row; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(5, 7), nn.Linear(7, 3), nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * self.second(torch.tanh(self.first(x)))


class Noisy(nn.Module):
    """Running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.Linear(7, 3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """Layer by layer: the inner ones give their gathered weights back after each forward pass, the outermost keeps its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def fsdp_as_one(model: nn.Module) -> nn.Module:
    """Everything in the outermost module, which keeps its gathered weights after a forward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)  # type: ignore[return-value]


def hsdp(model: nn.Module) -> nn.Module:
    """Each shard is held by both processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


SPREADS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp, "fsdp": fsdp, "fsdp as one": fsdp_as_one, "hsdp": hsdp,
}  # fmt: skip


def inner(model: nn.Module) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, copied."""
    return {key: whole(value).detach().clone() for key, value in inner(model).state_dict().items()}


def momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": whole(value).detach().clone()
        for key, p in inner(model).named_parameters()
        for name, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


# --- batches, closures, runs ---


Batch = tuple[Tensor, Tensor]


def batches(steps: int, *, one: bool = False) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    for _ in range(steps):
        yield x, y
        if not one:
            x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)


def mine(batch: Batch) -> Batch:
    return batch[0].chunk(2)[dist.get_rank()], batch[1].chunk(2)[dist.get_rank()]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


Loss = Callable[[nn.Module, Batch], Tensor]


def on_my_half(model: nn.Module, batch: Batch) -> Tensor:
    return loss_of(model, mine(batch))


def on_both_halves(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of the losses of the halves, in the order in which processes take it: each half by itself, then the mean."""
    first, second = (loss_of(model, (x, y)) for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))
    return (first.double() + second.double()) / 2


@dataclass
class Run:
    """What a run did: decisions, energies, what it counted and where it ended."""

    decisions: list[tuple[Any, ...]]
    energies: list[tuple[float, ...]]
    calls: int
    state: dict[str, Tensor]
    momenta: dict[str, Tensor]
    groups: list[dict[str, Any]]


def train(
    model: nn.Module, optimizer: Any, loss: Loss, steps: int = STEPS, *, one: bool = False, trial: bool = False
) -> Run:
    """Train on my half of each batch with the other process, or on all of it by this one alone."""
    if loss is not on_my_half:
        optimizer.decide_with(None)
    decisions, energies = [], []
    for batch in batches(steps, one=one):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            return value

        if trial:
            value = closure()
            optimizer.step(trial=lambda batch=batch: loss(model, batch), loss=value)
        else:
            optimizer.step(closure)
        r = optimizer.last_step
        decisions.append((r.step, r.action, r.verdict, r.scale, r.trials, r.lr))
        energies.append((r.energy_before, r.energy_after, r.predicted, r.displacement, r.tolerance))
    groups = [{k: v for k, v in g.items() if k not in {"params", "prox", "constraint"}} for g in optimizer.param_groups]
    return Run(decisions, energies, inner(model).calls, numbers(model), momenta(model, optimizer), groups)


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Assert equality up to a tolerance."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def same_everywhere(thing: Any) -> None:
    """Assert that both processes hold the same bits."""
    packed = {k: v.tolist() for k, v in thing.items()} if isinstance(thing, dict) else thing
    both: list[Any] = [None, None]
    dist.all_gather_object(both, repr(packed))
    assert both[0] == both[1], both


def agree(run: Run) -> None:
    for part in (run.decisions, run.energies, run.calls, run.state, run.momenta, run.groups):
        same_everywhere(part)


def close(a: Run, b: Run, tolerance: float = NEAR) -> None:
    """Assert that two runs decided alike and ended at the same point."""
    assert a.decisions == b.decisions, f"{a.decisions}\n{b.decisions}"
    for one, other in zip(a.energies, b.energies, strict=True):
        torch.testing.assert_close(
            torch.tensor(one), torch.tensor(other), rtol=100 * tolerance, atol=10 * tolerance, equal_nan=True
        )
    same(a.state, b.state, tolerance)
    same(a.momenta, b.momenta, 30 * tolerance)


# --- optimizers, penalties and sets ---


Make = Callable[..., GuardedOptimizer]
OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "SGD": (lambda p, **k: optim.SGD(p, momentum=0.9, **k), 0.02),
    "AdamW": (lambda p, **k: optim.AdamW(p, eps=1e-3, weight_decay=0.1, **k), 0.003),
    "RMSprop": (lambda p, **k: optim.RMSprop(p, eps=0.05, momentum=0.5, **k), 0.004),
    "Lion": (lambda p, **k: optim.Lion(p, **k), 0.005),
    "Muon": (lambda p, **k: optim.Muon([q for q in p if q.ndim == 2], **k), 0.02),
    "Adagrad": (lambda p, **k: guard(torch.optim.Adagrad)(p, eps=0.05, **k), 0.01),
}
"""With a learning rate at which every step passes. An eps that is small against the gradients would multiply their rounding."""

CORE = ("SGD", "AdamW", "RMSprop")
WIDE = ("Muon",)
"""In float64, and few steps: each raises small singular values of its momentum a thousandfold, and their rounding with them."""

QUOTIENTS = ("AdamW", "RMSprop", "Adagrad")
"""In float64: where the two halves of a gradient nearly cancel, a division by its size multiplies their rounding."""

MODES: dict[str, dict[str, Any]] = {
    "backtrack": {"guard": "backtrack"},
    "strict": {"guard": "strict"},
    "lazy": {"guard": "lazy"},
    "monitor": {"guard": "monitor"},
    "every": {"guard": "backtrack", "every": 3},
}


REGULARIZERS: dict[str, dict[str, Any]] = {
    "L1": {"prox": L1(0.05)},
    "Box": {"constraint": Box(-0.2, 0.2)},
    "L2Ball": {"constraint": L2Ball(0.4)},
    "SpectralBall": {"constraint": SpectralBall(0.3)},
}


def grouped(model: nn.Module, regularizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Weights with the regularizer, one of them by a list of sets; everything else free."""
    weights = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    if "constraint" in regularizer:
        return [{"params": weights, "constraint": [regularizer["constraint"]] * len(weights)}, {"params": rest}]
    return [{"params": weights, **regularizer}, {"params": rest}]


def whole_part(x: Any) -> Tensor:
    with torch.no_grad():
        return x.to_local() if hasattr(x, "to_local") else x
