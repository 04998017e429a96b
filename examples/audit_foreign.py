"""Audit a model that others call 1-Lipschitz: spectral norms, a LayerNorm, a GELU step; then one that is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import stableopt as so
from stableopt.certify.audit import audit


class GeluStep(nn.Module):
    """x - h A^T gelu(Ax + b) with h = 2/|A|^2, which would be non-expansive if the slopes of gelu were in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A, self.b = (
            nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width)),
            nn.Parameter(torch.zeros(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take the step."""
        return x - 2 / torch.linalg.matrix_norm(self.A, 2) ** 2 * F.gelu(x @ self.A.T + self.b) @ self.A


def main() -> dict[str, float]:
    """Print what is found; return the attained constants by kind, and the number of findings in the clean model."""
    torch.manual_seed(0)
    foreign = nn.Sequential(
        spectral_norm(nn.Conv2d(1, 8, 3, padding=1)),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Flatten(),
        spectral_norm(nn.Linear(128, 12)),
        nn.LayerNorm(12),
        GeluStep(12),
        spectral_norm(nn.Linear(12, 10)),
    )
    found = audit(foreign, (1, 8, 8))
    print(found)
    shown = [f for f in found if f.witness is not None]
    worst = max(shown, key=lambda finding: finding.attained)
    layer = foreign.get_submodule(worst.path.removesuffix(".weight")).double().eval()
    x, y = worst.witness.x, worst.witness.y
    seen = float((layer(x) - layer(y)).detach().norm() / (x - y).norm())
    print(f"\nthe worst, seen by yourself: {type(layer).__name__} moves two inputs {seen:.6g} times further apart")

    clean = so.stabilize(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), so.nn.GradientBlock(12, 12), nn.Linear(12, 10)))
    silent = audit(clean, (1, 8, 8))
    print(f"\nthe same in layers that hold their limit: {silent}")
    return {f.kind: f.attained for f in found} | {"seen": seen, "clean": float(len(silent))}


if __name__ == "__main__":
    main()
