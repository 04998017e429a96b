r"""Computed weights that are kept in evaluation, and never used after anything that they depend on has changed.

A version counter does not tell that: writing through ``.data``, as weight averaging and sharding do, leaves it as it is. So next to
a kept weight there is a copy of all numbers it was computed from, and it is used while the two are equal: a pass over memory,
beside a layer that multiplies with the same numbers for each of its inputs. :func:`stableopt.nn.export` gives a model without
any cost.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["folded", "is_foldable", "same_numbers", "sources_of"]


@dataclass(frozen=True, eq=False)
class _Fold:
    sources: tuple[Tensor, ...]
    settings: tuple[Any, ...]
    weight: Tensor
    version: int


_FOLDS: weakref.WeakKeyDictionary[nn.Module, _Fold] = weakref.WeakKeyDictionary()
"""By the parametrizations of a tensor. Copies and pickles of a module start without."""


def is_foldable(chain: nn.Module) -> bool:
    """Return whether the weight that comes out of these parametrizations may be kept now.

    That is in evaluation mode, where no gradient is asked for, on the CPU (comparing makes an accelerator wait), outside of
    compilers, tracers and transforms, and for maps that say what their results depend on, by an attribute ``dependencies``.

    Args:
        chain: the parametrizations of one tensor, as torch keeps them.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> chain = stabilize(nn.Linear(2, 2)).eval().parametrizations.weight
        >>> is_foldable(chain), is_foldable(chain.requires_grad_(False)), is_foldable(chain.train())
        (False, True, False)
    """
    if chain.training or torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():  # noqa: SLF001 torch has no public question
        return False
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:  # noqa: SLF001 the same
        return False
    maps = [part for part in chain.modules() if part is not chain and not isinstance(part, nn.ModuleList)]
    if not all(hasattr(type(part), "dependencies") and not part.training for part in maps):
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(t) in {Tensor, nn.Parameter} and t.device.type == "cpu" and not (grad and t.requires_grad)
        for t in sources_of(chain)
    )


def folded(chain: nn.Module, compute: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return the weight that was kept if nothing that it depends on has changed since, else compute and keep it.

    Args:
        chain: the parametrizations of one tensor, for which :func:`is_foldable` holds.
        compute: what computes the weight.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> chain = stabilize(nn.Linear(2, 2)).requires_grad_(False).eval().parametrizations.weight
        >>> folded(chain, lambda chain: chain()) is folded(chain, lambda chain: chain())
        True
        >>> chain.original.data.mul_(0.5).shape, folded(chain, lambda chain: chain()).equal(chain())
        (torch.Size([2, 2]), True)
    """
    sources, settings = sources_of(chain), _settings(chain)
    kept = _FOLDS.get(chain)
    if (
        kept is not None
        and kept.settings == settings
        and kept.weight._version == kept.version  # noqa: SLF001 torch has no public access
        and len(kept.sources) == len(sources)
        and all(map(same_numbers, kept.sources, sources))
    ):
        return kept.weight
    with torch.inference_mode(False), torch.no_grad():
        copies = tuple(t.detach().clone() for t in sources)
        weight = compute(chain).detach()
        memory = weight.untyped_storage().data_ptr()
        if any(t.untyped_storage().data_ptr() == memory for t in sources):
            weight = weight.clone()
        _FOLDS[chain] = _Fold(copies, settings, weight, weight._version)  # noqa: SLF001
    return weight


def sources_of(chain: nn.Module) -> list[Tensor]:
    """Return all tensors that a weight depends on.

    Args:
        chain: the parametrizations of one tensor, as torch keeps them.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> len(sources_of(stabilize(nn.Linear(2, 2), method="gram").parametrizations.weight))
        1
    """
    return [t for part in _involved(chain) for t in (*part.parameters(), *part.buffers())]


def _involved(chain: nn.Module) -> tuple[nn.Module, ...]:
    return chain, *(other for part in chain.modules() for other in getattr(part, "dependencies", ()))


def _settings(chain: nn.Module) -> tuple[Any, ...]:
    """Return all other settings of the maps: their public attributes that are no tensors or modules."""
    return tuple(
        (name, value)
        for whole in _involved(chain)
        for part in whole.modules()
        for name, value in vars(part).items()
        if not name.startswith("_") and not isinstance(value, Tensor | nn.Module)
    )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers; what holds NaN is computed anew.

    Args:
        a: a tensor.
        b: another, on the same device.

    Examples:
        >>> same_numbers(torch.ones(2), torch.ones(2)), same_numbers(torch.ones(2), torch.ones(3))
        (True, False)
    """
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
