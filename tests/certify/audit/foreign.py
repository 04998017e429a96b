"""Models as others write them, and the independent computations that the audit is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.certify.audit import Audit, Finding, audit


class GradientStep(nn.Module):
    """x - h A^T s(Ax + b): a convex potential block, with any activation and any step."""

    def __init__(self, n: int, hidden: int, step: float, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.A, self.b = nn.Parameter(torch.randn(hidden, n)), nn.Parameter(0.1 * torch.randn(hidden))
        self.step, self.activation = step / float(torch.linalg.matrix_norm(self.A.detach(), 2)) ** 2, activation

    def forward(self, x: Tensor) -> Tensor:
        return x - self.step * self.activation(x @ self.A.T + self.b) @ self.A


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class DotAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class DistanceAttention(nn.Module):
    """L2 attention; it is Lipschitz only if queries and keys are made by one matrix."""

    def __init__(self, d: int, tied: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        if tied:
            self.k = self.q

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        squares = q.square().sum(-1)[..., :, None] - 2 * q @ k.mT + k.square().sum(-1)[..., None, :]
        return (-squares / x.shape[-1] ** 0.5).softmax(-1) @ self.v(x)


class Mode(nn.Module):
    """One mode of a linear recurrent unit: |lambda| = r < 1, input scaled by sqrt(1 - r^2) or by 1 - r."""

    def __init__(self, r: float, angle: float, scale: float) -> None:
        super().__init__()
        self.r, self.angle, self.scale = nn.Parameter(torch.tensor(r)), nn.Parameter(torch.tensor(angle)), scale

    def forward(self, x: Tensor) -> Tensor:
        re, im = self.r * self.angle.cos(), self.r * self.angle.sin()
        a, b, out = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            a, b = re * a - im * b + self.scale * x[:, t], im * a + re * b
            out.append(torch.cat([a, b], -1))
        return torch.stack(out, 1)


class Loop(nn.Module):
    """A recurrence written by hand."""

    def __init__(self, W: Tensor, width: int = 3) -> None:
        super().__init__()
        self.W, self.U = nn.Parameter(W), nn.Linear(width, len(W))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), len(self.W))
        for t in range(x.shape[1]):
            h = torch.relu(h @ self.W.T + self.U(x[:, t]))
        return h


class Functional(nn.Module):
    """Layers that no module shows."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        if self.which == "norm":
            return F.layer_norm(x, x.shape[1:])
        if self.which == "pad":
            return F.pad(x, (1, 1, 1, 1), mode="reflect")
        if self.which == "upsample":
            return F.interpolate(x, scale_factor=2)
        return F.dropout(x, 0.5, training=True)


COUNTEREXAMPLE = torch.tensor([[1.5, -2.0], [1.5, -1.5]], dtype=torch.float64)


def norm_of(layer: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """The largest singular value of the dense matrix of a layer, built column by column, by numpy."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    columns = []
    with torch.no_grad():
        base = layer(zero)
        for i in range(zero.numel()):
            unit = zero.clone()
            unit.view(-1)[i] = 1.0
            columns.append((layer(unit) - base).flatten().numpy())
    return float(np.linalg.norm(np.stack(columns, axis=1), 2))


def jacobian_norm(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    J = torch.autograd.functional.jacobian(f, x)
    return float(np.linalg.norm(J.reshape(-1, x.numel()).numpy(), 2))


def only(model: nn.Module, kind: str, shape: tuple[int, ...] | None = None) -> Finding:
    """The one finding of a kind, with a witness that holds if it has one."""
    whole = audit(model, shape)
    (found,) = of_kind(whole, kind)
    assert not of_kind(whole, "not-audited")
    if found.bound < float("inf"):
        assert found.attained <= found.bound * (1 + 1e-9)
    return found


def of_kind(found: Audit, kind: str) -> list[Finding]:
    return [finding for finding in found if finding.kind == kind]


def holds(found: Finding, layer: Callable[[Tensor], Tensor], rel: float = 1e-6) -> None:
    """The witness shows the attained number on the layer itself."""
    assert found.witness is not None
    x, y = found.witness.x, found.witness.y
    layer = copy.deepcopy(layer).double().eval() if isinstance(layer, nn.Module) else layer
    with torch.no_grad():
        gain = float((layer(x) - layer(y)).norm() / (x - y).norm())
    assert abs(gain - found.attained) <= rel * gain
