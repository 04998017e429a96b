"""The two files of a profile in a run folder: what it says in JSON, and the factors and curves that it rests on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stableopt.files import encode_safetensors, write_atomically
from stableopt.lyapunov.profile.growth.energies import EnergySynthesis
from stableopt.lyapunov.profile.growth.exponents import exponent
from stableopt.lyapunov.profile.growth.gains import CoupledGains
from stableopt.lyapunov.profile.growth.scaled import exp_or_inf
from stableopt.lyapunov.profile.growth.windows import Windows
from stableopt.lyapunov.profile.plain import plain
from stableopt.lyapunov.profile.representations.depth import ForwardProfile

if TYPE_CHECKING:
    from stableopt.lyapunov.profile.reading import ProfileReading

__all__ = ["ARRAYS", "KINDS", "NUMBERS", "SCHEMA", "arrays_of", "numbers_of", "write_reading"]

NUMBERS, ARRAYS = "profile.json", "profile.safetensors"
"""The two files of a profile: what it says, and the curves and tables that it rests on."""

SCHEMA = 1
KINDS = {"F64": "<f8", "I64": "<i8"}
"""The types of the numbers in them, as safetensors and as numpy names them."""

_RUNNING = 64
"""How many points the curve of running exponents has at most."""


def write_reading(reading: ProfileReading, folder: str | os.PathLike[str]) -> None:
    """Write ``profile.json`` and ``profile.safetensors``, the first one last.

    Args:
        reading: of a profile.
        folder: made if it is not there.

    Raises:
        OSError: if the folder cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, value in arrays_of(reading).items():
        kind = "I64" if value.dtype.kind == "i" else "F64"
        arrays[name] = kind, value.shape, np.ascontiguousarray(value, dtype=KINDS[kind]).tobytes()
    text = json.dumps(numbers_of(reading), indent=1, allow_nan=False)
    write_atomically(place / ARRAYS, encode_safetensors(arrays))
    write_atomically(place / NUMBERS, text.encode())


def numbers_of(reading: ProfileReading) -> dict[str, Any]:
    """Return what ``profile.json`` holds, as plain data (:func:`~stableopt.lyapunov.profile.plain.plain`).

    Args:
        reading: of a profile.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> from stableopt.lyapunov.profile.reading import ProfileReading
        >>> factors = Factors(np.full((40, 1, 1), 0.9), np.arange(41), dimension=1)
        >>> numbers_of(ProfileReading(pieces=(factors,), theta=(np.ones((41, 1, 1)),)))["verdict"]["horizon"]
        40
    """
    factors, steps = reading.factors, [int(reading.pieces[0].steps[0]), int(reading.pieces[-1].steps[-1])]
    windows, energy = reading.windows, reading.energy
    followed = reading.followed
    return plain(
        {
            "schema": SCHEMA,
            "backend": reading.backend,
            "directions": factors.directions,
            "dimension": factors.dimension,
            "full": factors.full,
            "metric": reading.metric,
            "steps": steps,
            "followed": followed,
            "windowed": reading.windowed,
            "seed": reading.seed,
            "optimizer": reading.optimizer,
            "reason": reading.reason,
            "cost": {
                "products": reading.products,
                "products_per_step": reading.products / followed if followed else None,
            },
            "exponents": [dataclasses.asdict(e) for e in reading.exponents],
            "determinant": {"measured": reading.determinant, "full": factors.full},
            "verdict": dataclasses.asdict(reading.verdict),
            "largest_window": {
                "log_norm": windows.sup,
                "start": windows.start,
                "end": windows.end,
                "at_most": windows.sup_upper,
            },
            "energy": None if energy is None else _energy_facts(energy, windows),
            "gains": None if reading.gains is None else _gain_facts(reading.gains),
            "finite_size": None if reading.finite_size is None else dataclasses.asdict(reading.finite_size),
            "errors": None
            if reading.errors is None
            else {"count": len(reading.errors.starts), "peak": reading.errors.peak},
            "hyper": [
                {"name": h.name, "start": h.start, "last": float(h.log_norms[-1]) if len(h.log_norms) else None}
                for h in reading.hyper
            ],
            "layers": list(reading.mixed[1]),
            "forward": [
                {"step": look.step, "table_key": f"forward/{i}", **_forward_facts(look.forward)}
                for i, look in enumerate(reading.looks)
                if look.forward is not None
            ],
            "missing": [{"step": look.step, "reason": look.reason} for look in reading.looks if look.reason],
        }
    )


def arrays_of(reading: ProfileReading) -> dict[str, NDArray[Any]]:
    """Return what ``profile.safetensors`` holds, float64 and int64.

    Args:
        reading: of a profile.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> from stableopt.lyapunov.profile.reading import ProfileReading
        >>> factors = Factors(np.full((40, 1, 1), 0.9), np.arange(41), dimension=1)
        >>> sorted(arrays_of(ProfileReading(pieces=(factors,), theta=(np.ones((41, 1, 1)),))))[:3]
        ['energy/bound', 'energy/log_value', 'energy/steps']
    """
    factors, windows = reading.factors, reading.windows
    steps, mixed = reading.mixed
    places, running = _running(reading)
    found: dict[str, NDArray[Any]] = {
        "factors/R": factors.R,
        "factors/steps": factors.steps,
        "path": windows.path,
        "windows/log_norms": windows.log_norms,
        "windows/steps": windows.steps,
        "running/steps": places,
        "running/exponent": running[:, 0],
        "running/lower": running[:, 1],
        "running/upper": running[:, 2],
        "parametric/log_norms": reading.parametric,
    }
    if mixed:
        found |= {"mixed/steps": steps, "mixed/log_norms": np.stack(list(mixed.values()), axis=1)}
    if reading.errors is not None:
        found |= {"update/starts": reading.errors.starts, "update/log_norms": reading.errors.log_norms}
    for response in reading.hyper:
        found[f"hyper/{response.name}"] = response.log_norms
    for i, look in enumerate(reading.looks):
        if look.forward is not None:
            found[f"forward/{i}"] = look.forward.log_norms
    energy = reading.energy
    if energy is not None:
        m = len(energy.steps)
        found["energy/steps"] = energy.steps
        found["energy/log_value"] = energy.along(np.eye(factors.directions)[0])
        found["energy/bound"] = np.array(
            [[energy.bound(i, j) if i <= j else math.nan for i in range(m)] for j in range(m)]
        )
    return found


def _energy_facts(energy: EnergySynthesis, windows: Windows) -> dict[str, Any]:
    check = energy.check(windows)
    ratios = {"worst_ratio": check.largest, "median_ratio": check.median, "smallest_ratio": check.smallest}
    return {
        "reference": energy.reference,
        "weight": exp_or_inf(float(np.median(energy.log_weights))) if len(energy.log_weights) else None,
        "smallest": energy.smallest,
        "largest": energy.largest,
        "constant": energy.constant,
        "constant_between": energy.constant_between,
        "largest_rate": energy.largest_rate,
        "rate": energy.rate,
        "holds": check.holds,
        **{name: exp_or_inf(value) for name, value in ratios.items()},
    }


def _forward_facts(forward: ForwardProfile) -> dict[str, Any]:
    names = ("how", "operator", "exponent", "cost")
    return {"names": list(forward.names), **{name: getattr(forward, name) for name in names}}


def _gain_facts(gains: CoupledGains) -> dict[str, Any]:
    (a, b), (c, d) = gains.matrix.tolist()
    return {
        "a": a, "b": b, "c": c, "d": d, "radius": gains.radius, "weights": list(gains.weights), "rate": gains.rate,
        "joint_rate": gains.joint_rate, "verdict": gains.verdict, "exact": gains.exact,
    }  # fmt: skip


def _running(reading: ProfileReading) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the leading exponent with its interval as it was known after each of some steps, over all pieces."""
    growth, spacing = (np.concatenate([getattr(p, name) for p in reading.pieces]) for name in ("growth", "spacing"))
    steps = np.concatenate([piece.steps[1:] for piece in reading.pieces])
    ends = np.unique(np.linspace(1, len(growth), min(_RUNNING, len(growth))).astype(np.int64))
    known = [exponent(growth[:end], spacing=spacing[:end]) for end in ends]
    return steps[ends - 1], np.array([(e.value, e.lower, e.upper) for e in known]).reshape(-1, 3)
