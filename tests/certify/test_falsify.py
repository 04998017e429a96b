"""Real attacks do not break a folded radius; they do break the naive one, and a certificate that claims too much."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.network import CertifiedNetwork
from stableopt.certify.program import Builder
from tests.certify.falsify import Claims, claims, deepfool, smallest_change

RUNTIMES = ("float32", "float16", "bfloat16")
SHIFTS = {"float32": 1e5, "float16": 1e3, "bfloat16": 1e3}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data: Any = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


@functools.cache
def trained(kind: str, steps: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    x, y = (part[:500] for part in digits())
    if kind == "linear":
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    elif kind == "mlp":
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
        )
    else:
        image = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        model = nn.Sequential(*image, nn.Flatten(), nn.Linear(128, 10))
    model.float()
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=1e-3)
    for _ in range(steps):
        loss = F.cross_entropy(model(x.view(-1, 1, 8, 8)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def certified(
    kind: str, *, shift: float = 0.0, inflated: float = 1.0, norm: str = "l2", dtype: torch.dtype = torch.float32
) -> Claims:
    graph = Builder((1, 8, 8), norm)
    value = graph.input
    for module in trained(kind):
        if isinstance(module, nn.Conv2d):
            fields: dict[str, Any] = {key: list(getattr(module, key)) for key in ("stride", "padding", "dilation")}
            fields |= {"dims": 2, "groups": 1, "padding_mode": "zeros", "transposed": False, "output_padding": [0, 0]}
            assert module.bias is not None
            value = graph.add("conv", value, weight=module.weight.to(dtype), bias=module.bias.to(dtype), **fields)
        elif isinstance(module, nn.Linear):
            bias: Tensor = module.bias + shift if module.out_features == 10 else module.bias
            value = graph.add("linear", value, weight=module.weight.to(dtype), bias=bias.to(dtype), transposed=False)
        elif isinstance(module, nn.Flatten):
            value = graph.add("reshape", value, shape=[value.shape[0] * 64 if value.shape[1] == 8 else 128])
        else:
            value = graph.add("activation", value, name="relu")
    return claims(graph, inflated=inflated)


def attack(claim: Claims, runtime: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest norms found, the folded radii and the naive ones."""
    torch.manual_seed(0)
    model = CertifiedModel(claim, runtime)
    exact = CertifiedNetwork(claim.program).double()
    answer = model.predict(x)

    def classify(z: Tensor) -> Tensor:
        return model.run(z).argmax(1)

    sizes, _ = smallest_change(classify, exact, x, torch.float32, claim.program.norm)
    assert claim.margin_constants is not None
    logits, constants = answer.logits, claim.margin_constants.to(answer.logits.dtype)
    naive = (logits.gather(1, answer.labels[:, None]) - logits) / constants[answer.labels]
    naive = naive.scatter(1, answer.labels[:, None], torch.inf).amin(1)
    return sizes, answer.radii, naive.double()


def near_the_boundary(claim: Claims, x: Tensor) -> Tensor:
    exact = CertifiedNetwork(claim.program).double()
    far = deepfool(exact, x.double(), overshoot=1e-4)
    share = torch.logspace(-1, -6, len(x), dtype=torch.float64).view(-1, 1, 1, 1)
    return (far + share * (x - far)).float()


def images(count: int) -> Tensor:
    return digits()[0][:count].view(-1, 1, 8, 8)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_no_folded_radius_is_broken(kind: str, runtime: str) -> None:
    claim, x = certified(kind), images(24)
    x = torch.cat([x, near_the_boundary(claim, x)])
    sizes, folded, _ = attack(claim, runtime, x)
    assert not bool((sizes < folded).any())
    assert int((folded > 0).sum()) >= 20  # it is not all zeros
    assert int(sizes.isfinite().sum()) >= 24  # and the attack does find other classes


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_shift_of_all_outputs_breaks_the_naive_radius_and_not_the_folded_one(runtime: str) -> None:
    claim, x = certified("mlp", shift=SHIFTS[runtime]), images(80)
    x = torch.cat([x, near_the_boundary(claim, x)])
    sizes, folded, naive = attack(claim, runtime, x)
    assert not bool((sizes < folded).any())
    assert int((sizes < naive).sum()) > 0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_certificate_that_claims_too_much_is_caught(runtime: str) -> None:
    x, dtype = (
        images(24),
        getattr(torch, runtime),
    )  # weights that the runtime does not round, so the claim is used as it is
    sizes, honest, _ = attack(certified("linear", dtype=dtype), runtime, x)
    assert not bool((sizes < honest).any())
    sizes, greedy, _ = attack(certified("linear", inflated=1.3, dtype=dtype), runtime, x)
    assert int((sizes < greedy).sum()) > 12


@pytest.mark.parametrize("runtime", ["float32", "bfloat16"])
def test_no_folded_radius_in_the_maximum_norm_is_broken(runtime: str) -> None:
    claim, x = certified("mlp", norm="linf"), images(24)
    sizes, folded, _ = attack(claim, runtime, x)
    assert not bool((sizes < folded).any())
    dtype = getattr(torch, runtime)
    sizes, greedy, _ = attack(certified("linear", norm="linf", inflated=1.3, dtype=dtype), runtime, x)
    assert int((sizes < greedy).sum()) > 6


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["float64", "tf32", *RUNTIMES])
@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
@pytest.mark.parametrize("shift", [0.0, 1e3, 1e5])
def test_no_folded_radius_is_broken_on_many_digits(kind: str, runtime: str, shift: float) -> None:
    claim, x = certified(kind, shift=shift), images(300)
    x = torch.cat([x, near_the_boundary(claim, x)])
    sizes, folded, _ = attack(claim, runtime, x)
    assert not bool((sizes < folded).any())
