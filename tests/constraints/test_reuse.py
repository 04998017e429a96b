"""What carries over from step to step: never a wrong proof, never another result."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn

from stableopt.constraints import L2Ball
from stableopt.constraints import reuse as module
from stableopt.constraints.reuse import ProvedReference, forget, project_tracked
from stableopt.constraints.spectral import SpectralBall
from tests.constraints.oracle import entries, same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def norm(W: Tensor) -> float:
    return float(torch.linalg.matrix_norm(W.double(), 2))


def decaying(n: int = 80, m: int = 90) -> Tensor:
    """Norm 1, then a gap: 16 columns leave a small rest."""
    U, _, Vh = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    sigma = torch.linspace(0.6, 0.0, n)
    sigma[:5] = torch.tensor([1.0, 0.97, 0.93, 0.9, 0.8])
    return (U * sigma) @ Vh


@each_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_distance_is_never_too_small_and_hardly_too_large(scale: float, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 5), (40, 7), (2, 300)):
        x = (scale * torch.randn(shape)).to(dtype)
        y = (x.double() + 0.01 * scale * torch.randn(shape)).to(dtype)
        exact = sum((a - b) ** 2 for a, b in zip(entries(x), entries(y), strict=True))
        found = module._distance_upper(x, y)
        assert found * found * (1 + 2.0**-50) >= exact
        assert found <= math.sqrt(exact) * (1 + 1e-3) + 1e-15
    assert module._distance_upper(x, x) < 1e-15


def test_distances_that_round_away_are_counted() -> None:
    """A difference of float32 numbers is rounded, and squares of small ones underflow."""
    generator = torch.Generator().manual_seed(1)
    for spread in (1e-30, 1e-22, 1e-7, 1.0, 1e15):
        for _ in range(20):
            x = torch.randn(2, 3, generator=generator, dtype=torch.float32)
            y = spread * torch.randn(2, 3, generator=generator, dtype=torch.float32)
            exact = sum((a - b) ** 2 for a, b in zip(entries(x), entries(y), strict=True))
            assert module._distance_upper(x, y) ** 2 * (1 + 1e-15) >= exact
            tiny = sum((a - b) ** 2 for a, b in zip(entries(y), entries(2 * y), strict=True))
            assert module._distance_upper(y, 2 * y) ** 2 * (1 + 1e-15) >= tiny


def test_what_is_not_finite_is_not_proved() -> None:
    reference = ProvedReference()
    W = 0.5 * torch.eye(70)
    reference.renew(W, 1.0)
    for bad in (math.nan, math.inf, -math.inf, 1e308):
        x = W.clone()
        x[0, 1] = bad
        assert not reference.proves(x, 1.0)
    assert reference.proves(W, 1.0)


def test_a_reference_proves_only_its_own_kind() -> None:
    reference = ProvedReference()
    W = 0.5 * torch.eye(70)
    assert not reference.proves(W, 1.0)
    assert reference.due()
    reference.renew(W, 1.0)
    assert not reference.due()
    assert not reference.proves(W.float(), 1.0)
    assert not reference.proves(W[:, :69], 1.0)
    assert reference.proves(W.mT, 1.0)
    assert not reference.renew(2.0 * W, 0.5)  # infeasible: not kept
    assert not reference.renew(torch.full((70, 70), math.nan), 0.5)
    assert not reference.proves(0.0 * W, 0.5)


@pytest.mark.parametrize("shape", [(80, 90), (90, 80), (6, 5), (1, 1)])
def test_a_proof_from_a_reference_is_true_and_leaves_the_margin(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    start = start / norm(start)
    said = 0
    for near in (0.3, 0.9, 0.99, 0.9999, 1.0 - 3e-7):
        for size in (1e-9, 1e-6, 1e-4, 1e-2, 0.3):
            reference = ProvedReference()
            assert reference.renew(near * start, 1.0) == (near < 1.0 - 1e-6)
            x = near * start
            for _ in range(4):
                x = x + size * start * (1 if size < 1e-3 else -1) + size * torch.randn(shape, generator=generator) / 20
                proved = reference.proves(x, 1.0)
                said += proved
                assert not proved or norm(x) <= 1.0 - 0.99e-6
                assert not proved or norm(x) <= reference.norm + module._distance_upper(x, reference._near) + 1e-13
    assert said >= 15


def test_the_subspace_proves_what_the_norm_alone_cannot() -> None:
    W = 0.9995 * decaying()
    reference = ProvedReference()
    reference.renew(W, 1.0)
    assert reference.rest < 0.95
    assert 0.9995 <= reference.norm < 0.9995 + 1e-3
    for _ in range(6):
        W = W + 3e-4 * torch.randn_like(W)
        W = W * (0.9995 / norm(W))
        assert float(torch.linalg.matrix_norm(W - reference._near)) > 1.0 - reference.norm  # the norm alone fails
        assert reference.proves(W, 1.0)
        assert norm(W) <= reference.norm
        base = reference._matrix
        assert norm(base - base @ reference._space @ reference._space.mT) <= reference.rest
        assert same_bits(reference._near, W)
    assert not reference.proves(1.001 * W, 1.0)


def test_the_part_outside_the_subspace_is_bounded() -> None:
    """A direction that grows outside the subspace must not be missed."""
    W = decaying()
    reference = ProvedReference()
    reference.renew(0.9 * W, 1.0)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    for value in (0.5, 0.9, 0.99, 1.01, 5.0):
        x = 0.9 * W + value * torch.outer(U[:, 60], Vh[60])
        assert not reference.proves(x, 1.0) or norm(x) < 1.0
    x = 0.9 * W + 5.0 * torch.outer(U[:, 60], Vh[60])
    assert not reference.proves(x, 1.0)


def test_bounds_of_a_subspace_hold_for_any_orthonormal_columns() -> None:
    generator = torch.Generator().manual_seed(4)
    for k in (1, 4, 16):
        for _ in range(10):
            W = torch.randn(30, 25, generator=generator)
            V = torch.linalg.qr(torch.randn(25, k, generator=generator))[0]
            rest = norm(W - W @ V @ V.mT) * (1 + 1e-12)
            found = module._Blocks(W, V).norm(rest, 3.0 * norm(W))
            assert norm(W) <= found
            below = module._Blocks(W, V).norm(rest, 0.999 * norm(W))
            assert below == math.inf


@each_dtype
@pytest.mark.parametrize("shape", [(70, 75), (5, 4)])
def test_the_result_is_that_of_project_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A walk in and out of the ball, with and without history, and resumed in the middle."""
    ball, generator = SpectralBall(1.0), torch.Generator().manual_seed(5)
    key, resumed = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    x = torch.randn(shape, generator=generator)
    x = (0.999 * x / norm(x)).to(dtype)
    kept = 0
    for step in range(24):
        move = torch.randn(shape, generator=generator)
        size = 20.0 if dtype == torch.bfloat16 else 1.0  # it has no smaller steps
        x = (x.double() * (1.0 + size * (5e-4 if step % 6 < 2 else -2e-4)) + 1e-4 * move / norm(move)).to(dtype)
        plain = ball.project(x)
        tracked = project_tracked(ball, key, x)
        assert same_bits(tracked, plain)
        if step >= 12:
            assert same_bits(project_tracked(ball, resumed, x), plain)
        kept += tracked is x
        x = tracked
    assert 1 <= kept <= 23


def test_no_decomposition_and_no_factorization_while_the_proof_carries_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ball, key = SpectralBall(1.0), nn.Parameter(torch.zeros(1))
    W = 0.5 * decaying()
    project_tracked(ball, key, W)
    monkeypatch.setattr(SpectralBall, "project", lambda *_: pytest.fail("projected"))
    for _ in range(5):
        W = W + 1e-4 * torch.randn_like(W)
        assert project_tracked(ball, key, W) is W


def test_two_radii_and_two_keys_do_not_mix() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    W = 0.9 * decaying()
    for _ in range(2):
        assert project_tracked(SpectralBall(1.0), one, W) is W
        assert norm(project_tracked(SpectralBall(0.5), one, W)) <= 0.5
        assert norm(project_tracked(SpectralBall(0.7), two, 3 * W)) <= 0.7
    big, small = (project_tracked(SpectralBall(radius), one, W) for radius in (1.0, 0.5))
    assert big is W
    assert same_bits(small, SpectralBall(0.5).project(W))


def test_what_is_remembered_dies_with_its_parameter_or_is_forgotten() -> None:
    gc.collect()
    before = len(module._REFERENCES)
    key = nn.Parameter(torch.zeros(1))
    project_tracked(SpectralBall(1.0), key, 0.5 * torch.eye(3))
    assert len(module._REFERENCES) == before + 1
    forget(key)
    assert len(module._REFERENCES) == before
    project_tracked(SpectralBall(1.0), key, 0.5 * torch.eye(3))
    del key
    gc.collect()
    assert len(module._REFERENCES) == before


def test_other_sets_batches_and_gradients_go_straight_to_project() -> None:
    before, key = len(module._REFERENCES), nn.Parameter(torch.zeros(1))
    x = 3.0 * torch.randn(4, 4)
    assert same_bits(project_tracked(L2Ball(1.0), key, x), L2Ball(1.0).project(x))
    batch = SpectralBall(1.0, dims=(-2, -1))
    assert same_bits(project_tracked(batch, key, x.expand(2, 4, 4)), batch.project(x.expand(2, 4, 4)))
    leaf = x.clone().requires_grad_()
    p = project_tracked(SpectralBall(1.0), key, leaf)
    assert p.requires_grad
    complex_x = torch.complex(x, x.mT)
    assert norm(project_tracked(SpectralBall(1.0), key, complex_x).abs()) > 0
    empty = torch.zeros(0, 4)
    assert project_tracked(SpectralBall(1.0), key, empty) is empty
    assert len(module._REFERENCES) == before
    assert project_tracked(SpectralBall(1.0), key, torch.full((3, 3), math.nan)).isnan().all()


def test_an_optimizer_step_with_it_trains_as_with_project() -> None:
    """The line that optim/base.py would use, for 30 steps, against the plain one."""
    runs = []
    for tracked in (True, False):
        torch.manual_seed(7)
        layer, ball = nn.Linear(70, 66, bias=False), SpectralBall(1.2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=2.0)
        for _ in range(30):
            x = torch.randn(16, 70)
            optimizer.zero_grad()
            (layer(x) - x[:, :66]).square().mean().mul(3).backward()
            optimizer.step()
            with torch.no_grad():
                reached = layer.weight.detach().clone()
                layer.weight.copy_(project_tracked(ball, layer.weight, reached) if tracked else ball.project(reached))
        runs.append(layer.weight.detach().clone())
    assert same_bits(*runs)


def test_references_that_prove_nothing_are_renewed_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    renewed, ball, key = [], SpectralBall(1.0), nn.Parameter(torch.zeros(1))
    real = ProvedReference.renew
    monkeypatch.setattr(ProvedReference, "renew", lambda self, *a: renewed.append(step) or real(self, *a))
    for step in range(40):  # noqa: B007 the renewals write it down
        project_tracked(ball, key, 3.0 * torch.randn(5, 4))
    assert len(renewed) <= 6
    x = 0.5 * torch.eye(5, 4)
    for step in range(40, 120):  # noqa: B007 inside again: renewed once, then kept
        assert project_tracked(ball, key, x) is x
    assert len(renewed) <= 8
    assert module._REFERENCES[key][ball].proves(x, 1.0)


def test_the_drift_outside_the_subspace_is_bounded_in_both_ways() -> None:
    generator = torch.Generator().manual_seed(9)
    W = 0.9 * decaying()
    for size in (1e-6, 1e-3, 0.1):
        reference = ProvedReference()
        assert reference.renew(W, 1.0)
        V = reference._space
        assert V is not None
        for part in (0.0, 0.5, 1.0):  # of the drift within the subspace
            noise = torch.randn(W.shape, generator=generator)
            move = size * (part * noise @ V @ V.mT + (1 - part) * (noise - noise @ V @ V.mT)) / 20
            x = W + move
            blocks, drift = module._Blocks(x, V), module._distance_upper(x, W)
            outside = move - move @ V @ V.mT
            by_pythagoras, by_gram = (
                reference._drift_outside(x, blocks, drift),
                reference._gram_outside(x, blocks, drift),
            )
            exact = float(torch.linalg.matrix_norm(outside))
            assert exact - 1e-15 <= by_pythagoras <= exact + 5e-3 * drift
            assert norm(outside) - 1e-15 <= by_gram <= 2 * norm(outside) + 1e-2 * drift
    assert by_gram < 1e-2 * drift


def test_the_subspace_grows_by_the_directions_of_the_drift() -> None:
    """A direction that was small when the reference was made grows to the radius."""
    W = 0.9 * decaying()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    spike = torch.outer(U[:, 60], Vh[60])
    reference = ProvedReference()
    assert reference.renew(W, 1.0)
    assert reference.proves(W + 0.5 * spike, 1.0)
    assert reference._space.shape[1] >= 16
    for value in (0.7, 0.8, 0.75):
        x = W + value * spike + 1e-5 * torch.randn_like(W)
        assert reference.proves(x, 1.0)
        assert norm(x) <= reference.norm
        base = reference._matrix
        assert same_bits(base, W)
        assert norm(base - base @ reference._space @ reference._space.mT) <= reference.rest
    assert reference._space.shape[1] > 16
    assert not reference.proves(W + 1.2 * spike, 1.0)


def test_a_parameter_that_changes_in_place_does_not_take_its_proof_along() -> None:
    ball, W = SpectralBall(1.0), nn.Parameter(0.9 * decaying())
    with torch.no_grad():
        assert project_tracked(ball, W, W) is W  # proved anew
        W.add_(0.05 * decaying())
        assert project_tracked(ball, W, W) is W  # proved from the subspace
        for _ in range(3):
            W.mul_(1.2)
            p = project_tracked(ball, W, W)
            assert p is not W
            assert ball.violation(p) == 0.0
            W.copy_(p)
