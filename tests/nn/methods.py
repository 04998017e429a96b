"""Small models that are limited by each method: of matrices that are wide, tall and square, and of kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stableopt.nn import METHODS, GroupSort, stabilize
from stableopt.nn.slots import find_slots

LIMIT = 2.0


def dense() -> nn.Sequential:
    """Wide, tall and square matrices, most of them with an odd number of rows; nine inputs, two outputs."""
    return nn.Sequential(
        nn.Linear(9, 5), GroupSort(5), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.LeakyReLU(), nn.Linear(7, 2)
    )


def image() -> nn.Sequential:
    """Kernels that are read as 3 x 3 images of nine inputs; two outputs."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {"linear": dense, "conv": image}
_LAYERS: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(2, 2), "conv": lambda: nn.Conv2d(2, 2, 2)}


def norm_of(method: str) -> str:
    """A norm that a method can limit, l2 if it can."""
    return "l2" if "l2" in METHODS[method].norms else "linf"


@functools.cache
def takers(kind: str) -> frozenset[str]:
    """The methods for matrices or for kernels; the others refuse with a sentence."""
    found = set()
    for method in METHODS:
        with contextlib.suppress(ValueError):
            stabilize(_LAYERS[kind](), 1.0, method=method, norm=norm_of(method))  # type: ignore[arg-type]
            found.add(method)
    return frozenset(found)


def limited(method: str, kind: str = "linear", limit: float = LIMIT, **options: object) -> nn.Sequential:
    """The model of that kind, always with the same numbers; layers that the method refuses have the limit by Gram iteration."""
    torch.manual_seed(0)
    chosen = {one: method if method in takers(one) else "gram" for one in MODELS}
    return stabilize(MODELS[kind](), limit, method=chosen, norm=norm_of(method), **options)  # type: ignore[arg-type, return-value]


CASES = [(method, kind) for kind in MODELS for method in METHODS if method in takers(kind)]


def inputs(n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def assert_within(model: nn.Module, norm: str) -> None:
    """The limits are proved for the numbers of each weight in force."""
    from stableopt.nn.limits import limited_slots

    count = 0
    for slot, limit in limited_slots(model):
        for part in slot.matrices(slot.value):
            assert slot.geometry.proved(part, slot.matrix_norm(norm)).upper <= limit.radius, slot.key
        count += 1
    assert count == sum(1 for _ in find_slots(model))
