"""The tables of a profile hold its numbers, and nothing that it does not have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stableopt.report.profile_tables import profile_tables
from stableopt.report.profiles import ProfileSummary
from tests.report.profiled import exponent_entry, numbers, system

ARRAYS = system()
WHOLE = ProfileSummary(numbers(), ARRAYS)


def table(profile, caption):
    return next(found for found in profile_tables(profile) if found.caption.startswith(caption))


def test_a_whole_profile_has_all_tables():
    captions = [found.caption.split(":")[0].split(" ")[0] for found in profile_tables(WHOLE)]
    assert captions == [
        "Exponents",
        "Transient",
        "Lyapunov",
        "Small",
        "The",
        "Growth",
        "Forward",
        "Forward",
        "How",
    ]
    for found in profile_tables(WHOLE):
        assert all(len(row) == len(found.columns) for row in found.rows), found.caption


def test_exponents_stand_with_interval_and_effective_samples():
    rows = table(WHOLE, "Exponents").rows
    assert [row[1] for row in rows] == ["-0.02", "-0.03", "-0.04", "-0.05"]
    assert rows[0] == (
        "1",
        "-0.02",
        "-0.024 … -0.016",
        "95 %",
        "87.25",
        "180",
        "20",
        "almost sure",
        "halves in 34.7 steps",
    )
    refused = ProfileSummary(numbers(exponents=[exponent_entry(0.1, lower=None, upper=None, reason="few")]))
    assert table(refused, "Exponents").rows[0][2] == "refused"
    assert table(refused, "Exponents").rows[0][-1] == "—"  # a time would be read as if the exponent were known
    for half in ({"lower": None}, {"upper": None}):
        assert table(ProfileSummary(numbers(exponents=[exponent_entry(0.1, **half)])), "Exponents").rows[0][-1] != "—"


def test_an_annihilated_perturbation_is_not_unknown():
    gone = exponent_entry(0.0, reason="annihilated at step 3") | dict.fromkeys(("value", "lower", "upper"), "-inf")
    row = table(ProfileSummary(numbers(exponents=[gone])), "Exponents").rows[0]
    assert row[1:3] == ("-inf", "-inf … -inf")
    assert row[-1] == "vanishes within the run"


def test_the_peak_and_the_largest_window_are_those_of_the_arrays():
    rows = {row[0]: row[1:] for row in table(WHOLE, "Transient").rows}
    path = ARRAYS["path"]
    assert rows["largest growth from the first step"] == (f"{math.exp(path.max()):.4g}", f"at step {path.argmax()}")
    assert rows["growth from the first to the last step"] == (f"{math.exp(path[-1]):.4g}", "at step 200")
    assert "largest growth of all windows" in rows
    assert rows["largest response to an error of one update"] == ("1.221", "of 3 errors")
    assert rows["parameters per unit of lr"] == ("200", "at the last step")


def test_energy_gains_and_determinant_are_in_words():
    energy = dict(table(WHOLE, "Lyapunov").rows)
    assert energy["largest eigenvalue M of all P"] == "60"
    assert energy["the bound holds on every window of the grid, and on the largest of all"] == "yes"
    assert energy["rate ρ of C ρ^(t − s): the largest of √V per step"] == "0.99"
    assert energy["constant C of C ρ^(t − s), for all windows"] == "8.5"
    gains = dict(table(WHOLE, "Small").rows)
    assert gains["weights of the joint norm"] == "1, 0.3"
    assert table(WHOLE, "Growth").rows == (("sum of all exponents, measured", "-21.0721031316"),)
    assert dict(table(WHOLE, "Lyapunov").rows)["bound over measured growth, largest"] == "9.3"
    unknown = ProfileSummary(numbers(gains={"a": 2.0, "weights": [None, None], "new_key": 1.5}))
    assert table(unknown, "Small").rows == (("representations to representations, a", "2"), ("new key", "1.5"))
    part = ProfileSummary(numbers(full=False, determinant={"measured": -1.0}))
    assert table(part, "Growth").rows == (("sum of the exponents that were followed, measured", "-1"),)


def test_the_finite_size_exponent_stands_beside_the_infinitesimal_one():
    found = {"size": 0.001, "exponent": exponent_entry(0.05), "kinks": ["relu"], "stopped": "both runs met"}
    both = table(ProfileSummary(numbers(finite_size=found)), "The exponent of a perturbation")
    assert both.rows[0] == ("perturbation of finite size", "0.001", "0.05", "0.046 … 0.054")
    assert both.rows[1] == ("infinitesimal perturbation", "0", "-0.02", "-0.024 … -0.016")
    assert both.caption.endswith("The former feels kinks of relu. It ended early: both runs met.")


def test_the_forward_block_is_whole_if_small_and_else_layer_by_layer():
    small = table(WHOLE, "Forward")
    assert small.columns == ("of", "input", "0", "1", "2", "3", "4")
    assert tuple(row[1] for row in small.rows) == tuple(f"{math.exp(v):.3g}" for v in ARRAYS["forward/0"][:, 0])
    assert small.rows[2][3:] == ("1", "—", "—", "—")
    logs = np.tril(0.1 * (np.arange(21)[:, None] - np.arange(21)[None, :]))
    logs[20, 3] = 2000.0
    rows = [row | {"names": []} for row in numbers()["forward"]]
    deep = ProfileSummary(numbers(forward=rows), {"forward/0": logs, "forward/1": logs})
    rows = table(deep, "Forward").rows
    assert len(rows) == 21
    assert rows[20] == ("h20", "7.39", "1.11", "1")
    assert rows[3] == ("h3", "1.35", "1.11", "3.88e868")


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], [[]], {"a": [1]}])
def test_any_content_makes_tables(value):
    content = dict.fromkeys(numbers(), value) | {"schema": 1}
    for profile in (ProfileSummary(content, ARRAYS), ProfileSummary({"schema": 1}), ProfileSummary(content)):
        for found in profile_tables(profile):
            assert all(isinstance(cell, str) for row in found.rows for cell in row)
    for key in numbers():
        profile_tables(ProfileSummary(numbers() | {key: value}, ARRAYS))
    for key in ("step", "how", "table_key", "names"):
        rows = [row | {key: value} for row in numbers()["forward"]]
        profile_tables(ProfileSummary(numbers(forward=rows), ARRAYS))


def test_what_the_search_may_have_missed_is_said():
    rows = {row[0]: row[1:] for row in table(WHOLE, "Transient").rows}
    assert rows["largest growth of all windows"] == ("2.46", "from step 10 to 17")
    assert "no window grows by more than" not in rows
    window = numbers()["largest_window"] | {"at_most": 1.5}
    rows = {row[0]: row[1:] for row in table(ProfileSummary(numbers(largest_window=window)), "Transient").rows}
    assert rows["no window grows by more than"] == ("4.482", "not all were looked at")
