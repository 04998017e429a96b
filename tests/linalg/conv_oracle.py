"""An independent oracle for convolution norms: torch's own layers applied to every unit image, and singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

LAYERS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}
KINDS = ("gauss", "positive", "smooth", "ones", "sparse", "rank one", "orthogonal center", "alternating")


@dataclass(frozen=True)
class Case:
    """One layer, one image size, one random kernel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    size: tuple[int, ...]
    groups: int = 1
    inside: int = 1
    outside: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    kind: str = "gauss"
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def geometry(self) -> dict[str, Any]:
        """The keyword arguments of ``conv_norm`` that describe the layer."""
        options: dict[str, Any] = {
            "stride": self.stride,
            "dilation": self.dilation,
            "padding": self.padding,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        if self.transposed:
            options |= {"transposed": True, "output_padding": self.output_padding or (0,) * len(self.kernel)}
        return options

    @property
    def weight(self) -> torch.Tensor:
        """The kernel in its own dtype."""
        return self.layer().weight.to(self.dtype)

    def layer(self) -> nn.Module:
        """Build the layer in float64 with the numbers of its own dtype, without bias."""
        options = {k: v for k, v in self.geometry.items() if k != "transposed"}
        kind = LAYERS[len(self.kernel), self.transposed]
        layer = kind(self.groups * self.inside, self.groups * self.outside, self.kernel, bias=False, **options)
        layer = layer.double().requires_grad_(False)
        layer.weight.copy_(kernel_of_kind(self.kind, tuple(layer.weight.shape), self.seed).to(self.dtype))
        return layer


def kernel_of_kind(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a kernel of one of the ``KINDS``."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    taps = shape[2:]
    if kind == "positive":
        return w.abs()
    if kind == "ones":
        return torch.ones_like(w)
    if kind == "sparse":
        return w * (torch.rand(shape, generator=generator, dtype=torch.float64) < 0.4)
    if kind == "rank one":
        return w[..., *(slice(0, 1) for _ in taps)] * torch.randn(taps, generator=generator, dtype=torch.float64)
    if kind == "smooth":  # what training makes of many kernels: one dominant low-pass part
        window = torch.ones(taps, dtype=torch.float64)
        for a, k in enumerate(taps):
            bump = torch.sin(math.pi * (torch.arange(k, dtype=torch.float64) + 1) / (k + 1))
            window = window * bump.reshape(-1, *(1 for _ in taps[a + 1 :]))
        return w[..., *(slice(0, 1) for _ in taps)] * window + 0.1 * w
    if kind == "orthogonal center":
        q = torch.linalg.qr(torch.randn(max(shape[:2]), max(shape[:2]), generator=generator, dtype=torch.float64))[0]
        out = torch.zeros_like(w)
        out[(..., *(k // 2 for k in taps))] = q[: shape[0], : shape[1]]
        return out + 0.01 * w
    if kind == "alternating":  # largest at the highest frequency
        signs = torch.ones(taps, dtype=torch.float64)
        for a, k in enumerate(taps):
            signs = signs * ((-1.0) ** torch.arange(k, dtype=torch.float64)).reshape(-1, *(1 for _ in taps[a + 1 :]))
        return w.abs() * signs
    return w


def operator_norm(case: Case) -> float:
    """The largest singular value of the dense operator, with the layer applied to one unit image per column."""
    layer = case.layer()
    channels = case.groups * case.inside
    basis = torch.eye(channels * math.prod(case.size), dtype=torch.float64).reshape(-1, channels, *case.size)
    columns = layer(basis).flatten(1)
    if not columns.numel():
        return 0.0
    return float(torch.linalg.svdvals(columns)[0])


@st.composite
def cases(draw: st.DrawFn, largest: int = 240) -> Case:
    """Draw a layer and an image that torch accepts, with at most ``largest`` numbers in the image and four times as many behind."""
    dims = draw(st.sampled_from((1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3)))
    transposed = draw(st.sampled_from((False, False, False, True)))
    mode = "zeros" if transposed else draw(st.sampled_from(("zeros", "circular", "reflect", "replicate")))
    taps = {1: (1, 2, 2, 3, 3, 3, 4, 5, 6), 2: (1, 2, 2, 3, 3, 4, 5), 3: (1, 2, 2, 3)}[dims]
    kernel = tuple(draw(st.sampled_from(taps)) for _ in range(dims))
    stride = tuple(draw(st.sampled_from((1, 1, 1, 2, 2, 3, 4))) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from((1, 1, 1, 2, 2, 3) if dims < 3 else (1, 1, 2))) for _ in range(dims))
    span = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding: tuple[int, ...] | str = tuple(draw(st.integers(0, 4 if dims < 3 else 2)) for _ in range(dims))
    if not transposed and draw(st.integers(0, 4)) == 0:
        padding = draw(st.sampled_from(("same", "valid")))
        stride = (1,) * dims if padding == "same" else stride
    before, after = (
        (span, span) if padding == "same" else ((0,) * dims,) * 2 if padding == "valid" else (padding, padding)
    )
    if padding == "same":
        before, after = [n // 2 for n in span], [n - n // 2 for n in span]
    wide = {"zeros": 0, "circular": 0, "reflect": 1, "replicate": -99}[mode]
    least = [1 if mode == "zeros" else max(a, b, 1 - wide) + wide for a, b in zip(before, after, strict=True)]
    if not transposed:
        least = [max(n, s + 1 - a - b, 1) for n, s, a, b in zip(least, span, before, after, strict=True)]
    room = {1: 30, 2: 6, 3: 2}[dims]
    size = tuple(max(n, 1) + draw(st.integers(0, room)) for n in least)
    assume(math.prod(size) <= largest)
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    groups = groups if groups * math.prod(size) <= largest else 1
    inside = draw(st.integers(1, min(3, largest // (groups * math.prod(size)))))
    extra = (
        tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)) if transposed else ()
    )
    case = Case(
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        size=size,
        groups=groups,
        inside=inside,
        outside=draw(st.integers(1, 3)),
        padding_mode=mode,
        transposed=transposed,
        output_padding=extra,
        kind=draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from((torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16))),
    )
    if transposed:
        rows = zip(size, stride, padding, span, extra, strict=True)
        ends = [(n - 1) * s - 2 * p + d + e + 1 for n, s, p, d, e in rows]
        assume(min(ends) > 0 and groups * case.outside * math.prod(ends) <= 4 * largest)
    else:
        rows = zip(size, before, after, span, stride, strict=True)
        assume(groups * case.outside * math.prod((n + a + b - d - 1) // s + 1 for n, a, b, d, s in rows) <= 4 * largest)
    return case
