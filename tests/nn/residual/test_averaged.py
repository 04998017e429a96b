"""Laws of the convex mix beside those in test_structure.py: the norm of tokens, the depth, the precision of the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn import AveragedResidual, GroupSort, Scale, lipschitz, uniform_bound
from stableopt.theory import averaged_factor
from tests.nn.adversary import worst_ratio
from tests.nn.catalogue import jacobian, operator_norm


def isometry(n: int) -> nn.Module:
    """Two reflections with a bend: 1-Lipschitz, and far from the identity."""
    branch = nn.Sequential(nn.Linear(n, n), GroupSort(), nn.Linear(n, n))
    for layer in (branch[0], branch[2]):
        nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]
    return branch


@pytest.mark.parametrize(("depth", "weight"), [(1, 0.5), (2, 0.5), (8, 1 / 8), (64, 1 / 64)])
def test_the_initial_weight_fits_the_depth(depth: int, weight: float) -> None:
    for learnable in (True, False):
        block = AveragedResidual(nn.Tanh(), depth=depth, learnable=learnable)
        assert block.weight == weight
        assert float(torch.as_tensor(block.step_size()).detach()) == pytest.approx(weight, rel=1e-6)
    assert AveragedResidual(nn.Tanh(), 0.3, depth=64).weight == 0.3
    for depth_given in (0, 1.5, True):
        with pytest.raises(ValueError, match="depth must be an integer >= 1"):
            AveragedResidual(nn.Tanh(), depth=depth_given)  # type: ignore[arg-type]


def test_a_deep_stack_keeps_the_signal_only_with_the_weight_that_fits() -> None:
    """64 orthogonal branches: the depth-aware mix keeps a good part of every signal, one half everywhere loses it."""
    aware = nn.Sequential(*[AveragedResidual(isometry(16), depth=64) for _ in range(64)]).eval()
    half = nn.Sequential(*[AveragedResidual(isometry(16)) for _ in range(64)]).eval()
    x = torch.randn(1, 16)
    assert operator_norm(jacobian(aware, x), "l2") >= 0.3
    assert operator_norm(jacobian(half, x), "l2") < 1e-3


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "token_max"])
def test_the_law_holds_in_every_norm(norm: str) -> None:
    block = AveragedResidual(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 0.7).eval()
    L = lipschitz(block.branch, norm).upper
    bound = lipschitz(block, norm)
    assert bound.upper == pytest.approx(float(averaged_factor(0.7, L)), rel=1e-6)
    shape = (3, 4) if norm == "token_max" else (4,)
    assert 0.5 * bound.upper < worst_ratio(block, shape, norm, starts=8, steps=20) <= bound.upper
    frozen = (
        AveragedResidual(nn.Sequential(GroupSort(), Scale(-1.0))) if norm == "l2" else AveragedResidual(Scale(-1.0))
    )
    assert uniform_bound(frozen, norm).upper == 1.0  # type: ignore[union-attr]


def test_a_branch_that_mixes_tokens_has_no_bound_in_their_norm() -> None:
    with pytest.raises(UncertifiableError, match=r"in branch: .*Conv1d"):
        lipschitz(AveragedResidual(nn.Conv1d(3, 3, 1)), "token_max")
    assert uniform_bound(AveragedResidual(nn.Linear(2, 2)), "token_max") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rule_reads_the_weight_that_is_used(dtype: torch.dtype) -> None:
    """A contraction by the mix: the proved constant is that of the rounded weight, not of the exact sigmoid."""
    for raw in (-2.37, 0.61, 3.3):
        block = AveragedResidual(Scale(0.0)).to(dtype)
        nn.init.constant_(block.raw_weight, raw)
        a = block.step_size()
        assert isinstance(a, torch.Tensor)
        assert a.dtype == torch.float32
        assert lipschitz(block).upper == pytest.approx(1.0 - float(a.detach()), abs=1e-15)
        assert block(torch.ones(2, dtype=dtype)).dtype == dtype


def test_just_past_the_interval_it_expands() -> None:
    """Weights outside [0, 1], which no parameter gives, lift a branch of constant 1 above 1."""
    for a, branch in ((1.001, Scale(-1.0)), (-0.001, Scale(-1.0))):
        block = AveragedResidual(branch, 1.0, learnable=False)
        block.weight = a
        assert operator_norm(jacobian(block, torch.randn(1, 2)), "l2") > 1.0 + 1e-3
    for raw in (-math.inf, math.nan):
        block = AveragedResidual(Scale(1.0))
        nn.init.constant_(block.raw_weight, raw)
        with pytest.raises(ValueError, match="no bound holds for an AveragedResidual with the raw weight"):
            lipschitz(block)
