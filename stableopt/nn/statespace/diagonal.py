r"""The diagonal state space: a linear recurrence whose gain, not only its eigenvalues, is limited by construction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.positive import bounded_exp
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import raw_fraction
from stableopt.nn.statespace.capped import capped
from stableopt.nn.statespace.gain import LinearSystem, system_gain
from stableopt.nn.statespace.scan import diagonal_scan, diagonal_step
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["DiagonalStateSpace", "decay_guard", "valid_steps"]

_RANGE = 15.0
r"""The rates :math:`-\ln|\lambda|` lie between :math:`e^{-15}` and :math:`e^{15}`, above the guard."""


def decay_guard(dtype: torch.dtype) -> tuple[float, float]:
    r"""Return the smallest rate :math:`-\ln|\lambda|` in a dtype, and by how much the input scale stays below :math:`1-|\lambda|`.

    They are 64 and 16 units of rounding: the modulus of the computed eigenvalue is off by less than 4, its proof by less than 4.

    Examples:
        >>> smallest, margin = decay_guard(torch.float32)
        >>> f"{smallest:.1e} {margin:.1e}"
        '7.6e-06 1.9e-06'
    """
    eps = torch.finfo(dtype).eps
    return 64.0 * eps, 16.0 * eps


class DiagonalStateSpace(nn.Module):
    r"""Linear recurrence with complex diagonal state and a gain that cannot exceed a limit.

    .. math::
        h_t = \lambda \odot h_{t-1} + \gamma \odot \hat B x_t, \qquad
        y_t = G\,\bigl(\sqrt{s}\,\operatorname{Re}(\hat C h_t) + \sqrt{1-s}\;\hat D x_t\bigr),

    .. math::
        \lambda = e^{-a + i\theta}, \quad a > 0, \qquad \gamma = 1 - |\lambda| = 1 - e^{-a}, \qquad
        \|\hat B\|_2 \le 1, \qquad \|[\hat C, \hat D]\|_2 \le 1, \qquad s \in (0, 1).

    All of :math:`a, \theta, \hat B, \hat C, \hat D, s` are learned. For every value of the parameters and every length,

    .. math:: \Bigl(\sum_t \|y_t - y'_t\|_2^2\Bigr)^{1/2} \le G\, \Bigl(\sum_t \|x_t - x'_t\|_2^2\Bigr)^{1/2} .

    **Proof.** The state :math:`i` filters :math:`(\hat Bx)_i` with the impulse response :math:`\gamma_i\lambda_i^k`, whose sum of
    moduli is :math:`\gamma_i/(1-|\lambda_i|) = 1`; by Young's inequality :math:`\|h\| \le \|\hat Bx\| \le \|x\|` in l2 over time
    and features. So :math:`(\sqrt s\,h, \sqrt{1-s}\,x)` is no larger than :math:`x`, and :math:`[\hat C, \hat D]` does not
    expand. The limit is attained for :math:`s \to 1` by a constant input at a real positive eigenvalue.

    An eigenvalue inside the unit circle alone bounds no gain: with the usual scale :math:`\gamma = \sqrt{1-|\lambda|^2}` it is
    :math:`\sqrt{(1+|\lambda|)/(1-|\lambda|)}`, 14 at 0.99, and that scale has an infinite derivative where :math:`|\lambda|` rounds
    to 1.

    Args:
        d_in: number of features of the input.
        d_state: number of complex states, in each direction.
        d_out: number of features of the output; None for ``d_in``.
        gain: :math:`G > 0`, the limit of the l2 gain.
        radius: the range of :math:`|\lambda|` at the start, inside (0, 1).
        phase: :math:`\theta` starts in [0, phase]. Half a turn is enough: outputs are real.
        skip: whether there is the direct path :math:`\hat D`; without it :math:`s = 1`.
        bidirectional: whether as many states run backwards in time; the bound is the same.

    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        raw_decay: :math:`a = a_{\min} + e^{15\tanh(\text{raw}/15)}`, of shape ``(n,)``.
        phase: :math:`\theta`.
        input_weight: :math:`B`, real parts above imaginary parts, of shape ``(2n, d_in)``.
        output_weight: :math:`[\operatorname{Re}C, -\operatorname{Im}C]`, of shape ``(d_out, 2n)``.
        skip_weight: :math:`D`, or None.
        raw_split: :math:`s = \operatorname{sigmoid}(\text{raw})`.

    Note:
        :func:`stableopt.nn.lipschitz` proves the gain for the numbers that ``forward`` computes in its dtype, at most
        :math:`G` in l2. In linf, l1 and token_max (:math:`\max_t\|x_t\|_2`) the gain may be larger, and the proved bound of these
        norms is the one of :mod:`stableopt.nn.statespace.gain`, without a promise. The bound is for equal initial states; an
        initial state adds its own free motion. Half precision is computed in float32: an eigenvalue near 1 needs the digits.
        The slowest state of float32 decays by a factor e in about 130,000 steps.

    References:
        Orvieto et al., *Resurrecting Recurrent Neural Networks for Long Sequences*, 2023 (the linear recurrent unit); Gu et al.,
        *On the Parameterization and Initialization of Diagonal State Space Models*, 2022.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer = DiagonalStateSpace(3, 8, gain=2.0)
        >>> x, y = torch.randn(5, 100, 3), torch.randn(5, 100, 3)
        >>> bool(((layer(x) - layer(y)).norm(dim=(1, 2)) <= 2.0 * (x - y).norm(dim=(1, 2))).all())
        True
        >>> from stableopt.nn import lipschitz
        >>> lipschitz(layer).upper <= 2.0
        True
    """

    def __init__(
        self,
        d_in: int,
        d_state: int,
        d_out: int | None = None,
        *,
        gain: float = 1.0,
        radius: tuple[float, float] = (0.5, 0.99),
        phase: float = math.pi,
        skip: bool = True,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        check_sizes(d_in=d_in, d_state=d_state, d_out=d_out)
        check_positive(gain=gain)
        low, high = radius
        if not 0.0 < low <= high < 1.0:
            raise ValueError(f"radius must be two numbers 0 < low <= high < 1, got {radius!r}.")
        if not 0.0 <= phase <= 2.0 * math.pi:
            raise ValueError(f"phase must lie in [0, 2 pi], got {phase!r}.")
        self.d_in, self.d_state, self.d_out = d_in, d_state, d_out
        self.gain, self.radius, self.largest_phase = float(gain), (float(low), float(high)), float(phase)
        self.bidirectional = bidirectional
        n = 2 * d_state if bidirectional else d_state
        self.raw_decay = nn.Parameter(torch.empty(n))
        self.phase = nn.Parameter(torch.empty(n))
        self.input_weight = nn.Parameter(torch.empty(2 * n, d_in))
        self.output_weight = nn.Parameter(torch.empty(d_out, 2 * n))
        self.skip_weight = nn.Parameter(torch.empty(d_out, d_in)) if skip else None
        self.raw_split = raw_fraction(0.5) if skip else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Draw eigenvalues in the ring, uniform in :math:`|\lambda|^2`, and matrices with orthonormal rows or columns.

        The split stays.
        """
        low, high = self.radius
        with torch.no_grad():
            squared = torch.empty_like(self.raw_decay).uniform_(low * low, high * high)
            self.raw_decay.copy_(_RANGE * torch.atanh((-0.5 * squared.log()).log() / _RANGE))
            self.phase.uniform_(0.0, self.largest_phase)
            nn.init.orthogonal_(self.input_weight)
            if self.skip_weight is None:
                nn.init.orthogonal_(self.output_weight)
            else:
                both = torch.empty(self.d_out, self.output_weight.shape[1] + self.d_in).to(self.output_weight)
                nn.init.orthogonal_(both)
                self.output_weight.copy_(both[:, : -self.d_in])
                self.skip_weight.copy_(both[:, -self.d_in :])

    def eigenvalues(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return the real and imaginary parts of :math:`\lambda` and the input scales :math:`\gamma`, in at least float32.

        Examples:
            >>> real, imag, scale = DiagonalStateSpace(1, 4).eigenvalues()
            >>> bool((torch.hypot(real, imag) + scale <= 1.0).all())
            True
        """
        raw, theta = wide(self.raw_decay), wide(self.phase)
        smallest, margin = decay_guard(raw.dtype)
        decay = smallest + bounded_exp(raw, _RANGE)
        modulus = (-decay).exp()
        return modulus * theta.cos(), modulus * theta.sin(), -torch.expm1(-decay) - margin

    def system(self) -> LinearSystem:
        """Return the numbers that ``forward`` uses, differentiable, in at least float32.

        Examples:
            >>> [tuple(part.shape) for part in DiagonalStateSpace(3, 4, 2).system()[:-1]]
            [(4,), (4,), (8, 3), (2, 8), (2, 3)]
        """
        real, imag, scale = self.eigenvalues()
        scale = torch.cat([scale, scale])[:, None]
        if self.skip_weight is None or self.raw_split is None:
            return LinearSystem(
                real, imag, scale * capped(self.input_weight), capped(self.output_weight, self.gain), None
            )
        raw = wide(self.raw_split)[0]
        p, q = (0.5 * F.logsigmoid(raw)).exp(), (0.5 * F.logsigmoid(-raw)).exp()  # roots without an infinite slope
        both = capped(torch.cat([self.output_weight, self.skip_weight], 1), self.gain)
        output, skip = both.split([self.output_weight.shape[1], self.d_in], 1)
        return LinearSystem(real, imag, p * scale * capped(self.input_weight), output, q * skip, q)

    def forward(self, input: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return the output sequence.

        Args:
            input: shape ``(..., time, d_in)``.
            state: the state before the first step, of shape ``(..., 2 d_state)``; None for zero.
            lengths: number of valid steps of each sequence, of shape ``(...)``; the rest counts as zero, and so is its output.

        Raises:
            ValueError: if the shapes do not fit, or there is a state for states that run backwards.
        """
        return self.run(input, state, lengths=lengths)[0]

    def run(
        self,
        input: Tensor,  # noqa: A002
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output sequence and the state after the last valid step, from which :meth:`step` goes on.

        Args:
            input: shape ``(..., time, d_in)``.
            state: as in ``forward``.
            lengths: as in ``forward``.

        Raises:
            ValueError: as ``forward`` does.

        Examples:
            >>> y, state = DiagonalStateSpace(3, 4).run(torch.randn(2, 7, 3))
            >>> y.shape, state.shape
            (torch.Size([2, 7, 3]), torch.Size([2, 8]))
        """
        self._check(input, state)
        valid = None if lengths is None else valid_steps(lengths, input)
        with full_precision(input):
            x = wide(input)
            x = x if valid is None else x.masked_fill(~valid, 0.0)
            system, batch, time = self.system(), input.shape[:-2], input.shape[-2]
            flat = x.reshape(-1, self.d_in)
            u = (system.input @ flat.mT).view(len(system.input), -1, time)
            before = None if state is None else wide(state).reshape(-1, state.shape[-1]).mT
            h = self._states(system, u, before)
            y = h.reshape(len(h), -1).mT @ system.output.mT
            if system.skip is not None:
                y = torch.addmm(y, flat, system.skip.mT)
            y = y.view(*batch, time, self.d_out)
            y = y if valid is None else y.masked_fill(~valid, 0.0)
            if lengths is None:
                last = h[..., -1]
            else:
                index = (lengths.reshape(1, -1, 1) - 1).clamp_min(0)
                last = h.gather(-1, index.expand(len(h), -1, 1)).squeeze(-1)
                last = torch.where(
                    lengths.reshape(1, -1) > 0, last, torch.zeros_like(last) if before is None else before
                )
            return y.to(input.dtype), last.mT.reshape(*batch, len(h))

    def step(
        self,
        input: Tensor,  # noqa: A002
        state: Tensor | None = None,
        system: LinearSystem | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the state of one step, for streams.

        Args:
            input: shape ``(..., d_in)``.
            state: what the step before returned; None at the start.
            system: what :meth:`system` returned, to compute it once for many steps; None computes it anew.

        Raises:
            ValueError: if the layer is bidirectional or the shapes do not fit.

        Examples:
            >>> layer = DiagonalStateSpace(3, 4)
            >>> y, state = layer.step(torch.randn(2, 3))
            >>> y, state = layer.step(torch.randn(2, 3), state)
        """
        if self.bidirectional:
            raise ValueError("a bidirectional DiagonalStateSpace needs the whole sequence; it has no step.")
        if input.shape[-1] != self.d_in:
            raise ValueError(f"DiagonalStateSpace was built for {self.d_in} features, got {tuple(input.shape)}.")
        with full_precision(input):
            system = self.system() if system is None else system
            x = wide(input)
            h = x @ system.input.mT
            if state is not None:
                h = h + diagonal_step(system.real, system.imag, wide(state))
            y = h @ system.output.mT
            if system.skip is not None:
                y = y + x @ system.skip.mT
            return y.to(input.dtype), h

    def _check(self, input: Tensor, state: Tensor | None) -> None:  # noqa: A002
        if input.ndim < 2 or input.shape[-1] != self.d_in or not input.shape[-2]:
            raise ValueError(
                f"DiagonalStateSpace needs an input of shape (..., time, {self.d_in}) with time >= 1, got {tuple(input.shape)}."
            )
        if state is None:
            return
        if self.bidirectional:
            raise ValueError("a bidirectional DiagonalStateSpace starts at both ends; it takes no state.")
        if state.shape != (*input.shape[:-2], 2 * self.d_state):
            raise ValueError(
                f"the state must have the shape {(*input.shape[:-2], 2 * self.d_state)}, got {tuple(state.shape)}."
            )

    def _states(self, system: LinearSystem, u: Tensor, before: Tensor | None) -> Tensor:
        if not self.bidirectional:
            return diagonal_scan(system.real, system.imag, u, before)
        return _flipped_half(diagonal_scan(system.real, system.imag, _flipped_half(u), before))

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return (
            f"{self.d_in}, {self.d_state}, {self.d_out}, gain={self.gain}, skip={self.skip_weight is not None}, "
            f"bidirectional={self.bidirectional}"
        )


def valid_steps(lengths: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return a mask, True for the valid steps of each sequence, of shape ``(..., time, 1)``.

    Args:
        lengths: of shape ``(...)``.
        input: sequences of shape ``(..., time, features)``.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> valid_steps(torch.tensor([1, 2]), torch.zeros(2, 2, 3)).squeeze(-1).tolist()
        [[True, False], [True, True]]
    """
    if lengths.shape != input.shape[:-2]:
        raise ValueError(
            f"lengths must hold one number per sequence, shape {tuple(input.shape[:-2])}, got {tuple(lengths.shape)}."
        )
    steps = torch.arange(input.shape[-2], device=input.device)
    return (steps < lengths.unsqueeze(-1)).unsqueeze(-1)


def _flipped_half(u: Tensor) -> Tensor:
    """Reverse the time of the second half of the states; of each half the real parts come before the imaginary ones."""
    parts = u.view(2, 2, -1, *u.shape[1:])
    return torch.stack([parts[:, 0], parts[:, 1].flip(-1)], 1).view_as(u)


@lipschitz_rule.register(DiagonalStateSpace)
def _state_space(module: DiagonalStateSpace, norm: str) -> Bound:
    with torch.no_grad():
        return system_gain(module.system(), norm)


@token_rule.register(DiagonalStateSpace)
def _token(module: DiagonalStateSpace) -> Bound:
    return _state_space(module, TOKEN_MAX)


@uniform_rule.register(DiagonalStateSpace)
def _uniform(module: DiagonalStateSpace, norm: str) -> Bound | None:
    r"""Return :math:`G`, in token_max :math:`G\sqrt{\min(2n, d)}`: there a sum over states takes the place of :math:`\|S\|_2`."""
    if norm == TOKEN_MAX:
        rank = min(module.input_weight.shape)
        return Bound(0.0, (Bound.point(module.gain) * Bound.point(float(rank)).sqrt()).upper)
    return Bound(0.0, module.gain) if norm == "l2" else None
