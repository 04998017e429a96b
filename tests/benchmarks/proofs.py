"""What a proof costs: the proved norm of a matrix beside the numerical one, and of all layers of a network."""

from __future__ import annotations

import numpy as np
import torch

from stableopt.linalg import conv_norm, spectral_norm
from tests.benchmarks.timing import medians, report


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for shape in ((64, 64), (784, 128), (512, 512), (1024, 1024)):
        A = rng.standard_normal(shape)
        rounds = 20 if A.size < 300_000 else 5
        report(
            f"norm of a {shape[0]} x {shape[1]} matrix",
            medians(
                {
                    "numpy.linalg.norm(A, 2), not proved": lambda A=A: np.linalg.norm(A, 2),
                    "spectral_norm, proved": lambda A=A: spectral_norm(A),
                },
                rounds,
            ),
            "numpy.linalg.norm(A, 2), not proved",
        )
    layers = [
        rng.standard_normal((128, 784)) / 20,
        *(rng.standard_normal((128, 128)) / 10 for _ in range(7)),
        rng.standard_normal((10, 128)),
    ]
    report(
        "all layers of a 784 x 128 (8 layers) x 10 network",
        medians({"spectral_norm, proved": lambda: [spectral_norm(A) for A in layers]}),
        "spectral_norm, proved",
    )
    kernel = rng.standard_normal((32, 32, 3, 3))
    report(
        "a 32 x 32 x 3 x 3 convolution, any image size",
        medians({"conv_norm, proved": lambda: conv_norm(kernel)}, 5),
        "conv_norm, proved",
    )


if __name__ == "__main__":
    main()
