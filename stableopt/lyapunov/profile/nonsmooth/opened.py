"""The fractional form of any model at one sample, by automatic differentiation: its piecewise-linear functions are opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stableopt.lyapunov.layers.kinks import kink_distance
from stableopt.lyapunov.layers.walk import eager, floating
from stableopt.lyapunov.profile.finite.ground import has_kinks
from stableopt.lyapunov.profile.nonsmooth.fractional import Block, Fractional
from stableopt.lyapunov.profile.nonsmooth.slopes import FUNCTIONS, Pieces, slopes_of
from stableopt.lyapunov.undisturbed import undisturbed

__all__ = ["Opened", "Opening", "distances_of", "opened"]


@dataclass(frozen=True)
class Opening:
    """One call of a piecewise-linear function.

    Args:
        name: path of the module that calls it, with the number of the call there from the second one on.
        z: its input, with a graph.
        added: zeros that are added to its output.
        lower: smallest slopes.
        upper: largest ones.
        chosen: those of automatic differentiation.
    """

    name: str
    z: Tensor
    added: Tensor
    lower: Tensor
    upper: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Opened:
    """What a model is at one sample.

    Args:
        form: without a bound of its rounding.
        openings: in the order of the calls.
    """

    form: Fractional
    openings: tuple[Opening, ...]


class _Openings(TorchFunctionMode):
    """Replace each piecewise-linear function of what depends on the input by its tangent at the middle of its slopes."""

    def __init__(self, reach: float, distances: list[float] | None) -> None:
        super().__init__()
        self.path: list[str] = []
        self.left: list[str] = []
        self.found: list[Opening] = []
        self.sizes: list[float] = []
        self._reach, self._distances = reach, distances
        self._names: dict[str, int] = {}

    def leave(self) -> None:
        """Go back to the module outside."""
        self.path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        z = args[0] if args else kwargs.get("input")
        if not isinstance(z, Tensor) or not z.requires_grad or not (func in FUNCTIONS or has_kinks(func, args, kwargs)):
            return func(*args, **kwargs)
        rest, options = args[1:], {k: v for k, v in kwargs.items() if k not in {"input", "inplace"}}
        pieces = FUNCTIONS[func](z, *rest, **options) if func in FUNCTIONS else None
        if pieces is None:
            self.left.append(getattr(func, "__name__", str(func)))
            return func(*args, **kwargs)
        return self._open(lambda y: func(y, *rest, **options), z, pieces)

    def _open(self, function: Any, z: Tensor, pieces: Pieces) -> Tensor:
        path = self.path[-1] if self.path else ""
        self._names[path] = count = self._names.get(path, 0) + 1
        size = float(torch.linalg.vector_norm(z.detach().double())) / math.sqrt(max(1, z.numel()))
        distance = self._reach * size if self._distances is None else self._distances[len(self.found)]
        self.sizes.append(self._reach * size)
        lower, upper = pieces.interval(z, distance)
        added = torch.zeros_like(z, requires_grad=True)
        middle = ((lower + upper) / 2).to(z)
        name = path if count == 1 else f"{path}#{count}"
        self.found.append(Opening(name, z, added, lower, upper, slopes_of(function, z)))
        return function(z.detach().clone()) + middle * (z - z.detach()) + added


@contextmanager
def _paths(model: nn.Module, mode: _Openings) -> Iterator[None]:
    with ExitStack() as stack:
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, path=path: mode.path.append(path))
            after = module.register_forward_hook(lambda *_: mode.leave())
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _evaluate(model: nn.Module, x: Tensor, mode: _Openings) -> tuple[Tensor, Tensor]:
    fixed = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    with eager(), undisturbed(model), torch.enable_grad(), _paths(model, mode):
        leaf = x.detach().clone().requires_grad_()
        with mode:
            output = torch.func.functional_call(model, fixed, (leaf,))
        found = floating(output)
        if not found:
            raise ValueError("the model returns no floating-point tensor.")
        return leaf, found[0]


def distances_of(model: nn.Module, x: Tensor, reach: float) -> tuple[list[float], dict[str, float], tuple[str, ...]]:
    """Look at a whole batch.

    Args:
        model: in evaluation mode.
        x: the batch.
        reach: relative distance to a kink.

    Returns:
        The distance for each call, the share of its units that it leaves undecided, and the names of other kinks.
    """
    mode = _Openings(reach, None)
    _evaluate(model, x, mode)
    shares = {o.name: float((o.lower < o.upper).double().mean()) for o in mode.found}
    known = kink_distance.dispatch(object)
    modules = [type(m).__name__ for m in model.modules() if kink_distance.dispatch(type(m)) is not known]
    others = [name for name in modules if name != "Abs"]
    return mode.sizes, shares, tuple(dict.fromkeys([*mode.left, *others]))


def opened(model: nn.Module, x: Tensor, distances: list[float]) -> Opened:
    """Return the form of a model at a sample.

    Args:
        model: in evaluation mode.
        x: one sample, as a batch.
        distances: within which a kink leaves units of each call undecided.

    Raises:
        ValueError: if the model calls other functions for one sample than for a batch.
    """
    mode = _Openings(0.0, distances)
    leaf, output = _evaluate(model, x, mode)
    if len(mode.found) != len(distances):
        raise ValueError("the model calls other functions for one sample than for a batch.")
    units = [torch.nonzero((o.lower < o.upper).reshape(-1)).reshape(-1) for o in mode.found]
    rows = [output.reshape(-1), *(o.z.reshape(-1)[u] for o, u in zip(mode.found, units, strict=True))]
    sources = [leaf, *(o.added for o in mode.found)]
    table = []
    for row in torch.cat([r.to(torch.float64) for r in rows]):
        given = torch.autograd.grad(row, sources, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, given, strict=True)]
        picked = [p.reshape(-1)[u] for p, u in zip(parts[1:], units, strict=True)]
        table.append(torch.cat([parts[0].reshape(-1), *picked]).double().cpu())
    J, m, n = torch.stack(table).numpy(), output.numel(), leaf.numel()
    blocks: list[Block] = []
    for opening, places in zip(mode.found, units, strict=True):
        for u in places.tolist():
            low, high, chosen = (float(t.reshape(-1)[u]) for t in (opening.lower, opening.upper, opening.chosen))
            options = np.array([low, high]).reshape(2, 1, 1)
            blocks.append(Block((len(blocks),), options, np.array([[chosen]])))
    depth = sum(len(u) > 0 for u in units)
    form = Fractional(J[:m, :n], J[:m, n:], J[m:, n:], J[m:, :n], tuple(blocks), depth, math.inf)
    return Opened(form, tuple(mode.found))
