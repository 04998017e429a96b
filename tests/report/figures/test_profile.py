"""The figures of a profile are its arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.report import Run
from stableopt.report.figures import profile_figures
from stableopt.report.profiles import ProfileSummary
from tests.report.figures.drawing import Drawing
from tests.report.profiled import numbers, system

ARRAYS = system()
RUN = Run("a", profile=ProfileSummary(numbers(), ARRAYS))
OTHER = Run("b", profile=ProfileSummary(numbers(growth=0.02), system(120, 0.02, seed=1)))
TITLES = [
    "Exponent as the run goes",
    "Growth from the first step",
    "Parameters by initial parameters",
    "Exponents",
    "Growth of all windows",
    "Lyapunov energy",
    "Bound of the energy against measured growth",
    "Representations by initial parameters",
    "Forward block at step 0",
    "Forward block at step 200",
    "Response to an error of one update",
    "Parameters by hyper-parameters",
]


def with_arrays(**changes):
    return Run("a", profile=ProfileSummary(numbers(), ARRAYS | changes))


def drawing(run, title):
    return Drawing(next(p for p in profile_figures([run]) if p.title == title).svg)


def test_a_whole_profile_has_all_figures_and_several_runs_share_the_curves():
    one = profile_figures([RUN])
    assert [p.title for p in one] == TITLES
    assert all(p.caption and "aria-label" in p.svg and p.numbers for p in one)
    two = [p.title for p in profile_figures([RUN, Run("none"), OTHER])]
    assert two[:3] == TITLES[:3]
    assert two[3:5] == ["Exponents: a", "Exponents: b"]
    assert len(set(two)) == len(two)


def test_the_running_exponent_is_drawn_within_its_interval_and_the_first_ones_at_the_border():
    drawn = drawing(RUN, "Exponent as the run goes")
    late = slice(50, None)
    assert [y for _, y in drawn.lines["a"]][late] == pytest.approx(ARRAYS["running/exponent"][late].tolist(), abs=1e-3)
    assert len(drawn.paths("hull")) == 1
    wide = ARRAYS["running/upper"].copy()
    wide[10] = 5.0
    assert max(v for _, v in drawing(with_arrays(**{"running/upper": wide}), "Exponent as the run goes").y_ticks) < 0.3
    assert drawn.levels("guide") == pytest.approx([0.0], abs=1e-3)


def test_running_exponents_have_steps_of_their_own_if_they_are_named():
    few = {f"running/{k}": ARRAYS[f"running/{k}"][9::10] for k in ("exponent", "lower", "upper")}
    drawn = drawing(with_arrays(**few, **{"running/steps": np.arange(10, 201, 10)}), "Exponent as the run goes")
    assert [x for x, _ in drawn.lines["a"]] == pytest.approx(range(10, 201, 10), abs=0.5)


def test_the_path_has_a_ring_at_its_peak():
    drawn = drawing(RUN, "Growth from the first step")
    path = ARRAYS["path"]
    assert [y for _, y in drawn.lines["a"]] == pytest.approx(path.tolist(), abs=0.02)
    (ring,) = drawn.paths("ring")
    x, y = map(float, ring[1:].split("a")[0].split(" "))
    assert drawn.at(x + 6, y) == pytest.approx((float(path.argmax()), float(path.max())), abs=0.5)
    assert f"{math.exp(path.max()):.4g} times" in drawn.texts


def test_all_exponents_stand_in_their_intervals():
    drawn = drawing(RUN, "Exponents")
    assert [y for _, y in drawn.lines["a"]] == pytest.approx([-0.02, -0.03, -0.04, -0.05], abs=1e-3)
    assert drawn.axis == "number of the exponent"
    one = Run("a", profile=ProfileSummary(numbers(exponents=numbers()["exponents"][:1]), ARRAYS))
    assert "Exponents" not in [p.title for p in profile_figures([one])]


def test_windows_are_drawn_with_the_largest_framed_also_where_there_are_many():
    steps = np.arange(101)
    norms = np.where(np.tri(101, dtype=bool), 0.01 * (steps[:, None] - steps[None, :]), np.nan)
    norms[57, 43] = 9.0
    content = numbers(largest_window={"log_norm": 9.0, "start": 43, "end": 57, "at_most": 9.0})
    arrays = ARRAYS | {"windows/steps": steps, "windows/log_norms": norms}
    run = Run("a", profile=ProfileSummary(content, arrays))
    drawn = next(p for p in profile_figures([run]) if p.title == TITLES[4])
    assert f"{math.exp(9.0):.4g} times, is from step 43 to 57" in drawn.caption
    assert 'class="frame"' in drawn.svg
    assert "highest 9, step t 57, start s 43" in drawn.svg
    assert len(drawn.numbers) <= 32
    assert drawn.svg.count('class="frame"') == 1


def test_the_bound_is_drawn_above_what_was_measured():
    drawn = drawing(RUN, "Bound of the energy against measured growth")
    bound, measured = drawn.lines["bound, from step 0"], drawn.lines["measured, from step 0"]
    assert all(b > m for (_, b), (_, m) in zip(bound, measured, strict=True))
    table = ARRAYS["energy/bound"]
    assert [y for _, y in bound] == pytest.approx(table[:, 0].tolist(), abs=0.05)
    late = drawn.lines["bound, from step 100"]
    assert [y for _, y in late] == pytest.approx(table[10:, 10].tolist(), abs=0.05)
    assert late[0][0] == pytest.approx(100, abs=1)


def test_the_bound_may_have_steps_of_its_own():
    steps = ARRAYS["windows/steps"][::2]
    bound = ARRAYS["energy/bound"][::2, ::2] + 1.0
    drawn = drawing(
        with_arrays(**{"energy/steps": steps, "energy/bound": bound}), "Bound of the energy against measured growth"
    )
    assert [x for x, _ in drawn.lines["bound, from step 0"]] == pytest.approx(steps.tolist(), abs=1)
    assert len(drawn.lines["measured, from step 0"]) == len(ARRAYS["windows/steps"])
    other = with_arrays(**{"energy/steps": steps + 1, "energy/bound": bound})
    assert "Bound of the energy against measured growth" not in [p.title for p in profile_figures([other])]


def test_layers_updates_and_hyper_parameters_have_their_names():
    assert list(drawing(RUN, "Representations by initial parameters").lines) == ["0", "1", "2", "3", "4"]
    assert list(drawing(RUN, "Response to an error of one update").lines) == ["at step 0", "at step 50", "at step 100"]
    hyper = drawing(RUN, "Parameters by hyper-parameters").lines
    assert hyper["lr"][0][0] == pytest.approx(1.0, abs=0.6)


def test_the_forward_block_is_the_logarithm_of_its_norms_from_a_layer_to_a_later_one():
    logs = ARRAYS["forward/0"]
    l, k = np.unravel_index(int(np.nanargmax(logs)), logs.shape)
    names = ["input", "0", "1", "2", "3", "4"]
    said = f"highest {logs[l, k]:.4g}, to layer l {names[l]}, from layer k {names[k]}."
    full = np.where(np.isnan(logs), 99.0, logs)  # above the diagonal there is nothing, whatever stands there
    for table in (logs, full):
        pictures = profile_figures([with_arrays(**{"forward/0": table})])
        assert said in next(p for p in pictures if p.title == "Forward block at step 0").svg


@pytest.mark.parametrize("name", ["factors", "windows", "running", "energy", "mixed"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_steps_that_are_no_numbers_leave_figures_out(name, value):
    steps = ARRAYS[f"{name}/steps"].astype(np.float64)
    steps[3] = value
    found = profile_figures([with_arrays(**{f"{name}/steps": steps})])
    assert len(found) < len(profile_figures([RUN]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_errors_at_steps_that_are_no_numbers_leave_their_figure_out(value):
    found = profile_figures([with_arrays(**{"update/starts": np.array([0.0, value, 100.0])})])
    assert TITLES[10] not in [p.title for p in found]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, 0.0])
def test_odd_numbers_are_drawn(value):
    run = with_arrays(**{k: np.full_like(v, value) for k, v in ARRAYS.items() if v.dtype == np.float64})
    for picture in profile_figures([run]):
        assert 'd="nan' not in picture.svg
        assert " nan" not in picture.svg


def titles_of(arrays):
    titles = [p.title for p in profile_figures([Run("a", profile=ProfileSummary(numbers(), arrays))])]
    assert set(titles) <= set(TITLES)
    return titles


@pytest.mark.parametrize(
    ("name", "title"),
    [("path", 1), ("windows/steps", 4), ("energy/bound", 6), ("mixed/steps", 7), ("update/starts", 10)],
)
def test_an_array_that_is_absent_leaves_its_figure_out(name, title):
    assert TITLES[title] not in titles_of({key: value for key, value in ARRAYS.items() if key != name})


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (1, 1), (0, 0), (2, 2, 2)])
def test_arrays_of_another_shape_are_drawn_or_left_out(shape):
    titles_of(dict.fromkeys(ARRAYS, np.ones(shape)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARRAYS)
def test_any_array_may_be_absent_or_of_another_shape(name):
    rest = {key: value for key, value in ARRAYS.items() if key != name}
    for other in ((), (0,), (7,), (2, 3), (1, 1), (0, 0), (2, 2, 2)):
        titles_of(rest | {name: np.ones(other)})
    titles_of(rest)


def test_a_profile_without_numbers_is_drawn_from_its_arrays():
    assert profile_figures([Run("a", profile=ProfileSummary({}, ARRAYS))])
