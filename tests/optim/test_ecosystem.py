"""Guarded optimizers in what people train with: Lightning, accelerate, the Trainer of transformers, and torch's schedulers.

The parts that need a package which is not installed are skipped.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableopt import optim
from stableopt.constraints import L1, Box, L2Ball
from stableopt.optim import GuardedOptimizer

BALL = L2Ball(1.5)


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


@contextmanager
def quiet() -> Iterator[None]:
    """Other packages warn of their own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 2))


def constrained(model: nn.Module, lr: float = 0.01, **settings: Any) -> GuardedOptimizer:
    """Weights in balls, everything else in a box that is never left."""
    weights = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": weights, "constraint": BALL}, {"params": rest, "constraint": Box(-9.0, 9.0)}]
    return optim.AdamW(groups, lr=lr, **settings)


def assert_feasible(model: nn.Module) -> None:
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(BALL.violation(p.detach()) == 0.0 for p in model.parameters() if p.ndim == 2)


# --- Lightning: automatic optimization passes a closure ---


def lightning_parts(lr: float, reports: list[Any], **settings: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = constrained(self.net, lr, **settings)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        def on_train_batch_end(self, *_: Any) -> None:
            report = self.optimizers().optimizer.last_step
            if report is not None and (not reports or reports[-1] is not report):
                reports.append(report)

    return lightning, Classifier


def fit(lightning: Any, model: Any, folder: Path, *, epochs: int, checkpoint: str | None = None, **options: Any) -> Any:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, enable_checkpointing=False, **options,
        )  # fmt: skip
        trainer.fit(model, loader, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("mode", ["backtrack", "strict"])
def test_lightning_trains_under_the_guard_at_a_learning_rate_a_hundred_times_too_large(
    mode: str, tmp_path: Path
) -> None:
    reports: list[Any] = []
    lightning, classifier = lightning_parts(1.0, reports, guard=mode)
    model = classifier()
    trainer = fit(lightning, model, tmp_path, epochs=3, gradient_clip_val=1.0)
    assert len(reports) == 12
    assert {r.action for r in reports} <= {"accepted", "shrunk", "restarted", "undone"}
    assert any(r.action != "accepted" for r in reports)
    if mode == "strict":
        assert all(r.energy_after <= r.energy_before + r.tolerance for r in reports)
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == 0.125  # what the scheduler has made of 1
    assert group["step_scale"] < 1.0
    assert_feasible(model.net)


def test_lightning_steps_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    """Clipping is in the closure; the guard evaluates the training step again without a trace."""
    reports: list[Any] = []
    lightning, classifier = lightning_parts(1.0, reports, guard="strict")
    model, by_hand = classifier(), net()
    model.net[2].p = by_hand[2].p = 0.0  # its loops draw random numbers of their own
    fit(lightning, model, tmp_path, epochs=1, gradient_clip_val=0.5)
    optimizer = constrained(by_hand, 1.0, guard="strict")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(by_hand(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            return loss

        optimizer.step(closure)
        assert optimizer.last_step is not None
        assert optimizer.last_step.action == reports[optimizer.last_step.step].action
    for (key, value), other in zip(by_hand.state_dict().items(), model.net.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, msg=key)


def test_lightning_accumulates_and_only_the_last_part_is_judged(tmp_path: Path) -> None:
    reports: list[Any] = []
    lightning, classifier = lightning_parts(0.01, reports, guard="backtrack")
    model = classifier()
    fit(lightning, model, tmp_path, epochs=2, accumulate_grad_batches=2)
    assert len(reports) == 4
    assert_feasible(model.net)


def test_lightning_goes_on_from_a_checkpoint_as_it_would_have(tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        reports: list[Any] = []
        lightning, classifier = lightning_parts(1.0, reports, guard="strict")
        model = classifier()
        model.net[2].p = 0.0  # a checkpoint holds no random state
        if interrupted:
            trainer = fit(lightning, model, tmp_path, epochs=1)
            with quiet():
                trainer.save_checkpoint(tmp_path / "one.ckpt")
            model = classifier()
            model.net[2].p = 0.0
        trainer = fit(
            lightning, model, tmp_path, epochs=3, checkpoint=str(tmp_path / "one.ckpt") if interrupted else None
        )
        ends.append((model.net.state_dict(), trainer.optimizers[0].param_groups[0]["step_scale"], reports[-1].step))
    for key, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][key], rtol=0, atol=0, msg=key)
    assert ends[0][1:] == ends[1][1:]


def test_lightning_with_mixed_precision(tmp_path: Path) -> None:
    reports: list[Any] = []
    lightning, classifier = lightning_parts(1.0, reports, guard="strict")
    model = classifier()
    fit(lightning, model, tmp_path, epochs=1, precision="bf16-mixed")
    assert len(reports) == 4
    assert all(math.isfinite(r.energy_after) and r.energy_after <= r.energy_before + r.tolerance for r in reports)
    assert_feasible(model.net)


# --- accelerate: the wrapper hands the closure on ---


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    with quiet():
        made = accelerate.Accelerator(cpu=True)
        yield made
        made.free_memory()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_hands_the_closure_on(accelerator: Any) -> None:
    x, y = data()
    ends = []
    for prepared in (False, True):
        model = net()
        optimizer: Any = constrained(model, 1.0, guard="strict")
        inner, backward = optimizer, Tensor.backward
        if prepared:
            with quiet():
                model, optimizer = accelerator.prepare(model, optimizer)
            backward = accelerator.backward
            assert inner is optimizer.optimizer
        actions = []
        for _ in range(4):

            def closure(
                model: Any = model, optimizer: Any = optimizer, backward: Callable[..., None] = backward
            ) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                backward(loss)
                return loss

            optimizer.step(closure)
            actions.append(inner.last_step.action)
        ends.append((actions, {k: v.clone() for k, v in model.state_dict().items()}))
    assert ends[0][0] == ends[1][0]
    assert "shrunk" in ends[0][0]
    for key, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][key], rtol=0, atol=0, msg=key)


def test_accelerate_without_closure_accumulates_skips_what_is_not_finite_and_restores(
    accelerator: Any, tmp_path: Path
) -> None:
    x, y = data()
    model = net()
    inner = constrained(model, 0.1)
    with quiet():
        wrapped, optimizer, scheduler = accelerator.prepare(
            model, inner, torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
        )
    accelerator.gradient_state.plugin_kwargs["num_steps"] = accelerator.gradient_accumulation_steps = 2
    steps = 0
    for i in range(6):
        with accelerator.accumulate(wrapped):
            loss = F.cross_entropy(wrapped(x), y) * (float("nan") if i == 4 else 1.0)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                steps += 1
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert steps == 3
    assert inner.param_groups[0]["step_count"] == 3
    assert inner.param_groups[0]["skipped"] == 1
    assert_feasible(model)
    with quiet():
        accelerator.save_state(str(tmp_path))
        expected = copy.deepcopy(model.state_dict()), copy.deepcopy(inner.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        inner.param_groups[0]["step_scale"] = 0.25
        accelerator.load_state(str(tmp_path))
    for key, value in expected[0].items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    assert inner.state_dict()["param_groups"] == expected[1]["param_groups"]
    assert inner.param_groups[0]["constraint"] == BALL


# --- transformers: no closure ---


@pytest.mark.parametrize("spoiled", [False, True], ids=["", "nan"])
def test_the_trainer_of_transformers_ends_feasible_and_skips_what_is_not_finite(spoiled: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = net(), 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            logits = self.net(x)
            loss = F.cross_entropy(logits, labels)
            return {"loss": loss * float("nan") if spoiled and self.calls == 2 else loss, "logits": logits}

    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = Classifier()
    optimizer = constrained(model.net, 0.05, guard="strict")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    with quiet():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, save_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, logging_strategy="no", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler)  # type: ignore[arg-type]
        )  # fmt: skip
        trainer.train()
        assert optimizer.param_groups[0]["skipped"] == int(spoiled)
        assert optimizer.param_groups[0]["step_count"] == 4
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
        assert optimizer.last_step is not None
        assert optimizer.last_step.verdict == "unobserved"
        assert_feasible(model.net)
        if not spoiled:  # from the checkpoint in the middle to the same end
            torch.manual_seed(0)
            again = Classifier()
            other = constrained(again.net, 0.05, guard="strict")
            schedule = torch.optim.lr_scheduler.LinearLR(other, 1.0, 0.1, total_iters=4)
            second = transformers.Trainer(
                again, arguments, train_dataset=rows, optimizers=(other, schedule)  # type: ignore[arg-type]
            )  # fmt: skip
            second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert other.param_groups[0]["step_count"] == 4
            for key, value in model.state_dict().items():
                torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=key)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# --- torch alone ---


def test_grad_scaler_with_a_trial_guards_and_without_one_steps() -> None:
    x, y = data()
    for guarded in (True, False):
        model = net()
        optimizer = constrained(model, 1.0, guard="strict")
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()

            def trial(model: nn.Module = model) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return F.cross_entropy(model(x), y)

            scaler.step(optimizer, **({"trial": trial} if guarded else {}))
            scaler.update()
            report = optimizer.last_step
            assert report is not None
            assert (report.verdict == "unobserved") != guarded
        assert_feasible(model)
        assert (optimizer.param_groups[0]["step_scale"] < 1.0) == guarded
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer, lambda: 0.0)


def test_accelerate_with_a_scaler_hands_on_no_closure_by_position() -> None:
    accelerate = pytest.importorskip("accelerate")
    x, y = data()
    model = net()
    inner = constrained(model, 0.01, guard="strict")
    with quiet():
        accelerate.Accelerator(cpu=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
        for i in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (float("inf") if i == 1 else 1.0)
            scaler.scale(loss).backward()
            optimizer.step()
            assert optimizer.step_was_skipped == (i == 1)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert inner.param_groups[0]["step_count"] == 2
    assert scaler.get_scale() == 128.0
    assert_feasible(model)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 5.0, total_steps=10),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_learning_rate_stays_the_schedulers_whatever_the_guard_does(name: str) -> None:
    """The same schedule as for torch's optimizer, momentum cycles included; every kept step lowers its energy."""
    x, y = data()
    model, plain = net(), net()
    optimizer = optim.SGD(model.parameters(), lr=5.0, momentum=0.9, guard="strict", prox=L1(1e-3))
    reference = torch.optim.SGD(plain.parameters(), lr=5.0, momentum=0.9)
    schedule, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    scales = set()
    for i in range(8):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        reference.step()
        report = optimizer.last_step
        assert report is not None
        assert report.energy_after <= report.energy_before + report.tolerance
        scales.add(report.scale)
        value = (1.0 + i,) if name == "ReduceLROnPlateau" else ()
        schedule.step(*value)
        other.step(*value)
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["momentum"] == reference.param_groups[0]["momentum"]
    assert min(scales) < 1.0
