"""Train the digits at 1, 10 and 100 times a good learning rate: torch's SGD diverges, the strict guard never raises the energy."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import stableopt as so

GOOD_LR = 0.1


def make_model(seed: int = 0) -> nn.Sequential:
    """A plain network: the guard needs no special layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def train(
    optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int
) -> tuple[float, int, int]:
    """Return the final loss on all data, the steps that were taken, and how many of them raised the energy."""
    order = torch.Generator().manual_seed(0)
    taken = raised = 0
    for _ in range(steps):
        index = torch.randint(len(x), (batch,), generator=order) if batch < len(x) else torch.arange(len(x))

        def closure(index: Tensor = index) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            return loss

        optimizer.step(closure)
        report = getattr(optimizer, "last_step", None)
        if report is not None and report.action != "undone":
            taken += 1
            raised += report.energy_after > report.energy_before + report.tolerance
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y)), taken, raised


def main(steps: int = 300) -> dict[str, float]:
    """Print one line per batch size and learning rate; return the final losses and the number of raised energies."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels)
    result: dict[str, float] = {"raised": 0, "taken": 0}
    for batch, name in ((len(x), "full batch"), (64, "mini-batch")):
        for factor in (1, 10, 100):
            model = make_model()
            strict = so.optim.SGD(model.parameters(), lr=factor * GOOD_LR, momentum=0.9, guard="strict")
            loss, taken, raised = train(strict, model, x, y, steps, batch)
            model = make_model()
            plain, _, _ = train(
                torch.optim.SGD(model.parameters(), lr=factor * GOOD_LR, momentum=0.9), model, x, y, steps, batch
            )
            print(
                f"{name}, lr x {factor:3d}: strict {loss:.4f}, {raised} of {taken} steps raised the energy; torch {plain:.4g}"
            )
            result |= {f"{name} x{factor} strict": loss, f"{name} x{factor} torch": plain}
            result["raised"] += raised
            result["taken"] += taken
    diverged = all(not result[f"{name} x100 torch"] < math.log(10) for name in ("full batch", "mini-batch"))
    print(
        f"raised beyond rounding: {result['raised']:.0f} of {result['taken']:.0f} steps; torch at x 100 diverged: {diverged}"
    )
    return result | {"diverged": float(diverged)}


if __name__ == "__main__":
    main()
