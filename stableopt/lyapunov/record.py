"""What is known about one optimizer step, and its line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["ACTIONS", "SCHEMA", "VERDICTS", "StepRecord"]

SCHEMA = 1
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

    def __post_init__(self) -> None:
        """Check every field, so that a record from a file is as good as one from a run."""
        for name in ("step", "trials"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"a StepRecord needs an integer {name} >= 0, got {value!r}.")
        for name, known in (("verdict", VERDICTS), ("action", ACTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"a StepRecord needs {name} in {known}, got {getattr(self, name)!r}.")
        if not isinstance(self.reason, str):
            raise TypeError(f"a StepRecord needs a reason in words, got {self.reason!r}.")
        for name in _FLOATS:
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if not isinstance(self.lr, (tuple, list)):
            raise TypeError(f"a StepRecord needs one lr per parameter group, got {self.lr!r}.")
        object.__setattr__(self, "lr", tuple(_number("lr", lr) for lr in self.lr))
        for name in ("norms", "limits", "cfl", "norm_gap"):
            table = getattr(self, name)
            if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
                raise TypeError(f"a StepRecord needs {name} as a mapping from names to numbers, got {table!r}.")
            object.__setattr__(self, name, {key: _number(f"{name}[{key!r}]", value) for key, value in table.items()})

    def to_json(self) -> str:
        r"""Return one line of JSON (no line break), keys sorted, non-finite numbers as "nan", "inf" and "-inf".

        Examples:
            >>> StepRecord(step=3, loss=math.inf).to_json()[:55]
            '{"action": "unguarded", "cfl": {}, "displacement": "nan'
        """
        data: dict[str, Any] = {"schema": SCHEMA}
        for item in fields(self):
            data[item.name] = _spell(getattr(self, item.name))
        return json.dumps(data, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        """Read the record that :meth:`to_json` wrote.

        Args:
            line: one JSON object; every key must be there, and no other. Records from before ``norm_gap`` was measured lack it.

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
        if isinstance(schema, bool) or schema != SCHEMA:
            raise ValueError(f"this version reads step records of schema {SCHEMA}, got schema {schema!r}.")
        names = {item.name for item in fields(cls)}
        if missing := sorted(names - _LATER - data.keys()):
            raise ValueError(f"a step record of schema {SCHEMA} lacks {', '.join(missing)}.")
        if unknown := sorted(data.keys() - names):
            raise ValueError(f"a step record of schema {SCHEMA} has no key {', '.join(map(repr, unknown))}.")
        try:
            return cls(**data)
        except TypeError as error:  # in a file it is the content that is wrong
            raise ValueError(str(error)) from error


_LATER = frozenset({"norm_gap"})
_FLOATS = tuple(item.name for item in fields(StepRecord) if item.type == "float")


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
    if isinstance(value, tuple):
        return [_spell(item) for item in value]
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    return value


def _refuse_literal(literal: str) -> float:
    raise ValueError(f'a step record spells non-finite numbers as strings ("nan"), got the bare literal {literal}.')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a step record has each key once, got a repeated key.")
    return data
