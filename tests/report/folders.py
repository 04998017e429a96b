"""Run folders for the tests of the report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from stableopt.lyapunov import JSONLSink, StepRecord

LIPSCHITZ = 1.0000000123


def certificate(weights: bytes, lipschitz: float = LIPSCHITZ, layer: str = "0.weight") -> dict:
    """Return the parts of a certificate that a report reads, in the layout of the real one."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model.safetensors", "digest": {"sha256": hashlib.sha256(weights).hexdigest()}}],
        "predicateType": "https://stableopt.dev/certificate/v1",
        "predicate": {
            "schema": 1,
            "graph": [
                {"op": "linear", "weight": layer, "bias": None, "bound": lipschitz.hex()},
                {"op": "activation", "name": "relu", "bound": "0x1.0p+0"},
            ],
            "claims": {"proved": [{"id": "lipschitz_l2", "L": lipschitz.hex()}], "replayable": [], "attested": []},
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
