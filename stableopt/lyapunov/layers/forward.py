r"""How fast a small change of the input grows from layer to layer, at the data of the probe.

With a fixed random direction :math:`v` of the input :math:`x` and the representations :math:`h_0 = x, h_1, \dots, h_L`,

.. math:: g_l = \log\frac{\|D_x h_l\, v\|}{\|D_x h_{l-1}\, v\|}, \qquad
          \Lambda = \frac1L \sum_{l=1}^L g_l = \frac1L \log\frac{\|D_x h_L\, v\|}{\|v\|} .

The norms are over the whole batch, so :math:`\|D_x h\,v\|` is about the Frobenius norm of the derivative, up to a factor that all
layers share: the growth of an average direction, not of the worst one.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn

from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.layers.trunk import Trunk
from stableopt.lyapunov.layers.walk import Observer, ProbeError, Walk, floating
from stableopt.optim import RandomState

__all__ = ["END", "Growth", "dual_numbers", "lacks_forward_mode", "relative_step"]

END = "end"
_APART = 0x51AB1E
"""Added to the seed, so that data drawn with a small seed of the user is not the direction itself."""
_TRIES = 3
_FORWARD_MODE = re.compile(r"forward[- ]?(mode|AD|differentiation)|jvp|Jacobian-vector|dual", re.IGNORECASE)
"""What torch says about an operation without a derivative in forward mode."""
_HALF = (torch.float16, torch.bfloat16)


class Growth:
    """Measure the norms of a perturbation at the beginning of each layer of a trunk, and at the end.

    One evaluation with dual numbers is tried first: exact derivatives. Where an operation has none in forward mode (fused
    attention, LSTM on the CPU), two evaluations and their difference take its place, here and from then on; after an error of
    another kind dual numbers are tried again, at three readings in a row at most. The model gets copies of its input.

    Args:
        model: the model.
        seed: of the direction, which stays the same so that readings can be compared.

    Attributes:
        how: ``"forward"`` for dual numbers, ``"difference"`` for a finite difference: of the last reading.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model.requires_grad_(False)[0].weight.copy_(3.0 * torch.eye(2))
        >>> growth, readout = Growth(model), Readout()
        >>> growth.measure(lambda: model(torch.ones(1, 2)).sum(), Trunk(("0",)), readout)
        >>> norms = readout.fetch()
        >>> round(norms["growth", "end"] / norms["growth", "0"], 6)
        3.0
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        self.how = "forward"
        self._model, self._seed = model, seed
        self._kept: Tensor | None = None
        self._failures = 0  # in a row, of a kind that may pass

    def measure(
        self,
        probe: Callable[[], Any],
        trunk: Trunk,
        readout: Readout,
        start: RandomState | None = None,
        also: Sequence[Observer] = (),
    ) -> None:
        """Evaluate the probe, and leave ``("growth", name)`` for each layer and for the end in a readout.

        Args:
            probe: evaluates a loss by calling the model.
            trunk: where the layers begin.
            readout: gets the norms.
            start: the random state to begin with.
            also: observers that see the same calls once; what they get may be dual numbers.

        Raises:
            ProbeError: if the probe does not call the model, or a layer of the trunk is not called.
        """
        known = self.how == "difference" and not 0 < self._failures < _TRIES
        if not known and self._with_dual_numbers(probe, trunk, readout, start, also):
            self.how, self._failures = "forward", 0
        else:
            base = _Base(trunk, also)
            Walk(self._model, probe, base).run(start)
            self._run(probe, _Difference(self._direction, base), trunk, readout, start)
            self.how = "difference"

    def _with_dual_numbers(
        self,
        probe: Callable[[], Any],
        trunk: Trunk,
        readout: Readout,
        start: RandomState | None,
        also: Sequence[Observer],
    ) -> bool:
        """Return whether every operation has a derivative in forward mode."""
        try:
            with dual_numbers():
                self._run(probe, _Tangents(self._direction, also), trunk, readout, start)
        except ProbeError:
            raise
        except Exception as error:  # what an operation raises that has none differs from one to the next
            self._failures = _TRIES if lacks_forward_mode(error) else self._failures + 1
            return False
        return True

    def _run(
        self,
        probe: Callable[[], Any],
        observer: _Tangents | _Difference,
        trunk: Trunk,
        readout: Readout,
        start: RandomState | None,
    ) -> None:
        Walk(self._model, probe, observer).run(start)
        missing = [name for name in trunk.layers[1:] if name not in observer.norms]
        if missing:
            raise ProbeError(f"the layer {missing[0]!r} was not called this time")
        readout.add(("growth", trunk.layers[0]), observer.norms[None])
        for name in trunk.layers[1:]:
            readout.add(("growth", name), observer.norms[name])
        readout.add(("growth", END), observer.norms[END])

    def _direction(self, x: Tensor) -> Tensor:
        v = self._kept
        if v is None or (v.shape, v.dtype, v.device) != (x.shape, x.dtype, x.device):
            generator = torch.Generator().manual_seed(_APART + self._seed)
            v = self._kept = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
        return v


@contextmanager
def dual_numbers() -> Iterator[None]:
    """Allow dual numbers in this context.

    Examples:
        >>> with dual_numbers():
        ...     dual = fwd.make_dual(torch.tensor(3.0), torch.tensor(1.0))
        ...     fwd.unpack_dual(dual.square()).tangent
        tensor(6.)
    """
    _load()
    with fwd.dual_level():
        yield


@functools.cache
def _load() -> None:
    """Make the first dual number: torch compiles some derivatives then, and warns of its own compiler."""
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwd.make_dual(torch.zeros(1), torch.ones(1))


def lacks_forward_mode(error: Exception) -> bool:
    """Return whether an error says that an operation has no derivative in forward mode.

    Args:
        error: what was raised within :func:`dual_numbers`.

    Examples:
        >>> (
        ...     lacks_forward_mode(NotImplementedError("Trying to use forward AD with ...")),
        ...     lacks_forward_mode(ValueError("shape")),
        ... )
        (True, False)
    """
    return isinstance(error, NotImplementedError) or bool(_FORWARD_MODE.search(str(error)))


def relative_step(dtypes: list[torch.dtype]) -> float:
    """Return the size of a finite difference, relative to the input, for a computation that goes through these dtypes.

    Examples:
        >>> relative_step([torch.float32]), relative_step([torch.float32, torch.bfloat16])
        (0.001, 0.05)
    """
    sizes = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
    return max((sizes.get(dtype, 5e-2) for dtype in dtypes), default=1e-3)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries of some tensors, at least in float32."""
    lengths = [torch.linalg.vector_norm(t, dtype=torch.float32 if t.dtype in _HALF else None) for t in tensors]
    return (
        lengths[0] if len(lengths) == 1 else torch.linalg.vector_norm(torch.stack([n.to(lengths[0]) for n in lengths]))
    )


class _Tangents:
    """Dual numbers through the call of the model; the loss behind it gets the plain outputs."""

    def __init__(self, direction: Callable[[Tensor], Tensor], also: Sequence[Observer]) -> None:
        self.norms: dict[str | None, Tensor] = {}
        self._direction, self._also = direction, also

    def start(self) -> None:
        self.norms.clear()
        for other in self._also:
            other.start()

    def source(self, x: Tensor) -> Tensor:
        v = self._direction(x)
        self.norms[None] = _norm([v])
        return fwd.make_dual(x.detach().clone(), v.clone())  # the model may write into them

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tangents = _tangents(floating((args, kwargs)))
        if tangents:
            self.norms[name] = _norm(tangents)
        for other in self._also:
            other.enter(name, module, args, kwargs)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        for other in self._also:
            other.leave(name, module, output)

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        tangents = _tangents(outputs)
        if not tangents:
            raise NotImplementedError("no tangent reached the output")
        self.norms[END] = _norm(tangents)
        return [fwd.unpack_dual(y).primal.clone() for y in outputs]  # a view would make fully_shard warn


def _tangents(tensors: list[Tensor]) -> list[Tensor]:
    found = [fwd.unpack_dual(t).tangent for t in tensors]
    return [t for t in found if t is not None]


class _Base:
    """The unperturbed evaluation: keeps what the layers and the end see."""

    def __init__(self, trunk: Trunk, also: Sequence[Observer]) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self.dtypes: list[torch.dtype] = []
        self._wanted, self._also = frozenset(trunk.layers[1:]), also

    def start(self) -> None:
        self.seen.clear()
        self.dtypes.clear()
        for other in self._also:
            other.start()

    def source(self, x: Tensor) -> Tensor:
        return x.clone()  # the model may write into it

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._wanted:
            self.seen[name] = [t.detach().clone() for t in floating((args, kwargs))]  # somebody may write into it
        for other in self._also:
            other.enter(name, module, args, kwargs)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self.dtypes += [t.dtype for t in floating(output)]
        for other in self._also:
            other.leave(name, module, output)

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        self.seen[END] = [t.detach().clone() for t in outputs]
        return outputs


class _Difference:
    """A perturbed evaluation, compared with the one before; in units of the perturbation."""

    def __init__(self, direction: Callable[[Tensor], Tensor], base: _Base) -> None:
        self.norms: dict[str | None, Tensor] = {}
        self._direction, self._base, self._size = direction, base, torch.ones(())
        self._relative = relative_step(base.dtypes)

    def start(self) -> None:
        self.norms.clear()

    def source(self, x: Tensor) -> Tensor:
        v = self._direction(x)
        size = _norm([x]) / _norm([v])
        self._size = self._relative * torch.where(size > 0, size, torch.ones_like(size))
        moved = x.detach() + (self._size * v).to(x)
        self.norms[None] = self._apart([moved], [x])
        return moved

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._base.seen:
            self.norms[name] = self._apart(floating((args, kwargs)), self._base.seen[name])

    def leave(self, name: str, module: nn.Module, output: Any) -> None: ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        self.norms[END] = self._apart(outputs, self._base.seen[END])
        return outputs

    def _apart(self, tensors: list[Tensor], others: list[Tensor]) -> Tensor:
        wide = [(x.float(), y.float()) if x.dtype in _HALF else (x, y) for x, y in zip(tensors, others, strict=True)]
        return _norm([x - y for x, y in wide]) / self._size
