"""What an audit says: findings with measured numbers and, where there is one, a pair of inputs that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["SEVERITIES", "Audit", "Finding", "Witness"]

SEVERITIES = ("serious", "weak", "note")
"""From worst to least: a guarantee is broken, a guarantee is weakened, or something is to be known."""
_LISTED = 256


@dataclass(frozen=True)
class Witness:
    r"""Two inputs of one module, and how far apart it moves them: :math:`\text{gain} = \|f(x)-f(y)\|_2 / \|x-y\|_2`.

    Args:
        x: an input of the module, with its batch dimension, float64.
        y: another one.
        gain: the quotient, evaluated in float64: the Lipschitz constant of the module is not smaller, up to the rounding of it.

    Examples:
        >>> import torch
        >>> Witness(torch.zeros(1, 2), torch.ones(1, 2), 3.0).as_dict()
        {'shape': [1, 2], 'x': [0.0, 0.0], 'y': [1.0, 1.0], 'gain': 3.0}
    """

    x: Tensor
    y: Tensor
    gain: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain data; the entries of inputs that have more than 256 are left out.

        Examples:
            >>> import torch
            >>> sorted(Witness(torch.zeros(1, 300), torch.ones(1, 300), 3.0).as_dict())
            ['gain', 'shape']
        """
        data: dict[str, Any] = {"shape": list(self.x.shape)}
        if self.x.numel() <= _LISTED:
            data |= {"x": self.x.flatten().tolist(), "y": self.y.flatten().tolist()}
        return data | {"gain": self.gain}


@dataclass(frozen=True)
class Finding:
    """State one thing that breaks or weakens a guarantee, where it is, and how large it was measured to be.

    Args:
        path: dotted name of the module, "" for the model itself.
        kind: what it is, a word that does not change between versions, as ``"sample-normalization"``.
        what: the same in one sentence.
        severity: one of :data:`SEVERITIES`.
        advice: what to do, in one sentence.
        claimed: the number that the module states, or that it is commonly taken for; NaN if there is none.
        attained: a number that is reached, from below, by the witness or by a computation in float64; NaN if none was measured.
        bound: a proved upper bound of the same quantity; infinite if there is none.
        witness: a pair of inputs of the module that shows it, None if there is none.
        numbers: further measurements by name.

    Raises:
        ValueError: if the severity is unknown.

    Examples:
        >>> finding = Finding("1", "norm", "it is larger.", "weak", "divide by it.", claimed=1.0, attained=1.5)
        >>> finding.excess
        0.5
        >>> print(finding)
        weak     1: it is larger. Taken for 1, attained 1.5. Advice: divide by it.
    """

    path: str
    kind: str
    what: str
    severity: str
    advice: str
    claimed: float = math.nan
    attained: float = math.nan
    bound: float = math.inf
    witness: Witness | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a severity that no one can order."""
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}.")

    @property
    def excess(self) -> float:
        """By how much the attained number is above the claimed one; NaN if one of them is not known.

        Examples:
            >>> Finding("", "norm", "", "note", "").excess
            nan
        """
        return self.attained - self.claimed

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: numbers that are not finite are left out.

        Examples:
            >>> Finding("1", "norm", "it is larger.", "note", "shrink it.", claimed=1.0).as_dict()["claimed"]
            1.0
        """
        data: dict[str, Any] = {name: getattr(self, name) for name in ("path", "kind", "severity", "what", "advice")}
        numbers = {"claimed": self.claimed, "attained": self.attained, "bound": self.bound}
        data |= {name: value for name, value in numbers.items() if math.isfinite(value)}
        if found := {name: value for name, value in self.numbers.items() if math.isfinite(value)}:
            data["numbers"] = found
        if self.witness is not None:
            data["witness"] = self.witness.as_dict()
        return data

    def __str__(self) -> str:
        named = {"taken for": self.claimed, "attained": self.attained, "proved to be at most": self.bound}
        told = [f"{word} {value:.9g}" for word, value in named.items() if math.isfinite(value)]
        told += [f"{word} {value:.6g}" for word, value in self.numbers.items()]
        measured = f" {', '.join(told)}." if told else ""
        measured = measured[:1] + measured[1:2].upper() + measured[2:]
        return f"{self.severity:<8} {self.path or '(the model)'}: {self.what}{measured} Advice: {self.advice}"


@dataclass(frozen=True)
class Audit:
    """State what an audit found, the worst first.

    Args:
        findings: in the order of :data:`SEVERITIES`, then in the order of the modules.
        modules: how many modules were looked at.
        ran: whether the model could be run, so that custom forward maps were seen.

    Note:
        An audit finds errors; that it finds none proves nothing. What proves is :func:`stableopt.certify.certify`.

    Examples:
        >>> empty = Audit((), modules=3, ran=True)
        >>> bool(empty), len(empty), empty.worst
        (False, 0, None)
    """

    findings: tuple[Finding, ...]
    modules: int
    ran: bool

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def worst(self) -> str | None:
        """The severity of the worst finding, None if there is none.

        Examples:
            >>> Audit((Finding("", "norm", "", "note", ""),), modules=1, ran=True).worst
            'note'
        """
        return self.findings[0].severity if self.findings else None

    def at_least(self, severity: str) -> tuple[Finding, ...]:
        """Return the findings that are as bad as ``severity`` or worse.

        Args:
            severity: one of :data:`SEVERITIES`.

        Raises:
            ValueError: if it is unknown.

        Examples:
            >>> found = Audit((Finding("", "norm", "", "note", ""),), modules=1, ran=True)
            >>> len(found.at_least("note")), len(found.at_least("weak"))
            (1, 0)
        """
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {', '.join(SEVERITIES)}, got {severity!r}.")
        allowed = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return tuple(finding for finding in self.findings if finding.severity in allowed)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON.

        Examples:
            >>> Audit((), modules=3, ran=True).as_dict()
            {'modules': 3, 'ran': True, 'worst': None, 'findings': []}
        """
        return {
            "modules": self.modules,
            "ran": self.ran,
            "worst": self.worst,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{sum(f.severity == s for f in self.findings)} {s}" for s in SEVERITIES)
        head = f"{self.modules} modules, {len(self)} findings ({counts})"
        if not self.ran:
            head += "; the model was not run, so forward maps of its own were not seen: give the shape of an input"
        return "\n".join([head, *map(str, self.findings)])
