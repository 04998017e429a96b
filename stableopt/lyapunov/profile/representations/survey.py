"""The chain of the layers of a model at one batch: found by a few evaluations that leave no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stableopt.lyapunov.layers.forward import dual_numbers, lacks_forward_mode
from stableopt.lyapunov.layers.trunk import Trunk, find_trunk
from stableopt.lyapunov.layers.walk import ProbeError, Walk
from stableopt.lyapunov.profile.representations.cuts import Chain
from stableopt.lyapunov.profile.representations.inside import plain_kernels, private_buffers
from stableopt.lyapunov.profile.representations.shapes import Survey, base_of, look_apart
from stableopt.optim import RandomState

__all__ = ["INPUT", "as_probe", "chain_of", "in_forward_mode"]

T = TypeVar("T")

INPUT = "input"
"""The name of the representation that a model begins with."""


def as_probe(model: nn.Module, probe: Any) -> Callable[[], float]:
    """Return a function that evaluates a model, out of one or out of inputs.

    Args:
        model: the model.
        probe: a function without arguments that calls the model, and may make a loss of the outputs; or what the model is called
            with: a tensor, a tuple of arguments, or a mapping of named ones.

    Examples:
        >>> import torch
        >>> as_probe(nn.Identity(), torch.ones(1))()
        0.0
    """

    def evaluate() -> float:
        if isinstance(probe, Mapping):
            model(**probe)
        elif isinstance(probe, tuple | list):
            model(*probe)
        elif isinstance(probe, Tensor):
            model(probe)
        else:
            probe()
        return 0.0

    return evaluate


def chain_of(
    model: nn.Module,
    probe: Any,
    layers: Sequence[str] | None = None,
    *,
    one_by_one: bool = True,
    search: bool = True,
    forward: bool = True,
) -> Chain:
    """Find the layers of a model, the shapes of its representations, and whether samples of the batch depend on each other.

    Args:
        model: the model.
        probe: as for :func:`as_probe`.
        layers: names of calls at which the layers are to begin, in order, the first one at the input; None for all on the trunk
            (:class:`stableopt.lyapunov.layers.trunk.Trunk`).
        one_by_one: look at the samples one by one where they do not depend on each other.
        search: whether given layers are compared with the trunk.
        forward: raise an error if an operation has no derivative in forward mode; else the chain says so.

    Returns:
        The chain. The first dimension of a representation has to be the batch for samples to be looked at one by one.

    Raises:
        ProbeError: if the probe does not call the model, or the output does not depend on the input.
        ValueError: if a layer is not on the trunk.
        NotImplementedError: if an operation has no derivative in forward mode, also where fused ones are taken apart.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> chain = chain_of(model, torch.ones(4, 2))
        >>> [cut.name for cut in chain.cuts], chain.samples, chain.widths
        (['input', '0', '2'], 4, (2, 3, 1))
    """
    evaluate, start, path = as_probe(model, probe), RandomState.capture(), ()
    if layers is None or search:
        trunk = _trunk(model, evaluate, start)
        path, chosen = trunk.modules, trunk.layers if layers is None else tuple(layers)
        strange = [name for name in chosen if name not in trunk.layers]
        if strange or chosen != tuple(name for name in trunk.layers if name in chosen) or not chosen:
            raise ValueError(f"layers must be some of {list(trunk.layers)}, in this order, got {list(chosen)}.")
        chosen = (trunk.layers[0], *(name for name in chosen if name != trunk.layers[0]))
    else:
        chosen = tuple(layers)
    names = (INPUT, *(name or type(model).__name__ for name in chosen))
    survey, others = Survey(chosen, names), _Called(model)
    with others, private_buffers(model):
        plain = _look(model, evaluate, survey, start, forward=forward)
    cuts = survey.found()
    modules = nn.ModuleList([model, *others.found])
    chain = Chain(model, evaluate, chosen, cuts, start, modules, bool(plain), plain is not None, path=path)
    chain.base = base_of(chain)
    chain.passes.forward, chain.passes.tangents = 2, 1
    if not chain.agrees(survey.rows()):
        raise NotImplementedError(
            "the model computes something else with dual numbers than without: it draws other random numbers"
        )
    if one_by_one:
        look_apart(chain)
    return chain


def _look(
    model: nn.Module, evaluate: Callable[[], float], survey: Survey, start: RandomState, *, forward: bool
) -> bool | None:
    """Return whether plain kernels are needed for derivatives in forward mode; None if they do not suffice."""
    for plain in (False, True):
        with warnings.catch_warnings(), plain_kernels() if plain else nullcontext():
            warnings.simplefilter("ignore")
            try:
                in_forward_mode(Walk(model, evaluate, survey).run, start)
            except NotImplementedError:
                if plain and forward:
                    raise
            else:
                return plain
    for moved in (True, False):
        survey.compare(moved=moved)
        Walk(model, evaluate, survey).run(start)
    return None


def in_forward_mode(evaluate: Callable[..., T], *args: Any) -> T:
    """Return what a function returns with dual numbers allowed.

    Args:
        evaluate: the function.
        args: what it gets.

    Raises:
        NotImplementedError: if an operation has no derivative in forward mode.

    Examples:
        >>> in_forward_mode(max, 1, 2)
        2
    """
    try:
        with dual_numbers():
            return evaluate(*args)
    except RuntimeError as error:
        if lacks_forward_mode(error):
            raise NotImplementedError(str(error).partition("\n")[0]) from error
        raise


class _Called:
    """Modules outside of a model that are called and have buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._inside = {id(m) for m in model.modules()}
        self.found: list[nn.Module] = []

    def __enter__(self) -> None:
        self._handle = register_module_forward_pre_hook(self._see)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _see(self, module: nn.Module, _: Any) -> None:
        if id(module) not in self._inside and next(module.buffers(), None) is not None:
            self._inside.update(id(m) for m in module.modules())
            self.found.append(module)


def _trunk(model: nn.Module, evaluate: Callable[[], float], start: RandomState) -> Trunk:
    try:
        with private_buffers(model):
            return find_trunk(model, evaluate, start)
    except ProbeError:
        raise
    except Exception:  # the operations cannot be recorded: the whole model counts as one layer
        return Trunk(("",))
