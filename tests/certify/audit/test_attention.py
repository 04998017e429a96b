"""Attention: the gain grows with the inputs for dot products and untied distances, and does not for tied ones and ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.certify.audit import audit
from stableopt.certify.audit.attention import _multihead
from stableopt.nn import TransformerBlock
from tests.certify.audit.foreign import DistanceAttention, DotAttention, holds, jacobian_norm, of_kind, only


@pytest.mark.parametrize("batch_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_multihead_attention_is_not_lipschitz(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    found = only(nn.ModuleList([layer]), "growing-attention")
    gains = [found.numbers[f"gain at radius {r}"] for r in (1, 30, 1000)]
    assert gains[0] < gains[1] < gains[2] == found.attained
    assert gains[2] > 100 * gains[1]
    run = _multihead(layer)
    holds(found, run)
    assert found.witness is not None
    assert found.attained == pytest.approx(jacobian_norm(run, (found.witness.x + found.witness.y) / 2), rel=1e-4)
    assert found.severity == "serious"


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda: DotAttention(4), marks=pytest.mark.slow), lambda: DistanceAttention(4, tied=False)],
    ids=["dot product", "untied distances"],
)
def test_attention_written_by_hand_is_found_by_its_growth(make) -> None:
    layer = make()
    found = only(layer, "growing-attention", (4, 4))
    assert found.attained > 10 * found.numbers["gain at radius 30"]
    assert found.witness is not None
    assert found.attained == pytest.approx(jacobian_norm(layer, (found.witness.x + found.witness.y) / 2), rel=1e-4)
    holds(found, layer)


@pytest.mark.slow
def test_tied_distances_and_our_block_do_not_grow() -> None:
    assert not of_kind(audit(DistanceAttention(4, tied=True), (4, 4)), "growing-attention")
    assert len(audit(TransformerBlock(4, 2), (4, 4))) == 0


@pytest.mark.slow
def test_only_the_innermost_module_is_named() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DotAttention(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    assert only(Outer(), "growing-attention", (4, 4)).path == "inner"


def test_cross_attention_is_named_without_a_number() -> None:
    found = only(nn.MultiheadAttention(4, 1, kdim=2, vdim=2), "growing-attention")
    assert found.witness is None
