"""What a finite perturbation is measured on: precision, kinks and autocast, and the sizes at which a number can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from stableopt.constraints.sharding import is_sharded
from stableopt.lyapunov.layers.kinked import functions_of, options_of
from stableopt.lyapunov.layers.kinks import kink_distance
from stableopt.lyapunov.layers.walk import eager
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import evaluate_again

__all__ = [
    "LARGEST",
    "RESOLUTION",
    "WITH_KINKS",
    "Ground",
    "default_size",
    "look",
    "refuse_half",
    "refuse_size",
]

RESOLUTION = 512
"""The smallest distance, in units of the rounding error of a parameter: at 840 the growth of a smooth float32 run is off by up to
2 %, at 84 by 16 % to 47 %."""
LARGEST = 1e-2
"""The largest size that stands for an infinitesimal one in a smooth model."""
WITH_KINKS = 1e-6
"""The largest one in float64 with kinks: at 1e-4 the distance grows five times too fast, at 1e-6 as the derivative says."""

_ROUGH = functions_of("activation", "pool", "loss")
"""What makes the size of a perturbation matter: not clamps and comparisons, which are also applied to weights and losses."""


@dataclass(frozen=True)
class Ground:
    """What an evaluation of a loss has shown.

    Args:
        kinks: names of functions and modules with kinks, in order of appearance.
        autocast: whether anything ran under autocast.

    Examples:
        >>> Ground(("relu",), False).refuse(2.0**-52, 1e-6, finite_size=False)
        >>> Ground(("relu",), True).refuse(2.0**-52, 1e-6, finite_size=True)
        Traceback (most recent call last):
        ValueError: the loss is evaluated under autocast, whose rounding is larger than the twin's distance; leave it off.
    """

    kinks: tuple[str, ...]
    autocast: bool

    def refuse(self, eps: float, size: float | None, *, finite_size: bool) -> None:
        """Refuse to measure what would not be what it says.

        Args:
            eps: of the coarsest dtype of the parameters.
            size: that is asked for; None for the default.
            finite_size: whether it is meant to be finite.

        Raises:
            ValueError: under autocast; for an infinitesimal size with kinks in float32, or above 1e-6 in float64.
        """
        if self.autocast:
            raise ValueError(
                "the loss is evaluated under autocast, whose rounding is larger than the twin's distance; leave it off."
            )
        if finite_size or not self.kinks:
            return
        what = f"the model has kinks ({', '.join(self.kinks[:3])})"
        if eps > torch.finfo(torch.float64).eps:
            raise ValueError(
                f"{what}: no size in float32 gives the growth of the derivative; use float64, or finite_size=True."
            )
        if size is not None and size > WITH_KINKS:
            raise ValueError(
                f"{what}: above the size {WITH_KINKS:g} a twin does not grow as the derivative says, got {size:g}; lower it, or "
                "use finite_size=True."
            )


def look(model: nn.Module, closure: Callable[[], Any]) -> Ground:
    """Evaluate a loss once, without a trace, and see what a finite perturbation would meet.

    Args:
        model: whose modules are asked for kinks (:func:`stableopt.lyapunov.kink_distance`).
        closure: evaluates the loss.

    Returns:
        What was seen. Not seen are comparisons (``maximum``, ``where``), ``abs``, clamps, and what is within ``nn.RNN``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU())
        >>> look(model, lambda: model(torch.ones(1, 1)).sum())
        Ground(kinks=('leaky_relu',), autocast=False)
    """
    seen = _Seen()
    with eager(), undisturbed(model):
        evaluate_again(lambda: _watched(closure, seen))
    known = kink_distance.dispatch(object)
    modules = [type(m).__name__ for m in model.modules() if kink_distance.dispatch(type(m)) is not known]
    return Ground(tuple(dict.fromkeys([*seen.names, *modules])), seen.autocast)


def _watched(closure: Callable[[], Any], seen: _Seen) -> float:
    with seen:
        closure()
    return 0.0  # a closure may return nothing


class _Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if has_kinks(func, args, kwargs or {}):
            self.names.append(getattr(func, "__name__", str(func)))
        self.autocast = self.autocast or torch._C._is_any_autocast_enabled()  # noqa: SLF001 any device
        return func(*args, **(kwargs or {}))


def has_kinks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch has kinks with these arguments.

    Args:
        func: the function.
        args: its arguments, the tensor first.
        kwargs: those by name.

    Examples:
        >>> x = torch.ones(1)
        >>> (
        ...     has_kinks(nn.functional.elu, (x,), {"alpha": 1.0}),
        ...     has_kinks(nn.functional.elu, (x, 0.5), {}),
        ...     has_kinks(torch.tanh, (x,), {}),
        ... )
        (False, True, False)
    """
    row = _ROUGH.get(func)
    if row is None or row.places is None or not args:
        return row is not None
    return bool(row.places(*args, **options_of(kwargs)))


def refuse_half(optimizer: Optimizer) -> float:
    """Return the eps of the coarsest dtype of the parameters, unless it is too coarse for any twin.

    Args:
        optimizer: of the parameters.

    Raises:
        ValueError: for half precision and less, and for parameters in shards.

    Examples:
        >>> refuse_half(torch.optim.SGD([nn.Parameter(torch.ones(1))])) == 2.0**-23
        True
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(map(is_sharded, parameters)):
        raise ValueError("a twin needs whole parameters, and some are sharded; measure on one process.")
    dtypes = [p.dtype for p in parameters]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    eps = torch.finfo(coarsest).eps
    if eps > torch.finfo(torch.float32).eps:
        raise ValueError(
            f"a parameter is {str(coarsest).removeprefix('torch.')}, too coarse for a distance of two runs; use float32 or float64."
        )
    return eps


def default_size(eps: float, kinks: tuple[str, ...]) -> float:
    """Return the size that stands for an infinitesimal one: 1e-3 in float32, 1e-5 in float64, 1e-6 with kinks.

    Args:
        eps: of the dtype.
        kinks: of the model.

    Examples:
        >>> default_size(2.0**-23, ()), default_size(2.0**-52, ()), default_size(2.0**-52, ("relu",))
        (0.001, 1e-05, 1e-06)
    """
    if kinks:
        return WITH_KINKS
    return 1e-3 if eps > torch.finfo(torch.float64).eps else 1e-5


def refuse_size(size: float, low: float, eps: float, *, finite_size: bool) -> None:
    """Refuse a size that is not resolved, or not small.

    Args:
        size: in units of the parameters.
        low: the part of it to which the distance may fall.
        eps: of the dtype.
        finite_size: whether it is meant to be finite.

    Raises:
        ValueError: if ``low * size`` is below 512 eps, or the size is above 1e-2 and not meant to be finite, or is no number.

    Examples:
        >>> refuse_size(1e-3, 0.1, 2.0**-23, finite_size=False)
        >>> refuse_size(1e-4, 0.1, 2.0**-23, finite_size=False)
        Traceback (most recent call last):
        ValueError: the size 0.0001 may fall to 1e-05, below 6.1e-05, the resolution of the parameters; raise it, or use float64.
    """
    if not 0.0 < size < math.inf:
        raise ValueError(f"the size of a twin must be positive and finite, got {size!r}.")
    if low * size < RESOLUTION * eps:
        raise ValueError(
            f"the size {size:g} may fall to {low * size:g}, below {RESOLUTION * eps:.2g}, the resolution of the parameters; raise "
            "it, or use float64."
        )
    if size > LARGEST and not finite_size:
        raise ValueError(
            f"the size {size:g} is not small (above {LARGEST:g}); lower it, or use finite_size=True for the exponent at this size."
        )
