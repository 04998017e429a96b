"""A step that is refused changes nothing, whatever the optimizer; one that is not refused is what it would have been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt import optim
from stableopt.errors import StabilityError
from stableopt.lyapunov.policies.refusal import Refusal, nonfinite_names
from stableopt.optim import guard
from stableopt.optim.agree import Alone
from tests.optim.test_snapshot import CLASSES, frozen, same


class Wanderer(Optimizer):
    """Moves parameters without gradients, counts in its groups and state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                self.state[p]["seen"] = self.state[p].get("seen", torch.zeros_like(p)) + 1
                p.mul_(0.9)
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


class Sharpened(Optimizer):
    """Moves along the gradient that is there, evaluates the closure at that point, and steps from where it was."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is not None
        ps = [p for group in self.param_groups for p in group["params"]]
        for p in ps:
            if p.grad is not None:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p in ps:
            if p.grad is not None:
                p.copy_(self.state[p]["old"]).sub_(p.grad, alpha=0.1)


MAKES: dict[str, Callable[[Any], Optimizer]] = {
    f"{c.__name__} {' '.join(f'{k}={v}' for k, v in o.items())}": lambda p, c=c, o=o: c(p, lr=0.1, **o)
    for c, o in CLASSES
}
MAKES |= {
    "SGD with weight decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW with weight decay": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "AdamW with a tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), weight_decay=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, maximize=True),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1, weight_decay=0.1),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "LBFGS with a line search": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    "Wanderer": Wanderer,
    "Sharpened": Sharpened,
    "our SGD, off": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, guard="off"),
    "our AdamW, monitor": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1, guard="monitor"),
    "our AdamW, strict": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1, guard="strict"),
    "our Lion, off": lambda p: optim.Lion(p, lr=0.1, weight_decay=0.1, guard="off"),
    "guarded Rprop, off": lambda p: guard(torch.optim.Rprop(p, lr=0.1), guard="off"),
    "guarded LBFGS, off": lambda p: guard(torch.optim.LBFGS(p, lr=0.1, max_iter=4), guard="off"),
    "guarded Wanderer, off": lambda p: guard(Wanderer(p), guard="off"),
}
CLOSED = {"LBFGS", "LBFGS with a line search", "Sharpened", "guarded LBFGS, off"}
"""These have no step without a closure."""


class Training:
    """A model, its optimizer and a refusal, with batches that may be bad."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = make(self.model.parameters())
        self.refusal = Refusal(self.model, self.optimizer, Alone)
        self.generator = torch.Generator().manual_seed(1)

    def loss(self, bad: str = "") -> Tensor:
        loss = (self.model(torch.randn(8, 3, generator=self.generator)) - 1).square().mean()
        if bad == "loss":
            loss = loss * torch.nan
        if bad == "gradient":  # of one entry, and the loss is finite
            w = self.model[2].weight
            loss = loss + torch.where(w == w[0, 0], w.detach(), w - w + torch.sqrt(w - w.detach())).sum() * 0.0
        return loss

    def step(self, bad: str = "", *, closed: bool, watched: bool = True) -> tuple[str, ...]:
        """One step as the monitor does it."""
        looked: list[tuple[str, ...]] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(bad)
            loss.backward()
            if watched and closed:
                looked.append(self.refusal.look(loss.detach()))
            return loss

        if closed:
            if isinstance(self.optimizer, Sharpened):  # which begins with gradients
                self.optimizer.zero_grad()
                self.loss().backward()
            if watched:
                self.refusal.begin(
                    with_closure=not isinstance(self.optimizer, torch.optim.LBFGS)
                )  # which always has one
            self.optimizer.step(closure)
        else:
            loss = closure()
            if watched:
                self.refusal.begin()
                looked.append(self.refusal.look(loss.item()))
            self.optimizer.step()
        if watched:
            self.refusal.end()
        return looked[0] if looked else ()

    def picture(self) -> Any:
        groups = [
            {k: v for k, v in g.items() if k not in {"params", "step_count", "skipped"}}
            for g in self.optimizer.param_groups
        ]
        state = self.optimizer.state_dict()["state"]
        return frozen([[p.detach() for p in self.model.parameters()], state, groups])


QUICK = {
    "SGD momentum=0.9 foreach=True", "AdamW fused=True", "AdamW with weight decay", "LBFGS", "Wanderer", "Sharpened",
    "our SGD, off", "our AdamW, strict",
}  # fmt: skip
BOTH = [
    pytest.param(name, closed, marks=[] if name in QUICK else pytest.mark.slow)
    for name in MAKES
    for closed in (False, True)
    if closed or name not in CLOSED
]


@pytest.mark.parametrize(("name", "closed"), BOTH)
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_refused_step_changes_nothing_bit_for_bit(name: str, closed: bool, bad: str) -> None:
    for before in (0, 2):  # with the state of the optimizer still to be made, and there
        training = Training(MAKES[name])
        for _ in range(before):
            assert training.step(closed=closed) == ()
        picture = training.picture()
        tensors = [v for s in training.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        found = training.step(bad, closed=closed)
        assert found, "nothing was found"
        assert ("loss" in found) == (bad == "loss")
        assert "grad:2.weight" in found
        assert training.refusal.names == found
        assert same(training.picture(), picture)
        now = [v for s in training.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        if name not in CLOSED and "Wanderer" not in name:  # these make new tensors in each step
            assert all(a is b for a, b in zip(tensors, now, strict=True))
        assert training.step(closed=closed) == ()
        assert not same(training.picture()[0], picture[0]), "a good step does not move"


@pytest.mark.parametrize(("name", "closed"), BOTH)
def test_a_step_that_is_not_refused_is_what_it_would_have_been(name: str, closed: bool) -> None:
    ends = []
    for watched in (False, True):
        training = Training(MAKES[name])
        for _ in range(3):
            training.step(closed=closed, watched=watched)
        ends.append([training.picture(), [p.grad for p in training.model.parameters()]])
    assert same(ends[0], ends[1])


def test_every_optimizer_of_torch_is_tried() -> None:
    kinds = {type(Training(make).optimizer) for make in MAKES.values()} | {torch.optim.SparseAdam}
    classes = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)}
    assert classes - {Optimizer} <= kinds


def test_a_refused_step_with_sparse_gradients_changes_nothing() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.1)
    refusal = Refusal(model, optimizer, Alone)
    for factor, refused in ((1.0, False), (torch.inf, True)):
        optimizer.zero_grad()
        (model(torch.tensor([1, 3])).square().sum() * factor).backward()
        before, gradient = frozen([model.weight, optimizer.state_dict()]), model.weight.grad
        refusal.begin()
        assert bool(refusal.look(None)) == refused
        optimizer.step()
        refusal.end()
        assert same([model.weight.detach(), optimizer.state_dict()], before) == refused
        assert model.weight.grad is gradient


@pytest.mark.parametrize("name", ["AdamW with weight decay", "Wanderer", "our SGD, off", "our AdamW, strict"])
def test_the_gradients_are_given_back_as_the_same_objects(name: str) -> None:
    training = Training(MAKES[name])
    training.loss("loss").backward()
    gradients = [p.grad for p in training.model.parameters()]
    training.refusal.begin()
    assert training.refusal.look(None)
    hidden = [p.grad is None or not p.grad.any() for p in training.model.parameters()]
    assert all(hidden) == (name != "our AdamW, strict")  # its guard has to see them
    training.optimizer.step()
    training.refusal.end()
    assert all(p.grad is g for p, g in zip(training.model.parameters(), gradients, strict=True))
    training.refusal.end()  # twice does no harm
    assert all(p.grad is g for p, g in zip(training.model.parameters(), gradients, strict=True))


def test_a_guard_that_is_to_raise_does() -> None:
    training = Training(lambda p: optim.SGD(p, lr=0.1, guard="strict", on_nonfinite="raise"))
    with pytest.raises(StabilityError, match="not finite"):
        training.step("loss", closed=True)
    training.refusal.end(raised=True)


def test_a_loss_that_a_guard_is_not_told_is_refused_all_the_same() -> None:
    training = Training(lambda p: optim.SGD(p, lr=0.1))
    training.loss().backward()
    before = training.picture()
    training.refusal.begin()
    assert training.refusal.look(float("inf")) == ("loss",)
    training.optimizer.step()
    training.refusal.end()
    assert same(training.picture()[0], before[0])


def test_where_a_solver_ends_counts_and_what_its_line_search_meets_does_not() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    model = nn.Module()
    model.w = w
    for search, moves in ((None, False), ("strong_wolfe", True)):
        with torch.no_grad():
            w.fill_(2.0)
        optimizer = torch.optim.LBFGS([w], lr=30.0, max_iter=4, line_search_fn=search)
        refusal = Refusal(model, optimizer, Alone)
        met = []

        def closure(optimizer: Optimizer = optimizer, refusal: Refusal = refusal, met: list = met) -> Tensor:
            optimizer.zero_grad()
            loss = w.log().square().sum() if w > 0 else w.sum() * torch.nan  # defined for positive numbers only
            loss.backward()
            met.append(loss.item())
            refusal.look(loss.detach())
            return loss

        refusal.begin()
        optimizer.step(closure)
        assert any(x != x for x in met), "the search has met nothing"
        assert not bool(w.isnan().any()) or not moves
        refusal.end()
        assert bool(w.isfinite().all())
        assert refusal.names == (() if moves else ("param:w",))
        assert (w.item() != 2.0) == moves
        if not moves:
            assert len(optimizer.state) == 0


def test_buffers_that_the_batch_has_spoilt_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    refusal = Refusal(model, optimizer, Alone)
    x = torch.randn(8, 3)

    def step(x: Tensor) -> tuple[str, ...]:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        refusal.begin()
        found = refusal.look(loss.detach())
        optimizer.step()
        refusal.end()
        return found

    assert step(x) == ()
    mean, buffer = model[1].running_mean.clone(), model[1].running_mean
    bad = x.clone()
    bad[0, 0] = torch.nan
    assert step(bad)
    assert torch.equal(model[1].running_mean, mean)
    assert model[1].running_mean is buffer
    assert step(x) == ()
    assert not torch.equal(model[1].running_mean, mean)


def test_a_gradient_scaler_is_left_to_do_its_own() -> None:
    """A fused optimizer is called with gradients that overflow, and leaves them out by itself: that is no fault."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.ones(3, dtype=torch.float32))
    model = nn.Module()
    model.w = w
    optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    refusal = Refusal(model, optimizer, Alone)
    found = []

    def before(*_: Any) -> None:
        refusal.begin()
        found.append(refusal.look(None))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: refusal.end())
    scaler.scale((w * 1e20).sum()).backward()
    before_step = w.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert found == [()]
    assert torch.equal(w, before_step)
    assert scaler.get_scale() < 2.0**100


def test_names_are_of_what_is_not_finite_and_of_nothing_else() -> None:
    big = torch.tensor([1e200, 1e200])  # whose norm is not finite, though they are
    cases: dict[str, Tensor | None] = {
        "nan": torch.tensor([1.0, float("nan")]),
        "inf": torch.tensor([[-float("inf")]]),
        "big": big,
        "half": torch.full((4,), 6e4, dtype=torch.float16),
        "none": None,
        "empty": torch.zeros(0, 3),
        "complex": torch.tensor([1 + 1j * float("inf")]),
        "sparse": torch.sparse_coo_tensor([[1]], [float("nan")], (3,), check_invariants=True),
        "fine": torch.ones(2),
    }
    assert nonfinite_names(cases, Alone) == ("nan", "inf", "complex", "sparse")
    good = {k: v for k, v in cases.items() if k in {"big", "half", "none", "empty", "fine"}}
    assert nonfinite_names(good, Alone) == ()
    assert nonfinite_names({}, Alone) == ()


def test_only_the_first_look_of_a_step_counts() -> None:
    training = Training(MAKES["AdamW with weight decay"])
    training.loss().backward()
    training.refusal.begin()
    assert training.refusal.look(1.0) == ()
    assert training.refusal.look(float("nan")) == ()
    training.refusal.end()
    assert training.refusal.look(float("nan")) == ()  # no step has begun
    assert training.refusal.names == ()


class Unasking(Optimizer):
    """Takes it that every parameter has a gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9).add_(p.grad / p.grad.norm(), alpha=-group["lr"])


def test_an_optimizer_that_does_not_ask_for_gradients_is_refused_all_the_same() -> None:
    model = nn.Linear(2, 1)
    optimizer = Unasking(model.parameters())
    refusal, before = Refusal(model, optimizer, Alone), frozen(model.state_dict())
    model(torch.full((1, 2), torch.nan)).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    refusal.begin()
    assert refusal.look(None) == ("grad:weight",)
    optimizer.step()
    refusal.end()
    assert same(dict(model.state_dict()), dict(before))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


class Remembering(nn.Module):
    """Keeps its last input as a buffer: a view of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("last", torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return self.linear(x)


def test_data_that_a_module_remembers_are_not_written_into() -> None:
    model, data = Remembering(), torch.arange(16.0).reshape(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refusal = Refusal(model, optimizer, Alone)
    data[4:] = torch.nan
    for batch in (data[:4], data[4:]):
        optimizer.zero_grad()
        model(batch).sum().backward()
        refusal.begin()
        refusal.look(None)
        optimizer.step()
        refusal.end()
    assert bool(data[4:].isnan().all())
    assert torch.equal(model.last, data[:4])


def test_a_lazy_module_has_no_buffers_yet() -> None:
    model = nn.LazyBatchNorm1d()
    refusal = Refusal(model, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), Alone)
    model(torch.rand(4, 2))
    refusal.begin()
    refusal.end()
