"""What a loss makes of a certificate: the same nets, data, steps and limits, only the loss differs.

Run ``python -m tests.benchmarks.robust_losses``, with ``--mnist FILE`` (an archive as ``stableopt train --data`` takes), ``--only
WORD`` for the nets whose name holds it, ``--seeds N`` and ``--epochs X`` for longer runs. What is printed is markdown.

The nets are those of the benchmark ``certified``: a dense and a convolutional one with orthogonal layers and GroupSort, in l2, and
one with limited row sums in linf. Each is certified, and judged on the test data: the accuracy, and the accuracy that is certified
for the exact network and for the network as it runs in float32 (all rounding counted). The stand-alone verifier, alone in
a folder with the two files, has to agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stableopt import nn as stable
from stableopt.certify import Certificate, certify
from stableopt.certify.evaluation import CertifiedAccuracy, certified_accuracy
from stableopt.certify.standalone import write_verifier
from stableopt.cli.data import Dataset, load_data
from tests.benchmarks.certified import patch_net
from tests.benchmarks.timing import device_name

Make = Callable[[nn.Module, float], nn.Module]
"""Makes a loss from the model and the radius in the middle."""

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Task:
    """A net on a data set: how it is made and trained, and the radii that it is judged at."""

    net: Callable[[Dataset], nn.Sequential]
    eps: tuple[float, ...]
    epochs: int
    batch: int
    norm: str = "l2"
    images: bool = False
    samples: int | None = None
    lr: float = 5e-3


def dense(data: Dataset) -> nn.Sequential:
    """Three orthogonal hidden layers and a head with unit rows."""
    width, inputs = 256, data.x_train[0].numel()
    parts: list[nn.Module] = [nn.Flatten()]
    for n in (inputs, width, width):
        parts += [nn.Linear(n, width), stable.GroupSort()]
    body = stable.stabilize(nn.Sequential(*parts), 1.0, method="bro", init="orthogonal")
    assert isinstance(body, nn.Sequential)
    return body.append(stable.UnitRowLinear(width, data.classes))


def conv(data: Dataset) -> nn.Sequential:
    """A convolutional net of isometries, for images of 8 by 8 pixels."""
    parts: list[nn.Module] = [stable.InvertibleDownsampling(2)]
    for n in (4, 16):
        parts += [nn.Conv2d(n, 16, 3, padding=1, padding_mode="circular"), stable.GroupSort()]
    parts += [nn.Flatten(), nn.Linear(256, 128), stable.GroupSort()]
    body = nn.Sequential(*parts)
    stable.stabilize(body, 1.0, method={"linear": "bro", "conv": "bcop"}, init="orthogonal")
    return body.append(stable.UnitRowLinear(128, data.classes))


def rows(data: Dataset) -> nn.Sequential:
    """Two hidden layers with limited row sums, for linf; the head is limited by its pairs of rows."""
    inputs = data.x_train[0].numel()
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 256), stable.MaxMin(), nn.Linear(256, 256), stable.MaxMin(), nn.Linear(256, data.classes)
    )  # fmt: skip
    return stable.stabilize(body, 1.0, norm="linf")  # pyright: ignore[reportReturnType]


TASKS = {
    "digits, dense": Task(dense, (0.1, 0.25, 0.5), epochs=30, batch=64),
    "digits, conv": Task(conv, (0.1, 0.25, 0.5), epochs=15, batch=64, images=True),
    "digits, dense linf": Task(rows, (0.01, 0.03, 0.05), epochs=40, batch=64, norm="linf"),
    "mnist, dense": Task(dense, (0.1, 0.3, 1.58), epochs=2, batch=256),
    "mnist, patches": Task(lambda data: patch_net(data.classes), (0.1, 0.3, 1.58), 1, 256, images=True, samples=20_000),
}


def losses(norm: str) -> dict[str, Make]:
    """Return the losses; temperatures and margins are in units of the radius in the middle."""
    root, reach = (2.0**0.5, 2.0) if norm == "l2" else (2.0, 1.0)
    return {
        "cross-entropy": lambda _model, _eps: nn.CrossEntropyLoss(),
        "MarginCrossEntropy": lambda _model, eps: stable.MarginCrossEntropy(2.0 / eps, 2.0 * root * eps),
        "HKRLoss": lambda _model, eps: stable.HKRLoss(0.98, 4.0 * root * eps),
        "GloRoLoss": lambda model, eps: stable.GloRoLoss(model, reach * eps, norm, temperature=2.0 / eps),
        "CertifiedMarginLoss": lambda model, eps: stable.CertifiedMarginLoss(
            model, reach * eps, norm, temperature=2.0 / eps
        ),
        "the same, adaptive": lambda model, eps: stable.CertifiedMarginLoss(
            model, reach * eps, norm, temperature=2.0 / eps, adaptive=True
        ),
        "with CertificateRegularizer": lambda model, eps: WithPenalty(model, eps, norm),
    }


class WithPenalty(nn.Module):
    """Cross-entropy at a temperature with the hinge of the certified radius."""

    def __init__(self, model: nn.Module, eps: float, norm: str) -> None:
        super().__init__()
        self.plain = stable.MarginCrossEntropy(2.0 / eps, 0.0)
        self.penalty = stable.CertificateRegularizer(model, 2.0 * eps, norm, correct_only=True)
        self.weight = eps

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.plain(z, y) + self.weight * self.penalty(z, y)


def train(model: nn.Module, loss: nn.Module, data: Dataset, task: Task, epochs: int, seed: int) -> float:
    """Train with Adam and one cycle of the learning rate; return the seconds of the processor."""
    torch.manual_seed(seed)
    x, y = data.x_train[: task.samples], data.y_train[: task.samples]
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.lr, total_steps=epochs * (len(x) // task.batch), pct_start=0.1
    )
    start = time.process_time()
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // task.batch * task.batch].split(task.batch):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
            cycle.step()
    model.eval()
    return time.process_time() - start


def verified_alone(certificate: Certificate) -> float | None:
    """Write the verifier and the two files into an empty folder, run it there, and return the constant that it proves."""
    with tempfile.TemporaryDirectory() as folder:
        certificate.save(folder)
        alone = write_verifier(Path(folder) / "verify.pyz")
        command = [sys.executable, "-I", str(alone), str(Path(folder) / "model.cert.json"), "--json"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        return json.loads(run.stdout)["lipschitz"] if run.returncode == 0 else None


def judge(model: nn.Module, data: Dataset, task: Task) -> tuple[CertifiedAccuracy, CertifiedAccuracy, bool]:
    """Return the accuracies of the exact and of the float32 network, and whether the verifier alone agrees."""
    certificate = certify(model, data.shape, norm=task.norm)
    exact = certified_accuracy(certificate, (data.x_test, data.y_test), task.eps)
    deployed = certified_accuracy(certificate, (data.x_test, data.y_test), task.eps, runtime="float32")
    return exact, deployed, verified_alone(certificate) == certificate.lipschitz


def compare(name: str, task: Task, data: Dataset, *, seeds: int, longer: float) -> None:
    """Train a net with every loss and print a table."""
    data = data.as_images() if task.images else data.as_vectors()
    epochs = max(1, round(longer * task.epochs))
    print(
        f"\n**{name}** ({task.norm}, {epochs} epochs, {min(len(data.x_train), task.samples or 10**9)} samples, {seeds} seed(s))\n"
    )
    print(
        "| loss | accuracy |"
        + "".join(f" ε = {e:g} |" for e in task.eps)
        + " median radius | float32 loses | verified | CPU s |"
    )
    print("|" + "---|" * (len(task.eps) + 6))
    for loss_name, make in losses(task.norm).items():
        found: list[list[float]] = []
        alone = True
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = task.net(data)
            seconds = train(model, make(model, task.eps[1]), data, task, epochs, seed)
            exact, deployed, agrees = judge(model, data, task)
            alone = alone and agrees
            lost = sum(a - b for a, b in zip(exact.certified, deployed.certified, strict=True)) / len(task.eps)
            found.append([exact.clean, *deployed.certified, deployed.median_radius, lost, seconds])
        clean, *certified, median, lost, seconds = (sum(column) / seeds for column in zip(*found, strict=True))
        shares = "".join(f" {100 * share:.2f} |" for share in (clean, *certified))
        verdict = "yes" if alone else "NO"
        print(
            f"| {loss_name} |{shares} {median:.4f} | {100 * lost:.2f} points | {verdict} | {seconds:.0f} |", flush=True
        )


def main() -> None:
    """Run what is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mnist", default=str(ROOT.parent / "shared" / "data" / "mnist.npz"), help="the archive with MNIST"
    )
    parser.add_argument("--only", default="", help="a word in the names of the nets to run")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor of the epochs")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Certified accuracy in percent of the test data, deployed in float32; {device_name()}")
    sets: dict[str, Dataset] = {"digits": load_data("digits")}
    if Path(asked.mnist).exists():
        sets["mnist"] = load_data(asked.mnist)
    for name, task in TASKS.items():
        data = sets.get(name.split(",")[0])
        if asked.only in name and data is None:
            print(f"\n{name}: skipped, there is no file '{asked.mnist}'")
        elif asked.only in name and data is not None:
            compare(name, replace(task), data, seeds=asked.seeds, longer=asked.epochs)


if __name__ == "__main__":
    main()
