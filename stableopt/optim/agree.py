"""One decision on every process: energies are summed over the processes before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stableopt.constraints.sharding import is_sharded

__all__ = ["Alone", "GroupChoice", "Processes", "put_away"]

GroupChoice: TypeAlias = (
    Any  # Literal["auto"] | dist.ProcessGroup | None; ProcessGroup is not there in every build of torch
)


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together and must take the same steps.

    Args:
        group: the process group; None for all.
        size: how many there are.
        device: where a collective wants its tensors.

    Examples:
        >>> Processes.of("auto", torch.device("cpu")).size
        1
    """

    group: Any
    size: int
    device: torch.device

    @classmethod
    def of(cls, choice: Literal["auto"] | Any, device: torch.device) -> Processes:
        """Return the processes that a choice means.

        Args:
            choice: ``"auto"`` for all processes where ``torch.distributed`` is set up, None for this one alone, or a process group.
            device: of the parameters.

        Note:
            ``"auto"`` takes it that all processes train one model on parts of one batch: each holds all parameters, whole
            (``DistributedDataParallel``) or in shards (``fully_shard``, ``DTensor``), all gradients are means over the processes,
            and all call each step. Processes that train models of their own decide alone, and so does one that alone has an
            optimizer: None.

        Examples:
            >>> Processes.of(None, torch.device("cpu")) == Alone
            True
        """
        if choice is None or not (dist.is_available() and dist.is_initialized()):
            return Alone
        group = None if isinstance(choice, str) else choice
        size = dist.get_world_size(group)
        if size <= 1:
            return Alone
        return cls(group, size, _reachable(group, device))

    def share(self, parameter: Tensor) -> float:
        """Return the weight of this process's part of a parameter in a sum over all processes, so that each entry counts once.

        A parameter that every process holds whole counts 1/size on each; of a sharded one every shard counts once, however many
        processes hold it.

        Examples:
            >>> Alone.share(torch.ones(2))
            1.0
        """
        if self.size == 1:
            return 1.0
        if not is_sharded(parameter):
            return 1.0 / self.size
        mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
        shards = 1
        for i, placement in enumerate(placements):
            if not placement.is_replicate():
                shards *= mesh.size(i)
        return shards / self.size

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a vector over all processes, on its own device; the same bits on each.

        Args:
            values: float64; each process gives a vector of the same length.

        Examples:
            >>> Alone.total(torch.tensor([1.0, 2.0])).tolist()
            [1.0, 2.0]
        """
        if self.size == 1:
            return values
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved, group=self.group)
        return moved.to(values.device)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the largest value of each entry over all processes, on its own device.

        Args:
            values: each process gives a vector of the same length and dtype.

        Examples:
            >>> Alone.maximum(torch.tensor([1, 2])).tolist()
            [1, 2]
        """
        if self.size == 1:
            return values
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=self.group)
        return moved.to(values.device)

    def mean(self, value: float) -> float:
        """Return the mean of a number over all processes.

        Examples:
            >>> Alone.mean(2.5)
            2.5
        """
        if self.size == 1:
            return value
        return float(self.total(torch.tensor([value], dtype=torch.float64))) / self.size


Alone = Processes(None, 1, torch.device("cpu"))
"""This process decides for itself."""


def _reachable(group: Any, device: torch.device) -> torch.device:
    """Return the device on which a group can sum what lies on ``device``: the same where one of its backends serves it."""
    # get_backend says "undefined" where none was named, and one name cannot say which devices several backends serve
    asked: Any = dist.group.WORLD if group is None else group
    served = [d.type for d in asked._device_types]  # noqa: SLF001
    if device.type in served or not served:
        return device
    return torch.device("cpu" if "cpu" in served else served[0])


def put_away(module: nn.Module) -> bool:
    """Let a module of ``fully_shard`` forget the weights it has gathered, so that its next forward pass gathers those of now.

    After a forward pass the outermost module keeps them for the backward pass that it expects, and gathers no others before. A
    second evaluation has no backward pass, and other weights than the first.

    Args:
        module: any module.

    Returns:
        Whether it is one of ``fully_shard``.

    Examples:
        >>> put_away(nn.Linear(2, 2))
        False
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return False
    module.reshard()
    return True
