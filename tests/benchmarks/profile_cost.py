"""What a profile costs, in forward and backward passes of the training that it watches.

Two models on one thread: an MLP (399 thousand parameters, batch 128) and a small convolutional net with batch normalization
(batch 32), trained by SGD with momentum and by AdamW. In each round every contender takes one step of a training of its own.
``one pass`` is forward and backward without a step; the cost of a profile is what its step takes more than the plain step, over
that.

    python -m tests.benchmarks.profile_cost [--rounds 60]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableopt.lyapunov.profile.training import Profile
from tests.benchmarks.overhead import cnn, mlp
from tests.benchmarks.timing import device_name, medians

DIRECTIONS = (1, 4, 8)


def batch_of(kind: str) -> tuple[Tensor, Tensor]:
    """Return inputs and classes."""
    x = torch.randn(128, 256) if kind == "mlp" else torch.randn(32, 3, 32, 32)
    return x, torch.randint(0, 10, (len(x),))


def stepper(
    make: Callable[[], nn.Module], rule: str, batch: tuple[Tensor, Tensor], directions: int, method: str = "auto"
) -> Callable[[], object]:
    """Return a function that takes one step, with a profile if there are directions."""
    torch.manual_seed(0)
    model = make()
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if rule == "SGD"
        else torch.optim.AdamW(model.parameters(), lr=1e-4)
    )
    if directions:
        Profile(model, optimizer, directions=directions, method=method).attach()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def one_pass(make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """Return a function that does one forward and one backward pass."""
    torch.manual_seed(0)
    model = make()

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{device_name()}, medians of {rounds} interleaved rounds\n")
    print(
        "| model, optimizer | "
        + " | ".join(f"k = {k}, all (each)" for k in DIRECTIONS)
        + " | exact anew, k = 1 | forward over reverse, k = 1 |"
    )
    print("|---" * (len(DIRECTIONS) + 3) + "|")
    for kind, make in (("mlp", mlp), ("cnn", cnn)):
        batch = batch_of(kind)
        for rule in ("SGD", "AdamW"):
            contenders = {"pass": one_pass(make, batch), "plain": stepper(make, rule, batch, 0)}
            contenders |= {f"k{k}": stepper(make, rule, batch, k) for k in DIRECTIONS}
            contenders |= {method: stepper(make, rule, batch, 1, method) for method in ("exact", "forward")}
            seconds = medians(contenders, rounds, warm_up=5)

            def more(name: str, seconds: dict[str, float] = seconds) -> float:
                return (seconds[name] - seconds["plain"]) / seconds["pass"]

            cells = [f"{more(f'k{k}'):.2f} ({more(f'k{k}') / k:.2f})" for k in DIRECTIONS]
            print(
                f"| {kind}, {rule} | " + " | ".join([*cells, f"{more('exact'):.2f}", f"{more('forward'):.2f}"]) + " |"
            )


if __name__ == "__main__":
    main()
