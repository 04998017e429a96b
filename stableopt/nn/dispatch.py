r"""Where the Lipschitz rules of module types are registered, and what a rule may be applied to.

A rule belongs to one class and to its ``forward``. A subclass that overrides anything which takes part in the forward map, and
a module with a forward hook, computes something else: no rule applies to it, and the search fails closed.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules import module as hooks

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.input_clip import ClippedInput
from stableopt.nn.parametrized import is_adopted

__all__ = [
    "NORMS",
    "TOKEN_MAX",
    "check_forward",
    "lipschitz_rule",
    "refusal",
    "refuse",
    "refused_classes",
    "registered_class",
    "require_norm",
]

NORMS = ("l2", "linf", "l1")
TOKEN_MAX = "token_max"  # noqa: S105 no password: the name of a norm
r"""The norm :math:`\max_i\|x_i\|_2` over the tokens :math:`x_i`: all dimensions between the batch and the features."""

_REFUSALS: dict[type[nn.Module], str] = {}

_HARMLESS = frozenset(
    {
        "__abstractmethods__", "__annotations__", "__constants__", "__deepcopy__", "__dict__", "__doc__", "__firstlineno__",
        "__getstate__", "__init__", "__module__", "__orig_bases__", "__parameters__", "__qualname__", "__repr__",
        "__setstate__", "__static_attributes__", "__weakref__", "_abc_impl", "_version", "extra_repr", "reset_parameters",
    }
)  # fmt: skip
"""What a subclass may define anew without changing the map: construction, printing, copying."""


@functools.singledispatch
def lipschitz_rule(module: nn.Module, norm: str) -> Bound:
    """Return the proved Lipschitz bound of one module; the registry behind :func:`stableopt.nn.lipschitz`.

    Register a rule for a class of your own with ``@lipschitz_rule.register(MyModule)``. Call :func:`stableopt.nn.lipschitz`
    instead of this function: it also checks hooks, subclasses and the norm.

    Args:
        module: the module; a rule reads its current parameters.
        norm: ``"l2"``, ``"linf"`` or ``"l1"``, the norm of the input and of the output.

    Returns:
        An enclosure of the smallest Lipschitz constant whose upper end is proved.

    Raises:
        UncertifiableError: for a class without a rule.

    Examples:
        >>> class Negate(nn.Module):
        ...     def forward(self, x):
        ...         return -x
        >>> @lipschitz_rule.register(Negate)
        ... def _(module: Negate, norm: str) -> Bound:
        ...     return Bound.point(1.0)
        >>> lipschitz_rule(Negate(), "l2")
        Bound(lower=1.0, upper=1.0, proved=True)
    """
    raise UncertifiableError(refusal(module, norm))


def registered_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class whose rule would be used for ``module``, or None if there is none.

    Examples:
        >>> registered_class(nn.Module()) is None
        True
    """
    for kind in type(module).__mro__:
        if kind in lipschitz_rule.registry and kind is not object:
            return kind
    return None


def check_forward(module: nn.Module, kind: type[nn.Module], path: str = "") -> None:
    """Refuse a module whose forward map need not be the one of the class ``kind``.

    Args:
        module: the module.
        kind: the class whose rule is about to be used, a base class of the module's class.
        path: dotted name for the message.

    Raises:
        UncertifiableError: if a subclass overrides part of the forward map, the instance has its own ``forward``, or a forward
            hook is registered.

    Examples:
        >>> check_forward(nn.ReLU(), nn.ReLU)
        >>> layer = nn.Linear(1, 1)
        >>> handle = layer.register_forward_hook(lambda module, args, output: 2 * output)
        >>> check_forward(layer, nn.Linear, "0")
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: '0' (Linear) has a forward hook, which may change its output ...
    """
    where = named(module, path)
    overridden = sorted(
        name
        for c in type(module).__mro__[: type(module).__mro__.index(kind)]
        if not is_adopted(c)
        for name in vars(c)
        if name not in _HARMLESS and name in dir(kind)
    )
    overridden += sorted(name for name in vars(module) if callable(getattr(kind, name, None)))
    if overridden:
        raise UncertifiableError(
            f"{where} overrides {', '.join(overridden)} of {kind.__name__}, so the rule of {kind.__name__} need not hold for it. "
            f"Register its own: @stableopt.nn.lipschitz_rule.register({type(module).__name__})."
        )
    before = module._forward_pre_hooks.values()  # noqa: SLF001 torch has no public accessor
    recurrent = issubclass(kind, nn.RNNBase | nn.RNNCellBase)  # their rules know what clip_input does
    if module._forward_hooks or not all(recurrent and type(hook) is ClippedInput for hook in before):  # noqa: SLF001
        raise UncertifiableError(
            f"{where} has a forward hook, which may change its output or its weight. Remove the hook first "
            "(torch.nn.utils.weight_norm and spectral_norm of the old kind are such hooks; use torch.nn.utils.parametrizations)."
        )
    everywhere = [*hooks._global_forward_hooks.values(), *hooks._global_forward_pre_hooks.values()]  # noqa: SLF001
    ours = "stableopt."  # a hook of this package only looks on
    if not all(str(getattr(hook, "__module__", "")).startswith(ours) for hook in everywhere):
        raise UncertifiableError(
            f"a forward hook is registered for all modules, which may change the output of {where}. Remove it first: call "
            "remove() on the handle that register_module_forward_hook or register_module_forward_pre_hook returned."
        )


def refuse(kind: type[nn.Module], reason: str) -> None:
    """Note why a class has no rule, for the message; a rule that is registered for the class wins.

    Args:
        kind: the class.
        reason: the end of a sentence that begins with "no Lipschitz rule is known for the class:", without a final period; it says
            what to do.

    Examples:
        >>> class Squared(nn.Module):
        ...     def forward(self, x):
        ...         return x * x
        >>> refuse(Squared, "its slope grows with the input. Use an absolute value")
        >>> refusal(Squared(), "l2")
        'no l2 Lipschitz rule is known for Squared: its slope grows with the input. Use an absolute value.'
    """
    _REFUSALS[kind] = reason


def refusal(module: nn.Module, norm: str) -> str:
    """Return the sentence that says why a module has no rule and what to do.

    Examples:
        >>> refusal(nn.Module(), "l1").startswith("no l1 Lipschitz rule is known for Module")
        True
    """
    name = type(module).__name__
    start = f"no {norm} Lipschitz rule is known for {name}"
    if type(module) in _REFUSALS:
        return f"{start}: {_REFUSALS[type(module)]}."
    return (
        f"{start}. Register one: @stableopt.nn.lipschitz_rule.register({name}) on a function (module, norm) -> Bound."
    )


def refused_classes() -> frozenset[type[nn.Module]]:
    """Return the classes with a noted reason.

    Examples:
        >>> nn.ReLU in refused_classes()
        False
    """
    return frozenset(_REFUSALS)


def require_norm(norm: str) -> None:
    """Refuse a norm that no rule knows.

    Raises:
        ValueError: unless ``norm`` is ``"l2"``, ``"linf"``, ``"l1"`` or ``"token_max"``.

    Examples:
        >>> require_norm("l1")
    """
    if norm not in NORMS and norm != TOKEN_MAX:
        raise ValueError(f"norm must be one of 'l2', 'linf', 'l1' and 'token_max', got {norm!r}.")


def named(module: nn.Module, path: str) -> str:
    """Return how a message calls a module: its path and its class.

    Examples:
        >>> named(nn.ReLU(), "1"), named(nn.ReLU(), "")
        ("'1' (ReLU)", 'the module (ReLU)')
    """
    return f"'{path}' ({type(module).__name__})" if path else f"the module ({type(module).__name__})"
