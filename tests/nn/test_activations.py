"""Laws of GroupSort and Scale."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableopt.nn import GroupSort, Scale
from tests.nn.catalogue import jacobian


@given(
    groups=st.integers(1, 4), size=st.integers(2, 5), tail=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99)
)
def test_each_group_holds_the_same_numbers_in_order(groups: int, size: int, tail: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups * size, *tail, generator=generator)
    y = GroupSort(size)(x)
    for g in range(groups):  # the literal twin
        part = slice(g * size, (g + 1) * size)
        torch.testing.assert_close(y[:, part], x[:, part].sort(dim=1).values, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_the_jacobian_is_a_permutation_within_groups(size: int) -> None:
    J = jacobian(GroupSort(size), torch.randn(1, 2 * size))
    torch.testing.assert_close(J @ J.T, torch.eye(2 * size), rtol=0, atol=0)
    assert not J[:size, size:].any()


def test_a_vector_is_sorted_along_its_only_dimension() -> None:
    assert GroupSort(2)(torch.tensor([2.0, 1.0, 0.0, 5.0])).tolist() == [1.0, 2.0, 0.0, 5.0]


def test_a_tie_gets_a_convex_combination_of_gradients() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    GroupSort(2)(x)[0, 0].backward()
    assert x.grad is not None
    assert (x.grad >= 0).all()
    assert float(x.grad.sum()) == 1.0


@pytest.mark.parametrize("bad", [1, 0, -2, 2.0, True, "2"])
def test_a_group_size_that_sorts_nothing_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="group_size must be an integer >= 2"):
        GroupSort(bad)  # type: ignore[arg-type]


def test_channels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by 2, got 3 in dimension 1 of shape \(1, 3\)"):
        GroupSort(2)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="0-d"):
        GroupSort(2)(torch.tensor(1.0))


def test_the_scale_factor_is_a_finite_setting() -> None:
    assert Scale(-2).factor == -2.0
    assert Scale(3.0).state_dict() == {}
    assert Scale(-2.0)(torch.tensor([1.5])).tolist() == [-3.0]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="factor must be finite"):
            Scale(bad)


@pytest.mark.parametrize("module", [GroupSort(2), GroupSort(3), Scale(0.5)])
def test_copies_compute_the_same(module: torch.nn.Module) -> None:
    x = torch.randn(3, 6, 2)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.compile(module, backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    assert str(module).startswith(type(module).__name__ + "(")
    assert module.to("meta")(x.to("meta")).shape == x.shape
