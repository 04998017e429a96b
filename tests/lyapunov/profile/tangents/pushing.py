"""What the tests of tangents share: the real optimizers as maps, and differences of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stableopt as so
from stableopt.constraints import Constraint, Regularizer
from stableopt.lyapunov.profile.tangents.push import Pushed, push, tangent_names
from stableopt.optim.rules import SpectralDescent, rule_for

GUARDED: dict[type, type] = {
    torch.optim.SGD: so.optim.SGD, torch.optim.Adam: so.optim.Adam, torch.optim.AdamW: so.optim.AdamW,
    torch.optim.RAdam: so.optim.RAdam, torch.optim.RMSprop: so.optim.RMSprop,
}  # fmt: skip


class Run:
    """A parameter in the hands of a real optimizer.

    The gradient at w is that of a smooth function, w'Hw/2 + sum log cosh w for a symmetric H.
    """

    def __init__(self, cls: type, options: dict[str, Any], w: Tensor, g: Regularizer | None = None) -> None:
        self.regularizer = g
        self.parameter = nn.Parameter(w.clone())
        options = dict(options)
        if cls in GUARDED and g is not None:
            cls = GUARDED[cls]
        if g is not None:
            options |= {"constraint" if isinstance(g, Constraint) else "prox": g}
        self.optimizer = cls([self.parameter], **options)
        self.group = self.optimizer.param_groups[0]
        rule = SpectralDescent() if isinstance(self.optimizer, so.optim.Muon) else rule_for(self.optimizer)
        assert rule is not None
        self.rule = rule
        n = w.numel()
        A = torch.randn(n, n, generator=torch.Generator().manual_seed(7))
        self.H = ((A + A.T) / (2 * n**0.5)).to(w.dtype)

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the state."""
        held = self.optimizer.state.get(self.parameter, {})
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in held.items()}

    def gradient(self, w: Tensor) -> Tensor:
        x = torch.view_as_real(w) if w.is_complex() else w
        first = (self.H @ w.flatten()).view(w.shape) + (torch.view_as_complex(x.tanh()) if w.is_complex() else x.tanh())
        return first.detach()

    def d_gradient(self, w: Tensor, rows: Tensor) -> Tensor:
        flat = rows.reshape(len(rows), w.numel()) @ self.H
        if w.is_complex():
            bent = torch.view_as_complex(torch.view_as_real(rows) * (1 - torch.view_as_real(w).tanh() ** 2))
        else:
            bent = rows * (1 - w.tanh() ** 2)
        return flat.view(rows.shape) + bent

    def step(self) -> None:
        """Do one real step; of our own optimizers the part that moves parameters."""
        self.parameter.grad = self.gradient(self.parameter.detach())
        advance = getattr(self.optimizer, "advance", self.optimizer.step)
        with torch.no_grad():
            advance()

    def pushed(self, rows: Tensor, d_state: dict[str, Tensor], **more: Any) -> Pushed:
        """Push tangents from here, without a step."""
        w = self.parameter.detach()
        return push(
            self.rule, self.group, w.clone(), self.gradient(w), self.state, rows, self.d_gradient(w, rows), d_state,
            regularizer=self.regularizer, **more,
        )  # fmt: skip

    def carried(self) -> dict[str, Tensor]:
        """Copies of the parameter and of what carries tangents."""
        w = self.parameter.detach()
        return {"parameter": w.clone()} | {n: self.state[n] for n in tangent_names(self.rule, self.state, w)}


def difference(make: Callable[[float, int], Run], steps: int, k: int, h: float) -> list[list[dict[str, Tensor]]]:
    """Return, after each step, the central differences in k directions of all that a run carries."""
    results: list[list[dict[str, Tensor]]] = []
    for row in range(k):
        ahead, behind = make(h, row), make(-h, row)
        path = []
        for _ in range(steps):
            ahead.step()
            behind.step()
            a, b = ahead.carried(), behind.carried()
            path.append({name: (a[name] - b[name]) / (2 * h) for name in a})
        results.append(path)
    return results


def check_run(
    cls: type,
    options: dict[str, Any],
    w: Tensor,
    g: Regularizer | None = None,
    *,
    steps: int = 4,
    k: int = 2,
    tolerance: float = 1e-6,
    h: float = 1e-6,
) -> None:
    """Check that tangents pushed along a real run are its central differences, and that its steps are the same numbers.

    A difference of numbers of size v is off by their rounding, about v eps / h.
    """
    rows = torch.randn(k, *w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(3))
    truth = difference(lambda h, row: Run(cls, options, w + h * rows[row], g), steps, k, h)
    run, d, d_state = Run(cls, options, w, g), rows, {}
    for step in range(steps):
        pushed = run.pushed(d, d_state)
        run.step()
        d, d_state = pushed.d_parameter, pushed.d_state
        mine = {"parameter": pushed.parameter} | {name: pushed.state[name] for name in d_state}
        tangents = {"parameter": d} | d_state
        assert mine.keys() == run.carried().keys()
        reach = (
            0.0 if g is None else 1.0 + float(pushed.parameter.abs().max()) / float(run.group["lr"])
        )  # of what is realised
        for name, value in run.carried().items():
            size = max(float(value.abs().max()), float(w.abs().max())) + (0.0 if name == "parameter" else reach)
            rounding = (16 if g is None else 64) * torch.finfo(w.dtype).eps * size
            assert float((mine[name] - value).abs().max()) <= rounding, (step, name)
            for row, path in enumerate(truth):
                true = path[step][name]
                allowed = tolerance * float(true.abs().max()) + rounding / h
                assert float((tangents[name][row] - true).abs().max()) <= allowed, (
                    step,
                    name,
                    tangents[name][row],
                    true,
                )
