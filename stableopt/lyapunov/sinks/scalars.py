"""The numbers of a record under the names that dashboards show."""

from __future__ import annotations

import math

from stableopt.lyapunov.record import StepRecord

__all__ = ["scalars"]

_NUMBERS = {
    "loss": "loss",
    "loss_after": "loss_after",
    "energy/before": "energy_before",
    "energy/after": "energy_after",
    "energy/predicted": "predicted",
    "energy/tolerance": "tolerance",
    "grad_norm": "grad_norm",
    "weight_norm": "weight_norm",
    "displacement": "displacement",
    "slope": "slope",
    "trust/rho": "trust",
    "trust/batch_sharpness": "batch_sharpness",
    "trust/edge_distance": "edge_distance",
    "sharpness/value": "sharpness",
    "sharpness/ratio": "edge",
    "sharpness/plain": "plain_sharpness",
    "sharpness/residual": "sharpness_residual",
    "trace/value": "trace",
    "trace/error": "trace_error",
    "noise_scale": "noise_scale",
    "forward_exponent": "forward_exponent",
    "weight_exponent": "weight_exponent",
    "overhead": "overhead",
}
_TABLES = {
    "grad_norm": "grad_norms",
    "update_ratio": "update_ratio",
    "norm": "norms",
    "limit": "limits",
    "norm_gap": "norm_gap",
    "cfl": "cfl",
    "growth": "growth",
    "gain": "gains",
    "kinks": "kinks",
}


def scalars(record: StepRecord, *, tables: bool = True) -> dict[str, float]:
    r"""Return the numbers of a record that are known and finite, each under a name that stays the same from version to version.

    ========================================================================== =====================================================
    name                                                                       field of :class:`~stableopt.lyapunov.StepRecord`
    ========================================================================== =====================================================
    ``loss``, ``loss_after``, ``grad_norm``, ``weight_norm``,                  of the same name
    ``displacement``, ``slope``, ``noise_scale``, ``forward_exponent``,
    ``weight_exponent``, ``overhead``
    ``energy/before``, ``/after``, ``/predicted``, ``/tolerance``              ``energy_before``, …
    ``energy/delta``                                                           ``-dissipation``, after - before: a decrease is < 0
    ``trust/rho``, ``/batch_sharpness``, ``/edge_distance``                    ``trust``, …
    ``sharpness/value``, ``/ratio``, ``/plain``, ``/residual``                 ``sharpness``, ``edge``, ``plain_sharpness``, …
    ``trace/value``, ``trace/error``                                           ``trace``, ``trace_error``
    ``guard/scale``, ``guard/trials``                                          ``scale``, ``trials``, where there is a guard
    ``lr/<group>``                                                             ``lr``; groups are counted from 0
    ``grad_norm/<parameter>``, ``update_ratio/<parameter>``,                   ``grad_norms``, ``update_ratio``,
    ``norm/<weight>``, ``limit/<weight>``, ``norm_gap/<weight>``,              ``norms``, ``limits``, ``norm_gap``,
    ``cfl/<block>``, ``growth/<block>``, ``gain/<layer>``, ``kinks/<module>``  ``cfl``, ``growth``, ``gains``, ``kinks``
    ========================================================================== =====================================================

    Args:
        record: whose numbers are asked for.
        tables: whether to give the last two rows, a number per parameter, layer and block.

    Returns:
        Finite floats. A loss that is NaN is not among them: that it is, the alarms say.

    Examples:
        >>> scalars(StepRecord(step=1, loss=0.5, dissipation=0.25, lr=(0.1,), norms={"0.weight": 2.0}))
        {'loss': 0.5, 'energy/delta': -0.25, 'lr/0': 0.1, 'norm/0.weight': 2.0}
    """
    values = {name: getattr(record, field) for name, field in _NUMBERS.items()}
    values["energy/delta"] = -record.dissipation
    if record.action != "unguarded":
        values["guard/scale"], values["guard/trials"] = record.scale, float(record.trials)
    values.update((f"lr/{group}", lr) for group, lr in enumerate(record.lr))
    if tables:
        for name, field in _TABLES.items():
            values.update((f"{name}/{key}", value) for key, value in getattr(record, field).items())
    return {name: value for name, value in values.items() if math.isfinite(value)}
