"""Eigenvalues of a state space of somebody else's stay stable while an optimizer pushes them out."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.utils.parametrize as P
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stableopt.nn.statespace import discretize, stable_eigenvalues

EPS32 = torch.finfo(torch.float32).eps


class S5Like(nn.Module):
    """The recurrence of S5 as its torch port computes it: free complex eigenvalues, a zero-order hold, a learned step."""

    def __init__(self, width: int = 2, states: int = 8) -> None:
        super().__init__()
        self.Lambda = nn.Parameter(torch.complex(torch.full((states,), -0.5), torch.arange(float(states))))
        self.B = nn.Parameter(torch.randn(states, width, dtype=torch.complex64) / width)
        self.C = nn.Parameter(torch.randn(width, states, dtype=torch.complex64) / states)
        self.log_step = nn.Parameter(torch.full((states,), math.log(0.05)))

    def forward(self, x: Tensor) -> Tensor:
        step = self.log_step.exp()
        modulus = torch.exp(self.Lambda * step)
        scale = (modulus - 1.0) / self.Lambda
        h, outputs = torch.zeros(len(x), len(step), dtype=torch.complex64), []
        for t in range(x.shape[1]):
            h = modulus * h + (x[:, t].to(torch.complex64) @ self.B.T) * scale
            outputs.append((h @ self.C.T).real)
        return torch.stack(outputs, 1)


def s5_layer() -> nn.Module:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    return S5Like()


def pushed(layer: nn.Module, steps: int = 25) -> nn.Module:
    """Train on a running sum, an integrator, which pulls eigenvalues over the imaginary axis."""
    opt = torch.optim.Adam(layer.parameters(), lr=3e-2)
    for _ in range(steps):
        x = torch.randn(8, 30, 2)
        loss = (layer(x) - 0.3 * x.cumsum(1)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return layer


def test_free_eigenvalues_leave_the_half_plane_and_stable_ones_do_not() -> None:
    free = pushed(s5_layer())
    kept = pushed(stable_eigenvalues(s5_layer(), gain=20.0))
    with torch.no_grad():
        assert float(free.get_parameter("Lambda").real.max()) > 0.0  # the trap
        assert float(kept.Lambda.real.max()) <= -1 / 20.0
        x = torch.ones(1, 600, 2)
        y = kept(x)
    assert float(y[:, -1].norm()) < 40.0 * float(y[:, :50].norm(dim=-1).max())


def test_the_values_stay_and_unstable_ones_are_moved_to_the_limit() -> None:
    layer = nn.Module()
    values = torch.tensor([-3.0 + 1.0j, -0.02 + 5.0j, 0.4 - 2.0j, 0.0 + 0.0j, -200.0 + 0.0j])
    layer.Lambda = nn.Parameter(values.clone())
    stable_eigenvalues(layer, gain=100.0)
    now = layer.Lambda.detach()
    torch.testing.assert_close(now[[0, 1, 4]], values[[0, 1, 4]], rtol=1e-9, atol=0)
    torch.testing.assert_close(now.imag, values.imag)
    assert torch.equal(now.real[2:4] <= -0.01, torch.tensor([True, True]))
    assert (now.real[2:4] > -0.0101).all()


@settings(max_examples=40)
@given(
    real=st.floats(-1e4, 1e4, width=32), imag=st.floats(-1e4, 1e4, width=32), log_gain=st.floats(-2, 4),
    time=st.sampled_from(["continuous", "discrete"]), pairs=st.booleans(), wide=st.booleans(),
)  # fmt: skip
def test_every_free_number_is_a_stable_eigenvalue(
    real: float, imag: float, log_gain: float, time: str, pairs: bool, wide: bool
) -> None:
    gain = 10.0**log_gain + (1.0 if time == "discrete" else 0.0)
    dtype = torch.float64 if wide else torch.float32
    start = torch.full((2,), 0.5, dtype=dtype)
    layer = nn.Module()
    layer.Lambda = nn.Parameter(torch.stack([-start, start], -1) if pairs else torch.complex(-start, start))
    stable_eigenvalues(layer, time=time, gain=gain)  # type: ignore[arg-type]
    original = layer.get_parameter("parametrizations.Lambda.original")
    raw = torch.tensor([[real, imag]] * 2, dtype=dtype)
    with torch.no_grad():
        original.copy_(raw if pairs else torch.view_as_complex(raw))
        value = torch.view_as_complex(layer.Lambda) if pairs else layer.Lambda
    value = value.to(torch.complex128)
    if time == "continuous":
        assert (1.0 / value.real.abs() <= gain).all()
        assert (value.real < 0).all()
        for step in (1e-3, 0.1, 10.0):
            for method in ("zoh", "bilinear"):
                discrete, _ = discretize(value, step, method)
                assert (discrete.abs() < 1.0).all()
    else:
        assert (value.abs() < 1.0).all()
        assert (1.0 / (1.0 - value.abs()) <= gain).all()
    loss = layer.Lambda.abs().sum()
    loss.backward()
    assert original.grad is not None
    assert original.grad.isfinite().all()


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_the_guard_keeps_a_discrete_modulus_of_float32_below_one(method: str) -> None:
    """Without it exp(lambda step) rounds to 1: the recurrence keeps everything for ever."""
    layer = nn.Module()
    layer.Lambda = nn.Parameter(
        torch.complex(torch.full((200,), -1e-9), torch.linspace(-300, 300, 200)).to(torch.complex64)
    )
    unguarded, _ = discretize(layer.Lambda.detach(), 1e-3, method)
    assert float(unguarded.to(torch.complex128).abs().max()) >= 1.0 - EPS32
    stable_eigenvalues(layer, step=1e-3)
    guarded, _ = discretize(layer.Lambda.detach(), 1e-3, method)
    assert float(guarded.to(torch.complex128).abs().max()) < 1.0 - 32 * EPS32


@given(real=st.floats(-50, -1e-3), imag=st.floats(-50, 50), step=st.floats(1e-3, 10.0))
@settings(max_examples=60)
def test_a_hold_keeps_the_gain_of_a_mode(real: float, imag: float, step: float) -> None:
    """|scale| / (1 - |lambda|) <= 1 / |Re lambda|, with equality for a real eigenvalue."""
    eigenvalue = torch.tensor([complex(real, imag)], dtype=torch.complex128)
    value, scale = discretize(eigenvalue, step, "zoh")
    gain = float(scale.abs() / (1.0 - value.abs()))
    assert gain <= (1.0 + 1e-9) / abs(real)
    value, scale = discretize(eigenvalue.real.to(torch.complex128), step, "zoh")
    assert float(scale.abs() / (1.0 - value.abs())) == pytest.approx(1.0 / abs(real), rel=1e-9)


def test_the_bilinear_map_is_the_one_of_its_name() -> None:
    eigenvalue = torch.tensor([-1.0 + 2.0j])
    value, scale = discretize(eigenvalue, 0.5, "bilinear")
    z = (1 + 0.25 * (-1 + 2j)) / (1 - 0.25 * (-1 + 2j))
    torch.testing.assert_close(value, torch.tensor([z]))
    torch.testing.assert_close(scale, torch.tensor([0.5 / (1 - 0.25 * (-1 + 2j))]))
    steady = scale / (1.0 - value)
    torch.testing.assert_close(steady, -1.0 / eigenvalue)  # a constant input has the same end as in continuous time
    hold, hold_scale = discretize(eigenvalue, 0.5)
    torch.testing.assert_close(hold_scale / (1.0 - hold), -1.0 / eigenvalue)


def test_it_is_copied_and_saved_and_taken_off() -> None:
    layer = stable_eigenvalues(s5_layer(), gain=10.0)
    x = torch.randn(1, 5, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    fresh = stable_eigenvalues(S5Like(), gain=10.0)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x), rtol=0, atol=0)
    P.remove_parametrizations(layer, "Lambda")
    torch.testing.assert_close(layer(x), fresh(x), rtol=0, atol=0)
    assert isinstance(layer.Lambda, nn.Parameter)


def test_bad_arguments_are_refused() -> None:
    layer = s5_layer()
    with pytest.raises(ValueError, match="has no parameter 'A'"):
        stable_eigenvalues(layer, "A")
    with pytest.raises(TypeError, match=r"a complex tensor, or a real one of shape \(..., 2\)"):
        stable_eigenvalues(layer, "log_step")
    with pytest.raises(ValueError, match="time must be"):
        stable_eigenvalues(layer, time="hourly")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gain must be finite"):
        stable_eigenvalues(layer, gain=-1.0)
    with pytest.raises(ValueError, match="at least the gain 1"):
        stable_eigenvalues(layer, time="discrete", gain=1.0)
    with pytest.raises(ValueError, match="step must be finite"):
        stable_eigenvalues(layer, step=0.0)
    with pytest.raises(ValueError, match="method must be"):
        discretize(layer.get_parameter("Lambda"), 0.1, "euler")
    assert not P.is_parametrized(layer)
    stable_eigenvalues(layer)
    with pytest.raises(ValueError, match="parametrized already"):
        stable_eigenvalues(layer)
    broken = s5_layer()
    with torch.no_grad():
        broken.get_parameter("Lambda")[0] = complex(math.nan, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        stable_eigenvalues(broken)


@pytest.mark.slow
def test_the_package_s5_is_kept_stable() -> None:
    torch.set_default_dtype(torch.float32)
    s5 = pytest.importorskip("s5")
    layer = s5.S5(2, 16)
    stable_eigenvalues(layer.seq, "Lambda", gain=20.0, step=1e-3)
    pushed(layer, 100)
    with torch.no_grad():
        assert float(layer.seq.Lambda.real.max()) <= -1 / 20.0
