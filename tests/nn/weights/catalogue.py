"""The cases of the laws of weight maps: every method with every geometry and norm that it does not refuse."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.nn.weights import METHODS, NORMS, Geometry, WeightMap

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LAYERS: dict[str, functools.partial[nn.Module]] = {
    "linear square": functools.partial(nn.Linear, 6, 6),
    "linear tall": functools.partial(nn.Linear, 4, 7),
    "linear wide": functools.partial(nn.Linear, 7, 3),
    "conv1d": functools.partial(nn.Conv1d, 2, 4, 3, padding=1),
    "conv1d circular": functools.partial(nn.Conv1d, 4, 4, 3, padding=1, padding_mode="circular"),
    "conv1d strided dilated": functools.partial(nn.Conv1d, 2, 3, 3, stride=2, dilation=2, padding=2),
    "conv2d": functools.partial(nn.Conv2d, 4, 4, 3, padding=1),
    "conv2d grouped": functools.partial(nn.Conv2d, 4, 4, 3, padding="same", groups=2),
    "conv2d even strided": functools.partial(nn.Conv2d, 3, 8, 2, stride=2),
    "conv2d reflect": functools.partial(nn.Conv2d, 2, 2, (3, 1), padding=(1, 0), padding_mode="reflect"),
    "conv3d": functools.partial(nn.Conv3d, 2, 2, 2),
    "transposed 1d": functools.partial(nn.ConvTranspose1d, 4, 2, 3, stride=2, padding=1, output_padding=1),
    "transposed 2d": functools.partial(nn.ConvTranspose2d, 4, 4, 2, groups=2),
    "transposed 3d": functools.partial(nn.ConvTranspose3d, 2, 2, 2, stride=2),
}
"""Layers of every kind that a geometry describes, small."""


def _for_matrices() -> Iterator[tuple[str, str]]:
    for name, method in METHODS.items():
        norm = "l2" if "l2" in method.norms else "linf"
        try:
            method(Geometry("linear"), 1.0, norm)
        except ValueError:
            continue
        yield name, norm


DENSE = dict(_for_matrices())
"""The methods for matrices, and the first norm that each of them limits."""


@dataclass(frozen=True)
class Case:
    """A method on a layer in a norm."""

    method: str
    layer: str
    norm: str

    def __str__(self) -> str:
        return f"{self.method}-{self.layer}-{self.norm}".replace(" ", "_")

    @property
    def by_construction(self) -> bool:
        return METHODS[self.method].by_construction

    def plain(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The layer without limit."""
        return LAYERS[self.layer]().to(dtype)

    def map(self, radius: float = 1.0) -> WeightMap:
        return METHODS[self.method](Geometry.of(self.plain()), radius, self.norm)

    def limited(
        self, radius: float = 1.0, dtype: torch.dtype = torch.float64, weight: Tensor | None = None
    ) -> nn.Module:
        """The layer with the limit, from a random weight."""
        layer = self.plain(dtype)
        layer.weight.data.copy_(torch.randn(layer.weight.shape) if weight is None else weight)
        P.register_parametrization(layer, "weight", self.map(radius))
        return layer


def map_of(layer: nn.Module) -> WeightMap:
    return layer.parametrizations.weight[0]


def originals(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that the weight is made of."""
    chain = layer.parametrizations.weight
    return [p for p in chain.parameters() if isinstance(p, nn.Parameter)]


def set_originals(layer: nn.Module, value: Tensor | float) -> None:
    with torch.no_grad():
        for original in originals(layer):
            original.copy_(torch.as_tensor(value, dtype=original.dtype))


def scale_originals(layer: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for original in originals(layer):
            original.mul_(factor)


def proved(layer: nn.Module, weight: Tensor | None = None) -> float:
    """The proved norm of the stored numbers of the weight in force."""
    limit = map_of(layer)
    with torch.no_grad():
        return limit.geometry.proved(layer.weight if weight is None else weight, limit.norm).upper


def _supported() -> Iterator[Case]:
    for method in METHODS:
        for layer in LAYERS:
            for norm in NORMS:
                case = Case(method, layer, norm)
                try:
                    case.limited()
                except ValueError as error:
                    if len(str(error)) < 20:
                        raise
                    continue
                yield case


@functools.cache
def cases() -> tuple[Case, ...]:
    """Every case that is not refused with a sentence."""
    return tuple(_supported())


@functools.cache
def few() -> tuple[Case, ...]:
    """For each method and norm the first layer of every kind that it supports: for the laws that take long."""
    chosen: dict[tuple[str, str, str], Case] = {}
    for case in cases():
        chosen.setdefault((case.method, case.norm, Geometry.of(case.plain()).kind), case)
    return tuple(chosen.values())


def operator_norm(layer: nn.Module, size: int = 6) -> float:
    """An oracle from below that knows no theory: the layer applied to every unit image of one size, and its l2 norm."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(weight.detach().double(), 2))
    channels, dims = layer.in_channels, weight.ndim - 2
    pixels = size if dims < 3 else 4
    basis = torch.eye(channels * pixels**dims, dtype=torch.float64).reshape(-1, channels, *(pixels,) * dims)
    with torch.no_grad():
        zero = torch.zeros_like(basis[:1])
        images = layer(basis.to(weight.dtype)) - layer(zero.to(weight.dtype))
    return float(torch.linalg.svdvals(images.double().flatten(1))[0])


def eps(dtype: torch.dtype) -> float:
    """The precision that a map computes in."""
    return torch.finfo(torch.float32 if dtype in {torch.float16, torch.bfloat16} else dtype).eps


def close(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, factor: float = 256.0) -> bool:
    """Whether two weights agree up to rounding."""
    kind = a.dtype if dtype is None else dtype
    tolerance = factor * torch.finfo(kind).eps * max(1.0, math.sqrt(a.numel()))
    return bool((a.double() - b.double()).abs().amax() <= tolerance * (1.0 + float(b.double().abs().amax())))
