"""Train the same net with four losses, certify each, and draw which share of the test data is certified at every radius."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stableopt as so
from stableopt.certify.evaluation import CertifiedAccuracy, certified_accuracy
from stableopt.report.figures import line_chart

EPS = 0.5


def network() -> nn.Sequential:
    """Make a net with the constant 1 whatever its weights become, and a head that is judged by its pairs of rows."""
    body = nn.Sequential(nn.Linear(64, 128), so.nn.GroupSort(), nn.Linear(128, 128), so.nn.GroupSort())
    so.stabilize(body, lipschitz=1.0, method="bro", init="orthogonal")
    return body.append(so.nn.UnitRowLinear(128, 10))


def losses(model: nn.Module) -> dict[str, nn.Module]:
    """Return the losses; the third and the fourth get the proved constants of the model at every step."""
    return {
        "cross-entropy": nn.CrossEntropyLoss(),
        "MarginCrossEntropy": so.nn.MarginCrossEntropy(temperature=8.0, offset=1.4 * EPS),
        "GloRoLoss": so.nn.GloRoLoss(model, eps=EPS, temperature=8.0),
        "CertifiedMarginLoss": so.nn.CertifiedMarginLoss(model, eps=EPS, temperature=8.0),
    }


def train(name: str, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Train with one of the losses; the radius grows to its value over the first half."""
    torch.manual_seed(0)
    model = network()
    loss = losses(model)[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = torch.randint(len(x), (128,))
        grows = isinstance(loss, so.nn.GloRoLoss | so.nn.CertifiedMarginLoss)
        grown = {"eps": EPS * min(1.0, 2.0 * (step + 1) / steps)} if grows else {}
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows], **grown).backward()
        optimizer.step()
    return model.eval()


def main(steps: int = 300, picture: str | Path | None = "certified_training.svg") -> dict[str, CertifiedAccuracy]:
    """Train, certify, print a table, draw the curves."""
    digits, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(targets)
    test = torch.arange(len(x)) % 5 == 4
    found: dict[str, CertifiedAccuracy] = {}
    print(f"{'loss':<22s} {'clean':>6s}  certified at 0.1    0.25     0.5")
    for name in losses(network()):
        certificate = so.certify(train(name, x[~test], y[~test], steps), input_shape=(64,))
        found[name] = result = certified_accuracy(certificate, (x[test], y[test]), eps=[0.1, 0.25, 0.5])
        shares = "".join(f"{100 * share:8.1f}" for share in result.certified)
        print(f"{name:<22s} {100 * result.clean:6.1f}          {shares}")
    print(found["CertifiedMarginLoss"].to_markdown())
    if picture is not None:
        lines = {name: result.curve(points=60) for name, result in found.items()}
        Path(picture).write_text(line_chart("certified accuracy", "radius (l2)", lines), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
