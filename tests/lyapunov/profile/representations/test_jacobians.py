"""Full derivatives, the norms of their products, and the triangular factors that they leave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.lyapunov.profile.representations.jacobians import jacobians, log_diagonals, log_norms_of_products
from stableopt.lyapunov.profile.representations.survey import chain_of
from tests.lyapunov.profile.representations.opaque import ReverseOnly


@pytest.mark.parametrize("activation", [nn.Tanh, ReverseOnly])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_derivatives_are_those_of_reverse_mode(activation, chunk, monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 2), activation()), torch.randn(4, 3)
    chain = chain_of(model, x, forward=False)
    monkeypatch.setattr(type(chain), "chunk", chunk)
    first, second = jacobians(chain)
    h = model[1](model[0](x)).detach()
    for i in range(4):
        assert torch.allclose(first[i], torch.autograd.functional.jacobian(lambda x: model[1](model[0](x)), x[i]))
        assert torch.allclose(second[i], torch.autograd.functional.jacobian(lambda h: model[3](model[2](h)), h[i]))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_norms_of_products_need_no_range(scale):
    J = [scale * torch.randn(2, n, m) for m, n in ((3, 5), (5, 2), (2, 4))]
    logs = log_norms_of_products(J)
    for k in range(3):
        product = torch.eye(J[k].shape[2])
        for l in range(k, 3):
            product = J[l] / scale @ product
            expected = torch.linalg.matrix_norm(product, 2).log().numpy() + (l + 1 - k) * math.log(scale)
            assert logs[:, l + 1, k] == pytest.approx(expected, rel=1e-13, abs=1e-12)


def test_what_is_not_finite_stays_where_it_is():
    J = [torch.eye(2)[None].repeat(2, 1, 1) for _ in range(2)]
    J[0][1, 0, 0] = math.inf
    J[1][0] = 0.0
    logs = log_norms_of_products(J)
    assert logs[0].tolist()[1:][0][0] == 0.0
    assert (logs[0, 2, 0], logs[0, 2, 1]) == (-math.inf, -math.inf)
    assert np.isnan(logs[1, 1, 0])
    assert np.isnan(logs[1, 2, 0])
    assert logs[1, 2, 1] == 0.0


def test_triangular_factors_keep_the_determinant_and_small_exponents():
    J = [torch.randn(3, 4, 4) for _ in range(30)]
    logs = log_diagonals(J)
    assert logs.shape == (3, 30, 4)
    determinants = torch.stack([torch.linalg.slogdet(j)[1] for j in J], 1).numpy()
    assert logs.sum(2) == pytest.approx(determinants, abs=1e-10)
    rates = torch.tensor([math.log(4.0), 0.0, -math.log(4.0)])
    Q = torch.linalg.qr(torch.randn(3, 3))[0]
    steady = [(Q @ torch.diag(rates.exp()) @ Q.T)[None]] * 80
    assert log_diagonals(steady)[0, 40:].mean(0) == pytest.approx(rates.numpy(), abs=1e-10)
    assert log_diagonals([torch.randn(1, 5, 3), torch.randn(1, 2, 5)]).shape == (1, 2, 2)
