"""One table of kinks: both of its levels speak of the same operations, and its numbers are those of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt.lyapunov.layers.kinked import KINKED, Kinked, functions_of, is_kinked, operations_of

ARGUMENTS = {
    "prelu": (torch.tensor([0.3]),), "threshold": (0.3, 0.3), "clamp": (-0.5, 0.5), "clamp_min": (0.5,), "clamp_max": (0.5,),
    "kthvalue": (1, 0), "topk": (1,), "cummax": (0,), "cummin": (0,), "maximum": (torch.zeros(4),), "minimum": (torch.zeros(4),),
    "fmax": (torch.zeros(4),), "fmin": (torch.zeros(4),), "fmod": (2.0,), "remainder": (2.0,), "floor_divide": (2.0,),
    "heaviside": (torch.ones(4),), "elu": (0.5,), "clip": (-0.5, 0.5),
}  # fmt: skip


def arguments(name: str) -> tuple:
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in ARGUMENTS.get(name, ()))


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kinked: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2].removesuffix("_")
        self.kinked |= {name} if is_kinked(name, args) else set()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "row", [row for row in KINKED if row.kind not in {"pool", "loss"}], ids=lambda r: str(r.functions)
)
def test_every_function_of_a_row_computes_something_kinked(row: Kinked) -> None:
    named = {f: name for f, other in functions_of(row.kind).items() if other is row for name in row.functions}
    assert named
    for function, name in named.items():
        args = arguments(name)
        with Names() as seen:
            function(torch.tensor([-1.0, 0.2, 0.6, 4.0]), *args)
        assert seen.kinked, function


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("pool", ["max_pool", "adaptive_max_pool"])
def test_pools_are_seen(pool: str, n: int) -> None:
    with Names() as seen:
        getattr(F, f"{pool}{n}d")(torch.ones(1, 1, *[4] * n), 2)
    assert seen.kinked


@pytest.mark.parametrize("row", [row for row in KINKED if row.slopes is not None], ids=lambda r: str(r.functions))
def test_places_and_slopes_are_those_that_torch_has(row: Kinked) -> None:
    args = arguments(row.functions[0])
    function = next(f for f, other in functions_of(row.kind).items() if other is row)
    assert row.places is not None
    assert row.slopes is not None
    z = torch.zeros(1)
    kinks, slopes = row.places(z, *args), row.slopes(z, *args)
    assert slopes is not None
    assert len(slopes) == len(kinks) + 1
    ends = [kinks[0] - 1.0, *kinks, kinks[-1] + 1.0]
    for i, slope in enumerate(slopes):
        middle = torch.tensor([(ends[i] + ends[i + 1]) / 2], requires_grad=True)
        (found,) = torch.autograd.grad(function(middle * 1.0, *args).sum(), middle)
        assert found.item() == pytest.approx(float(slope))


def test_clamps_without_one_line_of_pieces_have_none() -> None:
    row, z = functions_of()[torch.clamp], torch.zeros(1)
    assert row.slopes is not None
    assert row.slopes(z, 1.0, -1.0) is None
    assert row.slopes(z, torch.zeros(1)) is None
    assert row.slopes(z, -float("inf"), 2.0) == (1.0, 0.0)
    assert row.slopes(z, None, float("inf")) == (1.0,)


def test_what_is_smooth_is_not_in_it() -> None:
    with Names() as seen:
        for module in (nn.Tanh(), nn.GELU(), nn.ELU(), nn.Softplus(), nn.Softmax(0), nn.LayerNorm(4)):
            module(torch.ones(4))
    assert not seen.kinked
    with Names() as seen:
        F.selu(torch.ones(4))
    assert seen.kinked == {"elu"}
    assert operations_of("clamp") == {"clamp", "clamp_min", "clamp_max"}
    assert F.relu not in functions_of("clamp", "loss")
