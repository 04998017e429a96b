r"""What :func:`stableopt.nn.stabilize` is going to do to a model, found and checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from stableopt.constraints import attached
from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.branches import branch_constant, branches_of
from stableopt.nn.budget import Budgeted, fixed_radii
from stableopt.nn.constrain import check_parameter, check_unwrapped, constraint_of, parametrizations_of, projections
from stableopt.nn.dispatch import NORMS, TOKEN_MAX, check_forward, named, registered_class
from stableopt.nn.layers import layers
from stableopt.nn.limits import Stacked
from stableopt.nn.recurrent.stock_contracting import contracting_names
from stableopt.nn.rules import rule_bound
from stableopt.nn.slots import Slot, find_slots, skipped, slots_of
from stableopt.nn.tokens import known_for_tokens
from stableopt.nn.uniform import uniform_bound
from stableopt.nn.weights import WeightMap
from stableopt.nn.weights.geometry import KINDS

__all__ = ["Plan", "Settings", "check_settings", "make_plan"]

_INITS = ("rescale", "orthogonal", "keep")
_NORMS = (*NORMS, TOKEN_MAX)
_BUDGETS = ("even", "fan", "learned")


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`stabilize`, to compare a second call with the first.

    Examples:
        >>> check_settings(3.0, None, "l2", "even", None, "parametrization", (), "keep").lipschitz
        3.0
    """

    lipschitz: float | None
    radius: float | None
    norm: str
    budget: str
    method: Any
    by: str
    skip: tuple[Any, ...]
    init: str

    @property
    def weight_norm(self) -> str:
        """The norm of maps that the weights are limited in; of a layer for each token it is l2.

        Examples:
            >>> check_settings(1.0, None, "token_max", "even", None, "parametrization", (), "keep").weight_norm
            'l2'
        """
        return "l2" if self.norm == TOKEN_MAX else self.norm

    def differences(self, other: Settings) -> str:
        """Return the arguments that differ, as words.

        Examples:
            >>> first = check_settings(3.0, None, "l2", "even", None, "parametrization", (), "keep")
            >>> first.differences(check_settings(3.0, None, "linf", "even", None, "parametrization", (), "keep"))
            "norm='l2' (asked for: 'linf')"
        """
        pairs = [(name, mine, vars(other)[name]) for name, mine in vars(self).items()]
        return ", ".join(f"{name}={mine!r} (asked for: {theirs!r})" for name, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True)
class Chain:
    r"""Weights and constants whose product is a constant: those of a model, or of one branch in it.

    Args:
        slots: the weights.
        counts: how often each of them occurs.
        constants: names and constants of the layers without a limited weight; a module with branches is one of them.
        radii: the limits of the weights; with a learned budget, those to start from.
        limit: what :math:`\prod_l r_l^{n_l} \prod_i C_i` does not exceed.
    """

    slots: tuple[Slot, ...]
    counts: tuple[int, ...]
    constants: dict[str, float]
    radii: tuple[float, ...]
    limit: float


@dataclass(frozen=True)
class Plan:
    """What is going to be done: found and checked before anything is changed.

    Args:
        chains: the model, followed by its branches.
        obstacle: why no bound of the whole model follows, None if one does.
    """

    chains: tuple[Chain, ...]
    obstacle: str | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The weights of all chains, each of them once."""
        return tuple(slot for slot, _ in self._limits())

    @property
    def radii(self) -> tuple[float, ...]:
        """The limits of the weights; of a weight in several chains, the smallest."""
        return tuple(radius for _, radius in self._limits())

    @property
    def counts(self) -> dict[str, int]:
        """How often each weight occurs in the chain of the model; 0 if only in a branch."""
        first = {_identity(slot): n for slot, n in zip(self.chains[0].slots, self.chains[0].counts, strict=True)}
        return {slot.key: first.get(_identity(slot), 0) for slot in self.slots}

    def _limits(self) -> list[tuple[Slot, float]]:
        found: dict[tuple[int, str], tuple[Slot, float]] = {}
        for chain in self.chains:
            for slot, radius in zip(chain.slots, chain.radii, strict=True):
                first, smallest = found.get(_identity(slot), (slot, math.inf))
                found[_identity(slot)] = first, min(smallest, radius)
        return list(found.values())


def check_settings(
    lipschitz: float | None, radius: float | None, norm: str, budget: str, method: Any, by: str, skip: Any, init: str
) -> Settings:
    """Check the arguments that can be judged without the model."""
    if lipschitz is None and radius is None:
        lipschitz = 1.0
    for name, value in (("lipschitz", lipschitz), ("radius", radius)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")
    if lipschitz is not None and radius is not None:
        raise ValueError(
            f"give either lipschitz (of the model) or radius (of each weight), got lipschitz={lipschitz} and radius={radius}."
        )
    options = (
        ("norm", norm, _NORMS),
        ("budget", budget, _BUDGETS),
        ("by", by, ("parametrization", "projection")),
        ("init", init, _INITS),
    )
    for name, value, known in options:
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if radius is not None and budget != "even":
        raise ValueError(
            f"budget={budget!r} shares the limit of a model; with a radius for each weight it must be 'even'."
        )
    if by == "projection" and (budget == "learned" or not (method is None or method == "orthogonal")):
        raise ValueError(
            "by='projection' keeps each weight in a fixed set, so budget='learned' and a method other than 'orthogonal' do not "
            "apply; use by='parametrization'."
        )
    if isinstance(skip, str) or not all(isinstance(s, str | type) for s in skip):
        raise TypeError(f"skip must be a collection of dotted names and classes, got {skip!r}.")
    if isinstance(method, Mapping):
        if unknown := [kind for kind in method if kind not in KINDS]:
            raise ValueError(f"the kinds of layers with a method are {', '.join(KINDS)}, got {unknown[0]!r}.")
        method = tuple(sorted(method.items()))
    return Settings(
        None if lipschitz is None else float(lipschitz), None if radius is None else float(radius), norm, budget, method, by,
        tuple(sorted(skip, key=str)), init,
    )  # fmt: skip


def make_plan(model: nn.Module, settings: Settings) -> Plan:
    """Find the weights and their radii, and refuse what cannot be limited."""
    check_unwrapped(model)
    names = {path for path, _ in model.named_modules(remove_duplicate=False)}
    if lost := [name for name in settings.skip if isinstance(name, str) and name not in names]:
        raise ValueError(
            f"skip names {lost[0]!r}, and the model has no such module; its modules are called as in named_modules()."
        )
    if settings.radius is not None:
        slots = list(find_slots(model, settings.skip))
        _check_slots(model, slots)
        radii = (settings.radius,) * len(slots)
        try:
            chain = _Finder(model, settings).chains(model, "", math.inf)[0]
        except (UncertifiableError, ValueError) as error:
            return Plan((Chain(tuple(slots), (1,) * len(slots), {}, radii, math.inf),), str(error))
        in_chain = {_identity(slot): n for slot, n in zip(chain.slots, chain.counts, strict=True)}
        counts = tuple(in_chain.get(_identity(slot), 0) for slot in slots)
        return Plan((Chain(tuple(slots), counts, chain.constants, radii, chain.limit),), None)
    try:
        chains = _Finder(model, settings).chains(model, "", settings.lipschitz or 1.0)
    except UncertifiableError as error:
        raise UncertifiableError(
            f"{error} Or pass radius=... to limit each weight alone, without a bound of the whole model."
        ) from error
    _check_slots(model, [slot for chain in chains for slot in chain.slots])
    if settings.budget == "learned":
        _check_one_budget(chains)
    return Plan(tuple(chains), None)


class _Finder:
    """The chains of one model."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._known: dict[int, Bound] = {}  # of modules with branches

    def chains(self, module: nn.Module, path: str, limit: float) -> list[Chain]:
        """Return the chain that runs a module within a limit, followed by those of the branches in it."""
        slots: dict[tuple[int, str], Slot] = {}
        counts: dict[tuple[int, str], int] = {}
        constants: dict[str, float] = {}
        below: list[Chain] = []
        for where, layer in layers(module, path):
            skip = skipped(self.model, where, self.settings.skip)
            found = [] if skip or contracting_names(layer) else slots_of(layer, where)
            for slot in found:
                _check_slot(self.model, slot)
                slots.setdefault(_identity(slot), slot)
                counts[_identity(slot)] = counts.get(_identity(slot), 0) + 1
            if found:
                self._check_layer(layer, where)
            elif branches_of(layer) and not skip:
                constants[where] = self._branches(layer, where, below).upper
            else:
                constants[where] = self._constant(layer, where).upper
        radii = self._radii(list(slots.values()), list(counts.values()), list(constants.values()), limit)
        if not slots or self.settings.radius is not None:
            limit = _product(radii, list(counts.values()), list(constants.values())).upper
        return [Chain(tuple(slots.values()), tuple(counts.values()), constants, radii, limit), *below]

    def _radii(self, slots: list[Slot], counts: list[int], constants: list[float], limit: float) -> tuple[float, ...]:
        if self.settings.radius is not None:
            return (self.settings.radius,) * len(slots)
        if not slots:
            return ()
        if (closed := math.prod(constants)) == 0.0 or not math.isfinite(closed):
            raise ValueError(
                f"the layers without a weight have the constant {closed}: no limit of the others can be set."
            )
        factors = [1.0] * len(slots)
        if self.settings.budget == "fan":
            factors = [math.sqrt(fan_out / fan_in) for fan_in, fan_out in map(Slot.fan, slots)]
        return tuple(fixed_radii(limit, factors, counts, constants))

    def _check_layer(self, layer: nn.Module, where: str) -> None:
        """Refuse a layer that is not known to be linear in its weight alone."""
        kind = registered_class(layer)
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            raise UncertifiableError(
                f"the gain of {named(layer, where)} is no product of the norms of its weights. Keep it contracting by "
                "stableopt.nn.contracting with a gain, then it counts as that constant in linf, or stabilize the layers around it "
                "each by itself."
            )
        for_tokens = self.settings.norm != TOKEN_MAX or known_for_tokens(layer) is not None
        if kind is None or isinstance(layer, nn.Embedding) or not for_tokens:
            rule_bound(layer, self.settings.norm, where)  # refuses it
        else:
            check_forward(layer, kind, where)

    def _branches(self, layer: nn.Module, where: str, below: list[Chain]) -> Bound:
        """Limit each branch that has weights to 1, and bound what is made of the branches."""
        if id(layer) not in self._known:
            kind = registered_class(layer)
            if kind is not None:
                check_forward(layer, kind, where)
            parts: list[Bound] = []
            for name, branch in branches_of(layer).items():
                chains = self.chains(branch, f"{where}.{name}" if where else name, 1.0)
                parts.append(Bound(0.0, chains[0].limit))
                below += [chain for chain in chains if chain.slots]
            self._known[id(layer)] = branch_constant(layer, parts, self.settings.norm)
        return self._known[id(layer)]

    def _constant(self, layer: nn.Module, where: str) -> Bound:
        """Return the constant of a layer for all values of its parameters, or refuse it."""
        now = rule_bound(layer, self.settings.norm, where)
        bound = uniform_bound(layer, self.settings.norm)
        if bound is None:
            raise UncertifiableError(
                f"{named(layer, where)} has trainable parameters, so its Lipschitz constant {now.upper:.6g} may change while "
                "training; freeze them with requires_grad_(False), or replace it."
            )
        if not bound.proved:
            raise UncertifiableError(
                f"the constant {bound.upper:.6g} of {named(layer, where)} is declared, not proved, so no limit of the model "
                "follows. Replace it by a layer whose rule proves its constant."
            )
        return bound


def _identity(slot: Slot) -> tuple[int, str]:
    return id(slot.module), slot.name


def _product(radii: Collection[float], counts: Collection[int], constants: Collection[float]) -> Bound:
    product = Bound.point(1.0)
    for factor in [*(r for r, n in zip(radii, counts, strict=True) for _ in range(n)), *constants]:
        product = product * Bound(0.0, factor)
    return product


def _check_one_budget(chains: Collection[Chain]) -> None:
    seen: set[tuple[int, str]] = set()
    for chain in chains:
        for slot in chain.slots:
            if _identity(slot) in seen:
                raise ValueError(
                    f"the weight of {slot.where} occurs in several branches, which cannot share a learned radius; "
                    "use budget='even' or 'fan'."
                )
        seen.update(map(_identity, chain.slots))


def _check_slots(model: nn.Module, slots: Collection[Slot]) -> None:
    if not slots:
        raise ValueError(
            "stabilize found no Linear, Conv1d or Conv2d in the model, nor another layer with a weight that it knows, so there is "
            "nothing to limit."
        )
    for slot in slots:
        _check_slot(model, slot)


def _check_slot(model: nn.Module, slot: Slot) -> None:
    what = "weight" if slot.name == "weight" else f"'{slot.name}'"
    for present in parametrizations_of(slot.module, slot.name):
        if isinstance(present, Stacked | Budgeted | WeightMap):
            raise ValueError(  # noqa: TRY004 the state of the model, not the type of the argument
                f"the {what} of {slot.where} is stabilized already; call stableopt.nn.release(model) first, then stabilize it "
                "again."
            )
        if constraint_of(present) is not None:
            raise ValueError(
                f"the {what} of {slot.where} has the parametrization {present} already; remove it first: "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, '{slot.name}')."
            )
    check_parameter(slot.module, slot.name, slot.path, root=model)
    parameter = slot.module._parameters.get(slot.name)  # noqa: SLF001 torch has no public accessor without inherited names
    if slot.name in projections(slot.module) or (parameter is not None and attached(parameter) is not None):
        raise ValueError(
            f"the {what} of {slot.where} is constrained by projection already; choose one of the two, or call "
            "stableopt.nn.release(model) first."
        )
