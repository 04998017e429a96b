r"""Deep state spaces under one gain: linear recurrences over time and gradient steps over features, both residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.precision import wide
from stableopt.nn.residual.gradient import GradientBlock
from stableopt.nn.residual.steps import initial_fraction, raw_fraction
from stableopt.nn.rules import lipschitz
from stableopt.nn.statespace.capped import CappedLinear
from stableopt.nn.statespace.diagonal import DiagonalStateSpace
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_bound, uniform_rule

__all__ = ["StateSpaceBlock", "StateSpaceStack"]


class StateSpaceBlock(nn.Module):
    r"""Residual block for sequences with an l2 gain of at most 1: mix over time, then over features.

    .. math::
        u = (1 - a)\,x + a\,S(x), \qquad y_t = u_t - \tau A^\top \sigma(A u_t + b), \qquad a = \operatorname{sigmoid}(r) .

    :math:`S` is a :class:`DiagonalStateSpace` of gain 1, so the convex mix has at most the gain 1 (Krasnoselskii and Mann), and the
    second map is a :class:`~stableopt.nn.GradientBlock`, which never expands a time step. The gain of the block is at most
    the product, 1, for every value of its parameters.

    Args:
        dim: number of features of input and output.
        d_state: number of complex states, in each direction.
        hidden: rows of :math:`A`; None for ``dim``.
        depth: number of blocks in the stack. :math:`a` and the step :math:`\tau` start at the fraction
            :math:`1/\max(2, \text{depth})` of their limits, so that a deep stack does not forget its input at the start.
        activation: of the gradient step, see :class:`~stableopt.nn.GradientBlock`.
        step: :math:`a` and the fraction of the step at the start, in (0, 1); None for the one that fits the depth.
        radius: of the eigenvalues at the start, see :class:`DiagonalStateSpace`.
        phase: of the eigenvalues at the start.
        bidirectional: whether states run in both directions.

    Raises:
        ValueError: if an argument is out of range, or the activation has slopes outside [0, 1]; a GLU has no limited slope at all.

    References:
        Orvieto et al., 2023 (recurrences and channel mixing in turn); Meunier et al., 2022 (the second map).

    Examples:
        >>> from stableopt.nn import lipschitz
        >>> block = StateSpaceBlock(4, 8, depth=6)
        >>> block(torch.randn(2, 50, 4)).shape, lipschitz(block).upper <= 1.0
        (torch.Size([2, 50, 4]), True)
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        *,
        hidden: int | None = None,
        depth: int = 1,
        activation: str = "relu",
        step: float | None = None,
        radius: tuple[float, float] = (0.5, 0.99),
        phase: float = torch.pi,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.time = DiagonalStateSpace(dim, d_state, radius=radius, phase=phase, bidirectional=bidirectional)
        self.raw_weight = raw_fraction(initial_fraction(step, depth))
        self.features = GradientBlock(dim, hidden, depth=depth, activation=activation, step=step)

    def weight(self) -> Tensor:
        """Return the weight :math:`a` of the recurrence, a 0-d tensor, at least float32.

        Examples:
            >>> round(float(StateSpaceBlock(2, 2, depth=4).weight().detach()), 6)
            0.25
        """
        return wide(self.raw_weight)[0].sigmoid()

    def forward(self, input: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return the output sequence; arguments as in :meth:`DiagonalStateSpace.forward`."""
        return self.run(input, state, lengths=lengths)[0]

    def run(
        self,
        input: Tensor,  # noqa: A002
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output sequence and the state after the last valid step.

        Args:
            input: shape ``(..., time, dim)``.
            state: the state before the first step; None for zero.
            lengths: number of valid steps of each sequence.

        Examples:
            >>> StateSpaceBlock(2, 3).run(torch.zeros(1, 5, 2))[1].shape
            torch.Size([1, 6])
        """
        mixed, state = self.time.run(input, state, lengths=lengths)
        return self._finish(input, mixed), state

    def step(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: A002
        """Return the output and the state of one step, for streams.

        Args:
            input: shape ``(..., dim)``.
            state: what the step before returned; None at the start.

        Examples:
            >>> StateSpaceBlock(2, 3).step(torch.zeros(1, 2))[0].shape
            torch.Size([1, 2])
        """
        mixed, state = self.time.step(input, state)
        return self._finish(input, mixed), state

    def _finish(self, input: Tensor, mixed: Tensor) -> Tensor:  # noqa: A002
        return self.features((input + self.weight() * (mixed - input)).to(input.dtype))


class StateSpaceStack(nn.Module):
    r"""A deep sequence model whose l2 gain from input to output sequence cannot exceed a limit.

    .. math:: x_t \mapsto E x_t + e \;\to\; \text{blocks} \;\to\; R\,h_t + c, \qquad
        \|E\|_2 \le G^f, \quad \|R\|_2 \le G^{1-f} .

    The blocks have at most the gain 1 (:class:`StateSpaceBlock`), so the whole has at most :math:`G^f\,G^{1-f} = G`, for every
    value of its parameters, every depth and every length.

    Args:
        d_in: number of features of the input.
        d_model: of the blocks.
        d_state: number of complex states of a block, in each direction.
        layers: number of blocks.
        d_out: number of features of the output.
        gain: :math:`G > 0`.
        front: :math:`f` in [0, 1], the part of the gain that acts before the blocks. What the blocks see should not be much
            smaller than the biases that an optimizer gives them.
        hidden: rows of the gradient step of a block; None for ``d_model``.
        activation: of the blocks.
        step: see :class:`StateSpaceBlock`.
        radius: of the eigenvalues at the start.
        phase: of the eigenvalues at the start.
        bidirectional: whether states run in both directions.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        A readout of the last step (gain 1) or the mean over time (gain :math:`1/\sqrt T`) may follow. With ``lengths`` the steps
        after the last valid one do not act on the valid outputs; they are not set to zero at the output.

    Examples:
        >>> from stableopt.nn import lipschitz
        >>> model = StateSpaceStack(1, 16, 16, layers=6, d_out=3, gain=5.0)
        >>> model(torch.randn(2, 100, 1)).shape, lipschitz(model).upper <= 5.0
        (torch.Size([2, 100, 3]), True)
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        d_state: int,
        layers: int,
        d_out: int,
        *,
        gain: float = 1.0,
        front: float = 0.7,
        hidden: int | None = None,
        activation: str = "relu",
        step: float | None = None,
        radius: tuple[float, float] = (0.5, 0.99),
        phase: float = torch.pi,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_in=d_in, d_model=d_model, d_state=d_state, layers=layers, d_out=d_out)
        check_positive(gain=gain)
        if not 0.0 <= front <= 1.0:
            raise ValueError(f"front is a part of the gain and must lie in [0, 1], got {front!r}.")
        self.gain = float(gain)
        self.encoder = CappedLinear(d_in, d_model, limit=gain**front)
        self.blocks = nn.ModuleList(
            StateSpaceBlock(
                d_model, d_state, hidden=hidden, depth=layers, activation=activation, step=step, radius=radius, phase=phase,
                bidirectional=bidirectional,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.decoder = CappedLinear(d_model, d_out, limit=gain ** (1.0 - front))

    def forward(
        self,
        input: Tensor,  # noqa: A002
        state: Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the output sequence.

        Args:
            input: shape ``(..., time, d_in)``.
            state: one state for each block, as :meth:`run` returns them; None for zero.
            lengths: number of valid steps of each sequence.
        """
        return self.run(input, state, lengths=lengths)[0]

    def run(
        self,
        input: Tensor,  # noqa: A002
        state: Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output sequence and the state of each block after the last valid step.

        Args:
            input: shape ``(..., time, d_in)``.
            state: one state for each block; None for zero.
            lengths: number of valid steps of each sequence.

        Raises:
            ValueError: if the number of states is not that of the blocks.

        Examples:
            >>> y, states = StateSpaceStack(1, 4, 3, layers=2, d_out=1).run(torch.zeros(1, 5, 1))
            >>> len(states)
            2
        """
        x, states = self.encoder(input), []
        for block, before in zip(self._blocks(), self._states(state), strict=True):
            x, after = block.run(x, before, lengths=lengths)
            states.append(after)
        return self.decoder(x), states

    def step(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:  # noqa: A002
        """Return the output of one step and the state of each block, for streams.

        Args:
            input: shape ``(..., d_in)``.
            state: what the step before returned; None at the start.

        Raises:
            ValueError: if the number of states is not that of the blocks.

        Examples:
            >>> model = StateSpaceStack(1, 4, 3, layers=2, d_out=1)
            >>> y, state = model.step(torch.zeros(1, 1))
            >>> y, state = model.step(torch.zeros(1, 1), state)
        """
        x, states = self.encoder(input), []
        for block, before in zip(self._blocks(), self._states(state), strict=True):
            x, after = block.step(x, before)
            states.append(after)
        return self.decoder(x), states

    def _blocks(self) -> list[StateSpaceBlock]:
        return list(self.blocks)  # pyright: ignore[reportReturnType] the list holds nothing else

    def _states(self, state: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"StateSpaceStack needs one state for each of its {len(self.blocks)} blocks, got {len(state)}."
            )
        return [None] * len(self.blocks) if state is None else state


@lipschitz_rule.register(StateSpaceBlock)
def _block(module: StateSpaceBlock, norm: str) -> Bound:
    recurrence, step = lipschitz(module.time, norm).upper, lipschitz(module.features, norm).upper
    with torch.no_grad():
        a = Bound.point(float(module.weight()))  # refuses NaN
    mixed = 1.0 + a * (Bound.point(recurrence) - 1.0)  # (1 - a) + a L
    return Bound(0.0, (Bound.point(mixed.upper) * step).upper)


@lipschitz_rule.register(StateSpaceStack)
def _stack(module: StateSpaceStack, norm: str) -> Bound:
    product = Bound.point(1.0)
    for part in (module.encoder, *module.blocks, module.decoder):
        product = product * lipschitz(part, norm).upper
    return Bound(0.0, product.upper)


@token_rule.register(StateSpaceBlock)
def _block_token(module: StateSpaceBlock) -> Bound:
    return _block(module, TOKEN_MAX)


@token_rule.register(StateSpaceStack)
def _stack_token(module: StateSpaceStack) -> Bound:
    return _stack(module, TOKEN_MAX)


@uniform_rule.register(StateSpaceBlock)
def _uniform_block(module: StateSpaceBlock, norm: str) -> Bound | None:
    return uniform_bound(module.time, norm)  # at least 1, and the gradient step has 1 in the same norms


@uniform_rule.register(StateSpaceStack)
def _uniform_stack(module: StateSpaceStack, norm: str) -> Bound | None:
    product = Bound.point(module.gain)  # that of the ends together; their margins cover the rounding of the two powers
    for block in module.blocks:
        bound = uniform_bound(block, norm)
        if bound is None:
            return None
        product = product * bound.upper
    return Bound(0.0, product.upper)
