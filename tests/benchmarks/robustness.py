"""Robustness to the learning rate: how wide is the range of rates that train a net to within a point of the best accuracy?

Run ``python -m tests.benchmarks.robustness``, with ``--quick`` for a look, ``--jobs N`` for N processes of one thread,
``--only ours`` for torch and the contenders whose name holds a word. The peers (schedulefree) are taken where they are installed.

Two data sets that scikit-learn ships, three nets each, five seeds, rates in half decades from where nothing moves to where
everything breaks. Every contender gets the same weights, batches, epochs and test set at a seed; accuracies are those at the end,
no epoch is chosen. A range is the run of neighboring rates around the best one whose mean accuracy is within one point of it.

The rate falls linearly to zero by ``LambdaLR``, except for schedulefree, which has its own averaging instead: at a constant rate
(``--constant``) the accuracy of the last iterate scatters by half a point, which blurs all ranges alike. The nets for the second
set have dropout: without it the best accuracy is that of a net stopped early, at the rate that has not yet fitted the few samples.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any, cast

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

import stableopt as so
from stableopt.optim import RandomState, evaluate_again
from tests.benchmarks.certified import peer

WITHIN = 1.0
"""How many points of accuracy below the best a learning rate may be."""
GIVEN_UP = 0.3
"""How many points the best accuracy may lie below torch's."""
WIDER = 10.0
"""How many times wider the range of the guarded optimizers is to be."""
WIDTH = 64

Batch = tuple[Tensor, Tensor]
Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """A data set with its nets and how long they are trained."""

    nets: tuple[str, ...]
    epochs: int
    batch: int
    dropout: float
    one_scale: bool


TASKS = {
    "digits": Task(("relu", "batch norm", "conv"), epochs=10, batch=64, dropout=0.0, one_scale=True),
    "breast cancer": Task(("relu", "batch norm", "tanh"), epochs=10, batch=32, dropout=0.5, one_scale=False),
}


@lru_cache
def split(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs and labels for training and for the test, 30 % of all; standardized by the former."""
    found = cast("Any", load_digits() if name == "digits" else load_breast_cancer())
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: 3 * len(x) // 10], order[3 * len(x) // 10 :]
    seen = x[train]  # a pixel at the edge of all digits never changes: images have one scale
    mean, scale = (seen.mean(), seen.std()) if TASKS[name].one_scale else (seen.mean(0), seen.std(0))
    x = (x - mean) / scale
    return x[train], y[train], x[test], y[test]


def network(kind: str, inputs: int, classes: int, dropout: float) -> nn.Sequential:
    """Make a small net."""
    if kind == "conv":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, classes),
        )  # fmt: skip
    layers: list[nn.Module] = []
    for n in (inputs, *[WIDTH] * (3 if kind == "batch norm" else 1)):
        layers += [nn.Linear(n, WIDTH)] + [nn.BatchNorm1d(WIDTH)] * (kind == "batch norm")
        layers += [nn.Tanh() if kind == "tanh" else nn.ReLU()] + [nn.Dropout(dropout)] * (dropout > 0)
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes))


class ArmijoSearch(torch.optim.Optimizer):
    r"""Stochastic line search: shrink :math:`\eta` until :math:`f_B(\theta - \eta g) \le f_B(\theta) - c \eta \|g\|^2`.

    With the constants of Vaswani et al., *Painless Stochastic Gradient*, 2019: c = 0.1, shrinking by 0.9, growing by 2 per epoch.
    The learning rate is where the search begins and what it never exceeds.
    """

    def __init__(self, params: Any, lr: float, batches: int) -> None:
        super().__init__(params, {"lr": lr, "now": lr, "growth": 2.0 ** (1.0 / batches)})

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do one step."""
        start, group = RandomState.capture(), self.param_groups[0]
        with torch.enable_grad():
            loss = closure()
        kept = [p.clone() for p in group["params"]]
        grads = [p.grad.clone() for p in group["params"]]
        square = sum(float(g.square().sum()) for g in grads)
        eta = min(group["lr"], group["now"] * group["growth"])
        for _ in range(100):
            for p, at, g in zip(group["params"], kept, grads, strict=True):
                p.copy_(at - eta * g)
            if evaluate_again(closure, start) <= float(loss) - 0.1 * eta * square:
                break
            eta *= 0.9
        group["now"] = eta
        return loss


class PolyakSteps(torch.optim.Optimizer):
    r"""Polyak's step :math:`\eta = f_B / (c \|g\|^2)`, bounded by the learning rate and by 2 times the last one per epoch.

    SPS_max with smoothing and c = 1/2, the least value of each batch taken to be 0: Loizou et al., 2021.
    """

    def __init__(self, params: Any, lr: float, batches: int) -> None:
        super().__init__(params, {"lr": lr, "now": lr, "growth": 2.0 ** (1.0 / batches)})

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do one step."""
        group = self.param_groups[0]
        with torch.enable_grad():
            loss = closure()
        square = sum(float(p.grad.square().sum()) for p in group["params"])
        polyak = float(loss) / (0.5 * square) if square > 0 else math.inf
        group["now"] = min(polyak, group["lr"], group["now"] * group["growth"])
        for p in group["params"]:
            p.sub_(group["now"] * p.grad)
        return loss


Make = Callable[[Any, float, int], torch.optim.Optimizer]
"""Makes an optimizer from parameters, learning rate and the number of batches of an epoch."""


def plain(cls: Any, params: Any, lr: float, _batches: int, **settings: Any) -> torch.optim.Optimizer:
    """Make an optimizer that does not ask for the number of batches."""
    return cls(params, lr=lr, **settings)


def contenders() -> dict[str, tuple[str, Make]]:
    """Return for each contender its family, which says whose range is the measure, and its maker."""
    found: dict[str, tuple[str, Make]] = {
        "torch SGD": ("SGD", partial(plain, torch.optim.SGD, momentum=0.9)),
        "ours, SGD": ("SGD", partial(plain, so.optim.SGD, momentum=0.9)),
        "line search": ("SGD", ArmijoSearch),
        "Polyak steps": ("SGD", PolyakSteps),
        "torch AdamW": ("AdamW", partial(plain, torch.optim.AdamW)),
        "ours, AdamW": ("AdamW", partial(plain, so.optim.AdamW)),
    }
    if schedulefree := peer("schedulefree"):
        found["schedulefree SGD"] = "SGD", partial(plain, schedulefree.SGDScheduleFree)
        found["schedulefree AdamW"] = "AdamW", partial(plain, schedulefree.AdamWScheduleFree)
    return found


def rates(family: str, steps_per_decade: int) -> list[float]:
    """Return the learning rates, eight decades less one."""
    lowest = {"SGD": -4, "AdamW": -5}[family]
    return [10.0 ** (lowest + k / steps_per_decade) for k in range(7 * steps_per_decade + 1)]


def batches(samples: int, task: Task, seed: int) -> Iterator[Tensor]:
    """Give the rows of every batch of the training."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        yield from torch.randperm(samples, generator=generator)[: samples // task.batch * task.batch].split(task.batch)


def train(name: str, kind: str, make: Make, lr: float, seed: int, *, falling: bool) -> float:
    """Train one net, with a falling rate or a constant one, and return its accuracy on the test set, in percent."""
    task, (x, y, x_test, y_test) = TASKS[name], split(name)
    torch.manual_seed(seed)
    model = network(kind, x.shape[1], int(y.max()) + 1, task.dropout)
    optimizer: Any = make(model.parameters(), lr, len(x) // task.batch)
    getattr(optimizer, "train", model.train)()  # schedulefree keeps one set of weights to train, another to use
    steps = task.epochs * (len(x) // task.batch)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 - t / steps if falling else 1.0)
    for rows in batches(len(x), task, seed):
        inputs, labels = x[rows], y[rows]

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        fall.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        with torch.no_grad():  # the statistics of the weights to use
            for rows in itertools.islice(batches(len(x), task, seed), 2 * len(x) // task.batch):
                model(x[rows])
    model.eval()
    with torch.no_grad():
        return 100.0 * float((model(x_test).argmax(1) == y_test).float().mean())


Job = tuple[str, str, str, float, int, bool]
"""Contender, data set, net, learning rate, seeds, and whether the rate is to be constant."""


def measure(job: Job) -> float:
    """Return the mean accuracy over the seeds of a contender on a net at a learning rate."""
    contender, name, kind, lr, seeds, constant = job
    torch.set_num_threads(1)
    make = contenders()[contender][1]
    falling = not constant and not contender.startswith("schedulefree")
    return statistics.fmean(train(name, kind, make, lr, seed, falling=falling) for seed in range(seeds))


@dataclass(frozen=True)
class Range:
    """The learning rates around the best one that are within a point of it."""

    best: float
    low: float
    high: float
    open: bool

    @classmethod
    def of(cls, lrs: list[float], accuracies: list[float]) -> Range:
        """Read the range off the accuracies."""
        best = max(accuracies)
        low = high = accuracies.index(best)
        while low > 0 and accuracies[low - 1] >= best - WITHIN:
            low -= 1
        while high + 1 < len(lrs) and accuracies[high + 1] >= best - WITHIN:
            high += 1
        return cls(best, lrs[low], lrs[high], open=high + 1 == len(lrs))

    @property
    def ratio(self) -> float:
        """The largest over the smallest."""
        return self.high / self.low


def table(name: str, kind: str, ranges: dict[str, Range], families: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Print the rows of one net; return for each of ours how much wider it is than torch's, and how much better."""
    print(f"\n{name}, {kind}: {'':<10s} best accuracy   range of learning rates   ratio      x torch's")
    ours: dict[str, tuple[float, float]] = {}
    for contender, found in ranges.items():
        base = ranges.get(f"torch {families[contender]}", found)
        wider, better = found.ratio / base.ratio, found.best - base.best
        more = ">=" if found.open else "  "
        print(
            f"  {contender:<22s} {found.best:6.2f} ({better:+5.2f})     {found.low:8.1e} .. {found.high:8.1e}"
            f"   {more}{found.ratio:<9.3g}{more}{wider:<9.3g}"
        )
        if contender.startswith("ours"):
            ours[f"{contender}, {name}, {kind}"] = wider, better
    return ours


def main() -> None:
    """Run what is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, the first net of each set, whole decades")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--only", default="", help="a word in the names of the contenders to run beside torch's")
    parser.add_argument("--curves", action="store_true", help="print the accuracy at every learning rate")
    parser.add_argument("--constant", action="store_true", help="a constant learning rate instead of one that falls")
    asked = parser.parse_args()
    seeds, per_decade = (2, 1) if asked.quick else (5, 2)
    families = {name: family for name, (family, _) in contenders().items() if asked.only in name or "torch" in name}
    cells = [(name, kind) for name, task in TASKS.items() for kind in task.nets[: 1 if asked.quick else None]]
    start, ours = time.perf_counter(), {}
    print(f"{seeds} seeds, within {WITHIN:g} point of the best, {asked.jobs} process(es) of one thread")
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        run = map if asked.jobs == 1 else pool.map
        for name, kind in cells:
            ranges: dict[str, Range] = {}
            jobs = [
                (c, name, kind, lr, seeds, asked.constant) for c in families for lr in rates(families[c], per_decade)
            ]
            found = dict(zip(jobs, run(measure, jobs), strict=True))
            for contender, family in families.items():
                lrs = rates(family, per_decade)
                curve = [found[contender, name, kind, lr, seeds, asked.constant] for lr in lrs]
                ranges[contender] = Range.of(lrs, curve)
                if asked.curves:
                    print(f"  {contender:<22s} " + " ".join(f"{value:5.1f}" for value in curve))
            ours |= table(name, kind, ranges, families)
            print(f"  ({time.perf_counter() - start:.0f} s so far)", flush=True)
    for what, (wider, better) in ours.items():
        reached = wider >= 0.999 * WIDER and better >= -GIVEN_UP  # ratios of rates in half decades are rounded
        print(f"{'reached' if reached else 'MISSED '}  {what}: {wider:.3g} times wider, best accuracy {better:+.2f}")


if __name__ == "__main__":
    main()
