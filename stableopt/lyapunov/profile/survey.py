"""The chain of the layers of a model at one batch: found by a few evaluations that leave no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stableopt.lyapunov.layers.forward import dual_numbers, lacks_forward_mode
from stableopt.lyapunov.layers.trunk import Trunk, find_trunk
from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating
from stableopt.lyapunov.profile.cuts import Chain, Cut, at
from stableopt.lyapunov.profile.inside import plain_kernels, primal, private_buffers
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
    model: nn.Module, probe: Any, layers: Sequence[str] | None = None, *, one_by_one: bool = True, search: bool = True
) -> Chain:
    """Find the layers of a model, the shapes of its representations, and whether samples of the batch depend on each other.

    Args:
        model: the model.
        probe: as for :func:`as_probe`.
        layers: names of calls at which the layers are to begin, in order, the first one at the input; None for all on the trunk
            (:class:`stableopt.lyapunov.layers.trunk.Trunk`).
        one_by_one: look at the samples one by one where they do not depend on each other.
        search: whether given layers are compared with the trunk.

    Returns:
        The chain. The first dimension of a representation has to be the batch for samples to be looked at one by one.

    Raises:
        ProbeError: if the probe does not call the model, or the output does not depend on the input.
        ValueError: if a layer is not on the trunk.
        NotImplementedError: if an operation has no derivative in forward mode, also where fused ones are taken apart.

    Examples:
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
    survey, others, plain = _Survey(chosen, names), _Called(model), False
    for plain in (False, True):
        with others, private_buffers(model), warnings.catch_warnings(), plain_kernels() if plain else nullcontext():
            warnings.simplefilter("ignore")
            try:
                in_forward_mode(Walk(model, evaluate, survey).run, start)
            except NotImplementedError:
                if plain:
                    raise
            else:
                break
    if missing := [name for i, name in enumerate(chosen) if i not in survey.cuts]:
        raise ProbeError(f"the layer {missing[0]!r} was not called this time")
    cuts = tuple(survey.cuts[i] for i in range(len(names)))
    chain = Chain(model, evaluate, chosen, cuts, start, nn.ModuleList([model, *others.found]), plain, path=path)
    chain.base = _base(chain)
    chain.passes.forward, chain.passes.tangents = 2, 1
    if not chain.agrees(survey.rows()):
        raise NotImplementedError(
            "the model computes something else with dual numbers than without: it draws other random numbers"
        )
    if one_by_one:
        _look_apart(chain)
    return chain


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


class _Survey:
    """Records the shapes of the representations, with a perturbation of the input."""

    def __init__(self, layers: Sequence[str], names: Sequence[str]) -> None:
        self._index = {name: i for i, name in enumerate(layers) if i > 0}
        self._names = names
        self.start()

    def start(self) -> None:
        self.cuts: dict[int, Cut] = {}
        self._seen: dict[int, Tensor] = {}

    def rows(self) -> list[Tensor]:
        return [self._seen[index] for index in range(1, len(self._names))]

    def source(self, x: Tensor) -> Tensor:
        self.cuts[0] = Cut(self._names[0], (tuple(x.shape),), (0,), x.dtype, x.device)
        return fwd.make_dual(x.detach().clone(), torch.ones_like(x))  # random numbers are for the model

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._index:
            self._see(self._index[name], floating((args, kwargs)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None: ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        self._see(len(self._names) - 1, outputs)
        return [primal(y).clone() for y in outputs]

    def _see(self, index: int, tensors: list[Tensor]) -> None:
        places = [i for i, t in enumerate(tensors) if fwd.unpack_dual(t).tangent is not None]
        if not places:
            raise NotImplementedError("no tangent reached a representation")
        moved = [tensors[i] for i in places]
        shapes = tuple(tuple(t.shape) for t in moved)
        self.cuts[index] = cut = Cut(self._names[index], shapes, tuple(places), moved[0].dtype, moved[0].device)
        self._seen[index] = cut.rows([primal(t) for t in moved], 1).clone()


class _Base:
    """Records the representations themselves."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._index = {name: i for i, name in enumerate(chain.layers) if i > 0}
        self.start()

    def start(self) -> None:
        self.seen: list[Tensor] = []

    def source(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().reshape(1, -1).clone())
        return x.clone()  # the model may write into it

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._index:
            self._see(self._index[name], floating((args, kwargs)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None: ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        self._see(len(self._chain.layers), outputs)
        return outputs

    def _see(self, index: int, tensors: list[Tensor]) -> None:
        cut = self._chain.cuts[index]
        self.seen.append(cut.rows(at(cut, tensors), 1).detach().clone())


def _base(chain: Chain) -> tuple[Tensor, ...]:
    observer = _Base(chain)
    with chain.quiet(), private_buffers(chain.modules):
        Walk(chain.model, chain.probe, observer).run(chain.start)
    return tuple(observer.seen)


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


def _look_apart(chain: Chain) -> None:
    r"""Look at the samples one by one, if no tangent in one reaches another.

    Two different samples differ in a bit of their numbers: the samples that have it and those that have it not are perturbed in
    turn, at every cut, for every bit, and nothing may arrive at the others.
    """
    counts = {shape[0] if shape else 0 for cut in chain.cuts for shape in cut.shapes}
    if len(counts) > 1 or 0 in counts:
        chain.mixing = "the first dimension of the representations is not the same"
        return
    chain.samples = counts.pop()
    if chain.samples == 1:
        return
    device = chain.cuts[0].device
    numbers = torch.arange(chain.samples, device=device)
    bits = torch.stack([numbers >> bit & 1 for bit in range((chain.samples - 1).bit_length())])
    moved = torch.cat([bits, 1 - bits]).bool()  # (count, samples)
    generator = torch.Generator().manual_seed(0)
    seeds = {}
    for index, cut in enumerate(chain.cuts[:-1]):
        random = torch.randn(chain.samples, cut.numel // chain.samples, generator=generator, dtype=torch.float64)
        seeds[index] = torch.where(moved[:, :, None], random.to(device), 0.0).to(cut.dtype)
    arrived, _ = chain.push(seeds)
    for cut, found in zip(chain.cuts[1:], arrived, strict=True):
        if bool((found[~moved] != 0.0).any()):
            chain.samples, chain.mixing = 1, f"samples of the batch depend on each other in {cut.name!r}"
            return
