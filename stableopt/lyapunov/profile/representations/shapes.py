"""Which tensors the representations of a model are, what they hold, and whether the samples in them depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn

from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating
from stableopt.lyapunov.profile.representations.cuts import Chain, Cut, at
from stableopt.lyapunov.profile.representations.inside import primal, private_buffers
from stableopt.lyapunov.profile.representations.pull import Pull
from stableopt.optim import RandomState

__all__ = ["Survey", "base_of", "look_apart"]


class Survey:
    """Records the shapes of the representations, and which arguments of the calls belong to them: those that move with the input.

    Args:
        layers: names of the calls at which layers begin.
        names: of the representations.
    """

    def __init__(self, layers: Sequence[str], names: Sequence[str]) -> None:
        self._layers = layers
        self._index = {name: i for i, name in enumerate(layers) if i > 0}
        self._names = names
        self._differences = self._moved = False
        self._others: dict[int, list[Tensor]] = {}
        self.start()

    def compare(self, *, moved: bool) -> None:
        """Tell what moves by two evaluations without dual numbers.

        Args:
            moved: whether the next one is that with another input, the first of the two.
        """
        self._differences, self._moved = True, moved

    def found(self) -> tuple[Cut, ...]:
        """Return all representations.

        Raises:
            ProbeError: if a layer was not called.
        """
        if missing := [name for i, name in enumerate(self._layers) if i not in self.cuts]:
            raise ProbeError(f"the layer {missing[0]!r} was not called this time")
        return tuple(self.cuts[i] for i in range(len(self._names)))

    def rows(self) -> list[Tensor]:
        """Return what was seen at the cuts 1, 2, ..."""
        return [self._seen[index] for index in range(1, len(self._names))]

    def start(self) -> None:
        """Forget everything but the evaluation to compare with."""
        self.cuts: dict[int, Cut] = {}
        self._seen: dict[int, Tensor] = {}

    def source(self, x: Tensor) -> Tensor:
        """Perturb the input."""
        self.cuts[0] = Cut(self._names[0], (tuple(x.shape),), (0,), x.dtype, x.device)
        if self._differences:
            return x + (1e-2 * x.detach().abs().amax().clamp_min(1.0) if self._moved else 0.0)
        return fwd.make_dual(x.detach().clone(), torch.ones_like(x))  # random numbers are for the model

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See a representation."""
        if name in self._index:
            self._see(self._index[name], floating((args, kwargs)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """Do nothing."""

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        """See the output."""
        self._see(len(self._names) - 1, outputs)
        return [primal(y).clone() for y in outputs]

    def _see(self, index: int, tensors: list[Tensor]) -> None:
        if self._differences and self._moved:
            self._others[index] = [t.detach().clone() for t in tensors]
            return
        places = [i for i, t in enumerate(tensors) if self._moves(index, i, t)]
        if not places:
            raise NotImplementedError("no perturbation of the input reached a representation")
        moved = [tensors[i] for i in places]
        shapes = tuple(tuple(t.shape) for t in moved)
        self.cuts[index] = cut = Cut(self._names[index], shapes, tuple(places), moved[0].dtype, moved[0].device)
        self._seen[index] = cut.rows([primal(t) for t in moved], 1).clone()

    def _moves(self, index: int, place: int, tensor: Tensor) -> bool:
        if self._differences:
            others = self._others.get(index, [])
            return place < len(others) and not torch.equal(others[place], tensor)
        return fwd.unpack_dual(tensor).tangent is not None


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
        now, start = RandomState.capture(), self._chain.start
        numpy = now.numpy["state"], start.numpy["state"]
        same = [torch.equal(a, b) for a, b in zip((now.cpu, *now.cuda), (start.cpu, *start.cuda), strict=True)]
        same += [numpy[0]["pos"] == numpy[1]["pos"] and bool((numpy[0]["key"] == numpy[1]["key"]).all())]
        self._chain.draws = not (all(same) and now.python == start.python)
        return outputs

    def _see(self, index: int, tensors: list[Tensor]) -> None:
        cut = self._chain.cuts[index]
        self.seen.append(cut.rows(at(cut, tensors), 1).detach().clone())


def base_of(chain: Chain) -> tuple[Tensor, ...]:
    """Return the representations of a chain, each with all entries in one row.

    Args:
        chain: of which; is told whether random numbers were drawn.

    Examples:
        >>> from stableopt.lyapunov.profile.representations.survey import chain_of
        >>> [row.tolist() for row in base_of(chain_of(nn.ReLU(), torch.tensor([[1.0, -1.0]])))]
        [[[1.0, -1.0]], [[1.0, 0.0]]]
    """
    observer, chain.modes = _Base(chain), tuple(module.training for module in chain.modules.modules())
    with chain.quiet(), private_buffers(chain.modules):
        Walk(chain.model, chain.probe, observer).run(chain.start)
    return tuple(observer.seen)


def look_apart(chain: Chain) -> None:
    r"""Look at the samples one by one, if no tangent in one reaches another.

    Two different samples differ in a bit of their numbers: the samples that have it and those that have it not are perturbed in
    turn, at every cut, for every bit, and nothing may arrive at the others.

    Args:
        chain: gets ``samples`` and ``mixing``.

    Examples:
        >>> from stableopt.lyapunov.profile.representations.survey import chain_of
        >>> chain_of(nn.BatchNorm1d(2), torch.rand(4, 2)).samples, chain_of(nn.LayerNorm(2), torch.rand(4, 2)).samples
        (1, 4)
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
    for index, cut in enumerate(chain.cuts):
        random = torch.randn(chain.samples, cut.numel // chain.samples, generator=generator, dtype=torch.float64)
        seeds[index] = torch.where(moved[:, :, None], random.to(device), 0.0).to(cut.dtype)
    if chain.forward:
        arrived, _ = chain.push({k: seeds[k] for k in range(len(chain.layers))})
    else:
        pull = Pull(chain)
        arrived = [pull.back(layer, seeds[layer + 1]) for layer in range(len(chain.layers))]
    for cut, found in zip(chain.cuts[1:], arrived, strict=True):
        if bool((found[~moved] != 0.0).any()):
            chain.samples, chain.mixing = 1, f"samples of the batch depend on each other in {cut.name!r}"
            return
