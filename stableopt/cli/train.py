"""Train a model on a data set under the guard, and leave a run folder that can be resumed, certified and reported."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt import optim
from stableopt._version import __version__
from stableopt.certify import Certificate, certified_accuracy, certify
from stableopt.cli.data import Dataset, load_data
from stableopt.cli.models import RECIPES, build_model, prepare
from stableopt.cli.storage import load_checkpoint, save_checkpoint, write_json
from stableopt.lyapunov import Every, Monitor, StepRecord, read_records
from stableopt.nn import MarginCrossEntropy, lipschitz

__all__ = ["EPSILONS", "Progress", "Settings", "certify_run", "train", "train_again"]

EPSILONS = (0.1, 0.25, 0.5)
"""The radii at which certified accuracy is reported: Euclidean, inputs scaled to [0, 1]."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of a run; it is stored in ``run.json``.

    Args:
        model: ``"mlp"``, ``"resnet"`` or ``"cnn"``.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"``.
        lipschitz: the limit of the Lipschitz constant, Euclidean norm on both sides.
        epochs: passes over the training set; None takes the recipe's.
        lr: learning rate of the first epoch, from which it falls to zero along a cosine; None takes the recipe's.
        batch_size: inputs per step; None takes the recipe's.
        guard: ``"off"``, ``"monitor"``, ``"backtrack"`` or ``"strict"``.
        data: ``"digits"`` or the path of a ``.npz`` file.
        seed: of the initial weights and of the order of the batches.
        threads: of torch; the bytes of a run depend on their number, and models as small as these are fastest with one.

    Raises:
        ValueError: if a value is unknown or out of range.

    Examples:
        >>> Settings(model="cnn").resolved().epochs == RECIPES["cnn"].epochs
        True
        >>> Settings(lipschitz=-1.0)
        Traceback (most recent call last):
        ValueError: lipschitz must be a finite number > 0, got -1.0.
    """

    model: str = "mlp"
    optimizer: str = "adamw"
    lipschitz: float = 1.0
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    guard: str = "backtrack"
    data: str = "digits"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is written."""
        _choice("model", self.model, RECIPES)
        _choice("optimizer", self.optimizer, ("sgd", "adamw"))
        _choice("guard", self.guard, ("off", "monitor", "backtrack", "strict"))
        for name in ("lipschitz", "lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}.")
        for name, least in (("epochs", 0), ("batch_size", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")

    def resolved(self) -> Settings:
        """Return the settings with the recipe's values in place of None."""
        recipe = RECIPES[self.model]
        return replace(
            self,
            epochs=recipe.epochs if self.epochs is None else self.epochs,
            lr=recipe.lr[self.optimizer] if self.lr is None else self.lr,
            batch_size=recipe.batch_size if self.batch_size is None else self.batch_size,
        )


class Progress(Protocol):
    """Who is told how the run goes."""

    def step(self, epoch: int, record: StepRecord) -> None:
        """Learn of one optimizer step."""

    def epoch(self, epoch: int, proved: float, accuracy: float) -> None:
        """Learn of the end of an epoch: the proved Lipschitz bound now, and the accuracy on the test set."""


def train(settings: Settings, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train, certify and measure a model; the same settings on the same machine give the same bytes.

    Args:
        settings: what to do.
        out: the run folder; it is made if absent.
        resume: continue from the checkpoint of the last complete epoch in ``out``.
        progress: told of each step and epoch.

    Returns:
        The content of ``metrics.json``.

    Raises:
        FileExistsError: if ``out`` holds a run and ``resume`` is False.
        FileNotFoundError: if there is nothing to resume, or no data.
        ValueError: if the settings differ from those of the run that is resumed, or the data are not usable.
        KeyboardInterrupt: if the user interrupts; the folder then holds the last complete epoch.

    Note:
        After every epoch a checkpoint is written. Records of steps after the last checkpoint are dropped on resuming, because those
        steps are done again.
    """
    with _threads(settings.threads):
        _train(settings.resolved(), out, resume=resume, progress=progress)
    return certify_run(out)


def _train(settings: Settings, out: Path, *, resume: bool, progress: Progress | None) -> None:
    data = prepare(settings.model, load_data(settings.data))
    run = _Run(settings, data, out)
    run.start(resume=resume)
    with run.monitor as monitor:
        for epoch in range(run.epochs_done, settings.epochs or 0):
            run.set_learning_rate(epoch)
            for batch in run.batches(epoch):
                run.step(*batch)
                if progress is not None and monitor.last is not None:
                    progress.step(epoch, monitor.last)
            run.finish_epoch(epoch + 1)
            if progress is not None:
                progress.epoch(epoch, lipschitz(run.model.eval()).upper, _accuracy(run.model, data.x_test, data.y_test))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use this many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """The parts of a run between two checkpoints."""

    def __init__(self, settings: Settings, data: Dataset, out: Path) -> None:
        self.settings, self.data, self.out, self.epochs_done = settings, data, out, 0
        torch.manual_seed(settings.seed)
        self.model = build_model(settings.model, data.shape, data.classes, settings.lipschitz)
        self.optimizer = _optimizer(settings, self.model)
        recipe = RECIPES[settings.model]
        self.loss = MarginCrossEntropy(recipe.temperature / settings.lipschitz, recipe.offset * settings.lipschitz)

    def start(self, *, resume: bool) -> None:
        checkpoint, description = self.out / "checkpoint.pt", _description(self.settings, self.data)
        if resume:
            state = load_checkpoint(checkpoint)
            if (
                state["settings"] | {"epochs": None} != asdict(self.settings) | {"epochs": None}
                or state["digest"] != self.data.digest
            ):
                raise ValueError(
                    f"the run in '{self.out}' has other settings or data ({state['settings']}); "
                    "resume it with the same; only --epochs may differ, and the learning rate then follows the new number."
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epochs_done = state["epoch"]
            self.monitor = self._watch()
            self.monitor.load_state_dict(state["monitor"])
        elif checkpoint.exists():
            raise FileExistsError(
                f"'{self.out}' already holds a run: continue it with --resume, or choose another --out."
            )
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "energy.jsonl").unlink(missing_ok=True)
            self.monitor = self._watch()
        write_json(self.out / "run.json", description)
        if not resume:
            self.finish_epoch(0)

    def _watch(self) -> Monitor:
        """Return the monitor of the run; it looks by the count of steps alone, so that the same run writes the same bytes."""
        return Monitor(
            self.model, self.optimizer, self.out, every=Every(layers=50), max_overhead=None, policy="observe"
        )

    def set_learning_rate(self, epoch: int) -> None:
        """Let the learning rate fall to zero along a cosine over the epochs."""
        share = epoch / (self.settings.epochs or 1)
        for group in self.optimizer.param_groups:
            group["lr"] = (self.settings.lr or 0.0) * 0.5 * (1.0 + math.cos(math.pi * share))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch in an order that depends on the seed and the epoch only."""
        n, size = len(self.data.x_train), self.settings.batch_size or 1
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch))
        for index in order.split(size):
            yield self.data.x_train[index], self.data.y_train[index]

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def finish_epoch(self, epoch: int) -> None:
        checkpoint = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": asdict(self.settings),
            "digest": self.data.digest,
            "epoch": epoch,
            "monitor": self.monitor.state_dict(),
        }
        save_checkpoint(self.out / "checkpoint.pt", checkpoint)
        self.epochs_done = epoch


def certify_run(out: Path) -> dict[str, Any]:
    """Certify the last checkpoint of a run and measure it on the test set.

    Writes ``model.safetensors``, ``model.cert.json`` and ``metrics.json``. The figures are those of the certified weights: they are
    shrunk by their proved bound, so they can differ from the training weights in the last digits.

    Args:
        out: the run folder.

    Returns:
        The content of ``metrics.json``.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint.
    """
    state = load_checkpoint(out / "checkpoint.pt")
    settings = Settings(**state["settings"])
    with _threads(settings.threads):
        return _certify(out, state, settings)


def train_again(
    out: Path, steps: int, watch: Callable[[nn.Module, Optimizer, Dataset], AbstractContextManager[Any]]
) -> int:
    """Take the first steps of a run again, from its settings and its seed, and leave its files as they are.

    Args:
        out: the run folder.
        steps: how many steps to take at most; a run that had fewer ends earlier.
        watch: is given the fresh model, its optimizer and the data, and returns a context in which the steps are taken.

    Returns:
        How many steps were taken.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint, or there are no data.
        ValueError: if the checkpoint is damaged, the data are not those of the run, or ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}.")
    state = load_checkpoint(out / "checkpoint.pt")
    settings = Settings(**state["settings"])
    data = _same_data(out, state, settings)
    taken = 0
    with _threads(settings.threads):
        run = _Run(settings, data, out)
        with watch(run.model, run.optimizer, data):
            for epoch in range(settings.epochs or 0):
                run.set_learning_rate(epoch)
                for batch in itertools.islice(run.batches(epoch), steps - taken):
                    run.step(*batch)
                    taken += 1
    return taken


def _same_data(out: Path, state: dict[str, Any], settings: Settings) -> Dataset:
    data = prepare(settings.model, load_data(settings.data))
    if data.digest != state["digest"]:
        raise ValueError(
            f"the data '{settings.data}' are not those of the run in '{out}'; restore the file the run was made with."
        )
    return data


def _certify(out: Path, state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    data = _same_data(out, state, settings)
    model = build_model(settings.model, data.shape, data.classes, settings.lipschitz)
    model.load_state_dict(state["model"])
    certificate = certify(model.eval(), data.shape, lipschitz=settings.lipschitz, run=out)
    found = certified_accuracy(certificate, (data.x_test, data.y_test), EPSILONS)
    certificate.with_claims(replayable=found.claims()).save(out)
    metrics = (
        _metrics(certificate, data, found.radii)
        | _energy_counts(out)
        | {"epochs": state["epoch"], "steps": state["monitor"]["step"]}
    )
    write_json(out / "metrics.json", metrics)
    return metrics


def _metrics(certificate: Certificate, data: Dataset, radii: Tensor) -> dict[str, Any]:
    plain = certificate.module().eval()
    grid = [i / 50 for i in range(51)]
    return {
        "lipschitz": certificate.lipschitz,
        "train_accuracy": _accuracy(plain, data.x_train, data.y_train),
        "test_accuracy": _accuracy(plain, data.x_test, data.y_test),
        "certified_accuracy": {str(eps): float((radii > eps).double().mean()) for eps in EPSILONS},
        "curve": {"radius": grid, "certified_accuracy": [float((radii > eps).double().mean()) for eps in grid]},
    }


def _energy_counts(out: Path) -> dict[str, dict[str, int]]:
    """Count the actions and the verdicts of the energy record."""
    counts: dict[str, dict[str, int]] = {"actions": {}, "verdicts": {}}
    for record in read_records(out / "energy.jsonl") if (out / "energy.jsonl").exists() else []:
        for kind, value in (("actions", record.action), ("verdicts", record.verdict)):
            counts[kind][value] = counts[kind].get(value, 0) + 1
    return counts


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of inputs whose largest logit is that of the label."""
    return float((model.eval()(x).argmax(1) == y).double().mean())


def _optimizer(settings: Settings, model: nn.Module) -> optim.SGD | optim.AdamW:
    lr, guard = settings.lr or 0.0, cast("optim.GuardMode", settings.guard)
    if settings.optimizer == "sgd":
        return optim.SGD(model.parameters(), lr=lr, momentum=0.9, guard=guard)
    return optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, guard=guard)


def _description(settings: Settings, data: Dataset) -> dict[str, Any]:
    versions = {"stableopt": __version__, "torch": torch.__version__, "python": platform.python_version()}
    about = {
        "sha256": data.digest,
        "shape": list(data.shape),
        "classes": data.classes,
        "train": len(data.x_train),
        "test": len(data.x_test),
    }
    return asdict(settings) | {"versions": versions, "dataset": about}


def _choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} '{value}': choose one of {', '.join(known)}.")
