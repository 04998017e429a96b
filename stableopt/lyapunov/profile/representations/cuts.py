r"""The representations of a model at the cuts of its trunk, and perturbations pushed from cut to cut.

Everything that the output knows of the input passes through the representations :math:`h_0, \dots, h_L` one after another. An
evaluation with dual numbers can therefore be given *new* tangents at every cut: one pass then shows one column of the derivative of
every layer, and the derivative from :math:`h_k` to :math:`h_l` is the product of those between them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn

from stableopt.lyapunov.layers.forward import dual_numbers
from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating, replaced
from stableopt.lyapunov.profile.representations.inside import plain_kernels, primal, private_buffers, tangent_of
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import RandomState

__all__ = ["Chain", "Cut", "Passes", "Pusher", "at"]

_ELEMENTS = 2**24
"""Numbers in the tangents at all cuts together that are pushed at once."""


@dataclass
class Passes:
    """What was evaluated: forward passes, tangents pushed along them, and cotangents pulled back.

    A backward pass does the work of two forward ones (one for the input of each layer, one for its weights), a tangent or a
    cotangent of the representations that of one.

    Args:
        forward: evaluations of the model.
        tangents: perturbations pushed forward.
        adjoints: cotangents pulled back, without the gradients of weights; through one of L layers, 1/L.

    Examples:
        >>> Passes(forward=1, tangents=2).equivalents
        1.0
    """

    forward: int = 0
    tangents: int = 0
    adjoints: float = 0.0

    @property
    def equivalents(self) -> float:
        """The work in units of one forward and one backward pass."""
        return (self.forward + self.tangents + self.adjoints) / 3.0


@dataclass(frozen=True)
class Cut:
    """One representation: the tensors that everything from the input to the output passes through.

    Args:
        name: of the layer that makes it, ``"input"`` for the first.
        shapes: of its tensors.
        places: which ones they are among the floating-point arguments of the call that begins here, or among the outputs.
        dtype: of the first one.
        device: of the first one.

    Examples:
        >>> cut = Cut("0", ((4, 2, 3),), (0,), torch.float64, torch.device("cpu"))
        >>> cut.numel, cut.rows([torch.zeros(4, 2, 3)], 4).shape
        (24, torch.Size([4, 6]))
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """The number of entries of all its tensors."""
        return sum(map(math.prod, self.shapes))

    def rows(self, tensors: Sequence[Tensor], samples: int) -> Tensor:
        """Return all entries as a matrix, one row for each sample.

        Args:
            tensors: of the shapes of this cut.
            samples: rows; 1 for all entries in one.
        """
        parts = [t.reshape(samples, -1) for t in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def tensors(self, rows: Tensor) -> list[Tensor]:
        """Return the tensors that have these rows.

        Args:
            rows: as :meth:`rows` gives them.
        """
        widths = [math.prod(shape) // rows.shape[0] for shape in self.shapes]
        return [part.reshape(shape) for part, shape in zip(rows.split(widths, 1), self.shapes, strict=True)]


@dataclass
class Chain:
    """A model as the chain of its layers, for one batch, one mode and one random state.

    Args:
        model: the model.
        probe: evaluates it.
        layers: names of the calls at which the layers begin.
        cuts: the representations, one more than layers.
        start: the random state of every evaluation.
        modules: all modules that are called and have buffers.
        plain: whether operations with a derivative in forward mode have to take the place of fused ones.
        forward: whether all operations have a derivative in forward mode; if not, nothing can be pushed.
        samples: rows of a representation: those of the batch, 1 where samples depend on each other.
        mixing: why samples are not looked at one by one; empty if they are.
        passes: what was evaluated so far.
        together: whether several tangents are pushed at once.
        base: the representations themselves, each with all entries in one row; empty if they need no comparison.
        draws: whether an evaluation draws random numbers.
        modes: of all modules, as they were then.
        path: names of all calls from the input to the output, if modules are all there is between the cuts.
    """

    model: nn.Module
    probe: Callable[[], Any]
    layers: tuple[str, ...]
    cuts: tuple[Cut, ...]
    start: RandomState
    modules: nn.ModuleList
    plain: bool = False
    forward: bool = True
    samples: int = 1
    mixing: str = ""
    passes: Passes = field(default_factory=Passes)
    together: bool = True
    base: tuple[Tensor, ...] = ()
    draws: bool = True
    modes: tuple[bool, ...] = ()
    _agreed: bool = False
    path: tuple[str, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of entries of each representation, of one sample where they are looked at one by one."""
        return tuple(cut.numel // self.samples for cut in self.cuts)

    @property
    def chunk(self) -> int:
        """How many tangents are pushed at once."""
        return max(1, _ELEMENTS // max(1, self.samples * sum(self.widths)))

    def push(
        self,
        seeds: Mapping[int, Tensor],
        keep: Mapping[int, Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        r"""Push tangents from each cut to the next one, several at once.

        Args:
            seeds: cut -> tangents ``(count, samples or 1, width)`` that begin there.
            keep: cut -> ``(count,)``, 1 for those that go on from the cut before, with every row scaled to length 1, else 0; a cut
                that is not named lets none go on.

        Returns:
            What arrives at the cuts 1, 2, ..., each ``(count, samples, width)``, and the logarithms of the lengths that were taken
            out at the cuts 1, 2, ... up to the last but one, ``(count, layers - 1, samples)``.
        """
        keep = keep or {}
        count = next(iter(seeds.values())).shape[0]
        chunk = self.chunk
        arrived: list[list[Tensor]] = []
        for first in range(0, count, chunk):
            part = slice(first, first + chunk)
            arrived.append(self._pushed({k: s[part] for k, s in seeds.items()}, {k: m[part] for k, m in keep.items()}))
        *found, lengths = (torch.cat(parts) for parts in zip(*arrived, strict=True))
        return found, lengths

    def _pushed(self, seeds: dict[int, Tensor], keep: dict[int, Tensor]) -> list[Tensor]:
        count = next(iter(seeds.values())).shape[0]
        self.passes.tangents += count
        if self.together and (count > 1 or self._agreed):
            try:
                result = self._several(seeds, keep)
            except ProbeError:
                raise
            except (
                Exception
            ):  # an operation without a rule for several tangents at once; what else is wrong shows below
                self.together = False
            else:
                self.passes.forward += 1
                if result is not None:
                    return result
        self.passes.forward += count
        pick = range(count)
        results = [self._one({k: s[i] for k, s in seeds.items()}, {k: m[i] for k, m in keep.items()}) for i in pick]
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    def _several(self, seeds: dict[int, Tensor], keep: dict[int, Tensor]) -> list[Tensor] | None:
        """Push several tangents in one evaluation; None if it is not that of the model.

        A transform may change the strides of tensors, and with them which entry gets which random number: dropout of a transposed
        tensor then draws another mask. So what the evaluation computes is compared once, and if it is something else, tangents go
        one by one.
        """
        observer, first = Pusher(self), self.cuts[0]

        def around(evaluate: Callable[[], Any]) -> Any:
            def pushed(seeds: dict[int, Tensor], keep: dict[int, Tensor]) -> Any:
                def map_(zero: Tensor) -> Any:
                    observer.take(seeds, keep, zero)
                    with private_buffers(self.modules):
                        evaluate()
                    return observer.arrived, (observer.lengths(), [primal(rows) for rows in observer.arrived])

                zero = torch.zeros(first.shapes[0], dtype=first.dtype, device=first.device)
                tangent = first.tensors(observer.seed(seeds, 0))[0]
                found: Any = torch.func.jvp(map_, (zero,), (tangent,), has_aux=True)
                _, arrived, (lengths, primals) = found
                return [*arrived, lengths], primals

            return torch.vmap(pushed, randomness="same")(seeds, keep)

        with self.quiet():
            result, primals = Walk(self.model, self.probe, observer).run_in(around, self.start)
        if not self._agreed and not self.agrees([rows[0] for rows in primals]):
            self.together = False
            return None
        self._agreed = True
        return result

    def _one(self, seeds: dict[int, Tensor], keep: dict[int, Tensor]) -> list[Tensor]:
        observer = Pusher(self)

        def around(evaluate: Callable[[], Any]) -> list[Tensor]:
            observer.take(seeds, keep)
            with private_buffers(self.modules), dual_numbers():
                evaluate()
                return [*map(tangent_of, observer.arrived), observer.lengths()]

        with self.quiet():
            return Walk(self.model, self.probe, observer).run_in(around, self.start)

    def agrees(self, rows: Sequence[Tensor]) -> bool:
        r"""Return whether representations are those of the model, up to rounding.

        Args:
            rows: of the cuts 1, 2, ...: each within :math:`\sqrt\varepsilon` of its largest entry, where another random mask would
                change entries by their size.
        """
        for cut, found, known in zip(self.cuts[1:], rows, self.base[1:], strict=True) if self.base else ():
            apart = (found.reshape(-1) - known.reshape(-1)).abs().max()
            if bool(apart > math.sqrt(torch.finfo(cut.dtype).eps) * known.abs().max()):
                return False
        return True

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Look at the model with dual numbers and leave it as it is."""
        with undisturbed(self.modules), plain_kernels() if self.plain else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the loops that torch writes where it has no rule for several tangents
            with dual_numbers():  # the first one compiles
                pass
            yield


class Pusher:
    """Records what arrives at each cut, and lets something else go on; also inside of the transforms of ``torch.func``.

    Args:
        chain: whose cuts.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._index = {name: i for i, name in enumerate(chain.layers) if i > 0}
        self._seeds: dict[int, Tensor] = {}
        self._keep: dict[int, Tensor] = {}
        self.arrived: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._zero: Tensor | None = None

    def take(self, seeds: dict[int, Tensor], keep: dict[int, Tensor], zero: Tensor | None = None) -> None:
        """Say what begins and what goes on, and, inside of a transform, the zero whose tangent is that of the input."""
        self._seeds, self._keep, self._zero = seeds, keep, zero

    def seed(self, seeds: dict[int, Tensor], index: int) -> Tensor:
        """Return the rows that begin at a cut."""
        cut, samples = self._chain.cuts[index], self._chain.samples
        width = cut.numel // samples
        if index in seeds:
            return seeds[index].to(cut.dtype).expand(samples, width)
        return torch.zeros(samples, width, dtype=cut.dtype, device=cut.device)

    def lengths(self) -> Tensor:
        """Return the logarithms of what was taken out."""
        if self._lengths:
            return torch.stack(self._lengths)
        return torch.zeros(0, self._chain.samples, dtype=torch.float64, device=self._chain.cuts[0].device)

    def start(self) -> None:
        """Forget everything."""
        self.arrived, self._lengths = [], []

    def source(self, x: Tensor) -> Tensor:
        """Perturb the input."""
        at(self._chain.cuts[0], [x])
        if self._zero is not None:  # the tangent of the zero is that of the input
            return x.detach() + self._zero
        return fwd.make_dual(x.detach().clone(), self._chain.cuts[0].tensors(self.seed(self._seeds, 0))[0])

    def enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See what arrives at a cut, and let something else go on."""
        index = self._index.get(name)
        if index is None:
            return None
        if index != len(self.arrived) + 1:
            raise ProbeError(f"the layer {name!r} was called out of turn")
        cut = self._chain.cuts[index]
        tensors = at(cut, floating((args, kwargs)))
        tangent = self._arrive(cut, tensors)
        onwards = self.seed(self._seeds, index)
        length = torch.zeros(self._chain.samples, dtype=torch.float64, device=cut.device)
        if index in self._keep:
            size = torch.linalg.vector_norm(tangent.double(), dim=1)
            size = torch.where(size > 0.0, size, torch.ones_like(size))
            length = size.log()
            onwards = onwards + self._keep[index].to(cut.dtype) * (tangent / size.to(cut.dtype)[:, None])
        self._lengths.append(length)
        others = {
            id(t): fwd.make_dual(primal(t), d.to(t.dtype)) for t, d in zip(tensors, cut.tensors(onwards), strict=True)
        }
        return replaced((args, kwargs), others)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """Do nothing."""

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        """See what arrives at the end, and let the plain outputs go on."""
        if len(self.arrived) != len(self._chain.layers) - 1:
            raise ProbeError(f"the layer {self._chain.layers[len(self.arrived) + 1]!r} was not called this time")
        cut = self._chain.cuts[-1]
        self._arrive(cut, at(cut, outputs))
        return [primal(y).clone() for y in outputs]

    def _arrive(self, cut: Cut, tensors: list[Tensor]) -> Tensor:
        dual = cut.rows(tensors, self._chain.samples)
        self.arrived.append(dual)
        return tangent_of(dual)


def at(cut: Cut, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors of a representation.

    Args:
        cut: which one.
        tensors: the floating-point arguments of the call that begins there, or the outputs.

    Raises:
        ProbeError: if they have other shapes than before.

    Examples:
        >>> len(at(Cut("0", ((2,),), (1,), torch.float32, torch.device("cpu")), [torch.zeros(3), torch.zeros(2)]))
        1
    """
    found = [tensors[place] for place in cut.places if place < len(tensors)]
    if tuple(tuple(t.shape) for t in found) != cut.shapes:
        raise ProbeError(f"the representation {cut.name!r} has another shape this time")
    return found
