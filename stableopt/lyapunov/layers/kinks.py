r"""How many units of the piecewise-linear activations are so close to a kink that the last update may have taken them across.

A derivative sees one side of a kink, a step of finite size may see both. For the pre-activations :math:`z` of one call, with
kinks at :math:`c`, and an update of relative size :math:`r = \|d\|/\|\theta\|`,

.. math:: \text{share} = \frac{\#\{i : \min_c |z_i - c| \le \delta\}}{\#\{i\}}, \qquad
          \delta = r\,\sqrt{\operatorname{mean}_i z_i^2} :

a layer that changes by the relative size :math:`r` moves its outputs by about this much. What the layers below it add is not
counted, so in a deep model the share is an estimate from below.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stableopt.lyapunov.layers.kinked import functions_of, options_of
from stableopt.lyapunov.layers.readout import Readout
from stableopt.nn.activations import Abs, GroupSort, NActivation, channelwise
from stableopt.nn.splines import LinearSpline

__all__ = ["KinkCounter", "kink_distance"]


@functools.singledispatch
def kink_distance(module: nn.Module, z: Tensor) -> Tensor | None:  # noqa: ARG001 for classes that are registered
    """Return the distance of each entry to the nearest kink; register a function here for an activation of your own.

    Functions of torch are known wherever they are called (ReLU, LeakyReLU, PReLU, Hardtanh, ReLU6, Hardsigmoid, Hardswish,
    Softshrink, Hardshrink, Threshold, SELU, ELU with another alpha than 1, and clamp with numbers where derivatives in forward mode
    show that it is applied to data); this is for modules that compute their kinks in another way: of ours
    :class:`stableopt.nn.GroupSort` (a kink where two neighbors of the sorted group are equal), :class:`stableopt.nn.Abs`,
    :class:`stableopt.nn.NActivation`, :class:`stableopt.nn.LinearSpline`. Not counted are the kinks within ``nn.RNN`` with ReLU,
    whose steps are one operation, and those of comparisons (``maximum``, ``where``, pooling) and of ``abs``.

    Args:
        module: the activation.
        z: its input.

    Returns:
        Distances, one per unit; None for a class that is not known.

    Examples:
        >>> kink_distance(GroupSort(2), torch.tensor([[1.0, 1.5, 4.0, -4.0]]))
        tensor([0.5000, 8.0000])
        >>> kink_distance(nn.Tanh(), torch.zeros(1)) is None
        True
    """
    return None


@kink_distance.register(GroupSort)
def _(module: GroupSort, z: Tensor) -> Tensor:
    dim = min(1, z.ndim - 1)
    groups = z.unflatten(dim, (-1, module.group_size)).sort(dim + 1).values
    return groups.diff(dim=dim + 1).flatten()


@kink_distance.register(Abs)
def _(module: Abs, z: Tensor) -> Tensor:
    dim = min(1, z.ndim - 1)
    return (z if module.fraction == 1.0 else z.narrow(dim, 0, round(module.fraction * z.shape[dim]))).abs().flatten()


@kink_distance.register(NActivation)
def _(module: NActivation, z: Tensor) -> Tensor:
    knots = [channelwise(row.detach().to(z), z) for row in module.thresholds.unbind()]
    return torch.stack([(z - knot).abs() for knot in knots]).amin(0).flatten()


@kink_distance.register(LinearSpline)
def _(module: LinearSpline, z: Tensor) -> Tensor:
    gap = 2.0 * module.span / (module.knots - 1)
    place = (z.clamp(-module.span, module.span) / gap).round() * gap
    return (z - place).abs().flatten()


_ACTIVATIONS = functions_of("activation", "clamp")


class KinkCounter(TorchFunctionMode):
    r"""Observe a walk, within this context, and count the units near a kink in all activations of the model.

    Args:
        ratio: :math:`r`, the relative size of the last update.

    Examples:
        >>> from stableopt.lyapunov.layers.walk import Walk
        >>> model, counter, readout = nn.Sequential(nn.ReLU()), KinkCounter(0.1), Readout()
        >>> with counter:
        ...     Walk(model, lambda: model(torch.tensor([2.0, -2.0, 0.01, -0.01])).sum(), counter).run()
        >>> counter.report(readout)
        >>> readout.fetch()
        {('kinks', '0'): 0.5}
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self._ratio = ratio
        self.start()

    def start(self) -> None:
        """Forget what was counted."""
        self._near: dict[str, list[Tensor]] = {}
        self._units: dict[str, int] = {}
        self._path: list[str] = []
        self._inside = 0  # calls of modules whose kinks are counted as a whole

    def report(self, readout: Readout) -> None:
        """Leave ``("kinks", name)`` in a readout: the share of all calls of the innermost module that calls an activation.

        Args:
            readout: gets the shares.
        """
        for name, near in self._near.items():
            readout.add(("kinks", name), torch.stack(near).sum() / self._units[name])

    def source(self, x: Tensor) -> Tensor:
        """Take the source as it is."""
        return x

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember where we are."""
        self._path.append(name.partition("#")[0])
        known = kink_distance.dispatch(type(module)) is not kink_distance.dispatch(object)
        if known and not self._inside and args:
            z = _primal(args[0])
            with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001 as torch's own modes do
                self._count(kink_distance(module, z), z)
        self._inside += known

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """Go back to the module outside."""
        self._path.pop()
        self._inside -= kink_distance.dispatch(type(module)) is not kink_distance.dispatch(object)

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        """Take the outputs as they are."""
        return outputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        row = _ACTIVATIONS.get(func) if self._path and not self._inside else None
        x = args[0] if args else kwargs.get("input")
        if (
            row is not None
            and row.places is not None
            and isinstance(x, Tensor)
            and (row.kind != "clamp" or _is_moved(x))
        ):
            z = _primal(x)
            with torch.no_grad():
                places = row.places(*(args or (x,)), **options_of(kwargs))
                distances = [(z - c).abs() if c else z.abs() for c in places]
                if distances:
                    self._count(distances[0] if len(distances) == 1 else torch.stack(distances).amin(0), z)
        return func(*args, **kwargs)

    def _count(self, distance: Tensor | None, z: Tensor) -> None:
        if distance is None or not distance.numel():
            return
        wide = torch.float32 if z.dtype in {torch.float16, torch.bfloat16} else None
        size = torch.linalg.vector_norm(z, dtype=wide) / z.numel() ** 0.5
        near = torch.le(
            distance, self._ratio * size, out=torch.empty_like(distance)
        )  # several times faster than through bool
        name = self._path[-1]
        self._near.setdefault(name, []).append(near.sum(dtype=wide) + 0.0 * size)  # NaN stays NaN
        self._units[name] = self._units.get(name, 0) + distance.numel()


def _is_moved(x: Tensor) -> bool:
    return fwd.unpack_dual(x).tangent is not None


def _primal(z: Tensor) -> Tensor:
    return fwd.unpack_dual(z).primal.detach()
