r"""Margins of a classifier on a ball, with the rounding of each pair of outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.certify.rounding import Analysis, State
from stableopt.certify.rounding_terms import INFLATE, evaluate, gamma, product_terms
from stableopt.certify.runtime import RUNTIMES
from stableopt.nn.heads import margin_constants

__all__ = ["Margins", "margins"]

_REFERENCE = RUNTIMES["float64"].wide


@dataclass(frozen=True)
class Margins:
    r"""Differences of outputs, class i of each sample against every class j, shape ``(batch, classes)`` each.

    On the ball of radius r around x, any execution has :math:`\hat y_i - \hat y_j \ge m_{ij} - e_{ij} - (L_{ij} + e'_{ij}) r`, for
    r up to ``cap``, beyond which a number may overflow.
    """

    logits: Tensor
    best: Tensor
    margins: Tensor
    errors: Tensor
    rates: Tensor
    cap: Tensor

    def radii(self) -> Tensor:
        """Return the largest radii at which every margin is positive, rounded down; 0 where there is none."""
        room = _down(self.margins - _up(self.errors * INFLATE))
        reach = _down(room / self.rates)
        reach = torch.where(room > 0, torch.where(self.rates > 0, reach, math.inf), 0.0)
        reach = reach.scatter(1, self.best[:, None], math.inf).amin(1)
        reach = torch.minimum(reach, _down(self.cap)).clamp_min(0.0)
        alone = self.logits.shape[1] < 2
        return torch.zeros_like(reach) if alone else torch.where(reach.isnan(), 0.0, reach)


def margins(
    analysis: Analysis, x: Tensor, best: Tensor, constants: Tensor | None, lipschitz: float, *, exact: bool
) -> Margins:
    """Analyse the margins of class ``best`` of each sample.

    Args:
        analysis: of the network and its runtime.
        x: inputs, float64.
        best: a class for each.
        constants: proved constants of the differences of outputs, shape ``(classes, classes)``, or None.
        lipschitz: proved constant of the whole.
        exact: whether the weights that run are those for which ``constants`` and ``lipschitz`` are proved.

    Examples:
        >>> from stableopt.certify.rounding import Analysis
        >>> node = {"op": "linear", "in": [0], "weight": "w", "bias": None, "transposed": False, "bound": 1.0}
        >>> analysis = Analysis([node], {"w": torch.eye(2, dtype=torch.float64)}, RUNTIMES["float32"], "l2")
        >>> x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
        >>> r = margins(analysis, x, torch.tensor([0]), None, 1.0, exact=True).radii()
        >>> bool(2**0.5 * (1 - 1e-5) < r[0] <= 2**0.5)
        True
    """
    states = analysis.states(x)
    last: dict[str, Any] = analysis.nodes[-1] if analysis.nodes else {"op": ""}
    end = states[-1]
    pair = 2.0 if analysis.norm == "linf" else math.sqrt(2.0) * INFLATE
    rates = torch.full((len(x), end.value[0].numel()), pair * (lipschitz if exact else end.k1), dtype=torch.float64)
    if exact and constants is not None:
        rates = constants[best]
    difference = _down(end.value.gather(1, best[:, None]) - end.value)
    if last["op"] == "linear" and end.value.ndim == 2:
        errors, growth, slopes = _of_last_layer(analysis, states[last["in"][0]], best)
        rates = rates if exact and constants is not None else torch.minimum(rates, slopes)
    else:
        end = analysis.settled(end)
        errors = (pair * (end.e0 + end.d))[:, None].expand_as(difference)
        growth = torch.full_like(difference, pair * end.e1)
    return Margins(end.value, best, difference, errors * INFLATE, _up(rates + growth * INFLATE), end.cap)


def _of_last_layer(analysis: Analysis, state: State, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bound the errors of pairs of rows: the carried error through their difference, their own rounding row by row."""
    node, runtime = analysis.nodes[-1], analysis.runtime
    state = analysis.operand(analysis.settled(state))
    weight = analysis.tensors[node["weight"]]
    rows = weight.T if node["transposed"] else weight
    pairs = margin_constants(rows, "linf" if analysis.norm == "linf" else "l2")[best]
    sizes = torch.linalg.vector_norm(rows, ord=1 if analysis.norm == "linf" else 2, dim=1) * INFLATE
    value = evaluate(node, analysis.tensors, [state.value])
    count, q = product_terms(node, weight, state.value)
    if node["bias"] is not None:
        count, q = count + 1, q + analysis.tensors[node["bias"]].abs()
    reach0, reach1 = state.reach()
    g, wide = gamma(count + 1, runtime.sums), runtime.wide
    small = (
        wide.tiny
        * (2 * count + 2 + state.value[0].numel() * (state.value.abs().amax(1) + reach0 + 1.0))[:, None]
        * (1.0 + sizes)
    )
    own0 = g * (q + sizes * reach0[:, None]) + small
    own1 = (g + wide.tiny * state.value[0].numel()) * sizes * reach1
    reference = gamma(count + 1, _REFERENCE.unit) * q + _REFERENCE.tiny * (count + 2)
    if runtime.results != wide:  # the stored result
        kind = runtime.results
        own1 = own1 + kind.unit * (sizes * reach1 + own1)
        own0 = own0 + kind.unit * (value.abs() + reference + sizes * reach0[:, None] + own0) + kind.tiny
    both0, both1 = (own + own.gather(1, best[:, None]) for own in (own0 + reference, own1.expand_as(q)))
    errors = pairs * (state.e0 + state.d)[:, None] + both0
    return errors * INFLATE, pairs * state.e1 + both1, pairs * state.k1 * INFLATE


def _down(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))


def _up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))
