"""The cells of the package for the tests: makers, the metric of each, and Jacobians of one step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stableopt.nn import AntisymmetricCell, ContractingCell, DiagonalMetricCell, LeakyCell, RecurrentCell

Make = Callable[..., RecurrentCell]

CELLS: dict[str, Make] = {
    "contracting": ContractingCell,
    "contracting weighted": lambda *sizes, **options: ContractingCell(*sizes, weighted=True, **options),
    "contracting inhibited": lambda *sizes, **options: ContractingCell(*sizes, log_norm=-0.5, **options),
    "leaky l2": LeakyCell,
    "leaky linf": lambda *sizes, **options: LeakyCell(*sizes, norm="linf", **options),
    "diagonal metric": DiagonalMetricCell,
    "antisymmetric": AntisymmetricCell,
}


def random_parameters(cell: RecurrentCell, log_scale: float, *, rank_one: bool = False) -> RecurrentCell:
    """Fill all parameters with numbers of one scale."""
    with torch.no_grad():
        for p in cell.parameters():
            values = torch.randn(p.shape)
            if rank_one and p.ndim == 2:
                values = torch.randn(p.shape[0], 1) @ torch.randn(1, p.shape[1])
            p.copy_(10.0**log_scale * values)
    return cell


def metric(cell: RecurrentCell) -> Tensor:
    """The diagonal of D in the norm of the state, the norm of Dh."""
    if isinstance(cell, DiagonalMetricCell):
        return cell.scaling().detach()
    if isinstance(cell, ContractingCell) and cell.raw_scaling is not None:
        return 1.0 / cell.scaling().detach()  # type: ignore[union-attr]
    return torch.ones(cell.hidden_size)


def step_jacobians(cell: RecurrentCell, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of one step in the input and in the state."""
    return torch.autograd.functional.jacobian(lambda x, h: cell(x, h), (x, h))  # type: ignore[return-value]


def between(J: Tensor, source: str, target: str) -> float:
    """The operator norm between two norms, exactly, by all signs where it needs them."""
    if source == target:
        return float(torch.linalg.matrix_norm(J, {"l2": 2, "linf": math.inf, "l1": 1}[source]))
    if source == "l1":
        return float(torch.linalg.vector_norm(J, 2 if target == "l2" else math.inf, dim=0).max())
    if target == "linf":
        return float(torch.linalg.vector_norm(J, 2 if source == "l2" else 1, dim=1).max())
    if (source, target) == ("l2", "l1"):  # the transpose, between the dual norms
        J, target = J.mT, "l2"
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * J.shape[1]).reshape(-1, J.shape[1])
    return float(torch.linalg.vector_norm(signs @ J.mT, 2 if target == "l2" else 1, dim=1).max())
