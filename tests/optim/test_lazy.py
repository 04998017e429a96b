"""A step is judged by the loss of the next closure: no evaluation more, and what is refused leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.constraints import L1, Box
from stableopt.errors import StabilityError
from stableopt.optim import SGD, AdamW, guard
from tests.optim.problems import closure_of, quadratic, wavy

FAMILY = [
    (SGD, {"momentum": 0.9}), (SGD, {"momentum": 0.0}), (SGD, {"momentum": 0.9, "prox": L1(0.01)}),
    (AdamW, {}), (AdamW, {"amsgrad": True, "constraint": Box(-5.0, 5.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options"), FAMILY)
def test_where_every_step_passes_the_run_is_that_of_the_unguarded_optimizer_bit_for_bit(
    cls: type, options: dict
) -> None:
    runs = []
    for mode in ("off", "lazy"):
        w, f, _ = quadratic()
        optimizer, calls = cls([w], lr=0.02, guard=mode, **options), 0

        def f_counted(w: torch.Tensor, f: Any = f) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return f(w)

        closure, actions = closure_of(optimizer, w, f_counted), []
        for _ in range(40):
            optimizer.step(closure)
            actions.append(optimizer.last_step.action)
        assert calls == 40
        runs.append((w.detach().clone(), optimizer.state_dict()["state"]))
        assert mode == "off" or set(actions[1:]) == {"accepted"}
        assert mode == "off" or actions[0] == "unguarded"
    assert torch.equal(runs[0][0], runs[1][0])
    for key, state in runs[0][1].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(runs[1][1][key][k]))
            for k, v in state.items()
            if v is not None
        )


@pytest.mark.parametrize("problem", [quadratic, wavy])
@pytest.mark.parametrize("lr", [3.0, 1e3])
@pytest.mark.parametrize(("cls", "options"), FAMILY[:2] + FAMILY[3:4])
def test_a_rate_that_diverges_is_tamed_without_an_evaluation_more(
    problem: Any, lr: float, cls: type, options: dict
) -> None:
    w, f, _ = problem()
    optimizer, calls = cls([w], lr=lr, guard="lazy", **options), 0

    def counted(w: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return f(w)

    start, closure = float(f(w.detach())), closure_of(optimizer, w, counted)
    for _ in range(150):
        optimizer.step(closure)
        report = optimizer.last_step
        if report.action in {"accepted", "shrunk", "restarted"}:
            assert report.energy_after <= report.energy_before - report.required + report.tolerance
    assert calls == 150
    assert float(f(w.detach())) < start
    assert optimizer.param_groups[0]["lr"] == lr


@pytest.mark.parametrize(
    ("cls", "options"), [*FAMILY, (guard(torch.optim.Adagrad), {}), (guard(torch.optim.Rprop), {})]
)
def test_a_refused_step_goes_back_exactly_and_takes_a_shorter_one_from_there(cls: type, options: dict) -> None:
    """The retry equals, bit for bit, the step of a twin that stands at the old point with the old state and the old gradient."""
    w, f, _ = quadratic()
    optimizer = cls([w], lr=0.02, guard="lazy", **options)
    closure = closure_of(optimizer, w, f)
    for _ in range(4):
        optimizer.step(closure)
    optimizer.step(closure)  # judges the fourth step and takes the fifth, from the point where the loss was this
    pending = optimizer.pending
    old = pending.proposal.start.snapshot
    point, gradient = old.values[w].clone(), old.gradients[w].clone()
    state = {k: copy.deepcopy(v) for k, v in old.states.get(w, {}).items()}

    def high(w: torch.Tensor) -> torch.Tensor:
        return f(w) + 1000.0

    optimizer.step(closure_of(optimizer, w, high))
    assert optimizer.last_step.action == "undone"
    assert "raised the energy" in optimizer.last_step.reason
    assert torch.equal(w.grad, gradient)
    twin_w = nn.Parameter(point.clone())
    twin = cls([twin_w], lr=0.02 * 0.5, guard="off", **options)
    if state:
        twin.state[twin_w] = state
    twin_w.grad = gradient.clone()
    twin.step()
    assert torch.equal(twin_w.detach(), w.detach())
    for k, v in twin.state.get(twin_w, {}).items():
        assert v is None or torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[w][k]))


def test_after_the_last_try_everything_is_where_the_step_began() -> None:
    w, f, _ = quadratic()
    optimizer = AdamW([w], lr=0.02, guard="lazy", max_shrinks=2)
    closure = closure_of(optimizer, w, f)
    for _ in range(3):
        optimizer.step(closure)
    start = optimizer.pending.proposal.start.snapshot
    point, gradient, state = start.values[w].clone(), start.gradients[w].clone(), copy.deepcopy(start.states[w])
    high = closure_of(optimizer, w, lambda w: f(w) + 1000.0)
    reasons = []
    for _ in range(6):
        optimizer.step(high)
        reasons.append(optimizer.last_step.reason)
    assert all("and tried at" in r for r in reasons[:-1])
    assert reasons[-1].startswith("no try from scale")
    assert optimizer.pending is None
    assert torch.equal(w.detach(), point)
    assert torch.equal(w.grad, gradient)
    assert all(torch.equal(v, optimizer.state[w][k]) for k, v in state.items())
    optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer.last_step.verdict == "decreased"


def test_the_numbers_of_a_report_are_those_of_the_step_that_it_judges() -> None:
    """One dimension, f = w²/2: energies and rates in closed form, also if a scheduler changes the rate in between."""
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([w], lr=0.5, guard="lazy")
    closure = closure_of(optimizer, w, lambda w: 0.5 * w.square().sum())
    optimizer.step(closure)
    assert (optimizer.last_step.step, optimizer.last_step.verdict, optimizer.last_step.loss) == (0, "unobserved", 4.5)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step(closure)
    report = optimizer.last_step
    assert (report.step, report.trials, report.loss, report.lr) == (0, 1, 4.5, (0.5,))
    assert (report.energy_before, report.energy_after) == (4.5, 0.5 * 1.5**2)
    assert report.required == 0.25 * report.predicted == 0.25 * 1.5**2 / 0.5
    optimizer.step(closure)
    assert (optimizer.last_step.step, optimizer.last_step.lr) == (1, (0.25,))
    assert optimizer.last_step.displacement == pytest.approx(0.25 * 1.5)


def test_the_first_report_after_shrinking_tells_the_scale_that_was_used() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=1.0, guard="lazy", grow=2.0)
    optimizer.param_groups[0]["step_scale"] = 0.125
    optimizer.step(closure_of(optimizer, w, f))
    assert optimizer.last_step.scale == optimizer.pending.proposal.scale == 0.25
    assert optimizer.last_step.lr == (0.25,)


def moved(w: nn.Parameter, _: Any) -> None:
    with torch.no_grad():
        w.add_(50.0)


def loaded(w: nn.Parameter, _: Any) -> None:
    module = nn.Module()
    module.w = w
    module.load_state_dict({"w": torch.full_like(w, 50.0)})


def reloaded(w: nn.Parameter, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moved(w, optimizer)


def grown(w: nn.Parameter, optimizer: Any) -> None:
    moved(w, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def stepped(w: nn.Parameter, optimizer: Any) -> None:
    w.grad = torch.full_like(w, -1e4)
    optimizer.step()


def tried(w: nn.Parameter, optimizer: Any) -> None:
    w.grad = torch.full_like(w, -1e4)
    optimizer.step(trial=lambda: -1e4 * w.sum())


def cast(w: nn.Parameter, _: Any) -> None:
    w.data = (w.data + 50.0).float()


@pytest.mark.parametrize("meddle", [moved, loaded, reloaded, grown, stepped, tried, cast])
@pytest.mark.parametrize("fused", [False, True])  # the fused step moves parameters without counting a new version
def test_where_somebody_else_has_moved_parameters_there_is_no_verdict_and_nothing_is_undone(
    meddle: Any, fused: bool
) -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=0.02, momentum=0.9, guard="lazy", fused=fused)
    closure = closure_of(optimizer, w, lambda w: f(w.double()))
    for _ in range(3):
        optimizer.step(closure)
    start = optimizer.pending.proposal.start.snapshot.values[w].clone()
    meddle(w, optimizer)
    if meddle is cast and fused:
        optimizer.state.clear()
    point = w.detach().clone()
    optimizer.step(closure)
    assert optimizer.last_step.verdict == "unobserved"
    assert optimizer.last_step.loss == pytest.approx(float(f(point.double())))
    assert float((w.detach() - point).norm()) < float((w.detach() - start).norm())  # a step from there, not a way back
    optimizer.step(closure)
    assert optimizer.last_step.verdict in {"decreased", "increased"}


def test_a_parameter_whose_gradient_comes_later_is_not_moved_by_a_retry() -> None:
    """The retry has the gradients of the old point, and there this parameter had none."""
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([a, b], lr=100.0, guard="lazy")

    def closure(with_b: bool) -> Any:
        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            loss = 0.5 * a.square().sum() + (0.5 * b.square().sum() if with_b else 4.5)
            loss.backward()
            return loss

        return evaluate

    optimizer.step(closure(False))
    for _ in range(3):
        optimizer.step(closure(True))
        assert optimizer.last_step.action == "undone"
        assert b.item() == 3.0
        assert b.grad is None


def test_a_copy_does_not_wait_for_the_verdict_of_the_original() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=1e3, guard="lazy")
    optimizer.step(closure_of(optimizer, w, f))
    twin = copy.deepcopy(optimizer)
    assert twin.pending is None
    v = twin.param_groups[0]["params"][0]
    assert v is not w
    point = v.detach().clone()
    twin.step(closure_of(twin, v, f))
    assert twin.last_step.verdict == "unobserved"
    assert not torch.equal(v.detach(), point)
    optimizer.step(closure_of(optimizer, w, f))  # the original goes back
    assert optimizer.last_step.action == "undone"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_sends_back_and_at_the_start_is_skipped(what: str) -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.1, momentum=0.9, guard="lazy")
    good = closure_of(optimizer, w, lambda w: w.square().sum())

    def bad() -> torch.Tensor:
        loss = good()
        if what == "gradient":
            w.grad.fill_(math.nan)
        return loss * math.nan if what == "loss" else loss

    optimizer.step(bad)
    assert (optimizer.last_step.action, optimizer.last_step.verdict) == ("undone", "nonfinite")
    assert w.item() == 1.0
    assert optimizer.param_groups[0]["skipped"] == 1
    assert len(optimizer.state) == 0
    optimizer.step(good)
    assert w.item() == pytest.approx(0.8)
    optimizer.step(bad)
    assert w.item() == pytest.approx(0.9)  # half the step, from the start
    assert optimizer.param_groups[0]["skipped"] == 1  # it was not skipped but shortened
    optimizer.step(good)
    assert optimizer.last_step.verdict == "decreased"


def test_a_start_that_is_not_finite_may_raise() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.1, guard="lazy", on_nonfinite="raise")
    with pytest.raises(StabilityError, match="the loss is not finite"):
        optimizer.step(closure_of(optimizer, w, lambda w: w.sum() * math.nan))
    assert w.item() == 1.0


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_of_the_closure_costs_nothing_and_the_verdict_comes_later(kind: type[BaseException]) -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=1e3, guard="lazy")
    start = w.detach().clone()
    optimizer.step(closure_of(optimizer, w, f))
    point = w.detach().clone()

    def broken() -> torch.Tensor:
        raise kind("stop")

    with pytest.raises(kind, match="stop"):
        optimizer.step(broken)
    assert torch.equal(w.detach(), point)
    optimizer.step(closure_of(optimizer, w, f))
    assert optimizer.last_step.action == "undone"
    assert float((w.detach() - start).norm()) < float((point - start).norm())


@pytest.mark.parametrize("refused", [False, True])
def test_an_interrupt_within_a_step_leaves_parameters_state_and_scale_as_they_were(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=1e3 if refused else 0.02, momentum=0.9, guard="lazy")
    closure = closure_of(optimizer, w, f)
    start = w.detach().clone()
    optimizer.step(closure)
    point = start if refused else w.detach().clone()
    buffer = None if refused else optimizer.state[w]["momentum_buffer"].clone()
    advance = SGD.advance

    def interrupted(self: SGD, closure: Any = None) -> None:
        advance(self, closure)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SGD, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
    assert torch.equal(w.detach(), point)
    assert buffer is None or torch.equal(optimizer.state[w]["momentum_buffer"], buffer)
    assert optimizer.param_groups[0]["lr"] in {1e3, 0.02}
    assert optimizer.pending is None
    optimizer.step(closure)
    assert optimizer.last_step.verdict == "unobserved"


def test_without_a_loss_the_scale_is_kept_and_what_is_not_finite_is_skipped() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=0.5, guard="lazy")
    optimizer.param_groups[0]["step_scale"] = 0.25

    def closure(gradient: float) -> Any:
        def evaluate() -> None:
            w.grad = torch.tensor([gradient])

        return evaluate

    optimizer.step(closure(1.0))
    assert w.item() == 0.875
    assert optimizer.last_step.verdict == "unobserved"
    assert optimizer.last_step.lr == (0.125,)
    optimizer.step(closure(math.nan))
    assert w.item() == 0.875
    assert optimizer.last_step.verdict == "nonfinite"


def test_maximizing_is_judged_by_the_negative_loss() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=50.0, maximize=True, guard="lazy")
    closure, start = closure_of(optimizer, w, lambda w: -f(w)), float(-f(w.detach()))
    actions = set()
    for _ in range(60):
        optimizer.step(closure)
        actions.add(optimizer.last_step.action)
    assert "undone" in actions
    assert float(-f(w.detach())) > start
