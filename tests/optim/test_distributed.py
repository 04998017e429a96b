"""Guarded optimizers in two processes: DistributedDataParallel and fully_shard take the steps that one process takes.

Both processes are started once. They run every check below in the same order and report its outcome; each check is one test here.

Each process sees one half of a batch, so losses and gradients are means over the processes. One process that computes the mean of
the two halves makes the same operations in the same order, so under DistributedDataParallel the comparison with it asks for the
same bits, of parameters and of reports. Against one process that sees the batch as a whole, sums run in another order; decisions
are still the same, and parameters agree to ``NEAR``, in float32 unless the optimizer divides by the size of its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stableopt import optim
from stableopt.constraints import Box
from stableopt.errors import StabilityError
from stableopt.optim.orthogonalize import muon_step
from tests.optim.spread import (
    CORE,
    MODES,
    NEAR,
    OPTIMIZERS,
    QUOTIENTS,
    REGULARIZERS,
    SPREADS,
    STEPS,
    WIDE,
    Batch,
    Loss,
    Net,
    Noisy,
    agree,
    batches,
    close,
    ddp,
    fsdp,
    grouped,
    inner,
    loss_of,
    mine,
    momenta,
    numbers,
    on_both_halves,
    on_my_half,
    same,
    same_everywhere,
    seeded,
    train,
    whole,
    whole_part,
)
from tests.two_processes import shared_outcomes

CHECKS: dict[str, Callable[[], None]] = {}


def check_training(spread: str, name: str, mode: str) -> None:
    make, lr = OPTIMIZERS[name]
    for factor in (1.0, 100.0):
        one, steps = mode == "lazy", 2 * STEPS if mode == "lazy" else STEPS
        if factor > 1 and mode == "monitor":
            steps = 2  # nobody holds it back, and rounding grows with it
        if name in WIDE:
            steps //= 2
        runs = []
        torch.set_default_dtype(torch.float64 if name in (*WIDE, *QUOTIENTS) else torch.float32)
        for loss, spreading in (
            (on_my_half, SPREADS[spread]),
            (on_both_halves, nn.Module.train),
            (loss_of, nn.Module.train),
        ):
            model = spreading(seeded(Net))
            optimizer = make(model.parameters(), lr=lr * factor, **MODES[mode])
            runs.append(train(model, optimizer, loss, steps, one=one))
        torch.set_default_dtype(torch.float32)
        run, halves, alone = runs
        agree(run)
        if spread == "ddp":
            assert repr(run.energies) == repr(halves.energies)
        assert run.decisions == halves.decisions
        by_parts = spread != "ddp" and name == "Muon"  # it multiplies sharded matrices part by part
        same(run.state, halves.state, NEAR if by_parts else 0.0)
        same(run.momenta, halves.momenta, NEAR if by_parts else 0.0)
        assert run.calls == alone.calls
        close(run, alone)
        actions = {decision[1] for decision in run.decisions}
        if mode != "monitor":
            assert bool(actions & {"shrunk", "restarted", "undone"}) == (factor > 1), (factor, actions)


for _spread in ("ddp", "fsdp"):
    for _name in OPTIMIZERS:
        for _mode in MODES if _name in CORE else ("strict", "lazy"):
            CHECKS[f"{_spread} {_name} {_mode}"] = lambda s=_spread, n=_name, m=_mode: check_training(s, n, m)
for _spread in ("fsdp as one", "hsdp"):
    for _name in ("SGD", "AdamW"):
        CHECKS[f"{_spread} {_name} strict"] = lambda s=_spread, n=_name: check_training(s, n, "strict")
        CHECKS[f"{_spread} {_name} lazy"] = lambda s=_spread, n=_name: check_training(s, n, "lazy")


# --- penalties and sets ---


def check_regularized(spread: str, name: str, kind: str) -> None:
    make, lr = OPTIMIZERS[name]
    set_ = REGULARIZERS[kind].get("constraint")
    for factor in (1.0, 30.0):
        runs = []
        for loss, spreading in ((on_my_half, SPREADS[spread]), (loss_of, nn.Module.train)):
            model = spreading(seeded(Net))
            optimizer = make(grouped(model, REGULARIZERS[kind]), lr=lr * factor, guard="strict")
            runs.append(train(model, optimizer, loss))
        run, alone = runs
        agree(run)
        close(run, alone)
        weights = [value for value in run.state.values() if value.ndim == 2]
        if set_ is None:
            assert any(int((w == 0).sum()) for w in weights), "the penalty does nothing"
        else:
            assert all(set_.violation(w) == 0.0 for w in weights)
            assert any(set_.violation(1.001 * w) > 0.0 for w in weights), "the set holds nothing back"
        assert any(value.abs().max() > 0 for key, value in run.momenta.items() if "momentum" in key or "exp_avg" in key)


for _spread in ("ddp", "fsdp", "hsdp"):
    for _name in ("SGD", "AdamW"):
        for _kind in REGULARIZERS if _spread != "hsdp" else ("L1", "L2Ball"):
            CHECKS[f"{_spread} {_name} {_kind}"] = lambda s=_spread, n=_name, k=_kind: check_regularized(s, n, k)


def check_outside() -> None:
    """Sharded weights that somebody moves out of their set between steps, through the tensor or its part, come back."""
    set_ = Box(-0.2, 0.2)
    for change in ("tensor", "part", "nobody"):
        model = fsdp(seeded(Net))
        optimizer = optim.SGD(model.parameters(), lr=0.02, constraint=set_)
        train(model, optimizer, on_my_half, 2)
        with torch.no_grad():
            for p in model.parameters():
                if change != "nobody":
                    (p if change == "tensor" else p.to_local()).mul_(10)  # type: ignore[attr-defined]
        train(model, optimizer, on_my_half, 1)
        reason = optimizer.last_step.reason  # type: ignore[union-attr]
        assert ("outside their sets" in reason) == (change != "nobody"), (change, reason)
        assert all(set_.violation(value) == 0.0 for value in numbers(model).values())


CHECKS["fsdp weights moved outside"] = check_outside


def check_lazy_moved() -> None:
    """A step that waits for its verdict is dropped by all processes if one of them sees that somebody has moved a parameter."""
    for change in ("tensor", "part", "one process"):
        model = (ddp if change == "one process" else fsdp)(seeded(Net))
        optimizer = optim.SGD(model.parameters(), lr=2.0, momentum=0.9, guard="lazy")
        train(model, optimizer, on_my_half, 1, one=True)
        with torch.no_grad():
            for p in model.parameters():
                if change != "one process" or dist.get_rank() == 1:
                    (p.to_local() if change == "part" else p).mul_(1.0)  # type: ignore[attr-defined]
        run = train(model, optimizer, on_my_half, 1, one=True)
        agree(run)
        assert run.decisions[0][2] == "unobserved", run.decisions


CHECKS["lazy steps of moved parameters"] = check_lazy_moved


# --- nothing is disturbed ---


def check_undisturbed(spread: str) -> None:
    """Running statistics, dropout masks and gradients are those of an unguarded run, where the guard does not act."""
    ends = []
    for mode in ("off", "strict", "monitor"):
        model = SPREADS[spread](seeded(Noisy))
        optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, guard=mode)  # type: ignore[arg-type]
        torch.manual_seed(10 + dist.get_rank())
        run = train(model, optimizer, on_my_half)
        assert run.calls == (STEPS if mode == "off" else 2 * STEPS)
        assert {d[1] for d in run.decisions} == ({"unguarded"} if mode == "off" else {"accepted"})
        grads = {str(i): whole(p.grad) for i, p in enumerate(inner(model).parameters())}
        ends.append((run.state, grads, torch.rand(3)))
    for state, grads, random in ends[1:]:
        same(state, ends[0][0])
        same(grads, ends[0][1])
        assert torch.equal(random, ends[0][2])


def check_noisy(spread: str) -> None:
    """With masks of its own in each process, decisions are one, at a learning rate at which they matter."""
    for mode in ("backtrack", "strict", "lazy"):
        model = SPREADS[spread](seeded(Noisy))
        optimizer = optim.AdamW(model.parameters(), lr=1.0, guard=mode)  # type: ignore[arg-type]
        torch.manual_seed(10 + dist.get_rank())
        run = train(model, optimizer, on_my_half)
        for part in (run.decisions, run.energies, run.calls, run.groups, run.momenta):
            same_everywhere(part)
        same_everywhere({k: v for k, v in run.state.items() if "running" not in k})
        assert {d[1] for d in run.decisions} & {"shrunk", "restarted", "undone"}


for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} undisturbed"] = lambda s=_spread: check_undisturbed(s)
    CHECKS[f"{_spread} noisy"] = lambda s=_spread: check_noisy(s)


def check_gathered_weights(spread: str) -> None:
    """Each try is judged at its own weights, and after the step, undone or not, the model computes with those it has now."""
    batch = next(batches(1))
    for lr in (0.02, 2.0, 1e30):
        model, alone = SPREADS[spread](seeded(Net)), seeded(Net)
        optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9, guard="strict")
        seen: list[float] = []

        def closure(model: Any = model, optimizer: Any = optimizer, seen: list[float] = seen) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            seen.append(float(loss))
            return loss

        optimizer.step(closure)
        assert len(set(seen)) == len(seen) or lr > 1e20, seen
        assert optimizer.last_step is not None
        assert optimizer.last_step.action == {0.02: "accepted", 2.0: "shrunk", 1e30: "undone"}[lr]
        with torch.no_grad():
            found = model(batch[0])  # before anything asks for the state, which frees what was gathered
        alone.load_state_dict(numbers(model))
        torch.testing.assert_close(found, alone(batch[0]).detach(), rtol=0, atol=0)


for _spread in ("fsdp", "fsdp as one", "hsdp"):
    CHECKS[f"{_spread} gathered weights"] = lambda s=_spread: check_gathered_weights(s)


def check_usual_closures(spread: str) -> None:
    """A closure that clips; two parts whose gradients are accumulated, synchronized once; a trial in the place of the closure."""
    ends = []
    for spreading, loss in ((SPREADS[spread], on_my_half), (nn.Module.train, loss_of)):
        model = spreading(seeded(Net))
        optimizer = optim.SGD(model.parameters(), lr=2.0, momentum=0.9, guard="strict")
        if loss is loss_of:
            optimizer.decide_with(None)
        actions = []
        for batch in batches(4):
            parts = [(batch[0][i::2], batch[1][i::2]) for i in range(2)]

            def closure(
                parts: list[Batch] = parts, model: Any = model, optimizer: Any = optimizer, loss: Loss = loss
            ) -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros(())
                for i, part in enumerate(parts):
                    if isinstance(model, nn.parallel.DistributedDataParallel):
                        model.require_backward_grad_sync = i == 1  # what no_sync does
                    elif hasattr(model, "set_requires_gradient_sync"):
                        model.set_requires_gradient_sync(i == 1)
                    value = loss(model, part) / 2
                    value.backward()
                    total = total + value.detach()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                return total

            optimizer.step(closure)
            actions.append(optimizer.last_step.action)  # type: ignore[union-attr]
        ends.append((actions, numbers(model)))
    same_everywhere(ends[0][0])
    same_everywhere(ends[0][1])
    assert ends[0][0] == ends[1][0]
    assert set(ends[0][0]) != {"accepted"}
    same(ends[0][1], ends[1][1], NEAR)
    runs = []
    for spreading, loss in ((SPREADS[spread], on_my_half), (nn.Module.train, loss_of)):
        model = spreading(seeded(Net))
        runs.append(train(model, optim.SGD(model.parameters(), lr=2.0, guard="strict"), loss, trial=True))
    agree(runs[0])
    close(*runs)


for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} usual closures"] = lambda s=_spread: check_usual_closures(s)


# --- what is not finite, and what never passes ---


def check_nonfinite(spread: str, mode: str) -> None:
    """A loss or a gradient that is NaN in one process alone: all skip, and say so."""
    for what in ("loss", "gradient", "try"):
        model = SPREADS[spread](seeded(Net))
        optimizer = optim.AdamW(model.parameters(), lr=0.003, guard=mode)  # type: ignore[arg-type]
        train(model, optimizer, on_my_half, 2, one=True)
        before, state = numbers(model), momenta(model, optimizer)
        bad, evaluations = dist.get_rank() == 1, 0

        def closure(model: Any = model, optimizer: Any = optimizer, what: str = what, bad: bool = bad) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            value = on_my_half(model, next(batches(1)))
            value.backward()
            if what == "gradient" and bad and torch.is_grad_enabled():
                p = next(p for p in model.parameters() if whole_part(p).numel())
                whole_part(p.grad).view(-1)[0] = float("nan")
            nan = what == "loss" or (what == "try" and not torch.is_grad_enabled() and evaluations == 2)
            return value.detach() * float("nan") if bad and nan else value

        optimizer.step(closure)
        report = optimizer.last_step
        same_everywhere([str(report)])
        same_everywhere(numbers(model))
        if what == "try":
            if mode != "lazy":
                assert (report.action, report.trials) == ("shrunk", 2), report  # type: ignore[union-attr]
            continue
        word = {"loss": "the loss", "gradient": "a gradient"}[what]
        if mode != "lazy":  # there the last step is judged by it, and found wanting
            assert report.verdict == "nonfinite", report  # type: ignore[union-attr]
            assert word in report.reason, report  # type: ignore[union-attr]
            assert optimizer.param_groups[0]["skipped"] == 1
            same(numbers(model), before)
            same(momenta(model, optimizer), state)
        assert report.action == "undone", report  # type: ignore[union-attr]
    if mode == "strict":
        raises = optim.SGD(model.parameters(), lr=0.01, on_nonfinite="raise")
        with pytest.raises(StabilityError, match="the loss is not finite"):
            raises.step(loss=float("nan") if dist.get_rank() == 0 else 1.0)


for _spread in ("ddp", "fsdp"):
    for _mode in ("backtrack", "strict", "lazy"):
        CHECKS[f"{_spread} nonfinite {_mode}"] = lambda s=_spread, m=_mode: check_nonfinite(s, m)


def check_never_passes(spread: str) -> None:
    """A learning rate at which every try fails."""
    for mode in ("backtrack", "strict", "lazy"):
        for lr in (1e7, 1e30):
            runs = []
            for loss, spreading in ((on_my_half, SPREADS[spread]), (loss_of, nn.Module.train)):
                model = spreading(seeded(Net))
                optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9, guard=mode)  # type: ignore[arg-type]
                runs.append(train(model, optimizer, loss, 17 if mode == "lazy" else 1, one=True))
            agree(runs[0])
            assert runs[0].decisions == runs[1].decisions
            if lr < 1e20:  # one process alone does not evaluate what has overflowed already
                assert runs[0].calls == runs[1].calls
            last = runs[0].decisions[-1][1]
            if mode == "strict" or (lr > 1e20 and mode == "backtrack"):
                assert last == "undone"
                same(runs[0].state, numbers(seeded(Net)))


for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} never passes"] = lambda s=_spread: check_never_passes(s)


# --- who decides ---


def check_who_decides() -> None:
    """Processes with models of their own decide alone; a group of one as well; unguarded steps wait for nobody."""
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    for choice in (None, groups[rank], "off"):
        torch.manual_seed(rank)
        model = Net()
        optimizer = optim.SGD(model.parameters(), lr=2.0, guard="off" if choice == "off" else "strict")
        if choice != "off":
            optimizer.decide_with(choice)
        for _ in range(1 + rank):  # another number of steps in each process
            train(model, optimizer, on_my_half, 1)
        assert optimizer.processes().size == (2 if choice == "off" else 1)
    both = optim.SGD(Net().parameters(), lr=2.0)
    assert both.processes().size == 2
    assert both.processes().device.type == "cpu"
    assert optim.agree.Processes.of(dist.group.WORLD, torch.device("cpu")).size == 2  # type: ignore[attr-defined]
    assert both.processes().total(torch.tensor([1.0 + rank], dtype=torch.float64)).tolist() == [3.0]
    assert both.processes().mean(float(rank)) == 0.5


CHECKS["who decides"] = check_who_decides


def check_shares() -> None:
    """Each entry of a parameter counts once, however it is laid out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    processes = optim.SGD(Net().parameters()).processes()
    flat = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    for w in (torch.arange(35.0).reshape(5, 7), torch.ones(1, 3)):
        for p in (
            w,
            distribute_tensor(w, flat, [Shard(0)]),
            distribute_tensor(w, flat, [Replicate()]),
            distribute_tensor(w, both, [Replicate(), Shard(0)]),
            distribute_tensor(w, both, [Shard(1), Replicate()]),
        ):
            part = processes.share(p) * whole_part(p).double().square().sum().reshape(1)
            assert float(processes.total(part)) == float(w.double().square().sum())


CHECKS["shares"] = check_shares


def check_scaler(spread: str) -> None:
    """torch.amp.GradScaler with a trial: scaled gradients, one infinite in one process's half of the batch, are skipped by both."""
    model = SPREADS[spread](seeded(Net))
    optimizer = optim.SGD(model.parameters(), lr=2.0, momentum=0.9, guard="strict")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    actions = []
    for i, batch in enumerate(batches(4)):
        half = mine(batch)
        if i == 2 and dist.get_rank() == 0:
            half = half[0], half[1] * 1e37
        optimizer.zero_grad()
        loss = loss_of(model, half)
        scaler.scale(loss).backward()
        before = numbers(model)
        scaler.step(optimizer, trial=lambda half=half: loss_of(model, half), loss=loss.detach())
        scaler.update()
        actions.append(optimizer.last_step.step)  # type: ignore[union-attr]
        if i == 2:
            same(numbers(model), before)
    same_everywhere([actions, scaler.get_scale(), optimizer.param_groups[0]["step_scale"]])
    same_everywhere(numbers(model))
    assert scaler.get_scale() == 512.0
    assert optimizer.param_groups[0]["step_scale"] < 1.0


for _spread in ("ddp", "fsdp"):
    CHECKS[f"{_spread} scaler"] = lambda s=_spread: check_scaler(s)


# --- Muon, part by part ---


def check_muon_steps() -> None:
    """A matrix in parts gets the step of the whole one, to the last bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}
    for shape in ((6, 4), (4, 7), (1, 5)):
        for placement in (Shard(0), Shard(1), Replicate()):
            torch.manual_seed(0)
            w, b, grads = torch.randn(shape), torch.zeros(shape), torch.randn(3, *shape)
            dw, db = (distribute_tensor(x.clone(), mesh, [placement]) for x in (w, b))
            for g in grads:
                muon_step([w], [g], [b], **options)
                muon_step([dw], [distribute_tensor(g, mesh, [placement])], [db], **options)
            assert dw.placements == (placement,)
            assert torch.equal(dw.full_tensor(), w), (shape, placement)


CHECKS["muon steps"] = check_muon_steps


# --- the tests ---


def is_further(name: str) -> bool:
    """Whether a check repeats with another layout or optimizer what a quick one shows."""
    words = name.split(" ")
    return (
        words[0] == "hsdp"
        or "Adagrad" in words
        or (words[0] == "fsdp" and words[1] in {"RMSprop", "Lion"})
        or ("AdamW" in words and ("as" in words or bool({"monitor", "every", "backtrack"} & set(words))))
        or ("RMSprop" in words and "strict" not in words)
    )


FIRST = [name for name in CHECKS if not is_further(name)]
FURTHER = [name for name in CHECKS if is_further(name)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FIRST, tmp_path_factory)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return shared_outcomes(__name__, FURTHER, tmp_path_factory)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FIRST)
def test_two_processes(name: str, first: list[dict[str, str]]) -> None:
    for outcome in first:
        assert not outcome[name], outcome[name][-4000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", FURTHER)
def test_two_processes_with_further_layouts_and_optimizers(name: str, further: list[dict[str, str]]) -> None:
    for outcome in further:
        assert not outcome[name], outcome[name][-4000:]
