"""What is known about one optimizer step, and its line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stableopt.lyapunov.events import Event

__all__ = ["ACTIONS", "SCHEMA", "VERDICTS", "StepRecord"]

SCHEMA = 2
_READ = (1, 2)
VERDICTS = ("decreased", "undecided", "increased", "unobserved", "nonfinite")
ACTIONS = ("accepted", "shrunk", "restarted", "undone", "unguarded")

_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class StepRecord:
    r"""State what happened to the energy :math:`V` at one step, with the numbers that the statement rests on.

    The verdict compares :math:`V` before and after the step *on the same batch*: "decreased" and "increased" mean that the
    difference is larger than ``tolerance``, the rounding error of the two evaluations; "undecided" that it is not;
    "nonfinite" that a NaN or an infinity was met; "unobserved" that there was nothing to compare.

    Args:
        step: the index of the step, counted from 1 (0 is allowed for a state before the first step).
        loss: the value of the closure before the step; NaN if it is not known.
        energy_before: :math:`V` before the step.
        energy_after: :math:`V` after the step.
        dissipation: ``energy_before - energy_after``.
        predicted: the decrease that the law of the update rule promises where the loss has no curvature; NaN without a known rule.
        tolerance: the largest difference that rounding alone explains.
        verdict: one of :data:`VERDICTS`.
        action: what the guard did, one of :data:`ACTIONS`.
        reason: why, in words.
        scale: the factor by which the guard scaled the step.
        trials: the number of extra evaluations.
        lr: the learning rate of each parameter group.
        displacement: the Euclidean norm of the change of the parameters.
        norms: weight name -> *estimate* (from below) of its operator norm; empty if not measured at this step.
        limits: weight name -> the limit that its constraint puts on this norm.
        cfl: block name -> share of the block's step limit in use, an estimate; above 1 the limit is exceeded.
        norm_gap: weight name -> *proved* norm of the weight of training over its limit, for methods that train with an estimate;
            empty if not measured at this step.
        grad_norm: :math:`\|g\|`, of the gradients that the optimizer was given, over all parameters.
        weight_norm: :math:`\|\theta\|` after the step, over all parameters.
        slope: :math:`g^\top d` with the displacement d, the change of the loss to first order.
        grad_norms: parameter name -> :math:`\|g_p\|`.
        update_ratio: parameter name -> :math:`\|d_p\|/\|\theta_p\|` with :math:`\theta_p` after the step.
        nonfinite: what is not finite: ``loss``, ``grad:NAME``, ``param:NAME``, ``buffer:NAME``.
        loss_after: the loss on the same batch after the step.
        trust: :math:`\rho = (L^+ - L)/(g^\top d)`: 1 without curvature, 0 where the loss has stopped to fall, below where it rose.
        batch_sharpness: :math:`2(1-\rho)/\eta`; for plain SGD the curvature of the loss of the batch along its gradient. NaN where
            the parameter groups have several learning rates.
        edge_distance: :math:`1/(1-\rho)`, the factor by which this step could have been longer before the loss of its batch, were
            it quadratic, would not have fallen; infinite without positive curvature, NaN where the step led uphill.
        sharpness: the largest curvature found on the probe batch, in the metric of the rule; an *estimate* from below.
        edge: the fraction of the linear stability limit of this optimizer in use, in the same way.
        plain_sharpness: the curvature along the same direction in the Euclidean metric.
        sharpness_residual: the residual of the eigenvector, relative to the eigenvalue.
        trace: estimate of the trace of the Hessian on the probe batch, and ``trace_error``, its standard error.
        trace_error: see ``trace``.
        noise_scale: :math:`\operatorname{tr}\Sigma/\|G\|^2`, the noise scale of the gradient, in samples of a micro-batch.
        hvp: how the products with the Hessian were made; empty if there were none.
        forward_exponent: the mean of ``gains``.
        weight_exponent: the mean logarithm of the constant of a layer by its estimated norm; NaN unless the model is a chain.
        gains: layer name -> the logarithm of the measured growth of a perturbation of the input through this layer.
        growth: block name -> estimate of the growth :math:`1+\tau L` of a residual block that has no step limit.
        kinks: module name -> the fraction of its units that are near a kink.
        overhead: seconds of the monitor over seconds of the run without it, so far; NaN if it is not timed.
        events: alarms and actions of this step.
        notes: why something that was looked at is not known, in sentences.

    Raises:
        ValueError: if ``step`` or ``trials`` is no integer >= 0, or a verdict or an action is not known.
        TypeError: if another field has the wrong type.

    Note:
        Holds no time of day and no machine name: the same run gives the same bytes.

    Examples:
        >>> record = StepRecord(step=1, loss=2.0, verdict="unobserved")
        >>> record.loss, record.energy_after
        (2.0, nan)
        >>> StepRecord.from_json(record.to_json()).to_json() == record.to_json()
        True
    """

    step: int
    loss: float = math.nan
    energy_before: float = math.nan
    energy_after: float = math.nan
    dissipation: float = math.nan
    predicted: float = math.nan
    tolerance: float = math.nan
    verdict: str = "unobserved"
    action: str = "unguarded"
    reason: str = ""
    scale: float = 1.0
    trials: int = 0
    lr: tuple[float, ...] = ()
    displacement: float = math.nan
    norms: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    cfl: Mapping[str, float] = field(default_factory=dict)
    norm_gap: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float = math.nan
    weight_norm: float = math.nan
    slope: float = math.nan
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    update_ratio: Mapping[str, float] = field(default_factory=dict)
    nonfinite: tuple[str, ...] = ()
    loss_after: float = math.nan
    trust: float = math.nan
    batch_sharpness: float = math.nan
    edge_distance: float = math.nan
    sharpness: float = math.nan
    edge: float = math.nan
    plain_sharpness: float = math.nan
    sharpness_residual: float = math.nan
    trace: float = math.nan
    trace_error: float = math.nan
    noise_scale: float = math.nan
    hvp: str = ""
    forward_exponent: float = math.nan
    weight_exponent: float = math.nan
    gains: Mapping[str, float] = field(default_factory=dict)
    growth: Mapping[str, float] = field(default_factory=dict)
    kinks: Mapping[str, float] = field(default_factory=dict)
    overhead: float = math.nan
    events: tuple[Event, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field, so that a record from a file is as good as one from a run."""
        for name in ("step", "trials"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"a StepRecord needs an integer {name} >= 0, got {value!r}.")
        for name, known in (("verdict", VERDICTS), ("action", ACTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"a StepRecord needs {name} in {known}, got {getattr(self, name)!r}.")
        for name in ("reason", "hvp"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"a StepRecord needs {name} in words, got {getattr(self, name)!r}.")
        for name in _FLOATS:
            if type(value := getattr(self, name)) is not float:
                object.__setattr__(self, name, _number(name, value))
        if not isinstance(self.lr, (tuple, list)):
            raise TypeError(f"a StepRecord needs one lr per parameter group, got {self.lr!r}.")
        object.__setattr__(self, "lr", tuple(_number("lr", lr) for lr in self.lr))
        object.__setattr__(self, "nonfinite", _tuple("nonfinite", self.nonfinite, str))
        object.__setattr__(self, "notes", _tuple("notes", self.notes, str))
        object.__setattr__(self, "events", _tuple("events", self.events, Event))
        for name in _TABLES:
            table = getattr(self, name)
            if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
                raise TypeError(f"a StepRecord needs {name} as a mapping from names to numbers, got {table!r}.")
            object.__setattr__(self, name, _copy(name, table))

    def to_json(self) -> str:
        r"""Return one line of JSON (no line break), keys sorted, non-finite numbers as "nan", "inf" and "-inf".

        What was added since schema 1 is left out where it is unknown (NaN) or empty.

        Examples:
            >>> StepRecord(step=3, loss=math.inf).to_json()[:55]
            '{"action": "unguarded", "cfl": {}, "displacement": "nan'
        """
        data: dict[str, Any] = {"schema": SCHEMA}
        for name in _FIELDS:
            value = getattr(self, name)
            if name not in _LATER or not _is_unknown(value):
                data[name] = _spell(value)
        return _encode(data)

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """Read the record that :meth:`to_json` wrote.

        Args:
            line: one JSON object; every key of schema 1 must be there, later ones may, and no other.

        Raises:
            ValueError: if the line is not such an object, or is of another schema.

        Examples:
            >>> StepRecord.from_json('{"schema": 1}')
            Traceback (most recent call last):
            ValueError: a step record of schema 1 lacks action, cfl, ...
        """
        try:
            data = json.loads(line, parse_constant=_refuse_literal, object_pairs_hook=_unique)
        except RecursionError as error:
            raise ValueError("a step record is one flat JSON object, got deeply nested data.") from error
        if not isinstance(data, dict):
            raise ValueError(  # noqa: TRY004 - the content of a file is wrong, not an argument
                f"a step record is a JSON object, got a {type(data).__name__}."
            )
        schema = data.pop("schema", None)
        if isinstance(schema, bool) or schema not in _READ:
            raise ValueError(f"this version reads step records of schema 1 and {SCHEMA}, got schema {schema!r}.")
        names = set(_FIELDS) if schema > 1 else set(_FIELDS) - _LATER | {"norm_gap"}
        if missing := sorted(names - _LATER - data.keys()):
            raise ValueError(f"a step record of schema {schema} lacks {', '.join(missing)}.")
        if unknown := sorted(data.keys() - names):
            raise ValueError(f"a step record of schema {schema} has no key {', '.join(map(repr, unknown))}.")
        if not isinstance(events := data.pop("events", []), list):
            raise ValueError(f"a step record needs events as a list, got {events!r}.")  # noqa: TRY004 - as above
        try:
            data["events"] = tuple(Event.from_dict(_numbers(event)) for event in events)
            return cls(**data)
        except TypeError as error:  # in a file it is the content that is wrong
            raise ValueError(str(error)) from error


_encode = json.JSONEncoder(sort_keys=True, allow_nan=False).encode
_FIELDS = tuple(item.name for item in fields(StepRecord))
_LATER = frozenset(_FIELDS[_FIELDS.index("norm_gap") :])
_FLOATS = tuple(item.name for item in fields(StepRecord) if item.type == "float")
_TABLES = tuple(item.name for item in fields(StepRecord) if str(item.type).startswith("Mapping"))


def _is_unknown(value: object) -> bool:
    """Whether a field says nothing: NaN, or empty."""
    return value != value if isinstance(value, float) else not value  # noqa: PLR0124 - the test for NaN


def _tuple(name: str, value: object, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"a StepRecord needs {name} as a tuple of {kind.__name__}, got {value!r}.")
    return tuple(value)


def _copy(name: str, table: Mapping[str, Any]) -> dict[str, float]:
    """Return a table of a record's own, of floats; a hundred of them are the usual case, and cost no call each."""
    if set(map(type, table.values())) <= {float}:
        return dict(table)
    return {key: _number(f"{name}[{key!r}]", value) for key, value in table.items()}


def _numbers(event: Any) -> Any:
    """Return the data of an event with its numbers as numbers."""
    if not isinstance(event, dict):
        return event
    return {key: _number(key, value) if key in {"statistic", "threshold"} else value for key, value in event.items()}


def _number(name: str, value: object) -> float:
    """Return a float, from a number or from the spelling of one that JSON cannot write."""
    if isinstance(value, str) and value in _SPELLED:
        return _SPELLED[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a StepRecord needs a number for {name}, got {value!r}.")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"a StepRecord needs a float for {name}, got an integer too large for one.") from error


def _spell(value: Any) -> Any:
    """Return the JSON data of a field."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Event):
        return _spell(value.as_dict())
    if isinstance(value, tuple):
        return [_spell(item) for item in value]
    if isinstance(value, dict):
        plain = set(map(type, value.values())) <= {float} and all(map(math.isfinite, value.values()))
        return value if plain else {key: _spell(item) for key, item in value.items()}
    return value


def _refuse_literal(literal: str) -> float:
    raise ValueError(f'a step record spells non-finite numbers as strings ("nan"), got the bare literal {literal}.')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a step record has each key once, got a repeated key.")
    return data
