r"""Where the rules are registered that read a layer as operations, and what a rule may be applied to.

A rule belongs to one class and to its ``forward``. A subclass that overrides anything that takes part in the forward map, and a
module with a forward hook, computes something else: no rule applies to it.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.parameter import is_lazy

from stableopt.certify.coverage import uncovered
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import check_forward, named

__all__ = ["checked_fold", "fold", "has_rule", "rule_class"]


@functools.singledispatch
def fold(module: nn.Module, graph: Builder, value: Value) -> Value:  # noqa: ARG001 the signature of every rule
    r"""Write the operations that a layer computes in evaluation mode into a program; the registry of :func:`certify`.

    Register a class of your own with ``@stableopt.certify.fold.register(MyModule)``. The rule appends operations by
    ``graph.add(op, *values, **settings)``, folds children by ``graph.fold(child, value, name)``, and returns the value that is the
    output; ``value`` itself for the identity. Real settings are floats, tensors are handed over as they are and copied. The
    certified network consists of these operations: that they compute what the module computes is checked on random inputs.

    Args:
        module: the layer, in evaluation mode.
        graph: the program under construction; ``graph.norm`` is the norm in which bounds will be proved.
        value: the input of the layer; ``value.shape`` is its shape without the batch dimension.

    Returns:
        The output of the layer.

    Raises:
        UncertifiableError: for a class without a rule, or settings without a proved bound.
        ValueError: if the layer does not fit the shape of its input.

    Examples:
        >>> class Negate(nn.Module):
        ...     def forward(self, x):
        ...         return -x
        >>> @fold.register(Negate)
        ... def _(module, graph, value):
        ...     return graph.add("scale", value, factor=-1.0)
        >>> graph = Builder((3,))
        >>> fold(Negate(), graph, graph.input)
        Value(number=1, shape=(3,))
        >>> graph.nodes
        [{'op': 'scale', 'in': [0], 'factor': -1.0}]
    """
    raise UncertifiableError(uncovered(module, graph.path))


def rule_class(module: nn.Module) -> type | None:
    """Return the class whose rule would be used for a module, or None if there is none.

    Examples:
        >>> class Own(nn.Linear):
        ...     pass
        >>> rule_class(Own(1, 1)).__name__, rule_class(nn.Module()) is None
        ('Linear', True)
    """
    return next((kind for kind in type(module).__mro__ if kind is not object and kind in fold.registry), None)


def has_rule(module: nn.Module) -> bool:
    """Return whether a module has a rule.

    Examples:
        >>> has_rule(nn.ReLU()), has_rule(nn.GLU())
        (True, False)
    """
    return rule_class(module) is not None


def checked_fold(module: nn.Module, graph: Builder, value: Value) -> Value:
    """Fold a module after checking that the rule of its class applies to it, and say in every refusal where it is.

    Args:
        module: the module.
        graph: the program under construction, whose path names the module.
        value: its input.

    Raises:
        UncertifiableError: if there is no rule, or it does not apply.
        ValueError: if the module does not fit the shape before it, or a tensor of it is not finite.

    Examples:
        >>> graph = Builder((2,), rule=checked_fold)
        >>> graph.fold(nn.GLU(), graph.input, "0")
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: '0' (GLU) cannot be certified: ...
    """
    _check_numbers(module, graph.path)
    kind = rule_class(module)
    if kind is None:
        raise UncertifiableError(uncovered(module, graph.path))
    check_forward(module, kind, graph.path)
    where = named(module, graph.path)
    try:
        return fold(module, graph, value)
    except (UncertifiableError, ValueError) as error:
        text = str(error)
        if " cannot be certified: " in text or text.startswith(f"'{graph.path}'"):
            raise
        kind_of_error = UncertifiableError if isinstance(error, UncertifiableError) else ValueError
        raise kind_of_error(f"{where} cannot be certified: {text}") from None


def _check_numbers(module: nn.Module, path: str) -> None:
    """Refuse parameters that have no shape or no numbers yet."""
    parts = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(is_lazy(part) for part in parts):
        raise UncertifiableError(
            f"{named(module, path)} has parameters without a shape yet; run it once on an input so that it gets its weights."
        )
    if any(part.is_meta for part in parts):
        raise UncertifiableError(
            f"{named(module, path)} is on the meta device, which holds no numbers; move it with to_empty() and load its weights."
        )
