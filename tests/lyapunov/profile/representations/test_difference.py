"""Differences take the place of derivatives only where they are right, and say their size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.representations.difference import Operations, size_of_difference
from stableopt.lyapunov.profile.representations.forward import growth_along
from stableopt.lyapunov.profile.representations.mixed import representation_tangents
from tests.lyapunov.profile.representations.opaque import ReverseOnly


def pair(activation=nn.Identity):
    torch.manual_seed(1)
    layers = [nn.Linear(3, 5), nn.Tanh(), activation(), nn.Linear(5, 2)]
    return nn.Sequential(*layers), nn.Sequential(layers[0], ReverseOnly(), *layers[2:])


@pytest.mark.parametrize(("dtype", "epsilon", "error"), [(torch.float64, 1e-6, 1e-8), (torch.float32, 1e-3, 1e-3)])
def test_smooth_models_have_differences_near_their_derivatives(dtype, epsilon, error):
    exact, opaque = (model.to(dtype) for model in pair())
    x = torch.randn(4, 3, dtype=dtype)
    d, dx = [torch.randn(2, *p.shape, dtype=dtype) for p in exact.parameters()], torch.randn(2, 4, 3, dtype=dtype)
    known, found = (representation_tangents(m, x, d, d_input=dx) for m in (exact, opaque))
    assert (known.how, known.epsilon, found.how, found.epsilon) == ("forward", 0.0, "difference", epsilon)
    for name, end in (("0", "0"), ("3", "3")):
        apart = (found[name] - known[end]).norm() / known[end].norm()
        assert 0.0 < float(apart) < error
    growth, other = growth_along(opaque, x, dx[0]), growth_along(exact, x, dx[0])
    assert (growth.epsilon, other.epsilon) == (epsilon, 0.0)
    assert growth.log_norms == pytest.approx(other.log_norms, abs=2.0 * error)
    assert growth.log_samples == pytest.approx(other.log_samples, abs=20.0 * error)


def test_kinks_are_refused_in_float32_and_not_in_float64():
    exact, opaque = pair(nn.ReLU)
    x, d = torch.randn(4, 3), [torch.randn(1, *p.shape) for p in exact.parameters()]
    found = representation_tangents(opaque, x, d)
    assert found.epsilon == 1e-6
    assert torch.allclose(found["3"], representation_tangents(exact, x, d)["3"], rtol=1e-6)
    with pytest.raises(NotImplementedError, match="kinks of relu"):
        representation_tangents(opaque.float(), x.float(), [t.float() for t in d])
    with pytest.raises(NotImplementedError, match="kinks of relu"):
        growth_along(opaque, x.float())


def test_bfloat16_is_refused():
    _, opaque = pair()
    x, d = torch.randn(4, 3), [torch.randn(1, *p.shape) for p in opaque.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(NotImplementedError, match="rounding in bfloat16"):
        representation_tangents(opaque.float(), x.float(), [t.float() for t in d])
    with pytest.raises(NotImplementedError, match="rounding in bfloat16"):
        representation_tangents(opaque.bfloat16(), x.bfloat16(), [t.bfloat16() for t in d])


def test_a_model_is_left_as_it_was_also_by_differences():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), ReverseOnly(), nn.Dropout(0.5), nn.Linear(4, 1))
    tensors = [*model.parameters(), *model.buffers()]
    before, random = [(t.detach().clone(), t._version) for t in tensors], torch.get_rng_state()
    x, d = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
        [torch.ones(2, *p.shape) for p in model.parameters()],
    )
    assert representation_tangents(model, x, d).how == "difference"
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    "map_",
    [
        torch.relu,
        torch.abs,
        nn.LeakyReLU(),
        nn.Hardtanh(),
        lambda x: nn.functional.prelu(x, torch.ones(1)),
        lambda x: x.clamp(0.0),
        lambda x: x.max(),
        nn.MaxPool1d(2),
    ],
)
def test_kinks_are_seen(map_):
    with torch.no_grad(), Operations() as seen:
        map_(torch.randn(1, 4))
    assert seen.kinks


def test_smooth_operations_have_no_kinks():
    with torch.no_grad(), Operations() as seen:
        x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.LayerNorm(4), nn.Softmax(1))(
            torch.randn(2, 4)
        )
        nn.functional.scaled_dot_product_attention(x, x, x)
    assert not seen.kinks
    assert size_of_difference(seen) == 1e-6
