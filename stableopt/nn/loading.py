r"""Checkpoints of a plain model, loaded into a stabilized one.

A parametrized weight is stored under ``parametrizations.weight.original``, a plain one under ``weight``. A hook on each limited
layer accepts the plain name: the value is moved within the limit, an original is found that gives it, and a warning says so. What
else the parametrization stores keeps its present value.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

__all__ = ["accept_plain_weights", "refuse_plain_weights"]


def accept_plain_weights(module: nn.Module) -> None:
    """Let ``load_state_dict`` of a module with parametrizations accept plain weights; twice is the same as once.

    Args:
        module: a limited layer.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> plain, layer = nn.Linear(2, 2), stabilize(nn.Linear(2, 2))
        >>> with warnings.catch_warnings(record=True):
        ...     warnings.simplefilter("always")
        ...     layer.load_state_dict(plain.state_dict())
        <All keys matched successfully>
    """
    if not _is_registered(module):
        module.register_load_state_dict_pre_hook(_from_plain)


def refuse_plain_weights(module: nn.Module) -> None:
    """Undo :func:`accept_plain_weights`.

    Examples:
        >>> refuse_plain_weights(nn.Linear(2, 2))
    """
    hooks = module._load_state_dict_pre_hooks  # noqa: SLF001 torch has no public accessor
    for key in [key for key, hook in hooks.items() if _unwrapped(hook) is _from_plain]:
        del hooks[key]


def _is_registered(module: nn.Module) -> bool:
    return any(_unwrapped(hook) is _from_plain for hook in module._load_state_dict_pre_hooks.values())  # noqa: SLF001


def _unwrapped(hook: Any) -> Any:
    """Return the function behind torch's wrapper of a hook."""
    return vars(hook).get("hook", hook)


def _from_plain(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: object, strict: bool, missing: object,  # noqa: ARG001 torch's signature
    unexpected: object, errors: list[str],  # noqa: ARG001
) -> None:  # fmt: skip
    """Replace plain weights in a state dict by originals; torch hands over a copy of the dict."""
    if not P.is_parametrized(module):
        return
    chains: Any = module.get_submodule("parametrizations")
    loaded = False
    for name, chain in chains.items():
        here = f"{prefix}parametrizations.{name}."
        plain = state.get(prefix + name)
        if not isinstance(plain, Tensor) or any(key.startswith(f"{here}original") for key in state):
            continue
        mine = chain.state_dict(prefix=here)
        original = mine.get(f"{here}original")
        if original is None:  # several originals of somebody else's parametrization: torch will name the missing keys
            continue
        if plain.shape != original.shape and plain.shape != (expected := _shape(chain)):
            shapes = f"{tuple(plain.shape)} in the checkpoint, {tuple(expected)} here"
            errors.append(f"size mismatch for {prefix}{name}: {shapes}.")
            continue
        del state[prefix + name]
        fitting = _original_for(chain, plain)  # first: it may change what else the map stores
        state |= {key: value for key, value in chain.state_dict(prefix=here).items() if key not in state}
        state[f"{here}original"] = fitting
        loaded = True
    if loaded:
        # the same words for each layer, so that Python shows them once
        warnings.warn(
            "loaded plain weights into stabilized layers: where a norm exceeds its limit, the weight is moved within.",
            stacklevel=2,
        )


@torch.no_grad()
def _shape(chain: Any) -> torch.Size:
    """Return the shape of the weight, which that of an original need not be; on a copy, because a map may have a state."""
    return copy.deepcopy(chain)().shape


@torch.no_grad()
def _original_for(chain: Any, plain: Tensor) -> Tensor:
    """Return the original that the parametrizations map to a weight, or to the nearest one within the limit."""
    target = chain.original
    value = plain.to(device=target.device, dtype=target.dtype) if not target.is_meta else plain
    for parametrization in reversed(list(chain)):
        inverse = getattr(parametrization, "right_inverse", None)
        if inverse is not None:
            value = inverse(value)
    return value
