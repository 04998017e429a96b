r"""The two interfaces: a regularizer has a value and a prox, a constraint is the indicator of a set and has a projection.

One code path serves both: a set is the function that is 0 inside and infinite outside, and its prox is the projection.
Instances are frozen data (numbers, strings, and tuples of them), so they hash, compare, pickle, and travel in
parameter groups and JSON.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stableopt.constraints.arguments import check_tensor, combined_step

__all__ = ["Constraint", "Parametrization", "Regularizer", "from_spec"]

_REGISTRY: dict[str, type[Regularizer]] = {}


class Regularizer(ABC):
    r"""A function :math:`g` that an optimizer can split off and treat exactly, by its proximal operator.

    A new one is a frozen dataclass with fields that are numbers, strings, ``None``, other regularizers, or tuples of
    these. Its class name enters it into the
    registry of :func:`from_spec`; a name that starts with an underscore does not.

    Attributes:
        separable: whether :math:`g` is a sum over coordinates, so that its prox acts on each coordinate alone.
        convex: whether :math:`g` is convex, so that its prox is unique and firmly nonexpansive.
        diagonal: whether the prox with one step per coordinate (a diagonal metric, as in Adam) is exact, so that a tensor is
            accepted as step; everything separable is.

    Raises:
        TypeError: if the name of a new class is taken by a class defined elsewhere.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Linear(Regularizer):
        ...     slope: float
        ...     separable = True
        ...
        ...     def value(self, x):
        ...         return self.slope * x.sum()
        ...
        ...     def prox(self, x, step=1.0):
        ...         return x - step * self.slope
        >>> Linear(0.5).prox(torch.tensor([2.0, 3.0]), step=2.0)
        tensor([1., 2.])
        >>> from_spec(Linear(0.5).spec()) == Linear(0.5)
        True
    """

    separable: ClassVar[bool] = False
    convex: ClassVar[bool] = True

    @property
    def diagonal(self) -> bool:
        """Whether the prox in a diagonal metric is exact; as long as a class does not say otherwise, if it is separable."""
        return self.separable

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the class into the registry under its name."""
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):
            return
        other = _REGISTRY.get(cls.__name__)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"the name {cls.__name__!r} is taken by {other.__module__}.{other.__qualname__}; "
                f"name the class {cls.__module__}.{cls.__qualname__} differently, so that a spec has one meaning."
            )
        _REGISTRY[cls.__name__] = cls

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        r"""Return :math:`g(x)`.

        Args:
            x: any shape.

        Returns:
            0-d float64 tensor on the device of ``x``.
        """

    @abstractmethod
    def prox(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        r"""Return the proximal point :math:`\arg\min_u\, g(u) + \|u - x\|^2 / (2\,\text{step})`.

        Args:
            x: any shape; never changed.
            step: finite number :math:`\ge 0`; if :attr:`diagonal` also a tensor that broadcasts to ``x``, one step per
                coordinate (its entries are not checked: that would wait for the device). The metric P and a step s are the
                tensor s / P.

        Returns:
            Tensor with the shape, dtype and device of ``x``.
        """

    @torch.no_grad()
    def prox_(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Replace ``x`` by its proximal point, in place and outside of autograd; the arguments and errors of :meth:`prox`.

        Returns:
            ``x`` itself. If anything is refused, it is unchanged.

        Examples:
            >>> from stableopt.constraints import L1
            >>> x = torch.tensor([3.0, 0.5])
            >>> L1(1.0).prox_(x) is x, x
            (True, tensor([2., 0.]))
        """
        return x.copy_(self.prox(x, step))

    def conjugate(self) -> Regularizer:
        r"""Return the convex conjugate :math:`g^*(y) = \sup_x \langle x, y\rangle - g(x)`, where the package has a class for it.

        With it :math:`\operatorname{prox}_{sg}(x) + s \operatorname{prox}_{g^*/s}(x/s) = x` (Moreau).

        Raises:
            ValueError: if :math:`g` is not convex, or the package has no class for its conjugate.

        Examples:
            >>> from stableopt.constraints import L1
            >>> L1(0.5).conjugate()
            LinfBall(radius=0.5)
        """
        raise ValueError(
            f"{self!r} has no conjugate in closed form here; use prox, by Moreau's identity it gives the same."
        )

    def spec(self) -> dict[str, Any]:
        """Return the name and the fields as JSON data: what :func:`from_spec` reads.

        Returns:
            A new dict; infinities are the strings ``"inf"`` and ``"-inf"``, which JSON has no number for.

        Raises:
            TypeError: if the class is not a dataclass, or a field is not a number, a string, ``None``, a regularizer, or a tuple
                of such.

        Examples:
            >>> from stableopt.constraints import Box
            >>> Box(0.0, float("inf")).spec()
            {'name': 'Box', 'lower': 0.0, 'upper': 'inf'}
        """
        name = type(self).__name__
        if not dataclasses.is_dataclass(self):
            raise TypeError(f"{name} must be a frozen dataclass to have a spec; decorate it.")
        return {"name": name} | {
            f.name: _to_json(name, f.name, getattr(self, f.name)) for f in dataclasses.fields(self)
        }


class Constraint(Regularizer):
    r"""A closed set :math:`C`, as the function that is 0 on it and infinite elsewhere.

    Everything is stated for the numbers that are *stored*: :meth:`project` returns a point that lies in the set when its
    float64, float32, bfloat16 or float16 entries are read as the real numbers that they are.

    Note:
        Projections run inside training loops, so they never wait for the device to look for NaN: NaN goes in, NaN comes out,
        and :meth:`violation` of it is infinite.

    Examples:
        >>> from stableopt.constraints import LinfBall
        >>> LinfBall(1.0).prox(torch.tensor([0.5, -3.0]), step=0.1)
        tensor([ 0.5000, -1.0000])
    """

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        r"""Return the point of the set nearest to ``x``, up to rounding that goes inwards.

        Args:
            x: float64, float32, bfloat16 or float16 tensor; never changed.

        Returns:
            Tensor of the same shape, dtype and device, possibly ``x`` itself. Its :meth:`violation` is 0, so projecting it again
            returns the same bits.
        """

    @abstractmethod
    def violation(self, x: Tensor) -> float:
        """Return how far the stored numbers are outside, in float64; exactly 0.0 if they are feasible, infinite for NaN.

        Args:
            x: float64, float32, bfloat16 or float16 tensor.
        """

    @torch.no_grad()
    def project_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its projection, in place and outside of autograd; the errors of :meth:`project`.

        Returns:
            ``x`` itself. If anything is refused, it is unchanged.

        Examples:
            >>> from stableopt.constraints import LinfBall
            >>> x = torch.tensor([3.0, -0.5])
            >>> LinfBall(1.0).project_(x) is x, x
            (True, tensor([ 1.0000, -0.5000]))
        """
        return x.copy_(self.project(x))

    def value(self, x: Tensor) -> Tensor:
        """Return 0 for a feasible point, else infinity (0-d, float64, on the device of ``x``).

        Examples:
            >>> from stableopt.constraints import NonNegative
            >>> NonNegative().value(torch.tensor([1.0, -1.0])).item()
            inf
        """
        return torch.full((), 0.0 if self.violation(x) == 0.0 else math.inf, dtype=torch.float64, device=x.device)

    def prox(self, x: Tensor, step: float | Tensor = 1.0, metric: Tensor | None = None) -> Tensor:
        """Return the projection; step and metric are checked, then have no influence.

        Raises:
            TypeError: if ``x`` or ``step`` has the wrong type.
            ValueError: if ``step`` is negative, not finite, or a tensor that does not fit.
        """
        check_tensor(type(self).__name__, x)
        combined_step(type(self).__name__, step, metric, x, diagonal=self.diagonal)
        return self.project(x)

    def map(self, x: Tensor) -> Tensor:
        """Map any tensor of the right shape into the set, differentiably; what a parametrization computes. Here: project.

        Args:
            x: the free parameter.

        Returns:
            Tensor of the same shape and dtype.
        """
        return self.project(x)

    def parametrization(self, tensor: Tensor) -> nn.Module:
        """Return a module for :func:`torch.nn.utils.parametrize.register_parametrization` that keeps a tensor in the set.

        Args:
            tensor: the tensor to be parametrized; only its shape, dtype and device matter.

        Returns:
            A module whose ``forward`` is :meth:`map` and whose ``right_inverse`` projects, so that assigning to the
            parametrized tensor, and registering, start from the nearest feasible point.

        Examples:
            >>> from torch.nn.utils import parametrize
            >>> from stableopt.constraints import NonNegative
            >>> layer = nn.Linear(2, 2)
            >>> _ = parametrize.register_parametrization(layer, "weight", NonNegative().parametrization(layer.weight))
            >>> layer.weight = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
            >>> layer.weight.detach()
            tensor([[1., 0.],
                    [0., 2.]])
        """
        check_tensor(type(self).__name__, tensor)
        return Parametrization(self)


class Parametrization(nn.Module):
    """Apply :meth:`Constraint.map`, without parameters, buffers or a mode: the same in training and evaluation.

    Args:
        constraint: the set.

    Examples:
        >>> from stableopt.constraints import LinfBall
        >>> Parametrization(LinfBall(1.0))
        Parametrization(LinfBall(radius=1.0))
    """

    def __init__(self, constraint: Constraint) -> None:
        super().__init__()
        self.constraint = constraint

    def forward(self, x: Tensor) -> Tensor:
        """Return a point of the set."""
        return self.constraint.map(x)

    @torch.no_grad()
    def right_inverse(self, x: Tensor) -> Tensor:
        """Return the nearest feasible point, contiguous; on the meta device, where there are no numbers, the tensor itself."""
        return x if x.is_meta else self.constraint.project(x).contiguous()

    def extra_repr(self) -> str:
        """Show the set."""
        return repr(self.constraint)


def from_spec(spec: Mapping[str, Any]) -> Regularizer:
    """Rebuild a regularizer from what :meth:`Regularizer.spec` returned, for example after a trip through JSON.

    Args:
        spec: ``{"name": class name, field: value, ...}``; fields that have a default may be left out.

    Returns:
        A regularizer equal to the one that wrote the spec.

    Raises:
        TypeError: if ``spec`` is not a mapping, or a field has the wrong type.
        ValueError: if the name is unknown, fields are missing or unknown, or a value is out of range.

    Examples:
        >>> import json
        >>> from stableopt.constraints import L1
        >>> from_spec(json.loads(json.dumps(L1(0.1).spec())))
        L1(weight=0.1)
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"a spec is a mapping such as {{'name': 'L1', 'weight': 0.1}}, got {type(spec).__name__}.")
    known = {
        name: cls for name, cls in _REGISTRY.items() if not inspect.isabstract(cls) and dataclasses.is_dataclass(cls)
    }
    name = spec.get("name")
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"no regularizer is named {name!r}; known are {', '.join(sorted(known))}.")
    cls = known[name]
    given = {key: _from_json(value) for key, value in spec.items() if key != "name"}
    fields = dataclasses.fields(cls)
    wanted, needed = {f.name for f in fields}, {f.name for f in fields if f.default is dataclasses.MISSING}
    if not needed <= given.keys() <= wanted:
        raise ValueError(
            f"the spec of {name} has the fields {[f.name for f in fields]}, of which {sorted(needed)} must be given, "
            f"got {sorted(map(str, given))}."
        )
    return cls(**given)


def _to_json(owner: str, name: str, value: object) -> Any:
    if isinstance(value, Regularizer):
        return value.spec()
    if isinstance(value, tuple):
        return [_to_json(owner, name, item) for item in value]
    if isinstance(value, float):
        return repr(value) if math.isinf(value) else value
    if value is None or isinstance(value, int | str):
        return value
    raise TypeError(
        f"field {name!r} of {owner} must be a number, a string, None, a regularizer or a tuple of such, "
        f"got {type(value).__name__}."
    )


def _from_json(value: object) -> object:
    if isinstance(value, Mapping):
        return from_spec(value)
    if isinstance(value, list | tuple):
        return tuple(_from_json(item) for item in value)
    return float(value) if isinstance(value, str) and value in {"inf", "-inf"} else value
