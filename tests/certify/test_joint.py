"""Joint bounds against all patterns of slopes, and the proof of the verifier."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stableopt.certify import certify
from stableopt.certify.extract import extract
from stableopt.certify.joint import chain_bound, chain_gram, find_joint, multipliers, semidefinite
from stableopt.certify.publish import publish
from stableopt.certify.verifier.joint import _chain


def patterns(weights: list[Tensor]) -> list[Tensor]:
    """The derivatives for all slopes 0 or 1: every other one is a mean of them."""
    products = [weights[0]]
    for weight in weights[1:]:
        masks = [torch.tensor(mask) for mask in itertools.product((0.0, 1.0), repeat=weight.shape[1])]
        products = [weight @ (mask[:, None] * product) for product in products for mask in masks]
    return products


def chain(*sizes: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]


@pytest.mark.parametrize("sizes", [(3, 4, 2), (2, 3, 3, 2), (4, 1, 5), (1, 2, 2, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_lies_between_the_largest_derivative_and_the_product(sizes: tuple[int, ...], seed: int) -> None:
    weights = chain(*sizes, seed=seed)
    truth = max(float(torch.linalg.matrix_norm(p, 2)) for p in patterns(weights))
    product = math.prod(float(torch.linalg.matrix_norm(w, 2)) for w in weights)
    diagonals = multipliers(weights, steps=60)
    bound = chain_bound(weights, diagonals)
    assert truth <= bound <= product * (1 + 1e-5)
    gram = chain_gram(weights, diagonals)
    assert gram is not None
    for c in (torch.ones(sizes[-1]), torch.eye(sizes[-1])[0] - torch.eye(sizes[-1])[-1]):
        largest = max(float((c @ p).norm()) for p in patterns(weights))
        assert largest <= float(c.numpy() @ gram @ c.numpy()) ** 0.5 + 1e-12


def test_the_verifier_proves_the_bound_and_not_a_lower_one() -> None:
    weights = chain(4, 6, 5, 3)
    diagonals = multipliers(weights, steps=30)
    arrays, rows, bound = [w.numpy() for w in weights], [d.numpy() for d in diagonals], chain_bound(weights, diagonals)
    assert _chain(arrays, rows, Fraction(bound)) is not None
    assert _chain(arrays, rows, Fraction(bound * (1 - 1e-8))) is None
    assert _chain(arrays, [rows[0] * 1.0, rows[1] * 50.0], Fraction(bound)) is None


def test_the_start_alone_gives_the_product_at_most_and_the_search_improves_on_it() -> None:
    weights = chain(6, 12, 12, 4)
    product = math.prod(float(torch.linalg.matrix_norm(w, 2)) for w in weights)
    start, found = (chain_bound(weights, multipliers(weights, steps=steps)) for steps in (0, 40))
    assert found < 0.9 * start < product


def test_one_layer_alone_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="two matrices"):
        multipliers([torch.eye(2)])
    with pytest.raises(ValueError, match="multiplied"):
        multipliers([torch.eye(2), torch.eye(3)])


@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**60])
def test_semidefinite_is_decided_on_both_sides(scale: float) -> None:
    root = np.array([[2.0, 0.0], [1.0, 1e-3]]) * np.array([[1.0], [scale]])
    assert semidefinite(root @ root.T * (1 + 1e-9 * np.eye(2)))
    assert not semidefinite(root @ root.T - np.diag([1e-3, 0.0]))
    assert not semidefinite(np.diag([1.0, 0.0]))
    assert not semidefinite(np.diag([1.0, np.nan]))
    assert not semidefinite(np.diag([1.0, np.inf]))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 3.0])
def test_no_witness_proves_what_is_false(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    matrix = np.array([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]])
    monkeypatch.setattr(np.linalg, "cholesky", lambda m: factor * np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert not semidefinite(matrix)


def entries(*layers: nn.Module, norm: str = "l2") -> list[list[int]]:
    return [entry["nodes"] for entry in find_joint(publish(extract(nn.Sequential(*layers), (3,), norm)), steps=2)]


def dense(a: int = 3, b: int = 3) -> nn.Linear:
    layer = nn.Linear(a, b)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(b, a) * torch.logspace(0, 1, b)[:, None])
    return layer


def test_chains_are_found_up_to_the_first_operation_that_does_not_fit() -> None:
    torch.manual_seed(0)
    assert entries(dense(), nn.ReLU(), dense(), nn.Tanh(), dense()) == [[0, 1, 2, 3, 4]]
    assert entries(dense(), nn.LeakyReLU(0.5), dense()) == [[0, 1, 2]]
    assert entries(dense(), dense()) == [[0, 1]]
    assert entries(dense(), nn.LeakyReLU(1.5), dense()) == []
    assert entries(dense(), nn.GELU(), dense(), nn.ReLU(), dense()) == [[2, 3, 4]]
    assert entries(dense(), nn.ReLU()) == []
    assert entries(dense(), nn.ReLU(), dense(), norm="linf") == []


def test_the_norm_of_a_product_is_proved() -> None:
    torch.manual_seed(0)
    first, second = dense(), dense()
    cert = certify(nn.Sequential(first, second), (3,), joint=True)
    norm = float(torch.linalg.matrix_norm(second.weight.detach() @ first.weight.detach(), 2))
    assert norm <= cert.lipschitz <= norm * (1 + 1e-8)


def test_a_certificate_with_joint_bounds_is_tighter_and_its_margins_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    plain, joint = certify(model, (5,)), certify(model, (5,), joint=True)
    assert joint.lipschitz < 0.9 * plain.lipschitz
    assert joint.margin_constants is not None
    assert plain.margin_constants is not None
    assert (joint.margin_constants <= plain.margin_constants).all()
    assert joint.margin_constants[0, 1] < 0.9 * plain.margin_constants[0, 1]
    x, y = torch.randn(2, 2000, 5)
    outputs = (model(x) - model(y)).detach().norm(dim=1) / (x - y).norm(dim=1)
    assert outputs.max() <= joint.lipschitz
