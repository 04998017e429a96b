"""Which modules a certificate can speak about, and the sentence for those that it cannot."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from stableopt.certify.network import CertifiedNetwork
from stableopt.errors import UncertifiableError
from stableopt.nn.budget import LearnedBudget
from stableopt.nn.dispatch import lipschitz_rule, named, refusal, refused_classes, registered_class
from stableopt.nn.parametrized import plain_class
from stableopt.nn.recurrent import RecurrentCell
from stableopt.nn.residual.fields import Field

__all__ = ["KNOWN", "is_foreign", "uncovered"]

KNOWN = (
    "the layers and activations of torch that have a constant, those of stableopt.nn, nn.Sequential, and modules whose forward "
    "calls these and operations of torch with a constant"
)
"""What has a rule, for messages."""

_LOSS = "it is a loss, which compares its input with a target. Certify the model without it"
_REASONS: dict[type, str] = {
    Field: "it is the right-hand side of an equation, a part of a block. Certify the block or the flow that uses it",
    RecurrentCell: "it is one step of a recurrence, a map of an input and a state. Certify the Recurrence that runs it",
    LearnedBudget: "it is a number that layers share, and no map. Certify the model that it belongs to",
    torch.jit.ScriptModule: "it is compiled, so its operations cannot be read. Certify the module that it was made from",
    CertifiedNetwork: "it is what a certificate speaks about. Use the certificate that it comes from",
    LazyModuleMixin: "it has no weights yet. Run it once on an input",
    nn.LogSoftmax: (
        "its constant grows with the number of classes. Certify the logits before it: the differences of two of its outputs, and "
        "so the radii, are those of the logits"
    ),
}


def uncovered(module: nn.Module, path: str) -> str:
    """Return the sentence for a module without a rule: which, why, and what to do.

    Args:
        module: the module.
        path: its dotted name, empty for the model itself.

    Examples:
        >>> print(uncovered(nn.LogSoftmax(1), "1"))
        '1' (LogSoftmax) cannot be certified: its constant grows with the number of classes. Certify the logits before it: ...
    """
    return f"{named(module, path)} cannot be certified: {_reason(module)}."


def _reason(module: nn.Module) -> str:
    kind = plain_class(module)
    known = next((_REASONS[base] for base in kind.__mro__ if base in _REASONS), None)
    if known is not None:
        return known
    if kind.__module__.startswith("stableopt.nn.losses"):
        return _LOSS
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return "it is compiled. Certify the module that torch.compile was given, model._orig_mod"
    if kind in refused_classes():
        return refusal(module, "l2").rstrip(".")
    if registered_class(module) is not None:  # its rule may be a sentence
        try:
            lipschitz_rule(module, "l2")
        except UncertifiableError as error:
            return str(error).rstrip(".")
    return (
        f"{kind.__name__} has no rule for certificates. Those with one are {KNOWN}. Replace it, or register a rule that writes the "
        f"operations it computes: @stableopt.certify.fold.register({kind.__name__})"
    )


def is_foreign(module: nn.Module) -> bool:
    """Return whether a module is of somebody else's class, or a list of modules: its forward may be recorded.

    Args:
        module: the module.

    Examples:
        >>> is_foreign(nn.ModuleList()), is_foreign(nn.GLU())
        (True, False)
    """
    kind = plain_class(module)
    lists = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return (
        kind in lists or issubclass(kind, fx.GraphModule) or kind.__module__.split(".")[0] not in {"torch", "stableopt"}
    )
