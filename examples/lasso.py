"""Sparse regression with a penalty inside the optimizer's step: exact zeros, and the optimum of the lasso."""

from __future__ import annotations

import torch

import stableopt as so


def lasso_by_coordinates(A: torch.Tensor, b: torch.Tensor, weight: float, sweeps: int = 500) -> torch.Tensor:
    """Solve the lasso by exact minimization over one coordinate at a time, to compare with."""
    w = torch.zeros(A.shape[1], dtype=A.dtype)
    for _ in range(sweeps):
        for j in range(len(w)):
            residual = b - A @ w + A[:, j] * w[j]
            correlation = A[:, j] @ residual
            w[j] = correlation.sign() * (correlation.abs() - weight).clamp_min(0) / (A[:, j] @ A[:, j])
    return w


def main(steps: int = 2000) -> dict[str, float]:
    """Minimize ½‖Aw − b‖² + weight‖w‖₁ with momentum and the L1 prox; print the distance to the optimum and the zeros."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 20, generator=generator, dtype=torch.float64) / 60**0.5
    b = A[:, :4] @ torch.tensor([3.0, -2.0, 1.5, 1.0], dtype=torch.float64)
    weight = 0.1
    w = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    smoothness = so.linalg.spectral_norm(A).upper ** 2
    lr = so.theory.heavy_ball_energy_limit(smoothness, beta=0.5)
    optimizer = so.optim.SGD([w], lr=lr, momentum=0.5, prox=so.constraints.L1(weight), guard="strict")
    raised = 0

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (A @ w - b).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        report = optimizer.last_step
        raised += report is not None and report.verdict == "increased"
    best = lasso_by_coordinates(A, b, weight)
    distance, zeros = float((w.detach() - best).norm()), int((w == 0).sum())
    print(
        f"distance to the optimum {distance:.2e}, exact zeros {zeros} (optimum {int((best == 0).sum())}), energies raised {raised}"
    )
    return {"distance": distance, "zeros": zeros, "zeros_of_optimum": int((best == 0).sum()), "raised": raised}


if __name__ == "__main__":
    main()
