"""What ``step`` takes beside a closure, and what the guard does in steps that it does not check."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.errors import StabilityError
from stableopt.optim import SGD, AdamW, guard
from stableopt.optim.modules import buffers_put_back
from tests.optim.problems import Network, closure_of, network_closure, quadratic

CLASSES = [SGD, AdamW]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("every", [1, 3, 10])
def test_every_kth_step_is_checked_and_costs_one_evaluation(cls: type, every: int) -> None:
    model = Network()
    optimizer = cls(model.parameters(), lr=1e-4, every=every)
    closure, checked = network_closure(optimizer, model), []
    for _ in range(20):
        optimizer.step(closure)
        checked.append(optimizer.last_step.verdict != "unobserved")
        assert optimizer.last_step.step == len(checked) - 1
    assert checked == [t % every == 0 for t in range(20)]
    assert model.calls == 20 + sum(checked)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_steps_between_use_the_scale_of_the_last_check(cls: type) -> None:
    w, f, _ = quadratic()
    optimizer = cls([w], lr=1e3, every=4, grow=1.0)
    reports = []
    for _ in range(12):
        optimizer.step(closure_of(optimizer, w, f))
        reports.append(optimizer.last_step)
    assert reports[0].scale < 0.1
    for i, report in enumerate(reports):
        assert report.scale == reports[i - i % 4].scale
        assert report.lr[0] == pytest.approx(1e3 * report.scale)
    assert all(r.action == "unguarded" for i, r in enumerate(reports) if i % 4)


def test_a_copy_and_a_checkpoint_keep_the_rhythm() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=0.01, every=3)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, w, f))
    other = SGD([w], lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    verdicts = []
    for _ in range(3):
        other.step(closure_of(other, w, f))
        verdicts.append(other.last_step.verdict)
    assert verdicts == ["unobserved", "decreased", "unobserved"]


@pytest.mark.parametrize("mode", ["backtrack", "strict", "lazy"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("cls", [*CLASSES, guard(torch.optim.Adagrad)])
def test_what_is_not_finite_is_skipped_and_counted_or_raised(mode: str, where: str, every: int, cls: type) -> None:
    if mode == "lazy" and every > 1:
        pytest.skip("lazy judges every step")
    w = nn.Parameter(torch.ones(2))
    optimizer = cls([w], lr=0.1, guard=mode, every=every)

    def bad() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        if where == "gradient":
            w.grad[1] = math.inf
        return loss * (math.nan if where == "loss" else 1.0)

    for skipped in (1, 2, 3):
        optimizer.step(bad)
        assert optimizer.param_groups[0]["skipped"] == skipped
        assert w.tolist() == [1.0, 1.0]
        assert (optimizer.last_step.action, optimizer.last_step.verdict) == ("undone", "nonfinite")
    assert all(not s or float(s.get("step", 0)) == 0 for s in optimizer.state.values())
    optimizer.param_groups[0]["on_nonfinite"] = "raise"
    with pytest.raises(StabilityError, match="is not finite; parameters and state are as before"):
        optimizer.step(bad)
    assert w.tolist() == [1.0, 1.0]
    assert optimizer.param_groups[0]["skipped"] == 4
    optimizer.param_groups[0]["skipped"] = 0
    optimizer.step(closure_of(optimizer, w, lambda w: w.square().sum()))
    assert optimizer.param_groups[0]["skipped"] == 0
    assert w.tolist() != [1.0, 1.0]


@pytest.mark.parametrize("mode", ["backtrack", "strict", "lazy"])
def test_without_closure_and_trial_what_is_not_finite_is_skipped_too(mode: str) -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.1, guard=mode)
    w.grad = torch.tensor([1.0, math.nan])
    optimizer.step()
    assert w.tolist() == [1.0, 1.0]
    w.grad = torch.ones(2)
    optimizer.step(loss=torch.tensor(math.inf))
    assert w.tolist() == [1.0, 1.0]
    assert optimizer.param_groups[0]["skipped"] == 2
    optimizer.param_groups[0]["step_scale"] = 0.5
    optimizer.step(loss=3.0)
    assert w.tolist() == [0.95, 0.95]
    assert (optimizer.last_step.loss, optimizer.last_step.verdict) == (3.0, "unobserved")
    assert optimizer.last_step.lr == (0.05,)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", ["closure and trial", "trial", "trial and loss"])
def test_a_trial_gives_the_same_steps_as_a_closure(cls: type, how: str) -> None:
    w, f, _ = quadratic()
    v = nn.Parameter(w.detach().clone())
    ours, theirs, trials = cls([w], lr=3.0, guard="strict"), cls([v], lr=3.0, guard="strict"), 0

    def trial() -> torch.Tensor:
        nonlocal trials
        trials += 1
        assert not torch.is_grad_enabled()
        return f(w)

    for _ in range(15):
        trials = 0
        if how == "closure and trial":
            value = ours.step(closure_of(ours, w, f), trial=trial)
            assert float(value.detach()) == ours.last_step.loss
        else:
            ours.zero_grad()
            loss = f(w)
            loss.backward()
            value = ours.step(trial=trial, **({"loss": loss} if how == "trial and loss" else {}))
            assert value is None
        theirs.step(closure_of(theirs, v, f))
        a, b = ours.last_step, theirs.last_step
        assert (a.action, a.trials, a.scale, a.energy_before, a.energy_after) == (
            b.action,
            b.trials,
            b.scale,
            b.energy_before,
            b.energy_after,
        )
        assert trials == a.trials + (how == "trial")
    assert torch.equal(w.detach(), v.detach())


def test_a_closure_without_a_value_is_judged_if_there_is_a_trial() -> None:
    w, f, _ = quadratic()
    optimizer = SGD([w], lr=100.0, guard="strict")

    def closure() -> None:
        optimizer.zero_grad()
        f(w).backward()

    assert optimizer.step(closure, trial=lambda: f(w)) is None
    assert optimizer.last_step.action == "shrunk"
    assert optimizer.last_step.verdict == "decreased"


def test_a_closure_without_a_value_keeps_the_scale_that_was_found() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = SGD([w], lr=1.0)
    optimizer.param_groups[0]["step_scale"] = 0.25

    def closure() -> None:
        w.grad = torch.ones(1)

    optimizer.step(closure)
    assert w.item() == 0.75
    assert optimizer.last_step.lr == (0.25,)


@pytest.mark.parametrize("bad", [torch.tensor(1.0), 3, "loss"])
def test_what_cannot_be_called_is_refused(bad: Any) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.step(bad)
    with pytest.raises(TypeError, match="trial must be a function"):
        optimizer.step(trial=bad)


@pytest.mark.parametrize("value", [torch.ones(2), "0.5", None, [1.0], 1j, True])
def test_a_trial_that_is_no_number_is_refused_and_nothing_has_moved(value: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones(2)
    for extra in ({}, {"loss": 1.0}):
        with pytest.raises(ValueError, match="one real number"):
            optimizer.step(trial=lambda: value, **extra)
        assert w.tolist() == [1.0, 1.0]
        assert len(optimizer.state) == 0
        assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_in_a_trial_leaves_parameters_state_rate_and_gradients(
    kind: type[BaseException], call: int
) -> None:
    w = nn.Parameter(torch.full((2,), 3.0))
    optimizer = AdamW([w], lr=100.0, guard="strict")
    good = closure_of(optimizer, w, lambda w: w.square().sum())
    optimizer.step(good)
    optimizer.param_groups[0]["step_scale"] = 1.0
    good()
    gradient, grad = w.grad.clone(), w.grad
    value, state = w.detach().clone(), {k: v.clone() for k, v in optimizer.state[w].items()}
    calls = 0

    def trial() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise kind("stop")
        return w.square().sum()

    with pytest.raises(kind, match="stop"):
        optimizer.step(trial=trial)
    assert torch.equal(w.detach(), value)
    assert w.grad is grad
    assert torch.equal(grad, gradient)
    assert all(torch.equal(v, optimizer.state[w][k]) for k, v in state.items())
    assert optimizer.param_groups[0]["lr"] == 100.0
    assert optimizer.param_groups[0]["step_count"] == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_both_ways_to_empty_gradients_give_the_same_run(set_to_none: bool) -> None:
    ends = []
    for flag in (True, set_to_none):
        w, f, _ = quadratic()
        optimizer = SGD([w], lr=3.0, momentum=0.9, guard="strict")

        def closure(flag: bool = flag, f: Any = f, w: Any = w, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=flag)
            loss = f(w)
            loss.backward()
            return loss

        for _ in range(10):
            optimizer.step(closure)
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_debug_finds_a_closure_that_draws_a_new_batch() -> None:
    torch.manual_seed(0)
    w, batches = nn.Parameter(torch.ones(3)), iter(torch.randn(100, 3))
    optimizer = SGD([w], lr=0.01, debug=True)

    def draw(w: torch.Tensor) -> torch.Tensor:
        return (w - next(batches)).square().sum()

    with pytest.warns(UserWarning, match="draw the batch outside of the closure") as caught:
        optimizer.step(closure_of(optimizer, w, draw))
    assert caught[0].filename == __file__


def test_debug_finds_a_closure_that_changes_parameters() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SGD([w], lr=0.01, debug=True)

    def clamped(w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            w.clamp_(-1.0, 1.0)
        return w.square().sum()

    with pytest.warns(UserWarning, match="the closure changes parameters"):
        optimizer.step(closure_of(optimizer, w, clamped))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        optimizer.step(closure_of(optimizer, w, clamped))


@pytest.mark.parametrize("debug", [False, True])
def test_debug_is_quiet_about_dropout_and_batch_norm_and_changes_nothing(debug: bool) -> None:
    model = Network()
    optimizer = SGD(model.parameters(), lr=0.01, debug=debug, guard="strict")
    torch.manual_seed(4)
    closure = network_closure(optimizer, model)
    for _ in range(5):
        optimizer.step(closure)
    assert model.calls == 5 * (3 if debug else 2)
    reference = Network()
    other = SGD(reference.parameters(), lr=0.01, guard="strict")
    torch.manual_seed(4)
    closure = network_closure(other, reference)
    for _ in range(5):
        other.step(closure)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    )


def test_a_parameter_that_gets_its_first_gradient_late_joins_in() -> None:
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([a, b], lr=0.1, guard="strict")
    optimizer.step(closure_of(optimizer, a, lambda a: a.square().sum()))
    assert b.item() == 3.0
    b.requires_grad_(False)
    optimizer.step(closure_of(optimizer, a, lambda a: a.square().sum()))
    b.requires_grad_(True)
    optimizer.step(closure_of(optimizer, a, lambda a: a.square().sum() + 1e6 * b.square().sum()))
    assert optimizer.last_step.verdict == "decreased"
    assert b.item() < 3.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.tensor([1.0]))]})
    c = optimizer.param_groups[1]["params"][0]
    optimizer.step(closure_of(optimizer, a, lambda a: (a.square() + b.square() + c.square()).sum()))
    assert c.item() < 1.0


def test_gradients_all_missing_is_a_step_of_nothing() -> None:
    w = nn.Parameter(torch.ones(2))
    for mode in ("off", "monitor", "lazy", "backtrack", "strict"):
        optimizer = SGD([w], lr=0.1, guard=mode)
        for _ in range(2):
            optimizer.step(lambda: torch.tensor(1.0))
            optimizer.step()
            optimizer.step(trial=lambda: 1.0)
        assert w.tolist() == [1.0, 1.0]
        assert optimizer.param_groups[0]["skipped"] == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_in_the_closure(backend: str) -> None:
    runs = []
    for compiled in (False, True):
        model = Network()
        torch.manual_seed(5)
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9, guard="strict")
        call = torch.compile(model.layers, backend=backend) if compiled else model.layers
        x, y = torch.randn(32, 8), torch.randint(3, (32,))
        closure = closure_of(optimizer, model, lambda _, call=call, x=x, y=y: nn.functional.cross_entropy(call(x), y))
        for _ in range(4):
            optimizer.step(closure)
        runs.append(({k: v.clone() for k, v in model.state_dict().items()}, optimizer.last_step))
    for key, value in runs[0][0].items():
        torch.testing.assert_close(value, runs[1][0][key], rtol=1e-9, atol=1e-9)
    assert runs[0][1].trials == runs[1][1].trials


def test_who_puts_back_around_a_compiled_model_has_no_hook_while_it_runs_and_puts_back_all_the_same() -> None:
    torch._dynamo.reset()
    plain, inner = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    compiled = torch.compile(inner, backend="eager")
    x = torch.randn(4, 2)
    loss = lambda: compiled(x).sum()  # noqa: E731
    with buffers_put_back(lambda: None):  # sees neither
        with buffers_put_back(loss), warnings.catch_warnings(action="error"):
            loss()  # torch would warn of hooks on all modules
        inner(x)
        plain(x)
        assert [int(m.num_batches_tracked) for m in (plain, inner)] == [1, 1]
    assert [int(m.num_batches_tracked) for m in (plain, inner)] == [0, 0]
