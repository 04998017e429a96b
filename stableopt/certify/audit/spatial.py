"""Layers without weights that are commonly taken for 1: pools, padding, upsampling, activations, dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation as activations
from torch.nn.modules import dropout as dropouts
from torch.nn.modules import padding as paddings
from torch.nn.modules import pooling as pools

from stableopt.certify.audit.findings import Finding, Witness
from stableopt.certify.audit.scene import Scene, called
from stableopt.certify.audit.search import Map, linear_gain, quotient, steepest
from stableopt.errors import UncertifiableError
from stableopt.nn import lipschitz

__all__ = ["active_dropout", "copying_layers", "slope_witness", "steep_activations"]

_COPYING = (
    paddings._ReflectionPadNd, paddings._ReplicationPadNd, paddings._CircularPadNd, nn.Upsample, nn.Unfold, nn.Fold,  # noqa: SLF001
)  # fmt: skip
_MAXIMA = (pools._MaxPoolNd,)  # noqa: SLF001 torch has no public base class
_REACH, _POINTS = 12.0, 240001


def copying_layers(scene: Scene) -> Iterator[Finding]:
    """Find pools whose windows overlap, and padding and upsampling that copy pixels: their l2 constant is above 1.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> found = next(copying_layers(scene(nn.MaxPool2d(3, stride=1), ())))
        >>> found.claimed, found.attained, found.bound
        (1.0, 3.0, 3.0)
    """
    for path, module in scene.modules():
        if isinstance(module, _MAXIMA):
            kind, why = "overlapping-pool", "reads a pixel in several windows, which all change with it"
            found = _bright_pixel(scene, path, module)
        elif isinstance(module, _COPYING):
            kind, why = "copied-pixels", "shows pixels several times"
            found = _linear(scene, path, module)
        else:
            continue
        if found is not None and found.gain > 1 + 1e-9:
            yield Finding(
                path,
                kind,
                f"{called(module)} {why}: its l2 constant is not 1 but the root of the number of copies.",
                "weak",
                "Use windows that do not overlap (stride = kernel_size), zeros around the image, or count the factor.",
                claimed=1.0,
                attained=found.gain,
                bound=_upper(module),
                witness=found,
            )


def _bright_pixel(scene: Scene, path: str, module: Any) -> Witness | None:
    """Return a black image and one with a bright pixel in its middle."""
    dims = next(d for d in (1, 2, 3) if type(module).__name__.endswith(f"{d}d"))
    sides = [4 * d * k for k, d in zip(_axes(module.kernel_size, dims), _axes(module.dilation, dims), strict=True)]
    x = torch.zeros(1, 1, *sides, dtype=torch.float64)
    run = scene.run(path)
    pairs = []
    for shift in range(max(_axes(module.stride, dims))):
        y = x.clone()
        y[(0, 0, *(s // 2 + min(shift, s // 2 - 1) for s in sides))] = 1.0
        pairs.append(quotient(run, x, y))
    return max(pairs, key=lambda pair: pair.gain)


def _axes(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _linear(scene: Scene, path: str, module: Any) -> Witness | None:
    """Return the pair of a layer that copies pixels, on the image of the run or on one of 8 pixels per axis."""
    call = scene.calls.get(path)
    shapes = [call.single[:1].shape] if call is not None and call.single is not None else []
    shapes += [(1, 1, *[8 + 2 * max(_axes(getattr(module, "padding", 0), 2))] * dims) for dims in (2, 1, 3)]
    if isinstance(module, nn.Fold):
        blocks = math.prod(
            (o + 2 * p - d * (k - 1) - 1) // s + 1
            for o, p, d, k, s in zip(
                *(
                    _axes(v, 2)
                    for v in (module.output_size, module.padding, module.dilation, module.kernel_size, module.stride)
                ),
                strict=True,
            )
        )
        shapes = [(1, math.prod(_axes(module.kernel_size, 2)), blocks)]
    for shape in shapes:
        try:
            return linear_gain(scene.run(path), torch.zeros(shape, dtype=torch.float64))
        except (RuntimeError, ValueError, NotImplementedError):  # an image of another number of axes
            continue
    return None


def steep_activations(scene: Scene) -> Iterator[Finding]:
    """Find activations with slopes above 1, or with none that are bounded.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> found = next(steep_activations(scene(nn.GELU(), ())))
        >>> found.severity, round(found.attained, 6), round(found.bound, 6)
        ('note', 1.128904, 1.128904)
    """
    own = tuple(vars(activations)[name] for name in activations.__all__)
    for path, module in scene.modules():
        if type(module) not in own or isinstance(module, nn.MultiheadAttention):
            continue
        bound = _upper(module)
        if bound <= 1.0:
            continue
        found = _gated(scene, path) if isinstance(module, nn.GLU) else slope_witness(scene.run(path), module)
        if found.gain > 1 + 1e-9:
            jumps = not math.isfinite(bound)
            yield Finding(
                path,
                "no-constant" if jumps else "steep-activation",
                f"{called(module)} {'jumps or grows, so it has no Lipschitz constant' if jumps else 'has slopes above 1'}.",
                "serious" if jumps else "note",
                "Use ReLU, GroupSort, tanh or softplus, whose slopes are at most 1"
                + ("." if jumps else ", or count the factor once per layer."),
                claimed=1.0,
                attained=found.gain,
                bound=bound,
                witness=found,
            )


def _gated(scene: Scene, path: str) -> Witness:
    x = torch.tensor([[100.0, 0.0]], dtype=torch.float64)
    return steepest(scene.run(path), x)


def slope_witness(run: Map, module: nn.Module) -> Witness:
    r"""Return the two neighbors of a grid of [-12, 12] that an elementwise activation moves apart most.

    Examples:
        >>> round(slope_witness(nn.SiLU(), nn.SiLU()).gain, 6)
        1.099839
    """
    x = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    channels = int(getattr(module, "num_parameters", 1))
    with torch.no_grad():
        y = run(x[:, None].expand(-1, channels).contiguous())
        slopes = (y[1:] - y[:-1]).abs() / (x[1:] - x[:-1])[:, None]
    where = int(slopes.argmax())
    row, channel = divmod(where, channels)
    a, b = torch.zeros(2, 1, channels, dtype=torch.float64)
    a[0, channel], b[0, channel] = x[row], x[row + 1]
    return quotient(run, a, b)


def active_dropout(scene: Scene) -> Iterator[Finding]:
    """Find dropout in training mode: it draws at random and multiplies what it keeps by 1/(1 - p).

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> [found.attained for found in active_dropout(scene(nn.Dropout(0.75), ()))]
        [4.0]
    """
    for path, module in scene.modules():
        if not isinstance(module, dropouts._DropoutNd) or path not in scene.training or module.p == 0:  # noqa: SLF001
            continue
        plain = not isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout)
        factor = 1 / (1 - module.p) if plain and module.p < 1 else math.nan
        yield Finding(
            path,
            "active-dropout",
            f"{called(module)}(p={module.p}) is in training mode: two runs differ, and what is kept grows by 1/(1 - p).",
            "note",
            "Call model.eval() before the model is used or certified.",
            claimed=1.0,
            attained=factor,
            bound=factor if math.isfinite(factor) else math.inf,
        )


def _upper(module: nn.Module) -> float:
    try:
        return lipschitz(module).upper
    except (UncertifiableError, ValueError):
        return math.inf
