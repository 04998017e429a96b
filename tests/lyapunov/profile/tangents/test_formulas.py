"""The derivatives written out are what forward mode gives, for every rule that has some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stableopt.constraints import L1, Box, L2Ball, Regularizer
from stableopt.lyapunov.profile.tangents.push import tangent_names
from tests.lyapunov.profile.tangents.pushing import Run
from tests.lyapunov.profile.tangents.test_push import ADAMW, RADAM, RMSPROP, SGD, SMOOTH, start_of


def _row(step: Run, names: tuple[str, ...], k: int) -> tuple[Tensor, dict[str, Tensor]]:
    w = step.parameter
    return torch.randn(k, *w.shape, dtype=w.dtype), {name: torch.randn(k, *w.shape, dtype=w.dtype) for name in names}


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_formulas_are_what_forward_mode_gives(
    case: tuple[type, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all entries of the state moving, some, and none; from the first step on; entries without gradient included."""
    for dtype, steps in ((torch.float64, 2), (torch.complex128, 1)):
        run = Run(case[0], {"lr": 0.05} | case[1], torch.randn(3, 2, dtype=dtype))
        for _ in range(steps):
            names = tangent_names(run.rule, run.state, run.parameter)
            for moving in {names, names[1:], ()}:
                d, d_state = _row(run, moving, 2)
                written = run.pushed(d, d_state)
                with monkeypatch.context() as without:
                    without.setattr("stableopt.lyapunov.profile.tangents.push.written", lambda *_: None)
                    plain = run.pushed(d, d_state)
                assert written.d_state.keys() == plain.d_state.keys()
                for x, y in zip(
                    (written.d_parameter, *written.d_state.values()),
                    (plain.d_parameter, *plain.d_state.values()),
                    strict=True,
                ):
                    torch.testing.assert_close(
                        x, y, rtol=1e-12, atol=1e-11 if case[0] is torch.optim.RMSprop else 1e-13
                    )
            run.step()


@pytest.mark.parametrize("g", [L1(0.3), L2Ball(0.9), Box(-0.2, 0.2)], ids=repr)
@pytest.mark.parametrize("case", [SGD, ADAMW, RMSPROP, RADAM], ids=lambda c: c[0].__name__)
def test_formulas_of_the_realignment_are_what_forward_mode_gives(
    case: tuple[type, dict[str, Any]], g: Regularizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(case[0], {"lr": 0.05} | case[1], start_of(g), g)
    for _ in range(3):
        d, d_state = _row(run, tangent_names(run.rule, run.state, run.parameter), 2)
        written = run.pushed(d, d_state)
        with monkeypatch.context() as without:
            without.setattr("stableopt.lyapunov.profile.tangents.push.written", lambda *_: None)
            without.setattr("stableopt.lyapunov.profile.tangents.push.realigned", lambda *_: None)
            plain = run.pushed(d, d_state)
        torch.testing.assert_close(written.d_parameter, plain.d_parameter, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(written.d_state, plain.d_state, rtol=1e-11, atol=1e-11)
        run.step()
