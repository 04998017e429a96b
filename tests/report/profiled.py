"""Profiles of random linear systems, in the two files of a run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

N, LAYERS = 4, 5


def exponent_entry(value: float, half: float = 0.004, **changes: Any) -> dict[str, Any]:
    """Return an exponent as the file has it."""
    entry = {
        "value": value,
        "lower": value - half,
        "upper": value + half,
        "level": 0.95,
        "effective": 87.25,
        "count": 180,
    }
    return entry | {"burn_in": 20, "kind": "almost sure", "reason": ""} | changes


def system(steps: int = 200, growth: float = -0.02, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays of a random linear system that grows or decays at a rate."""
    rng = np.random.default_rng(seed)
    Q, R = np.eye(N), np.empty((steps, N, N))
    A = np.linalg.qr(rng.normal(size=(steps, N, N)))[0] * np.exp(growth + 0.05 * rng.normal(size=(steps, N, 1)))
    for t in range(steps):
        Q, R[t] = np.linalg.qr(A[t] @ Q)
        signs = np.where(np.diag(R[t]) < 0, -1.0, 1.0)
        Q, R[t] = Q * signs, signs[:, None] * R[t]
    grid = np.arange(0, steps + 1, max(steps // 20, 1))
    norms = np.full((len(grid), len(grid)), np.nan)
    for j, s in enumerate(grid):
        P, t = np.eye(N), s
        for i in range(j, len(grid)):
            while t < grid[i]:
                P, t = R[t] @ P, t + 1
            norms[i, j] = math.log(np.linalg.norm(P, 2))
    path, P = np.zeros(steps + 1), np.eye(N)
    for t in range(steps):
        P = R[t] @ P
        path[t + 1] = math.log(np.linalg.norm(P, 2))
    x = np.log(R[:, 0, 0])
    count = np.arange(1, steps + 1)
    mean = np.cumsum(x) / count
    half = 2.0 * 0.05 / np.sqrt(count)
    half[:4] = np.nan
    age = np.arange(30)
    return {
        "factors/R": R,
        "factors/steps": np.arange(steps + 1, dtype=np.int64),
        "path": path,
        "windows/log_norms": norms,
        "windows/steps": grid.astype(np.int64),
        "running/steps": count,
        "running/exponent": mean,
        "running/lower": mean - half,
        "running/upper": mean + half,
        "energy/steps": grid.astype(np.int64),
        "energy/log_value": 2 * path[grid] + 1.0,
        "energy/bound": norms + 0.3 + 0.01 * (grid[:, None] - grid[None, :]),
        "mixed/steps": grid.astype(np.int64),
        "mixed/log_norms": path[grid][:, None] + np.linspace(0.0, 1.0, LAYERS)[None, :],
        "parametric/log_norms": path - 0.1,
        "update/starts": np.array([0, 50, 100], dtype=np.int64),
        "update/log_norms": growth * age[None, :] + np.array([[0.0], [0.2], [-0.2]]),
        "hyper/lr": np.log(np.arange(1, steps + 1)),
        "forward/0": _forward(rng, 1.3),
        "forward/1": _forward(rng, 0.8),
    }


def numbers(steps: int = 200, growth: float = -0.02, **changes: Any) -> dict[str, Any]:
    """Return a complete ``profile.json``."""
    kind = "exponentially stable" if growth < 0 else "exponentially unstable"
    stable = growth < 0
    verdict = {"kind": kind, "horizon": steps, "constant": 3.5 if stable else None, "rate": 0.985 if stable else None}
    verdict |= {"terminal_decay": stable, "peak": 0.75, "reason": "the interval of the exponent excludes zero"}
    names = ["input", *(str(k) for k in range(LAYERS))]
    gains = {"a": 0.5, "b": 0.25, "c": 0.1, "d": 0.9, "radius": 0.95, "weights": [1.0, 0.3], "verdict": "holds"}
    gains |= {"rate": 0.95, "joint_rate": 0.94, "exact": True}
    energy = {"weight": 1.02, "smallest": 1.0, "largest": 60.0, "rate": 0.97, "worst_ratio": 9.3, "median_ratio": 1.4}
    energy |= {"constant": 7.75, "constant_between": 8.5, "largest_rate": 0.99, "reference": "path"}
    return {
        "schema": 1,
        "backend": "graph",
        "directions": N,
        "dimension": N,
        "full": True,
        "metric": {"parameters": 1.0, "momentum_buffer": 0.1},
        "steps": [0, steps],
        "followed": steps,
        "windowed": False,
        "seed": 0,
        "optimizer": "SGD",
        "reason": "",
        "cost": {"products": steps * N, "products_per_step": N},
        "exponents": [exponent_entry(growth - 0.01 * k) for k in range(N)],
        "determinant": {"measured": -21.0721031315653, "full": True},
        "verdict": verdict | {"exponent": exponent_entry(growth)},
        "largest_window": {"log_norm": 0.9, "start": 10, "end": 17, "at_most": 0.9},
        "energy": energy | {"holds": True},
        "gains": gains,
        "errors": {"count": 3, "peak": 0.2},
        "hyper": [{"name": "lr", "start": 0, "last": math.log(steps)}],
        "layers": [str(k) for k in range(LAYERS)],
        "forward": [
            {"step": 0, "how": "jacobian", "table_key": "forward/0", "names": names},
            {"step": steps, "how": "lanczos", "table_key": "forward/1", "names": names},
        ],
        "missing": [],
        "finite_size": {"size": 1e-3, "exponent": exponent_entry(growth + 0.003), "kinks": [], "stopped": ""},
    } | changes


def write_profile(
    folder: Path, content: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None
) -> Path:
    """Write the two files of a profile into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers() if content is None else content, allow_nan=False)
    (folder / "profile.json").write_text(text, encoding="utf-8")
    save_file(system() if arrays is None else arrays, folder / "profile.safetensors")
    return folder


def _forward(rng: np.random.Generator, gain: float) -> np.ndarray:
    layers = [gain * np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.7, 1.2) for _ in range(LAYERS)]
    norms = np.full((LAYERS + 1, LAYERS + 1), np.nan)
    for k in range(LAYERS + 1):
        J = np.eye(3)
        norms[k, k] = 0.0
        for l in range(k, LAYERS):
            J = layers[l] @ J
            norms[l + 1, k] = math.log(np.linalg.norm(J, 2))
    return norms
