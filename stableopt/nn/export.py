r"""Leave the limits behind: plain torch weights, proved within their limits."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.nn.constrain import unproject
from stableopt.nn.limits import Limit, estimates_evaluated, limited_slots
from stableopt.nn.loading import refuse_plain_weights
from stableopt.nn.parametrized import restored
from stableopt.nn.recurrent.stock_contracting import contracting_names, forget_contracting
from stableopt.nn.sharded import refuse_spread
from stableopt.nn.slots import Slot
from stableopt.nn.stabilize import forget_record
from stableopt.nn.weights import Geometry

__all__ = ["export", "plain_state_dict", "proved_within", "release"]


def release(model: nn.Module) -> nn.Module:
    """Take the limits of a model off, in place; its weights become plain parameters with the values that they have now.

    Args:
        model: a stabilized model, or one with parts that are kept contracting, or any other, which is left as it is.

    Returns:
        The same model. An optimizer that holds its parameters goes on working, without limits.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it is sharded by ``fully_shard``, or holds NaN where a method trains with an estimate.

    Note:
        The function of the model does not change, not even by rounding; with a method that trains with an estimate that is
        the function in evaluation, whose weights are proved within their limits. Parametrizations of somebody else's
        on the same weights are folded too; other parameters keep theirs, and so do sets given by
        :func:`stableopt.nn.constrain` to other parameters.
        To have the limits proved for the plain weights, use :func:`export`.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> model = release(stabilize(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        >>> sorted(model.state_dict()), type(model[0])
        (['0.bias', '0.weight'], <class 'torch.nn.modules.linear.Linear'>)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"release needs a torch.nn.Module, got {type(model).__name__}.")
    refuse_spread(model)
    for slot, limit in list(limited_slots(model)):
        if limit.by == "projection":
            unproject(slot.module, slot.name)
        else:
            _fold(slot)
    for path, module in list(model.named_modules()):
        for name in contracting_names(module):
            if P.is_parametrized(module, name):
                _fold(Slot(path, module, name, Geometry("linear")))
            else:
                unproject(module, name)
        forget_contracting(module)
    forget_record(model)
    return model


def export(model: nn.Module) -> nn.Module:
    """Return a copy of a model in plain torch, each limited weight proved within its limit in its own dtype.

    Args:
        model: a stabilized model; it is not changed.

    Returns:
        A new model of plain torch layers in the same mode, with plain names in its state dict. It computes what the model does in
        evaluation mode, up to the scaling of weights whose rounded numbers exceed their limit, by a few units in the last place.

    Raises:
        TypeError: if ``model`` is no module.
        UncertifiableError: if no proof is known for a weight.
        ValueError: if a weight holds NaN or infinity, or the model is sharded by ``fully_shard``.

    Note:
        A weight on the meta device has no numbers and is exported as it is. The proof is about each weight;
        :func:`stableopt.nn.lipschitz` of the result proves the product.

    Examples:
        >>> from stableopt.nn import lipschitz, stabilize
        >>> model = stabilize(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), 3.0)
        >>> lipschitz(export(model.bfloat16())).upper <= 3.0
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export needs a torch.nn.Module, got {type(model).__name__}.")
    refuse_spread(model)
    plain = copy.deepcopy(model)
    modes = [(part, part.training) for part in plain.modules()]
    plain.eval()  # a method that trains with an estimate is exact here
    limits = list(limited_slots(plain))
    release(plain)
    for slot, limit in limits:
        weight: Any = slot.module.get_parameter(slot.name) if _is_parameter(slot) else getattr(slot.module, slot.name)
        with torch.no_grad():
            weight.copy_(proved_within(slot, weight.detach(), limit))
    for part, mode in modes:
        part.training = mode
    return plain


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the model has without its limits, with the values in force now.

    Args:
        model: a stabilized model; it is not changed.

    Returns:
        A new dict of detached tensors, for ``load_state_dict`` of the plain model.

    Raises:
        ValueError: if the model is sharded by ``fully_shard``.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> list(plain_state_dict(stabilize(nn.Linear(2, 2))))
        ['weight', 'bias']
    """
    refuse_spread(model)
    return release(copy.deepcopy(model)).state_dict()


def proved_within(slot: Slot, weight: Tensor, limit: Limit) -> Tensor:
    r"""Return a weight whose stored numbers are proved to have an operator norm of at most the limit.

    A part whose proved norm exceeds the limit is scaled by the quotient and a margin, in float64, and rounded to its dtype; the
    margin doubles until the proof succeeds, so that at worst it ends at zero.

    Args:
        slot: which weight of what linear map.
        weight: its numbers.
        limit: the limit.

    Returns:
        ``weight`` itself, or a new tensor.

    Raises:
        UncertifiableError: if no proof is known for this kind of map.
        ValueError: if it holds NaN or infinity.

    Examples:
        >>> from stableopt.nn.slots import slots_of
        >>> slot = slots_of(nn.Linear(3, 3), "")[0]
        >>> W = proved_within(slot, torch.full((3, 3), 0.4).half(), Limit(1.0, "l2", "parametrization", ""))
        >>> slot.geometry.proved(W).upper <= 1.0
        True
    """
    if weight.is_meta or not weight.numel():
        return weight
    if not bool(weight.isfinite().all()):
        raise ValueError(f"'{slot.name}' of {slot.where} holds NaN or infinity, so nothing can be proved about it.")
    norm = slot.matrix_norm(limit.norm)
    fitted = [_fitted(slot, part, limit.radius, norm) for part in weight.chunk(slot.parts)]
    if all(new is None for new in fitted):
        return weight
    parts = weight.chunk(slot.parts)
    return torch.cat([part if new is None else new for part, new in zip(parts, fitted, strict=True)])


def _fitted(slot: Slot, part: Tensor, radius: float, norm: str) -> Tensor | None:
    """Return the scaled part, None if it is proved within the radius as it is."""
    proved = _proved(slot, part, norm)
    if proved <= radius:
        return None
    wide = part.double()
    factor, margin = 1.0, max(2.0**-48, torch.finfo(part.dtype).eps / 8)
    while True:
        factor *= min(1.0, radius / proved) * (1.0 - margin)
        candidate = (wide * factor).to(part.dtype)
        proved = _proved(slot, candidate, norm)
        if proved <= radius:
            return candidate
        margin = min(1.0, 2.0 * margin)


def _proved(slot: Slot, part: Tensor, norm: str) -> float:
    try:
        bound = slot.geometry.proved(part.flatten(1) if slot.flat else part, norm)
    except UncertifiableError as error:
        raise UncertifiableError(f"'{slot.name}' of {slot.where}: {error}") from None
    return bound.upper if not math.isnan(bound.upper) else math.inf


def _is_parameter(slot: Slot) -> bool:
    return slot.name in slot.module._parameters  # noqa: SLF001 torch has no public accessor without inherited names


def _fold(slot: Slot) -> None:
    """Remove all parametrizations of a weight and leave their result."""
    module, name = slot.module, slot.name
    chain: Any = module.get_submodule(f"parametrizations.{name}")
    with torch.no_grad(), estimates_evaluated(slot):
        value = chain()
    if chain.is_tensor:
        trained = chain.original.requires_grad
        P.remove_parametrizations(module, name, leave_parametrized=False)
        parameter: Any = getattr(module, name)
        if parameter.shape == value.shape:
            with torch.no_grad():
                parameter.copy_(value)
        else:  # the original of a factorisation; an optimizer goes on holding the same parameter
            parameter.data = value.clone()
        parameter.requires_grad_(trained)
    else:  # several originals: torch would make a parameter of the computed weight, which carries a graph
        trained = any(p.requires_grad for p in chain.parameters(recurse=False))
        for position in range(chain.ntensors):
            delattr(chain, f"original{position}")
        chain.is_tensor = True
        chain.register_parameter("original", nn.Parameter(value, requires_grad=trained))
        P.remove_parametrizations(module, name, leave_parametrized=False)
    restored(module)
    refuse_plain_weights(module)
