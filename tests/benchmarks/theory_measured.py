"""Theory against measured, for each law of T1 to T6: ``python -m tests.benchmarks.theory_measured`` writes docs/theory_measured.md.

Every row runs real operators: torch's layers and derivatives, torch's and our optimizers, our proxes and projections.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import theory_coupled, theory_dissipation, theory_layers, theory_nonsmooth, theory_steps
from tests.benchmarks.theory_rows import FULL, Row, Size

PAGE = Path(__file__).parents[2] / "docs" / "theory_measured.md"

LAWS: list[Callable[[Size], list[Row]]] = [
    *theory_layers.LAWS,
    *theory_nonsmooth.LAWS,
    *theory_steps.LAWS,
    *theory_dissipation.LAWS,
    *theory_coupled.LAWS,
]

PARTS = {
    "T1": "Energies made from a profile",
    "T2": "Feedforward",
    "T3": "Residual blocks",
    "T4": "Gradient methods",
    "T5": "Nonsmooth maps",
    "T6": "Coupled representation–parameter system",
}

TEXT = """# Theory against measured

Each law of the [theory](theory.md) beside what real operators do: layers and derivatives of torch, optimizers of torch and of
this package on losses, proxes and projections of this package. `python -m tests.benchmarks.theory_measured` writes this page;
a test runs the same at a smaller size.

* **search**: the largest ratio of measured to predicted over up to {draws} random draws, or over fewer that each begin an
  adversarial climb of {climb} steps. It must not exceed 1.
* **witness**: a case in which the law is attained: at least 0.95 is asked for. A law without a witness is marked *not tight*:
  no case is known that attains it.
* **beyond**: just past a limit, what was bounded by the first number is the second: it must be larger. No limit is merely
  cautious.

A ratio of 1 means 1 up to the rounding of its operands, which is counted for every row: 4k² half ulps for singular values of
k = 8 rows, for differences of energies that of their terms. The largest excess over 1, in units of it, is {excess:.2f}. Where
a law bounds a decrease from below, the ratio is promised to real decrease.

{count} rows, {broken} of them against the theory.
"""


def measured(size: Size) -> list[Row]:
    """Return the rows of all laws, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        return [row for law in LAWS for row in law(size)]
    finally:
        torch.set_default_dtype(before)


def number(x: float) -> str:
    """Return five digits."""
    return f"{x:.5g}"


def line(row: Row) -> str:
    """Return a line of the table."""
    kind = row.kind if row.tight else f"{row.kind}, not tight"
    ratio = f"{row.ratio:.4f}" if row.kind != "beyond" else f"{row.ratio:.4f} > 1"
    wrong = " **broken**" if row.broken else ""
    law, setting = (text.replace("|", "\\|") for text in (row.law, row.setting))
    return f"| {law} | {setting} | {kind} | {number(row.predicted)} | {number(row.measured)} | {ratio}{wrong} |"


def page(rows: list[Row], size: Size) -> str:
    """Return the page."""
    excess = max((row.ratio - 1) / row.rounding for row in rows if row.kind != "beyond")
    broken = sum(row.broken for row in rows)
    parts = [TEXT.format(draws=size.draws, climb=size.climb, excess=max(excess, 0.0), count=len(rows), broken=broken)]
    for part, title in PARTS.items():
        parts.append(
            f"## {part}: {title}\n\n| law | setting | | predicted | measured | ratio |\n|---|---|---|---|---|---|"
        )
        parts[-1] += "".join(f"\n{line(row)}" for row in rows if row.part.startswith(part))
        parts[-1] += "\n"
    return "\n".join(parts)


def main() -> None:
    """Write the page, and say how long it took."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    rows = measured(FULL)
    PAGE.write_text(page(rows, FULL), encoding="utf-8")
    print(f"{len(rows)} rows in {time.perf_counter() - begin:.0f} s, {sum(r.broken for r in rows)} broken: {PAGE.name}")


if __name__ == "__main__":
    main()
