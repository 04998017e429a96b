"""Run folders for the tests of the report."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from stableopt.certify.verifier import PREDICATE_TYPE
from stableopt.lyapunov import Event, JSONLSink, StepRecord

LIPSCHITZ = 1.0000000123


def certificate(weights: bytes, lipschitz: float = LIPSCHITZ, layer: str = "0.weight") -> dict:
    """Return the parts of a certificate that a report reads, in the layout of the real one."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model.safetensors", "digest": {"sha256": hashlib.sha256(weights).hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "schema": 2,
            "input": {"shape": [4], "metric": "l2", "domain": "R^n"},
            "graph": [
                {
                    "op": "linear",
                    "in": [0],
                    "weight": layer,
                    "bias": None,
                    "transposed": False,
                    "bound": lipschitz.hex(),
                },
                {"op": "activation", "in": [1], "name": "relu", "bound": "0x1.0p+0"},
            ],
            "claims": {
                "proved": [{"id": "lipschitz", "norm": "l2", "L": lipschitz.hex()}],
                "replayable": [],
                "attested": [],
            },
        },
    }


def some_records(count: int = 12) -> list[StepRecord]:
    """Return records with every verdict and every action."""
    kinds = [
        ("decreased", "accepted"),
        ("undecided", "shrunk"),
        ("increased", "undone"),
        ("unobserved", "unguarded"),
        ("nonfinite", "restarted"),
    ]
    records = []
    for step in range(1, count + 1):
        verdict, action = kinds[step % len(kinds)]
        records.append(
            StepRecord(
                step=step,
                loss=2.0 / step,
                energy_before=3.0 / step,
                energy_after=2.5 / step,
                dissipation=0.5 / step,
                verdict=verdict,
                action=action,
                scale=1.0 if action == "accepted" else 0.25,
                lr=(0.1,),
                norms={"0.weight": 0.9, "10.weight": 0.5 + step / 100} if step % 3 == 1 else {},
                limits={"0.weight": 1.0} if step % 3 == 1 else {},
                cfl={"2": 0.5} if step % 3 == 1 else {},
            )
        )
    return records


def watched_records(
    count: int, *, seed: int = 0, layers: int = 6, fault: int = 10**9, lr: float = 0.05
) -> list[StepRecord]:
    """Return records with every tier, as a training leaves them that goes well until step ``fault`` and recovers 90 steps later."""
    chance = random.Random(seed)
    names = [f"blocks.{k // 2}.{('linear', 'out')[k % 2]}.weight" for k in range(layers)]
    return [_watched(step, step / count, step - fault, chance, names, lr) for step in range(1, count + 1)]


def _watched(step: int, done: float, late: int, chance: random.Random, names: list[str], lr: float) -> StepRecord:
    noise = lambda scale: math.exp(chance.gauss(0.0, scale))  # noqa: E731
    bad = 0 < late < 90
    loss = 0.3 * 1.6 ** min(late, 60) if bad else 2.3 * math.exp(-5 * done) + 0.05 + 0.05 * abs(chance.gauss(0, 1))
    trust = -0.5 * late if bad else 0.85 - 0.3 * done + 0.12 * chance.gauss(0, 1)
    broken = late == 60
    loss, trust = (math.nan, math.nan) if broken else (loss, trust)
    values: dict[str, Any] = {
        "loss": loss,
        "energy_before": 1.02 * loss,
        "energy_after": loss * (1.02 - 0.02 * trust),
        "verdict": "nonfinite" if broken else "increased" if bad else "decreased",
        "action": "undone" if broken else "accepted",
        "scale": 0.5 if bad else 1.0,
        "lr": (lr * 0.5 * (1 + math.cos(math.pi * done)),),
        "grad_norm": noise(0.3) * (1 - 0.7 * done),
        "grad_norms": {name: noise(0.3) * math.exp(-0.12 * k) * (1 - 0.7 * done) for k, name in enumerate(names)},
        "update_ratio": {name: 1e-3 * noise(0.25) * math.exp(3 * bad - 0.15 * k) for k, name in enumerate(names)},
        "nonfinite": ("loss", f"grad:{names[0]}") if broken else (),
        "trust": trust,
        "batch_sharpness": 2 * (1 - trust) / lr,
        "overhead": 0.031 + 0.01 * math.exp(-step / 50),
        "events": _events(step, late, names[0]),
    }
    if step % 10 == 0:
        values |= {
            "forward_exponent": 0.1 * math.sin(4 * done) + 0.02 * chance.gauss(0, 1),
            "norms": {name: 1.0 + 0.15 * done * (k % 3) for k, name in enumerate(names)},
            "limits": dict.fromkeys(names[:-1], 1.4),
            "cfl": {f"blocks.{k}": min(1.0, 0.4 + 0.1 * k + 0.3 * done) for k in range(len(names) // 2)},
            "weight_exponent": 0.4 + 0.05 * done,
            "gains": {name: 0.1 * math.sin(4 * done + k) for k, name in enumerate(names)},
            "growth": {"head": 2.0 - done},
            "kinks": {f"blocks.{k}.act": 0.02 + 0.03 * k * (1 - done) for k in range(3)},
        }
    if step % 50 == 0:
        values |= {
            "sharpness": 10 + 25 * done + 2 * chance.gauss(0, 1),
            "edge": 0.25 + 0.65 * done + 0.05 * chance.gauss(0, 1),
            "plain_sharpness": 14 + 30 * done,
            "sharpness_residual": abs(0.05 * chance.gauss(0, 1)),
            "trace": 120 + 60 * done + 10 * chance.gauss(0, 1),
            "trace_error": 12.0,
            "noise_scale": 200 * (1 + 3 * done) * noise(0.2),
            "hvp": "exact",
        }
    return StepRecord(step=step, **values)


def _events(step: int, late: int, layer: str) -> tuple[Event, ...]:
    """Return what the alarms and the policies say some steps after a fault."""
    start = step - late + 1
    if late == 4:
        evidence = (
            "e-value 1.3e4 against 1e4: a healthy run with at most 10 % of such steps reaches it once in 10000 checks"
        )
        advice = "lower the learning rate by 2 to 10; look at the batches since this step"
        what = "the loss of the same batch rose in 4 of the last 5 checked steps"
        return (
            Event(step, "alarm", "increase", "shrink", what, evidence, start, advice, 1.3e4, 1e4),
            Event(step, "action", "", "shrink", "the learning rate is halved for the next 100 steps"),
        )
    if late == 8:
        evidence = "energy 12.9 against 3.5 = 1.5 x the mean of the first 20 steps, at 2 of the last 5 steps"
        what = "the energy left the sublevel set of the start"
        return (
            Event(step, "alarm", "sublevel", "rollback", what, evidence, start, "go back to a snapshot", 12.9, 3.5),
        )
    if late == 60:
        what = "the loss and the gradient of 1 parameter are not finite"
        return (
            Event(step, "alarm", "nonfinite", "skip", what, f"loss = nan, grad:{layer}", step, "look at the batch"),
        )
    return ()


def run_folder(
    path: Path, *, records=None, settings=None, metrics=None, layer: str = "0.weight", lipschitz: float = LIPSCHITZ
) -> Path:
    """Write a complete run folder."""
    path.mkdir(parents=True)
    sink = JSONLSink(path / "energy.jsonl")
    for record in some_records() if records is None else records:
        sink.write(record)
    sink.close()
    (path / "energy.jsonl").touch()
    settings = {"model": "mlp", "optimizer": "AdamW", "lr": 0.003, "seed": 0} if settings is None else settings
    (path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    if metrics is None:
        metrics = {
            "test_accuracy": 0.9625,
            "train_accuracy": 0.99,
            "certified_accuracy": {"0.5": 0.5, "0.1": 0.9, "10": 0.01, "2": 0.1},
            "lipschitz": lipschitz,
            "seconds": 1.5,
            "steps": 12,
            "actions": {"accepted": 10, "shrunk": 2},
            "verdicts": {"decreased": 12},
        }
    (path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "model.cert.json").write_text(json.dumps(certificate(b"weights", lipschitz, layer)), encoding="utf-8")
    return path
