"""Verdicts: exact laws, both sides of what tells them apart, constants that hold, and error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.findings import MATERIAL
from stableopt.lyapunov.profile.growth.verdicts import judge
from stableopt.lyapunov.profile.growth.windows import Windows
from tests.benchmarks.verdicts import Paths, ar, design, slow

T = np.arange(1001.0)


def noise(seed: int = 0, phi: float = 0.0, scale: float = 1.0, steps: int = 1000) -> NDArray[np.float64]:
    return ar(np.random.default_rng(seed), phi, steps, scale)


@pytest.mark.parametrize("steps", [60, 100, 300, 5000])
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.999])
def test_geometric_decay_is_stable_with_its_rate(rho: float, steps: int) -> None:
    found = judge(math.log(rho) * np.arange(steps + 1))
    assert found.kind == "exponentially stable"
    assert found.rate == pytest.approx(rho, rel=1e-9)
    assert found.constant == pytest.approx(1.0, abs=1e-6)
    assert found.horizon == steps
    assert f"on [0, {steps}]" in str(found)
    assert found.peak == 0.0


@pytest.mark.parametrize("steps", [100, 300, 1000, 4000])
def test_a_jordan_block_of_eigenvalue_one_is_subexponential(steps: int) -> None:
    t = np.arange(steps + 1)
    exact = [math.log(np.linalg.norm(np.array([[1.0, k], [0.0, 1.0]]), 2)) for k in t]
    assert judge(exact).kind == "subexponential"
    assert judge(np.log1p(t)).kind == "subexponential"
    assert judge(np.log1p(t)).peak == math.log(steps + 1)


@pytest.mark.parametrize("steps", [300, 1000])
def test_a_jordan_block_that_contracts_is_stable_after_its_peak(steps: int) -> None:
    t = np.arange(steps + 1)
    exact = np.array(
        [k * math.log(0.95) + math.log(np.linalg.norm(np.array([[1.0, k / 0.95], [0.0, 1.0]]), 2)) for k in t]
    )
    found = judge(exact)
    assert found.kind == "exponentially stable"
    assert found.peak > 1.5
    assert found.terminal_decay
    windows = exact[None, :] - exact[:, None]  # K(t, 0) / K(s, 0) <= C rho^(t - s)
    bound = math.log(found.constant) + math.log(found.rate) * (t[None, :] - t[:, None])
    assert (windows <= bound + 1e-9)[t[:, None] <= t[None, :]].all()


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize(
    ("power", "kind"), [(0.0, "subexponential"), (0.5, "subexponential"), (1.0, "exponentially unstable")]
)
def test_what_grows_is_told_by_its_power(power: float, kind: str, steps: int) -> None:
    t = np.arange(steps + 1.0)
    assert judge(np.log1p(t) if power == 0.0 else 0.4 * t**power).kind == kind


@pytest.mark.parametrize("c", [0.15, 0.5, 2.0])
def test_stretched_growth_is_not_called_exponential(c: float) -> None:
    for seed in range(5):
        assert judge(c * np.sqrt(T) + noise(seed, 0.5, 0.2)).kind == "subexponential"
        assert judge(c / math.sqrt(1000.0) * T + noise(seed, 0.5, 0.2)).kind == "exponentially unstable"  # ends as high


def test_growth_that_is_neither_surely_is_named_so() -> None:
    short = np.arange(301.0)
    found = judge(0.005 * short + noise(0, 0.8, 0.3, 300))
    assert found.kind == "inconclusive"
    assert "growth, exponential not excluded" in found.reason


def test_white_noise_is_bounded_by_what_was_seen() -> None:
    path = 0.5 * noise()
    found = judge(path)
    assert found.kind == "profile-bounded"
    assert math.log(found.constant) == pytest.approx(
        max(path[j] - path[i] for i in range(1001) for j in range(i, 1001))
    )
    assert not found.terminal_decay


@pytest.mark.parametrize("steps", [60, 200, 1000])
def test_what_does_not_move_is_bounded_by_one(steps: int) -> None:
    for path in (np.zeros(steps + 1), np.full(steps + 1, 3.0), 1e-7 * noise(1, 0.0, 1.0, steps).cumsum()):
        found = judge(path)
        assert found.kind == "profile-bounded"
        assert found.constant == pytest.approx(1.0, abs=1e-4)


def test_both_sides_of_forgetting() -> None:
    # the same innovations: worth 53 independent values, and one
    assert judge(noise(3, 0.9, 0.2)).kind == "profile-bounded"
    r = np.random.default_rng(3)
    kinds = {judge(0.3 * r.standard_normal(1001).cumsum()).kind for _ in range(20)}
    assert "subexponential" in kinds
    assert not kinds & {"profile-bounded", "exponentially stable"}


def test_few_steps_are_not_judged() -> None:
    assert judge(-0.1 * np.arange(55.0)).kind == "inconclusive"  # 49 after the first 5
    assert judge(-0.1 * np.arange(57.0)).kind == "exponentially stable"  # 51
    assert "too few" in judge([0.0, 1.0]).reason


def test_a_walk_is_not_named_in_a_short_run() -> None:
    r = np.random.default_rng(0)
    assert all(judge(0.5 * r.standard_normal(201).cumsum()).kind != "subexponential" for _ in range(20))


def test_adding_c_per_step_moves_the_exponent_and_the_verdict() -> None:
    path = 0.2 * noise(5, 0.5)
    kinds = []
    for c in (-0.05, 0.0, 0.05):
        found = judge(path + c * T)
        kinds.append(found.kind)
        assert found.exponent.value - c == pytest.approx(judge(path).exponent.value)
    assert kinds == ["exponentially stable", "profile-bounded", "exponentially unstable"]


def test_a_path_that_dips_and_climbs_back_is_judged_by_its_windows() -> None:
    path = 0.05 * np.abs(T - 500.0) - 25.0
    path[0] = 0.0
    for p in (path, path + noise(0, 0.5, 0.3)):
        found = judge(p)
        assert found.kind == "exponentially unstable"
        assert "from step" in found.reason
    # the mirror image: a decay at the end bounds nothing between
    for p in (-path, -path + noise(0, 0.5, 0.3)):
        found = judge(p - p[0] - 2.0)
        assert found.kind == "inconclusive"
        assert found.terminal_decay


def test_two_rates_of_decay_are_a_decay_at_the_slower_one() -> None:
    found = judge(-0.03 * T - 0.07 * np.minimum(T, 500.0) + noise(0, 0.5, 0.3))
    assert found.kind == "exponentially stable"
    assert math.log(found.rate) == pytest.approx(-0.03, abs=0.004)


def test_slow_decays_are_bounded_and_flagged_but_not_stable() -> None:
    for path in (-np.log1p(T), -0.5 * np.sqrt(T)):
        for p in (path, path + noise(0, 0.5, 0.2)):
            found = judge(p)
            assert found.kind == "profile-bounded"
            assert found.terminal_decay


def test_a_fall_that_ends_above_one_is_no_terminal_decay() -> None:
    assert not judge(100.0 - 0.05 * T).terminal_decay
    assert judge(20.0 - 0.05 * T).terminal_decay


def test_a_climb_that_ends_on_a_level_is_not_called_bounded() -> None:
    for seed in range(3):
        assert judge(0.02 * np.minimum(T, 500.0) + noise(seed, 0.5, 0.2)).kind in {"inconclusive", "subexponential"}
        down = judge(-0.02 * np.minimum(T, 400.0) + noise(seed, 0.5, 0.2))
        assert down.kind in {"inconclusive", "profile-bounded"}


def test_what_slows_down_and_wanders_is_not_called_exponential() -> None:
    for seed in range(4):
        walk = 0.1 * np.random.default_rng(seed).standard_normal(1001).cumsum()
        assert judge(walk - 6.0 * np.sqrt(T)).kind != "exponentially stable"
        assert judge(walk + 6.0 * np.sqrt(T)).kind != "exponentially unstable"
        assert judge(walk - 0.2 * T).kind == "exponentially stable"


def test_a_rise_hidden_in_the_noise_is_not_ruled_out() -> None:
    found = [judge(noise(seed, 0.95, 0.5)) for seed in range(12)]
    assert any("no growth is seen" in f.reason and f.kind == "inconclusive" for f in found)
    assert any(f.kind == "profile-bounded" for f in found)


def test_oscillations_are_bounded() -> None:
    assert judge(np.cos(T / 9.0)).kind == "profile-bounded"
    assert judge((T % 40.0) / 20.0).kind == "profile-bounded"
    assert judge(np.cos(T / 9.0) + 0.02 * T).kind == "exponentially unstable"
    assert judge(np.cos(T / 9.0) - 0.02 * T).kind == "exponentially stable"


def table(path: NDArray[np.float64], every: int) -> NDArray[np.float64]:
    """log K(t_j, t_i) of a scalar system: what the path grows by."""
    at = path[::every]
    out = at[:, None] - at[None, :]
    out[np.triu_indices(len(at), 1)] = np.nan
    return out


def seen(path: NDArray[np.float64], log_norms: NDArray[np.float64]) -> Windows:
    """The windows of a run of which this table is known."""
    steps = np.linspace(0, len(path) - 1, len(log_norms)).astype(np.int64)
    end, start = np.unravel_index(int(np.nanargmax(log_norms)), log_norms.shape)
    sup = float(np.nanmax(log_norms))
    zero = np.zeros_like(log_norms)
    return Windows(
        steps, steps, log_norms, zero, path, np.arange(len(path)), sup, sup, int(steps[start]), int(steps[end]), True
    )


def test_windows_that_agree_change_nothing() -> None:
    for path in (-0.05 * T + 0.2 * noise(), 0.3 * noise(1)):
        alone, both = judge(path), judge(path, windows=seen(path, table(path, 20)))
        assert (alone.kind, alone.rate) == pytest.approx((both.kind, both.rate), nan_ok=True)
        assert both.constant == pytest.approx(alone.constant)


def test_windows_that_start_late_and_grow_take_a_verdict_back() -> None:
    path = -0.05 * T + 0.1 * noise()
    late = table(path, 20)
    i = np.arange(51)
    late[:, 30] = np.where(i >= 30, 0.4 * (i - 30.0), np.nan)  # a direction that K(t, 0) does not see
    found = judge(path, windows=seen(path, late))
    assert found.kind == "inconclusive"
    assert "training step 600" in found.reason
    assert found.peak == pytest.approx(8.0)
    longer = table(path, 5)
    i = np.arange(201)
    longer[:, 60] = np.where(i >= 60, 0.1 * (i - 60.0), np.nan)
    assert judge(path, windows=seen(path, longer)).kind == "exponentially unstable"


def test_transients_in_late_windows_only_raise_the_constant() -> None:
    path = -0.05 * T
    late = table(path, 20)
    late[11:13, 10] = 3.0
    found = judge(path, windows=seen(path, late))
    assert found.kind == "exponentially stable"
    assert math.log(found.constant) >= 3.0 + 0.05 * 20
    # just below what counts
    late[11:13, 10] = MATERIAL * 0.99
    assert "window" not in judge(path, windows=seen(path, late)).reason


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_words_and_numbers_are_in_training_steps_whatever_the_cadence(stride: int) -> None:
    path, steps = -0.05 * T[:201] * stride, 300 + stride * np.arange(201)
    found = judge(path, steps=steps)
    assert (found.kind, found.horizon, found.spans) == (
        "exponentially stable",
        200 * stride,
        ((300, 300 + 200 * stride),),
    )
    assert str(found).startswith(f"exponentially stable on [300, {300 + 200 * stride}]")
    assert found.rate == pytest.approx(math.exp(-0.05))
    assert found.exponent.value == pytest.approx(-0.05)
    few = judge(path[:26], steps=steps[:26]).reason
    assert f"at 23 boundaries after training step {300 + 2 * stride}" in few
    turns = judge(0.05 * stride * np.abs(T - 500.0), steps=300 + stride * np.arange(1001))
    assert turns.kind == "exponentially unstable"
    assert f"from step {300 + 550 * stride} on" in turns.reason
    steep = judge(100.0 * stride * T, steps=stride * np.arange(1001))
    assert math.log(steep.rate) == pytest.approx(100.0)  # e^(100 stride) is beyond the floats from stride 8 on
    walk = judge((0.3 * np.random.default_rng(0).standard_normal(1001)).cumsum(), steps=stride * np.arange(1001))
    rate = float(walk.reason.split("by ")[1].split(" ")[0])
    assert rate == pytest.approx(judge(walk_of(0)).exponent.value / stride, rel=0.02)


def walk_of(seed: int) -> NDArray[np.float64]:
    return (0.3 * np.random.default_rng(seed).standard_normal(1001)).cumsum()


@pytest.mark.parametrize("steps", [240, 1000])
def test_terminal_decay_does_not_depend_on_the_cadence(steps: int) -> None:
    t = np.arange(steps + 1)
    for seed in range(3):
        for slope, ends in ((-0.02, True), (0.02, False)):
            path = slope * t + noise(seed, 0.5, 0.1, steps)
            assert [judge(path[::k], steps=t[::k]).terminal_decay for k in (1, 2, 5, 8)] == [ends] * 4


def test_a_last_factor_of_another_length_is_judged_too() -> None:
    steps = np.r_[np.arange(1001) * 8, 8007]
    path = -0.001 * np.arange(1002.0)
    assert judge(path, steps=steps).kind == "exponentially stable"
    path[-1] += 92.0  # grows at the very end
    found = judge(path, steps=steps)
    assert found.kind == "inconclusive"
    assert found.peak == pytest.approx(92.0, abs=1e-2)


def test_growth_that_the_end_makes_much_larger_is_not_settled() -> None:
    path = -0.001 * T
    for rise, kind in ((1.0, "inconclusive"), (0.6, "exponentially stable")):
        late = table(path, 5)
        late[-1, -2] = rise
        found = judge(path, windows=seen(path, late))
        assert found.kind == kind
        assert ("not settled" in found.reason) == (kind == "inconclusive")


@pytest.mark.parametrize("kind", slow()[:7], ids=lambda k: k.name)
def test_slow_growth_in_noise_is_not_called_bounded(kind: Paths) -> None:
    r = np.random.default_rng(3)
    found = [judge(kind.draw(r, 1000)) for _ in range(15)]
    assert sum(f.kind in {"profile-bounded", "exponentially stable"} for f in found) <= 1
    assert any("not excluded" in f.reason for f in found)


def test_noise_that_leaves_no_room_for_growth_is_bounded() -> None:
    r = np.random.default_rng(3)
    assert sum(judge(ar(r, 0.9, 1000, 0.1)).kind == "profile-bounded" for _ in range(10)) >= 9


def test_annihilation_and_overflow() -> None:
    path = np.concatenate([-np.arange(5.0), np.full(96, -np.inf)])
    found = judge(path)  # of what enters later nothing is known
    assert (found.kind, found.terminal_decay) == ("inconclusive", True)
    assert "annihilated at training step 5" in found.reason
    assert found.exponent.value == -math.inf
    for bad in (np.inf, np.nan):
        path = 0.1 * np.arange(101.0)
        path[50:] = bad
        assert judge(path).kind == "inconclusive"
        assert "step 50" in judge(path).reason
    assert math.isfinite(judge(1e5 * T).rate)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="log_norms"):
        judge([])
    with pytest.raises(ValueError, match="log_norms"):
        judge(np.zeros((3, 3)))
    for steps in (np.arange(99), np.zeros(100)):
        with pytest.raises(ValueError, match="steps are as many"):
            judge(np.zeros(100), steps=steps)


def test_every_verdict_says_its_horizon_and_its_reason() -> None:
    r = np.random.default_rng(0)
    for kind in design()[::4]:
        found = judge(kind.draw(r, 400))
        assert str(found).startswith(f"{found.kind} on [0, 400]: ")
        assert found.estimated
        assert found.reason
        assert math.isnan(found.constant) == (found.kind not in {"exponentially stable", "profile-bounded"})
        assert math.isnan(found.rate) == (not found.kind.startswith("exponentially"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", design(), ids=lambda k: k.name)
def test_verdicts_are_right_where_they_are_given(kind: Paths) -> None:
    r = np.random.default_rng(7)
    found = [judge(kind.draw(r, 1000)).kind for _ in range(100)]
    given = [k for k in found if k != "inconclusive"]
    assert sum(k in kind.truth for k in given) >= 0.9 * len(given)
    if kind.grows:
        assert sum(k in {"exponentially stable", "profile-bounded"} for k in found) <= 4
