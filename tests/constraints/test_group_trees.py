"""Group lasso, sparse group lasso and trees of groups, against a dual ascent and the condition of optimality, both coded apart."""

from __future__ import annotations

import copy
import json
import math
import pickle
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stableopt.constraints import L1, Regularizer, from_spec
from stableopt.constraints.group_trees import GroupLasso, SparseGroup, TreeGroups
from stableopt.constraints.groups import L2
from tests.two_processes import in_two_processes

LABELS = (0, 1, 2, 0, 0, 1, 3, -1, 1, 2, 2, 2)
TREE = ((0, 1, 2, 3, 4, 5), (1, 2, 3), (3, 1), (2,), (8, 7, 9), (9, 7), (11,))


def members(labels: tuple[int, ...]) -> list[list[int]]:
    return [[i for i, label in enumerate(labels) if label == g] for g in range(max(labels) + 1)]


def dual_ascent(
    x: np.ndarray, steps: np.ndarray, groups: list[list[int]], weights: list[float], l1: np.ndarray | float = 0.0
) -> tuple[np.ndarray, float]:
    """Minimize l1 |u|_1 + sum w_g |u_g| + sum (u-x)^2 / 2s by accelerated projected gradient on the dual; also return the gap.

    u = x - s * (z + sum of xi_g), with |z_i| <= l1 and |xi_g| <= w_g.
    """
    masks = np.array([[float(i in g) for i in range(len(x))] for g in groups])
    limit = np.array(weights)[:, None]
    z, xi = np.zeros_like(x), np.zeros((len(groups), len(x)))
    rate = 1.0 / (steps * (1 + masks.sum(axis=0))).max()
    old, momentum, gap = (z, xi), 1.0, math.inf

    def clip(z: np.ndarray, xi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        norms = np.linalg.norm(xi, axis=1, keepdims=True)
        return np.clip(z, -l1, l1), masks * xi * np.minimum(1.0, limit / np.maximum(norms, 1e-300))

    for k in range(60_000):
        u = x - steps * (z + (masks * xi).sum(axis=0))
        new = clip(z + rate * u, xi + rate * masks * u)
        after = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        if sum(float(((a - b) * (a - c)).sum()) for a, b, c in zip((z, xi), new, old, strict=True)) > 0:
            momentum = after = 1.0  # restart: the step goes against the momentum
        z, xi = (n + (momentum - 1) / after * (n - o) for n, o in zip(new, old, strict=True))
        old, momentum = new, after
        if k % 50 == 0:
            total = new[0] + (masks * new[1]).sum(axis=0)
            u = x - steps * total
            primal = (l1 * np.abs(u)).sum() + (limit[:, 0] * np.linalg.norm(masks * u, axis=1)).sum()
            gap = primal - float((u * total).sum())  # (u-x)^2/2s cancels
            if gap < 1e-15:
                break
    return u, gap


def distance_to_subdifferential(
    u: Tensor, x: Tensor, steps: Tensor, groups: list[list[int]], weights: list[float]
) -> float:
    """Return how far 0 is from w_g d|u_g| + (u - x) / s for disjoint groups, entry by entry in numpy."""
    U, X, S = (t.detach().numpy().ravel() for t in (u, x, steps))
    worst, seen = 0.0, set()
    for g, w in zip(groups, weights, strict=True):
        seen |= set(g)
        slope, norm = (X[g] - U[g]) / S[g], np.linalg.norm(U[g])
        residual = np.linalg.norm(slope - w * U[g] / norm) if norm > 0 else max(np.linalg.norm(slope) - w, 0.0)
        worst = max(worst, float(residual))
    return max([worst, *(abs(float(U[i] - X[i])) for i in range(len(U)) if i not in seen)])


def roots(groups: list[list[int]] | tuple[tuple[int, ...], ...]) -> list[float]:
    return [math.sqrt(len(g)) for g in groups]


def test_each_group_is_a_vector_of_its_own() -> None:
    x, steps = 2 * torch.randn(5, 12), torch.rand(5, 12) + 0.1
    g = GroupLasso(0.3, LABELS, weights=(1.0, 0.0, 2.0, 1.5), dims=1)
    for step in (0.7, steps):
        found = g.prox(x, step)
        for indices, w in zip(members(LABELS), g.weights or (), strict=True):
            part = step if isinstance(step, float) else step[:, indices]
            alone = L2(0.3 * w, dims=1).prox(x[:, indices], part)
            torch.testing.assert_close(found[:, indices], alone, rtol=1e-14, atol=1e-16)
        assert torch.equal(found[:, 7], x[:, 7])
    value = sum(
        0.3 * w * float(x[:, i].norm(dim=1).sum()) for i, w in zip(members(LABELS), g.weights or (), strict=True)
    )
    assert float(g.value(x)) == pytest.approx(value, rel=1e-14)


def test_the_default_weights_are_the_roots_of_the_sizes() -> None:
    x = torch.randn(12)
    for cls in (lambda w: GroupLasso(0.2, LABELS, w), lambda w: SparseGroup(0.1, 0.2, LABELS, w)):
        assert torch.equal(cls(None).prox(x), cls(tuple(roots(members(LABELS)))).prox(x))
        assert torch.equal(cls(None).value(x), cls(tuple(roots(members(LABELS)))).value(x))
    assert torch.equal(GroupLasso(0.2, None).prox(x), L2(0.2 * math.sqrt(12)).prox(x))
    assert torch.equal(GroupLasso(0.2, None, (0.5,)).prox(x), L2(0.1).prox(x))
    assert torch.equal(TreeGroups(0.2, TREE).prox(x), TreeGroups(0.2, TREE, tuple(roots(TREE))).prox(x))


@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 3.0), spread=st.floats(0.0, 3.0))
def test_group_lasso_satisfies_the_condition_of_optimality(seed: int, weight: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(12, generator=generator)
    steps = 10 ** (spread * (torch.rand(12, generator=generator) - 0.5))
    g = GroupLasso(weight, LABELS)
    weights = [weight * w for w in roots(members(LABELS))]
    assert distance_to_subdifferential(g.prox(x, steps), x, steps, members(LABELS), weights) < 1e-12 * 100**spread
    same = torch.full((12,), 0.6)
    assert distance_to_subdifferential(g.prox(x, 0.6), x, same, members(LABELS), weights) < 1e-13


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sparse_group_equals_a_dual_ascent_with_one_step_and_with_several(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(12, generator=generator)
    g = SparseGroup(0.5, 0.4, LABELS)
    groups, l1 = members(LABELS), np.array([0.5 * (label >= 0) for label in LABELS])
    for steps in (torch.full((12,), 0.8), torch.rand(12, generator=generator) * 2 + 0.2):
        found = g.prox(x, steps) if steps.unique().numel() > 1 else g.prox(x, 0.8)
        wanted, gap = dual_ascent(x.numpy(), steps.numpy(), groups, [0.4 * w for w in roots(groups)], l1)
        # the objective is strongly convex: |u - u*|^2 <= 2 max(s) gap
        assert float(np.linalg.norm(found.numpy() - wanted)) < 1e-9 + math.sqrt(2 * float(steps.max()) * max(gap, 0.0))
        assert gap < 1e-13
    value = sum(0.4 * w * float(x[i].norm()) for i, w in zip(groups, roots(groups), strict=True))
    assert float(g.value(x)) == pytest.approx(value + float((torch.tensor(l1) * x.abs()).sum()), rel=1e-14)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tree_equals_a_dual_ascent(seed: int) -> None:
    x = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    weights = [0.3, 0.5, 0.7, 0.2, 0.6, 0.4, 0.9]
    g = TreeGroups(0.9, TREE, tuple(weights))
    groups = [list(t) for t in TREE]
    for step in (0.3, 1.0, 1.7):
        wanted, gap = dual_ascent(x.numpy(), np.full(12, step), groups, [0.9 * w for w in weights])
        assert gap < 1e-13
        found = g.prox(x, step).numpy()
        assert float(np.linalg.norm(found - wanted)) < 1e-9 + math.sqrt(2 * step * max(gap, 0.0))
    value = sum(0.9 * w * float(x[list(t)].norm()) for t, w in zip(TREE, weights, strict=True))
    assert float(g.value(x)) == pytest.approx(value, rel=1e-14)


def test_the_composition_would_be_wrong_in_a_diagonal_metric_and_is_refused() -> None:
    x, steps = np.array([3.0, 2.0, 1.0]), np.array([0.1, 1.0, 3.0])
    wanted, gap = dual_ascent(x, steps, [[0, 1], [0, 1, 2]], [0.5, 0.5])
    assert gap < 1e-13
    inner = L2(0.5).prox(torch.tensor(x[:2]), torch.tensor(steps[:2]))
    composed = L2(0.5).prox(torch.cat([inner, torch.tensor(x[2:])]), torch.tensor(steps))
    assert float(np.abs(composed.numpy() - wanted).max()) > 1e-3
    g = TreeGroups(0.5, ((0, 1), (0, 1, 2)), (1.0, 1.0))
    assert not g.diagonal
    with pytest.raises(ValueError, match="no exact prox in a diagonal metric"):
        g.prox(torch.tensor(x), torch.tensor(steps))
    with pytest.raises(ValueError, match="no exact prox in a diagonal metric"):
        g.prox(torch.tensor(x), metric=torch.tensor(steps))


def test_known_norms_are_special_trees() -> None:
    x = 2 * torch.randn(3, 4)
    singles = tuple((i,) for i in range(4))
    cases = [
        (TreeGroups(0.7, singles, dims=1), L1(0.7)),
        (TreeGroups(0.7, ((0, 1, 2, 3),), (1.0,), dims=1), L2(0.7, dims=1)),
        (TreeGroups(0.7, ((3, 0), (1,), (2,)), dims=1), GroupLasso(0.7, (0, 1, 2, 0), dims=1)),
        (TreeGroups(1.0, (*singles, (0, 2), (1, 3)), (0.3,) * 4 + (0.5, 0.6), dims=1),
         SparseGroup(0.3, 1.0, (0, 1, 0, 1), (0.5, 0.6), dims=1)),
        (TreeGroups(0.7, ((0, 1), (1, 0)), (1.0, 2.0), dims=1), TreeGroups(0.7, ((0, 1),), (3.0,), dims=1)),
        (SparseGroup(0.0, 0.4, (0, 1, 0, 1), dims=1), GroupLasso(0.4, (0, 1, 0, 1), dims=1)),
        (SparseGroup(0.4, 0.0, (0, 1, 0, 1), dims=1), L1(0.4)),
    ]  # fmt: skip
    for one, other in cases:
        torch.testing.assert_close(one.prox(x, 0.6), other.prox(x, 0.6), rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(one.value(x), other.value(x), rtol=1e-13, atol=0)
        if one.diagonal:
            steps = torch.rand(3, 4)
            torch.testing.assert_close(one.prox(x, steps), other.prox(x, steps), rtol=1e-12, atol=1e-15)


def test_the_order_of_the_groups_does_not_matter() -> None:
    x, weights = torch.randn(12), (0.3, 0.5, 0.7, 0.2, 0.6, 0.4, 0.9)
    forwards, backwards = TreeGroups(0.5, TREE, weights), TreeGroups(0.5, TREE[::-1], weights[::-1])
    torch.testing.assert_close(forwards.prox(x), backwards.prox(x), rtol=1e-15, atol=0)
    shuffled = torch.tensor([5, 2, 0, 1])
    labels = tuple(int(shuffled[label]) if label >= 0 else -1 for label in (0, 1, 3, 2, -1, 0))
    assert labels == (5, 2, 1, 0, -1, 5)
    with pytest.raises(ValueError, match="without gaps"):
        GroupLasso(1.0, labels)


EVERY: list[Regularizer] = [GroupLasso(0.3, LABELS), SparseGroup(0.2, 0.3, LABELS), TreeGroups(0.3, TREE)]
every = pytest.mark.parametrize("g", EVERY, ids=lambda g: type(g).__name__)


@every
def test_a_child_appears_only_with_its_group(g: Regularizer) -> None:
    groups = TREE if isinstance(g, TreeGroups) else members(LABELS)
    for seed in range(20):
        u = g.prox(torch.randn(12, generator=torch.Generator().manual_seed(seed)), 1.0)
        for group in groups:
            part = u[list(group)]
            whole = set(range(12)) - {i for h in groups if not set(h) <= set(group) for i in h if i in group}
            assert whole
            if isinstance(g, GroupLasso):
                assert bool((part == 0).all()) or bool((part != 0).all())


@every
def test_nan_stays_in_its_group_and_infinity_in_its_place(g: Regularizer) -> None:
    x = torch.full((12,), 2.0)
    x[7] = math.nan  # no group of the labels, two nested groups of the tree
    u = g.prox(x)
    touched = [7, 8, 9] if isinstance(g, TreeGroups) else [7]
    assert u.isnan().nonzero().flatten().tolist() == touched
    x[7], x[2] = 2.0, math.nan
    expected = [0, 1, 2, 3, 4, 5] if isinstance(g, TreeGroups) else [2, 9, 10, 11]
    assert g.prox(x).isnan().nonzero().flatten().tolist() == expected
    if g.diagonal:
        assert g.prox(x, torch.ones(12)).isnan().nonzero().flatten().tolist() == expected
    x[2] = math.inf
    assert float(g.prox(x)[2]) == math.inf


@every
@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_groups_of_very_different_sizes(g: Regularizer, scale: float) -> None:
    x = torch.randn(12)
    torch.testing.assert_close(g.prox(scale * x, scale), scale * g.prox(x), rtol=1e-12, atol=1e-14 * scale)
    uneven = x.clone()
    uneven[[0, 3, 4]] *= scale  # one group of the labels
    if not isinstance(g, TreeGroups):
        torch.testing.assert_close(g.prox(uneven)[[1, 5, 8]], g.prox(x)[[1, 5, 8]], rtol=1e-15, atol=0)
        steps = torch.rand(12)
        torch.testing.assert_close(g.prox(uneven, steps)[[1, 5, 8]], g.prox(x, steps)[[1, 5, 8]], rtol=1e-15, atol=0)
    leaf = (scale * x).requires_grad_()
    assert torch.autograd.grad(g.prox(leaf, scale).sum(), leaf)[0].isfinite().all()
    assert g.prox(torch.full((12,), 1.7e308)).isfinite().all()


@every
def test_derivatives_equal_finite_differences(g: Regularizer) -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(2)).mul(1.5).requires_grad_()
    assert torch.autograd.gradcheck(g.value, (x,))
    assert torch.autograd.gradcheck(g.prox, (x, torch.tensor(0.6, requires_grad=True)))
    z = torch.randn(12, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(g.value, (z,))
    assert torch.autograd.gradcheck(lambda t: g.prox(t, 0.6), (z,))
    if g.diagonal:
        steps = (torch.rand(12) + 0.1).requires_grad_()
        assert torch.autograd.gradcheck(g.prox, (x, steps))
        assert torch.autograd.gradcheck(lambda t, p: g.prox(t, 0.5, p), (x, steps))
        assert torch.autograd.gradcheck(lambda t: g.prox(t, steps.detach()), (z,))


@every
def test_derivatives_at_zero_are_zero(g: Regularizer) -> None:
    for point in (torch.zeros(12), torch.zeros(12, dtype=torch.complex128)):
        leaf = point.requires_grad_()
        for output in (g.prox(leaf, 0.5).real.sum(), g.value(leaf)):
            (grad,) = torch.autograd.grad(output, leaf)
            free = [7] if not isinstance(g, TreeGroups) else [6, 10]
            grad[free] = 0.0
            assert torch.equal(grad, torch.zeros_like(grad))


def test_an_overflowing_threshold_leaves_zero_and_a_derivative_of_zero() -> None:
    for dtype in (torch.float64, torch.complex128):
        leaf = torch.ones(12, dtype=dtype, requires_grad=True)
        for g in (
            SparseGroup(1e300, 1.0),
            SparseGroup(1.0, 1e300),
            GroupLasso(1e300, None),
            TreeGroups(1e300, (tuple(range(12)),)),
        ):
            found = g.prox(leaf, 1e300)
            assert torch.equal(found, torch.zeros(12, dtype=dtype))
            assert torch.equal(torch.autograd.grad(found.real.sum(), leaf)[0], torch.zeros(12, dtype=dtype))


@every
def test_complex_numbers_shrink_by_their_moduli(g: Regularizer) -> None:
    x = torch.randn(12)
    phase = torch.exp(1j * torch.randn(12))
    for step in (0.5, torch.rand(12)) if g.diagonal else (0.5,):
        torch.testing.assert_close(g.prox(x * phase, step), g.prox(x, step) * phase, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g.value(x * phase), g.value(x), rtol=1e-14, atol=0)
    assert g.prox((x * phase).to(torch.complex64)).dtype == torch.complex64


@every
def test_labels_run_along_dims_in_their_order(g: Regularizer) -> None:
    x = torch.randn(3, 5, 4)
    flat = x.permute(1, 2, 0).reshape(5, 12)  # vectors along dims (2, 0)
    arguments = {name: value for name, value in g.spec().items() if name not in {"name", "dims"}}
    twin = from_spec({"name": type(g).__name__, **arguments, "dims": (2, 0)})
    rows = from_spec({"name": type(g).__name__, **arguments, "dims": -1})
    torch.testing.assert_close(twin.prox(x, 0.7).permute(1, 2, 0).reshape(5, 12), rows.prox(flat, 0.7), rtol=0, atol=0)
    torch.testing.assert_close(rows.prox(flat, 0.7), torch.stack([g.prox(f, 0.7) for f in flat]), rtol=1e-15, atol=0)
    torch.testing.assert_close(twin.value(x), rows.value(flat), rtol=1e-14, atol=0)
    assert rows.prox(torch.zeros(0, 12)).shape == (0, 12)
    assert float(rows.value(torch.zeros(0, 12))) == 0.0


@every
def test_the_input_stays_as_it_is_and_tables_stay_out_of_copies(g: Regularizer) -> None:
    x = torch.randn(12)
    before = x.clone()
    fresh = copy.deepcopy(g)
    with torch.inference_mode():
        fresh.prox(x)
    leaf = x.clone().requires_grad_()
    (fresh.prox(leaf).sum() + fresh.value(leaf)).backward()  # tables made in inference mode would fail here
    assert torch.equal(fresh.prox(x), g.prox(x))
    assert torch.equal(x, before)
    for twin in (copy.deepcopy(g), pickle.loads(pickle.dumps(g)), from_spec(json.loads(json.dumps(g.spec())))):
        assert twin == g
        assert hash(twin) == hash(g)
        assert set(vars(twin)) == set(g.spec()) - {"name"}
        assert torch.equal(twin.prox(x), g.prox(x))


@every
def test_vectors_of_another_length_are_refused(g: Regularizer) -> None:
    for call in (g.prox, g.value):
        with pytest.raises(ValueError, match=r"vectors of \d+ entries"):
            call(torch.ones(11))
    if isinstance(g, TreeGroups):
        assert g.prox(torch.ones(13))[12] == 1.0
    else:
        with pytest.raises(ValueError, match="12 group labels"):
            g.prox(torch.ones(13))


def test_vmap_over_groups() -> None:
    batch = torch.randn(4, 12)
    for g in EVERY:
        torch.testing.assert_close(torch.func.vmap(g.prox)(batch), torch.stack([g.prox(b) for b in batch]))


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (ValueError, "weight", lambda: GroupLasso(-1.0, (0,))),
        (ValueError, "without gaps", lambda: GroupLasso(1.0, (0, 2))),
        (ValueError, "without gaps", lambda: GroupLasso(1.0, (0, -2))),
        (ValueError, "without gaps", lambda: GroupLasso(1.0, ())),
        (ValueError, "without gaps", lambda: GroupLasso(1.0, (-1, -1))),
        (TypeError, "one int per entry", lambda: GroupLasso(1.0, (0, 1.0))),
        (TypeError, "one int per entry", lambda: GroupLasso(1.0, (0, True))),
        (TypeError, "one int per entry", lambda: GroupLasso(1.0, 3)),
        (ValueError, "that is 2, got 1", lambda: GroupLasso(1.0, (0, 1), (1.0,))),
        (ValueError, "that is 1, got 2", lambda: GroupLasso(1.0, None, (1.0, 2.0))),
        (ValueError, "weights", lambda: GroupLasso(1.0, (0, 1), (1.0, -1.0))),
        (TypeError, "dims", lambda: GroupLasso(1.0, (0, 1), dims="1")),
        (ValueError, "l1", lambda: SparseGroup(math.nan, 1.0)),
        (TypeError, "l2", lambda: SparseGroup(1.0, None)),
        (ValueError, "nested or disjoint", lambda: TreeGroups(1.0, ((0, 1), (1, 2)))),
        (ValueError, "share 1 entries", lambda: TreeGroups(1.0, ((0, 1, 2), (3,), (2, 3, 4)))),
        (ValueError, "nested or disjoint", lambda: TreeGroups(1.0, ((0, 1, 2, 3), (0, 1), (1, 2, 3)))),
        (ValueError, "distinct indices", lambda: TreeGroups(1.0, ((0, 0),))),
        (ValueError, "distinct indices", lambda: TreeGroups(1.0, ((0, -1),))),
        (ValueError, "at least one in each", lambda: TreeGroups(1.0, ((0,), ()))),
        (ValueError, "at least one group", lambda: TreeGroups(1.0, ())),
        (TypeError, "tuple of tuples", lambda: TreeGroups(1.0, (0, 1))),
        (TypeError, "tuple of tuples", lambda: TreeGroups(1.0, ((0, 1.0),))),
        (ValueError, "that is 1, got 2", lambda: TreeGroups(1.0, ((0, 1),), (1.0, 2.0))),
        (ValueError, "weight", lambda: TreeGroups(math.inf, ((0, 1),))),
    ],
)
def test_bad_arguments_are_refused(error: type[Exception], message: str, build: object) -> None:
    with pytest.raises(error, match=message):
        build()  # type: ignore[operator]


@given(seed=st.integers(0, 10**6))
def test_random_trees_are_accepted_and_random_overlaps_refused(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups: list[tuple[int, ...]] = []

    def split(entries: np.ndarray) -> None:
        groups.append(tuple(entries.tolist()))
        if len(entries) > 1:
            for part in np.split(entries, [int(generator.integers(1, len(entries)))]):
                if generator.random() < 0.7:
                    split(part)

    split(generator.permutation(10))
    order = generator.permutation(len(groups))
    g = TreeGroups(0.2, tuple(groups[i] for i in order))
    x = torch.tensor(generator.standard_normal(10))
    u = g.prox(x, 0.5)
    best = float(g.value(u)) + float((u - x).square().sum())
    for size in (1e-4, 1e-2, 1.0):
        other = u + size * torch.tensor(generator.standard_normal(10))
        assert (
            float(g.value(other)) + float((other - x).square().sum())
            >= best + float((other - u).square().sum()) - 1e-12
        )
    nested = all(set(a) <= set(b) or set(b) <= set(a) or not set(a) & set(b) for a in groups for b in groups)
    assert nested
    random = tuple(tuple(generator.choice(10, 3, replace=False).tolist()) for _ in range(3))
    if all(set(a) <= set(b) or set(b) <= set(a) or not set(a) & set(b) for a in random for b in random):
        TreeGroups(1.0, random)
    else:
        with pytest.raises(ValueError, match="nested or disjoint"):
            TreeGroups(1.0, random)


SHARDED = """
    import sys
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from stableopt.constraints.group_trees import GroupLasso, SparseGroup, TreeGroups
    from stableopt.constraints.groups import L2
    from tests.two_processes import join, leave

    torch.set_default_dtype(torch.float64)
    join(*sys.argv[1:])
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    labels, tree = (0, 1, 2, 0, 0, 1, 3, -1, 1, 2), ((0, 1, 2, 3, 4), (1, 3), (9, 7, 8), (7,), (6,))

    def check(g, x, step, shard):
        with torch.no_grad():
            d = distribute_tensor(x, mesh, [Shard(shard)])
            s = distribute_tensor(step, mesh, [Shard(shard)]) if isinstance(step, torch.Tensor) and step.numel() > 1 else step
            torch.testing.assert_close(g.prox(d, s).full_tensor(), g.prox(x, step), rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(g.prox(d, step).full_tensor(), g.prox(x, step), rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(g.value(d), g.value(x), rtol=1e-14, atol=0)

    for shape, dims in (((10,), None), ((5, 2), None), ((3, 10), 1), ((10, 3), 0), ((2, 3, 5), (0, 2)), ((5, 3, 2), (2, 0))):
        x, steps = torch.randn(shape), torch.rand(shape)
        for g in (L2(1.5, dims), GroupLasso(0.3, labels, dims=dims), SparseGroup(0.1, 0.3, labels, dims=dims),
                  SparseGroup(0.1, 0.3, dims=dims), TreeGroups(0.3, tree, dims=dims)):
            for step in (0.5, torch.tensor([0.7]), steps) if g.diagonal else (0.5,):
                for shard in range(len(shape)):
                    check(g, x, step, shard)
    for n in (1, 2, 3):
        for step in (0.5, torch.full((n,), 0.5), torch.rand(n)):
            check(L2(0.4), torch.randn(n), step, 0)
            check(GroupLasso(0.4, (0,) * n), torch.randn(n), step, 0)
            check(L2(0.4, dims=0), torch.randn(n, 1), step[:, None] if isinstance(step, torch.Tensor) else step, 1)
    leave()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_as_one(tmp_path: Path) -> None:
    in_two_processes(textwrap.dedent(SHARDED), tmp_path)
