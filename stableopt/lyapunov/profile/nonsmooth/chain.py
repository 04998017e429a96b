"""Models that are chains of affine layers and piecewise-linear activations, as matrices and slopes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stableopt.lyapunov.layers.walk import eager
from stableopt.lyapunov.profile.nonsmooth.slopes import Pieces, pieces
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.activations import GroupSort, Scale

__all__ = ["Affine", "Call", "NotAChain", "affine", "calls_of", "matrix_of"]

Array = NDArray[np.float64]

LARGEST_MATRIX = 2**24
"""Entries of a matrix of a layer."""


class NotAChain(Exception):  # noqa: N818 a reason
    """A model that is not a chain of layers that are known; the message is the reason.

    Examples:
        >>> raise NotAChain("Softmax is neither affine nor piecewise linear")
        Traceback (most recent call last):
        stableopt.lyapunov.profile.nonsmooth.chain.NotAChain: Softmax is neither affine nor piecewise linear
    """


@dataclass(frozen=True)
class Affine:
    r"""The linear part of a layer, applied to a batch in float64.

    Args:
        apply: the map without its bias.
        magnitude: the same map with the moduli of its numbers.
        roundings: each entry of the matrix of ``apply`` is off by at most :math:`\gamma_k` times that of ``magnitude``.

    Examples:
        >>> affine(nn.Linear(2, 1)).roundings
        0
    """

    apply: Callable[[Tensor], Tensor]
    magnitude: Callable[[Tensor], Tensor]
    roundings: int = 0


@functools.singledispatch
def affine(module: nn.Module) -> Affine | None:  # noqa: ARG001 for classes that are registered
    """Return the linear part of an affine layer; None for a module that is none, as it is now. Register a class of your own.

    Args:
        module: a linear or convolutional layer, a pooling by means, a batch normalization in evaluation mode, a reshaping, a
            padding or an upsampling by copies, an inactive dropout.

    Examples:
        >>> affine(nn.ReLU()) is None
        True
    """
    return None


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(device="cpu", dtype=torch.float64)


@affine.register(nn.Linear)
def _linear(module: nn.Linear) -> Affine:
    W = _wide(module.weight)
    return Affine(lambda x: F.linear(x, W), lambda x: F.linear(x, W.abs()))


@affine.register(nn.Conv1d)
@affine.register(nn.Conv2d)
@affine.register(nn.Conv3d)
def _conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Affine:
    W, layer = _wide(module.weight), module._conv_forward  # noqa: SLF001 with all its paddings
    # with zeros around it, each pixel meets each output once; otherwise once for each copy
    roundings = 0 if module.padding_mode == "zeros" else 2 * math.prod(module.kernel_size)
    return Affine(lambda x: layer(x, W, None), lambda x: layer(x, W.abs(), None), roundings)


@affine.register(nn.ConvTranspose1d)
@affine.register(nn.ConvTranspose2d)
@affine.register(nn.ConvTranspose3d)
def _conv_transpose(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Affine:
    W, options = _wide(module.weight), (module.stride, module.padding, module.output_padding, module.groups)
    function: Any = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[W.ndim]
    return Affine(
        lambda x: function(x, W, None, *options, module.dilation),
        lambda x: function(x, W.abs(), None, *options, module.dilation),
    )


@affine.register(nn.Identity)
@affine.register(nn.Flatten)
@affine.register(nn.Unflatten)
@affine.register(nn.PixelShuffle)
@affine.register(nn.PixelUnshuffle)
@affine.register(nn.ChannelShuffle)
@affine.register(nn.ZeroPad1d)
@affine.register(nn.ZeroPad2d)
@affine.register(nn.ZeroPad3d)
@affine.register(nn.ReplicationPad1d)
@affine.register(nn.ReplicationPad2d)
@affine.register(nn.ReflectionPad1d)
@affine.register(nn.ReflectionPad2d)
@affine.register(nn.CircularPad1d)
@affine.register(nn.CircularPad2d)
def _copies(module: nn.Module) -> Affine:
    return Affine(module.forward, module.forward)


@affine.register(nn.AvgPool1d)
@affine.register(nn.AvgPool2d)
@affine.register(nn.AvgPool3d)
@affine.register(nn.AdaptiveAvgPool1d)
@affine.register(nn.AdaptiveAvgPool2d)
@affine.register(nn.AdaptiveAvgPool3d)
def _mean(module: nn.Module) -> Affine:
    return Affine(module.forward, module.forward, 3)  # a sum with one term that is not 0, and a division


@affine.register(nn.Dropout)
@affine.register(nn.Dropout1d)
@affine.register(nn.Dropout2d)
@affine.register(nn.Dropout3d)
def _dropout(module: nn.Dropout) -> Affine | None:
    return None if module.training and module.p > 0 else Affine(lambda x: x, lambda x: x)


@affine.register(nn.BatchNorm1d)
@affine.register(nn.BatchNorm2d)
@affine.register(nn.BatchNorm3d)
def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> Affine | None:
    if module.training or module.running_var is None:
        return None
    scale = (_wide(module.running_var) + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * _wide(module.weight)

    def times(x: Tensor, factor: Tensor) -> Tensor:
        return x * factor.reshape(-1, *[1] * (x.ndim - 2))

    return Affine(lambda x: times(x, scale), lambda x: times(x, scale.abs()), 8)


@affine.register(Scale)
def _scale(module: Scale) -> Affine:
    return Affine(lambda x: x * module.factor, lambda x: x * abs(module.factor))


def matrix_of(part: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Array:
    """Return the matrix of a linear map of samples, from its values at the unit vectors.

    Args:
        part: of a batch.
        shape: of a sample.

    Raises:
        NotAChain: if it has more than 2**24 entries.

    Examples:
        >>> matrix_of(lambda x: 2.0 * x, (2,))
        array([[2., 0.],
               [0., 2.]])
    """
    n = math.prod(shape)
    with torch.no_grad():
        size = part(torch.zeros(1, *shape, dtype=torch.float64)).numel()
        if n * size > LARGEST_MATRIX:
            raise NotAChain(f"the matrix of a layer has {size} x {n} entries, more than {LARGEST_MATRIX}")
        images = part(torch.eye(n, dtype=torch.float64).reshape(n, *shape))
    return np.ascontiguousarray(images.reshape(n, -1).numpy().T)


@dataclass(frozen=True)
class Call:
    """One layer of a chain, with what came into it.

    Args:
        name: path of the module.
        module: the layer.
        z: its input, with the batch.
        part: its linear part, if it is affine.
        pieces: its pieces, if it is piecewise linear; None for a layer that sorts.
    """

    name: str
    module: nn.Module
    z: Tensor
    part: Affine | None
    pieces: Pieces | None


def calls_of(model: nn.Module, x: Tensor) -> list[Call]:
    """Evaluate a model without a trace, and return its layers in the order of their calls.

    Args:
        model: whose modules call each other one after the other; in evaluation mode or without what that changes.
        x: a batch.

    Raises:
        NotAChain: if a layer is not known, or gets anything but what the last one has returned.

    Examples:
        >>> [call.name for call in calls_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2))]
        ['0', '1']
    """
    calls: list[Call] = []
    last: list[tuple[Tensor, int]] = [(x, x._version)]  # noqa: SLF001 the documented way to see a change in place

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        current, version = last[0]
        if len(args) != 1 or args[0] is not current or current._version != version:  # noqa: SLF001
            raise NotAChain(f"layer {name!r} gets something else than what the layer before it returns")
        calls.append(_call(name, module, args[0].detach().clone()))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        last[0] = output, output._version  # noqa: SLF001

    with ExitStack() as stack, torch.no_grad(), eager(), undisturbed(model):
        atoms = {id(module): (name, module) for name, module in reversed([*_atoms(model, "")])}
        for name, module in atoms.values():
            stack.callback(module.register_forward_pre_hook(functools.partial(_named, before, name)).remove)
            stack.callback(module.register_forward_hook(after, prepend=True).remove)
        output = model(x)
    if not isinstance(output, Tensor) or output is not last[0][0] or output._version != last[0][1]:  # noqa: SLF001
        raise NotAChain("the model changes what its last layer returns")
    return calls


def _named(function: Callable[..., None], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    function(name, module, args)


def _call(name: str, module: nn.Module, z: Tensor) -> Call:
    part = affine(module) if _is_known(module) else None
    sorts = isinstance(module, GroupSort) and _is_known(module)
    found = pieces(module, z) if part is None and _is_known(module) else None
    if part is None and found is None and not sorts:
        mode = (
            " in training mode"
            if module.training and affine.dispatch(type(module)) is not affine.dispatch(object)
            else ""
        )
        raise NotAChain(f"{type(module).__name__} {name!r} is neither affine nor piecewise linear{mode}")
    return Call(name, module, z, part, found)


def _is_known(module: nn.Module) -> bool:
    """Whether its class is registered, or computes the same as one that is."""
    if "forward" in vars(module):
        return False
    for base in type(module).__mro__:
        if base is not object and (base is GroupSort or base in affine.registry or base in pieces.registry):
            return type(module).forward is getattr(base, "forward", None)  # one that overrides it does something else
    return False


def _atoms(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    known = _is_known(module)
    if known or next(module.children(), None) is None:
        yield name, module
        return
    for key, child in module.named_children():
        yield from _atoms(child, f"{name}.{key}" if name else key)
