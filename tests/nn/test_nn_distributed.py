"""Limited models in two processes: DistributedDataParallel and fully_shard train what one process trains, within the same limits.

Both processes are started once. They run every check below in the same order and report its outcome; each check is one test here.

In two processes the gradient is the mean of those of the two halves of a batch. One process that computes the same two halves with
two copies of the model and takes their mean makes the same operations in the same order (a division by 2 is exact, and the sum of
two numbers does not depend on their order), so the comparison asks for the same bits. Against one process that sees the batch as a
whole, sums run in another order; each gradient then differs by a few units of rounding, and a few steps of a smooth map multiply
that by a moderate number: 1e-12 is some 5000 units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stableopt import optim
from stableopt.errors import UncertifiableError
from stableopt.lyapunov import Every, Monitor
from stableopt.nn import (
    METHODS,
    SLL,
    AntisymmetricCell,
    AveragedResidual,
    CompensatedPair,
    DissipativeBlock,
    GradientBlock,
    GradientField,
    Householder,
    LastStep,
    LinearSpline,
    ProximalBlock,
    Recurrence,
    ResidualStack,
    RungeKuttaBlock,
    Sandwich,
    SkewBlock,
    StateSpaceStack,
    TransformerBlock,
    UnitRowLinear,
    export,
    lipschitz,
    parameter_groups,
    plain_state_dict,
    release,
    stabilize,
    table,
)
from stableopt.nn.slots import find_slots
from tests.nn.methods import LIMIT, MODELS, dense, limited, norm_of, takers
from tests.nn.zoo import Recur
from tests.two_processes import shared_outcomes

STEPS = 3
DTYPE = torch.float64
CHECKS: dict[str, Callable[[], None]] = {}
QUICK = (
    "power linear", "gram linear", "cholesky", "layers", "learned", "projection", "reading", "refusals", "monitor", "recurrent",
)  # fmt: skip
"""How the names of the checks begin that run by default; of those in one piece, only the first."""


def layered() -> nn.Sequential:
    """Layers that are limited by themselves. Slopes of a spline at their limit would have a gradient that is no sum of samples."""
    model = nn.Sequential(
        SLL(9, 5),
        GradientBlock(9, 4),
        AveragedResidual(Sandwich(9, 9)),
        Householder(9, group_size=3),
        LinearSpline(9),
        UnitRowLinear(9, 2),
    )
    nn.init.uniform_(model[4].slopes, -0.9, 0.9)  # type: ignore[arg-type]
    return model


def stepped() -> nn.Sequential:
    """Blocks and cells that compute a step, a rotation or a factor of their own from their parameters."""
    block = nn.Sequential(nn.Linear(9, 9), nn.Tanh())
    return nn.Sequential(
        GradientBlock(9, 4, bound="rows"),
        DissipativeBlock(9),
        RungeKuttaBlock(GradientField(9)),
        ResidualStack([block], budget=2.0),
        CompensatedPair(GradientBlock(9, strong=0.5), nn.Linear(9, 9)),
        ProximalBlock(9),
        SkewBlock(9),
        nn.Unflatten(1, (3, 3)),
        TransformerBlock(3, depth=2),
        StateSpaceStack(3, 4, 4, 2, 3),
        Recurrence(AntisymmetricCell(3, 4)),
        LastStep(),
        UnitRowLinear(4, 2),
    )


def batches(steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(6, 9, generator=generator), torch.randn(6, 2, generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


Spread = Callable[[nn.Sequential], nn.Module]


def wrapped(model: nn.Sequential) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Sequential) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def sharded_as_one(model: nn.Sequential) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))  # type: ignore[return-value]


SPREADS: dict[str, Spread] = {"ddp": wrapped, "fsdp": sharded, "fsdp as one": sharded_as_one}


def train_spread(model: nn.Module) -> None:
    """Train on the half of each batch that belongs to this process."""
    opt = sgd(model)
    for x, y in batches():
        opt.zero_grad()
        loss_of(model, x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]).backward()
        opt.step()


def train_halves(model: nn.Module) -> None:
    """Train in this process with the mean of the gradients of the two halves, each computed by a model of its own."""
    other = copy.deepcopy(model)
    opts = sgd(model), sgd(other)
    for x, y in batches():
        for half, part in enumerate((model, other)):
            part.zero_grad()
            loss_of(part, x.chunk(2)[half], y.chunk(2)[half]).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad = q.grad = (p.grad / 2) + (q.grad / 2)
        for opt in opts:
            opt.step()


def train_whole(model: nn.Module) -> None:
    opt = sgd(model)
    for x, y in batches():
        opt.zero_grad()
        loss_of(model, x, y).backward()
        opt.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in inner.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def same_everywhere(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        both = [torch.empty_like(value), torch.empty_like(value)]
        dist.all_gather(both, value.contiguous())
        assert torch.equal(both[0], both[1]), key


def check_training(
    make: Callable[[], nn.Sequential], spread: Spread, norm: str, limit: float = LIMIT, tolerance: float = 0.0
) -> None:
    template = make()
    model, halves, whole, alone, fresh = (copy.deepcopy(template) for _ in range(5))
    start = template.state_dict()
    training = spread(model)
    train_spread(training)
    train_halves(halves)
    train_whole(whole)
    state = full(training)
    same_everywhere(state)
    assert not any(torch.equal(value, start[key]) for key, value in state.items() if "original" in key), (
        "nothing was learned"
    )
    same(state, full(halves), tolerance)
    # the vectors of a power step are not compared: those of equal singular values may turn
    parameters = dict(whole.named_parameters())
    same({k: v for k, v in state.items() if k in parameters}, {k: v.detach() for k, v in parameters.items()}, 1e-12)
    # the state dict is that of the plain model: it can be loaded without any distribution, and back
    alone.load_state_dict(state)
    x = next(batches())[0]
    training.eval()
    torch.testing.assert_close(training(x), alone.eval()(x), rtol=0, atol=0)
    for found in [alone, training.module] if isinstance(training, nn.parallel.DistributedDataParallel) else [alone]:
        assert_within(found, norm, limit)
    again = spread(fresh)
    load_full(again, state)
    torch.testing.assert_close(again.eval()(x), alone(x), rtol=0, atol=0)
    train_spread(again.train())  # goes on


def assert_within(model: nn.Module, norm: str, limit: float) -> None:
    """The limit is proved for the exported numbers: of the model, or of each weight where no bound of the whole follows."""
    if any(isinstance(part, nn.RNNBase) for part in model.modules()):
        plain = {slot.key: slot for slot in find_slots(export(model))}
        for row in table(model).rows:
            slot = plain[row.name]
            assert all(slot.geometry.proved(part).upper <= limit for part in slot.matrices(slot.value))
    else:
        assert lipschitz(export(model), norm).upper <= limit


def load_full(model: nn.Module, state: dict[str, Tensor]) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=True))
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    same(dict(found), state)


for _method in METHODS:
    for _how, _spread in SPREADS.items():
        for _kind in MODELS:
            if _method in takers(_kind) and (_how != "fsdp as one" or _method in {"power", "gram", "bro"}):
                CHECKS[f"{_method} {_kind} {_how}"] = lambda m=_method, s=_spread, k=_kind: check_training(
                    lambda: limited(m, k), s, norm_of(m)
                )
for _how, _spread in SPREADS.items():
    CHECKS[f"layers {_how}"] = lambda s=_spread: check_training(lambda: seeded(layered), s, "l2", 10.0)
    CHECKS[f"stepped {_how}"] = lambda s=_spread: check_training(lambda: seeded(stepped), s, "l2", 1e6, tolerance=1e-12)
    CHECKS[f"learned budget {_how}"] = lambda s=_spread, t=1e-12 * (_how == "fsdp"): (
        check_training(  # sums gradients per layer
            lambda: limited("gram", budget="learned"), s, "l2", tolerance=t
        )
    )


def check_recurrent(spread: Spread) -> None:
    def make() -> nn.Sequential:
        model = nn.Sequential(
            nn.Unflatten(1, (3, 3)),
            nn.Sequential(Recur(nn.GRU(3, 5, batch_first=True))),
            nn.Flatten(),
            nn.Linear(15, 2),
        )
        return stabilize(model, radius=0.7, method="gram")  # type: ignore[return-value]

    def inner_first(model: nn.Sequential) -> nn.Module:
        if spread is sharded:  # the layer whose forward map reads its own weights
            spread(model[1][0])  # type: ignore[index, arg-type]
        return spread(model)

    check_training(lambda: seeded(make), inner_first, "l2", 0.7)


for _how, _spread in SPREADS.items():
    CHECKS[f"recurrent {_how}"] = lambda s=_spread: check_recurrent(s)


def seeded(make: Callable[[], nn.Sequential]) -> nn.Sequential:
    torch.manual_seed(0)
    return make()


def check_projection(spread: Spread) -> None:
    """Weights that an optimizer of this package projects after each step."""
    torch.manual_seed(0)
    alone = stabilize(dense(), LIMIT, by="projection")
    model = copy.deepcopy(alone)
    training = spread(model)  # type: ignore[arg-type]
    groups = parameter_groups(model, lr=0.3)
    if not isinstance(training, nn.parallel.DistributedDataParallel):
        groups = parameter_groups(training, lr=0.3)
    a, b = optim.SGD(parameter_groups(alone, lr=0.3), guard="off"), optim.SGD(groups, guard="off")
    for x, y in batches():
        a.zero_grad()
        loss_of(alone, x, y).backward()
        a.step()
        b.zero_grad()
        loss_of(training, x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]).backward()
        b.step()
    same_everywhere(full(training))
    same(full(training), full(alone), 1e-12)
    alone.load_state_dict(full(training))
    assert lipschitz(alone).upper <= LIMIT * (1 + 1e-12)


for _how, _spread in SPREADS.items():
    CHECKS[f"projection {_how}"] = lambda s=_spread: check_projection(s)


def check_reading() -> None:
    """Between forward maps the weights can be read, by all processes together, with their gradients and norms."""
    for method in ("power", "gram", "bro", "cayley"):
        alone = limited(method)
        model = sharded(limited(method))
        for i in (0, 2, 4, 6):
            torch.testing.assert_close(model[i].weight, alone[i].weight, rtol=0, atol=0)  # type: ignore[index]
        assert (a := str(table(model)).splitlines()) == (b := str(table(alone)).splitlines()), f"{a} {b}"
        alone[0].weight.square().sum().backward()  # a penalty  # type: ignore[operator, union-attr]
        model[0].weight.square().sum().backward()  # type: ignore[index]
        for p, q in zip(alone[0].parameters(), model[0].parameters(), strict=True):  # type: ignore[index]
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-12, atol=1e-12)
        model(next(batches())[0]).sum().backward()  # the storage can still be freed and gathered
        model.eval()
        model(next(batches())[0]).sum().backward()


CHECKS["reading sharded weights"] = check_reading


def check_refusals() -> None:
    """What needs all numbers in one process says how to get them there."""
    model = sharded(limited("gram"))
    for ask, kind in (
        (lipschitz, UncertifiableError),
        (export, ValueError),
        (release, ValueError),
        (plain_state_dict, ValueError),
    ):
        with pytest.raises(kind, match=r"sharded by fully_shard.*get_model_state_dict.*full_state_dict=True"):
            ask(model)  # type: ignore[operator]
    with pytest.raises(ValueError, match="sharded already: constrain the model before fully_shard"):
        stabilize(sharded(dense()), 1.0)
    wrapper = wrapped(plain := dense())
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*wrap it afterwards"):
        stabilize(plain, 1.0)
    train_spread(wrapper)
    train_spread(model)


CHECKS["refusals"] = check_refusals


def check_monitor() -> None:
    for method in ("power", "gram"):
        for spread in SPREADS.values():
            model, plain = spread(limited(method)), spread(limited(method))
            opt = sgd(model)
            with Monitor(model, opt, every=Every(layers=2), max_overhead=None) as monitor:
                for x, y in batches():

                    def closure(
                        x: Tensor = x, y: Tensor = y, model: nn.Module = model, opt: torch.optim.Optimizer = opt
                    ) -> Tensor:
                        opt.zero_grad()
                        loss = loss_of(model, x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()])
                        loss.backward()
                        return loss

                    opt.step(closure)
            train_spread(plain)
            same(full(model), full(plain))  # watched or not, the same bits
            last = monitor.records[2]
            assert last.step == 3
            assert last.verdict == "decreased"
            assert len(last.norms) == 4
            assert all(value <= last.limits[key] * (1 + 1e-9) for key, value in last.norms.items())


CHECKS["monitor"] = check_monitor


def check_compiled() -> None:
    model, alone = limited("gram"), limited("gram")
    training = torch.compile(wrapped(model), backend="eager")
    opt = sgd(model)
    for x, y in batches():
        opt.zero_grad()
        loss_of(training, x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]).backward()
        opt.step()
    train_halves(alone)
    same_everywhere(full(model))
    same(full(model), full(alone), 1e-12)


CHECKS["compiled ddp"] = check_compiled


def check_two_forwards() -> None:
    """Two forward maps before one backward, with a graph that does not change."""
    for method in ("power", "cayley"):
        training = nn.parallel.DistributedDataParallel(limited(method), static_graph=True)
        opt = sgd(training)
        for x, y in batches():
            mine, target = x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]
            opt.zero_grad()
            (loss_of(training, mine, target) + loss_of(training, -mine, target)).backward()
            opt.step()
        same_everywhere(full(training))
        assert lipschitz(export(training.module), norm_of(method)).upper <= LIMIT


CHECKS["two forwards ddp"] = check_two_forwards


FIRST = [
    name for name in CHECKS if name.startswith(QUICK) and (not name.endswith("as one") or name.startswith("power"))
]
OTHERS = [name for name in CHECKS if name not in FIRST]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FIRST, tmp_path_factory)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, OTHERS, tmp_path_factory)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_two_processes(name: str, first: list[dict[str, str]]) -> None:
    for outcome in first:
        assert not outcome[name], outcome[name][-4000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_with_the_other_methods(name: str, others: list[dict[str, str]]) -> None:
    for outcome in others:
        assert not outcome[name], outcome[name][-4000:]
