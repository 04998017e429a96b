"""A snapshot gives back exactly what was there, in memory that it uses again."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from stableopt.optim import SGD, guard
from stableopt.optim.snapshot import Snapshot, local
from tests.optim.problems import closure_of, quadratic

CLASSES = [
    (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    (torch.optim.SGD, {"momentum": 0.9, "fused": True}), (torch.optim.AdamW, {}), (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}), (torch.optim.NAdam, {}), (torch.optim.RAdam, {}), (torch.optim.RMSprop, {}),
    (torch.optim.Adagrad, {}), (torch.optim.Adadelta, {}), (torch.optim.Adamax, {}), (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}), (torch.optim.Adafactor, {}),
]  # fmt: skip


def frozen(x: Any) -> Any:
    return copy.deepcopy(x.detach() if isinstance(x, torch.Tensor) else x)


def same(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("cls", "options"), CLASSES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("steps", [0, 3])
def test_every_optimizer_of_torch_goes_back_bit_for_bit_and_then_forward_the_same_way(
    cls: type[torch.optim.Optimizer], options: dict, everything: bool, steps: int
) -> None:
    torch.manual_seed(1)
    last = (2,) if cls is torch.optim.Adafactor else (0, 2)  # torch's divides by the number of entries
    ps = [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (), (5,), last]]
    optimizer = cls([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.02}], lr=0.1, **options)

    def step() -> None:
        for p in ps:
            p.grad = p.detach().sin() + 0.1
        optimizer.step()

    for _ in range(steps):
        step()
    for p in ps:
        p.grad = p.detach().sin() + 0.1
    snapshot = Snapshot(optimizer, everything=everything)
    values, state = [frozen(p) for p in ps], frozen(optimizer.state_dict())
    tensors = {id(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    step()
    after, state_after = [frozen(p) for p in ps], frozen(optimizer.state_dict())
    assert not same(after, values)
    step()
    snapshot.restore()
    assert same([p.detach() for p in ps], values)
    assert same(optimizer.state_dict(), state)
    assert tensors == {id(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    step()
    assert same([p.detach() for p in ps], after)
    assert same(optimizer.state_dict(), state_after)


def test_the_memory_is_used_again_where_it_fits_and_only_there() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([a, b], lr=0.1, momentum=0.9)
    a.grad, b.grad = torch.ones(3), torch.ones(2, 2)
    optimizer.step()
    snapshot = Snapshot(optimizer, gradients=True)
    held = {p: (snapshot.values[p], snapshot.states[p]["momentum_buffer"], snapshot.gradients[p]) for p in (a, b)}
    optimizer.step()
    snapshot.take()
    for p in (a, b):
        now = snapshot.values[p], snapshot.states[p]["momentum_buffer"], snapshot.gradients[p]
        assert all(x is y for x, y in zip(now, held[p], strict=True))
        assert torch.equal(now[0], p.detach())
        assert torch.equal(now[1], optimizer.state[p]["momentum_buffer"])
    a.data = a.data.float()
    a.grad = None
    snapshot.take()  # without a gradient it does not move: nothing is held of it
    assert set(snapshot.values) == set(snapshot.states) == set(snapshot.gradients) == {b}
    a.grad = torch.ones(3, dtype=torch.float32)
    snapshot.take()
    assert snapshot.values[a].dtype == torch.float32
    assert snapshot.values[a] is not held[a][0]
    assert snapshot.values[b] is held[b][0]


def test_layout_and_identity_survive() -> None:
    w = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    wide = torch.randn(6, 6)
    v = nn.Parameter(wide[::2, 1::2])
    z = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    optimizer = torch.optim.SGD([w, v, z], lr=0.1, momentum=0.9)
    for p in (w, v, z):
        p.grad = torch.ones_like(p)
    before, where = [p.detach().clone() for p in (w, v, z)], [p.data_ptr() for p in (w, v, z)]
    snapshot = Snapshot(optimizer)
    optimizer.step()
    snapshot.restore()
    assert [p.data_ptr() for p in (w, v, z)] == where
    assert w.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(p.detach(), b) for p, b in zip((w, v, z), before, strict=True))


class Odd(torch.optim.Optimizer):
    """State of every kind: nested, under names, in groups, among attributes; and it writes into the gradient."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.calls, self.mean, self.unit = 0, torch.zeros(()), None
        super().__init__(params, {"lr": lr, "k": 0, "weight": torch.zeros(2), "ratio": 0.0})
        self.state["global"] = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        self.mean = self.mean + 1
        self.late = self.calls
        self.state["global"] *= 2
        for group in self.param_groups:
            group["k"] += 1
            group["weight"].add_(1)
            group["ratio"] = torch.tensor(float(group["k"]))
            group["late"] = 3
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.grad.add_(p, alpha=0.5)
                state = self.state[p]
                if not state:
                    state |= {"deep": {"list": [torch.zeros_like(p), 0]}, "grown": torch.zeros(1)}
                state["deep"]["list"][0] += p.grad
                state["deep"]["list"][1] += 1
                state["grown"] = torch.cat([state["grown"], state["grown"]])
                p.sub_(state["deep"]["list"][0], alpha=group["lr"])


def test_an_optimizer_of_which_nothing_is_known_goes_back_in_everything() -> None:
    w, still = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(1))
    optimizer = Odd([w, still])
    for _ in range(2):
        w.grad = torch.ones(2)
        optimizer.step()
    w.grad = torch.ones(2)
    vector, mean = optimizer.param_groups[0]["weight"], optimizer.mean

    def everything() -> Any:
        attributes = {k: v for k, v in vars(optimizer).items() if k in {"calls", "mean", "late", "unit"}}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        state = {k if isinstance(k, str) else id(k): v for k, v in optimizer.state.items()}
        return frozen([attributes, groups, state, w, w.grad, still])

    before = everything()
    snapshot = Snapshot(optimizer, everything=True)
    optimizer.step()
    after = everything()
    still.grad = torch.ones(1)
    optimizer.step()
    snapshot.restore()
    assert same(everything(), before)
    assert still.grad is None
    assert optimizer.param_groups[0]["weight"] is vector
    assert optimizer.mean is mean
    optimizer.step()
    assert same(everything(), after)


def test_what_came_with_the_first_step_goes_with_it() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Odd([w])
    w.grad = torch.ones(2)
    snapshot = Snapshot(optimizer, everything=True)
    optimizer.step()
    snapshot.restore()
    assert not hasattr(optimizer, "late")
    assert "late" not in optimizer.param_groups[0]
    assert set(optimizer.state) == {"global"}
    assert optimizer.param_groups[0]["ratio"] == 0.0


def test_a_line_of_the_state_that_came_later_goes_and_one_without_memory_of_its_own_is_made_anew() -> None:
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w, v], lr=0.1, momentum=0.9)
    w.grad, v.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    snapshot = Snapshot(optimizer)
    optimizer.state[w] |= {"late": 1, "momentum_buffer": torch.zeros(1).expand(3)}
    with torch.inference_mode():
        optimizer.state[v]["momentum_buffer"] = torch.zeros(3)
    snapshot.restore()
    assert {key for p in (w, v) for key in optimizer.state[p]} == {"momentum_buffer"}
    for p in (w, v):
        assert optimizer.state[p]["momentum_buffer"].tolist() == [1.0] * 3
        optimizer.state[p]["momentum_buffer"].add_(1.0)
    snapshot.restore()
    assert optimizer.state[w]["momentum_buffer"].tolist() == [1.0] * 3  # the copy in the snapshot is its own


def test_what_is_kept_of_the_groups_beside_and_gradients_are_asked_for() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.1, momentum=0.5)
    w.grad = torch.ones(2)
    snapshot = Snapshot(optimizer, everything=True, gradients=False, numbers={"lr", "step_count"})
    optimizer.param_groups[0] |= {"lr": 0.7, "step_count": 5, "skipped": 2, "momentum": 0.1}
    w.grad.zero_()
    snapshot.restore()
    group = optimizer.param_groups[0]
    assert [group[k] for k in ("lr", "step_count", "skipped", "momentum")] == [0.1, 0, 2, 0.5]
    assert w.grad.tolist() == [0.0, 0.0]
    assert snapshot.refusal() == ""
    w.data = torch.ones(3)
    assert "is of another kind now" in snapshot.refusal()


def test_a_tuple_of_tensors_in_the_state_is_copied() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    optimizer.state[w]["pair"] = (torch.ones(2), 1)
    w.grad = torch.ones(2)
    snapshot = Snapshot(optimizer)
    optimizer.state[w]["pair"][0].zero_()
    snapshot.restore()
    assert optimizer.state[w]["pair"][0].tolist() == [1.0, 1.0]


def test_what_belongs_to_the_user_or_to_a_scheduler_is_not_put_back() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Odd([w])
    snapshot = Snapshot(optimizer, everything=True)
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.param_groups[0]["initial_lr"] = 0.1
    snapshot.restore()
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["initial_lr"] == 0.1


def test_gradients_come_back_into_the_tensors_that_hold_them_and_where_there_was_none_there_is_none() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([a, b, c], lr=0.1)
    a.grad, b.grad = torch.tensor([1.0, 2.0]), torch.sparse_coo_tensor([[1]], [3.0], (2,), check_invariants=True)
    snapshot = Snapshot(optimizer, gradients=True)
    tensor = a.grad
    a.grad.zero_()
    b.grad, c.grad = torch.ones(2), torch.ones(2)
    snapshot.restore_gradients()
    assert a.grad is tensor
    assert a.grad.tolist() == [1.0, 2.0]
    assert b.grad.is_sparse
    assert b.grad.to_dense().tolist() == [0.0, 3.0]
    assert c.grad is None
    assert not torch.equal(snapshot.gradients[a], a.grad.zero_())  # the snapshot has memory of its own


@pytest.mark.parametrize("mode", ["strict", "lazy", "backtrack"])
@pytest.mark.parametrize(
    "make", [lambda p, **o: SGD(p, lr=0.1, **o), lambda p, **o: guard(torch.optim.Adagrad(p), **o)]
)
def test_an_optimizer_is_freed_with_its_snapshot_as_soon_as_nobody_holds_it(mode: str, make: Any) -> None:
    w, f, _ = quadratic()
    optimizer = make([w], guard=mode)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            optimizer.step(closure_of(optimizer, w, f))
        held = weakref.ref(optimizer._memory.values[w])
        alive = weakref.ref(optimizer)
        assert held() is not None
        del optimizer
        assert alive() is None
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_the_number_of_tensors_alive_does_not_grow() -> None:
    ps = [nn.Parameter(torch.randn(4)) for _ in range(5)]
    optimizer = SGD(ps, lr=5.0, momentum=0.9, guard="strict")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in ps), torch.zeros(()))
        loss.backward()
        return loss

    counts = []
    for _ in range(6):
        for _ in range(5):
            optimizer.step(closure)
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[1] == counts[-1]


def test_without_its_optimizer_a_snapshot_says_so() -> None:
    snapshot = Snapshot(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    gc.collect()
    with pytest.raises(ReferenceError, match="does not exist any more"):
        snapshot.restore()


def test_the_part_of_a_plain_tensor_is_the_tensor() -> None:
    x = torch.ones(2)
    assert local(x) is x


class Pair(NamedTuple):
    mean: torch.Tensor
    count: int


class Hoarder(torch.optim.Optimizer):
    """Keeps named tuples, lists and dictionaries, and lists of parameters and functions, everywhere."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.seen, self.table, self.pair = [0], {"t": 0, "deep": [torch.zeros(1)]}, Pair(torch.zeros(1), 0)
        self.mine, self.calls = [p for g in self.param_groups for p in g["params"]], [print]
        self.views = [p.detach().view(-1) for p in self.mine]
        self.param_groups[0]["seen"] = [0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen.append(1)
        self.table["t"] += 1
        self.table["deep"][0] += 1
        self.table["late"] = 1
        self.pair.mean.add_(1)
        self.pair = self.pair._replace(count=self.pair.count + 1)
        self.calls.append(len)
        for group in self.param_groups:
            group["seen"].append(1)
            for p, view in zip(group["params"], self.views, strict=True):
                state = self.state[p]
                state.setdefault("pair", Pair(torch.zeros_like(p), 0)).mean.add_(1)
                view.sub_(0.1)


def test_nested_values_are_copied_and_keep_their_identity() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = Hoarder([w])
    optimizer.step()
    objects = [optimizer.seen, optimizer.table, optimizer.pair.mean, optimizer.table["deep"][0], optimizer.mine]

    def values() -> Any:
        names = ("seen", "table", "pair")
        return frozen(
            [{k: vars(optimizer)[k] for k in names}, optimizer.param_groups[0]["seen"], optimizer.state[w], w]
        )

    there = values()
    snapshot = Snapshot(optimizer, everything=True)
    optimizer.step()
    after = values()
    optimizer.step()
    for _ in range(2):
        snapshot.restore()
        assert same(values(), there)
        now = [optimizer.seen, optimizer.table, optimizer.pair.mean, optimizer.table["deep"][0], optimizer.mine]
        assert all(a is b for a, b in zip(now, objects, strict=True))
        assert type(optimizer.pair) is type(optimizer.state[w]["pair"]) is Pair
        assert optimizer.mine[0] is w
        assert optimizer.calls[:2] == [print, len]  # functions are left alone
        optimizer.step()
        assert same(values(), after)  # the views are still those of the parameter


def test_a_tensor_that_came_later_is_not_written_into() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    w.grad = torch.ones(2)
    optimizer.state[w]["last"] = w.grad
    snapshot = Snapshot(optimizer, everything=True, gradients=False)
    w.grad = torch.full((2,), 5.0)
    optimizer.state[w]["last"] = w.grad
    snapshot.restore()
    assert w.grad.tolist() == [5.0, 5.0]
    assert optimizer.state[w]["last"].tolist() == [1.0, 1.0]


def test_what_holds_itself_is_left_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    loop: list[Any] = []
    loop.append(loop)
    optimizer.loop = loop  # type: ignore[attr-defined]
    Snapshot(optimizer, everything=True).restore()
    assert optimizer.loop[0] is loop  # type: ignore[attr-defined]
