"""Digits read pixel by pixel: a deep state-space model whose gain is limited for every length, and the radii that it certifies."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stableopt as so
from stableopt.report.figures import line_chart

STEPS, WIDTH, GAIN = 64, 32, 100.0


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int = 10) -> Tensor:
    """Whether each sequence keeps its class under gradient ascent within an l2 ball of the whole sequence."""
    shift = torch.zeros_like(x)
    for _ in range(steps):
        shift.requires_grad_()
        logits = model(x + shift)
        own = logits.gather(1, y[:, None])[:, 0]
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad((others - own).sum(), shift)
        shift = shift.detach() + radius / 4 * torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(x)
        shift = shift * (radius / shift.flatten(1).norm(dim=1).clamp_min(radius)).view(-1, 1, 1)
    with torch.no_grad():
        return model(x + shift).argmax(1) == y


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train with torch's AdamW; the limit holds at every step whichever optimizer is used."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * math.ceil(len(x) / 64))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()


def main(epochs: int = 20, images: int = 1797, picture: str = "") -> dict[str, float]:
    """Train; print and return accuracy, proved gain, certified and attacked accuracy; draw them if a file is given."""
    torch.manual_seed(0)
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32)[:images, :, None], torch.tensor(labels)[:images]
    test = torch.arange(len(x)) % 5 == 4
    stack = so.nn.StateSpaceStack(1, WIDTH, WIDTH, 2, 10, gain=GAIN, step=0.9, radius=(0.9, 0.999))
    model = nn.Sequential(stack, so.nn.LastStep())
    train(model, x[~test], y[~test], epochs)
    model.eval().requires_grad_(requires_grad=False)
    bound = so.lipschitz(model)
    logits = model(x[test])
    margin = logits.gather(1, y[test][:, None])[:, 0] - logits.scatter(1, y[test][:, None], -torch.inf).amax(1)
    radii = margin / (math.sqrt(2) * bound.upper)  # two logits move by sqrt(2) times the gain at most
    accuracy = float((margin > 0).double().mean())
    grid = [float(radii.clamp_min(0).quantile(0.99)) * k / 8 for k in range(9)]
    certified = [float((radii > r).double().mean()) for r in grid]
    kept = [accuracy, *(float(attacked(model, x[test], y[test], r).double().mean()) for r in grid[1:])]
    print(f"accuracy {accuracy:.3f}; gain at most {bound.upper:.6g}, for every length and every weight")
    print(
        f"half of the test sequences keep their class within {float(radii.median()):.4f} (l2 of all 64 steps), proved"
    )
    if picture:
        curves = {
            "not broken by the attack": zip(grid, kept, strict=True),
            "certified": zip(grid, certified, strict=True),
        }
        Path(picture).write_text(line_chart("Accuracy", "l2 radius", curves, scale="linear"), encoding="utf-8")
    broken = max(c - k for c, k in zip(certified, kept, strict=True))
    return {"accuracy": accuracy, "bound": bound.upper, "median radius": float(radii.median()), "broken": broken}


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else "")
