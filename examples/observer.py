"""An observer that learns to tell the velocity of a swinging mass, and forgets a wrong start at a rate that is proved."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import stableopt as so
from stableopt.report.figures import line_chart

DT = 0.1


def simulate(count: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """A mass on a hardening spring, pushed at random: noisy positions with the force, and the true velocities.

    The equation is q'' = u - 0.4 q' - q - q^3, solved with 10 small steps per sample.
    """
    generator = torch.Generator().manual_seed(seed)
    force = torch.randn(count, steps // 5 + 1, generator=generator).repeat_interleave(5, 1)[:, :steps]
    q, v = torch.randn(2, count, generator=generator)
    measured, velocity = [], []
    for t in range(steps):
        for _ in range(10):
            v = v + DT / 10 * (force[:, t] - 0.4 * v - q - q**3)
            q = q + DT / 10 * v
        measured.append(q + 0.02 * torch.randn(count, generator=generator))
        velocity.append(v)
    return torch.stack([torch.stack(measured, 1), force], 2), torch.stack(velocity, 1)[..., None]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Fit the velocities with the guarded AdamW."""
    optimizer = so.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, guard="off")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x)[:, 20:], y[:, 20:]).backward()  # the first steps find the start
        optimizer.step()
        schedule.step()


def main(steps: int = 250, picture: str = "") -> dict[str, float]:
    """Train; print and return the errors and how two wrong starts approach each other; draw that if a file is given."""
    torch.manual_seed(0)
    cell = so.nn.AntisymmetricCell(2, 32, memory=20)
    model = nn.Sequential(so.nn.Recurrence(cell), nn.Linear(32, 1))
    train(model, *simulate(128, 80, seed=1), steps)
    x, y = simulate(64, 120, seed=2)
    bound = so.nn.cell_bound(cell)
    with torch.no_grad():
        error = float((model(x) - y)[:, 20:].square().mean().sqrt() / y[:, 20:].std())
        naive = torch.diff(x[..., :1], dim=1) / DT
        by_hand = float((naive - y[:, 1:])[:, 20:].square().mean().sqrt() / y[:, 20:].std())
        starts = 5 * torch.randn(2, 64, 32)
        runs = [model[0](x, state) for state in starts]
        apart = (runs[0] - runs[1]).norm(dim=2) / (starts[0] - starts[1]).norm(dim=1, keepdim=True)
    largest = apart.amax(0).tolist()
    proved = [bound.state.upper ** (t + 1) for t in range(len(largest))]
    print(f"error of the velocity: {error:.3f} of its spread (differences of the measured positions: {by_hand:.3f})")
    print(
        f"two starts approach by {bound.state.upper:.4f} per step, proved; after 60 steps {largest[59]:.2e} of {proved[59]:.2e}"
    )
    if picture:
        lines = {"proved": enumerate(proved, 1), "largest of 64 runs": enumerate(largest, 1)}
        Path(picture).write_text(line_chart("Difference of two starts", "step", lines, scale="log"), encoding="utf-8")
    above = max(m / p for m, p in zip(largest, proved, strict=True) if p > 1e-5)
    return {"error": error, "differences": by_hand, "rate": bound.state.upper, "above": above}


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else "")
