r"""A Lipschitz limit for a whole model, kept at every step of the training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.constraints import Constraint
from stableopt.errors import UncertifiableError
from stableopt.nn.budget import Budgeted, LearnedBudget
from stableopt.nn.constrain import constrain, unproject
from stableopt.nn.dispatch import named
from stableopt.nn.limits import Stacked, layer_limit, limit_of, set_for
from stableopt.nn.loading import accept_plain_weights, refuse_plain_weights
from stableopt.nn.parametrized import adopt, remember_order, restored
from stableopt.nn.plan import Plan, Settings, check_settings, make_plan
from stableopt.nn.slots import Slot, find_slots
from stableopt.nn.weights import METHODS, Geometry, WeightMap

__all__ = ["MapFactory", "Record", "forget_record", "layer_limit", "record_of", "stabilize"]

MapFactory: TypeAlias = Callable[[Geometry, float, str], WeightMap]
"""Makes a weight map: a class of :data:`stableopt.nn.weights.METHODS`, or a function that calls one with options."""

_RECORD = "_stableopt_record"
"""Plain attribute of a model: what :func:`stabilize` did to it. It follows deepcopy and pickle."""


@dataclass(frozen=True)
class Record:
    """What :func:`stabilize` did to a model.

    Args:
        settings: its arguments.
        before: name of each weight in the plain model, and an upper bound of its norm before; None on the meta device.
        counts: how often each weight occurs in the chain; 0 for those that occur in a branch only.
        constants: names and constants of the layers of the chain that have no limited weight.
        whole: whether a bound of the whole model follows.

    Examples:
        >>> sorted(record_of(stabilize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))).before)
        ['0.weight']
    """

    settings: Settings
    before: dict[str, float | None]
    counts: dict[str, int]
    constants: dict[str, float]
    whole: bool


def stabilize(
    model: nn.Module,
    lipschitz: float | None = None,
    *,
    radius: float | None = None,
    norm: Literal["l2", "linf", "l1", "token_max"] = "l2",
    budget: Literal["even", "fan", "learned"] = "even",
    method: str | MapFactory | Mapping[str, str | MapFactory] | None = None,
    by: Literal["parametrization", "projection"] = "parametrization",
    skip: Collection[str | type[nn.Module]] = (),
    replace: Mapping[type[nn.Module], Callable[[Any], nn.Module]] | None = None,
    init: Literal["rescale", "orthogonal", "keep"] = "rescale",
) -> nn.Module:
    r"""Limit the Lipschitz constant of a model, in place, for the whole training.

    Every weight of a linear map gets a limit :math:`r_l` of its operator norm, such that

    .. math:: \prod_l r_l^{n_l} \; \prod_i C_i \le L ,

    where :math:`L` is the limit of the model, :math:`n_l` how often a layer occurs, and :math:`C_i` the constants of all the others
    (activations, pooling; a :class:`~stableopt.nn.GradientBlock` counts 1 and is left alone). Each branch of a
    :class:`~stableopt.nn.AveragedResidual`, :class:`~stableopt.nn.Concat`, :class:`~stableopt.nn.Parallel` or
    :class:`~stableopt.nn.Merge` that has weights gets the limit 1 for itself, and the module counts with the constant that follows.

    A model whose constant does not follow from those of its layers (attention, an RNN, a forward map of its own) can be given a
    ``radius`` instead: then each weight that is found has this limit, and a warning says that no bound of the model follows. These
    are the weights of Linear, Conv1d to 3d, ConvTranspose1d to 3d, Embedding and Bilinear layers, the projections of a
    MultiheadAttention (query, key and value each for itself) and the matrices of RNN, LSTM and GRU (each gate for itself).

    Args:
        model: nested :class:`torch.nn.Sequential` of modules with a Lipschitz rule, or one layer; with ``radius``, any module.
        lipschitz: the limit :math:`L > 0` for the whole model; 1 if neither this nor ``radius`` is given.
        radius: the limit of each weight, instead of one for the model.
        norm: ``"l2"``, ``"linf"`` (largest absolute value), ``"l1"``, or ``"token_max"`` (largest Euclidean norm of a token, for
            models with attention), of inputs and outputs.
        budget: how :math:`L` is shared. ``"even"``: the same radius everywhere. ``"fan"``: radii in proportion to
            :math:`\sqrt{\text{fan out} / \text{fan in}}`, the scale at which features keep their size per entry. ``"learned"``: the
            radii are trained while their product keeps the limit, see :class:`~stableopt.nn.budget.LearnedBudget`.
        method: how a weight is kept within its radius: a name in :data:`stableopt.nn.weights.METHODS`, a function
            ``(geometry, radius, norm)`` that makes a weight map, or one of these for each kind of layer, as in
            ``{"linear": "cholesky", "conv": "bcop"}``. None takes ``"power"`` for l2, which trains at the cost of a plain layer
            with an estimate of the norm, and evaluates with a proof; ``"gram"`` keeps the limit in each training step, at a
            price. For the other norms None takes the first method that knows them.
        by: ``"parametrization"`` computes the weight from a free original, for any optimizer. ``"projection"`` keeps plain
            parameters, which an optimizer of this package projects after each step; pass it
            :func:`stableopt.nn.parameter_groups`. It projects on the ball of the radius, or with ``method="orthogonal"`` on the
            orthogonal matrices: then the forward map costs what a plain layer costs, and a step a few matrix products.
        skip: layers to leave alone: dotted names, or classes. A skipped layer of a chain counts with the constant that it has
            now, so its parameters must be frozen.
        replace: for each class that has no finite constant, a function from a module of it to its replacement.
        init: ``"rescale"`` scales every weight so that it starts at its limit, which keeps the signal alive; ``"orthogonal"``
            also replaces the weights by random orthogonal ones (for kernels, at the central tap), for training from scratch;
            ``"keep"`` leaves weights within the limit as they are, for a trained model.

    Returns:
        The same model. A second call with the same arguments changes nothing.

    Raises:
        TypeError: if ``model`` is no module, or a weight is not real and floating.
        ValueError: if an argument is out of range, the model has nothing to stabilize, is stabilized already with other arguments,
            has a projected, shared, lazy, NaN or infinite weight, one constrained by this package, or is wrapped for distributed
            training.
        UncertifiableError: if a module has no Lipschitz rule, or trainable parameters that would change its constant, and no
            ``radius`` is given.

    Note:
        A refused model is left unchanged. Training needs no refresh of any kind. The limit holds up to rounding by construction;
        what is proved about the trained numbers is said by :func:`stableopt.nn.lipschitz`, :func:`stableopt.nn.table` and a
        certificate. With the method ``"power"`` this is the weight in evaluation; in training the norm may be above the limit by
        what :func:`stableopt.nn.norm_gap` tells. A weight with a parametrization of somebody else's keeps it, and the limit acts
        on its result.
        Wrap for distributed training afterwards: stabilize, then DistributedDataParallel or fully_shard, then the optimizer.
        A checkpoint of the plain model can be loaded, with a warning; for plain weights see :func:`stableopt.nn.export`.

    References:
        Yang, Simon and Bernstein, *A Spectral Condition for Feature Learning*, 2023 (the proportions of ``"fan"``).

    Examples:
        >>> from stableopt.nn import GroupSort, lipschitz
        >>> model = stabilize(nn.Sequential(nn.Linear(8, 16), GroupSort(), nn.Linear(16, 4)), lipschitz=2.0)
        >>> 1.5 < lipschitz(model).upper <= 2.0
        True
    """
    settings = check_settings(lipschitz, radius, norm, budget, method, by, skip, init)
    if not isinstance(model, nn.Module):
        raise TypeError(f"stabilize needs a torch.nn.Module, got {type(model).__name__}.")
    record = record_of(model)
    if record is not None and replace is None and _is_repetition(model, record, settings):
        return model
    with contextlib.ExitStack() as undo:  # runs backwards if anything is refused or fails
        _replace(model, replace or {}, undo)
        plan = make_plan(model, settings)
        starts, before = _starts(plan, settings)
        limits = _limits(plan, settings) if by == "parametrization" else []
        _apply(plan, settings, starts, limits, undo)
        whole = plan.obstacle is None
        setattr(model, _RECORD, Record(settings, before, plan.counts, plan.chains[0].constants, whole))
        undo.pop_all()
    if plan.obstacle is not None:
        warnings.warn(
            f"each of the {len(plan.slots)} weights found keeps its {norm} norm within {radius}, but no Lipschitz bound of the "
            f"whole model follows: {plan.obstacle}",
            stacklevel=2,
        )
    return model


def record_of(model: nn.Module) -> Record | None:
    """Return what :func:`stabilize` did to a model, None if it did nothing.

    Examples:
        >>> record_of(nn.Linear(1, 1)) is None
        True
    """
    return vars(model).get(_RECORD)


def forget_record(model: nn.Module) -> None:
    """Forget what was done to a model and to its parts.

    Examples:
        >>> forget_record(nn.Linear(1, 1))
    """
    for part in model.modules():
        vars(part).pop(_RECORD, None)


def _is_repetition(model: nn.Module, record: Record, settings: Settings) -> bool:
    """Return whether a call repeats the one that the model remembers; refuse it if it asks for something else."""
    limited = {slot.key: limit_of(slot.module, slot.name) for slot in find_slots(model) if slot.key in record.before}
    missing = [key for key in record.before if limited.get(key) is None]
    if missing and len(missing) == len(record.before):
        return False  # all were removed by hand: start anew
    if missing:
        raise ValueError(
            f"the model was stabilized, but the limit of {', '.join(missing)} was removed since; "
            "call stableopt.nn.release(model) first, then stabilize it again."
        )
    if different := record.settings.differences(settings):
        first = next(iter(record.before)).rpartition(".")[0]
        raise ValueError(
            f"the weight of {named(model.get_submodule(first), first)} is stabilized already, with {different}; "
            "call stableopt.nn.release(model) first, then stabilize it again."
        )
    return True


def _replace(model: nn.Module, replacements: Mapping[type[nn.Module], Any], undo: contextlib.ExitStack) -> None:
    fresh: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        make = next((make for kind, make in replacements.items() if isinstance(module, kind)), None)
        if make is None:
            continue
        if not path:
            raise ValueError(f"{named(module, path)} cannot be replaced in place; call the function on it yourself.")
        new: object = fresh[id(module)] if id(module) in fresh else make(module)
        if not isinstance(new, nn.Module):
            raise TypeError(
                f"the replacement of {named(module, path)} must be a torch.nn.Module, got {type(new).__name__}."
            )
        fresh[id(module)] = new
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        undo.callback(setattr, owner, name, module)
        setattr(owner, name, new)


# --------------------------------------------------------------------------------------------------------------------- limits


def _limits(plan: Plan, settings: Settings) -> list[nn.Module]:
    """Make the parametrizations, without registering them."""
    if settings.budget != "learned":
        return [_limit(slot, radius, settings) for slot, radius in zip(plan.slots, plan.radii, strict=True)]
    limits: list[nn.Module] = []
    for chain in plan.chains:
        if not chain.slots:
            continue
        budget = LearnedBudget(chain.limit, chain.counts, list(chain.constants.values()))
        first = chain.slots[0].value
        budget.to(device=first.device, dtype=first.dtype)
        limits += [
            Budgeted(_limit(slot, 1.0, settings), budget, index, owner=index == 0)
            for index, slot in enumerate(chain.slots)
        ]
    return limits


def _limit(slot: Slot, radius: float, settings: Settings) -> WeightMap | Stacked:
    make = _factory(slot, settings)
    norm = slot.matrix_norm(settings.weight_norm)
    try:
        maps = [make(slot.geometry, radius, norm) for _ in range(slot.parts)]
    except ValueError as error:
        raise ValueError(f"{slot.where}: {error}") from None
    if maps[0].factorized and P.is_parametrized(slot.module, slot.name):
        raise ValueError(
            f"the method {maps[0].name!r} makes its weight from an original of another shape, so it cannot act on the result of "
            f"the parametrization that {slot.where} has already; remove that first, or take another method."
        )
    return Stacked(maps, flat=slot.flat) if slot.flat or slot.parts > 1 else maps[0]


def _factory(slot: Slot, settings: Settings) -> MapFactory:
    method, norm = settings.method, slot.matrix_norm(settings.weight_norm)
    if isinstance(method, tuple):
        method = dict(method).get(slot.geometry.kind)
    if method is None:
        method = "power" if norm == "l2" else next((name for name, m in METHODS.items() if norm in m.norms), None)
    if callable(method):
        return cast("MapFactory", method)
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, or a function that makes a weight map, got {method!r}."
        )
    return METHODS[method]


def _starts(plan: Plan, settings: Settings) -> tuple[list[Tensor | None], dict[str, float | None]]:
    """Return the weights to start from, None for those that stay, and the norms before."""
    starts: list[Tensor | None] = []
    before: dict[str, float | None] = {}
    for slot, radius in zip(plan.slots, plan.radii, strict=True):
        weight = slot.value.clone()
        norm = slot.matrix_norm(settings.weight_norm)
        if weight.is_meta or not weight.numel():
            before[slot.key] = None if weight.is_meta else 0.0
            starts.append(None)
            continue
        try:
            norms = [float(slot.geometry.upper(part.double(), norm)) for part in slot.matrices(weight)]
        except (ValueError, UncertifiableError) as error:
            raise UncertifiableError(f"no {settings.norm} bound is known for {slot.where}: {error}") from None
        before[slot.key] = max(norms)
        foreign = P.is_parametrized(slot.module, slot.name)  # need not have an inverse
        starts.append(None if foreign else _start(slot, weight, radius, norm, settings.init))
    return starts, before


def _start(slot: Slot, weight: Tensor, radius: float, norm: str, init: str) -> Tensor:
    """Return the weight to start from; for all inits but ``keep`` the norm of each part is the limit, unless it is zero."""
    if init == "keep":
        return weight
    for part in weight.chunk(slot.parts):
        if init == "orthogonal":
            part.copy_(_orthogonal(part.flatten(1) if slot.flat else part, slot.geometry.groups).view(part.shape))
        if bool(part.any()):
            wide = part.double()
            upper = slot.geometry.upper(wide.flatten(1) if slot.flat else wide, norm)
            part.copy_(wide * (radius / upper))
    return weight


def _orthogonal(weight: Tensor, groups: int) -> Tensor:
    """Return a random weight with orthonormal rows or columns; of a kernel, the central tap of each group is that."""
    fresh = torch.zeros(weight.shape, dtype=torch.float64, device="cpu")
    center = tuple((k - 1) // 2 for k in weight.shape[2:])
    for part in fresh[(..., *center)].chunk(groups):
        part.copy_(nn.init.orthogonal_(torch.empty(part.shape, dtype=torch.float64)))
    return fresh.to(weight)


# ---------------------------------------------------------------------------------------------------------------------- apply


def _apply(
    plan: Plan, settings: Settings, starts: list[Tensor | None], limits: list[nn.Module],
    undo: contextlib.ExitStack,
) -> None:  # fmt: skip
    """Change the model; ``undo`` learns how to take each change back."""
    sets: list[Constraint] = []
    if not limits:
        method = settings.method
        sets = [set_for(slot, r, settings.weight_norm, method) for slot, r in zip(plan.slots, plan.radii, strict=True)]
    for index, (slot, start) in enumerate(zip(plan.slots, starts, strict=True)):
        parameter = slot.module._parameters.get(slot.name)  # noqa: SLF001 torch has no public accessor without inherited names
        if parameter is not None:
            undo.callback(_copy_into, parameter, parameter.detach().clone())
            if start is not None:
                _copy_into(parameter, start)
        if limits:
            undo.callback(_restore, slot.module, type(slot.module), dict(vars(slot.module)))
            undo.callback(_remove_limit, slot, limits[index])
            shape = slot.value.shape
            remember_order(slot.module)
            # on the meta device there is nothing to check it with
            meta = {"unsafe": True} if parameter is not None and parameter.is_meta else {}
            P.register_parametrization(slot.module, slot.name, limits[index], **meta)
            adopt(slot.module, slot.name, shape)
            accept_plain_weights(slot.module)
        else:
            undo.callback(unproject, slot.module, slot.name)
            constrain(slot.module, slot.name, sets[index], by="projection")


@torch.no_grad()
def _copy_into(parameter: Tensor, value: Tensor) -> None:
    if parameter.shape == value.shape:
        parameter.copy_(value)
    else:  # torch has put the original of a factorisation in its place, before the map failed
        parameter.data = value


def _restore(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Give a module back the class and the plain attributes that it had, and its way to load weights."""
    if P.is_parametrized(module):
        module.__class__ = kind
    for name in [name for name in vars(module) if name not in attributes and name.startswith("_stableopt")]:
        del vars(module)[name]
    vars(module).update({name: value for name, value in attributes.items() if name.startswith("_stableopt")})
    if not any(isinstance(part, WeightMap) for part in module.modules()):
        refuse_plain_weights(module)


def _remove_limit(slot: Slot, limit: nn.Module) -> None:
    """Take a parametrization off, if it is there, and leave what was below it."""
    chain: Any = next(iter(_chains(slot)), None)
    if chain is None or limit not in list(chain):
        return
    if len(chain) > 1:
        del chain[len(chain) - 1]
        return
    P.remove_parametrizations(slot.module, slot.name, leave_parametrized=False)
    restored(slot.module)
    refuse_plain_weights(slot.module)


def _chains(slot: Slot) -> Iterator[nn.Module]:
    if P.is_parametrized(slot.module, slot.name):
        yield slot.module.get_submodule(f"parametrizations.{slot.name}")
