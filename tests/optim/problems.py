"""Problems with a known smoothness, and closures for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quadratic(
    n: int = 6, smallest: float = 0.05, seed: int = 0
) -> tuple[nn.Parameter, Callable[[Tensor], Tensor], float]:
    """A convex quadratic with smoothness 1: start, function, smoothness."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    H = Q @ torch.diag(torch.linspace(smallest, 1.0, n)) @ Q.T
    center = torch.randn(n, generator=generator)
    start = nn.Parameter(3 * torch.randn(n, generator=generator))
    return start, lambda w: 0.5 * (w - center) @ H @ (w - center), 1.0


def wavy(n: int = 5, seed: int = 1) -> tuple[nn.Parameter, Callable[[Tensor], Tensor], float]:
    """A nonconvex function with second derivatives in [-0.5, 1.5]: smoothness 1.5."""
    generator = torch.Generator().manual_seed(seed)
    start = nn.Parameter(4 * torch.randn(n, generator=generator))
    return start, lambda w: (0.25 * w.square() + w.cos()).sum(), 1.5


def closure_of(
    optimizer: torch.optim.Optimizer, w: nn.Parameter, f: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = f(w)
        loss.backward()
        return loss

    return closure


class Network(nn.Module):
    """BatchNorm, dropout and a counter of forward passes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def network_closure(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    """Classify random vectors, the same in each step."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(3, (32,), generator=generator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure
