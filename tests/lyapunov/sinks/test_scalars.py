"""Names stay, and what is unknown is not drawn."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from stableopt.lyapunov import StepRecord
from stableopt.lyapunov.sinks import scalars


def full(**changes):
    names = [item.name for item in fields(StepRecord) if item.type == "float"]
    tables = [item.name for item in fields(StepRecord) if str(item.type).startswith("Mapping")]
    values = {name: float(i) for i, name in enumerate(names)}
    return StepRecord(
        **{
            **dict(step=1, action="accepted", lr=(0.1, 0.2), **values),
            **{name: {"a.b": 1.0} for name in tables},
            **changes,
        }
    )


def test_the_names_are_the_agreed_ones():
    assert set(scalars(full())) == {
        "loss", "loss_after", "energy/before", "energy/after", "energy/delta", "energy/predicted", "energy/tolerance",
        "grad_norm", "weight_norm", "displacement", "slope", "trust/rho", "trust/batch_sharpness", "trust/edge_distance",
        "sharpness/value", "sharpness/ratio", "sharpness/plain", "sharpness/residual", "trace/value", "trace/error",
        "noise_scale", "forward_exponent", "weight_exponent", "overhead", "guard/scale", "guard/trials", "lr/0", "lr/1",
        "grad_norm/a.b", "update_ratio/a.b", "norm/a.b", "limit/a.b", "norm_gap/a.b", "cfl/a.b", "growth/a.b",
        "gain/a.b", "kinks/a.b",
    }  # fmt: skip


def test_every_number_of_a_record_is_under_one_name():
    record = full()
    values = scalars(record, tables=False)
    left_out = {item.name for item in fields(StepRecord) if item.type == "float"} - {"dissipation"}
    assert sorted(getattr(record, name) for name in left_out) == sorted(
        value
        for name, value in values.items()
        if not name.startswith("lr/") and name not in {"energy/delta", "guard/trials"}
    )
    assert values["energy/delta"] == -record.dissipation
    assert values["trust/rho"] == record.trust
    assert values["sharpness/ratio"] == record.edge
    assert "norm/a.b" not in values


def test_what_is_unknown_or_not_finite_is_left_out():
    assert scalars(StepRecord(step=1)) == {}
    record = StepRecord(step=1, loss=math.nan, trust=math.inf, lr=(-math.inf, 0.5), norms={"a": math.nan, "b": 1.0})
    assert scalars(record) == {"lr/1": 0.5, "norm/b": 1.0}


@pytest.mark.parametrize(("action", "shown"), [("unguarded", False), ("shrunk", True), ("accepted", True)])
def test_the_scale_is_the_guards(action, shown):
    assert ("guard/scale" in scalars(StepRecord(step=1, action=action, scale=0.5))) == shown
