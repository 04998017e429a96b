"""Keep a parameter in a set: by a parametrization, or by projecting it after each optimizer step."""

from __future__ import annotations

import gc
from typing import Any, Literal

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.constraints import Constraint, attach, attached
from stableopt.nn.dispatch import named
from stableopt.nn.parametrized import adopt
from stableopt.nn.sharded import is_spread

__all__ = ["constrain", "parameter_groups"]

_RECORD = "_stableopt_projections"
"""Plain attribute of a module: which of its parameters an optimizer must project. It follows deepcopy and pickle, which the
registry of attached tensors does not."""


def constrain(
    module: nn.Module,
    name: str,
    constraint: Constraint,
    by: Literal["parametrization", "projection"] = "parametrization",
) -> nn.Module:
    """Keep the parameter ``name`` of ``module`` in the set ``constraint``.

    Args:
        module: the module that owns the parameter itself, not one above it.
        name: the name of the parameter, such as ``"weight"``.
        constraint: the set.
        by: ``"parametrization"``: the forward map uses ``constraint.map`` of an unconstrained original; works with any optimizer.
            ``"projection"``: the value is projected now, and an optimizer of this package projects it after each step; pass it
            :func:`parameter_groups`.

    Returns:
        The same module.

    Raises:
        TypeError: if an argument has the wrong type, or the parameter is not real and floating.
        ValueError: if there is no such parameter, its shape does not fit the set, it is lazy, holds NaN or infinity, is shared by
            two modules below ``module``, is constrained already, or is wrapped for distributed training. Nothing is changed then.

    Note:
        Weights that are tied to a module outside of ``module`` cannot be seen from here; a parametrization would untie them.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> layer = constrain(nn.Linear(3, 2), "weight", NonNegative())
        >>> bool((layer.weight >= 0).all())
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"constrain needs a torch.nn.Module, got {type(module).__name__}.")
    if not isinstance(constraint, Constraint):
        raise TypeError(f"constraint must be a stableopt.constraints.Constraint, got {type(constraint).__name__}.")
    if by not in {"parametrization", "projection"}:
        raise ValueError(f"by must be 'parametrization' or 'projection', got {by!r}.")
    check_unwrapped(module)
    check_parameter(module, name, root=module)
    _check_unconstrained(module, name, constraint, by)
    value = getattr(module, name).detach()
    projected = constraint.project(value)  # also refuses a shape that does not fit
    if by == "parametrization":
        P.register_parametrization(module, name, constraint.parametrization(value))
        adopt(module)
        return module
    parameter = module._parameters[name]  # noqa: SLF001 torch has no public accessor without inherited names
    if parameter is None:
        raise ValueError(f"'{name}' of {named(module, '')} is None.")
    with torch.no_grad():
        parameter.copy_(projected)
    attach(parameter, constraint)
    setattr(module, _RECORD, {**projections(module), name: constraint})
    return module


def parameter_groups(module: nn.Module, **defaults: Any) -> list[dict[str, Any]]:
    """Return the parameters of ``module`` as groups for an optimizer, one for each set that they are projected on.

    Args:
        module: the model, constrained with ``by="projection"`` in places.
        **defaults: options that every group gets, such as ``lr``.

    Returns:
        First the group of all other parameters, then one group for each distinct constraint, with the key ``"constraint"``, in the
        order of ``module.parameters()``. Every parameter occurs exactly once; no group is empty.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if a default is named ``params`` or ``constraint``, or two modules that share a parameter constrain it
            differently.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = constrain(model[1], "weight", NonNegative(), by="projection")
        >>> [(len(g["params"]), g.get("constraint")) for g in parameter_groups(model, lr=0.1)]
        [(3, None), (1, NonNegative())]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"parameter_groups needs a torch.nn.Module, got {type(module).__name__}.")
    if clash := {"params", "constraint"} & defaults.keys():
        raise ValueError(f"parameter_groups sets {', '.join(sorted(clash))} itself; leave it out of the defaults.")
    sets = _projected(module)
    groups: dict[Constraint | None, list[Tensor]] = {None: []}
    for parameter in module.parameters():
        groups.setdefault(sets.get(parameter), []).append(parameter)
    return [
        {"params": params, **defaults}
        if constraint is None
        else {"params": params, **defaults, "constraint": constraint}
        for constraint, params in groups.items()
        if params
    ]


def unproject(module: nn.Module, name: str) -> None:
    """Forget that a parameter is constrained by projection; its value stays.

    Args:
        module: the module that owns the parameter.
        name: the name of the parameter.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> layer = constrain(nn.Linear(3, 2), "weight", NonNegative(), by="projection")
        >>> unproject(layer, "weight")
        >>> projections(layer)
        {}
    """
    rest = {own: constraint for own, constraint in projections(module).items() if own != name}
    vars(module).pop(_RECORD, None)
    if rest:
        setattr(module, _RECORD, rest)
    parameter = module._parameters.get(name)  # noqa: SLF001 torch has no public accessor without inherited names
    if parameter is not None:
        attach(parameter, None)


def projections(module: nn.Module) -> dict[str, Constraint]:
    """Return which own parameters of ``module`` are constrained by projection.

    Examples:
        >>> projections(nn.Linear(1, 1))
        {}
    """
    return dict(vars(module).get(_RECORD, {}))


def check_parameter(module: nn.Module, name: str, path: str = "", *, root: nn.Module) -> None:
    """Refuse a parameter that cannot be constrained.

    Args:
        module: its owner.
        name: its name.
        path: dotted name of the owner for messages.
        root: the module within which nothing else may share the parameter.

    Raises:
        TypeError: if the parameter is not real and floating.
        ValueError: if there is no such parameter, or it is lazy, sharded, shared, NaN or infinite.

    Examples:
        >>> check_parameter(nn.ReLU(), "weight", root=nn.ReLU())
        Traceback (most recent call last):
        ValueError: the module (ReLU) has no parameter 'weight' ...
    """
    where = named(module, path)
    if P.is_parametrized(module, name):
        value, owned = getattr(module, name), None
    else:
        value = owned = module._parameters.get(name)  # noqa: SLF001 torch has no public accessor without inherited names
    if value is None:
        own = ", ".join(own for own, p in module._parameters.items() if p is not None)  # noqa: SLF001
        raise ValueError(f"{where} has no parameter '{name}' of its own (it has: {own or 'none'}).")
    if isinstance(value, nn.parameter.UninitializedParameter):
        raise ValueError(  # noqa: TRY004 the type of the parameter is a matter of its state, not of the caller's argument
            f"'{name}' of {where} is lazy: run the model once on an input, then constrain it."
        )
    if _is_sharded(value):
        raise ValueError(f"'{name}' of {where} is sharded already: constrain the model before fully_shard.")
    if not value.is_floating_point():
        raise TypeError(f"'{name}' of {where} must be real and floating, got dtype {value.dtype}.")
    if not value.is_meta and not bool(value.isfinite().all()):
        raise ValueError(f"'{name}' of {where} holds NaN or infinity; repair it before constraining it.")
    if owned is not None:
        _check_unshared(owned, name, where, root)


def check_unwrapped(root: nn.Module) -> None:
    """Refuse a module that is part of a live DistributedDataParallel, or sharded.

    To be called once, not for each parameter: the wrapper leaves no trace on the modules inside, so all objects are looked at.

    Args:
        root: the module.

    Raises:
        ValueError: if it is, or a part of it.

    Examples:
        >>> check_unwrapped(nn.Linear(1, 1))
    """
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in root.modules()) or _is_below_ddp(root):
        raise ValueError(
            f"{named(root, '')} is wrapped by DistributedDataParallel, which would not see a constrained parameter: gradients "
            "would differ between ranks. Constrain the model first and wrap it afterwards."
        )
    if is_spread(root):
        raise ValueError(f"{named(root, '')} is sharded already: constrain the model before fully_shard.")


def _is_below_ddp(root: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    inside = {id(part) for part in root.modules()}
    wrappers = [o for o in gc.get_objects() if nn.parallel.DistributedDataParallel in type(o).__mro__]
    return any(id(part) in inside for wrapper in wrappers for part in wrapper.module.modules())


def _check_unshared(parameter: Tensor, name: str, where: str, root: nn.Module) -> None:
    owners = [
        f"{path}.{own}" if path else own
        for path, part in root.named_modules()
        for own, p in part._parameters.items()  # noqa: SLF001 torch has no public accessor without inherited names
        if p is parameter or _shares_memory(p, parameter)
    ]
    if len(owners) > 1:
        raise ValueError(
            f"'{name}' of {where} is shared ({', '.join(owners)}); constraining one of them would silently untie them. "
            "Use the same module twice instead, or give each its own parameter."
        )


def _shares_memory(a: Tensor | None, b: Tensor) -> bool:
    """Return whether two parameters are the same numbers at the same place, as tied weights can be without being one object."""
    if a is None or not (type(a) is type(b) is nn.Parameter) or a.is_meta or b.is_meta or not b.numel():
        return False
    return a.data_ptr() == b.data_ptr() and a.device == b.device


def _check_unconstrained(module: nn.Module, name: str, constraint: Constraint, by: str) -> None:
    where = f"'{name}' of {named(module, '')}"
    if name in projections(module):
        raise ValueError(f"{where} is constrained by projection already ({projections(module)[name]}).")
    parameter = module._parameters.get(name)  # noqa: SLF001 torch has no public accessor without inherited names
    if parameter is not None and attached(parameter) is not None:
        raise ValueError(f"{where} is constrained by projection already ({attached(parameter)}).")
    if not P.is_parametrized(module, name):
        return
    if by == "projection":
        raise ValueError(
            f"{where} is parametrized, so an optimizer steps its original and cannot project it; use by='parametrization'."
        )
    for present in parametrizations_of(module, name):
        if type(constraint_of(present)) is type(constraint):
            raise ValueError(
                f"{where} has such a parametrization already ({present}); remove it first: "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, '{name}')."
            )


def constraint_of(parametrization: nn.Module) -> Constraint | None:
    """Return the set behind a parametrization that :func:`constrain` registered, or None for any other.

    Examples:
        >>> from stableopt.constraints import NonNegative
        >>> constraint_of(NonNegative().parametrization(torch.ones(1)))
        NonNegative()
    """
    constraint = vars(parametrization).get("constraint")
    return constraint if isinstance(constraint, Constraint) else None


def parametrizations_of(module: nn.Module, name: str) -> list[nn.Module]:
    """Return the parametrizations of a parameter, innermost first.

    Examples:
        >>> parametrizations_of(nn.Linear(1, 1), "weight")
        []
    """
    if not P.is_parametrized(module, name):
        return []
    return list(module.get_submodule(f"parametrizations.{name}").children())


def _is_sharded(value: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _projected(module: nn.Module) -> dict[Tensor, Constraint]:
    """Return the constraint of each projected parameter, and attach it anew, which a copy of a model needs."""
    sets: dict[Tensor, Constraint] = {}
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():  # noqa: SLF001 torch has no public accessor without inherited names
            if parameter is None:
                continue
            constraint = projections(part).get(name) or attached(parameter)
            if constraint is None:
                continue
            if sets.setdefault(parameter, constraint) != constraint:
                raise ValueError(
                    f"'{name}' of {named(part, path)} is projected on {constraint}, but a module that shares it asks for "
                    f"{sets[parameter]}."
                )
            attach(parameter, constraint)
    return sets
