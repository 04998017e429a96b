"""What the norm of a convolution costs: proved, differentiable, and estimated within a training step.

Run as ``python -m tests.benchmarks.conv_norms`` with ``OMP_NUM_THREADS=1``; ratios are taken within one run. *Exact* is the largest
singular value of the symbol on a grid four times as fine as that of the bound, refined around its maximum.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from stableopt.linalg import conv_norm, conv_power_start, conv_power_step, gram_conv_norm
from tests.benchmarks.timing import device_name, medians, report


def symbol(w: Tensor, omega: Tensor) -> Tensor:
    """The symbol at frequencies of shape (f, d)."""
    taps = torch.cartesian_prod(*(torch.arange(k, dtype=torch.float64) for k in w.shape[2:])).view(-1, w.ndim - 2)
    phase = torch.polar(torch.ones(len(omega), len(taps), dtype=torch.float64), omega @ taps.mT)
    return torch.einsum("oit,ft->foi", w.double().flatten(2).to(torch.complex128), phase)


def exact_norm(w: Tensor) -> float:
    """The supremum of the symbol of an undilated kernel with stride 1, to about seven digits."""
    axes = [torch.arange(1 if k == 1 else 8 * k, dtype=torch.float64) * 2 * math.pi / (8 * k) for k in w.shape[2:]]
    omega = torch.cartesian_prod(*axes).view(-1, len(axes))
    values = torch.cat([torch.linalg.matrix_norm(symbol(w, part), 2) for part in omega.split(64)])
    best, width = omega[values.topk(min(6, len(values))).indices], math.pi / 8
    largest = float(values.max())
    offsets = torch.cartesian_prod(*(torch.linspace(-1, 1, 5, dtype=torch.float64) for _ in axes)).view(-1, len(axes))
    while width > 1e-3:
        around = (best[:, None] + width * offsets).flatten(0, 1)
        values = torch.linalg.matrix_norm(symbol(w, around), 2)
        best, width = around[values.topk(3).indices], width / 2
        largest = max(largest, float(values.max()))
    return largest


def trained(w: Tensor) -> Tensor:
    """A kernel as training leaves it: a few strong smooth parts on top of noise."""
    window = torch.ones(w.shape[2:])
    for a, k in enumerate(w.shape[2:]):
        window = window * torch.hann_window(k + 2, periodic=False)[1:-1].reshape(-1, *(1 for _ in w.shape[3 + a :]))
    strong = torch.linalg.qr(torch.randn(w.shape[0], 4))[0] @ torch.linalg.qr(torch.randn(w.shape[1], 4))[0].mT
    return 0.2 * w / math.sqrt(w[0].numel()) + strong[..., *(None for _ in w.shape[2:])] * window


def proofs() -> None:
    """Print time and tightness of the bounds."""
    torch.manual_seed(0)
    print(f"\nbounds of the norm over all image sizes, {device_name()}; ms, and bound / exact")
    print(f"  {'kernel':<34s}{'proved':>18s}{'gram (forward + backward)':>30s}")
    for shape in (
        (64, 64, 3, 3),
        (32, 32, 3, 3),
        (64, 64, 5, 5),
        (64, 64, 1, 1),
        (128, 128, 3, 3),
        (64, 64, 9),
        (16, 16, 3, 3, 3),
    ):
        for name, make in (("random", lambda w: w), ("trained", trained)):
            w = make(torch.randn(shape))
            exact, differentiable = exact_norm(w), w.clone().requires_grad_()

            def backward(v: Tensor = differentiable) -> None:
                gram_conv_norm(v).backward()

            rounds = 7 if w.numel() < 40_000 else 3
            times = medians({"proved": lambda w=w: conv_norm(w), "gram": backward}, rounds, warm_up=1)
            ratios = conv_norm(w).upper / exact, float(gram_conv_norm(w)) / exact
            print(
                f"  {name + ' ' + 'x'.join(map(str, shape)):<34s}{1e3 * times['proved']:10.1f} {ratios[0]:7.4f}"
                f"{1e3 * times['gram']:22.1f} {ratios[1]:7.4f}"
            )
    w = torch.randn(64, 64, 3, 3)
    for options in (
        {"stride": 2},
        {"stride": 2, "dilation": 2},
        {"image_size": 16},
        {"image_size": 16, "padding": 1, "padding_mode": "circular"},
        {"image_size": 32, "padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate"},
    ):
        begun = time.perf_counter()
        bound = conv_norm(w, **options)  # type: ignore[arg-type]
        elapsed = 1e3 * (time.perf_counter() - begun)
        print(f"  random 64x64x3x3, {options}: {elapsed:.1f} ms, {bound.upper / exact_norm(w):.4f} x exact of stride 1")


class Power(nn.Module):
    """The kernel divided by its warm estimate, as a training step does it."""

    def __init__(self, weight: Tensor, **options: Any) -> None:
        super().__init__()
        self.options = options
        free = options.get("free", False)
        self.register_buffer("vectors", conv_power_start(weight, tracks=4 if free else None))

    def forward(self, weight: Tensor) -> Tensor:
        """Divide by the estimate."""
        estimate, self.vectors = conv_power_step(weight, self.vectors, **self.options)
        return weight / estimate


class Gram(nn.Module):
    """The kernel divided by its Gram bound."""

    def forward(self, weight: Tensor) -> Tensor:
        """Divide by the bound."""
        return weight / gram_conv_norm(weight)


def training_steps(channels: int, size: int = 16, batch: int = 32, steps: int = 60) -> None:
    """Print what a training step costs, and the norm of the normalized kernel over the steps."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(batch, channels, size, size)
    target = torch.randn(batch, channels, size, size)
    layers = {"plain Conv2d": plain}
    for name, kind in (
        ("torch spectral_norm (another norm)", None),
        ("power step", {}),
        ("power step x Riesz factor", {"riesz": True}),
        ("power step x Riesz factor, 4 free vectors", {"riesz": True, "free": True}),
        ("gram_conv_norm", "gram"),
    ):
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        layer.load_state_dict({k.removeprefix("parametrizations."): v for k, v in plain.state_dict().items()})
        if kind is None:
            nn.utils.parametrizations.spectral_norm(layer)
        else:
            parametrize.register_parametrization(
                layer, "weight", Gram() if kind == "gram" else Power(layer.weight.detach(), **kind)
            )
        layers[name] = layer
    norms: dict[str, list[float]] = {name: [] for name in layers}
    contenders = {}
    for name, layer in layers.items():
        optimizer = torch.optim.Adam(layer.parameters(), 1e-3)

        def step(layer: nn.Module = layer, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.mse_loss(layer(x.requires_grad_()), target).backward()
            optimizer.step()

        contenders[name] = step
    seconds = medians(contenders, rounds=steps)
    report(
        f"training step of Conv2d({channels}, {channels}, 3), batch {batch}, {size} x {size}, {device_name()}",
        seconds,
        "plain Conv2d",
    )
    print("  true norm of the weight that the next forward map uses, over 20 more steps: smallest, largest")
    for name, layer in layers.items():
        for _ in range(20):
            contenders[name]()
            norms[name].append(exact_norm(layer.weight.detach()))
        print(f"    {name:<44s}{min(norms[name]):8.4f}{max(norms[name]):8.4f}")


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    proofs()
    for channels in (32, 64):
        training_steps(channels)


if __name__ == "__main__":
    main()
