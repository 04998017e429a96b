"""64 residual blocks that respect their step limit learn the digits with a certificate of 1; a plain residual net has none."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stableopt as so
from stableopt.report.figures import line_chart

WIDTH, DEPTH = 64, 64


class Residual(nn.Sequential):
    """The usual block h + f(h); its Lipschitz bound is 1 + ‖A‖‖B‖."""

    def forward(self, h: Tensor) -> Tensor:
        """Add the branch."""
        return h + super().forward(h)


@so.nn.lipschitz_rule.register(Residual)
def _(module: Residual, norm: str) -> so.Bound:
    return 1 + so.lipschitz(nn.Sequential(*module), norm)


def train(model: nn.Module, lr: float, steps: int, x: Tensor, y: Tensor, loss_function: nn.Module) -> None:
    """Train on random batches of 128 with the guarded AdamW."""
    optimizer = so.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, guard="off")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(x), (128,), generator=order)
        optimizer.zero_grad()
        loss_function(model(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()


def growth(model: nn.Sequential, x: Tensor) -> list[tuple[float, float]]:
    """By how much a perturbation of the first representation of an image can have grown at each depth: the norm of the Jacobian."""
    h, J = model[0](x).detach(), torch.eye(WIDTH)
    points = [(0, 1.0)]
    for block in model[1:-1]:
        J, h = torch.func.jacrev(block)(h).detach() @ J, block(h).detach()
        points.append((len(points), float(torch.linalg.matrix_norm(J, 2))))
    return points


def main(steps: int = 150, depth: int = DEPTH, picture: str = "") -> dict[str, float]:
    """Train both networks; print and return their test accuracy and their proved bound; draw their growth if a file is given."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels)
    test = torch.arange(len(x)) % 5 == 4
    result, lines = {}, {}
    for name in ("stable", "plain"):
        torch.manual_seed(0)
        plain = [Residual(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(depth)]
        blocks = [so.nn.GradientBlock(WIDTH, depth=depth) for _ in range(depth)] if name == "stable" else plain
        model, loss = nn.Sequential(nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, 10)), nn.CrossEntropyLoss()
        if name == "stable":
            model, loss = so.stabilize(model, lipschitz=1.0), so.nn.MarginCrossEntropy(temperature=16.0, offset=0.4)
        train(model, 1e-2 if name == "stable" else 1e-3, steps, x[~test], y[~test], loss)
        with torch.no_grad():
            result[f"{name} accuracy"] = float((model.eval()(x[test]).argmax(1) == y[test]).double().mean())
        bound = so.certify(model, (64,)).lipschitz if name == "stable" else so.lipschitz(model).upper
        result[f"{name} bound"], lines[name] = bound, growth(model, x[test][0])
        print(f"{name}: test accuracy {result[f'{name} accuracy']:.3f}, proved Lipschitz bound {bound:.4g}")
    if picture:
        Path(picture).write_text(line_chart("Growth of a perturbation", "depth", lines, scale="log"), encoding="utf-8")
    return result


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else "")
