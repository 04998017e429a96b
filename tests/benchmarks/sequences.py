"""Classification of sequences: recurrent cells, stock layers, state spaces and attention under the same training.

Run ``python -m tests.benchmarks.sequences DATA [--epochs 25] [--lr 5e-3] [--seeds 3] [--only NAME ...]`` with
``OMP_NUM_THREADS=1`` and DATA one of ``rows`` (digits, 8 rows of 8 pixels), ``pixels`` (64 single pixels), ``permuted`` (64 pixels
in one fixed random order) and ``vowels`` (JapaneseVowels, 12 channels, 7 to 29 steps, where sktime is installed).

All models get the same optimizer, schedule, batches, epochs and number of hidden units. *Proved* is the Lipschitz constant that
:func:`stableopt.nn.lipschitz` proves for the trained model, from the whole input sequence to the logits, in the norm of the row;
*found* is the largest ratio of a pair that :func:`tests.nn.adversary.worst_ratio` finds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt import nn as stable
from stableopt.errors import UncertifiableError
from stableopt.nn.statespace.scan import diagonal_scan
from tests.benchmarks.timing import device_name
from tests.nn.adversary import worst_ratio


@dataclass(frozen=True)
class Split:
    """Sequences with as many steps each, and their labels.

    Args:
        x: of shape ``(batch, steps, channels)``; shorter sequences are padded with zeros *in front*, so that the last step is real.
        y: classes.
        x_test: as ``x``.
        y_test: as ``y``.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.x.shape[1]

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.x.shape[2]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.y.max()) + 1


def digit_sequences(kind: str) -> Split:
    """Return scikit-learn's digits as sequences; every fifth image is for the test."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels)
    if kind == "permuted":
        x = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    x = x.reshape(-1, 8, 8) if kind == "rows" else x[..., None]
    test = torch.from_numpy(np.arange(len(x)) % 5 == 4)
    return Split(x[~test], y[~test], x[test], y[test])


def japanese_vowels() -> Split | None:
    """Return JapaneseVowels as sktime ships it, or None and a line that says why not."""
    try:
        from sktime.datasets import load_japanese_vowels
    except ImportError as error:
        print(f"JapaneseVowels is skipped: {error}")
        return None

    def read(split: str) -> tuple[Tensor, Tensor]:
        frame, labels = load_japanese_vowels(split=split, return_X_y=True, return_type="nested_univ")
        series = [
            torch.tensor(np.stack([np.asarray(c) for c in row]).T, dtype=torch.float32) for row in frame.to_numpy()
        ]
        x = torch.stack([F.pad(s, (0, 0, 29 - len(s), 0)) for s in series])
        return x, torch.tensor([int(label) - 1 for label in labels])

    return Split(*read("train"), *read("test"))


def load(kind: str) -> Split | None:
    """Return a data set by its name."""
    return japanese_vowels() if kind == "vowels" else digit_sequences(kind)


Build = Callable[[Split, int], nn.Module]
"""Makes a model from the data and the number of hidden units; it maps ``(batch, steps, channels)`` to logits."""


@dataclass(frozen=True)
class Row:
    """A model of the comparison.

    Args:
        name: for the table.
        build: makes it.
        norm: of the proved constant; ``"linf"``, ``"l2"``, … or None where nothing is proved.
    """

    name: str
    build: Build
    norm: str | None = None


def train(model: nn.Module, data: Split, *, epochs: int, lr: float, batch: int = 64) -> float:
    """Train with AdamW and a cosine schedule; return the accuracy on the test set."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    steps = epochs * math.ceil(len(data.x) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(data.x)).split(batch):
            opt.zero_grad()
            F.cross_entropy(model(data.x[part]), data.y[part]).backward()
            opt.step()
            schedule.step()
    with torch.no_grad():
        return float((model.eval()(data.x_test).argmax(1) == data.y_test).double().mean())


def constants(model: nn.Module, data: Split, norm: str) -> tuple[float, float]:
    """Return the proved constant of a trained model and the largest ratio that is found, infinite and NaN where there is none."""
    try:
        proved = stable.lipschitz(model, norm).upper
    except UncertifiableError:
        proved = math.inf
    double = model.double()
    found = worst_ratio(double, (data.steps, data.channels), norm, starts=8, steps=60)
    model.float()
    return proved, found


def compare(rows: Sequence[Row], data: Split, *, hidden: int, epochs: int, lr: float, seeds: int) -> None:
    """Train every row for every seed and print a table."""
    print(
        "| model | parameters | accuracy (all seeds) | median | proved | found | s per epoch |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        accuracies, proved, found, seconds = [], [], [], 0.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = row.build(data, hidden)
            size = sum(p.numel() for p in model.parameters())
            start = time.perf_counter()
            accuracies.append(train(model, data, epochs=epochs, lr=lr))
            seconds += time.perf_counter() - start
            if row.norm is not None:
                above, below = constants(model, data, row.norm)
                proved.append(above)
                found.append(below)
        everything = " ".join(f"{a:.3f}" for a in accuracies)
        ends = f"{max(proved):.3g} {row.norm} | {max(found):.3g}" if proved else "– | –"
        print(
            f"| {row.name} | {size} | {everything} | {statistics.median(accuracies):.3f} | {ends} | "
            f"{seconds / seeds / epochs:.2f} |",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------------------- models


class Stock(nn.Module):
    """A recurrent layer of torch and a linear readout of its last output; nothing is proved for it."""

    def __init__(self, layer: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.readout(self.layer(x)[0][:, -1])


STOCK = [
    Row("nn.GRU", lambda d, n: Stock(nn.GRU(d.channels, n, batch_first=True), n, d.classes)),
    Row("nn.LSTM", lambda d, n: Stock(nn.LSTM(d.channels, n, batch_first=True), n, d.classes)),
    Row("nn.RNN", lambda d, n: Stock(nn.RNN(d.channels, n, batch_first=True), n, d.classes)),
]


def over_time(
    cell: Callable[..., nn.Module], readout: Callable[[int], nn.Module] | None = None, **options: Any
) -> Build:
    """Return a maker of a cell over time, a readout of one vector (the last state) and a linear map to the logits."""

    def build(data: Split, hidden: int) -> nn.Module:
        read = stable.LastStep() if readout is None else readout(data.steps)
        options.setdefault("memory", data.steps)
        return nn.Sequential(
            stable.Recurrence(cell(data.channels, hidden, **options)), read, nn.Linear(hidden, data.classes)
        )

    return build


CELLS = [
    Row("ContractingCell", over_time(stable.ContractingCell), "linf"),
    Row("ContractingCell, gain 1", over_time(stable.ContractingCell, gain=1.0), "linf"),
    Row("LeakyCell l2", over_time(stable.LeakyCell), "l2"),
    Row("LeakyCell linf", over_time(stable.LeakyCell, norm="linf"), "linf"),
    Row("DiagonalMetricCell", over_time(stable.DiagonalMetricCell), "l2"),
    Row("AntisymmetricCell", over_time(stable.AntisymmetricCell), "l2"),
    Row("AntisymmetricCell, gain 1", over_time(stable.AntisymmetricCell, gain=1.0), "l2"),
]


class PlainRecurrence(nn.Module):
    r"""The linear recurrent unit as its paper has it: the input scale :math:`\sqrt{1-|\lambda|^2}` and free matrices."""

    def __init__(self, width: int, radius: tuple[float, float]) -> None:
        super().__init__()
        modulus = torch.empty(width).uniform_(radius[0] ** 2, radius[1] ** 2).sqrt()
        self.nu, self.phase = nn.Parameter((-modulus.log()).log()), nn.Parameter(math.pi * torch.rand(width))
        self.scale = nn.Parameter(0.5 * (1.0 - modulus**2).log())
        self.inward = nn.Linear(width, 2 * width, bias=False)
        self.outward, self.skip = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output sequence."""
        modulus = torch.exp(-self.nu.exp())
        u = self.inward(x) * torch.cat([self.scale, self.scale]).exp()
        h = diagonal_scan(modulus * self.phase.cos(), modulus * self.phase.sin(), u.permute(2, 0, 1))
        return self.outward(h.permute(1, 2, 0)) + self.skip(x)


class PlainBlock(nn.Module):
    """A plain residual of recurrence, activation and mixing; nothing is proved for it."""

    def __init__(self, width: int, radius: tuple[float, float]) -> None:
        super().__init__()
        self.branch = nn.Sequential(PlainRecurrence(width, radius), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output sequence."""
        return x + self.branch(x)


def radius_for(data: Split) -> tuple[float, float]:
    """Return where eigenvalues start, for time constants from a tenth of a sequence to ten of them."""
    return 1.0 - min(0.3, 6.4 / data.steps), 1.0 - 0.064 / data.steps


def plain_recurrences(data: Split, hidden: int) -> nn.Module:
    """Return two blocks of plain recurrences."""
    blocks = [PlainBlock(hidden, radius_for(data)) for _ in range(2)]
    return nn.Sequential(nn.Linear(data.channels, hidden), *blocks, stable.LastStep(), nn.Linear(hidden, data.classes))


def state_spaces(gain: float, layers: int = 2, *, both: bool = False) -> Build:
    """Return a maker of a stack of state spaces under one gain; in both directions with the mean over time as its readout."""

    def build(data: Split, hidden: int) -> nn.Module:
        stack = stable.StateSpaceStack(
            data.channels, hidden, hidden, layers, data.classes, gain=gain, step=0.9, radius=radius_for(data), bidirectional=both
        )  # fmt: skip
        return nn.Sequential(stack, stable.MeanOverTime(data.steps) if both else stable.LastStep())

    return build


STATE_SPACES = [
    Row("StateSpaceStack, gain 1000", state_spaces(1000.0), "l2"),
    Row("StateSpaceStack, gain 300", state_spaces(300.0), "l2"),
    Row("StateSpaceStack, gain 100", state_spaces(100.0), "l2"),
    Row("StateSpaceStack, gain 30", state_spaces(30.0), "l2"),
    Row("StateSpaceStack both ways, gain 300", state_spaces(300.0, both=True), "l2"),
    Row("StateSpaceStack both ways, gain 100", state_spaces(100.0, both=True), "l2"),
    Row("LRU, plain", plain_recurrences),
]


ROWS: list[Row] = [*STOCK, *CELLS, *STATE_SPACES]
"""What is compared; a family of models is a list of its own above, added here."""


def main() -> None:
    """Read the command line and run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("rows", "pixels", "permuted", "vowels"))
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=None, help="parts of the names of the rows to run")
    options = parser.parse_args()
    data = load(options.data)
    if data is None:
        return
    rows = [row for row in ROWS if options.only is None or any(part in row.name for part in options.only)]
    print(
        f"{options.data}: {len(data.x)} / {len(data.x_test)} sequences of {data.steps} x {data.channels}, {data.classes} classes; "
        f"{options.hidden} units, {options.epochs} epochs, lr {options.lr:g}, {device_name()}"
    )
    compare(rows, data, hidden=options.hidden, epochs=options.epochs, lr=options.lr, seeds=options.seeds)


if __name__ == "__main__":
    main()
