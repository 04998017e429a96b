"""The layers of a sequential model in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import check_forward, named, registered_class

__all__ = ["layers"]


def layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the layers of a model in execution order.

    Nested :class:`torch.nn.Sequential` are flattened. A module with a Lipschitz rule, and a module without children, is one layer;
    the parametrizations of a weight do not count as children. A layer that occurs twice is listed twice.

    Args:
        module: a Sequential, or a single layer.
        path: dotted name of ``module``, put before those of its layers.

    Yields:
        Pairs of dotted name, as in ``named_modules`` (``path`` for the module itself), and layer.

    Raises:
        UncertifiableError: if the execution order cannot be known: a container other than Sequential, a Sequential whose class
            overrides the forward map, or one with a forward hook.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 1)))
        >>> [name for name, layer in layers(model)]
        ['0', '1.0', '1.1']
    """
    kind = registered_class(module)
    if kind is nn.Sequential:
        check_forward(module, nn.Sequential, path)
        for name, child in module._modules.items():  # noqa: SLF001 named_children() drops repeated modules
            if child is not None:
                yield from layers(child, f"{path}.{name}" if path else name)
        return
    children = [name for name, _ in module.named_children() if name != "parametrizations"]
    if kind is None and children:
        raise UncertifiableError(
            f"{named(module, path)} runs its children ({', '.join(children)}) in an order that only its forward knows. "
            "Write the model as nested nn.Sequential, or register a rule for the class: "
            f"@stableopt.nn.lipschitz_rule.register({type(module).__name__})."
        )
    yield path, module
