"""Steps with a loss or gradients that are not finite: found before the optimizer uses them, and made to change nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stableopt.lyapunov.lengths import norms
from stableopt.lyapunov.vitals import Names
from stableopt.optim import GuardedOptimizer
from stableopt.optim.agree import Processes
from stableopt.optim.groups import closure_is_required
from stableopt.optim.snapshot import Copies, Plan, Snapshot, local

__all__ = ["Refusal", "nonfinite_names"]

"""Norms of a list of tensors."""


class Refusal:
    """Let the step of an optimizer change nothing, parameters and state, if its loss or a gradient is not finite.

    The gradients are taken away for the step, which then finds none: torch's optimizers, fused ones and those with weight decay
    too, change nothing. Any other optimizer finds zeros, since it may not ask whether there are any, and is put back afterwards
    from a copy; so is LBFGS. An optimizer of this package that guards its steps skips by itself those with such gradients.
    Buffers that the forward pass has spoilt, such as the running statistics of a batch norm, go back to what they were at the
    end of the step before, or, in the first one, when this object was made or :meth:`keep_buffers` was called last.

    Args:
        model: has the names of the parameters.
        optimizer: any torch optimizer.
        processes: that train the model; what one of them finds, all refuse.

    Attributes:
        names: what was not finite in this step: ``loss``, ``grad:NAME``, ``param:NAME``; empty for a step that is not refused.

    Note:
        An optimizer that is not torch's and evaluates a closure is copied before each step, since its parameters may have moved
        when the closure is evaluated. After such a step, and after one of LBFGS, its parameters are looked at, too: what a line
        search meets on its way is its own affair, what it ends with is not.
        Under ``torch.amp.GradScaler``, gradients that overflow never reach an optimizer, and fused ones leave them out by
        themselves: these are not refused.

    Examples:
        >>> from stableopt.optim.agree import Alone
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> before = model.weight.item()
        >>> (model(torch.ones(1)) * torch.nan).sum().backward()
        >>> refusal = Refusal(model, optimizer, Alone)
        >>> refusal.begin()
        >>> refusal.look(None)
        ('grad:weight', 'grad:bias')
        >>> optimizer.step()
        >>> refusal.end()
        >>> model.weight.item() == before, len(optimizer.state), model.weight.grad
        (True, 0, tensor([[nan]]))
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
        self._optimizer, self._processes = optimizer, processes
        self._parameters = Names(model, optimizer)
        guarded = isinstance(optimizer, GuardedOptimizer)
        self._iterates = optimizer.needs_closure if guarded else closure_is_required(type(optimizer))
        of_torch = optimizer.contained if guarded else type(optimizer).__module__.startswith("torch.optim")
        self._inert = of_torch and not self._iterates
        self.names: tuple[str, ...] = ()
        self._memory: Snapshot | None = None
        self._model, self._buffers = model, dict[tuple[nn.Module, str], tuple[Tensor, weakref.ref[Tensor]]]()
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._open, self._looked, self._kept, self._watched = False, True, False, False
        self.keep_buffers()

    def begin(self, *, with_closure: bool = False) -> None:
        """Prepare for a step.

        Args:
            with_closure: whether the step evaluates a closure.
        """
        self.names, self._open, self._looked, self._kept = (), True, False, False
        self._watched = self._iterates or (with_closure and not self._inert)
        if self._watched:
            self._keep()

    def look(self, loss: Tensor | float | None) -> tuple[str, ...]:
        """Look at loss and gradients, and take the gradients away if something is not finite; only the first look of a step counts.

        Args:
            loss: of the step; None if it is not known.

        Returns:
            What is not finite on any process: ``loss``, ``grad:NAME``.
        """
        if self._looked:
            return ()
        self._looked = True
        parameters = self._parameters.parameters()
        found: dict[str, Tensor | None] = {"loss": _as_tensor(loss)}
        if getattr(self._optimizer, "found_inf", None) is None:
            found |= {f"grad:{name}": p.grad for p, name in parameters.items()}
        self.names = nonfinite_names(found, self._processes)
        if self.names and not (self._guards and any(name.startswith("grad:") for name in self.names)):
            if not self._inert and not self._kept:
                self._keep()
            self._hidden = [(p, p.grad) for p in parameters if p.grad is not None]
            for p, gradient in self._hidden:
                p.grad = None if self._inert else torch.zeros_like(gradient)
        return self.names

    def end(self, *, raised: bool = False) -> None:
        """Give the gradients back, and put back what the step has changed all the same; may be called twice.

        Args:
            raised: whether the step ended in an error, so that nothing is asked of other processes.
        """
        if self._watched and not raised and not self.names:
            found: dict[str, Tensor | None] = {f"param:{name}": p for p, name in self._parameters.parameters().items()}
            self.names = nonfinite_names(found, self._processes)
        if self.names and self._kept and self._memory is not None:
            self._memory.restore()
        if self.names:
            self._mend_buffers()
        elif not raised and self._open:
            self.keep_buffers()
        for p, gradient in self._hidden:
            p.grad = gradient
        self._hidden, self._open, self._kept, self._watched, self._looked = [], False, False, False, True

    @property
    def _guards(self) -> bool:
        """Whether the optimizer skips by itself a step whose gradients are not finite."""
        optimizer = self._optimizer
        return isinstance(optimizer, GuardedOptimizer) and optimizer.param_groups[0]["guard"] not in {"off", "monitor"}

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Take the buffers as they are for sound: to be called before the first step, and after a checkpoint has been loaded.

        Examples:
            >>> from stableopt.optim.agree import Alone
            >>> norm = nn.BatchNorm1d(1)
            >>> refusal = Refusal(norm, torch.optim.SGD(norm.parameters()), Alone)
            >>> norm(torch.full((2, 1), torch.nan)).sum().backward()
            >>> refusal.begin(), refusal.look(None), refusal.end()
            (None, ('grad:weight',), None)
            >>> norm.running_mean
            tensor([0.])
        """
        copies, old, self._buffers = Copies(), self._buffers, {}
        for module in self._model.modules():
            for key, buffer in module._buffers.items():  # noqa: SLF001 - named_buffers would leave out shared ones
                if buffer is not None and not is_lazy(buffer) and (buffer.is_floating_point() or buffer.is_complex()):
                    kept = old.get((module, key))
                    self._buffers[module, key] = (
                        copies.of(buffer.detach(), None if kept is None else kept[0]),
                        weakref.ref(buffer),
                    )
        copies.run()

    @torch.no_grad()
    def _mend_buffers(self) -> None:
        """Put back the buffers that are not finite but were."""
        plan = Plan()
        for (module, key), (value, original) in self._buffers.items():
            buffer = module._buffers.get(key)  # noqa: SLF001
            if buffer is not None and not local(buffer).isfinite().all() and local(value).isfinite().all():
                plan.fill(module._buffers, key, value, original())  # noqa: SLF001
        plan.carry_out()

    def _keep(self) -> None:
        self._kept = True
        if self._memory is None:
            self._memory = Snapshot(self._optimizer, everything=True, gradients=False)
        else:
            self._memory.take()


@torch.no_grad()
def nonfinite_names(tensors: Mapping[str, Tensor | None], processes: Processes) -> tuple[str, ...]:
    """Return the names of the tensors that are not finite on any process, with one wait for the device where all is well.

    Args:
        tensors: name -> tensor, or None if it is not there; each process has the same names.
        processes: that look together.

    Examples:
        >>> from stableopt.optim.agree import Alone
        >>> nonfinite_names({"a": torch.tensor([3e38, 3e38]), "b": None, "c": torch.tensor(float("inf"))}, Alone)
        ('c',)
    """
    parts = {name: _dense(x) for name, x in tensors.items() if x is not None}
    here = {name: x for name, x in parts.items() if x.numel() and x.device.type != "meta"}
    device = next((x.device for x in here.values() if x.device.type != "cpu"), torch.device("cpu"))
    bad = torch.zeros(1, device=device)
    if here:  # a norm keeps every NaN and infinity
        bad = (
            torch.stack([n.to(device) for n in norms(here.values())]).isfinite().logical_not().any().float().reshape(1)
        )
    if not processes.maximum(bad).item():
        return ()
    flags = torch.zeros(len(tensors))
    for i, name in enumerate(tensors):  # finite numbers, too, may have a norm that is not
        flags[i] = float(name in here and not here[name].isfinite().all())
    return tuple(name for name, flag in zip(tensors, processes.maximum(flags).tolist(), strict=True) if flag)


def _dense(x: Tensor) -> Tensor:
    part = local(x.detach())
    return part.coalesce().values() if part.is_sparse else part


def _as_tensor(loss: Tensor | float | None) -> Tensor | None:
    if loss is None or isinstance(loss, Tensor):
        return loss
    return torch.tensor(loss if math.isfinite(loss) else math.nan)
