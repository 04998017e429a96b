"""The trace by random signs: unbiased beside whatever is known, with the variance of what is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stableopt.lyapunov.hutchinson import orthonormal, random_signs, trace_beside
from stableopt.optim.curvature import Exact
from stableopt.optim.packing import Packing


def test_a_direction_that_is_there_twice_is_taken_out_once() -> None:
    H = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    u, v = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1e-9, 0.0])
    nothing = torch.zeros(3)
    basis = orthonormal([([x], [H @ x]) for x in (u, v, nothing, torch.ones(3))])
    assert len(basis) == 2
    for q, Hq in basis:
        torch.testing.assert_close(Hq[0], H @ q[0])
    assert abs(float(basis[0][0][0] @ basis[1][0][0])) < 1e-12


def test_signs_are_independent_and_the_same_whatever_holds_them() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.stack([random_signs(torch.zeros(3, 5), generator) for _ in range(4000)]).flatten(1)
    assert z.abs().unique().tolist() == [1.0]
    assert float((z.T @ z / len(z) - torch.eye(15)).abs().max()) < 0.08
    parts = [
        random_signs(torch.zeros(5, dtype=dtype), torch.Generator().manual_seed(2))
        for dtype in (torch.float16, torch.float64)
    ]
    assert torch.equal(parts[0].double(), parts[1])
    assert random_signs(torch.zeros(3, dtype=torch.complex64), generator).shape == (3, 2)


@pytest.mark.parametrize("count", [0, 3])
def test_the_trace_is_unbiased_with_the_variance_of_what_is_left(count: int) -> None:
    """Against Var z'Az = 2 (|A|^2 - sum of squares of the diagonal), for vectors that are no eigenvectors."""
    torch.manual_seed(0)
    n = 12
    A = torch.randn(n, n)
    H = A + A.T + 10.0 * torch.outer(torch.ones(n), torch.ones(n)) / n
    model = nn.ParameterList([nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))])
    parameters = list(model)

    def loss() -> Tensor:
        w = torch.cat(parameters)
        return 0.5 * w @ H @ w

    generator, packing = torch.Generator().manual_seed(0), Packing.of(parameters)
    directions = torch.randn(count, n) + torch.ones(n)
    known = orthonormal([([x], [H @ x]) for x in directions])
    Q = torch.stack([q[0] for q, _ in known]) if known else torch.zeros(0, n)
    P = torch.eye(n) - Q.T @ Q
    left = P @ H @ P
    with Exact(loss, parameters) as product:
        samples = torch.tensor([trace_beside(product, packing, known, generator) for _ in range(500)])
    variance = 2.0 * float(left.square().sum() - left.diag().square().sum())
    error = (variance / len(samples)) ** 0.5
    assert float(samples.mean()) + float((Q @ H @ Q.T).trace()) == pytest.approx(float(H.trace()), abs=4 * error)
    assert float(samples.var()) == pytest.approx(variance, rel=0.35)
