"""What a step costs: our optimizers beside torch's, on a dense network, with each mode of the guard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import stableopt as so
from tests.benchmarks.timing import device_name, medians, report


def stepper(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], device: str, width: int
) -> Callable[[], object]:
    """Return a function that does one step on one batch of 128."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    ).to(device)
    optimizer = make(list(model.parameters()))
    x, y = torch.randn(128, 256, device=device), torch.randint(10, (128,), device=device)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for width in (128, 1024):
        for name, base, ours in (
            (
                "SGD, momentum 0.9",
                lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
                lambda p, g: so.optim.SGD(p, 1e-3, momentum=0.9, guard=g),
            ),
            ("AdamW", lambda p: torch.optim.AdamW(p, 1e-4), lambda p, g: so.optim.AdamW(p, 1e-4, guard=g)),
        ):
            contenders = {"torch": stepper(base, device, width)}
            for guard in ("off", "monitor", "backtrack", "strict"):
                contenders[f"guard={guard}"] = stepper(lambda p, g=guard, ours=ours: ours(p, g), device, width)
            report(f"{name}, 256-{width}-{width}-10, batch 128, {device_name()}", medians(contenders), "torch")


if __name__ == "__main__":
    main()
