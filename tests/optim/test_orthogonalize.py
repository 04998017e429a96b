"""The polar iteration: its composite stays within [0, 1] by proof, its result within the unit ball as stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.optim import _muon

from stableopt.optim.orthogonalize import (
    _ERRORS,
    HEIGHTS,
    POLAR_NORM,
    QUINTICS,
    SLACK,
    _margin,
    _normalized,
    _odd_quintic,
    adjustment,
    muon_step,
    newton_schulz,
    orthogonalize,
)
from stableopt.theory import newton_schulz_norm
from stableopt.theory.gradient import NEWTON_SCHULZ

SMALLEST = 1e-3


def quintics(steps: int) -> list[tuple[float, float, float]]:
    return [QUINTICS[min(k, len(QUINTICS) - 1)] for k in range(steps)]


def value(triple: tuple[float, float, float], s: np.ndarray | float) -> np.ndarray:
    a, b, c = triple
    return s * (a + s * s * (b + c * s * s))


def composite(steps: int, s: np.ndarray) -> np.ndarray:
    for triple in quintics(steps):
        s = value(triple, s)
    return s / HEIGHTS[min(steps, len(HEIGHTS)) - 1]


def norm(x: Tensor) -> float:
    return float(torch.linalg.svdvals(x.double()).max()) if x.numel() else 0.0


@pytest.mark.parametrize("slack", [0.0, SLACK / 2, SLACK])
@pytest.mark.parametrize("steps", range(1, 13))
def test_the_composite_maps_the_unit_interval_into_itself(steps: int, slack: float) -> None:
    """A proof in rational arithmetic: even if every step but the last lets singular values grow by 1/64."""
    height = HEIGHTS[min(steps, len(HEIGHTS)) - 1]
    assert Fraction(newton_schulz_norm(quintics(steps), slack=slack)) <= Fraction(height)
    s = np.linspace(0, 1, 200001)
    assert composite(steps, s).min() >= 0.0
    assert composite(steps, s).max() <= POLAR_NORM


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_height_is_no_larger_than_it_has_to_be(steps: int) -> None:
    reach = 1.0
    for triple in quintics(steps):
        reach = np.abs(value(triple, np.linspace(0, reach * (1 + SLACK), 400001))).max()
    assert HEIGHTS[steps - 1] == pytest.approx(reach, rel=1e-9)


@pytest.mark.parametrize("step", range(8))
def test_each_quintic_is_the_nearest_to_one_on_its_interval(step: int) -> None:
    """The error oscillates with equal size at four points (Chebyshev), the last interval to 1 being [l, (1 + s) u]."""
    low, high = mpmath.mpf(SMALLEST), mpmath.mpf(1)
    for k in range(step + 1):
        a, b, c = (mpmath.mpf(x) for x in QUINTICS[k])
        p = lambda s, a=a, b=b, c=c: a * s + b * s**3 + c * s**5  # noqa: E731
        end = high * (1 + SLACK)
        root = mpmath.sqrt(9 * b * b - 20 * a * c)
        inner = [mpmath.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
        errors = [1 - p(x) for x in (low, *inner, end)]
        start, low, high = low, min(p(low), p(inner[1])), max(p(inner[0]), p(end))
    size = sum(abs(e) for e in errors) / 4
    assert start < inner[0] < inner[1] < end
    for sign, error in zip((1, -1, 1, -1), errors, strict=True):
        assert float(abs(sign * error - size)) <= 1e-10 + 1e-10 * float(size)


def test_the_last_quintic_of_five_is_optimal_among_all_by_linear_programming() -> None:
    """No odd quintic that stays below 1 on [0, (1 + s) u] lifts [l, u'] higher, a second derivation."""
    low, high = SMALLEST, 1.0
    for triple in quintics(4):
        s = np.linspace(low, high, 200001)
        low, high = value(triple, s).min(), value(triple, np.linspace(0, high * (1 + SLACK), 200001)).max()
    x = np.linspace(low, high * (1 + SLACK), 3001)
    powers = np.stack([x, x**3, x**5], 1)
    rows = np.concatenate([np.c_[-powers, np.ones(len(x))], np.c_[powers, np.zeros(len(x))]])
    best = linprog([0, 0, 0, -1], A_ub=rows, b_ub=np.r_[np.zeros(len(x)), np.ones(len(x))], bounds=[(None, None)] * 4)
    ours = composite(5, np.geomspace(SMALLEST, 1, 400001)).min()
    assert ours == pytest.approx(-best.fun, abs=2e-4)


def test_five_steps_are_more_orthogonal_than_torchs_and_stay_below_one() -> None:
    s = np.geomspace(SMALLEST, 1, 400001)
    torchs = s
    for _ in range(5):
        torchs = value(NEWTON_SCHULZ, torchs)
    assert torchs.min() == pytest.approx(0.4705, abs=1e-3)
    assert torchs.max() == pytest.approx(1.2024, abs=1e-3)
    assert composite(5, s).min() >= 0.768
    assert composite(6, s).min() >= 0.996
    assert composite(7, s).min() >= 0.99999
    assert torchs.min() / torchs.max() > composite(4, s).min() / composite(4, s).max()  # four steps are not enough
    tiny = np.geomspace(1e-9, SMALLEST, 1001)
    for steps, least in ((5, 0.768), (6, 0.996), (7, 0.99999)):
        assert (composite(steps, tiny) / tiny >= least / SMALLEST).all()


@pytest.mark.parametrize("steps", range(1, 13))
def test_the_roundings_of_the_last_step_add_up_to_less_than_its_margin(steps: int) -> None:
    """In units of m n u, for |Y| <= U and so |Y|_F <= sqrt(m) U: A = YY', B = bA + cA², O = aY + BY, one after the other."""
    a, b, c = (abs(x) for x in quintics(steps)[-1])
    U = (1 + SLACK) * newton_schulz_norm(quintics(steps - 1), slack=SLACK)
    B = b * U**2 + c * U**4
    in_A = 1.01 * U**2
    in_B = b * in_A + 2 * c * U**2 * in_A + 1.01 * c * U**4 + 3 * B  # passed on, passed on, product, scalings and sum
    in_O = U * in_B + 1.01 * B * U + 3 * (a * U + B * U)
    assert in_O / HEIGHTS[min(steps, len(HEIGHTS)) - 1] < _ERRORS
    for m, n in ((1, 1), (30, 50), (1000, 1000)):
        assert (
            _margin(m, n, torch.float32, torch.float64) >= 2.0**-24 * m**0.5 + in_O / HEIGHTS[-1] * m * n * 2.0**-53 / 2
        )
        assert _margin(m, n, torch.float64, torch.float64) >= 2.0**-53 * (m**0.5 + _ERRORS * m * n)


def haar(n: int, m: int) -> Tensor:
    return torch.linalg.qr(torch.randn(max(n, m), min(n, m)))[0]


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "ones": torch.ones,
    "zero": torch.zeros,
    "eye": torch.eye,
    "rank one": lambda m, n: torch.randn(m, 1) @ torch.randn(1, n),
    "rank two": lambda m, n: torch.randn(m, 2) @ torch.randn(2, n),
    "near ones": lambda m, n: torch.ones(m, n) + 1e-4 * torch.randn(m, n),
    "orthogonal": lambda m, n: haar(m, n) if m >= n else haar(n, m).mT,
    "hilbert": lambda m, n: 1.0 / (torch.arange(m)[:, None] + torch.arange(n) + 1.0),
    "graded": lambda m, n: torch.randn(m, n) * torch.logspace(0, -12, n),
    "sparse": lambda m, n: torch.randn(m, n) * (torch.rand(m, n) < 0.1),
    "signs": lambda m, n: torch.randn(m, n).sign(),
    "blocks": lambda m, n: torch.kron(torch.eye((m + 3) // 4, (n + 3) // 4), torch.ones(4, 4))[:m, :n],
}
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 3), (3, 5), (16, 16), (33, 64), (64, 33), (4, 200), (200, 4), (96, 96)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_no_result_is_longer_than_one_as_stored(kind: str, dtype: torch.dtype) -> None:
    scales = [1.0, 1e-3, 1e3] if dtype == torch.float16 else [1.0, 1e-30, 1e30, 1e-38]
    for shape, scale, steps in itertools.product(SHAPES, scales, (5, 8)):
        x = (KINDS[kind](*shape) * scale).to(dtype)
        kept = x.clone()
        O = orthogonalize(x, steps=steps, eps=0.0 if scale != 1.0 else 1e-7)
        assert torch.equal(x, kept)
        assert O.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert O.shape == x.shape
        assert norm(O) <= POLAR_NORM
        assert O.isfinite().all()
        if not x.any():
            assert not O.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_result_is_longer_than_one_by_exact_arithmetic(dtype: torch.dtype) -> None:
    """With 8 steps singular values come within 1e-6 of 1: the closest shave, checked with 40 digits."""
    with mpmath.workdps(40):
        for kind, shape in itertools.product(
            ("normal", "ones", "orthogonal", "eye", "signs"), ((1, 3), (3, 3), (6, 4))
        ):
            O = orthogonalize(KINDS[kind](*shape).to(dtype), steps=8)
            exact = mpmath.matrix(O.double().tolist())
            gram = exact.T * exact
            largest = max(mpmath.eigsy(gram, eigvals_only=True))
            assert largest <= 1
            assert largest > 1 - 1e-4


def test_thousands_of_random_matrices_stay_within_the_ball() -> None:
    generator = np.random.default_rng(0)
    for _ in range(3000):
        m, n = generator.integers(1, 24, 2)
        rank = generator.integers(1, min(m, n) + 1)
        spectrum = torch.logspace(0, -float(generator.uniform(0, 8)), int(rank))
        x = torch.randn(m, rank) * spectrum @ torch.randn(rank, n)
        O = orthogonalize(x.float(), steps=int(generator.integers(1, 10)))
        assert norm(O) <= 1.0


def test_the_result_is_the_polynomial_of_the_singular_values() -> None:
    """U p(S) V^T by a decomposition: the iteration does nothing else, and keeps the singular vectors."""
    for shape, steps in itertools.product([(6, 6), (4, 9), (9, 4)], (1, 3, 5, 7)):
        x = torch.randn(shape)
        U, S, Vh = torch.linalg.svd(x, full_matrices=False)
        target = torch.from_numpy(composite(steps, (S / x.norm()).numpy()))
        torch.testing.assert_close(orthogonalize(x, steps=steps), U * target @ Vh, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            orthogonalize(x.float(), steps=steps).double(), U * target @ Vh, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            orthogonalize(x.float(), steps=steps, finish=torch.float32).double(), U * target @ Vh, rtol=1e-4, atol=1e-4
        )


def test_autocast_does_not_reach_the_iteration() -> None:
    for kind, shape in itertools.product(KINDS, [(64, 64), (16, 80), (200, 4)]):
        x = KINDS[kind](*shape).float()
        expected = orthogonalize(x, steps=7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (x @ x.mT).dtype == torch.bfloat16
            assert torch.equal(orthogonalize(x, steps=7), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_float32_err_by_a_small_part_of_the_slack(kind: str) -> None:
    for shape in ((64, 64), (32, 512), (256, 256)):
        y = _normalized(KINDS[kind](*shape).float().mT if shape[0] > shape[1] else KINDS[kind](*shape).float(), 1e-7)
        for triple in QUINTICS:
            exact = _odd_quintic(y.double(), *triple)
            y = _odd_quintic(y, *triple)
            assert norm(y.double() - exact) <= SLACK / 100 * max(1.0, norm(exact))


@pytest.mark.parametrize("kind", ["normal", "ones", "orthogonal", "rank one", "hilbert"])
def test_a_last_step_in_float32_stays_below_one_too(kind: str) -> None:
    for shape in SHAPES:
        assert norm(orthogonalize(KINDS[kind](*shape).float(), steps=8, finish=torch.float32)) <= 1.0


def test_eps_is_a_floor_of_the_norm_as_in_torch() -> None:
    x = torch.randn(5, 5)
    x = x / x.norm()
    whole, part = orthogonalize(x * 1e-7, steps=1), orthogonalize(x * 1e-12, steps=1)
    slope = QUINTICS[0][0] / HEIGHTS[0]
    torch.testing.assert_close(whole, orthogonalize(x, steps=1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(part, x * 1e-5 * slope, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(orthogonalize(x * 1e-12, eps=0.0), orthogonalize(x), rtol=1e-9, atol=1e-12)


def test_what_is_not_finite_stays_visible() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.randn(4, 3)
        x[1, 2] = bad
        assert orthogonalize(x).isnan().any()


def test_what_is_no_real_matrix_is_refused() -> None:
    for bad in (torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="real floating"):
            orthogonalize(bad)
    for shape in ((2,), (2, 2, 2), ()):
        with pytest.raises(ValueError, match="matrix"):
            orthogonalize(torch.ones(shape))
    with pytest.raises(ValueError, match="steps"):
        orthogonalize(torch.ones(2, 2), steps=0)
    assert orthogonalize(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torchs_iteration_is_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    theirs = _muon._zeropower_via_newtonschulz(
        x.clone(), NEWTON_SCHULZ, 5, 1e-7
    )  # it divides a bfloat16 matrix in place
    assert torch.equal(newton_schulz(x, NEWTON_SCHULZ), theirs)


@pytest.mark.parametrize("options", [
    {}, {"nesterov": False}, {"momentum": 0.5, "weight_decay": 0.3}, {"adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "original"}, {"ns_steps": 3}, {"lr": torch.tensor(0.05)}, {"lr": torch.tensor([0.05])},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_step_is_torchs_but_for_the_polar_factor(
    options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's optimizer with our factor put into it is the twin: equal to the last bit."""
    monkeypatch.setattr(
        _muon, "_zeropower_via_newtonschulz", lambda x, coefficients, steps, eps: orthogonalize(x, steps=steps, eps=eps)
    )
    shapes = [(4, 3), (3, 5), (2, 2)]
    ours = [torch.randn(shape).to(dtype) for shape in shapes]
    buffers = [torch.zeros_like(w) for w in ours]
    theirs = [nn.Parameter(w.clone()) for w in ours]
    optimizer = torch.optim.Muon(theirs, **({"lr": 0.05} | options))
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in {"params", "ns_coefficients"}}
    for _ in range(5):
        grads = [torch.randn(shape).to(dtype) for shape in shapes]
        muon_step(ours, grads, buffers, **settings)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for mine, p, buffer in zip(ours, theirs, buffers, strict=True):
        assert torch.equal(mine, p)
        assert torch.equal(buffer, optimizer.state[p]["momentum_buffer"])


def test_the_step_refuses_what_torch_refuses() -> None:
    common = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True}
    z = torch.ones(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="Complex parameters are not supported"):
        muon_step([z], [z], [z], **common)
    v = torch.ones(2)
    with pytest.raises(ValueError, match="Param gradient must be a 2D matrix"):
        muon_step([v], [v], [v.clone()], **common)


def test_the_adjustment_is_torchs() -> None:
    for name, shape in itertools.product((None, "original", "match_rms_adamw", "none"), ((2, 3), (9, 2), (5, 5))):
        assert adjustment(name, shape) == pytest.approx(_muon._adjust_lr(1.0, name, torch.Size(shape)), rel=1e-15)
