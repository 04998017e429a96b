"""Layers, shapes and samples are found as they are, samples that meet are told from others, masks are those of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.layers.walk import ProbeError
from stableopt.lyapunov.profile.representations.forward import forward_profile
from stableopt.lyapunov.profile.representations.survey import as_probe, chain_of
from tests.lyapunov.profile.representations.opaque import ReverseOnly


class OneMeets(nn.Module):
    """Only the sample ``target`` sees another one, ``source``."""

    def __init__(self, source, target):
        super().__init__()
        self.inner, self.source, self.target = nn.Linear(3, 3), source, target

    def forward(self, x):
        y = self.inner(x)
        shift = torch.zeros_like(y)
        shift[self.target] = y[self.source]
        return y + shift


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(
    "count", [2, 3, pytest.param(8, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_every_pair_of_samples_that_meet_is_found(count, forward):
    x = torch.randn(count, 3)
    for source in range(count):
        for target in range(count):
            model = nn.Sequential(OneMeets(source, target), nn.Identity() if forward else ReverseOnly())
            chain = chain_of(model, x, forward=False)
            assert chain.forward is forward
            assert (chain.samples, bool(chain.mixing)) == ((count, False) if source == target else (1, True))
            if not forward and target == 2:
                break


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_samples_meet_where_they_do_and_nowhere_else():
    x = torch.randn(6, 4, 3)
    attention = nn.TransformerEncoderLayer(3, 1, 5, dropout=0.0)  # the batch is its second dimension
    for model, samples in [
        (nn.Linear(3, 2), 6),
        (nn.LayerNorm(3), 6),
        (nn.BatchNorm1d(4), 1),
        (nn.BatchNorm1d(4).eval(), 6),
        (Mean(), 1),
        (attention, 1),
        (nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), 1),  # another first dimension
        (nn.GroupNorm(2, 4), 6),
    ]:
        assert chain_of(model, x).samples == samples, model
    assert chain_of(nn.Linear(3, 2), x[:1]).samples == 1


class Transposed(nn.Module):
    """Dropout of a transposed tensor: inside of a transform its strides, and so its mask, are others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 2), nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.drop(self.a(x).transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("exact", [True, False])
def test_masks_are_those_of_the_next_forward_pass(exact):
    model, x = Transposed(), torch.randn(3, 4, 4)
    torch.manual_seed(3)
    x.requires_grad_()
    y = model(x)
    rows = [torch.autograd.grad(y[i].sum(), x, retain_graph=True)[0] for i in range(3)]
    J = [
        torch.stack([torch.autograd.grad(e, x, retain_graph=True)[0][i].flatten() for e in y[i].flatten()])
        for i in range(3)
    ]
    assert len(rows) == 3
    torch.manual_seed(3)
    profile = forward_profile(model, x.detach(), exact=exact, iterations=8)
    norms = [float(torch.linalg.matrix_norm(j, 2)) for j in J]
    assert profile.norm(2, 0) == pytest.approx(max(norms), rel=1e-9)


def test_operations_that_have_no_rule_for_several_tangents_go_one_by_one():
    model = nn.Sequential(nn.Linear(3, 4), nn.RReLU(), nn.Linear(4, 2))
    chain = chain_of(model, torch.randn(2, 3))
    assert not chain.together
    assert forward_profile(model, torch.randn(2, 3)).exact


def test_fused_kernels_are_taken_apart_only_where_needed():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    assert chain_of(layer, torch.randn(2, 3, 4)).plain
    assert torch.backends.mha.get_fastpath_enabled()
    assert not chain_of(nn.Linear(4, 4), torch.randn(2, 4)).plain


def test_what_is_no_probe_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ProbeError, match="did not call"):
        chain_of(model, lambda: None)
    with pytest.raises(ProbeError, match="does not depend"):
        chain_of(nn.Sequential(nn.Linear(2, 2), Constant()), torch.ones(1, 2))
    with pytest.raises(NotImplementedError, match="forward"):
        chain_of(nn.Sequential(nn.Linear(2, 2), ReverseOnly()), torch.ones(1, 2))
    assert as_probe(model, {"input": torch.ones(1, 2)})() == 0.0


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(1, 2)
