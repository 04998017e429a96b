r"""A recurrent cell made of a rotation, a damping and a gradient step: what antisymmetric weights promise, kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, gram_norm, spectral_norm
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.recurrent.bounds import CellBound, cell_rule
from stableopt.nn.recurrent.cell import RecurrentCell, capped, check_memory, proof_slack
from stableopt.nn.recurrent.constants import check_finite, from_state, into_state
from stableopt.nn.residual.steps import initial_fraction, raw_fraction, rounding_slack
from stableopt.nn.weights import Geometry
from stableopt.nn.weights.orthogonal import Cayley

__all__ = ["AntisymmetricCell"]

_SMALLEST = 1e-6
"""Floor of the denominator of the step limit, so that a cell with a zero weight has a finite step."""


class AntisymmetricCell(RecurrentCell):
    r"""Cell that turns its state by the Cayley transform of a skew matrix, damps it, and lets the input in by a gradient step.

    .. math::
        h^+ = \rho\, Q \bigl(h - \tau A^\top\varphi(Ah + Ux + b)\bigr), \qquad
        Q = (I + K)^{-1}(I - K), \quad K = V - V^\top, \qquad \tau \le \frac{2}{\|A\|_2^2}, \quad \rho \le r < 1 .

    **Proof.** The derivative of the bracket is :math:`I - \tau A^\top DA` with :math:`0 \preceq D \preceq I`: symmetric, with
    spectrum in :math:`[1 - \tau\|A\|_2^2, 1]`, hence of norm at most 1. :math:`Q` is orthogonal and :math:`\rho` the factor of
    one step. The input adds at most :math:`\rho\tau\|A\|_2\|U\|_2`.

    **The trap that this cell avoids.** :math:`h + \varepsilon\varphi((K - \gamma I)h + Ux + b)` is known as an antisymmetric
    network because every *frozen* Jacobian has eigenvalues in the left half-plane. But its derivative :math:`D(K - \gamma I)`
    has slopes that move with the input, :math:`DK` is not skew, and two alternating patterns of saturation, each harmless for
    itself, amplify a difference without limit. Here the linear isometry stands outside of the nonlinearity, and the nonlinear
    part has a symmetric derivative.

    Args:
        input_size: number of features of :math:`x`.
        hidden_size: number of units.
        rate: :math:`r`, the cap of the factor of one step, in (0, 1).
        memory: the new cell has the factor :math:`1 - 1/\text{memory}`.
        step: initial step as a fraction of its limit, in (0, 1); None for :math:`1/\max(2, \text{memory})`.
        activation: ``"tanh"``, ``"relu"``, ``"leaky_relu"``, ``"softplus"`` or ``"hardtanh"``.
        gain: a limit of the gain in l2, for every value of the parameters; None for none.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Attributes:
        weight: :math:`A`.
        skew: :math:`V`.
        raw_damping: :math:`\rho = r\operatorname{sigmoid}(\text{raw})`, of shape ``(1,)``.
        raw_step: :math:`\tau` as a fraction of its limit before the sigmoid, of shape ``(1,)``.

    Note:
        A sequence computes :math:`Q` once. Rotations by exactly half a turn are out of reach of the Cayley transform.

    References:
        Chang, Chen, Haber and Chi, *AntisymmetricRNN*, 2019 (the form above, with the frozen argument); Helfrich, Willmott and Ye,
        *Orthogonal Recurrent Neural Networks with Scaled Cayley Transform*, 2018.

    Examples:
        >>> from stableopt.nn import cell_bound
        >>> _ = torch.manual_seed(0)
        >>> cell = AntisymmetricCell(3, 8, rate=0.95)
        >>> cell_bound(cell).state.upper <= 0.95, cell(torch.ones(2, 3)).shape
        (True, torch.Size([2, 8]))
    """

    norm = "l2"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        rate: float = 0.99,
        memory: int = 16,
        step: float | None = None,
        activation: str = "tanh",
        gain: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, activation=activation, gain=gain)
        check_memory(memory, rate)
        self.rate, self.memory = float(rate), memory
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.skew = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.raw_step = raw_fraction(initial_fraction(step, memory))
        self.raw_damping = raw_fraction(min(max(1.0 - 1.0 / memory, 0.1) / rate, 0.9999))
        self.isometry = Cayley(Geometry("linear"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an orthogonal matrix, small rotations and a new input matrix; step and damping stay."""
        super().reset_parameters()
        nn.init.orthogonal_(self.weight)
        nn.init.normal_(self.skew, std=0.5 * self.hidden_size**-0.5)

    def damping(self) -> Tensor:
        r"""Return :math:`\rho`, a 0-d tensor, at least float32."""
        raw = wide(self.raw_damping)
        slack = 8.0 * torch.finfo(raw.dtype).eps + 2.0**-50 * self.hidden_size**2
        return self.rate * (1.0 - slack) * raw[0].sigmoid()

    def step_size(self) -> Tensor:
        r"""Return the step :math:`\tau`, a 0-d tensor, at least float32."""
        return self._step_and_norm()[0]

    def _step_and_norm(self) -> tuple[Tensor, Tensor]:
        weight = wide(self.weight)
        with full_precision(weight):
            U = gram_norm(weight)
            limit = 2.0 / (U * U).clamp_min(_SMALLEST)
            return (1.0 - rounding_slack(weight)) * limit * wide(self.raw_step)[0].sigmoid(), U

    def prepared(self) -> tuple[Tensor, ...]:
        r"""Return :math:`U, A, Q, \tau, \rho`."""
        U, damping = self.weight_input, self.damping()
        step, size = self._step_and_norm()
        if self.gain is not None:
            passed = (damping * step * size).clamp_min(1e-12)  # below, no cap is needed, and its square would underflow
            room = (
                self.gain
                * (1.0 - proof_slack(self.hidden_size, self.rate))
                * (1.0 - 64.0 * torch.finfo(damping.dtype).eps)
            )
            U = capped(U, (room * (1.0 - damping) / passed).clamp_max(torch.finfo(U.dtype).max / 8.0), "l2")
        return U, self.weight, self.isometry(self.skew), step, damping

    def advance(self, state: Tensor, drive: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the next state."""
        _, A, Q, step, damping = prepared
        moved = state - step * F.linear(self.activate(F.linear(state, A) + drive), A.mT)
        return damping * F.linear(moved, Q)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{super().extra_repr()}, rate={self.rate}"


@cell_rule.register(AntisymmetricCell)
def _antisymmetric(cell: AntisymmetricCell, norm: str) -> CellBound:
    check_finite(cell)
    U, A, Q, step, damping = cell.prepared()
    size, turn = Bound.point(spectral_norm(A).upper), Bound.point(spectral_norm(Q).upper)
    kept = Bound.point(float(damping)) * turn
    bracket = abs(1.0 - Bound.point(float(step)) * size**2).join(1.0)
    inputs = kept * (Bound.point(float(step)) * size) * into_state(U, norm, "l2").upper
    return CellBound(
        Bound(0.0, (kept * bracket).upper),
        Bound(0.0, inputs.upper),
        from_state("l2", norm, [1.0] * len(A)),
        "the Euclidean norm",
    )
