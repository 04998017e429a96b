"""Models spread over several processes: what needs all numbers in one of them is refused, with the way to get them there."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["class_of", "is_spread", "refuse_spread", "reshard"]


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without the one that ``fully_shard`` puts in front of it.

    Args:
        module: any module.

    Examples:
        >>> class_of(nn.Linear(1, 1))
        <class 'torch.nn.modules.linear.Linear'>
    """
    if is_spread(module, deep=False):
        return type(module).__mro__[2]  # after that class and FSDPModule
    return type(module)


def is_spread(model: nn.Module, *, deep: bool = True) -> bool:
    """Return whether ``fully_shard`` was applied to a module or to a part of it.

    Args:
        model: any module.
        deep: whether to ask the parts as well.

    Examples:
        >>> is_spread(nn.Linear(1, 1))
        False
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in (model.modules() if deep else [model]))


def refuse_spread(model: nn.Module, error: type[Exception] = ValueError) -> None:
    """Refuse a model that ``fully_shard`` has spread over several processes.

    Args:
        model: any module.
        error: what to raise.

    Examples:
        >>> refuse_spread(nn.Linear(1, 1))
    """
    if is_spread(model):
        raise error(
            "the model is sharded by fully_shard, so no process holds its weights as a whole. Load its state dict, "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, into a model that was made and stabilized in the same way and is not "
            "sharded, and use that one."
        )


def reshard(model: nn.Module) -> None:
    """Free gathered weights, for the next forward map to gather them anew.

    A forward map without a backward pass leaves the weights of the outermost sharded module gathered; after an optimizer step the
    next forward map would use those old numbers.

    Args:
        model: any module; nothing is done without ``fully_shard``.

    Examples:
        >>> reshard(nn.Linear(1, 1))
    """
    if not is_spread(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
