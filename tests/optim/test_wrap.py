"""Any torch optimizer may be guarded, as an object or as a class, and shares groups and state with what it was."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box, L2Ball, NonNegative, attach
from stableopt.errors import StabilityError
from stableopt.optim import SGD, AdamW, GuardedOptimizer, HeavyBall, guard, rule_for
from stableopt.optim.rules.unknown import Unknown
from stableopt.optim.wrap import guarded_class
from tests.optim.problems import closure_of, quadratic, wavy

OTHERS = [
    (torch.optim.Adagrad, {}), (torch.optim.Adadelta, {}), (torch.optim.Adamax, {}), (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}), (torch.optim.Adafactor, {}), (torch.optim.LBFGS, {"max_iter": 4}),
]  # fmt: skip
IDS = [cls.__name__ for cls, _ in OTHERS]
GENTLE = {"Rprop": 1e-4, "LBFGS": 1.0, "Adadelta": 1.0}


@pytest.mark.parametrize(("cls", "options"), OTHERS, ids=IDS)
@pytest.mark.parametrize("problem", [quadratic, wavy])
@pytest.mark.parametrize("lr", [1e-2, 1e3])
@pytest.mark.parametrize("whole", [False, True])
def test_in_strict_mode_no_step_of_any_optimizer_raises_the_loss(
    cls: type, options: dict, problem: Any, lr: float, whole: bool
) -> None:
    w, f, _ = problem()
    made = {True: lambda: guard(cls)([w], lr=lr, guard="strict", **options),
            False: lambda: guard(cls([w], lr=lr, **options), guard="strict")}  # fmt: skip
    optimizer = made[whole]()
    assert isinstance(optimizer, cls)
    assert isinstance(optimizer, GuardedOptimizer)
    losses, closure = [float(f(w.detach()))], closure_of(optimizer, w, f)
    for _ in range(20):
        before = w.detach().clone()
        optimizer.step(closure)
        losses.append(float(f(w.detach())))
        assert losses[-1] <= losses[-2] + optimizer.last_step.tolerance
        assert optimizer.last_step.action != "undone" or torch.equal(w.detach(), before)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("cls", "options"), OTHERS, ids=IDS)
@pytest.mark.parametrize("mode", ["off", "monitor", "backtrack", "strict"])
def test_where_every_step_passes_the_run_is_that_of_the_class_behind(cls: type, options: dict, mode: str) -> None:
    runs = []
    lr = GENTLE.get(cls.__name__, 1e-3)
    for make in (lambda w: cls([w], lr=lr, **options), lambda w: guard(cls([w], lr=lr, **options), guard=mode)):
        w, f, _ = quadratic()
        optimizer = make(w)
        values = [optimizer.step(closure_of(optimizer, w, f)) for _ in range(12)]
        runs.append((w.detach(), [float(v.detach()) for v in values], optimizer.state_dict()["state"]))
        if mode == "strict" and isinstance(optimizer, GuardedOptimizer):
            assert optimizer.param_groups[0]["step_scale"] == 1.0
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert repr(runs[0][2]) == repr(runs[1][2])


def test_a_step_that_evaluates_the_closure_itself_still_returns_the_loss_at_the_start() -> None:
    for mode in ("off", "monitor", "strict"):
        w, f, _ = quadratic()
        optimizer = guard(torch.optim.LBFGS([w]), guard=mode)
        start = float(f(w.detach()))
        assert float(optimizer.step(closure_of(optimizer, w, f)).detach()) == start


@pytest.mark.parametrize(("cls", "options"), OTHERS, ids=IDS)
def test_a_refused_step_is_undone_in_every_part(cls: type, options: dict) -> None:
    w, f, _ = quadratic()
    lr = GENTLE.get(cls.__name__, 1e-3)
    optimizer = guard(cls([w], lr=lr, **options), guard="strict")
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, f))
    anchor = w.detach().clone()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    f(w).backward()

    def wall(w: torch.Tensor) -> torch.Tensor:
        return f(w) + 1e9 * float(not torch.equal(w.detach(), anchor))

    optimizer.step(closure_of(optimizer, w, wall))
    assert optimizer.last_step.action == "undone"
    assert torch.equal(w.detach(), anchor)
    assert repr(optimizer.state_dict()["state"]) == repr(state)
    gradient = torch.autograd.grad(f(w), w)[0]
    assert torch.equal(w.grad, gradient)  # of the point where the parameters are


def test_sparse_gradients() -> None:
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        optimizer = guard(torch.optim.SparseAdam(table.parameters(), lr=1e3), guard="strict")
        index = torch.tensor([0, 2, 2, 5])

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (table(index) - 1.0).square().mean()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
        assert losses[-1] < losses[0]
        assert all(b <= a + 1e-12 for a, b in pairwise(losses))
        lazy = guard(torch.optim.SparseAdam(table.parameters(), lr=1e3), guard="lazy")
        for _ in range(20):
            lazy.step(closure)
        table.weight.grad = None
        plain = SGD(table.parameters(), lr=0.1, guard="strict")
        plain.step(closure)
        assert plain.last_step.verdict == "decreased"


def test_a_guarded_instance_shares_groups_state_and_hooks() -> None:
    w, f, _ = quadratic()
    base = torch.optim.Adagrad([w], lr=0.1)
    base.step(closure_of(base, w, f))
    calls = []
    base.register_step_post_hook(lambda *_: calls.append(1))
    state, groups = base.state[w], base.param_groups
    optimizer = guard(base, guard="strict", every=2)
    assert optimizer.param_groups is groups
    assert optimizer.state[w] is state
    assert optimizer.param_groups[0]["every"] == 2
    assert "guard" not in base.defaults
    optimizer.step(closure_of(optimizer, w, f))
    assert calls == [1]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[1]["guard"] == "strict"
    assert optimizer.param_groups[1]["lr"] == 0.1


@pytest.mark.parametrize(("theirs", "ours"), [(torch.optim.SGD, SGD), (torch.optim.AdamW, AdamW)])
def test_what_the_package_knows_becomes_its_own_class(theirs: type, ours: type) -> None:
    w, f, _ = quadratic()
    base = theirs([w], lr=0.1, momentum=0.9) if theirs is torch.optim.SGD else theirs([w], lr=0.1)
    base.step(closure_of(base, w, f))
    optimizer = guard(base, guard="strict")
    assert type(optimizer) is ours
    assert guard(theirs) is ours
    optimizer.step(closure_of(optimizer, w, f))
    assert optimizer.last_step.verdict == "decreased"
    assert optimizer.last_step.predicted > 0


def test_a_subclass_with_torchs_step_has_its_rule_and_one_with_its_own_step_has_none() -> None:
    class Renamed(torch.optim.SGD):
        pass

    class Other(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])

    w = nn.Parameter(torch.ones(1))
    assert guard(Renamed([w], lr=0.1)).rule == HeavyBall()
    assert guard(Renamed)([w], lr=0.1, momentum=0.9).rule == HeavyBall()
    assert guard(Other([w], lr=0.1)).rule == Unknown()
    Renamed([w], lr=0.1)  # torch wraps the step of a class with its first instance
    assert guard(Renamed([w], lr=0.1)).rule == HeavyBall()


def test_a_rule_that_is_registered_is_used() -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])

    @rule_for.register(Mine)
    def _(optimizer: Mine) -> HeavyBall:
        assert type(optimizer) is Mine
        return HeavyBall()

    w, f, _ = quadratic()
    optimizer = guard(Mine([w]), guard="strict", prox=L1(0.1))
    assert optimizer.rule == HeavyBall()
    optimizer.step(closure_of(optimizer, w, f))
    assert optimizer.last_step.predicted > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize(("cls", "options"), OTHERS, ids=IDS)
def test_copies_carry_on(cls: type, options: dict, duplicate: Any) -> None:
    w, f, _ = quadratic()
    optimizer = guard(cls([w], lr=GENTLE.get(cls.__name__, 0.1), **options), guard="strict", constraint=Box(-9.0, 9.0))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, f))
    twin = duplicate(optimizer)
    assert type(twin) is type(optimizer)
    v = twin.param_groups[0]["params"][0]
    assert v is not w
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, f))
        twin.step(closure_of(twin, v, f))
    assert torch.equal(v.detach(), w.detach())


@pytest.mark.parametrize(("cls", "options"), OTHERS[:-1], ids=IDS[:-1])
def test_state_dicts_go_there_and_back_to_the_class_behind(cls: type, options: dict) -> None:
    w, f, _ = quadratic()
    optimizer = guard(cls([w], lr=1e-3, **options), constraint=L2Ball(100.0), guard="strict")
    for _ in range(3):
        optimizer.step(closure_of(optimizer, w, f))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    plain = cls([nn.Parameter(w.detach().clone())], lr=0.5)
    plain.load_state_dict(copy.deepcopy(state))
    assert plain.param_groups[0]["lr"] == 1e-3
    again = guard(cls)([nn.Parameter(w.detach().clone())])
    again.load_state_dict(state)
    assert again.param_groups[0]["constraint"] == L2Ball(100.0)
    assert again.param_groups[0]["step_count"] == 3


def test_what_cannot_be_guarded_is_refused_and_left_as_it_was() -> None:
    w = nn.Parameter(torch.ones(2))
    scheduled = torch.optim.Adagrad([w], lr=0.1)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)
    for bad, settings, error, sentence in [
        (scheduled, {}, ValueError, "guard it first"),
        (SGD([w], lr=0.1), {}, ValueError, "guarded already"),
        (guard(torch.optim.Adagrad([w])), {}, ValueError, "guarded already"),
        (torch.optim.Adagrad, {"guard": "strict"}, TypeError, "takes no settings"),
        (3.0, {}, TypeError, "needs a torch.optim.Optimizer"),
        (nn.Linear, {}, TypeError, "needs a torch.optim.Optimizer"),
        (torch.optim.Adagrad([w]), {"speed": 1}, TypeError, "unknown settings"),
        (torch.optim.Adagrad([w]), {"every": 0}, ValueError, "every"),
        (torch.optim.Adagrad([w]), {"prox": L1(0.1)}, ValueError, "nothing is known"),
        (torch.optim.Adagrad([w]), {"constraint": [Box(0, 1), None]}, ValueError, "one entry for each"),
        (torch.optim.AdamW([w]), {"constraint": L1(0.1)}, TypeError, "a penalty goes to prox"),
    ]:
        before = repr(bad)
        with pytest.raises(error, match=sentence):
            guard(bad, **settings)
        assert repr(bad) == before


def test_groups_with_keys_that_the_guard_needs_are_refused_and_left_alone() -> None:
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.Adagrad([{"params": [w]}, {"params": [v], "every": 3}])
    with pytest.raises(ValueError, match=r"keys \['every'\]"):
        guard(base)
    assert "guard" not in base.param_groups[0]
    assert base.param_groups[1]["every"] == 3


def test_a_class_whose_arguments_have_the_names_of_settings_is_refused() -> None:
    class Clash(torch.optim.Adagrad):
        def __init__(self, params: Any, lr: float = 0.1, every: int = 5) -> None:
            super().__init__(params, lr)

    with pytest.raises(ValueError, match=r"\['every'\]"):
        guard(Clash)


def test_a_class_is_guarded_once() -> None:
    assert guard(torch.optim.Adamax) is guard(torch.optim.Adamax)
    assert guard(guard(torch.optim.Adamax)) is guard(torch.optim.Adamax)
    assert guarded_class(SGD) is SGD
    assert issubclass(guard(torch.optim.Adamax), torch.optim.Adamax)
    assert guard(torch.optim.Adamax).__name__ == "GuardedAdamax"


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
@pytest.mark.parametrize("cls", [torch.optim.Adagrad, torch.optim.Adamax])
def test_schedulers_made_after_guarding_drive_the_rate(cls: type, schedule: Any) -> None:
    w, f, _ = quadratic()
    optimizer = guard(cls([w], lr=1e-3), guard="strict")
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(6):
        optimizer.step(closure_of(optimizer, w, f))
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        rates.append(optimizer.last_step.lr[0])
    assert len(set(rates)) > 1
    assert optimizer.last_step.verdict == "decreased"


def test_sets_that_parameters_are_attached_to_are_taken_over() -> None:
    w = nn.Parameter(torch.tensor([0.5, 2.0]))
    attach(w, NonNegative())
    optimizer = guard(torch.optim.Adagrad([w], lr=1.0), guard="strict")
    assert optimizer.param_groups[0]["constraint"] == NonNegative()
    for _ in range(10):
        optimizer.step(closure_of(optimizer, w, lambda w: (w + 1).square().sum()))
        assert bool((w.detach() >= 0).all())
    assert w.tolist() == [0.0, 0.0]


def test_an_optimizer_that_the_rate_does_not_reach_is_replaced_by_a_gradient_step() -> None:
    """Rprop keeps its own step sizes: no factor on lr shortens its second step."""
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = guard(torch.optim.Rprop([w], lr=0.4, etas=(0.5, 50.0), step_sizes=(1e-6, 1e6)), guard="strict")
    closure = closure_of(optimizer, w, lambda w: 0.5 * w.square().sum())
    optimizer.step(closure)
    assert w.item() == pytest.approx(0.6)
    optimizer.step(closure)
    assert optimizer.last_step.action == "restarted"
    assert w.item() == pytest.approx(0.6 * (1 - optimizer.last_step.lr[0]))


def test_skipping_and_raising_hold_for_any_optimizer() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = guard(torch.optim.Adagrad([w]), on_nonfinite="raise")
    with pytest.raises(StabilityError, match="not finite"):
        optimizer.step(closure_of(optimizer, w, lambda w: w.sum() * float("nan")))
    assert w.item() == 1.0


class Deaf(torch.optim.Optimizer):
    """Steps of one length, whatever the learning rate is."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(10.0)


def test_steps_that_do_not_become_shorter_give_way_to_a_gradient_step_at_once() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = guard(Deaf([w], lr=0.5), guard="strict")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (w**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # downhill first, and far beyond
    report = optimizer.last_step
    assert report is not None
    assert (report.action, report.scale, w.item()) == ("restarted", 1.0, 0.5)
    assert report.trials <= 3


def test_an_optimizer_of_torch_that_has_loaded_a_state_of_ours_can_be_guarded() -> None:
    w = nn.Parameter(torch.ones(2))
    ours = SGD([w], lr=0.1, guard="strict", max_shrinks=3, constraint=Box(0.0, 1.0))
    theirs = torch.optim.SGD([w], lr=0.5)
    theirs.load_state_dict(ours.state_dict())
    again = guard(theirs, max_shrinks=5)
    group = again.param_groups[0]
    assert (group["guard"], group["max_shrinks"], group["constraint"], group["lr"]) == ("strict", 5, Box(0.0, 1.0), 0.1)


def test_a_list_of_constraints_belongs_to_the_groups_of_the_constructor() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = SGD([a, b], lr=0.1, constraint=[Box(0.0, 1.0), None])
    optimizer.add_param_group({"params": [c]})
    assert optimizer.param_groups[0]["constraint"] == [Box(0.0, 1.0), None]
    assert optimizer.param_groups[1]["constraint"] is None


def test_hooks_run_once_also_where_the_compiler_has_wrapped_the_step_of_the_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    torch.optim.SparseAdam(list(table.parameters()))  # torch wraps the step of the class with the first instance
    monkeypatch.setattr(torch.optim.SparseAdam, "step", torch.compiler.disable(torch.optim.SparseAdam.step))
    said: list[str] = []
    optimizer = guard(torch.optim.SparseAdam)(list(table.parameters()), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: said.append("post"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1])).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert said == ["post"]
