"""Small architectures for the laws: every operation, every dtype."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from stableopt.nn import GradientBlock, GroupSort

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def activations() -> list[nn.Module]:
    return [
        nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-1.5), nn.Tanh(), nn.Sigmoid(), nn.ELU(1.3), nn.Softplus(2.0), nn.SiLU(),
        nn.GELU(), nn.Hardtanh(-0.5, 2.0), nn.ReLU6(), GroupSort(2), nn.Identity(), nn.Dropout(0.3),
    ]  # fmt: skip


def rich_model(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, tuple[int, ...]]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        GroupSort(2),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 4, 2, dilation=2, groups=2, padding=1, padding_mode="circular", bias=False),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2, 1),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 6)),
        GradientBlock(6, 8, strong=0.25, activation="leaky_relu"),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    return model.to(dtype), (2, 6, 6)


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        dims = draw(st.integers(1, 2))
        conv = nn.Conv1d if dims == 1 else nn.Conv2d
        channels, shape = 2, (2, *[8] * dims)
        for _ in range(draw(st.integers(1, 2))):
            mode = draw(st.sampled_from(["zeros", "circular"]))
            kernel = draw(st.sampled_from([1, 3]))
            out = draw(st.sampled_from([2, 4]))
            layers.append(conv(channels, out, kernel, stride=draw(st.integers(1, 2)), padding=kernel // 2, padding_mode=mode,
                               groups=draw(st.sampled_from([1, 2])), bias=draw(st.booleans())))  # fmt: skip
            layers.append(draw(st.sampled_from(activations())))
            channels = out
        if draw(st.booleans()):
            pools = [nn.AvgPool1d, nn.MaxPool1d] if dims == 1 else [nn.AvgPool2d, nn.MaxPool2d]
            layers.append(draw(st.sampled_from(pools))(2, draw(st.integers(1, 2)), draw(st.integers(0, 1))))
        layers.append((nn.AdaptiveAvgPool1d if dims == 1 else nn.AdaptiveAvgPool2d)(1))
        layers.append(nn.Flatten())
        width = channels
    else:
        width = draw(st.integers(1, 3)) * 2
        shape = (width,)
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            sigma = draw(st.sampled_from(["relu", "leaky_relu", "tanh", "softplus", "hardtanh"]))
            strong = draw(st.sampled_from([0.0, 0.5]))
            block = GradientBlock(width, draw(st.integers(1, 5)), strong=strong, activation=sigma)
            layers.append(block)
        else:
            wide = draw(st.integers(1, 3)) * 2
            layers += [nn.Linear(width, wide, bias=draw(st.booleans())), draw(st.sampled_from(activations()))]
            width = wide
    layers.append(nn.Linear(width, draw(st.integers(1, 4))))
    return nn.Sequential(*layers).to(draw(st.sampled_from(DTYPES))), shape
