"""Clipped gradients: the values of torch, their derivative, and the refusal of what was not stated."""

import pytest
import torch

from stableopt.lyapunov.profile.tangents.clipping import Clipping, NotTheGradientError
from stableopt.lyapunov.profile.tangents.products import Gradient


def clipped_by_torch(values, norm, value):
    parameters = [torch.nn.Parameter(torch.zeros_like(v)) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = v.clone()
    if norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, norm)
    if value is not None:
        torch.nn.utils.clip_grad_value_(parameters, value)
    return [p.grad for p in parameters]


@pytest.mark.parametrize(("norm", "value"), [(0.5, None), (100.0, None), (None, 0.3), (0.9, 0.2), (None, None)])
def test_tangents_are_those_of_torchs_clipping(norm, value):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2), (4,))]
    along = [torch.randn(2, *v.shape, generator=generator, dtype=torch.float64) for v in values]
    used = clipped_by_torch(values, norm, value)
    pushed = Clipping(norm, value).push(Gradient(values, along, "graph", 2), used)
    h = 1e-6
    for r in range(2):
        ahead = clipped_by_torch([v + h * d[r] for v, d in zip(values, along, strict=True)], norm, value)
        behind = clipped_by_torch([v - h * d[r] for v, d in zip(values, along, strict=True)], norm, value)
        for d, a, b in zip(pushed, ahead, behind, strict=True):
            assert torch.allclose(d[r], (a - b) / (2 * h), atol=1e-8)


def test_a_gradient_that_was_clipped_without_saying_so_is_refused():
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    gradient = Gradient([g], [torch.ones(1, 2, dtype=torch.float64)], "graph", 1)
    Clipping().push(gradient, [g])
    with pytest.raises(NotTheGradientError, match="clip_norm="):
        Clipping().push(gradient, [g * (1 - 1e-9)])
    with pytest.raises(NotTheGradientError):
        Clipping().push(gradient, [None])
    Clipping(norm=1.0).push(gradient, clipped_by_torch([g], 1.0, None))
    with pytest.raises(NotTheGradientError):
        Clipping(norm=1.001).push(gradient, clipped_by_torch([g], 1.0, None))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_limits_that_are_none_are_refused(limit):
    with pytest.raises(ValueError, match="clip_norm"):
        Clipping(norm=limit)
    with pytest.raises(ValueError, match="clip_value"):
        Clipping(value=limit)
