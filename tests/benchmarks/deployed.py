"""What a runtime costs: radii of an 8-layer network on MNIST in every runtime beside those of exact arithmetic.

    python -m tests.benchmarks.deployed /path/to/mnist.npz [epochs]

The network is 784-128x8-10 with orthogonal layers and MaxMin, trained with a margin. The columns are the median loss of radius of
the samples with a radius, and the certified accuracy at several radii.
"""

from __future__ import annotations

import math
import sys
import time
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.program import Builder
from stableopt.certify.runtime import RUNTIMES
from stableopt.nn import MaxMin
from tests.certify.falsify import claims

SIZES = (784, *[128] * 8, 10)
EPS = (0.1, 0.3, 0.5, 1.0, 1.58)


def orthogonal(weight: Tensor) -> Tensor:
    """Two steps of Bjorck from rows of norm at most one."""
    rows = weight / weight.norm(dim=1).max()
    for _ in range(2):
        rows = 1.5 * rows - 0.5 * (rows @ rows.T) @ rows
    return rows


def weights_of(raw: list[nn.Parameter]) -> list[Tensor]:
    *hidden, last = raw
    return [*(orthogonal(w) for w in hidden), last / last.norm(dim=1, keepdim=True)]


def outputs(weights: list[Tensor], biases: list[nn.Parameter], x: Tensor) -> Tensor:
    order = MaxMin()
    for W, b in zip(weights[:-1], biases[:-1], strict=True):
        x = order(F.linear(x, W, b))
    return F.linear(x, weights[-1], biases[-1])


def train(x: Tensor, y: Tensor, epochs: int) -> tuple[list[Tensor], list[Tensor]]:
    raw = [nn.Parameter(nn.init.orthogonal_(torch.empty(b, a))) for a, b in pairwise(SIZES)]
    biases = [nn.Parameter(torch.zeros(b)) for b in SIZES[1:]]
    optimizer = torch.optim.Adam([*raw, *biases], 2e-3)
    steps = epochs * math.ceil(len(x) / 256)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 2.0 * (1.0 - n / steps)))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            z = outputs(weights_of(raw), biases, x[batch])
            loss = F.cross_entropy(8.0 * (z + 1.0 - F.one_hot(y[batch], 10)), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return weights_of(raw), list(biases)


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    data = np.load(sys.argv[1])
    epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    x, test = (torch.tensor(data[f"x_{part}"]).float().flatten(1) / 255 for part in ("train", "test"))
    y, labels = (torch.tensor(data[f"y_{part}"]).long() for part in ("train", "test"))
    weights, biases = train(x, y, epochs)
    graph = Builder((784,))
    value = graph.input
    for W, b in zip(weights, biases, strict=True):
        value = graph.add("linear", value, weight=W, bias=b, transposed=False)
        if len(b) > 10:
            value = graph.add("groupsort", value, group_size=2, axis=-1)
    claim, exact = claims(graph), None
    print(f"{'runtime':10s} {'median loss':>12s} " + " ".join(f"acc@{eps:<6}" for eps in EPS) + " ms/sample")
    for name in RUNTIMES:
        model = CertifiedModel(claim, name)
        start = time.perf_counter()
        answer = model.predict(test, labels)
        spent = time.perf_counter() - start
        exact = answer.radii if exact is None else exact
        sure = exact > 0
        loss = float((1.0 - answer.radii[sure] / exact[sure]).median())
        accuracies = " ".join(f"{float((answer.radii > eps).double().mean()):<10.4f}" for eps in EPS)
        print(f"{name:10s} {100 * loss:11.4f}% {accuracies} {1e3 * spent / len(test):.3f}")


if __name__ == "__main__":
    main()
