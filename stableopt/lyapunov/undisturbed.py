"""Look at a model and leave it, and every random number to come, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stableopt.nn.sharded import reshard
from stableopt.optim import RandomState

__all__ = ["Snapshot", "undisturbed"]


class Snapshot:
    """The buffers and training modes of a model, and the global random state.

    Args:
        model: of which the buffer objects and their bits, and the mode of each module, are kept.

    Note:
        Attributes that a model changes by itself in ``forward`` (a Python counter) are not known here.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> snapshot = Snapshot(norm)
        >>> _ = norm(torch.rand(4, 2))
        >>> snapshot.restore()
        >>> int(norm.num_batches_tracked)
        0
    """

    def __init__(self, model: nn.Module) -> None:
        self.random = RandomState.capture()
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone(), _version(buffer))
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Put everything back; a buffer that nobody changed is not written, and keeps its version counter."""
        self.random.restore()
        for module, mode in self._modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, bits, version in self._buffers:
                if getattr(module, name, None) is not buffer:
                    setattr(module, name, buffer)
                # batch_norm writes its statistics without counting a version
                if version is None or _version(buffer) != version or not _same_bits(buffer, bits):
                    buffer.data.copy_(bits)  # .data: graphs that have saved the buffer stay valid


@contextmanager
def undisturbed(model: nn.Module, start: Snapshot | None = None) -> Iterator[None]:
    """Put back buffers, training modes and global random states at the end, also after an error.

    Args:
        model: of which they are.
        start: a state to begin with; None for the current one.

    Examples:
        >>> dropout, x = nn.Dropout(), torch.ones(8)
        >>> start = Snapshot(dropout)
        >>> first = dropout(x)
        >>> with undisturbed(dropout, start):
        ...     bool(dropout(x).equal(first))
        True
    """
    end = Snapshot(model)
    try:
        if start is not None:
            start.restore()
        yield
    finally:
        end.restore()
        reshard(model)


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits, NaN included; sparse ones are told apart by their version."""
    if x.layout is not torch.strided:
        return True
    if x.is_floating_point() or x.is_complex():
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.real.element_size())
        x, y = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (x, y))
        x, y = (t.contiguous().view(whole) for t in (x, y)) if whole is not None else (x, y)
    return torch.equal(x, y)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - the documented way to see a change in place
