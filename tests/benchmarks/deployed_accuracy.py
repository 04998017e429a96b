"""Certified accuracy of the nets of :mod:`tests.benchmarks.certified`: of the exact network, and of what float32 computes.

Run ``python -m tests.benchmarks.deployed_accuracy digits`` or ``… mnist FILE``, with FILE an archive as ``stableopt train --data``
takes it. Each certificate is written to a folder and verified there by the stand-alone verifier in a process of its own.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from stableopt.certify import Certificate, certified_accuracy, certify, write_verifier
from stableopt.cli.data import Dataset, load_data
from stableopt.nn import GroupSort
from stableopt.nn.heads import UnitRowLinear
from tests.benchmarks.certified import limited, network, patch_net, train
from tests.benchmarks.timing import device_name


def verified_alone(certificate: Certificate) -> bool:
    """Return whether the stand-alone verifier accepts the files of a certificate."""
    with tempfile.TemporaryDirectory() as folder:
        certificate.save(folder)
        archive = write_verifier(Path(folder) / "verify_stableopt.pyz")
        done = subprocess.run(
            [sys.executable, "-I", str(archive), "model.cert.json"], cwd=folder, check=False, capture_output=True
        )
    return done.returncode == 0


def report(name: str, model: nn.Module, data: Dataset, radii: tuple[float, ...]) -> None:
    """Certify a net and print its figures, exact and deployed."""
    certificate = certify(model.eval(), data.shape)
    proof = "verified" if verified_alone(certificate) else "REJECTED"
    pair = (data.x_test, data.y_test)
    for runtime in (None, "float32"):
        found = certified_accuracy(certificate, pair, radii, runtime=runtime)
        cells = " | ".join(f"{100 * value:.2f}" for value in (found.clean, *found.certified))
        what = "exact" if runtime is None else runtime
        print(
            f"| {name} | {what} | {cells} | {found.median_radius:.4f} | {proof}, L = {certificate.lipschitz:.7f} |",
            flush=True,
        )


def main() -> None:
    """Train the nets and print the table."""
    torch.set_num_threads(1)
    kind = sys.argv[1] if len(sys.argv) > 1 else "digits"
    data = load_data("digits" if kind == "digits" else sys.argv[2])
    radii = (0.1, 0.25, 0.5) if kind == "digits" else (0.1, 0.3, 1.58)
    print(
        f"{data.name}; {device_name()}\n\n| net | arithmetic | accuracy | "
        + " | ".join(f"{r:g}" for r in radii)
        + " | median | |"
    )
    print("|---|---|---|" + "---|" * len(radii) + "---|---|")
    settings = (
        {"epochs": 40, "offset": 1.0, "batch": 64} if kind == "digits" else {"epochs": 3, "offset": 2.0, "batch": 256}
    )
    for method in ("cholesky", "bro"):
        torch.manual_seed(0)
        model = network(limited(method), UnitRowLinear, GroupSort, math.prod(data.shape), data.classes)
        train(model, data, temperature=8.0, lr=6e-3, seed=0, **settings)  # pyright: ignore[reportArgumentType]
        report(f"dense, {method}", model, data, radii)
    if kind != "digits":
        images = data.as_images()
        torch.manual_seed(0)
        model = patch_net(data.classes)
        train(model, images, epochs=4, temperature=8.0, offset=1.2, lr=0.01, batch=512, seed=0)
        report("convolutional, 4 epochs", model, images, radii)


if __name__ == "__main__":
    main()
