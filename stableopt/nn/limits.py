r"""The limit that is enforced on a weight, whichever way it is enforced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.constraints import Constraint, InfNormBall, L1Ball, OneNormBall, Orthogonal, SpectralBall, attached
from stableopt.nn.budget import Budgeted
from stableopt.nn.constrain import constraint_of, parametrizations_of, projections
from stableopt.nn.slots import Slot, operator_norm_of, slots_of
from stableopt.nn.weights import WeightMap

__all__ = ["Limit", "Stacked", "estimates_evaluated", "layer_limit", "limit_of", "limited_slots", "set_for"]


class Stacked(nn.Module):
    """Weight maps for the parts of a weight that holds several matrices, or one with its last dimensions split.

    Args:
        maps: one map for each part along the first dimension, all with the same radius.
        flat: whether the maps see the parts with the dimensions after the first taken together.

    Examples:
        >>> from stableopt.nn.weights import METHODS, Geometry
        >>> maps = [METHODS["gram"](Geometry("linear"), 1.0, "l2") for _ in range(3)]
        >>> W = Stacked(maps)(5.0 * torch.eye(2).repeat(3, 1))
        >>> [round(float(torch.linalg.matrix_norm(part, 2)), 1) for part in W.chunk(3)]
        [1.0, 1.0, 1.0]
    """

    dependencies: ClassVar[tuple[nn.Module, ...]] = ()

    def __init__(self, maps: Iterable[WeightMap], *, flat: bool = False) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)
        self.flat = flat

    @property
    def radius(self) -> float:
        """The limit of each part."""
        return next(iter(self.maps)).radius  # pyright: ignore[reportReturnType]

    def forward(self, V: Tensor) -> Tensor:
        """Return the parts, each within the radius, in the shape of ``V``."""
        return self._each(V, [weight_map.forward for weight_map in self.maps])  # pyright: ignore[reportArgumentType]

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return originals of the parts."""
        return self._each(W, [weight_map.right_inverse for weight_map in self.maps])  # pyright: ignore[reportArgumentType]

    def _each(self, V: Tensor, functions: list) -> Tensor:  # type: ignore[type-arg]
        parts = V.chunk(len(functions))
        mapped = [f(part.flatten(1) if self.flat else part) for f, part in zip(functions, parts, strict=True)]
        return torch.cat(mapped).view(V.shape)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"flat={self.flat}"


@dataclass(frozen=True)
class Limit:
    """What is enforced on one weight.

    Args:
        radius: limit of the operator norm of each part.
        norm: which norm.
        by: ``"parametrization"`` or ``"projection"``.
        constraint: how it is enforced, for printing.
        exact: whether it holds by construction; False for a method that trains with an estimate.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> limit_of(stabilize(nn.Linear(2, 2), 0.5), "weight").radius
        0.5
    """

    radius: float
    norm: str
    by: str
    constraint: str
    exact: bool = True


def limit_of(module: nn.Module, name: str) -> Limit | None:
    """Return the limit on a weight that is in force, None if there is none.

    Args:
        module: the layer.
        name: the name of its weight.

    Examples:
        >>> limit_of(nn.Linear(2, 2), "weight") is None
        True
    """
    chain = parametrizations_of(module, name)
    adjoint = isinstance(module, nn.Embedding)
    if not chain:
        weight = module._parameters.get(name)  # noqa: SLF001 torch has no public accessor without inherited names
        constraint = projections(module).get(name) or (None if weight is None else attached(weight))
        return _of_constraint(constraint, "projection", adjoint=adjoint)
    outermost = chain[-1]
    if isinstance(outermost, Budgeted | Stacked | WeightMap):
        first = next(part for part in outermost.modules() if isinstance(part, WeightMap))
        radius: Any = outermost.radius
        kind = type(first).__name__ + (", learned radius" if isinstance(outermost, Budgeted) else "")
        norm = operator_norm_of(first.norm, adjoint=adjoint)
        return Limit(radius, norm, "parametrization", kind, first.by_construction)
    return _of_constraint(constraint_of(outermost), "parametrization", adjoint=adjoint)


def _of_constraint(constraint: Constraint | None, by: str, *, adjoint: bool) -> Limit | None:
    kind = type(constraint).__name__
    if isinstance(constraint, SpectralBall):
        return Limit(constraint.radius, "l2", by, kind)
    if isinstance(constraint, InfNormBall) or (isinstance(constraint, L1Ball) and _is_filterwise(constraint)):
        return Limit(constraint.radius, operator_norm_of("linf", adjoint=adjoint), by, kind)
    if isinstance(constraint, OneNormBall):
        return Limit(constraint.radius, operator_norm_of("l1", adjoint=adjoint), by, kind)
    return Limit(1.0, "l2", by, kind) if isinstance(constraint, Orthogonal) else None


def _is_filterwise(ball: L1Ball) -> bool:
    return ball.weights is None and isinstance(ball.dims, tuple) and ball.dims == tuple(range(1, len(ball.dims) + 1))


def layer_limit(module: nn.Module, norm: str = "l2") -> float | None:
    r"""Return the limit that is enforced on the operator norm of a layer's weight, or None if there is none.

    Args:
        module: a layer; the limit comes from :func:`stabilize`, or from a SpectralBall or Orthogonal on ``"weight"``
            by :func:`stableopt.nn.constrain`, either as a parametrization or as a projection.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``; a limit in one of them is none in another.

    Returns:
        The radius. It limits the weight after each forward map or optimizer step, up to rounding; nothing is proved.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> layer_limit(nn.Linear(2, 2)) is None
        True
        >>> layer_limit(stabilize(nn.Linear(2, 2), 0.5))
        0.5
    """
    limit = limit_of(module, "weight")
    return limit.radius if limit is not None and limit.norm == norm else None


def limited_slots(model: nn.Module) -> Iterator[tuple[Slot, Limit]]:
    """Iterate over the weights of a model on which a limit is enforced.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> [slot.key for slot, limit in limited_slots(stabilize(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))]
        ['0.weight']
    """
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        limits = {name: limit_of(module, name) for name in [*_parametrized(module), *projections(module)]}
        if any(limits.values()):
            for slot in slots_of(module, path):
                limit = limits.get(slot.name)
                if limit is not None:
                    yield slot, limit


@contextlib.contextmanager
def estimates_evaluated(slot: Slot) -> Iterator[None]:
    """Let a method that trains with an estimate give the weight of evaluation, whatever mode its layer is in.

    Args:
        slot: the weight.

    Examples:
        >>> from stableopt.linalg import spectral_norm
        >>> from stableopt.nn import stabilize
        >>> slot = slots_of(stabilize(nn.Linear(2, 2), method="power"), "")[0]
        >>> with estimates_evaluated(slot):
        ...     spectral_norm(slot.value).upper <= 1.0
        True
    """
    maps = [part for part in parametrizations_of(slot.module, slot.name) for part in part.modules()]
    modes = [(part, part.training) for part in maps if isinstance(part, WeightMap) and not part.by_construction]
    try:
        for part, _ in modes:
            part.eval()
        yield
    finally:
        for part, mode in modes:
            part.train(mode)


def _parametrized(module: nn.Module) -> list[str]:
    return list(module.get_submodule("parametrizations")._modules) if P.is_parametrized(module) else []  # noqa: SLF001 the names


def set_for(slot: Slot, radius: float, norm: str, method: str | None = None) -> Constraint:
    """Return the set that an optimizer projects a weight on, to keep its operator norm within a radius.

    Args:
        slot: the weight.
        radius: the limit.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``.
        method: None for the ball of all weights within the radius, ``"orthogonal"`` for the matrices with orthonormal rows or
            columns.

    Raises:
        ValueError: if there is no projection for this kind of weight, or orthonormal rows do not have this norm.

    Note:
        Stacked matrices, such as the gates of an LSTM, are limited together.

    Examples:
        >>> set_for(slots_of(nn.Linear(2, 2), "")[0], 0.5, "linf")
        InfNormBall(radius=0.5, dims=None)
    """
    ndim = slot.value.ndim
    if method == "orthogonal":
        if ndim != 2 or norm != "l2":
            raise ValueError(
                f"method='orthogonal' with by='projection' keeps matrices in the l2 norm, and {slot.where} has a weight with "
                f"{ndim} dimensions and the norm {norm}; use by='parametrization' with the method 'bcop' for kernels, or skip it."
            )
        if radius != 1.0:
            raise ValueError(
                f"the limit of {slot.where} would be {radius:.6g}, but orthogonal matrices have norm 1; ask for a limit of the "
                "model that is the product of the constants of its other layers, and put a stableopt.nn.Scale where another is "
                "wanted."
            )
        return Orthogonal()
    if norm == "linf" and slot.geometry.kind == "conv":  # the sum over each filter, for every padding
        return L1Ball(radius, dims=tuple(range(1, ndim)))
    if ndim != 2:
        raise ValueError(
            f"{slot.where} has a weight with {ndim} dimensions, and no projection on its {norm} operator norm is known "
            "that an optimizer could take after each step; use by='parametrization' for it, or skip it."
        )
    kinds = {"l2": SpectralBall, "linf": InfNormBall, "l1": OneNormBall}
    return kinds[slot.matrix_norm(norm)](radius)
