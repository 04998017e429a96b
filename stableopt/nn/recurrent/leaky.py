r"""The leaky cell: part of the state stays, the rest is a contraction of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound, spectral_norm, upper
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.recurrent.bounds import CellBound, cell_rule
from stableopt.nn.recurrent.cell import RecurrentCell, capped, check_memory, cyclic, initial_steps, logit, proof_slack
from stableopt.nn.recurrent.constants import check_finite, from_state, into_state, row_constants
from stableopt.theory import leaky_cell_factor

__all__ = ["LeakyCell"]


class LeakyCell(RecurrentCell):
    r"""Cell that keeps the share :math:`1 - \tau` of its state.

    .. math::
        h^+ = (1 - \tau) \odot h + \tau \odot \varphi(Wh + Ux + b), \qquad \|W\| \le \rho < 1, \qquad
        \frac{1 - r}{1 - \rho} \le \tau_i \le 1 .

    **Proof.** With slopes in [0, 1] the Jacobian is :math:`(1 - \tau)I + \tau DW`, of norm at most
    :math:`1 - \tau(1 - \rho) \le r`. The input adds :math:`\tau\|U\|`, so the gain from input to output sequences is at most
    :math:`\|U\|/(1 - \rho)`.

    Args:
        input_size: number of features of :math:`x`.
        hidden_size: number of units.
        norm: ``"l2"``, with one :math:`\tau` for all units (with one for each the bound fails in this norm), or ``"linf"``, where
            each unit has its own.
        radius: :math:`\rho`, the cap of :math:`\|W\|`, in (0, 1).
        rate: :math:`r`, the cap of the factor of one step; at least :math:`0.1 + 0.9\rho`.
        memory: number of steps over which the leak of the (in linf: slowest) new unit forgets.
        activation: ``"tanh"``, ``"relu"``, ``"leaky_relu"``, ``"softplus"`` or ``"hardtanh"``.
        gain: a limit of the gain in ``norm``, for every value of the parameters; None for none.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1].

    Attributes:
        weight: :math:`W` before its cap, of shape ``(hidden, hidden)``.
        raw_step: the step before its limits, of shape ``(1,)`` or ``(hidden,)``.

    References:
        Jaeger, Lukoševičius, Popovici and Siewert, *Optimization and Applications of Echo State Networks with Leaky-Integrator
        Neurons*, 2007.

    Examples:
        >>> from stableopt.nn import cell_bound
        >>> _ = torch.manual_seed(0)
        >>> cell = LeakyCell(3, 8, rate=0.95)
        >>> cell_bound(cell).state.upper <= 0.95, cell(torch.ones(2, 3)).shape
        (True, torch.Size([2, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        norm: str = "l2",
        radius: float = 0.9,
        rate: float = 0.99,
        memory: int = 16,
        activation: str = "tanh",
        gain: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, activation=activation, gain=gain)
        check_memory(memory, rate)
        if norm not in {"l2", "linf"}:
            raise ValueError(f"norm must be 'l2' or 'linf', got {norm!r}.")
        if not 0.0 < radius < 1.0:
            raise ValueError(f"radius is the cap of the norm of W and must lie in (0, 1), got {radius!r}.")
        if rate < 0.1 + 0.9 * radius:
            raise ValueError(
                f"rate must be at least 0.1 + 0.9 * radius = {0.1 + 0.9 * radius:.6g} so that the step has room, got {rate!r}."
            )
        self.norm, self.radius, self.rate, self.memory = norm, float(radius), float(rate), memory
        self.weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.raw_step = nn.Parameter(torch.empty(1 if norm == "l2" else hidden_size))
        self.reset_parameters()

    @property
    def smallest_step(self) -> float:
        """The floor of the step that keeps the factor below the cap."""
        return (1.0 - self.rate) / (1.0 - self.radius)

    def reset_parameters(self) -> None:
        """Draw new matrices, set the bias to zero and the leak to the memory."""
        super().reset_parameters()
        if self.norm == "linf":
            cyclic(self.weight, 1.0)
        else:
            nn.init.orthogonal_(self.weight)
        floor = self.smallest_step
        with torch.no_grad():
            steps = initial_steps(self.memory, 1.0 - self.radius, len(self.raw_step)).to(self.raw_step)
            self.raw_step.copy_(logit((steps - floor) / (1.0 - floor)))

    def step_size(self) -> Tensor:
        r"""Return :math:`\tau`: 0-d and at least float32 in l2, one number per unit in the dtype of the parameters in linf."""
        raw = wide(self.raw_step)
        room = 4.0 * torch.finfo(raw.dtype).eps + proof_slack(self.hidden_size, self.rate)
        if self.norm == "linf":
            room += 2.0 * torch.finfo(self.raw_step.dtype).eps
        floor = self.smallest_step * (1.0 + room)
        step = floor + (1.0 - room - floor) * raw.sigmoid()
        return step[0] if self.norm == "l2" else step.to(self.raw_step.dtype)

    def prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`U, W, \tau`."""
        U = self.weight_input
        if self.gain is not None:
            limit = self.gain * (1.0 - self.radius) * (1.0 - proof_slack(self.hidden_size, self.rate))
            U = capped(U, limit, self.norm)
        with full_precision(U):
            return U, capped(self.weight, self.radius, self.norm), self.step_size()

    def advance(self, state: Tensor, drive: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the next state."""
        _, W, step = prepared
        return state + step * (self.activate(F.linear(state, W) + drive) - state)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{super().extra_repr()}, norm={self.norm!r}, radius={self.radius}, rate={self.rate}"


@cell_rule.register(LeakyCell)
def _leaky(cell: LeakyCell, norm: str) -> CellBound:
    check_finite(cell)
    U, W, step = cell.prepared()
    if cell.norm == "linf":
        state, inputs, peak = row_constants(W, step, U, norm)
        output = from_state("linf", norm, [1.0] * len(W))
        return CellBound(state, inputs, output, "the maximum norm", peak if norm == "linf" else None)
    tau = float(step)
    factor = leaky_cell_factor(tau, Bound.point(spectral_norm(W).upper))
    inputs = Bound.point(tau) * into_state(U, norm, "l2")
    return CellBound(
        Bound(0.0, upper(factor)),
        Bound(0.0, inputs.upper),
        from_state("l2", norm, [1.0] * len(W)),
        "the Euclidean norm",
    )
