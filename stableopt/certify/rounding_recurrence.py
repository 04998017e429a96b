r"""The rounding of a recurrence: what one step adds, carried on by the proved factor of a step.

In the norm :math:`\|\cdot\|_P` in which a step is proved to have the factor a, the error after a step is at most

.. math:: \|e_t\|_P \le a\,\|e_{t-1}\|_P + \|\varepsilon_t\|_P ,

with the rounding :math:`\varepsilon_t` of that one step at the state that is really there. The norms of the matrices inside of a
step, whose product may be above 1 for a step that contracts, are multiplied within one step only.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopt.certify.execute import lower
from stableopt.certify.execute_sequences import recurrence_step
from stableopt.certify.rounding_terms import INFLATE

if TYPE_CHECKING:
    from stableopt.certify.rounding import Analysis, State

__all__ = ["recurrence_error", "state_conversion"]

Node = dict[str, Any]


def state_conversion(node: Node, scaling: Tensor | None, norm: str) -> tuple[float, float]:
    r"""Bound the norm of the state by that of one step of the certificate, and the other way round.

    Args:
        node: a recurrence: its ``state`` names :math:`\|d \odot h\|_2` or :math:`\max_i |h_i| / d_i`.
        scaling: d, None for ones, of the size ``n``.
        norm: that of the certificate.

    Returns:
        The largest quotients :math:`\|h\|_P / \|h\|` and :math:`\|h\| / \|h\|_P`.

    Examples:
        >>> d = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> [round(c, 4) for c in state_conversion({"state": "l2"}, d, "l2")]
        [2.0, 1.0]
    """
    if scaling is None:
        return 1.0, 1.0
    least, most = float(scaling.min()), float(scaling.max())
    length = float(torch.linalg.vector_norm(scaling.double()))
    if node["state"] == "l2":
        return (length if norm == "linf" else most) * INFLATE, INFLATE / least
    return INFLATE / least, (most if norm == "linf" else length) * INFLATE


def recurrence_error(analysis: Analysis, node: Node, start: State) -> State:
    """Return what is known about the states of a recurrence that starts from an exact input.

    Args:
        analysis: the analysis that meets it.
        node: the recurrence with its ``rate`` and ``bound``.
        start: its input, exact, with the reach of the computed one.

    Returns:
        The states; d, e0 and e1 are those that the recurrence itself adds.

    Examples:
        >>> from stableopt.certify.rounding import Analysis, State
        >>> from stableopt.certify.runtime import RUNTIMES
        >>> node = {
        ...     "op": "recurrence",
        ...     "in": [0],
        ...     "weight": "W",
        ...     "input": "U",
        ...     "bias": None,
        ...     "initial": None,
        ...     "step": None,
        ... }
        >>> node |= {
        ...     "outer": None,
        ...     "activation": {"op": "activation", "name": "relu", "bound": 1.0},
        ...     "reverse": False,
        ...     "length": 2,
        ... }
        >>> node |= {"state": "linf", "scaling": None, "rate": 0.5, "push": 1.0, "bound": 1.5}
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> x = torch.ones(1, 2, 1, dtype=torch.float64)
        >>> analysis = Analysis([node], {"W": 0.5 * one, "U": one}, RUNTIMES["float32"], "linf")
        >>> zero = one.new_zeros(1)
        >>> added = recurrence_error(analysis, node, State(x, zero, zero, 0.0, zero, 0.0, zero + torch.inf))
        >>> added.value.tolist(), bool(0 < added.e0 < 1e-5)
        ([[[1.0], [1.5]]], True)
    """
    reach0, reach1 = start.k0, start.k1
    zero, norm, W = torch.zeros_like(start.d), analysis.norm, analysis.tensors[node["weight"]]
    scaling = analysis.tensors[node["scaling"]] if node["scaling"] is not None else W.new_ones(len(W))
    into, out = state_conversion(node, scaling, norm)
    first, later = lower(node | {"length": 1, "reverse": False}), recurrence_step(node)
    found: dict[int, State] = {}
    d, e0, e1, h, powers = zero, zero, 0.0, None, 0.0
    for t in reversed(range(node["length"])) if node["reverse"] else range(node["length"]):
        piece = dataclasses.replace(start, value=start.value[:, t : t + 1])
        end = analysis.settled(_walked(analysis, first, [piece]) if h is None else _walked(analysis, later, [piece, h]))
        d, e0 = ((node["rate"] * old + into * new) * INFLATE for old, new in ((d, end.d), (e0, end.e0)))
        e1 = (node["rate"] * e1 + into * end.e1) * INFLATE
        found[t] = dataclasses.replace(end, d=out * d, e0=out * e0, e1=out * e1)
        powers = (node["rate"] * powers + 1.0) * INFLATE
        gain = min(node["bound"], node["push"] * powers)  # from the input to the states so far
        moved0, moved1 = gain * reach0 + out * (d + e0), gain * reach1 + out * e1
        h = dataclasses.replace(end, d=zero, k0=moved0 * INFLATE, k1=moved1 * INFLATE, e0=zero, e1=0.0)
    return _joined([found[t] for t in range(node["length"])], norm)


def _walked(analysis: Analysis, nodes: list[Node], states: list[State]) -> State:
    return analysis._walk(nodes, states)[-1]  # noqa: SLF001 a part of it


def _joined(steps: list[State], norm: str) -> State:
    """Join the steps: the root of the sum of squares in l2, the largest in the others."""
    total: dict[str, Any] = {}
    for name in ("d", "e0", "e1"):
        parts = torch.stack([torch.as_tensor(getattr(step, name), dtype=torch.float64) for step in steps])
        whole = torch.linalg.vector_norm(parts, dim=0) * INFLATE if norm == "l2" else parts.amax(0)
        total[name] = float(whole) if name == "e1" else whole
    value, cap = torch.cat([step.value for step in steps], 1), torch.stack([step.cap for step in steps]).amin(0)
    low = all(step.low for step in steps)
    return dataclasses.replace(steps[-1], value=value, cap=cap, low=low, pending=None, **total)
