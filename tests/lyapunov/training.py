"""A small training with everything that a careless observer disturbs, and a full picture of its end."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

from stableopt.nn import GradientBlock

MakeOptimizer = Callable[[nn.Module], Optimizer]


class Noise(nn.Module):
    """Adds noise from all three global generators, and moves a buffer in place and another by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1.0)
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            x = x + 0.01 * (torch.randn_like(x) + random.gauss(0, 1) + float(np.random.randn()))  # noqa: NPY002
        return x


def make_model() -> nn.Module:
    """Return a model with batch statistics, dropout, noise, a parametrization with a state, a block and a convolution."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 2, 3, padding=1),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(12, 8)),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.3),
        GradientBlock(8),
        Noise(),
        nn.Linear(8, 1),
    )


def make_closure(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Return a closure as torch's documentation writes it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


def batches(steps: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return batches that do not depend on the global generator."""
    generator = torch.Generator().manual_seed(7)
    xs = torch.randn(steps, size, 6, generator=generator, dtype=torch.float64)
    return [(x, x.square().sum(1, keepdim=True)) for x in xs]


def picture(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return everything that a run may depend on."""
    return {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": str(torch.get_default_dtype()),
        "versions": [(p._version, None if p.grad is None else p.grad._version) for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in _HOOKS] for module in model.modules()],
    }


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def seed_everything(seed: int = 3) -> None:
    """Seed all global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def equal(a: Any, b: Any) -> bool:
    """Whether two pictures are the same, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bits(a), _bits(b))
    if isinstance(a, np.ndarray):
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _bits(x: Tensor) -> Tensor:
    dense = x.detach().to_dense() if x.is_sparse else x.detach()
    return dense.resolve_conj().contiguous().view(-1).view(torch.uint8)
