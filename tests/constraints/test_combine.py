"""Combinations do what their parts do, and refuse what has no meaning."""

from __future__ import annotations

import json

import pytest
import torch

from stableopt.constraints import (
    L1,
    ElasticNet,
    L2Ball,
    NonNegative,
    Orthogonal,
    Product,
    Scaled,
    SeparableSum,
    Sphere,
    Translated,
    Weighted,
    WithRidge,
    from_spec,
)


def test_slices_are_treated_one_by_one_along_any_dimension() -> None:
    x = torch.randn(4, 5)
    for dim, sizes in ((0, (1, 3)), (1, (2, 3)), (-1, (5, 0))):
        g = SeparableSum((L1(0.5), NonNegative()), sizes, dim)
        first, second = x.split(list(sizes), dim=dim)
        expected = torch.cat([L1(0.5).prox(first, 0.3), second.clamp_min(0.0)], dim=dim)
        assert torch.equal(g.prox(x, 0.3), expected)


def test_a_metric_is_cut_like_the_point() -> None:
    x, metric = torch.randn(5), 0.5 + torch.rand(5)
    sets = Product((L2Ball(0.5), L2Ball(0.1)), (2, 3))
    p = sets.prox(x, 1.0, metric=metric)
    assert torch.equal(p[:2], L2Ball(0.5).prox(x[:2], 1.0, metric=metric[:2]))
    assert torch.equal(p[2:], L2Ball(0.1).prox(x[2:], 1.0, metric=metric[2:]))
    assert sets.diagonal
    assert sets.convex
    assert not Product((Sphere(1.0), L2Ball(1.0)), (1, 1)).diagonal
    assert not Product((Sphere(1.0), L2Ball(1.0)), (1, 1)).convex


def test_the_violation_of_a_product_is_that_of_its_worst_part() -> None:
    sets = Product((NonNegative(), NonNegative()), (1, 2))
    assert sets.violation(torch.tensor([-1.0, -3.0, 5.0])) == 3.0
    assert sets.violation(torch.tensor([0.0, 3.0, 5.0])) == 0.0


def test_the_rules_agree_with_classes_that_have_their_own_formula() -> None:
    x = torch.randn(50) * 3
    for step in (0.1, 1.0, 4.0, torch.rand(50)):
        torch.testing.assert_close(WithRidge(L1(0.3), 0.8).prox(x, step), ElasticNet(0.3, 0.8).prox(x, step))
        torch.testing.assert_close(Weighted(L1(0.3), 2.0).prox(x, step), L1(0.6).prox(x, step))
        torch.testing.assert_close(Scaled(L1(0.3), -2.0).prox(x, step), L1(0.15).prox(x, step))
        torch.testing.assert_close(Translated(L1(0.3), 2.0).prox(x, step), L1(0.3).prox(x - 2, step) + 2)
    assert WithRidge(L1(0.3), 0.8).value(x).item() == pytest.approx(ElasticNet(0.3, 0.8).value(x).item())


def test_nested_specs_survive_json() -> None:
    g = SeparableSum((WithRidge(Translated(L1(0.3), 1.0), 0.5), L2Ball(1.0, dims=-1)), (2, 3), 1)
    assert from_spec(json.loads(json.dumps(g.spec()))) == g


@pytest.mark.parametrize("make", [lambda g: Translated(g, 1.0), lambda g: Scaled(g, 2.0), lambda g: Weighted(g, 2.0)])
def test_sets_are_not_moved_by_rules_for_penalties(make: type) -> None:
    for wrong in (L2Ball(1.0), "L1"):
        with pytest.raises(TypeError, match=r"needs a regularizer|is for penalties"):
            make(wrong)


@pytest.mark.parametrize(
    ("parts", "sizes", "dim", "error"),
    [
        ((), (), 0, TypeError),
        ((L1(1.0),), (1,), 0, TypeError),
        ((NonNegative(),), (1.0,), 0, TypeError),
        ((NonNegative(),), (True,), 0, TypeError),
        ((NonNegative(),), 3, 0, TypeError),
        ((NonNegative(),), (1, 2), 0, ValueError),
        ((NonNegative(),), (-1,), 0, ValueError),
    ],
)
def test_a_product_that_makes_no_sense_is_refused(
    parts: tuple[NonNegative, ...], sizes: tuple[int, ...], dim: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match="Product needs"):
        Product(parts, sizes, dim)


def test_a_point_that_the_sizes_do_not_fit_is_refused() -> None:
    sets = Product((NonNegative(), NonNegative()), (1, 2))
    for x in (torch.ones(4), torch.tensor(1.0)):
        for call in (sets.project, sets.violation, sets.prox):
            with pytest.raises(ValueError, match="sizes"):
                call(x)
    with pytest.raises(ValueError, match="scale other than 0"):
        Scaled(L1(1.0), 0.0)
    with pytest.raises(ValueError, match="no exact prox"):
        SeparableSum((L1(1.0), Orthogonal()), (1, 2)).prox(torch.ones(3, 2), torch.ones(3, 2))
