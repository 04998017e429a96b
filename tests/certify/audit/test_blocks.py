"""Forward maps of others: gradient-type blocks by their symmetric Jacobians, residual sums, hidden layers, the unread rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stableopt.certify.audit import audit
from tests.certify.audit.foreign import Functional, GradientStep, Residual, holds, jacobian_norm, of_kind, only

GELU_LOWEST = (1 + math.erf(-1)) / 2 - math.exp(-1) / math.sqrt(math.pi)
"""The smallest slope of GELU, at -sqrt 2: -0.1289."""


def spectrum(block: GradientStep, x: torch.Tensor, slope) -> np.ndarray:
    """The eigenvalues of I - h A^T diag(slope(Ax + b)) A, by numpy."""
    A, b = block.A.detach().numpy(), block.b.detach().numpy()
    D = slope(A @ x.detach().numpy().reshape(-1) + b)
    return np.linalg.eigvalsh(np.eye(A.shape[1]) - block.step * A.T @ (D[:, None] * A))


def gelu_slope(z: np.ndarray) -> np.ndarray:
    return np.array(
        [(1 + math.erf(v / math.sqrt(2))) / 2 + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in z]
    )


def test_gelu_in_a_gradient_block_expands_by_its_negative_slope() -> None:
    block = GradientStep(6, 6, 1.9, F.gelu)
    found = only(block, "negative-slope", (6,))
    holds(found, block)
    assert found.witness is not None
    eigenvalues = spectrum(block, (found.witness.x + found.witness.y) / 2, gelu_slope)
    assert found.numbers["eigenvalue of the Jacobian"] == pytest.approx(eigenvalues.max(), abs=1e-6)
    exact = 1 - GELU_LOWEST * 1.9  # all units at -sqrt 2, which six units on six inputs can be
    assert found.attained == pytest.approx(exact, rel=1e-5)
    assert found.severity == "serious"
    assert "gelu" in found.what


@pytest.mark.parametrize(
    ("activation", "lowest"),
    [(F.silu, -0.0998), (F.mish, -0.1125), (F.hardswish, -0.5)],
    ids=["silu", "mish", "hardswish"],
)
def test_so_do_the_others_with_negative_slopes(activation, lowest: float) -> None:
    found = only(GradientStep(4, 4, 1.0, activation), "negative-slope", (4,))
    assert found.attained == pytest.approx(1 - lowest, rel=2e-3)


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh, F.softplus], ids=["relu", "tanh", "softplus"])
def test_slopes_in_the_unit_interval_and_a_step_within_its_limit_are_left_alone(activation) -> None:
    found = audit(GradientStep(4, 6, 1.99, activation), (4,))
    assert [f.kind for f in found] == ["unread"]
    assert found.findings[0].attained <= 1 + 1e-6


@pytest.mark.parametrize("excess", [1.05, 2.0])
def test_a_step_beyond_its_limit_is_found(excess: float) -> None:
    block = GradientStep(4, 4, 2 * excess, torch.relu)
    found = only(block, "step-limit", (4,))
    assert found.attained == pytest.approx(2 * excess - 1, rel=1e-5)  # all units active
    holds(found, block)


def test_a_convolutional_block_is_recognized_as_well() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - F.conv_transpose2d(F.gelu(self.conv(x)), self.conv.weight, padding=1)

    block = Conv()
    found = only(block, "negative-slope", (1, 5, 5))
    assert found.witness is not None
    middle = (found.witness.x + found.witness.y) / 2
    assert found.attained == pytest.approx(jacobian_norm(block, middle), rel=1e-5)
    assert found.attained > 1.01


def test_a_residual_sum_has_the_constant_one_plus_the_branch() -> None:
    block = Residual(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    found = only(block, "residual-sum", (4,))
    product = np.prod([np.linalg.norm(block.branch[i].weight.detach().numpy(), 2) for i in (0, 2)])
    assert found.bound == pytest.approx(1 + product, rel=1e-9)
    assert 1 < found.attained <= found.bound
    holds(found, block)
    assert found.severity == "weak"


def test_a_residual_sum_that_contracts_is_not_reported_as_expanding() -> None:
    class Damped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - torch.tanh(x)

    assert not of_kind(audit(Damped(), (4,)), "residual-sum")


def test_positions_and_biases_are_no_branches() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.shift

    assert [f.kind for f in audit(Shifted(), (4,))] == ["unread"]


@pytest.mark.parametrize(
    ("which", "kind", "severity"),
    [
        ("norm", "sample-normalization", "serious"), ("pad", "copied-pixels", "weak"), ("upsample", "copied-pixels", "weak"),
        ("dropout", "active-dropout", "weak"),
    ],
)  # fmt: skip
def test_layers_that_no_module_shows_are_seen_in_the_run(which: str, kind: str, severity: str) -> None:
    model = nn.Sequential(nn.Identity(), Functional(which)).eval()
    found = only(model, kind, (2, 4, 4))
    assert (found.path, found.severity) == ("1", severity)
    if which == "upsample":
        assert found.attained == pytest.approx(2.0)
    if which == "norm":
        assert found.attained == pytest.approx(1 / math.sqrt(1e-5), rel=1e-4)
    if which == "dropout":
        assert found.attained > 0


def test_a_forward_map_of_its_own_is_said_to_be_unread_with_what_it_did() -> None:
    class Triple(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    layer = Triple(4, 4)
    found = only(layer, "unread")
    assert found.attained == pytest.approx(3 * np.linalg.norm(layer.weight.detach().numpy(), 2), rel=1e-3)
    assert found.attained <= 3 * np.linalg.norm(layer.weight.detach().numpy(), 2) * (1 + 1e-9)
    assert found.severity == "note"


def test_a_model_that_cannot_be_run_is_said_to_be_so_and_the_rest_is_audited() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("lost")

    found = audit(Broken(), (4,))
    assert [f.kind for f in found] == ["sample-normalization", "not-run", "unread"]
    assert not found.ran
    assert "lost" in found.findings[1].what
