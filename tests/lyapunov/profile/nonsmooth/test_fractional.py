"""The fractional form against its closed formula, and its bounds against all vertices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stableopt.lyapunov.profile.nonsmooth import fractional
from stableopt.lyapunov.profile.nonsmooth.fractional import Block, Fractional


def relu(unit: int) -> Block:
    return Block((unit,), np.array([[[0.0]], [[1.0]]]), np.array([[0.0]]))


def form(layers: tuple[int, ...], seed: int = 0, m: int = 3, n: int = 4, scale: float = 1.0) -> Fractional:
    """A random form with so many undecided units in each layer; its numbers are exact, so the error is that of the sums."""
    draw, units = np.random.default_rng(seed), sum(layers)
    G, start = np.zeros((units, units)), 0
    for size in layers:
        G[start : start + size, :start] = draw.normal(size=(size, start))
        start += size
    parts = [scale * draw.normal(size=s) for s in ((m, n), (m, units))]
    return Fractional(
        parts[0], parts[1], G, draw.normal(size=(units, n)), tuple(map(relu, range(units))), len(layers), 1e-12 * scale
    )


def by_hand(f: Fractional, choice: tuple[int, ...]) -> np.ndarray:
    delta = np.diag([block.moves[c].item() for block, c in zip(f.blocks, choice, strict=True)])
    return f.C + f.S @ delta @ np.linalg.inv(np.eye(len(f.G)) - f.G @ delta) @ f.P


def norms(f: Fractional) -> list[float]:
    choices = itertools.product((0, 1), repeat=len(f.blocks))
    return [float(np.linalg.norm(by_hand(f, choice), 2)) for choice in choices]


@pytest.mark.parametrize("layers", [(), (3,), (2, 3), (1, 2, 1, 2)])
def test_the_series_is_the_inverse_and_the_exact_norm_that_of_the_worst_vertex(layers: tuple[int, ...]) -> None:
    f = form(layers)
    largest = max(norms(f))
    assert largest in f.exact()
    assert f.exact().width < 1e-11
    for bound in (f.interval(), f.entrywise(), *(f.branched(2**k) for k in range(7))):
        assert bound >= largest


def test_a_depth_that_is_too_small_is_not_the_inverse() -> None:
    f = form((2, 2, 2))
    short = Fractional(f.C, f.S, f.G, f.P, f.blocks, 2, f.error)
    assert abs(short.exact().upper - f.exact().upper) > 1e-3


@pytest.mark.parametrize("layers", [(4,), (3, 3), (2, 2, 2)])
def test_choosing_more_units_goes_from_the_interval_to_the_exact_norm(layers: tuple[int, ...]) -> None:
    for seed in range(5):
        f = form(layers, seed)
        bounds = [f.branched(2**k) for k in range(len(f.blocks) + 1)]
        assert bounds[0] == pytest.approx(f.interval(), rel=1e-9)
        assert bounds[-1] == pytest.approx(max(norms(f)), rel=1e-9)
        assert bounds[-1] < 0.9 * bounds[0]


def test_what_is_not_chosen_has_its_exact_radius_at_each_choice_of_the_rest() -> None:
    """One unit in each of two layers: with the first at a choice, the second alone attains its radius."""
    for first, order in (((10.0, 1.0), (0, 1)), ((1.0, 10.0), (1, 0))):
        f = form((1, 1))
        f = Fractional(f.C, f.S * np.array(first), f.G, f.P, f.blocks, 2, f.error)
        assert f._most(2) == {order[0]}
        expected = 0.0
        for c in (0, 1):
            ends = []
            for other in (0, 1):
                choice = (c, other) if order[0] == 0 else (other, c)
                ends.append(by_hand(f, choice))
            middle, radius = (ends[0] + ends[1]) / 2, np.abs(ends[1] - ends[0]) / 2
            expected = max(expected, float(np.linalg.norm(middle, 2) + np.linalg.norm(radius, 2)))
        assert f.branched(2) == pytest.approx(expected, rel=1e-10)


def test_the_largest_sum_of_a_batch_of_norms_is_bounded() -> None:
    draw = np.random.default_rng(0)
    for scales in ((1.0, 1.0, 1.0), (0.0, 1.0, 1e-170), (1e-3, 0.0, 1e3), (0.0, 0.0, 0.0)):
        J, R = draw.normal(size=(3, 2, 4)), np.abs(draw.normal(size=(3, 2, 4)))
        for a, b in ((np.ones(3), np.array(scales)), (np.array(scales), np.ones(3)), (np.zeros(3), np.array(scales))):
            A, B = a[:, None, None] * J, b[:, None, None] * R
            largest = max(np.linalg.norm(x, 2) + np.linalg.norm(y, 2) for x, y in zip(A, B, strict=True))
            bound = fractional._sums_upper(A, B)
            assert largest * (1 - 1e-14) <= bound <= largest * (1 + 1e-9)


def test_vertices_may_come_in_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    f = form((2, 2))
    exact, some, found = f.exact(), f.branched(4), f.search(8, 0)
    monkeypatch.setattr(fractional, "_ENTRIES", 1)
    for choice in itertools.product((0, 1), repeat=4):  # the worst one may be in any batch
        moved = tuple(
            Block(b.units, b.options[::-1] if c else b.options, b.chosen) for b, c in zip(f.blocks, choice, strict=True)
        )
        g = Fractional(f.C, f.S, f.G, f.P, moved, f.depth, f.error)
        assert g.exact().upper == pytest.approx(exact.upper, rel=1e-12)
        assert g.exact().lower == pytest.approx(exact.lower, rel=1e-12)
        assert g.branched(4) == pytest.approx(some, rel=1e-10)
    assert f.search(8, 0).lower == pytest.approx(found.lower, rel=1e-12)


def test_the_middle_and_the_radius_enclose_every_entry() -> None:
    f = form((3, 3))
    R = f.radius()
    attained = np.zeros_like(R)
    for choice in itertools.product((0, 1), repeat=6):
        off = np.abs(by_hand(f, choice) - f.C)
        assert (off <= R + 1e-12).all()
        attained = np.maximum(attained, off)
    single = form((1,))
    assert np.abs(np.abs(by_hand(single, (1,)) - single.C) - single.radius()).max() < 1e-12  # one unit attains it


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_norms_scale(scale: float) -> None:
    f, g = form((2, 2), scale=scale), form((2, 2))
    for part in ("interval", "entrywise"):
        assert getattr(f, part)() == pytest.approx(scale * getattr(g, part)(), rel=1e-9)
    assert f.exact().upper == pytest.approx(scale * g.exact().upper, rel=1e-9)
    assert f.branched(4) == pytest.approx(scale * g.branched(4), rel=1e-9)
    assert f.search(8, 0).lower == pytest.approx(scale * g.search(8, 0).lower, rel=1e-9)


def test_a_search_finds_a_vertex_that_no_single_change_improves() -> None:
    for seed in range(5):
        f = form((3, 3), seed)
        found, every = f.search(1, seed), norms(f)
        assert found.upper <= max(every) * (1 + 1e-11)
        at = min(range(64), key=lambda k: abs(every[k] - found.upper))
        assert every[at] == pytest.approx(found.upper, rel=1e-11)
        assert all(every[at ^ (1 << bit)] <= every[at] * (1 + 1e-12) for bit in range(6))


def test_the_error_widens_all_bounds_and_without_one_nothing_is_proved() -> None:
    f = form((2, 2))
    wide = Fractional(f.C, f.S, f.G, f.P, f.blocks, f.depth, 0.1)
    assert wide.exact().upper == pytest.approx(f.exact().upper + 0.1, rel=1e-9)
    assert wide.exact().lower == pytest.approx(f.exact().lower - 0.1, rel=1e-9)
    assert wide.interval() >= f.interval() + 0.1
    none = Fractional(f.C, f.S, f.G, f.P, f.blocks, f.depth, math.inf)
    assert not none.exact().proved
    assert not none.chosen().proved
    assert not none.search(4, 0).proved
    assert math.isfinite(none.interval())


def test_blocks_of_a_group_move_together() -> None:
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    block = Block((0, 1), np.stack([np.eye(2), swap]), np.full((2, 2), 0.5))
    W, V = np.array([[2.0, -1.0], [0.5, 3.0]]), np.array([[1.0, 4.0]])
    f = Fractional(V @ block.reference @ W, V, np.zeros((2, 2)), W, (block,), 1, 1e-13)
    expected = max(np.linalg.norm(V @ D @ W, 2) for D in (np.eye(2), swap))
    assert expected in f.exact()
    assert np.linalg.norm(V @ block.chosen @ W, 2) in f.chosen()
