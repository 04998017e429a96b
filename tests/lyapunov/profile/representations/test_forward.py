"""Norms of all derivatives between representations: closed forms, dense derivatives by another way, exponents in depth."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from stableopt.lyapunov.profile.representations.forward import forward_profile, growth_along

WAYS = [True, False]


def chain(*weights):
    """A linear model with these matrices."""
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(w)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("exact", WAYS)
def test_a_linear_model_has_the_norms_of_the_products_of_its_matrices(exact):
    weights = [torch.randn(7, 5), torch.randn(3, 7), torch.randn(6, 3), torch.randn(4, 6)]
    profile = forward_profile(chain(*weights), torch.randn(3, 5), exact=exact, iterations=8)
    assert (profile.exact, profile.operator, profile.log_samples.shape) == (exact, "sample", (3, 5, 5))
    for k, l in combinations(range(5), 2):
        product = torch.linalg.multi_dot(weights[k:l][::-1]) if l > k + 1 else weights[k]
        norm = float(torch.linalg.matrix_norm(product, 2))
        assert profile.norm(l, k) == pytest.approx(norm, rel=1e-12)
        assert np.exp(profile.log_medians[l, k]) == pytest.approx(norm, rel=1e-12)
        assert np.isnan(profile.log_norms[k, l])
    gains = [math.log(torch.linalg.matrix_norm(w, 2)) for w in weights]
    assert profile.gains == pytest.approx(gains)
    assert profile.log_products[4, 0] == pytest.approx(sum(gains))
    assert profile.law == pytest.approx(gains, abs=1e-9)
    assert (profile.law >= profile.gains).all()
    assert profile.exponent == pytest.approx(profile.log_norms[4, 0] / 4)


@pytest.mark.parametrize("exact", WAYS)
@pytest.mark.parametrize("gain", [0.5, 1.0, 3.0])
def test_orthogonal_layers_with_a_gain_have_its_logarithm_as_every_exponent(exact, gain):
    weights = [gain * torch.linalg.qr(torch.randn(6, 6))[0] for _ in range(7)]
    profile = forward_profile(chain(*weights), torch.randn(2, 6), exact=exact, iterations=2)
    below = np.tril_indices(8, -1)
    assert profile.exponents[below] == pytest.approx(np.full(28, math.log(gain)), abs=1e-13)
    expected = {0.5: (0.0, 0), 1.0: (0.0, None), 3.0: (7 * math.log(3.0), 7)}[gain]
    assert profile.peak.log_norm == pytest.approx(expected[0], abs=1e-13)
    assert expected[1] is None or profile.peak.target - profile.peak.source == expected[1]
    if exact:
        assert profile.log_diagonal == pytest.approx(np.full((2, 7, 6), math.log(gain)), abs=1e-13)


@pytest.mark.parametrize("exact", WAYS)
@pytest.mark.parametrize("gain", [1e-60, 1e60])
def test_products_beyond_the_floats_have_finite_logarithms(exact, gain):
    weights = [gain * torch.linalg.qr(torch.randn(4, 4))[0] for _ in range(12)]
    profile = forward_profile(chain(*weights), torch.zeros(2, 4), exact=exact, iterations=2)
    assert profile.exponents[12, 0] == pytest.approx(math.log(gain), rel=1e-13)
    assert profile.norm(12, 0) == (math.inf if gain > 1.0 else 0.0)


def test_the_largest_norm_lies_between_the_ends_of_a_non_normal_chain():
    up, down = torch.tensor([[1.0, 50.0], [0.0, 1.0]]), torch.tensor([[1.0, -50.0], [0.0, 1.0]])
    profile = forward_profile(chain(up, down), torch.ones(1, 2))
    assert profile.norm(2, 0) == pytest.approx(1.0)
    assert profile.exponent == pytest.approx(0.0, abs=1e-12)
    assert profile.peak.log_norm == pytest.approx(math.asinh(25.0))  # the norm of [[1, c], [0, 1]] is exp(asinh(c / 2))
    assert profile.log_products[2, 0] == pytest.approx(2.0 * math.asinh(25.0))


def test_what_annihilates_is_zero_and_rounding_is_told_apart():
    first, second = torch.zeros(2, 2), torch.zeros(2, 2)
    first[0, 0] = second[1, 1] = 1.0
    profile = forward_profile(chain(first, second), torch.ones(2, 2))
    assert profile.norm(2, 0) == 0.0
    assert not profile.resolved[2, 0]
    q = torch.linalg.qr(torch.randn(6, 6))[0]
    low, high = q[:, :3] @ q[:, :3].T, q[:, 3:] @ q[:, 3:].T
    profile = forward_profile(chain(low, high), torch.ones(2, 6))
    assert 0.0 < profile.norm(2, 0) < 1e-15
    assert (
        profile.resolved.tolist() == [[False] * 3, [True, True, False], [False, True, True]]
        or not profile.resolved[2, 0]
    )
    assert profile.resolved[1, 0] and profile.resolved[2, 1]  # noqa: PT018


class Block(nn.Module):
    def __init__(self, width, step):
        super().__init__()
        self.a, self.b, self.step = nn.Linear(width, width), nn.Linear(width, width), step

    def forward(self, x):
        return x + self.step * self.b(self.a(x).tanh())


def dense(model, parts, x):
    """The norms of the derivatives between the inputs of the parts, and the output, by reverse mode for each sample."""
    states = [x]
    for part in parts:
        states.append(part(states[-1]).detach())
    table = np.full((len(x), len(states), len(states)), np.nan)
    for k, state in enumerate(states):
        for i in range(len(x)):
            h = state[i : i + 1]
            table[i, k, k] = 1.0
            for l in range(k + 1, len(states)):

                def map_(h, k=k, l=l):
                    for part in parts[k:l]:
                        h = part(h)
                    return h

                J = torch.autograd.functional.jacobian(map_, h).reshape(states[l][i].numel(), -1)
                table[i, l, k] = float(torch.linalg.matrix_norm(J, 2))
    assert torch.equal(states[-1], model(x))
    return table


def nets():
    yield "residual", [nn.Linear(4, 6), Block(6, 0.5), Block(6, 0.1), nn.Linear(6, 2)], torch.randn(3, 4)
    yield (
        "convolutions",
        [
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.Flatten()),
            nn.Linear(4, 3),
        ],
        torch.randn(3, 2, 6, 6),
    )
    yield "normalized", [nn.Linear(4, 5), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))], torch.randn(2, 4)
    yield (
        "orthogonal",
        [parametrizations.orthogonal(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 3))],
        torch.randn(2, 4),
    )


@pytest.mark.parametrize("exact", WAYS)
def test_other_models_have_the_norms_of_dense_derivatives(exact):
    for name, parts, x in nets():
        model = nn.Sequential(*parts)
        profile = forward_profile(model, x, exact=exact, iterations=12)
        if name == "normalized":  # what the normalization does belongs to the layer before it
            parts = [nn.Sequential(parts[0], parts[1][0]), parts[1][1]]
        table = dense(model, parts, x)
        found, below = np.exp(profile.log_samples), ~np.isnan(table)
        assert found[below] == pytest.approx(table[below], rel=1e-9 if exact else 1e-5), name
        if not exact:
            assert (found[below] <= table[below] * (1.0 + 1e-12)).all(), name
        assert profile.log_norms == pytest.approx(np.log(table).max(0), nan_ok=True, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("exact", WAYS)
def test_batch_statistics_give_the_operator_of_the_whole_batch(exact):
    first, norm, last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    model, x = nn.Sequential(first, norm, nn.Tanh(), last), torch.randn(5, 3)
    profile = forward_profile(model, x, exact=exact, iterations=12)
    assert (profile.operator, profile.log_samples.shape[0]) == ("batch", 1)
    assert "'0'" in profile.mixing
    J = torch.autograd.functional.jacobian(lambda x: model(x), x).reshape(10, 15)
    assert profile.norm(2, 0) == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-6)
    model.eval()
    profile = forward_profile(model, x, exact=exact, iterations=12)
    assert (profile.operator, profile.mixing) == ("sample", "")
    one = [torch.autograd.functional.jacobian(model, x[i : i + 1]).reshape(2, 3) for i in range(5)]
    assert profile.norm(2, 0) == pytest.approx(max(float(torch.linalg.matrix_norm(j, 2)) for j in one), rel=1e-6)


def ginibre(size, depth):
    return chain(*[torch.randn(size, size) for _ in range(depth)])


def known(size):
    """The exponents of products of real Ginibre matrices with entries of variance 1 (Newman 1986)."""
    return [0.5 * (math.log(2.0) + float(torch.digamma(torch.tensor((size - i) / 2.0)))) for i in range(size)]


@pytest.mark.parametrize(("size", "depth"), [(2, 250), pytest.param(8, 1000, marks=pytest.mark.slow)])
def test_products_of_random_matrices_have_the_exponents_of_ginibre(size, depth):
    exponents = pytest.importorskip("stableopt.lyapunov.profile.growth.exponents")
    from stableopt.lyapunov.profile.representations.jacobians import log_diagonals

    model = ginibre(size, depth)
    J = [layer.weight.detach()[None] for layer in model]
    logs = log_diagonals(J)[0]  # what the profile gives for layers of this kind, see below
    for i, value in enumerate(known(size)):
        found = exponents.exponent(logs[:, i])
        assert found.lower <= value <= found.upper, (i, found)
    shallow = nn.Sequential(*list(model)[:6])
    profile = forward_profile(shallow, torch.randn(2, size))
    assert profile.log_diagonal == pytest.approx(np.stack([log_diagonals(J[:6])[0]] * 2), abs=1e-10)


@pytest.mark.parametrize("exact", WAYS)
def test_a_model_is_left_as_it_was(exact):
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(4, 2))
    )
    model(torch.randn(5, 3)).sum().backward()
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t.detach().clone(), t._version, None if t.grad is None else t.grad.clone()) for t in tensors]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    forward_profile(model, x, exact=exact, iterations=2)
    growth_along(model, x)
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    for t, (value, version, grad) in zip(tensors, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version
        assert (t.grad is None) == (grad is None) and (grad is None or torch.equal(t.grad, grad))  # noqa: PT018
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_one_direction_grows_as_the_derivative_says():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4)
    v = torch.randn(5, 4)
    growth = growth_along(model, x, v)
    d = torch.func.jvp(model, (x,), (v,))[1].detach()
    assert growth.log_norms[-1] == pytest.approx(math.log(d.norm() / v.norm()))
    assert growth.log_samples[-1] == pytest.approx((d.norm(dim=1) / v.norm(dim=1)).log().numpy())
    assert growth.gains.sum() == pytest.approx(growth.log_norms[-1])
    assert growth_along(model, x, v, layers=growth.names[1:]).log_norms == pytest.approx(growth.log_norms)
    assert (growth.log_samples <= forward_profile(model, x).log_samples[:, :, 0].T + 1e-12).all()
    with pytest.raises(ValueError, match="shape of the input"):
        growth_along(model, x, v[0])


def test_one_direction_does_not_overflow():
    growth = growth_along(chain(*[1e90 * torch.eye(3)] * 8), torch.zeros(2, 3))
    assert growth.exponent == pytest.approx(math.log(1e90))


def test_layers_can_be_chosen_and_others_are_refused():
    weights = [torch.randn(4, 4) for _ in range(4)]
    model, x = chain(*weights), torch.randn(2, 4)
    whole, some = forward_profile(model, x), forward_profile(model, x, layers=["0", "2"])
    assert some.names == ("input", "0", "2")
    assert some.log_norms[np.tril_indices(3)] == pytest.approx(
        whole.log_norms[np.ix_([0, 2, 4], [0, 2, 4])][np.tril_indices(3)]
    )
    for wrong in (["2", "0"], ["7"], []):
        with pytest.raises(ValueError, match="layers must be some of"):
            forward_profile(model, x, layers=wrong)
    with pytest.raises(ValueError, match="iterations"):
        forward_profile(model, x, iterations=0)
    with pytest.raises(ValueError, match="source <= target"):
        whole.norm(1, 2)


def test_wide_layers_are_estimated_and_say_how_well():
    model, x = nn.Sequential(nn.Linear(600, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 600)
    profile = forward_profile(model, x, iterations=10)
    assert (profile.how, profile.exact) == ("lanczos", False)
    assert "estimates from below" in str(profile)
    full = forward_profile(model, x, exact=True)
    assert full.exact and "exact" in str(full)  # noqa: PT018
    assert profile.log_norms == pytest.approx(full.log_norms, nan_ok=True, abs=1e-9)
    few = forward_profile(model, x, exact=False, iterations=1)
    assert np.nanmax(few.residuals) > 1e-3 > 1e-7 > np.nanmax(profile.residuals)
    assert (few.log_norms <= full.log_norms + 1e-12)[np.tril_indices(3)].all()
    # all singular values lie in [estimate (1 - residual), ...]: one of them within the residual
    for k, l in ((0, 1), (1, 2), (0, 2)):
        assert few.residuals[l, k] >= 0.0


def test_a_probe_may_be_a_loss_inputs_or_a_mapping():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(4, 3)

    def closure():
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    tables = [forward_profile(model, p).log_norms for p in (x, (x,), {"input": x}, lambda: model(x), closure)]
    for table in tables[1:]:
        assert table == pytest.approx(tables[0], nan_ok=True)
