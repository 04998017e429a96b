"""The operations of torch with a kink or a jump, as one table: where the kinks are, and the slopes between them.

What looks for kinks reads it: the counter of the monitor, bounds of Clarke's set, twins, and central differences. An operation has
names at two levels: those of the functions that a program calls, and those of what torch computes (ATen), which several functions
share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KINKED", "Kinked", "functions_of", "is_kinked", "operations_of", "options_of"]

Kind: TypeAlias = Literal["activation", "clamp", "modulus", "pool", "comparison", "jump", "loss"]


@dataclass(frozen=True)
class Kinked:
    """An operation with kinks or jumps.

    Args:
        kind: an activation; a clamp, also applied to weights and to numbers that must not be zero; what has kinks where entries
            meet (pools, comparisons); a jump; a loss.
        functions: names in ``torch``, ``torch.Tensor`` and ``torch.nn.functional``, without those in place.
        operations: names in ATen, without namespace and overload.
        places: of its arguments as they are called: the kinks; None where they are not at fixed places of one number.
        slopes: of the same arguments: the slopes of the pieces between the kinks, one more; None for what is not piecewise
            linear and continuous, which may depend on the arguments.

    Examples:
        >>> row = next(row for row in KINKED if "hardtanh" in row.functions)
        >>> row.places(torch.ones(1), -2.0, 3.0), row.slopes(torch.ones(1))
        ((-2.0, 3.0), (0.0, 1.0, 0.0))
    """

    kind: Kind
    functions: tuple[str, ...]
    operations: tuple[str, ...]
    places: Callable[..., tuple[float, ...]] | None = None
    slopes: Callable[..., tuple[Any, ...] | None] | None = None


def _are(*values: float) -> Callable[..., tuple[float, ...]]:
    return lambda *_args, **_kwargs: values


def _leaky_slopes(_z: Tensor, negative_slope: float = 0.01, *_: Any, **__: Any) -> tuple[float, ...]:
    return float(negative_slope), 1.0


def _prelu_slopes(z: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    slope = weight.detach().double()
    return (slope.reshape(-1, *[1] * (z.ndim - 2)) if slope.numel() > 1 else slope), 1.0


def _rrelu_slopes(
    _z: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any
) -> tuple[float, ...] | None:
    return None if training else ((lower + upper) / 2, 1.0)


def _hardtanh(_z: Tensor, min_val: float = -1.0, max_val: float = 1.0, *_: Any, **__: Any) -> tuple[float, ...]:
    return float(min_val), float(max_val)


def _hardtanh_slopes(z: Tensor, *args: Any, **kwargs: Any) -> tuple[float, ...] | None:
    low, high = _hardtanh(z, *args, **kwargs)
    return (0.0, 1.0, 0.0) if low < high else None


def _softshrink(_z: Tensor, lambd: float = 0.5, *_: Any, **__: Any) -> tuple[float, ...]:
    return -float(lambd), float(lambd)


def _threshold(_z: Tensor, threshold: float, *_: Any, **__: Any) -> tuple[float, ...]:
    return (float(threshold),)


def _threshold_slopes(_z: Tensor, threshold: float, value: float, *_: Any, **__: Any) -> tuple[float, ...] | None:
    return (0.0, 1.0) if threshold == value else None  # else it jumps


def _elu(_z: Tensor, alpha: float = 1.0, *_: Any, **__: Any) -> tuple[float, ...]:
    return () if alpha == 1.0 else (0.0,)


def _clamp(_z: Tensor, min: Any = None, max: Any = None, *_: Any, **__: Any) -> tuple[float, ...]:  # noqa: A002 torch's names
    return tuple(float(bound) for bound in (min, max) if isinstance(bound, int | float) and math.isfinite(bound))


def _clamp_slopes(_z: Tensor, min: Any = None, max: Any = None, *_: Any, **__: Any) -> tuple[float, ...] | None:  # noqa: A002
    if not all(bound is None or isinstance(bound, int | float) for bound in (min, max)):
        return None
    low, high = -math.inf if min is None else float(min), math.inf if max is None else float(max)
    if not low < high or low == math.inf or high == -math.inf:
        return None
    return (0.0,) * math.isfinite(low) + (1.0,) + (0.0,) * math.isfinite(high)


def _max_only(z: Tensor, max: Any) -> tuple[float, ...]:  # noqa: A002 torch's name
    return _clamp(z, None, max)


def _max_slopes(z: Tensor, max: Any) -> tuple[float, ...] | None:  # noqa: A002 torch's name
    return _clamp_slopes(z, None, max)


_ZERO = _are(0.0)

_ACTIVATIONS = (
    Kinked("activation", ("relu",), ("relu",), _ZERO, _are(0.0, 1.0)),
    Kinked("activation", ("leaky_relu",), ("leaky_relu",), _ZERO, _leaky_slopes),
    Kinked("activation", ("prelu",), ("prelu", "_prelu_kernel"), _ZERO, _prelu_slopes),
    Kinked("activation", ("rrelu",), ("rrelu_with_noise",), _ZERO, _rrelu_slopes),
    Kinked("activation", ("hardtanh",), ("hardtanh",), _hardtanh, _hardtanh_slopes),
    Kinked("activation", ("relu6",), ("hardtanh",), _are(0.0, 6.0), _are(0.0, 1.0, 0.0)),
    Kinked("activation", ("hardsigmoid",), ("hardsigmoid",), _are(-3.0, 3.0)),
    Kinked("activation", ("hardswish",), ("hardswish",), _are(-3.0, 3.0)),
    Kinked("activation", ("softshrink",), ("softshrink",), _softshrink, _are(1.0, 0.0, 1.0)),
    Kinked("activation", ("hardshrink",), ("hardshrink",), _softshrink),
    Kinked("activation", ("selu",), ("selu",), _ZERO),
    Kinked("activation", ("elu",), ("elu",), _elu),
    Kinked("activation", ("threshold",), ("threshold",), _threshold, _threshold_slopes),
)

_POOLS = (
    *(
        Kinked("pool", (f"{kind}max_pool{n}d",), (f"{kind}max_pool{n}d", f"{kind}max_pool{n}d_with_indices"))
        for kind in ("", "adaptive_")
        for n in (1, 2, 3)
    ),
    *(Kinked("pool", (f"fractional_max_pool{n}d",), (f"fractional_max_pool{n}d",)) for n in (2, 3)),
    Kinked("pool", (), ("mkldnn_max_pool2d", "mkldnn_max_pool3d")),
)

_COMPARISONS = tuple(
    Kinked("comparison", (name,), (name,))
    for name in (
        "max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin", "sort", "msort", "topk", "kthvalue",
        "median", "nanmedian", "mode", "cummax", "cummin",
    )
)  # fmt: skip

_JUMPS = tuple(
    Kinked("jump", (name,), (name,))
    for name in (
        "sgn", "sign", "round", "floor", "ceil", "trunc", "frac", "fmod", "remainder", "heaviside", "floor_divide",
    )
)  # fmt: skip

KINKED: tuple[Kinked, ...] = (
    *_ACTIVATIONS,
    Kinked("clamp", ("clamp", "clip"), ("clamp",), _clamp, _clamp_slopes),
    Kinked("clamp", ("clamp_min",), ("clamp_min",), _clamp, _clamp_slopes),
    Kinked("clamp", ("clamp_max",), ("clamp_max",), _max_only, _max_slopes),
    Kinked("modulus", ("abs", "absolute"), ("abs",), _ZERO, _are(-1.0, 1.0)),
    *_POOLS,
    *_COMPARISONS,
    *_JUMPS,
    *(Kinked("loss", (name,), ()) for name in ("l1_loss", "hinge_embedding_loss", "margin_ranking_loss")),
)
"""The table."""


def functions_of(*kinds: Kind) -> dict[Any, Kinked]:
    """Return the rows of some kinds, by the functions of torch that have their names, in place or not.

    Args:
        kinds: of the rows; all without any.

    Examples:
        >>> functions_of("activation")[F.relu] is functions_of()[Tensor.relu_]
        True
    """
    found: dict[Any, Kinked] = {}
    for row in KINKED:
        names = [name + end for name in row.functions for end in ("", "_") if not kinds or row.kind in kinds]
        found |= {getattr(home, n): row for n in names for home in (torch, Tensor, F) if hasattr(home, n)}
    return found


def options_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name of a call that say where its kinks are: all but the input and whether it is written to.

    Args:
        kwargs: of the call.

    Examples:
        >>> options_of({"input": None, "inplace": True, "alpha": 0.5})
        {'alpha': 0.5}
    """
    return {name: value for name, value in kwargs.items() if name not in {"input", "inplace"}}


def operations_of(*kinds: Kind) -> frozenset[str]:
    """Return the ATen names of the rows of some kinds, in place or not alike; see :func:`is_kinked` for one call.

    Args:
        kinds: of the rows; all without any.

    Examples:
        >>> sorted(operations_of("modulus"))
        ['abs']
    """
    return frozenset(name for row in KINKED if not kinds or row.kind in kinds for name in row.operations)


_OPERATIONS = operations_of()


def is_kinked(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation of ATen has a kink or a jump with these arguments.

    Args:
        name: without namespace, overload and the underscore of what works in place.
        args: of the call.

    Examples:
        >>> x = torch.ones(1)
        >>> (
        ...     is_kinked("relu", (x,)),
        ...     is_kinked("elu", (x, 0.5)),
        ...     is_kinked("elu", (x, 0.5, 1, 2.0)),
        ...     is_kinked("exp", (x,)),
        ... )
        (True, True, False, False)
    """
    if name == "elu":  # (z, alpha, scale, input_scale): also selu
        alpha, _, input_scale = (*args[1:4], *(1.0, 1.0, 1.0)[len(args) - 1 :])
        return alpha * input_scale != 1.0
    return name in _OPERATIONS
