r"""The layer that runs a cell over time, and what reads one vector off a sequence of states."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.arguments import check_sizes
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.recurrent.bounds import FEATURE_NORMS, cell_bound, sequence_gain
from stableopt.nn.recurrent.cell import RecurrentCell
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["LastStep", "MeanOverTime", "Recurrence"]


class Recurrence(nn.Module):
    r"""Run a cell over time: :math:`h_t = F(h_{t-1}, x_t)`, and return :math:`h_1, \dots, h_T`.

    For a cell with the factor :math:`a < 1` per step and the input constant :math:`b`, the map from the input sequence to the
    sequence of states has, from a fixed initial state, at most the constant :math:`b/(1-a)` in l2, linf, l1 and in the maximum over
    time of the Euclidean norms, for every length (:mod:`stableopt.nn.recurrent.bounds`). :func:`stableopt.nn.lipschitz` counts it.

    Args:
        cell: a :class:`stableopt.nn.ContractingCell` or another cell of this package, or any module with an attribute
            ``hidden_size`` that maps an input and a state to the next state, as :class:`torch.nn.GRUCell` does.
        batch_first: whether sequences have the shape ``(batch, steps, features)``; with False ``(steps, batch, features)``. True by
            default, unlike torch: all rules of this package take the first dimension for the batch. Without a batch it is
            ``(steps, features)`` in both cases.
        reverse: whether to run from the last step to the first. For both directions:
            ``Concat(Recurrence(a), Recurrence(b, reverse=True), dim=-1)``.
        return_state: whether to return a pair, the states and the last of them. False by default, so that it stands in a
            :class:`torch.nn.Sequential`.
        learn_initial: whether the initial state is a parameter (``initial``) instead of zeros.
        length: the largest number of steps, which ``forward`` then enforces; the bound uses it. None for any.

    Raises:
        TypeError: if the cell is no module, or has no ``hidden_size``.
        ValueError: if the length is no positive integer; in ``forward``, if a shape does not fit or the sequence is too long.

    Note:
        The input map is applied to all steps at once; the states come one after the other, in a loop that compilers and exporters
        unroll, so each length is compiled for itself. A step that is masked out has a state of zeros in the output and cannot
        raise the gain: the rule holds for padded and packed sequences, too. A ``state`` that is handed to ``forward`` must be one
        from which the constants of the cell hold: any for the cells of this package, one within
        :attr:`stableopt.nn.CellBound.initial` for torch's gated cells. Wrap the whole Recurrence with ``fully_shard``, not
        its cell.

    Examples:
        >>> from stableopt.nn import LeakyCell, lipschitz
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(Recurrence(LeakyCell(3, 8, gain=1.0)), LastStep(), nn.Linear(8, 2))
        >>> model(torch.ones(4, 20, 3)).shape
        torch.Size([4, 2])
        >>> lipschitz(model[0]).upper <= 1.0
        True
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        batch_first: bool = True,
        reverse: bool = False,
        return_state: bool = False,
        learn_initial: bool = False,
        length: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module) or isinstance(cell, nn.LSTMCell):
            raise TypeError(
                f"Recurrence needs a cell with one state tensor, a torch.nn.Module, got {type(cell).__name__}."
            )
        if not isinstance(getattr(cell, "hidden_size", None), int):
            raise TypeError(
                f"the cell of a Recurrence must have an integer attribute hidden_size; {type(cell).__name__} has none."
            )
        if length is not None:
            check_sizes(length=length)
        self.cell = cell
        self.batch_first, self.reverse, self.return_state, self.length = batch_first, reverse, return_state, length
        like = next(cell.parameters(), torch.empty(0))
        self.initial = (
            nn.Parameter(torch.zeros(cast("int", cell.hidden_size), dtype=like.dtype, device=like.device))
            if learn_initial
            else None
        )

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002 the name torch uses
        state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor | PackedSequence | tuple[Tensor | PackedSequence, Tensor]:
        """Return the states of all steps, and with ``return_state`` the last one beside them.

        Args:
            input: the sequences, padded or packed (:func:`torch.nn.utils.rnn.pack_padded_sequence`).
            state: the initial state, of shape ``(batch, hidden)`` or ``(hidden,)``; None for zeros or the learned one.
            lengths: integers of shape ``(batch,)``: how many first steps of each padded sequence are real. The others do not
                change the state, and their states are zeros in the output, as torch pads them.

        Returns:
            The states, shaped as the input; packed if the input is. With ``return_state`` also the state after the last real step
            (in the direction of the run), of the shape of an initial state.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("a packed sequence has its lengths in itself; leave lengths=None.")
            outputs, last = self._packed(input, state)
            return (outputs, last) if self.return_state else outputs
        if input.ndim not in {2, 3}:
            raise ValueError(
                f"Recurrence needs an input of shape (batch, steps, features) or (steps, features), got {tuple(input.shape)}."
            )
        time = 0 if input.ndim == 2 or not self.batch_first else 1
        self._check_length(input.shape[time])
        outputs, last = self._run(input, state, lengths, time)
        return (outputs, last) if self.return_state else outputs

    def _run(self, input: Tensor, state: Tensor | None, lengths: Tensor | None, time: int) -> tuple[Tensor, Tensor]:  # noqa: A002
        batch, real = input.shape[:time] + input.shape[time + 1 : -1], None
        if lengths is not None:
            if input.ndim != 3 or lengths.shape != batch:
                raise ValueError(
                    f"lengths must have the shape of the batch, {tuple(batch)}, got {tuple(lengths.shape)}."
                )
            steps = torch.arange(input.shape[time], device=input.device).unsqueeze(1 - time)
            real = lengths.to(input.device).unsqueeze(time) > steps
            input = input.masked_fill(~real[..., None], 0.0)  # noqa: A001 what pads may be NaN, which 0 times NaN would keep
        prepared, drive = self._driven(input)
        start = self._start(state, drive, batch)
        h, outputs, pieces = start, [], list(enumerate(drive.unbind(time)))
        for t, piece in reversed(pieces) if self.reverse else pieces:
            following = self._step(h, piece, prepared)
            if real is None:
                h = following
                outputs.append(h)
            else:
                now = real.select(time, t)[:, None]
                h = torch.where(now, following, h)
                outputs.append(torch.where(now, following, torch.zeros_like(following)))
        if not outputs:
            return start.new_zeros((*start.shape[:time], 0, *start.shape[time:])), start
        return torch.stack(outputs[::-1] if self.reverse else outputs, time), h

    def _packed(self, packed: PackedSequence, state: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """Run the first ``batch_sizes[t]`` sequences at step t; they are sorted, the longest first."""
        sizes: list[int] = packed.batch_sizes.tolist()
        self._check_length(len(sizes))
        prepared, drive = self._driven(packed.data)
        start = self._start(state, drive, torch.Size([sizes[0]]))
        if packed.sorted_indices is not None and state is not None:
            start = start[packed.sorted_indices]
        h, outputs, finished = start[: sizes[-1]] if self.reverse else start, [], []
        pieces = list(zip(sizes, drive.split(sizes), strict=True))
        for size, piece in reversed(pieces) if self.reverse else pieces:
            if self.reverse:
                h = torch.cat([h, start[len(h) : size]])
            elif size < len(h):
                finished.append(h[size:])
            h = self._step(h[:size], piece, prepared)
            outputs.append(h)
        last = torch.cat([h, *reversed(finished)])
        if packed.unsorted_indices is not None:
            last = last[packed.unsorted_indices]
        data = torch.cat(outputs[::-1] if self.reverse else outputs)
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), last

    def _driven(self, input: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:  # noqa: A002
        if not isinstance(self.cell, RecurrentCell):
            return (), input
        prepared = self.cell.prepared()
        return prepared, self.cell.drive(input, prepared)

    def _step(self, h: Tensor, drive: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        return self.cell.advance(h, drive, prepared) if isinstance(self.cell, RecurrentCell) else self.cell(drive, h)

    def _start(self, state: Tensor | None, drive: Tensor, batch: torch.Size | tuple[int, ...]) -> Tensor:
        shape = (*batch, cast("int", self.cell.hidden_size))
        if state is None:
            return drive.new_zeros(shape) if self.initial is None else self.initial.expand(shape)
        if state.shape not in {torch.Size(shape), torch.Size(shape[-1:])}:
            raise ValueError(
                f"the initial state must have the shape {shape} or {shape[-1:]}, got {tuple(state.shape)}."
            )
        return state.expand(shape)

    def _check_length(self, steps: int) -> None:
        if self.length is not None and steps > self.length:
            raise ValueError(f"this Recurrence is declared for at most length={self.length} steps, got {steps}.")

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        flags = ("batch_first", "reverse", "return_state")
        return ", ".join(f"{name}={getattr(self, name)}" for name in flags) + f", length={self.length}"


class LastStep(nn.Module):
    """Return the last step of a sequence; its constant is 1 in every norm.

    Args:
        batch_first: whether the steps are the second dimension; else the first.

    Examples:
        >>> LastStep()(torch.tensor([[[1.0], [2.0], [3.0]]])).tolist()
        [[3.0]]
        >>> LastStep()(torch.tensor([[[1.0], [2.0], [3.0]]]), lengths=torch.tensor([2])).tolist()
        [[2.0]]
    """

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:  # noqa: A002 the name torch uses
        """Return one step of each sequence.

        Args:
            input: of shape ``(batch, steps, features)``, or ``(steps, batch, features)``, or without a batch.
            lengths: integers of shape ``(batch,)``: which step is the last; None for the last of all. A sequence without a step
                gives its first one, which pads it.
        """
        time = _time(input, self.batch_first, "LastStep")
        if lengths is None:
            return input.select(time, -1)
        index = (lengths - 1).clamp_min(0).to(input.device).reshape((-1, 1, 1) if time else (1, -1, 1))
        return input.take_along_dim(index, time).squeeze(time)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"batch_first={self.batch_first}"


class MeanOverTime(nn.Module):
    r"""Average a sequence over its steps.

    .. math:: x \mapsto \frac1T \sum_{t \le T} x_t

    The constant is :math:`T^{-1/2}` in l2, 1 in linf and in ``token_max``, and :math:`1/T` in l1, with the smallest :math:`T`
    that is declared.

    Args:
        shortest: the least number of steps, which ``forward`` enforces where it averages over all steps; for the constant.
        batch_first: whether the steps are the second dimension; else the first.

    Raises:
        ValueError: if ``shortest`` is no positive integer; in ``forward``, if there are fewer steps.

    Examples:
        >>> from stableopt.nn import lipschitz
        >>> MeanOverTime()(torch.tensor([[[1.0], [3.0]]])).tolist(), lipschitz(MeanOverTime(16)).upper
        ([[2.0]], 0.25)
    """

    def __init__(self, shortest: int = 1, *, batch_first: bool = True) -> None:
        super().__init__()
        check_sizes(shortest=shortest)
        self.shortest, self.batch_first = shortest, batch_first

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:  # noqa: A002 the name torch uses
        """Return the mean over the steps.

        Args:
            input: of shape ``(batch, steps, features)``, or ``(steps, batch, features)``, or without a batch.
            lengths: integers of shape ``(batch,)``: over how many first steps to average; None for all. A sequence that is
                shorter than ``shortest`` is divided by ``shortest``.
        """
        time = _time(input, self.batch_first, "MeanOverTime")
        steps = input.shape[time]
        if steps < self.shortest:
            raise ValueError(f"this MeanOverTime is declared for at least {self.shortest} steps, got {steps}.")
        if lengths is None:
            return input.mean(time)
        shape = (-1, 1, 1) if time else (1, -1, 1)
        counts = lengths.to(input.device).reshape(shape)
        index = torch.arange(steps, device=input.device).reshape((1, -1, 1) if time else (-1, 1, 1))
        total = torch.where(index < counts, input, torch.zeros_like(input)).sum(time)
        return total / counts.clamp_min(self.shortest).squeeze(time).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"shortest={self.shortest}, batch_first={self.batch_first}"


def _time(input: Tensor, batch_first: bool, name: str) -> int:  # noqa: A002
    if input.ndim not in {2, 3}:
        raise ValueError(f"{name} needs shape (batch, steps, features) or (steps, features), got {tuple(input.shape)}.")
    if not input.shape[time := 1 if input.ndim == 3 and batch_first else 0]:
        raise ValueError(f"{name} needs at least one step, got shape {tuple(input.shape)}.")
    return time


@lipschitz_rule.register(Recurrence)
def _recurrence(module: Recurrence, norm: str) -> Bound:
    if module.return_state:
        raise UncertifiableError(
            "a Recurrence with return_state=True returns a pair, which has no norm here; build it with return_state=False and take "
            "the last state by LastStep()."
        )
    if module.initial is not None:
        largest, within = float(module.initial.detach().abs().amax()), cell_bound(module.cell, norm).initial
        if not largest <= within:
            raise UncertifiableError(
                f"the learned initial state of a Recurrence has entries up to {largest:.6g}, and the bound of its "
                f"{type(module.cell).__name__} is known for states up to {within:.6g}, where runs from zero stay. Build it with "
                "learn_initial=False, or use a cell that contracts everywhere."
            )
    return sequence_gain(module.cell, norm, module.length)


@token_rule.register(Recurrence)
def _recurrence_of_tokens(module: Recurrence) -> Bound:
    return _recurrence(module, TOKEN_MAX)


@uniform_rule.register(Recurrence)
def _uniform(module: Recurrence, norm: str) -> Bound | None:
    cell = module.cell
    if (
        not isinstance(cell, RecurrentCell)
        or cell.gain is None
        or cell.norm != FEATURE_NORMS[norm]
        or module.return_state
    ):
        return None
    return Bound(0.0, cell.gain)


@lipschitz_rule.register(LastStep)
def _last_step(module: LastStep, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    return Bound.point(1.0)


@token_rule.register(LastStep)
def _last_token(module: LastStep) -> Bound:
    return _last_step(module, TOKEN_MAX)


@lipschitz_rule.register(MeanOverTime)
def _mean(module: MeanOverTime, norm: str) -> Bound:
    if norm in {"linf", TOKEN_MAX}:
        return Bound.point(1.0)
    share = 1.0 / Bound.point(float(module.shortest))
    return Bound(0.0, (share.sqrt() if norm == "l2" else share).upper)


@token_rule.register(MeanOverTime)
def _mean_of_tokens(module: MeanOverTime) -> Bound:
    return _mean(module, TOKEN_MAX)
