r"""The plain recurrent cell, contracting in a diagonal metric that is learned with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.recurrent.bounds import CellBound, cell_rule
from stableopt.nn.recurrent.cell import RecurrentCell, capped, check_memory, proof_slack
from stableopt.nn.recurrent.constants import check_finite, from_state, into_state, weighted_norm

__all__ = ["DiagonalMetricCell"]

_STEPS = 10
"""Of the Gram iteration: with 64 units the norm is overestimated by 0.2 %; a long memory needs a norm close to its cap."""

_SPREAD = 2.0
"""The scales lie within e to plus and minus this."""


class DiagonalMetricCell(RecurrentCell):
    r"""The cell of :class:`torch.nn.RNN`, contracting in the norm :math:`\|Dh\|_2` with a diagonal :math:`D > 0` that is learned.

    .. math:: h^+ = \varphi(Wh + Ux + b), \qquad \|DWD^{-1}\|_2 \le r < 1 .

    **Proof.** With slopes in a diagonal :math:`0 \preceq S \preceq I`,
    :math:`\|D\,SW\,v\|_2 = \|S\,DWD^{-1}\,Dv\|_2 \le r\|Dv\|_2`, because diagonal matrices commute. A metric with a full matrix
    does not commute with :math:`S` and proves nothing, and neither does a spectral radius below 1: with
    :math:`W = \begin{pmatrix} 1.5 & -2 \\ 1.5 & -1.5 \end{pmatrix}` (spectral radius 0.87) and ReLU a fixed point repels by 1.5
    per step.

    Args:
        input_size: number of features of :math:`x`.
        hidden_size: number of units.
        rate: :math:`r`, the cap of the factor of one step, in (0, 1).
        memory: the new cell has the factor :math:`1 - 1/\text{memory}`.
        activation: ``"tanh"``, ``"relu"``, ``"leaky_relu"``, ``"softplus"`` or ``"hardtanh"``.
        gain: a limit of the gain in l2, for every value of the parameters; None for none. The input matrix then shrinks as the
            memory grows.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Attributes:
        weight: :math:`V`, with :math:`W = D^{-1}V\min(1, r/\|V\|_2)D`.
        raw_scaling: the logarithms of :math:`D` before they are bounded, :math:`d_i \in [e^{-2}, e^2]`.

    References:
        Miller and Hardt, *Stable Recurrent Models*, 2019; Kozachkov, Ennis and Slotine, *RNNs of RNNs*, 2022 (diagonal metrics).

    Examples:
        >>> from stableopt.nn import cell_bound
        >>> _ = torch.manual_seed(0)
        >>> cell = DiagonalMetricCell(3, 8, rate=0.95)
        >>> bound = cell_bound(cell)
        >>> bound.state.upper <= 0.95, bound.metric
        (True, 'a diagonal Euclidean norm')
    """

    norm = "l2"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rate: float = 0.99,
        memory: int = 16,
        activation: str = "tanh",
        gain: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, activation=activation, gain=gain)
        check_memory(memory, rate)
        self.rate, self.memory = float(rate), memory
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.raw_scaling = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an orthogonal matrix times the initial factor and a new input matrix; the metric becomes the plain one."""
        super().reset_parameters()
        nn.init.orthogonal_(self.weight, gain=max(1.0 - 1.0 / self.memory, 0.1))
        nn.init.zeros_(self.raw_scaling)

    def scaling(self) -> Tensor:
        """Return the diagonal of :math:`D`, at least float32."""
        return bounded_exp(wide(self.raw_scaling), _SPREAD)

    def prepared(self) -> tuple[Tensor, Tensor]:
        """Return :math:`U, W`."""
        d, U = self.scaling(), self.weight_input
        with full_precision(d):

            def in_metric(W: Tensor) -> tuple[Tensor, float]:
                return (d[:, None] * W / d)[None], 1.0

            inner = wide(self.weight) * (d / d[:, None])
            W = capped(inner, self.rate, "l2", steps=_STEPS, dtype=U.dtype, folded=in_metric)
            if self.gain is not None:
                factor = gram_norm(wide(self.weight), _STEPS).clamp_max(self.rate)
                limit = self.gain * (1.0 - factor) * d.amin() * (1.0 - proof_slack(len(d), self.rate))
                U = capped(U, limit, "l2", folded=lambda U: ((d[:, None] * U)[None], 1.0))
            return U, W

    def advance(self, state: Tensor, drive: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the next state."""
        return self.activate(F.linear(state, prepared[1]) + drive)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{super().extra_repr()}, rate={self.rate}"


@cell_rule.register(DiagonalMetricCell)
def _diagonal_metric(cell: DiagonalMetricCell, norm: str) -> CellBound:
    check_finite(cell)
    U, W = cell.prepared()
    d = cell.scaling().double().cpu()
    inverse = [(1.0 / Bound.point(scale)).upper for scale in d.tolist()]
    return CellBound(
        weighted_norm(W, d), into_state(U, norm, "l2", d), from_state("l2", norm, inverse), "a diagonal Euclidean norm"
    )
