r"""Time and tightness of certificates beside eclipse-nn, LipSDP by an SDP solver, and products of SVD norms.

    python -m tests.benchmarks.certificate_speed [--peers PYTHON] [--nets mlp,conv,resnet]

One core. ``--peers`` is the interpreter of an environment with torch, numpy, eclipse-nn, cvxpy and scs; it gets the dense weights
in a file and prints its own numbers. The product of SVD norms takes the norm of the *reshaped* kernels of convolutions, as
``torch.nn.utils.spectral_norm`` does: that is not a bound, and is marked so.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from stableopt.certify import certify, verifier

Row = tuple[str, str, float, float]

_PEERS = """
import sys, time, torch, numpy as np
torch.set_num_threads(1)
weights = [w.double() for w in torch.load(sys.argv[1], weights_only=True)]
def report(name, run):
    start = time.perf_counter()
    try:
        value = float(run())
    except Exception as error:
        print(name, 'nan', 'nan', type(error).__name__, file=sys.stderr); return
    print(name, time.perf_counter() - start, value)
def net():
    layers = []
    for w in weights:
        layer = torch.nn.Linear(w.shape[1], w.shape[0]); layer.weight.data = w.float(); layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])
def eclipse(fast):
    import eclipse_nn
    from eclipse_nn.LipConstEstimator import LipConstEstimator
    return LipConstEstimator(model=net()).estimate(method='ECLipsE_Fast' if fast else 'ECLipsE')
def lipsdp():
    import cvxpy as cp
    sizes = [weights[0].shape[1]] + [len(w) for w in weights[:-1]]
    rho, lams = cp.Variable(nonneg=True), [cp.Variable(len(w), nonneg=True) for w in weights[:-1]]
    rows = [[np.zeros((a, b)) for b in sizes] for a in sizes]
    rows[0][0] = rho * np.eye(sizes[0])
    for i, (w, lam) in enumerate(zip(weights[:-1], lams), start=1):
        off = -(cp.diag(lam) @ w.numpy()) / 2
        rows[i][i], rows[i][i - 1], rows[i - 1][i] = cp.diag(lam), off, off.T
    last = weights[-1].numpy()
    rows[-1][-1] = rows[-1][-1] - last.T @ last
    cp.Problem(cp.Minimize(rho), [cp.bmat(rows) >> 0]).solve(solver=cp.SCS, eps=1e-5, max_iters=20000)
    return rho.value ** 0.5
report('eclipse-nn_fast', lambda: eclipse(True))
report('eclipse-nn', lambda: eclipse(False))
if sum(w.shape[0] for w in weights) <= 200:
    report('LipSDP-neuron_(SCS)', lipsdp)
"""


class Residual(nn.Module):
    """A basic block of a ResNet: x + F(x), with a strided 1 x 1 convolution where the shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two branches."""
        return torch.relu(self.skip(x) + self.second(torch.relu(self.first(x))))


def small() -> tuple[nn.Module, tuple[int, ...]]:
    """A dense network that an SDP solver can do."""
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10)), (20,)


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """784 - 128 x 8 - 10."""
    layers: list[nn.Module] = []
    for a, b in zip([784, *[128] * 7], [128] * 8, strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10)), (784,)


def conv() -> tuple[nn.Module, tuple[int, ...]]:
    """A convolutional network of a million parameters for 3 x 32 x 32."""
    layers: list[nn.Module] = []
    for a, b, stride in ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 2)):
        layers += [nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)), (3, 32, 32)


def resnet() -> tuple[nn.Module, tuple[int, ...]]:
    """The sizes of a ResNet-18 for 3 x 32 x 32, normalisations folded."""
    blocks, inputs = list[nn.Module](), 64
    for outputs, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        blocks.append(Residual(inputs, outputs, stride))
        inputs = outputs
    stem = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)), (3, 32, 32)


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "small": small,
    "mlp": mlp,
    "conv": conv,
    "resnet": resnet,
}


def measure(name: str, peers: str | None) -> list[Row]:
    """Return a row (network, method, seconds, bound) for each method."""
    torch.manual_seed(0)
    model, shape = NETS[name]()
    rows = list[Row]()
    for joint in (False, True) if name in {"small", "mlp"} else (False,):
        certify(nn.Linear(2, 2), (2,))
        start = time.perf_counter()
        certificate = certify(model, shape, joint=joint)
        rows.append(
            (
                name,
                f"certify{' joint' if joint else ''} (verified inside)",
                time.perf_counter() - start,
                certificate.lipschitz,
            )
        )
        start = time.perf_counter()
        result = verifier.check(certificate.certificate, lambda _, c=certificate: c.weights)
        rows.append(
            (
                name,
                f"verify{' joint' if joint else ''} alone",
                time.perf_counter() - start,
                result.lipschitz or math.nan,
            )
        )
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if name != "resnet":  # of a network with branches the product is no bound at all
        start = time.perf_counter()
        product = math.prod(float(torch.linalg.matrix_norm(w.flatten(1).double(), 2)) for w in weights)
        unsound = " (reshaped kernels: no bound)" if name == "conv" else ""
        rows.append((name, f"product of SVD norms{unsound}", time.perf_counter() - start, product))
    if peers and name in {"small", "mlp"}:
        rows += _peer_rows(name, weights, peers)
    return rows


def _peer_rows(name: str, weights: list[Tensor], peers: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights.pt")
        torch.save(weights, file)
        done = subprocess.run(
            [peers, "-c", _PEERS, str(file)], capture_output=True, text=True, timeout=1200, check=False
        )
    sys.stderr.write(done.stderr[-2000:])
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, line[0].replace("_", " "), float(line[1]), float(line[2])) for line in lines if len(line) == 3]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers")
    parser.add_argument("--nets", default=",".join(NETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write("| network | method | seconds | bound |\n|---|---|---|---|\n")
    for name in options.nets.split(","):
        for network, method, seconds, bound in measure(name, options.peers):
            sys.stdout.write(f"| {network} | {method} | {seconds:.3f} | {bound:.6g} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
