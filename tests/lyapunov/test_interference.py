"""The run with a monitor is the run without one, bit for bit: every tier, every kind of optimizer, also as the loss turns NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt import optim
from stableopt.lyapunov import Every, Monitor
from stableopt.lyapunov.budget import TIERS
from tests.lyapunov.training import batches, equal, make_closure, make_model, picture, seed_everything


class Bare(Optimizer):
    """A third party's: no closure, state of its own, in-place on ``data``, and a step that returns something."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})
        self.calls = 0

    def step(self) -> str:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("kept", torch.zeros_like(p))
                    kept.mul_(0.5).add_(p.grad)
                    p.data -= group["lr"] * kept
        return "done"


class Lookahead(torch.optim.SGD):
    """Another third party's: calls the step of its base class, and moves the parameters once more after it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            slow.lerp_(p, 0.5)
            p.copy_(slow)
        return loss


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.ndim == 2]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "torch LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "torch Muon": lambda p: torch.optim.Muon(matrices(p), lr=0.02),
    "torch Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Bare": Bare,
    "Lookahead": lambda p: Lookahead(p, lr=0.05, momentum=0.9),
    "SGD off": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, guard="off"),
    "SGD monitor": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, guard="monitor"),
    "SGD backtrack": lambda p: optim.SGD(p, lr=0.5, momentum=0.9),
    "SGD strict": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, guard="strict"),
    "SGD lazy": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, guard="lazy"),
    "SGD every": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, every=3),
    "AdamW off": lambda p: optim.AdamW(p, lr=0.01, guard="off"),
    "AdamW strict": lambda p: optim.AdamW(p, lr=0.1, guard="strict"),
    "AdamW lazy": lambda p: optim.AdamW(p, lr=0.1, guard="lazy"),
    "Muon": lambda p: optim.Muon(matrices(p), lr=0.02),
    "guarded Adagrad": lambda p: optim.guard(torch.optim.Adagrad)(p, lr=0.1, guard="strict"),
}
NEEDS_A_CLOSURE, TAKES_NONE = {"torch LBFGS"}, {"Bare"}
ALL = Every(**dict.fromkeys(TIERS, 1))


def only(tier: str) -> Every:
    return Every(**{name: 1 if name == tier else None for name in TIERS})


def fixed_batch(model: nn.Module) -> Callable[[], Tensor]:
    x, y = batches(1, size=4)[0]
    return lambda: (model(x) - y).square().mean()


def run(
    name: str,
    settings: dict[str, Any] | None,
    *,
    with_closure: bool,
    steps: int = 4,
    probe: str = "",
    bad: int = -1,
    zero_in_place: bool = False,
) -> tuple[list[Any], Monitor | None]:
    """Train, watched if there are settings; return the picture of every step, and whether gradients stayed the same objects."""
    seed_everything()
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    if zero_in_place:
        original = optimizer.zero_grad
        optimizer.zero_grad = lambda *_: original(set_to_none=False)  # type: ignore[method-assign]
    monitor = None
    if settings is not None:
        probes = {"": None, "one": fixed_batch(model), "two": [fixed_batch(model), fixed_batch(model)]}
        monitor = Monitor(
            model, optimizer, probe=probes[probe], **{"policy": "observe", "max_overhead": None, **settings}
        )
        monitor.attach()
    pictures: list[Any] = []
    for i, (x, y) in enumerate(batches(steps)):
        x = x * math.nan if i == bad else x
        model.train()
        model[6].eval()  # type: ignore[operator, index]  # one module in another mode than the rest
        closure = make_closure(model, optimizer, x, y)
        before: list[Any] = []

        def watched(closure: Any = closure, before: list[Any] = before) -> Tensor:
            loss = closure()
            before[:] = before or [p.grad for p in model.parameters()]  # of the first evaluation
            return loss

        if with_closure:
            result = optimizer.step(watched)
        else:
            watched()
            result = optimizer.step()
        if name not in NEEDS_A_CLOSURE:
            pictures.append([a is p.grad for a, p in zip(before, model.parameters(), strict=True)])
        pictures.append(picture(model, optimizer) | {"result": result})
    if monitor is not None:
        monitor.close()
        pictures.append(picture(model, optimizer))
    else:
        pictures.append(picture(model, optimizer))
    return pictures, monitor


def assert_same(name: str, settings: dict[str, Any], **options: Any) -> Monitor:
    """Assert that a run with a monitor is the run without one, and return the monitor."""
    alone, _ = run(name, None, **options)
    watched, monitor = run(name, settings, **options)
    for step, (a, b) in enumerate(zip(alone, watched, strict=True)):
        if isinstance(a, dict):
            assert [key for key in a if not equal(a[key], b[key])] == [], step
        else:
            assert all(a), f"the run itself exchanges gradients: {step}"
            assert all(b), step
    assert monitor is not None
    return monitor


WAYS = [
    (name, closure)
    for name in OPTIMIZERS
    for closure in (True, False)
    if not (name in NEEDS_A_CLOSURE and not closure) and not (name in TAKES_NONE and closure)
]


OFTEN = {"torch SGD", "torch AdamW", "Bare", "Lookahead", "SGD strict", "guarded Adagrad"}
"""Those that are watched without a closure by default."""


@pytest.mark.parametrize(
    ("name", "with_closure"),
    [pytest.param(*way, marks=() if way[1] or way[0] in OFTEN else pytest.mark.slow) for way in WAYS],
)
def test_with_all_tiers_at_every_step(name: str, with_closure: bool) -> None:
    monitor = assert_same(name, {"every": ALL}, with_closure=with_closure)
    assert monitor.summary()["steps"] == monitor.summary()["records"] == 4
    assert all(record.norms for record in monitor.records)
    # LBFGS ends with gradients of another point than it began with, and so does a lazy guard that goes back
    assert all(record.grad_norms or record.notes for record in monitor.records)
    assert all(record.grad_norms for record in monitor.records) or name.endswith(("LBFGS", "lazy"))
    compared = [record.verdict not in {"unobserved", "nonfinite"} for record in monitor.records]
    assert any(compared) == with_closure
    if with_closure and name != "torch LBFGS":
        assert all(record.hvp for record in monitor.records)


ALONE = [
    pytest.param(name, tier, probe, id=f"{name}-{tier}-{probe or 'closure'}", marks=() if quick else pytest.mark.slow)
    for name, closure in WAYS
    if closure
    for tier in TIERS
    for probe in (("", "one", "two") if tier in {"sharpness", "forward"} else ("",))
    for quick in (name in {"torch AdamW", "SGD strict"} and probe != "two",)
]


@pytest.mark.parametrize(("name", "tier", "probe"), ALONE)
def test_with_each_tier_alone(name: str, tier: str, probe: str) -> None:
    monitor = assert_same(name, {"every": only(tier)}, with_closure=True, probe=probe, steps=3)
    seen = {
        "vitals": lambda r: (r.grad_norms or r.notes) and math.isfinite(r.weight_norm),
        "energy": lambda r: r.verdict != "unobserved",
        "sharpness": lambda r: math.isfinite(r.plain_sharpness) and (probe != "two" or not math.isnan(r.noise_scale)),
        "layers": lambda r: bool(r.norms),
        "forward": lambda r: math.isfinite(r.forward_exponent) and r.kinks is not None,
        "gaps": lambda r: r.norm_gap == {},
    }[tier]
    found = [bool(seen(record)) for record in monitor.records]
    seldom = tier == "energy" and name.endswith(("lazy", "every"))  # whose guard compares some steps
    assert any(found) if seldom else all(found), [r.reason for r in monitor.records]


@pytest.mark.parametrize(
    "name", ["torch SGD", "torch AdamW", "Bare", "SGD monitor", "SGD strict", "SGD lazy", "torch LBFGS"]
)
@pytest.mark.parametrize("probe", ["", pytest.param("one", marks=pytest.mark.slow)])
def test_as_the_loss_turns_nan(name: str, probe: str) -> None:
    monitor = assert_same(name, {"every": ALL}, with_closure=name != "Bare", probe=probe, steps=4, bad=2)
    assert any(record.nonfinite for record in monitor.records)


@pytest.mark.parametrize("settings", [{"every": Every()}, {"max_overhead": 0.5, "every": ALL}], ids=str)
def test_at_the_usual_intervals_over_many_steps(settings: dict[str, Any]) -> None:
    monitor = assert_same("torch AdamW", settings, with_closure=True, steps=20)
    assert monitor.summary()["steps"] == 20


def test_the_comparison_would_notice_a_careless_monitor() -> None:
    def careless(*_: Any) -> None:
        torch.rand(1)

    alone, _ = run("torch SGD", None, with_closure=True, steps=2)
    make = OPTIMIZERS["torch SGD"]

    def watched(parameters: Any) -> Optimizer:
        optimizer = make(parameters)
        optimizer.register_step_post_hook(careless)
        return optimizer

    OPTIMIZERS["careless"] = watched
    try:
        other, _ = run("careless", None, with_closure=True, steps=2)
    finally:
        del OPTIMIZERS["careless"]
    assert not equal(alone[-1], other[-1])


def test_gradients_that_are_zeroed_in_place_are_the_same() -> None:
    for name in ("torch SGD", "SGD strict"):
        alone, _ = run(name, None, with_closure=True, zero_in_place=True)
        watched, _ = run(name, {"every": ALL}, with_closure=True, zero_in_place=True)
        assert all(map(equal, alone, watched))


def test_a_closed_monitor_leaves_no_hook() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["torch SGD"](model.parameters())
    hooks = (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))
    with Monitor(model, optimizer) as monitor:
        assert monitor.attach() is monitor
        assert len(optimizer._optimizer_step_pre_hooks) == hooks[0] + 1
    monitor.close()
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks


def test_an_error_in_the_loop_detaches_and_passes() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["torch SGD"](model.parameters())
    with pytest.raises(KeyboardInterrupt), Monitor(model, optimizer):
        raise KeyboardInterrupt
    assert not optimizer._optimizer_step_pre_hooks
