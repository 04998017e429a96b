r"""A recurrent cell that contracts in the maximum norm, unit by unit, whatever its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.nn.infinity_parametrization import log_norm_bounded
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.recurrent.bounds import CellBound, cell_rule
from stableopt.nn.recurrent.cell import RecurrentCell, capped, check_memory, cyclic, initial_steps, logit, proof_slack
from stableopt.nn.recurrent.constants import check_finite, from_state, row_constants

__all__ = ["ContractingCell"]


class ContractingCell(RecurrentCell):
    r"""Cell with one step per unit, contracting in the maximum norm by the law of the logarithmic norm.

    .. math::
        h^+ = h + \alpha \odot \bigl(\varphi(Ah + Ux + b) - h\bigr), \qquad
        \mu_\infty(A) \le g < 1, \qquad
        \frac{1 - r}{1 - \max(g, 0)} \le \alpha_i \le \frac{1}{1 - \min(a_{ii}, 0)} .

    **Proof.** The row :math:`i` of the Jacobian with slope :math:`d \in [0, 1]` has the absolute sum
    :math:`|1 - \alpha_i + \alpha_i d\,a_{ii}| + \alpha_i d \sum_{j\ne i}|a_{ij}|`. The step keeps the first term positive, so it is
    :math:`1 - \alpha_i + \alpha_i d\,\mu_i` with the row's part :math:`\mu_i \le g` of the logarithmic norm, at most
    :math:`1 - \alpha_i(1 - \max(g, 0)) \le r`. An input adds :math:`\alpha_i\|u_i\|_1` to the row, so in the maximum norm the gain
    from input to output sequences is at most :math:`\|U\|_\infty/(1 - \max(g, 0))`, whatever the steps.

    :math:`A` is made from a free matrix (:func:`stableopt.nn.infinity_parametrization.log_norm_bounded`), so no spectral norm is
    computed; its norms may be far above 1.

    Args:
        input_size: number of features of :math:`x`.
        hidden_size: number of units.
        log_norm: :math:`g`, the limit of :math:`\mu_\infty(A)`. Towards 1 units can hold a state for long, and the gain grows.
        rate: :math:`r`, the cap of the factor of one step; at least :math:`0.1 + 0.9\max(g, 0)`.
        memory: number of steps over which the slowest new unit forgets; the others have less, down to 2.
        activation: ``"tanh"``, ``"relu"``, ``"leaky_relu"``, ``"softplus"`` or ``"hardtanh"``.
        weighted: whether to learn weights of the norm :math:`\max_i |h_i|/w_i`, :math:`w_i \in [e^{-2}, e^2]`.
        gain: a limit of the gain in linf, for every value of the parameters; None for none.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Attributes:
        weight: the free matrix, of shape ``(hidden, hidden)``.
        raw_step: :math:`t` with :math:`\alpha = \alpha_{\min} + (\alpha_{\max} - \alpha_{\min})\operatorname{sigmoid}(t)`.
        raw_scaling: the logarithms of the weights before they are bounded, or None.

    Note:
        In l2 and l1 the bound goes through the maximum norm and pays :math:`\sqrt n` and :math:`n` at the output. To keep the limit
        of the steps above their floor, rows of :math:`A` are scaled down so that :math:`1 - a_{ii} \le \alpha_{\min}^{-3/4}`.

    References:
        Davydov, Jafarpour and Bullo, *Non-Euclidean Contraction Theory for Robust Nonlinear Stability*, 2022; Jafarpour, Davydov,
        Proskurnikov and Bullo, *Robust Implicit Networks via Non-Euclidean Contractions*, 2021.

    Examples:
        >>> from stableopt.nn import cell_bound
        >>> _ = torch.manual_seed(0)
        >>> cell = ContractingCell(3, 8, rate=0.95)
        >>> bound = cell_bound(cell, "linf")
        >>> bound.state.upper <= 0.95, cell(torch.ones(2, 3)).shape
        (True, torch.Size([2, 8]))
    """

    norm = "linf"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        log_norm: float = 0.9,
        rate: float = 0.99,
        memory: int = 16,
        activation: str = "tanh",
        weighted: bool = False,
        gain: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, activation=activation, gain=gain)
        check_memory(memory, rate)
        if not log_norm < 1.0 or log_norm < -10.0:
            raise ValueError(
                f"log_norm is the limit of the logarithmic norm and must lie in [-10, 1), got {log_norm!r}."
            )
        if rate < 0.1 + 0.9 * max(log_norm, 0.0):
            raise ValueError(
                f"rate must be at least 0.1 + 0.9 * max(log_norm, 0) = {0.1 + 0.9 * max(log_norm, 0.0):.6g} so that the steps have "
                f"room, got {rate!r}."
            )
        self.log_norm, self.rate, self.memory = float(log_norm), float(rate), memory
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.raw_step = nn.Parameter(torch.empty(hidden_size))
        self.raw_scaling = nn.Parameter(torch.zeros(hidden_size)) if weighted else None
        self.reset_parameters()

    @property
    def smallest_step(self) -> float:
        """The floor of the steps that keeps the factor below the cap."""
        return (1.0 - self.rate) / (1.0 - max(self.log_norm, 0.0))

    def reset_parameters(self) -> None:
        """Draw new matrices, set the bias to zero and the steps to times from ``memory`` down to 2."""
        super().reset_parameters()
        n = self.hidden_size
        with torch.no_grad():
            cyclic(self.weight, max(self.log_norm, 0.5))
            self.weight.diagonal().fill_(-3.0)
            if self.raw_scaling is not None:
                self.raw_scaling.zero_()
            largest = self._largest_steps(self.matrix())
            steps = initial_steps(self.memory, 1.0 - max(self.log_norm, 0.0), n).to(largest)
            floor = self.smallest_step
            self.raw_step.copy_(logit((steps - floor) / (largest - floor)))

    def scaling(self) -> Tensor | None:
        """Return the weights :math:`w` of the norm, at least float32; None for ones."""
        return None if self.raw_scaling is None else bounded_exp(wide(self.raw_scaling), 2.0)

    def matrix(self) -> Tensor:
        """Return :math:`A`, as it is used."""
        total = self.log_norm - 1.0 + self.smallest_step**-0.75
        return log_norm_bounded(self.weight, self.log_norm, scaling=self.scaling(), total=total)

    def _largest_steps(self, A: Tensor) -> Tensor:
        return 1.0 / (1.0 - wide(A).diagonal().clamp_max(0.0))

    def step_sizes(self, A: Tensor) -> Tensor:
        r"""Return :math:`\alpha` as it is used, in the dtype of the parameters.

        Args:
            A: what :meth:`matrix` returns.
        """
        eps, stored = torch.finfo(wide(A).dtype).eps, torch.finfo(A.dtype).eps
        room = 2.0 * stored + 8.0 * eps + proof_slack(len(A), self.rate)
        floor = self.smallest_step * (1.0 + room)
        largest = (1.0 - room) * self._largest_steps(A)
        return (floor + (largest - floor).clamp_min(0.0) * wide(self.raw_step).sigmoid()).to(A.dtype)

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`U, A, \alpha`."""
        A, U = self.matrix(), self.weight_input
        with full_precision(A):
            if self.gain is not None:
                w = self.scaling()
                share = 1.0 if w is None else (w / w.amax())[:, None]
                margin = (1.0 - max(self.log_norm, 0.0)) * (1.0 - proof_slack(len(A), self.rate))
                U = capped(U, self.gain * margin * share, "linf")
            return U, A, self.step_sizes(A)

    def advance(self, state: Tensor, drive: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the next state."""
        _, A, step = prepared
        return state + step * (self.activate(F.linear(state, A) + drive) - state)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        weighted = self.raw_scaling is not None
        return f"{super().extra_repr()}, log_norm={self.log_norm}, rate={self.rate}, weighted={weighted}"


@cell_rule.register(ContractingCell)
def _contracting(cell: ContractingCell, norm: str) -> CellBound:
    check_finite(cell)
    U, A, step = cell.prepared()
    w = cell.scaling()
    state, inputs, peak = row_constants(A, step, U, norm, w)
    output = from_state("linf", norm, [1.0] * len(A) if w is None else w.double().tolist())
    metric = "the maximum norm" if w is None else "a weighted maximum norm"
    return CellBound(state, inputs, output, metric, peak if norm == "linf" else None)
