"""A problem far from its solution, so that every healthy step lowers the energy, and comparisons of runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.optim.conformance.subjects import Case


class Problem:
    """Fit a matrix and a column to a distant target; both parameters are matrices, for Muon.

    Args:
        device: of the parameters.
        dtype: one for both or one for each.
        strided: give the matrix the strides of its transpose.
        sparse: turn the gradients into sparse ones.
        scale: how far the target is.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | tuple[torch.dtype, torch.dtype] = torch.float64,
        *,
        strided: bool = False,
        sparse: bool = False,
        scale: float = 10.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        first, second = dtype if isinstance(dtype, tuple) else (dtype, dtype)
        weight = 0.1 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
        bias = 0.1 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
        self.x = torch.tensor([[0.7], [-1.1]], device=device, dtype=torch.float64)
        self.target = scale * torch.tensor([[1.0], [-1.2], [0.8]], device=device, dtype=torch.float64)
        weight = weight.to(device, first)
        self.weight = nn.Parameter(weight.T.contiguous().T if strided else weight)
        self.bias = nn.Parameter(bias.to(device, second))
        self.sparse = sparse
        self.calls = 0

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def loss(self) -> Tensor:
        return (self.weight.double() @ self.x + self.bias.double() - self.target).square().sum()

    def closure(self, optimizer: Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.calls += 1
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            if self.sparse:
                for p in self.params:
                    assert p.grad is not None
                    p.grad = p.grad.to_sparse()
            return loss

        return closure

    def run(self, optimizer: Optimizer, steps: int = 3) -> list[Tensor]:
        """Step, and return the parameters."""
        for _ in range(steps):
            optimizer.step(self.closure(optimizer))
        return self.values()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def problem_for(case: Case, device: torch.device | str = "cpu", **kwargs: Any) -> Problem:
    return Problem(device, sparse=case.sparse, **kwargs)


def untouched(case: Case, optimizer: Any) -> None:
    """Check that the guard had nothing to object to: then the run must be that of the plain optimizer."""
    report = optimizer.last_step
    if case.mode in {"backtrack", "strict"}:
        assert report.action == "accepted", report
    assert report.scale == 1.0, report


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Check that everything in ``theirs`` is in ``ours``, bit for bit."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), (where, ours)
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours, theirs), (where, ours, theirs)
    elif isinstance(theirs, dict):
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif callable(theirs):
        assert callable(ours), where
    else:
        assert ours == theirs, (where, ours, theirs)


def states(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The state of each parameter, in order."""
    return [dict(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]


def outcome(action: Callable[[], Any]) -> Any:
    """What an action gives, or the class of its exception."""
    try:
        return action()
    except Exception as error:  # whatever torch raises is what is compared
        return type(error)


def public(thing: object) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}
