"""The laws of the diagonal state space: its gain is what it promises, for every parameter, length, mode and dtype."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz
from stableopt.nn.statespace import DiagonalStateSpace, LinearSystem
from stableopt.nn.statespace.diagonal import decay_guard
from stableopt.nn.uniform import uniform_bound
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm
from tests.nn.statespace.test_gain import run


def scrambled(layer: DiagonalStateSpace, seed: int, scale: float) -> DiagonalStateSpace:
    """Give a layer parameters that no training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return layer


@settings(max_examples=10)
@given(
    d_in=st.integers(1, 4), n=st.integers(1, 4), d_out=st.integers(1, 4), skip=st.booleans(), both=st.booleans(),
    gain=st.sampled_from([1e-3, 1.0, 7.3, 1e4]), log_scale=st.integers(-8, 8), seed=st.integers(0, 99),
)  # fmt: skip
@example(d_in=3, n=2, d_out=3, skip=True, both=False, gain=1.0, log_scale=-300, seed=0)
def test_the_proved_gain_never_exceeds_its_limit(
    d_in: int, n: int, d_out: int, skip: bool, both: bool, gain: float, log_scale: int, seed: int
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = DiagonalStateSpace(d_in, n, d_out, gain=gain, skip=skip, bidirectional=both).to(dtype)
        scrambled(layer, seed, 10.0**log_scale)
        bound = lipschitz(layer)
        assert bound.proved
        assert bound.upper <= gain  # proved, not gain + eps
        for norm in ("linf", "l1"):
            assert lipschitz(layer, norm).upper < math.inf
        uniform = uniform_bound(layer, "token_max")
        assert uniform is not None
        assert lipschitz(layer, "token_max").upper <= uniform.upper
        if dtype == torch.float64:
            J = jacobian(layer, torch.randn(1, 9, d_in))
            for norm in ("l2", "linf", "l1"):
                assert operator_norm(J, norm) <= lipschitz(layer, norm).upper * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_slowest_state_is_inside_the_circle_in_every_dtype(dtype: torch.dtype) -> None:
    """At the guard the proof still holds, where exp(-a) alone would round to 1."""
    layer = DiagonalStateSpace(2, 5, gain=1.0).to(dtype)
    for raw in (-1e30, -15.0, 15.0):
        for angle in (0.0, 1.0, 1e8):
            with torch.no_grad():
                layer.raw_decay.fill_(raw)
                layer.phase.fill_(angle)
            real, imag, scale = (part.double() for part in layer.eigenvalues())
            room = 1.0 - (real**2 + imag**2).sqrt()
            assert (room > 0).all()
            assert (scale <= room * (1 + 1e-9)).all()
            assert (scale >= 0.5 * room).all()
            assert lipschitz(layer).upper <= 1.0
            layer.zero_grad()
            layer(torch.ones(1, 20, 2, dtype=dtype)).sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    smallest, margin = decay_guard(dtype)
    eps = torch.finfo(dtype).eps
    assert (smallest, margin) == (64 * eps, 16 * eps)


def test_the_usual_input_scale_has_no_gradient_where_the_modulus_rounds_to_one() -> None:
    """What the guard and the scale 1 - |lambda| are for."""
    nu = torch.tensor(-18.0, dtype=torch.float32, requires_grad=True)
    modulus = torch.exp(-torch.exp(nu))
    assert float(modulus.detach()) == 1.0
    scale = torch.sqrt(1.0 - modulus**2)
    (slope,) = torch.autograd.grad(scale, nu)
    assert not slope.isfinite()


def attaining(over: float = 1.0) -> DiagonalStateSpace:
    """One real positive eigenvalue, B = C = 1, all weight on the recurrence; the input scale is its own times ``over``."""
    layer = DiagonalStateSpace(1, 1, gain=1.0)
    with torch.no_grad():
        layer.raw_decay.fill_(-3.0)
        layer.phase.zero_()
        layer.input_weight.copy_(torch.tensor([[9.0], [0.0]]))
        layer.output_weight.copy_(torch.tensor([[9.0, 0.0]]))
        assert layer.skip_weight is not None
        assert layer.raw_split is not None
        layer.skip_weight.zero_()
        layer.raw_split.fill_(40.0)
    plain = layer.eigenvalues
    layer.eigenvalues = lambda: (*plain()[:2], over * plain()[2])  # type: ignore[method-assign]
    return layer


def test_a_constant_input_attains_the_gain_and_a_larger_scale_exceeds_it() -> None:
    x = torch.ones(1, 200_000, 1)
    with torch.no_grad():
        at, beyond = (float(attaining(over)(x).norm() / x.norm()) for over in (1.0, 1.001))
    assert 0.999 < at <= 1.0
    assert beyond > 1.0003
    with pytest.raises(UncertifiableError, match="overrides eigenvalues"):
        lipschitz(attaining())


def test_both_paths_together_attain_it() -> None:
    """A constant input comes through the states as it is, so p h + q x with p = q = sqrt(1/2) and C = D = sqrt(1/2) is x."""
    layer = attaining()
    del layer.eigenvalues
    with torch.no_grad():
        assert layer.skip_weight is not None
        assert layer.raw_split is not None
        layer.skip_weight.fill_(9.0)
        layer.raw_split.zero_()
        x = torch.ones(1, 20_000, 1)
        assert float(layer(x).norm() / x.norm()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "token_max"])
def test_no_pair_of_sequences_is_spread_by_more_than_the_proof_says(norm: str, both: bool) -> None:
    layer = scrambled(DiagonalStateSpace(3, 4, 2, bidirectional=both), 1, 1.0)
    found = worst_ratio(layer, (16, 3), norm, starts=4, steps=12)
    assert 0.2 < found / lipschitz(layer, norm).upper <= 1.0


@pytest.mark.parametrize("time", [1, 16, 40])
def test_steps_are_the_sequence(time: int) -> None:
    for skip in (True, False):
        layer = scrambled(DiagonalStateSpace(3, 5, 2, skip=skip), 0, 1.0)
        x = torch.randn(2, time, 3)
        start = torch.randn(2, 10)
        y, last = layer.run(x, start)
        state, outputs, system = start, [], layer.system()
        for t in range(time):
            out, state = layer.step(x[:, t], state, system)
            outputs.append(out)
        torch.testing.assert_close(torch.stack(outputs, 1), y)
        torch.testing.assert_close(state, last)
        torch.testing.assert_close(layer(x, start), y)
        fresh, _ = layer.step(x[:, 0])
        torch.testing.assert_close(fresh, layer(x)[:, 0])


def test_a_sequence_may_be_cut_anywhere() -> None:
    layer = scrambled(DiagonalStateSpace(2, 3), 2, 1.0)
    x = torch.randn(2, 50, 2)
    whole = layer(x)
    first, state = layer.run(x[:, :19])
    torch.testing.assert_close(torch.cat([first, layer(x[:, 19:], state)], 1), whole)


def test_time_does_not_matter_and_the_future_is_not_seen() -> None:
    layer = scrambled(DiagonalStateSpace(2, 3), 3, 1.0)
    x = torch.randn(1, 40, 2)
    late = torch.cat([torch.zeros(1, 7, 2), x], 1)
    torch.testing.assert_close(layer(late)[:, 7:], layer(x))
    changed = x.clone()
    changed[:, 20:] += 1.0
    torch.testing.assert_close(layer(changed)[:, :20], layer(x)[:, :20])


def test_both_directions_are_two_recurrences() -> None:
    layer = scrambled(DiagonalStateSpace(2, 3, 2, bidirectional=True), 4, 1.0)
    x = torch.randn(2, 21, 2)
    system, n = layer.system(), 3
    rows = {0: [*range(n), *range(2 * n, 3 * n)], 1: [*range(n, 2 * n), *range(3 * n, 4 * n)]}
    assert system.skip is not None
    expected = x @ system.skip.mT
    for direction, r in rows.items():
        half = slice(direction * n, (direction + 1) * n)
        u = torch.complex(*(x @ system.input[r].mT).chunk(2, -1))
        h, states = torch.zeros(2, n, dtype=u.dtype), []
        steps = range(21) if direction == 0 else range(20, -1, -1)
        for t in steps:
            h = torch.complex(system.real[half], system.imag[half]) * h + u[:, t]
            states.append(h)
        all_states = torch.stack(states if direction == 0 else states[::-1], 1)
        expected = expected + torch.cat([all_states.real, all_states.imag], -1) @ system.output[:, r].mT
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("both", [False, True])
def test_steps_beyond_a_length_do_not_exist(both: bool) -> None:
    layer = scrambled(DiagonalStateSpace(2, 3, bidirectional=both), 5, 1.0)
    x, lengths = torch.randn(3, 20, 2), torch.tensor([20, 1, 13])
    y, last = layer.run(x, lengths=lengths)
    for i, length in enumerate(lengths.tolist()):
        alone, state = layer.run(x[i : i + 1, :length])
        torch.testing.assert_close(y[i, :length], alone[0])
        assert not y[i, length:].any()
        if not both:
            torch.testing.assert_close(last[i], state[0])


def test_inputs_of_every_batch_shape() -> None:
    layer = DiagonalStateSpace(2, 3)
    x = torch.randn(2, 3, 9, 2)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))
    y, state = layer.run(x)
    assert state.shape == (2, 3, 6)
    torch.testing.assert_close(layer(x, state)[0, 1], layer(x[0, 1], state[0, 1]))
    mapped = torch.func.vmap(layer)(x)
    torch.testing.assert_close(mapped, y)


def test_it_starts_in_its_ring_and_keeps_the_signal() -> None:
    layer = DiagonalStateSpace(16, 400, radius=(0.9, 0.99), phase=1.0)
    with torch.no_grad():
        real, imag, _ = layer.eigenvalues()
    modulus, angle = torch.hypot(real, imag), torch.atan2(imag, real)
    assert 0.9 <= float(modulus.min()) < 0.91
    assert 0.985 < float(modulus.max()) <= 0.99
    assert 0.0 <= float(angle.min()) < 0.02
    assert 0.98 < float(angle.max()) <= 1.0
    squared = modulus**2
    assert float(squared.mean()) == pytest.approx((0.9**2 + 0.99**2) / 2, abs=0.01)
    assert lipschitz(DiagonalStateSpace(16, 16)).upper > 0.9


def test_the_gradient_is_right() -> None:
    layer = scrambled(DiagonalStateSpace(1, 1, bidirectional=True), 6, 1.0)
    names = dict(layer.named_parameters())
    x = torch.randn(1, 17, 1)

    def f(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in names.values()))


def test_copies_keep_the_map() -> None:
    layer = scrambled(DiagonalStateSpace(2, 3), 7, 1.0)
    x = torch.randn(2, 17, 2)
    fresh = DiagonalStateSpace(2, 3)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    assert layer.to("meta")(x.to("meta")).shape == (2, 17, 2)
    assert "gain=1.0" in str(fresh)


@pytest.mark.slow
def test_it_is_compiled_and_exported() -> None:
    layer = scrambled(DiagonalStateSpace(2, 3), 7, 1.0)
    x = torch.randn(2, 17, 2)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_long_memory(dtype: torch.dtype) -> None:
    """0.999 rounds to 1 in bfloat16: the recurrence itself is in float32."""
    layer = DiagonalStateSpace(2, 8, radius=(0.998, 0.999)).to(dtype)
    x = torch.randn(1, 600, 2).to(dtype)
    y, state = layer.run(x)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    wide = copy.deepcopy(layer).double()(x.double())
    assert float(((y.double() - wide).norm() / wide.norm()).detach()) < 2 * torch.finfo(dtype).eps
    assert lipschitz(layer).upper <= 1.0
    assert layer.step(x[:, 0], state)[0].dtype == dtype


def test_autocast_does_not_lower_the_precision() -> None:
    layer, x = DiagonalStateSpace(2, 8).float(), torch.randn(1, 40, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    torch.testing.assert_close(inside, layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_in": 0}, "d_in must be an integer"),
        ({"d_state": 1.5}, "d_state must be an integer"),
        ({"d_out": -1}, "d_out must be an integer"),
        ({"gain": 0.0}, "gain must be finite and > 0"),
        ({"gain": math.inf}, "gain must be finite"),
        ({"radius": (0.5, 1.0)}, "radius must be two numbers"),
        ({"radius": (0.6, 0.5)}, "radius must be two numbers"),
        ({"radius": (0.0, 0.5)}, "radius must be two numbers"),
        ({"phase": 7.0}, "phase must lie in"),
        ({"phase": math.nan}, "phase must lie in"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiagonalStateSpace(**{"d_in": 2, "d_state": 2, **arguments})  # type: ignore[arg-type]


def test_wrong_shapes_are_refused() -> None:
    layer, both = DiagonalStateSpace(2, 3), DiagonalStateSpace(2, 3, bidirectional=True)
    x = torch.randn(4, 5, 2)
    for bad in (torch.randn(2), torch.randn(4, 5, 3), torch.randn(4, 0, 2)):
        with pytest.raises(ValueError, match=r"needs an input of shape \(..., time, 2\)"):
            layer(bad)
    with pytest.raises(ValueError, match=r"the state must have the shape \(4, 6\), got \(6,\)"):
        layer(x, torch.randn(6))
    with pytest.raises(ValueError, match="starts at both ends"):
        both(x, torch.randn(4, 12))
    with pytest.raises(ValueError, match="it has no step"):
        both.step(x[:, 0])
    with pytest.raises(ValueError, match="was built for 2 features"):
        layer.step(torch.randn(4, 1))
    with pytest.raises(ValueError, match="one number per sequence"):
        layer(x, lengths=torch.ones(5))


@pytest.mark.parametrize("name", ["raw_decay", "phase", "input_weight", "output_weight", "skip_weight", "raw_split"])
def test_nan_parameters_have_no_bound(name: str) -> None:
    layer = DiagonalStateSpace(2, 3)
    with torch.no_grad():
        layer.get_parameter(name).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        lipschitz(layer)


def test_all_parameters_have_an_axis_for_sharding() -> None:
    assert all(p.ndim >= 1 and p.is_contiguous() for p in DiagonalStateSpace(2, 3).parameters())


def test_it_learns_an_average_within_its_gain() -> None:
    """The target has the gain 1; the proof holds after every step of the training."""
    torch.manual_seed(0)
    layer = DiagonalStateSpace(1, 4, radius=(0.3, 0.7)).float()
    opt = torch.optim.Adam(layer.parameters(), lr=3e-2)
    x = torch.randn(4, 32, 1, dtype=torch.float32)
    system = LinearSystem(
        torch.tensor([0.9]), torch.zeros(1), torch.tensor([[0.1], [0.0]]), torch.tensor([[1.0, 0.0]]), None
    )
    target = run(system, x.double()).float()
    losses = []
    for _ in range(80):
        loss = (layer(x) - target).square().mean() / target.square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
        assert lipschitz(layer).upper <= 1.0
    assert losses[-1] < 0.1 < 0.5 < losses[0]


def test_a_sequence_without_a_step_leaves_the_state_as_it_is() -> None:
    layer = DiagonalStateSpace(2, 3)
    state = torch.randn(2, 6)
    _, last = layer.run(torch.randn(2, 4, 2), state, lengths=torch.tensor([0, 3]))
    assert torch.equal(last[0], state[0])
    assert not torch.equal(last[1], state[1])
    _, last = layer.run(torch.randn(2, 4, 2), lengths=torch.tensor([0, 3]))
    assert not last[0].any()


def test_what_pads_a_sequence_may_be_anything() -> None:
    layer = DiagonalStateSpace(2, 3)
    x = torch.randn(1, 4, 2)
    bad = x.clone()
    bad[0, 2:] = math.nan
    lengths = torch.tensor([2])
    assert torch.equal(layer(x, lengths=lengths), layer(bad, lengths=lengths))
