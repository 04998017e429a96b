"""Certify a small classifier, then try to break the certified radii and the certificate itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt as so


def main(steps: int = 300) -> dict[str, float]:
    """Train, certify, attack every test point at its certified radius, edit one byte; print what held."""
    digits, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(digits / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), so.nn.GroupSort(2), nn.Linear(64, 10))
    model = so.stabilize(net, lipschitz=1.0)
    loss_function = so.nn.MarginCrossEntropy(temperature=16.0, offset=0.3)
    optimizer = so.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        index = torch.randint(len(x), (128,))

        def closure(index: torch.Tensor = index) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_function(model(x[index]), y[index])
            loss.backward()
            return loss

        optimizer.step(closure)

    certificate = so.certify(model.eval(), input_shape=(64,), lipschitz=1.0)
    plain = certificate.module().double().eval()
    points = x.double()
    radii = certificate.radius(points)
    predicted = plain(points).argmax(1)
    attacked = points.clone().requires_grad_()
    for _ in range(20):  # projected gradient ascent on the runner-up's margin, inside the certified ball
        logits = plain(attacked)
        own = logits.gather(1, predicted[:, None])[:, 0]
        other = logits.scatter(1, predicted[:, None], -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad((other - own).sum(), attacked)
        move = attacked.detach() + 0.2 * radii[:, None] * nn.functional.normalize(gradient) - points
        shrink = (radii / move.norm(dim=1).clamp_min(1e-300)).clamp_max(1.0) * (1 - 1e-12)
        attacked = (points + shrink[:, None] * move).requires_grad_()
    broken = int((plain(attacked).argmax(1) != predicted).sum())

    with tempfile.TemporaryDirectory() as folder:
        certificate.save(folder)
        honest = so.verify(Path(folder) / "model.cert.json").verified
        weights = Path(folder) / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
        tampered = so.verify(Path(folder) / "model.cert.json").verified
    accuracy = float((predicted == y).double().mean())
    print(
        f"accuracy {accuracy:.3f}, proved bound {certificate.lipschitz:.9f}, median radius {float(radii.median()):.3f}"
    )
    print(
        f"points broken inside their radius: {broken} of {len(x)}; verified: {honest}; verified after one edited bit: {tampered}"
    )
    return {
        "accuracy": accuracy,
        "bound": certificate.lipschitz,
        "broken": broken,
        "honest": honest,
        "tampered": tampered,
    }


if __name__ == "__main__":
    main()
