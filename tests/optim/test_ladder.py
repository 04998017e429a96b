"""The guard keeps what lowers the energy, shrinks what does not, and undoes without a trace."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stableopt.constraints import L1, Box, L2Ball, NonNegative
from stableopt.optim import SGD, AdamW
from stableopt.optim.settings import Settings
from stableopt.optim.snapshot import Snapshot
from tests.optim.problems import Network, closure_of, network_closure, quadratic, wavy

FAMILY = [
    (SGD, {"momentum": 0.0}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.5}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.5, "weight_decay": 0.1}),
    (AdamW, {}),
    (AdamW, {"weight_decay": 0.0, "amsgrad": True}),
]
IDS = [f"{cls.__name__}-{'-'.join(map(str, o)) or 'default'}" for cls, o in FAMILY]


@pytest.mark.parametrize(("cls", "options"), FAMILY, ids=IDS)
@pytest.mark.parametrize("problem", [quadratic, wavy])
@pytest.mark.parametrize("lr", [0.01, 0.3, 3.0, 1000.0])
def test_in_strict_mode_no_kept_step_raises_the_energy_at_any_learning_rate(
    cls: type, options: dict, problem: object, lr: float
) -> None:
    w, f, _ = problem()
    optimizer = cls([w], lr=lr, guard="strict", **options)
    closure, start = closure_of(optimizer, w, f), float(f(w.detach()))
    for _ in range(40):
        before = w.detach().clone()
        optimizer.step(closure)
        report = optimizer.last_step
        assert report.energy_after <= report.energy_before - report.required + report.tolerance
        if report.action == "undone":
            assert torch.equal(w.detach(), before)
    assert float(f(w.detach())) < start


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_torch_itself_diverges_where_the_guard_holds(cls: type[torch.optim.Optimizer]) -> None:
    w, f, _ = quadratic()
    optimizer = cls([w], lr=1000.0)
    closure, start = closure_of(optimizer, w, f), float(f(w.detach()))
    for _ in range(20):
        optimizer.step(closure)
    assert not float(f(w.detach())) < 1e3 * start


@pytest.mark.parametrize(("beta", "penalty"), [(b, p) for b in (0.5, 0.9) for p in ("none", "L1", "box", "ball")])
def test_below_the_proved_limit_every_step_is_accepted_at_once(beta: float, penalty: str) -> None:
    """With the energy of the rule the guard never interferes where the theory says that it need not."""
    options = {
        "none": {},
        "L1": {"prox": L1(0.2)},
        "box": {"constraint": Box(-1.0, 1.0)},
        "ball": {"constraint": L2Ball(1.0)},
    }[penalty]
    for problem in (quadratic, wavy):
        w, f, smoothness = problem()
        with torch.no_grad():
            w.copy_(options["constraint"].project(w)) if "constraint" in options else None
        limit = 2 * (1 - beta) / smoothness
        optimizer = SGD([w], lr=0.999 * limit, momentum=beta, guard="strict", armijo=0.0, **options)
        closure = closure_of(optimizer, w, f)
        for _ in range(120):
            optimizer.step(closure)
            report = optimizer.last_step
            assert report.action == "accepted", report
            assert report.trials == 1


def test_the_loss_alone_would_be_the_wrong_check_for_momentum() -> None:
    """At a provably stable rate the loss rises in many steps; the energy in none."""
    w, f, smoothness = quadratic(n=8, smallest=0.01)
    optimizer = SGD([w], lr=0.999 * 2 * (1 - 0.99) / smoothness, momentum=0.99, guard="monitor")
    closure, losses, raised = closure_of(optimizer, w, f), [], 0
    for _ in range(400):
        losses.append(float(optimizer.step(closure).detach()))
        raised += optimizer.last_step.verdict == "increased"
    assert raised == 0
    assert sum(b > a for a, b in pairwise(losses)) > 10


@pytest.mark.parametrize(("cls", "options"), FAMILY, ids=IDS)
def test_an_undone_step_leaves_parameters_and_state_as_they_were(cls: type, options: dict) -> None:
    """A loss that no step can lower (it rises by one whenever the weights move) undoes every step."""
    w = nn.Parameter(torch.randn(3))
    optimizer = cls([w], lr=0.1, guard="strict", **options)
    closure = closure_of(optimizer, w, lambda w: w.square().sum())
    for _ in range(3):
        optimizer.step(closure)
    anchor = w.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[w].items() if v is not None}
    tensors = dict(optimizer.state[w])

    def jump(w: torch.Tensor) -> torch.Tensor:
        return w.square().sum() + 1000.0 * float(not torch.equal(w.detach(), anchor))

    optimizer.step(closure_of(optimizer, w, jump))
    report = optimizer.last_step
    assert report.action == "undone"
    assert report.trials == 14
    assert report.dissipation == 0.0
    assert torch.equal(w.detach(), anchor)
    assert optimizer.param_groups[0]["step_scale"] <= 0.5**13  # where the next step goes on
    assert optimizer.param_groups[0]["lr"] == 0.1
    for k, v in state.items():
        assert optimizer.state[w][k] is tensors[k]
        assert torch.equal(optimizer.state[w][k], v)


def test_an_undone_first_step_leaves_an_empty_state() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = AdamW([w], guard="strict")
    optimizer.step(
        closure_of(optimizer, w, lambda w: 0 * w.sum() + 1000.0 * float(not torch.equal(w.detach(), torch.ones(2))))
    )
    assert optimizer.last_step.action == "undone"  # the decay alone moves the weights
    assert len(optimizer.state) == 0
    assert w.tolist() == [1.0, 1.0]


def test_backtrack_keeps_the_smallest_try_and_says_so() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.5, guard="backtrack")
    optimizer.step(
        closure_of(
            optimizer, w, lambda w: w.square().sum() + 1000.0 * float(not torch.equal(w.detach(), torch.ones(2)))
        )
    )
    report = optimizer.last_step
    assert report.verdict == "increased"
    assert "the smallest is kept" in report.reason
    torch.testing.assert_close(w.detach(), torch.ones(2) * (1 - 2 * report.lr[0]))


def test_all_groups_shrink_jointly_and_rates_are_given_back() -> None:
    a, b = nn.Parameter(torch.tensor([5.0])), nn.Parameter(torch.tensor([5.0]))
    optimizer = SGD([{"params": [a], "lr": 100.0}, {"params": [b], "lr": 0.1}], guard="strict")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (a.square() + b.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_step
    assert report.action == "shrunk"
    assert report.lr[0] / report.lr[1] == pytest.approx(1000.0)
    assert report.scale == 0.5 ** (report.trials - 1)
    torch.testing.assert_close(a.detach(), torch.tensor([5.0 * (1 - report.lr[0])]))
    torch.testing.assert_close(b.detach(), torch.tensor([5.0 * (1 - report.lr[1])]))
    assert [g["lr"] for g in optimizer.param_groups] == [100.0, 0.1]


def test_the_scale_persists_and_recovers() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=100.0, guard="strict", grow=2.0)
    optimizer.step(closure_of(optimizer, w, f))
    scale = optimizer.last_step.scale
    assert scale < 0.1
    optimizer.param_groups[0]["lr"] = 1e-3  # a scheduler lowers the rate
    scales = []
    for _ in range(12):
        optimizer.step(closure_of(optimizer, w, f))
        scales.append(optimizer.last_step.scale)
    assert scales[0] == 2 * scale
    assert scales[-1] == 1.0
    assert optimizer.last_step.action == "accepted"


def test_momentum_that_points_uphill_is_restarted() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.1, momentum=0.9, guard="strict", max_shrinks=0)
    closure = closure_of(optimizer, w, lambda w: 0.5 * w.square().sum())
    optimizer.step(closure)
    optimizer.state[w]["momentum_buffer"].fill_(-3.0)  # the kinetic energy of this is small, the climb is not

    def wall(w: torch.Tensor) -> torch.Tensor:
        return 0.5 * w.square().sum() + 100 * (w - 1.0).clamp_min(0).sum()

    optimizer.step(closure_of(optimizer, w, wall))
    assert optimizer.last_step.action == "restarted"
    assert optimizer.last_step.verdict == "decreased"
    assert optimizer.last_step.energy_before == optimizer.last_step.loss  # without the kinetic energy that was given up
    assert float(w.detach()) < 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient", "trial"])
@pytest.mark.parametrize("guard", ["strict", "backtrack"])
def test_what_is_not_finite_never_reaches_the_parameters(bad: float, where: str, guard: str) -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.1, momentum=0.9, guard=guard)
    closure = closure_of(optimizer, w, lambda w: w.square().sum())
    optimizer.step(closure)
    value, buffer = w.detach().clone(), optimizer.state[w]["momentum_buffer"].clone()

    def poisoned() -> torch.Tensor:
        loss = closure()
        if where == "gradient" and w.grad is not None:
            w.grad[0] = bad
        if where == "loss" or (where == "trial" and not torch.equal(w.detach(), value)):
            return loss * bad
        return loss

    optimizer.step(poisoned)
    assert optimizer.last_step.action == "undone"
    assert optimizer.last_step.verdict == "nonfinite"
    assert torch.equal(w.detach(), value)
    assert torch.equal(optimizer.state[w]["momentum_buffer"], buffer)
    optimizer.step(closure)
    assert optimizer.last_step.action == ("shrunk" if where == "trial" else "accepted")
    assert optimizer.last_step.verdict == "decreased"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_at_any_evaluation_leaves_everything_as_it_was(kind: type[BaseException], call: int) -> None:
    w = nn.Parameter(torch.full((2,), 3.0))
    optimizer = SGD([w], lr=10.0, momentum=0.9, guard="strict")
    good = closure_of(optimizer, w, lambda w: w.square().sum())
    optimizer.step(good)
    value, buffer, lr = (
        w.detach().clone(),
        optimizer.state[w]["momentum_buffer"].clone(),
        optimizer.param_groups[0]["lr"],
    )
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise kind("stop")
        return good()

    optimizer.param_groups[0]["step_scale"] = 1.0
    with pytest.raises(kind, match="stop"):
        optimizer.step(closure)
    assert torch.equal(w.detach(), value)
    assert torch.equal(optimizer.state[w]["momentum_buffer"], buffer)
    assert optimizer.param_groups[0]["lr"] == lr
    optimizer.step(good)
    assert optimizer.last_step.verdict == "decreased"


def test_an_infeasible_start_is_moved_into_the_set_whatever_it_costs() -> None:
    w = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = SGD([w], lr=0.01, constraint=Box(1.0, 2.0), guard="strict")
    optimizer.step(closure_of(optimizer, w, lambda w: w.square().sum()))
    assert optimizer.last_step.action == "accepted"
    assert "outside their sets" in optimizer.last_step.reason
    assert optimizer.last_step.energy_before == 2.0  # of the projection, not of the start
    assert w.tolist() == [1.0, 1.0]
    optimizer.step(closure_of(optimizer, w, lambda w: w.square().sum()))
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("guard", ["strict", "backtrack"])
def test_a_start_outside_the_set_is_no_excuse_for_the_other_parameters(guard: str) -> None:
    """The step that moves a into its set may not blow up b."""
    a, b = nn.Parameter(torch.tensor([-1.0])), nn.Parameter(torch.tensor([1.0]))
    groups = [{"params": [a], "constraint": NonNegative()}, {"params": [b]}]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((a - 1) ** 2 + b**2).sum()
        loss.backward()
        return loss

    optimizer = SGD(groups, lr=100.0, guard=guard)
    optimizer.step(closure)
    report = optimizer.last_step
    assert report.action == "shrunk"
    assert report.energy_before == 2.0  # of a = 0, b = 1
    assert report.energy_after < 2.0
    assert float(a.detach()) >= 0
    assert 0 < report.scale < 0.02


@pytest.mark.parametrize("guard", ["off", "monitor", "strict"])
@pytest.mark.parametrize(("cls", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {"weight_decay": 0.0})])
def test_momentum_does_not_carry_on_with_the_way_into_the_set(guard: str, cls: type, options: dict) -> None:
    """From norm 10 into a ball of radius 1: without a gradient the parameters stay at the projection for ever."""
    w = nn.Parameter(torch.tensor([6.0, 8.0]))
    optimizer = cls([w], lr=0.1, constraint=L2Ball(1.0), guard=guard, **options)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, w, lambda w: 0.0 * w.sum()))
        torch.testing.assert_close(w.detach(), torch.tensor([0.6, 0.8]))
    with torch.no_grad():
        w.mul_(20)  # somebody moves them out again
    optimizer.step(closure_of(optimizer, w, lambda w: 0.0 * w.sum()))
    torch.testing.assert_close(w.detach(), torch.tensor([0.6, 0.8]))
    assert "outside their sets" in optimizer.last_step.reason


def test_a_start_outside_comes_back_if_the_closure_fails() -> None:
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([w], lr=0.1, constraint=Box(0.0, 1.0))

    def closure() -> torch.Tensor:
        assert w.tolist() == [1.0]
        raise KeyError("no data")

    for _ in range(2):
        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert w.tolist() == [3.0]


@pytest.mark.parametrize(("cls", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {})])
@pytest.mark.parametrize("guard", ["strict", "backtrack"])
def test_no_learning_rate_is_too_large_for_ever(cls: type, options: dict, guard: str) -> None:
    """Shrinking goes on in the next step where a failed one ended, so training starts after a few steps."""
    w, f, _ = quadratic()
    optimizer = cls([w], lr=1e6, guard=guard, max_shrinks=4, **options)
    closure = closure_of(optimizer, w, f)
    verdicts = []
    for _ in range(300):
        optimizer.step(closure)
        verdicts.append(optimizer.last_step.verdict)
    assert "decreased" not in verdicts[:1]
    assert set(verdicts[20:]) <= {"decreased", "undecided"}
    assert optimizer.param_groups[0]["lr"] == 1e6


def test_maximizing_lowers_the_energy_of_the_negative_loss() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=0.1, momentum=0.5, maximize=True, guard="strict")
    closure, start = closure_of(optimizer, w, lambda w: -f(w)), float(-f(w.detach()))
    for _ in range(50):
        optimizer.step(closure)
        assert optimizer.last_step.dissipation > 0
    assert float(-f(w.detach())) > start


@pytest.mark.parametrize("guard", ["off", "monitor", "strict"])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_the_guard_does_not_touch_dropout_batch_norm_or_random_numbers(guard: str, cls: type) -> None:
    """A guarded run whose steps all pass is bit for bit torch's run."""

    def run(make: object) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
        model = Network()
        optimizer = make(model.parameters())
        torch.manual_seed(5)
        closure = network_closure(optimizer, model)
        for _ in range(20):
            optimizer.step(closure)
        return model.state_dict(), torch.get_rng_state(), model.calls

    lr = 1e-4
    plain, rng, calls = run(lambda p: cls.torch_class(p, lr=lr))
    ours, our_rng, our_calls = run(lambda p: cls(p, lr=lr, guard=guard))
    assert all(torch.equal(plain[k], ours[k]) for k in plain)
    assert torch.equal(rng, our_rng)
    assert our_calls == (calls if guard == "off" else 2 * calls)  # one more forward pass per step


def test_mini_batches_of_real_data_never_raise_their_energy() -> None:
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16), torch.tensor(labels)
    for lr in (0.05, 0.5, 5.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        optimizer = SGD(model.parameters(), lr=lr, momentum=0.9, guard="strict")
        for _ in range(40):
            index = torch.randint(len(x), (64,))

            optimizer.step(closure_of(optimizer, model, lambda model, i=index: F.cross_entropy(model(x[i]), y[i])))
            report = optimizer.last_step
            assert report.energy_after <= report.energy_before + report.tolerance


def test_a_snapshot_forgets_state_that_came_later_and_keeps_the_rest() -> None:
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = torch.optim.SGD([w], lr=0.1)
    vector = torch.ones(2)
    optimizer.state[w] |= {"vector": vector, "number": 3}
    snapshot = Snapshot(optimizer)
    vector.add_(1)
    optimizer.state[w] |= {"later": torch.ones(1), "number": 4}
    snapshot.restore()
    assert set(optimizer.state[w]) == {"vector", "number"}
    assert optimizer.state[w]["vector"] is vector
    assert vector.tolist() == [1.0, 1.0]
    assert optimizer.state[w]["number"] == 3


def test_a_snapshot_ignores_parameters_that_do_not_move() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    a.grad = torch.ones(2)
    snapshot = Snapshot(optimizer)
    assert snapshot.parameters == [a]
    optimizer.step()
    snapshot.restore()
    assert a.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"guard": "x"}, {"max_shrinks": -1}, {"max_shrinks": True}, {"shrink": 0.0}, {"shrink": 1.0},
        {"grow": 0.9}, {"armijo": -0.1}, {"armijo": 1.0},
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)
    with pytest.raises(TypeError, match="shrink"):
        Settings(shrink="1")


def test_at_a_hundred_times_a_good_rate_the_guard_trains_digits_where_torch_diverges() -> None:
    """Full batch: strict holds its energy at 1, 10 and 100 times the rate, and ends below the start; torch does not."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits[:300] / 16), torch.tensor(labels[:300])

    def run(make: object) -> tuple[list[float], torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
        optimizer = make(model.parameters())
        losses = []
        for _ in range(40):
            loss = optimizer.step(closure_of(optimizer, model, lambda model: F.cross_entropy(model(x), y)))
            losses.append(float(loss.detach()))
            report = getattr(optimizer, "last_step", None)
            if report is not None:
                assert report.energy_after <= report.energy_before - report.required + report.tolerance
        return losses, optimizer

    good = 0.3
    for factor in (1, 10, 100):
        losses, optimizer = run(lambda p, lr=factor * good: SGD(p, lr=lr, momentum=0.9, guard="strict"))
        assert losses[-1] < 0.5 * losses[0]
        assert optimizer.param_groups[0]["lr"] == factor * good
    losses, _ = run(lambda p: torch.optim.SGD(p, lr=100 * good, momentum=0.9))
    assert not losses[-1] < 10 * losses[0]


@pytest.mark.parametrize("armijo", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("factor", "action"), [(0.999, "accepted"), (1.001, "shrunk")])
def test_the_guard_accepts_up_to_the_rate_that_its_condition_allows(armijo: float, factor: float, action: str) -> None:
    """On f = w²/2 the decrease is η(1 − η/2)w² and c/η‖d‖² = cηw²: accepted exactly for η ≤ 2(1 − c)."""
    w = nn.Parameter(torch.tensor([3.0]))
    lr = factor * 2 * (1 - armijo)
    optimizer = SGD([w], lr=lr, armijo=armijo, guard="strict")
    optimizer.step(closure_of(optimizer, w, lambda w: 0.5 * w.square().sum()))
    report = optimizer.last_step
    assert report.action == action
    eta = lr * report.scale
    assert report.predicted == pytest.approx(9 * eta, rel=1e-12)
    assert report.required == pytest.approx(9 * armijo * eta, rel=1e-12)
    assert report.dissipation == pytest.approx(9 * eta * (1 - eta / 2), abs=1e-12)
    assert report.displacement == pytest.approx(3 * eta, rel=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_what_is_predicted_is_the_law_without_curvature(beta: float) -> None:
    """On a linear loss the energy falls by (1−β)/η‖d‖² and a square that Young's inequality gives away: never by less."""
    w = nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = SGD([w], lr=0.1, momentum=beta, guard="monitor")
    slope = torch.tensor([1.0, 2.0])
    for _ in range(60):
        optimizer.step(closure_of(optimizer, w, lambda w: w @ slope))
        report = optimizer.last_step
        assert report.dissipation >= report.predicted - report.tolerance
    assert report.predicted == pytest.approx(report.dissipation, rel=0.02)  # an equality once the motion is uniform


@pytest.mark.parametrize("guard", ["monitor", "strict"])
def test_gradients_with_an_infinite_sum_but_finite_entries_are_finite(guard: str) -> None:
    w = nn.Parameter(torch.full((2,), 1e-300))
    optimizer = SGD([w], lr=1e-320, guard=guard)
    optimizer.step(closure_of(optimizer, w, lambda w: (w * 1.5e308).sum()))
    assert optimizer.last_step.action != "undone"


@pytest.mark.parametrize("mode", ["backtrack", "strict", "lazy"])
@pytest.mark.parametrize("how", ["closure", "trial"])
def test_the_rounding_of_autocast_is_no_rise_of_the_energy(mode: Any, how: str) -> None:
    """Near the end of training bfloat16 hides what a step gains: it must not shrink the learning rates for ever."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 3)).float()
    x, y = torch.randn(64, 20, dtype=torch.float32), torch.randn(64, 3, dtype=torch.float32)
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9, guard=mode)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ((net(x).float() - y) ** 2).mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(300):
        if how == "closure" or mode == "lazy":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step(trial=loss)
    assert optimizer.param_groups[0]["step_scale"] == 1.0
    optimizer.param_groups[0]["lr"] = 1e3  # what is no rounding is still seen
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.last_step is not None
    assert optimizer.last_step.scale < 1.0
