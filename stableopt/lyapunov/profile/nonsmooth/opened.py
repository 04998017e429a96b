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
from torch.utils._pytree import tree_leaves

from stableopt.lyapunov.layers.kinked import options_of
from stableopt.lyapunov.layers.kinks import kink_distance
from stableopt.lyapunov.layers.walk import eager, floating
from stableopt.lyapunov.profile.nonsmooth.fractional import Block, Fractional
from stableopt.lyapunov.profile.nonsmooth.slopes import FUNCTIONS, Pieces, slopes_of
from stableopt.lyapunov.profile.nonsmooth.smooth import Watch
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


_ESCAPES = frozenset(
    {"tolist", "numpy", "__array__", "__dlpack__", "register_hook", "register_post_accumulate_grad_hook"}
)
"""Methods that let numbers out of torch, or change a derivative on its way back."""


class _Openings(TorchFunctionMode):
    """Replace each piecewise-linear function of what depends on the input by its tangent at the middle of its slopes."""

    def __init__(self, watch: Watch, reach: float, distances: list[float] | None) -> None:
        super().__init__()
        self.path: list[str] = []
        self.found: list[Opening] = []
        self.sizes: list[float] = []
        self._watch, self._reach, self._distances = watch, reach, distances
        self._names: dict[str, int] = {}

    def leave(self) -> None:
        """Go back to the module outside."""
        self.path.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, watch = kwargs or {}, self._watch
        z = args[0] if args else kwargs.get("input")
        known = func in FUNCTIONS and isinstance(z, Tensor) and z.is_floating_point()
        if known and z.requires_grad and torch.is_grad_enabled():
            rest, options = args[1:], options_of(kwargs)
            pieces = FUNCTIONS[func](z, *rest, **options)
            if pieces is not None:
                return self._opened(lambda y: func(y, *rest, **options), z, pieces, in_place=_in_place(func, kwargs))
        watch.called = name = _name(func)
        try:
            result = func(*args, **kwargs)
        finally:
            watch.called = ""
        used = any(isinstance(t, Tensor) and watch.follows(t) for t in tree_leaves((args, kwargs)))
        if used and (name in _ESCAPES or any(map(self._is_cut_off, tree_leaves(result)))):
            watch.leave(name)
        return result

    def _is_cut_off(self, result: Any) -> bool:
        """Whether a result depends on the input, and automatic differentiation does not know."""
        numbers = isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())
        return numbers and not result.requires_grad and self._watch.follows(result)

    def _opened(self, function: Any, z: Tensor, pieces: Pieces, *, in_place: bool) -> Tensor:
        self._watch.paused = True
        try:
            kept = z.clone() if in_place else z
            result = self._open(function, kept, pieces)
            if in_place and not z.is_leaf:  # what else holds the tensor sees the change
                result = z.copy_(result)
        finally:
            self._watch.paused = False
        self._watch.follow(result)
        return result

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


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name in {"__get__", "__set__"}:  # of an attribute
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name if name in _ESCAPES else name.strip("_") or name


def _in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("inplace")) or getattr(func, "__name__", "").endswith("_")


@contextmanager
def _paths(model: nn.Module, mode: _Openings) -> Iterator[None]:
    with ExitStack() as stack:
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, path=path: mode.path.append(path))
            after = module.register_forward_hook(lambda *_: mode.leave())
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _evaluate(
    model: nn.Module, x: Tensor, reach: float, distances: list[float] | None
) -> tuple[Tensor, Tensor, _Openings, list[str]]:
    fixed = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    leaf = x.detach().clone().requires_grad_()
    watch = Watch(leaf, reach)
    mode = _Openings(watch, reach, distances)
    with eager(), undisturbed(model), torch.enable_grad(), _paths(model, mode):
        with watch, mode:
            output = torch.func.functional_call(model, fixed, (leaf,))
        found = floating(output)
        if not found:
            raise ValueError("the model returns no floating-point tensor.")
        return leaf, found[0], mode, watch.left


def distances_of(model: nn.Module, x: Tensor, reach: float) -> tuple[list[float], dict[str, float], tuple[str, ...]]:
    """Look at a whole batch.

    Args:
        model: in evaluation mode.
        x: the batch.
        reach: relative distance to a kink.

    Returns:
        The distance for each call, the share of its units that it leaves undecided, and the names of all else that is not known to
        be smooth.
    """
    _, _, mode, left = _evaluate(model, x, reach, None)
    shares = {o.name: float((o.lower < o.upper).double().mean()) for o in mode.found}
    known = kink_distance.dispatch(object)
    modules = [type(m).__name__ for m in model.modules() if kink_distance.dispatch(type(m)) is not known]
    others = [name for name in modules if name != "Abs"]
    hooked = any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())  # noqa: SLF001 no other way to see them
    return mode.sizes, shares, tuple(dict.fromkeys([*left, *others, *["backward hook"] * hooked]))


def opened(model: nn.Module, x: Tensor, distances: list[float]) -> Opened:
    """Return the form of a model at a sample.

    Args:
        model: in evaluation mode.
        x: one sample, as a batch.
        distances: within which a kink leaves units of each call undecided.

    Raises:
        ValueError: if the model calls other functions for one sample than for a batch.
    """
    leaf, output, mode, _ = _evaluate(model, x, 0.0, distances)
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
