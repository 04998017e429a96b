r"""What is limited in a model, by what, and what of its budget each layer uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.branches import branches_of
from stableopt.nn.gap import norm_gap
from stableopt.nn.limits import Limit, estimates_evaluated, limited_slots
from stableopt.nn.parametrized import plain_class
from stableopt.nn.rules import lipschitz
from stableopt.nn.slots import Slot
from stableopt.nn.stabilize import Record, record_of

__all__ = ["Row", "Table", "table"]


@dataclass(frozen=True)
class Row:
    """One limited weight.

    Args:
        name: its name in the plain model.
        layer: the class of its layer.
        constraint: how the limit is enforced.
        norm: which operator norm.
        before: an upper bound of the norm before it was limited; None if that is not known.
        after: the norm now, with its proved upper end; None on the meta device or if no proof is known.
        limit: the limit, the layer's part of the budget.
        count: how often the layer occurs in the chain of the model; 0 in a branch, whose module counts with its own constant.
        gap: for a method that trains with an estimate, the proved norm of the weight in training over the limit, see
            :func:`stableopt.nn.norm_gap`; None for all others.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> table(stabilize(nn.Linear(2, 2), 0.5)).rows[0].limit
        0.5
    """

    name: str
    layer: str
    constraint: str
    norm: str
    before: float | None
    after: Bound | None
    limit: float
    count: int
    gap: float | None = None


@dataclass(frozen=True)
class Table:
    """What :func:`table` found; printing it gives a table.

    Args:
        rows: the limited weights.
        constants: the constants of the other layers of a chain, whatever their weights become.
        lipschitz: the limit of the whole model; None if there is none.
        branched: of those layers that have branches with limited weights, the constants that are proved now.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> lines = str(table(stabilize(nn.Sequential(nn.Linear(1, 1), nn.GELU()), 2.0))).splitlines()
        >>> for line in [" ".join(lines[0].split()), *lines[2:4]]:
        ...     print(line)
        weight layer constraint norm before after limit used gap in training
        other layers: 1.129
        product of the limits: 2
    """

    rows: tuple[Row, ...]
    constants: dict[str, float]
    lipschitz: float | None
    branched: dict[str, float] = field(default_factory=dict)

    @property
    def proved(self) -> Bound | None:
        """The product of the proved norms and of the other constants; None if there is none for the whole model."""
        return self._product(lambda row: None if row.after is None else row.after.upper, self.constants | self.branched)

    @property
    def enforced(self) -> Bound | None:
        """The product of the limits and of the other constants; None if there is none for the whole model."""
        return self._product(lambda row: row.limit, self.constants)

    def _product(self, factor: Callable[[Row], float | None], constants: dict[str, float]) -> Bound | None:
        if self.lipschitz is None:
            return None
        product = Bound.point(1.0)
        for row in self.rows:
            value = factor(row)
            if value is None:
                return None
            for _ in range(row.count):
                product = product * Bound(0.0, value)
        for constant in constants.values():
            product = product * Bound(0.0, constant)
        return product

    def __str__(self) -> str:
        """Return the table as aligned text."""
        head = ("weight", "layer", "constraint", "norm", "before", "after", "limit", "used")
        cells = [head, *(_cells(row) for row in self.rows)]
        if any(row.gap is not None for row in self.rows):
            gaps = ["" if row.gap is None else f"{row.gap:.4f}" for row in self.rows]
            cells = [(*line, gap) for line, gap in zip(cells, ["gap in training", *gaps], strict=True)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        if self.lipschitz is None:
            return "\n".join([*lines, "no bound of the whole model follows"])
        if self.constants:
            lines.append(f"other layers: {math.prod(self.constants.values()):.4g}")
        enforced, proved = self.enforced, self.proved
        if enforced is not None:
            lines.append(f"product of the limits: {enforced.upper:.6g}")
        if proved is not None:
            lines.append(f"product proved now: {proved.upper:.6g} of at most {self.lipschitz:.6g}")
        return "\n".join(lines)


def table(model: nn.Module) -> Table:
    """Return what is limited in a model, with the proved norms of this moment.

    Args:
        model: a stabilized model; one with constrained weights, or none, gives the rows that there are.

    Returns:
        A table to print or to read.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if a weight holds NaN or infinity.

    Note:
        In a layer with several matrices, such as an LSTM, the row shows the largest of them. For a method that trains with an
        estimate, the norm is that of evaluation, and the gap that of training.

    Examples:
        >>> from stableopt.nn import stabilize
        >>> found = table(stabilize(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), 3.0))
        >>> [(row.name, round(row.limit, 3)) for row in found.rows], found.proved.upper <= 3.0
        ([('0.weight', 1.732), ('2.weight', 1.732)], True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"table needs a torch.nn.Module, got {type(model).__name__}.")
    record = record_of(model)
    rows = [_row(slot, limit, record) for slot, limit in limited_slots(model)]
    whole = record is not None and record.whole
    limit = None
    if record is not None and whole:
        limit = record.settings.lipschitz
    constants = {} if record is None else dict(record.constants)
    if (
        record is not None and whole and limit is None
    ):  # a radius for each weight of a chain: the product of the limits is a bound
        product = Table(tuple(rows), constants, math.inf).enforced
        limit = None if product is None else product.upper
    return Table(tuple(rows), constants, limit, {} if record is None else _branched(model, record))


def _row(slot: Slot, limit: Limit, record: Record | None) -> Row:
    gap = None if limit.exact else norm_gap(slot.module, slot.name)
    with estimates_evaluated(slot):
        after = _norm_now(slot, limit.norm)
    count = 1 if record is None else record.counts.get(slot.key, 1)
    before = None if record is None else record.before.get(slot.key)
    kind = plain_class(slot.module).__name__
    return Row(slot.key, kind, limit.constraint, limit.norm, before, after, limit.radius, count, gap)


def _branched(model: nn.Module, record: Record) -> dict[str, float]:
    parts = {path: model.get_submodule(path) for path in record.constants}
    branched = {path: part for path, part in parts.items() if branches_of(part)}
    if any(tensor.is_meta for part in branched.values() for tensor in part.parameters()):
        return {}
    return {path: lipschitz(part, record.settings.norm).upper for path, part in branched.items()}


def _norm_now(slot: Slot, norm: str) -> Bound | None:
    weight = slot.value
    if weight.is_meta:
        return None
    try:
        bounds = [slot.geometry.proved(part, slot.matrix_norm(norm)) for part in slot.matrices(weight)]
    except UncertifiableError:
        return None
    return max(bounds, key=lambda bound: bound.upper)


def _cells(row: Row) -> tuple[str, ...]:
    before = "?" if row.before is None else f"{row.before:.4f}"
    after = "?" if row.after is None else f"{row.after.upper:.4f}"
    used = "?" if row.after is None else f"{row.after.upper / row.limit:.0%}".replace("%", " %")
    name = row.name + {0: " (in a branch)", 1: ""}.get(row.count, f" ({row.count} times)")
    return name, row.layer, row.constraint, row.norm, before, after, f"{row.limit:.4f}", used
