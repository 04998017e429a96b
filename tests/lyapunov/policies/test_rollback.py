"""A rollback goes back to a snapshot bit for bit, all of it or nothing, and the training goes on from there as it did."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stableopt import optim
from stableopt.constraints import L2Ball
from stableopt.lyapunov.policies.rollback import Checkpoints
from stableopt.optim import guard
from tests.lyapunov.policies.test_refusal import Remembering
from tests.lyapunov.training import Noise
from tests.optim.test_snapshot import CLASSES, Odd, frozen, same

MAKES: dict[str, Callable[[Any], Optimizer]] = {
    f"{c.__name__} {' '.join(f'{k}={v}' for k, v in o.items())}": lambda p, c=c, o=o: c(p, lr=0.05, **o)
    for c, o in CLASSES
}
MAKES |= {
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.02),
    "a tensor as rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.05)),
    "Odd": Odd,
    "our SGD, off": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, guard="off"),
    "our AdamW, strict": lambda p: optim.AdamW(p, lr=2.0, guard="strict"),
    "our SGD, lazy": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, guard="lazy"),
    "our Lion in a ball": lambda p: optim.Lion(p, lr=0.05, constraint=L2Ball(0.5)),
    "guarded Adagrad": lambda p: guard(torch.optim.Adagrad(p, lr=5.0), guard="backtrack"),
    "guarded LBFGS": lambda p: guard(torch.optim.LBFGS(p, lr=0.1, max_iter=3)),
}


class Training:
    """A model with running statistics, dropout and noise of all generators; batches are drawn from the global one."""

    def __init__(self, make: Callable[[Any], Optimizer], schedule: Callable[[Optimizer], Any] | None = None) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        self.model = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 6), nn.Linear(6, 6), Noise(),
            nn.Linear(6, 2),
        )  # fmt: skip
        self.model[4].weight = self.model[5].weight  # tied
        self.optimizer = make(self.model.parameters())
        self.scheduler = None if schedule is None else schedule(self.optimizer)

    def step(self) -> None:
        x = torch.randn(8, 3)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = (self.model(x) - 1).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)
        if self.scheduler is not None:
            self.scheduler.step()

    def picture(self) -> Any:
        scheduler = {} if self.scheduler is None else self.scheduler.state_dict()
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        attributes = {k: v for k, v in vars(self.optimizer).items() if k in {"calls", "mean", "late", "unit"}}
        return frozen(
            [
                self.model.state_dict(), list(self.optimizer.state_dict()["state"].values()), groups, attributes,
                {k: v for k, v in scheduler.items() if not callable(v)},
                torch.get_rng_state(), random.getstate(), [*np.random.get_state()][1].tolist(),  # noqa: NPY002
            ]
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        state = [v for s in self.optimizer.state.values() if isinstance(s, dict) for v in s.values()]
        # a buffer that is assigned anew is another object after each step
        fixed = [b for name, b in self.model.named_buffers() if not name.endswith("mean") or "running" in name]
        return [*self.model.parameters(), *fixed, *(v for v in state if isinstance(v, Tensor))]


def differing(a: Any, b: Any) -> list[int]:
    return [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not same(x, y)]


QUICK = {
    "SGD momentum=0.9", "AdamW fused=True", "LBFGS", "Odd", "our SGD, off", "our AdamW, strict", "our SGD, lazy",
    "a tensor as rate",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MAKES])
@pytest.mark.parametrize("steps", [0, 2])
def test_every_optimizer_goes_back_bit_for_bit_and_then_forward_the_same_way(name: str, steps: int) -> None:
    training = Training(MAKES[name])
    for _ in range(steps):
        training.step()
    checkpoints = Checkpoints(training.model, training.optimizer)
    checkpoints.take(steps + 1)
    there, tensors = training.picture(), training.tensors()
    pictures = []
    for _ in range(2):
        training.step()
        pictures.append(training.picture())
    assert differing(pictures[0], there)
    assert checkpoints.restore(before=steps + 1) == steps + 1
    assert differing(training.picture(), there) == []
    if "LBFGS" not in name and name != "Odd":  # these make new tensors in each step
        assert all(a is b for a, b in zip(training.tensors(), tensors, strict=True))
    if name != "our SGD, lazy":  # a step that waits for its verdict is forgotten
        for picture in pictures:
            training.step()
            assert differing(training.picture(), picture) == []


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "edge": lambda o: optim.EdgeLR(
        o, lambda: sum((p.square().sum() for g in o.param_groups for p in g["params"]), torch.zeros(())), every=2
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_that_is_named_goes_back_with_its_rates_and_one_that_is_not_goes_on(name: str) -> None:
    for named in (True, False):
        training = Training(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), SCHEDULES[name])
        for _ in range(2):
            training.step()
        checkpoints = Checkpoints(training.model, training.optimizer, [training.scheduler] if named else [])
        checkpoints.take(3)
        there, pictures = training.picture(), []
        for _ in range(3):
            training.step()
            pictures.append(training.picture())
        rates = [group["lr"] for group in training.optimizer.param_groups]
        state = frozen({k: v for k, v in training.scheduler.state_dict().items() if not callable(v)})
        checkpoints.restore(before=3)
        if named:
            assert differing(training.picture(), there) == []
            for picture in pictures:
                training.step()
                assert differing(training.picture(), picture) == [] or name == "edge"  # it measures from where it is
            checkpoints.restore(before=3)  # a second time: nothing was taken out of the snapshot
            assert differing(training.picture(), there) == []
        else:
            assert [group["lr"] for group in training.optimizer.param_groups] == rates
            assert same({k: v for k, v in training.scheduler.state_dict().items() if not callable(v)}, state)
            assert differing(training.picture()[:2], there[:2]) == []


def test_a_gradient_scaler_an_average_and_a_second_optimizer_go_back_too() -> None:
    training = Training(MAKES["our SGD, off"])
    average = AveragedModel(training.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    other = nn.Linear(2, 1)
    second = torch.optim.Adam(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def step() -> None:
        second.zero_grad()
        scaler.scale(other(torch.randn(4, 2)).square().mean()).backward()
        scaler.step(second)
        scaler.update()
        training.step()
        average.update_parameters(training.model)

    def picture() -> Any:
        return [frozen(x.state_dict()) for x in (average, other, scaler)] + [frozen(second.state_dict()["state"])]

    step()
    checkpoints = Checkpoints(training.model, training.optimizer, [average, other, second, scaler, training.model])
    checkpoints.take(2)
    there, before = picture(), training.picture()
    tensors = [*average.parameters(), *(v for s in second.state.values() for v in s.values())]
    after = []
    for _ in range(3):
        step()
        after.append(picture())
    assert after[1][2]["scale"] > there[2]["scale"]
    assert [not same(a, b) for a, b in zip(after[2], there, strict=True)] == [True] * 4
    checkpoints.restore(before=9)
    assert same(picture(), there)
    assert differing(training.picture(), before) == []
    assert all(
        a is b
        for a, b in zip([*average.parameters(), *(v for s in second.state.values() for v in s.values())], tensors, strict=True)
    )  # fmt: skip
    for later in after:
        step()
        assert same(picture(), later)


# --- the ring ---


def small(k: int = 2) -> tuple[nn.Module, Optimizer, Checkpoints]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, Checkpoints(model, optimizer, k=k)


def stepped(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()


def test_the_newest_snapshot_that_is_not_later_is_taken_and_later_ones_are_dropped() -> None:
    model, optimizer, checkpoints = small(k=3)
    values = {}
    for step in range(1, 9):
        if step % 2:
            checkpoints.take(step)
            values[step] = model[0].weight.detach().clone()
        stepped(model, optimizer)
    assert checkpoints.steps == (3, 5, 7)
    assert [checkpoints.newest(s) for s in (2, 3, 4, 5, 7, 99)] == [None, 3, 3, 5, 7, 7]
    with pytest.raises(LookupError, match="no snapshot from before step 2: kept are those of steps 3, 5, 7"):
        checkpoints.restore(before=2)
    assert checkpoints.restore(before=6) == 5
    assert torch.equal(model[0].weight, values[5])
    assert checkpoints.steps == (3, 5)
    assert checkpoints.restore(before=4) == 3
    assert torch.equal(model[0].weight, values[3])
    with pytest.raises(ValueError, match="not of step 2"):
        checkpoints.take(2)


def held(checkpoints: Checkpoints) -> list[Tensor]:
    """The tensors that the snapshots hold, without those of the training."""
    found, todo, seen = [], [checkpoints._ring, checkpoints._free], set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | nn.Module | Optimizer) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, dict | list | tuple):
            todo += [*thing, *thing.values()] if isinstance(thing, dict) else thing
        elif hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    return found


def test_the_memory_is_used_again() -> None:
    model, optimizer, checkpoints = small()
    stepped(model, optimizer)

    def where() -> set[int]:
        mine = {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
        mine |= {v.data_ptr() for s in optimizer.state.values() for v in s.values()}
        return {x.data_ptr() for x in held(checkpoints) if x.dtype != torch.uint8} - mine  # random states are new

    for step in range(1, 4):
        checkpoints.take(step)
    first = where()
    assert len(first) == 2 * (
        4 * 4 + 3
    )  # in each of two: four parameters with two moments and a count, and three buffers
    for step in range(4, 9):
        stepped(model, optimizer)
        checkpoints.take(step)
    assert where() == first
    checkpoints.restore(before=7)
    checkpoints.take(9)
    assert where() == first


def test_a_frozen_model_takes_no_memory_and_a_teacher_that_moves_does() -> None:
    body, teacher, head = nn.Linear(50, 50), nn.Linear(2, 2), nn.Linear(50, 2)
    model = nn.ModuleDict({"body": body, "teacher": teacher, "head": head})
    for p in (*body.parameters(), *teacher.parameters()):
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    checkpoints = Checkpoints(model, optimizer)

    def copied() -> bool:
        return any(x.shape == (50, 50) and x is not body.weight for x in held(checkpoints))

    checkpoints.take(1)
    assert not copied()
    teacher.weight.data.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"the parameter 'teacher.weight' needs no gradient and is in no optimizer"):
        checkpoints.restore(before=1)
    checkpoints.take(2)
    there = teacher.weight.clone()
    teacher.weight.data.mul_(0.5)
    assert checkpoints.restore(before=2) == 2
    assert torch.equal(teacher.weight, there)
    assert not copied()
    named = Checkpoints(model, optimizer, [teacher])
    named.take(1)
    teacher.weight.data.mul_(0.5)
    named.restore(before=1)
    assert torch.equal(teacher.weight, there)
    checkpoints = Checkpoints(model, optimizer, [body])
    checkpoints.take(1)
    assert copied()


# --- all of it or nothing ---


class Grumpy:
    """Hands out what it goes on writing into, and takes a state at times only."""

    def __init__(self) -> None:
        self.values, self.refuses = [0], False

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values[:] = state.pop("values")
        if self.refuses:
            self.refuses = False
            raise KeyError("no")


def replaced(training: Training) -> None:
    training.model[0].weight = nn.Parameter(torch.ones(6, 3))


def reshaped(training: Training) -> None:
    training.model[0].bias.data = torch.ones(7)


def cast(training: Training) -> None:
    training.model[7].weight.data = training.model[7].weight.data.float()


def grown(training: Training) -> None:
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced, "'0.weight' of the model is another object"),
        (reshaped, r"of shape \(6,\), .* is of another kind now"),
        (cast, r"of shape \(2, 6\), torch.float64, on cpu is of another kind now"),
        (grown, "SGD has other parameters or groups than it had"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence_and_nothing_has_changed(change: Any, words: str) -> None:
    training = Training(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    counter = Grumpy()
    training.step()
    checkpoints = Checkpoints(training.model, training.optimizer, [counter])
    checkpoints.take(2)
    training.step()
    counter.values[0] = 5
    change(training)
    there = training.picture()
    with pytest.raises(RuntimeError, match=f"cannot go back to step 2: .*{words}.*Nothing has changed"):
        checkpoints.restore(before=2)
    assert differing(training.picture(), there) == []
    assert counter.values == [5]
    checkpoints.take(3)  # now it fits
    there = training.picture()
    training.model[1].running_mean.zero_()
    checkpoints.restore(before=3)
    assert differing(training.picture(), there) == []


def test_an_object_that_does_not_take_its_state_stops_it_and_nothing_has_changed() -> None:
    training = Training(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), SCHEDULES["exponential"])
    first, second = Grumpy(), Grumpy()
    first.values[0] = second.values[0] = 1
    checkpoints = Checkpoints(training.model, training.optimizer, [training.scheduler, first, second])
    checkpoints.take(1)
    training.step()
    first.values[0] = second.values[0] = 2
    second.refuses = True
    there = training.picture()
    with pytest.raises(RuntimeError, match=r"Grumpy.load_state_dict failed with KeyError: 'no'. Nothing has changed"):
        checkpoints.restore(before=1)
    assert differing(training.picture(), there) == []
    assert (first.values, second.values) == ([2], [2])
    assert checkpoints.restore(before=1) == 1
    assert (first.values, second.values) == ([1], [1])


def test_rates_that_a_scheduler_writes_as_it_takes_its_state_are_put_back() -> None:
    training = Training(MAKES["our SGD, off"], SCHEDULES["edge"])
    grumpy = Grumpy()
    checkpoints = Checkpoints(training.model, training.optimizer, [training.scheduler, grumpy])
    checkpoints.take(1)
    training.optimizer.param_groups[0]["lr"] = 0.7
    grumpy.refuses = True
    with pytest.raises(RuntimeError, match=r"Grumpy.load_state_dict failed"):
        checkpoints.restore(before=1)
    assert training.optimizer.param_groups[0]["lr"] == 0.7


def test_a_step_that_waits_for_its_verdict_is_forgotten() -> None:
    training = Training(MAKES["our SGD, lazy"])
    checkpoints = Checkpoints(training.model, training.optimizer)
    checkpoints.take(1)
    training.step()
    assert training.optimizer.pending is not None
    checkpoints.restore(before=1)
    assert training.optimizer.pending is None


def test_what_is_prepared_may_be_left() -> None:
    training = Training(MAKES["our SGD, off"], SCHEDULES["exponential"])
    checkpoints = Checkpoints(training.model, training.optimizer, [training.scheduler])
    checkpoints.take(1)
    training.step()
    there = training.picture()
    checkpoints.prepare(1).abandon()
    assert differing(training.picture(), there) == []


def test_an_interruption_leaves_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(MAKES["our SGD, off"])
    checkpoints = Checkpoints(training.model, training.optimizer)
    training.step()
    checkpoints.take(2)
    there = training.picture()
    training.step()
    ready = checkpoints.prepare(2)
    run, calls = torch._foreach_copy_, []

    def interrupted(targets: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(len(targets))
        run(targets[:1], sources[:1])
        if len(calls) == 1:
            raise KeyboardInterrupt
        run(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready.commit()
    assert len(calls) == 2
    assert differing(training.picture(), there) == []


def test_a_snapshot_that_could_not_be_taken_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, checkpoints = small()
    for step in (1, 2):
        checkpoints.take(step)
    there = model[0].weight.detach().clone()
    stepped(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            checkpoints.take(3)
    assert checkpoints.steps == (2,)  # the oldest one, whose memory was to be used, is lost
    assert checkpoints.restore(before=3) == 2
    assert torch.equal(model[0].weight, there)


def test_bad_arguments_are_refused() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="got Linear and Linear"):
        Checkpoints(model, model)  # type: ignore[arg-type]
    for k in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="k as an integer >= 1"):
            Checkpoints(model, optimizer, k=k)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"also= takes .* got int"):
        Checkpoints(model, optimizer, [3])


def test_data_that_a_module_remembers_are_not_written_into() -> None:
    model, data = Remembering(), torch.arange(16.0).reshape(8, 2)
    checkpoints = Checkpoints(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = data.clone()
    model(data[:4])
    checkpoints.take(1)
    model(data[4:])
    checkpoints.restore(before=1)
    assert torch.equal(data, kept)
    assert torch.equal(model.last, data[:4])


@pytest.mark.parametrize("named", [False, True])
def test_the_momentum_of_a_scheduler_is_as_its_learning_rate(named: bool) -> None:
    for make, key in (
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum"),
        (lambda p: torch.optim.AdamW(p, lr=0.1), "betas"),
    ):
        optimizer = make([nn.Parameter(torch.ones(1))])
        model = nn.Module()
        model.w = optimizer.param_groups[0]["params"][0]
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20)
        checkpoints = Checkpoints(model, optimizer, [scheduler] if named else [])
        checkpoints.take(1)
        before = [optimizer.param_groups[0][k] for k in ("lr", key)]
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        after = [optimizer.param_groups[0][k] for k in ("lr", key)]
        checkpoints.restore(before=1)
        assert before[1] != after[1]
        assert [optimizer.param_groups[0][k] for k in ("lr", key)] == (before if named else after)
