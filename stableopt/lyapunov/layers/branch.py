r"""Residual blocks of any make, measured at the data: how strong their branch is, and whether it pulls back.

Of a block :math:`h^+ = h + K(h)` whose law nobody knows, one power step per reading estimates :math:`\sigma = \|DK\|_2` from below,
at the inputs that the probe gives it: :math:`w = DK\,u / \|DK\,u\|`, :math:`\sigma \approx \|DK\,u\|`,
:math:`u' \propto DK^\top w`. If the branch pulls straight back along its strongest direction, :math:`w \approx -u` as for a
gradient step, the block multiplies that direction by :math:`1 - \sigma`, and :math:`\sigma/2` is the share of its step limit in
use. If it does not, no step limit is known (T3, class a) and the block may grow by up to :math:`1 + \sigma` there.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stableopt.lyapunov.layers.cfl import has_law
from stableopt.lyapunov.layers.forward import dual_numbers, relative_step
from stableopt.lyapunov.layers.readout import Readout
from stableopt.lyapunov.layers.skip import is_sum
from stableopt.lyapunov.layers.walk import eager, floating
from stableopt.nn.residual.averaged import AveragedResidual
from stableopt.optim import RandomState

__all__ = ["PULLS_BACK", "Branches", "is_residual"]

PULLS_BACK = 0.95
"""Cosine of the angle between the pull of a branch and straight back, from which on it counts as a gradient step."""

_NAMES = ("step_size", "tau", "dt", "step")
_FIRST_STEPS = 8


@functools.singledispatch
def is_residual(module: nn.Module) -> bool:
    """Return whether a module may be a residual block of unknown make; register a function that returns True for a class of yours.

    Candidates are modules with a step, an attribute ``step_size``, ``tau``, ``dt`` or ``step`` that is a float or a tensor with
    one floating-point element. They are measured if the graph of their operations shows that the output is the input plus
    something (:func:`stableopt.lyapunov.layers.skip.is_sum`); for a class that is registered this is taken for granted.
    Registered is torch's encoder layer with ``norm_first=True``. A block whose sum goes through a nonlinearity or a normalization
    (that of a ResNet, an encoder layer with ``norm_first=False``) is none: its output less its input is not the branch.

    Args:
        module: any module that has no law of its own (:func:`stableopt.lyapunov.layers.step_law`).

    Examples:
        >>> is_residual(nn.Linear(1, 1)), is_residual(nn.TransformerEncoderLayer(2, 1, 4, norm_first=True))
        (False, True)
    """
    if has_law(module) or isinstance(module, AveragedResidual):
        return False
    return bool(_steps(module))


def _steps(module: nn.Module) -> list[float | Tensor]:
    values = [getattr(module, name, None) for name in _NAMES]
    return [
        v
        for v in values
        if isinstance(v, float) or (isinstance(v, Tensor) and v.is_floating_point() and v.numel() == 1)
    ]


@is_residual.register(nn.TransformerEncoderLayer)
def _(module: nn.TransformerEncoderLayer) -> bool:
    return module.norm_first


@dataclass(eq=False)
class _Seen:
    """The first call of a block."""

    block: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[bool, torch.dtype]
    output: int | None = None  # which of its outputs has the shape of the input

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output for another input."""
        args, kwargs = tree_map_only(Tensor, lambda t: x.clone() if t is self.x else t, (self.args, self.kwargs))
        with self._precision():
            return floating(self.block(*args, **kwargs))[self.output or 0]

    def _precision(self) -> AbstractContextManager[Any]:
        enabled, dtype = self.autocast
        kind = self.x.device.type
        return torch.autocast(kind, dtype=dtype) if enabled else nullcontext()


class Branches:
    """Observe a walk and keep what the residual blocks see; afterwards, make one power step for each.

    Args:
        seed: of the first directions.

    Examples:
        >>> from stableopt.lyapunov.layers.walk import Walk
        >>> class Block(nn.Module):
        ...     tau = 0.5
        ...
        ...     def forward(self, x):
        ...         return x - self.tau * torch.stack([3.0 * x[:, 0], x[:, 1]], 1)
        >>> model, branches, readout = Block(), Branches(), Readout()
        >>> Walk(model, lambda: model(torch.ones(1, 2)).sum(), branches).run()
        >>> branches.measure(readout)
        >>> [round(number, 3) for number in readout.fetch().values()]  # the strength 1.5, straight back
        [1.5, 1.0]
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.vectors: dict[str, Tensor] = {}
        self._sums: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.start()

    def start(self) -> None:
        """Forget what was seen."""
        self._seen: dict[str, _Seen] = {}

    def source(self, x: Tensor) -> Tensor:
        """Take the source as it is."""
        return x

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the first call of a residual block."""
        if "#" in name or not is_residual(module):
            return
        args, kwargs = tree_map_only(Tensor, lambda t: fwd.unpack_dual(t).primal.detach(), (args, kwargs))
        if inputs := floating((args, kwargs)):
            x = inputs[0].clone()  # the block may write into it
            args, kwargs = tree_map_only(Tensor, lambda t: x if t is inputs[0] else t, (args, kwargs))
            kind = x.device.type
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self._seen[name] = _Seen(module, x, args, kwargs, autocast)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        """Find the output that has the shape of the input."""
        if (seen := self._seen.get(name)) is not None:
            seen.output = next((i for i, t in enumerate(floating(output)) if t.shape == seen.x.shape), None)

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        """Take the outputs as they are."""
        return outputs

    def measure(self, readout: Readout, start: RandomState | None = None) -> None:
        r"""Leave ``("branch", name)``, :math:`\sigma`, and ``("pull", name)``, :math:`-\langle w, u\rangle`, in a readout.

        Buffers and random states are not put back here. The backward hooks of the modules in a block are not called; those that its
        forward map itself puts on tensors are, with derivatives along the directions of this estimate.

        Args:
            readout: gets the numbers of the blocks; one that cannot be differentiated is left out.
            start: the random state for each evaluation of a block.
        """
        for name, seen in self._seen.items():
            if seen.output is None or not self._is_sum(seen, start):
                continue
            u, steps = self.vectors.get(name), 1
            if u is None or u.shape != seen.x.shape:
                u, steps = torch.randn(seen.x.shape, generator=self._generator, dtype=torch.float32), _FIRST_STEPS
            u = _unit(u.to(seen.x))[0]
            with (
                contextlib.suppress(Exception),
                eager(),
                _without_backward_hooks(seen.block),
            ):  # whatever the block does not allow
                strength, pull, following = self._power(seen, u, steps, start or RandomState.capture())
                self.vectors[name] = torch.where(following.isfinite().all(), following, u)
                readout.add(("branch", name), strength)
                readout.add(("pull", name), pull)
        self.start()

    def _is_sum(self, seen: _Seen, start: RandomState | None) -> bool:
        """Return whether a block is a residual sum; it is looked at once, unless that fails."""
        block = seen.block
        if is_residual.dispatch(type(block)) is not is_residual.dispatch(object):
            return True
        if block not in self._sums:
            with contextlib.suppress(Exception), eager(), _without_backward_hooks(block), torch.enable_grad():
                (start or RandomState.capture()).restore()
                x = seen.x.detach().requires_grad_()
                y = seen(x)
                self._sums[block] = any(is_sum(y, x, float(step)) for step in _steps(block))
        return self._sums.get(block, False)

    @staticmethod
    def _power(seen: _Seen, u: Tensor, steps: int, start: RandomState) -> tuple[Tensor, Tensor, Tensor]:
        strength = pull = u.new_zeros(())
        for _ in range(steps):
            w, strength = _unit(_along(seen, u, start) - u)
            pull = -(w * u).sum()
            u = _unit(_against(seen, w, start) - w)[0]
        return strength, pull, u


def _along(seen: _Seen, u: Tensor, start: RandomState) -> Tensor:
    """Return the derivative of the block along a direction: with dual numbers, or by a central difference."""
    with torch.no_grad():
        try:
            start.restore()
            with dual_numbers():
                tangent = fwd.unpack_dual(seen(fwd.make_dual(seen.x, u))).tangent
                if tangent is not None:
                    return tangent.to(u)
        except (NotImplementedError, RuntimeError):
            pass
        size = relative_step([u.dtype]) * torch.linalg.vector_norm(seen.x)
        size = torch.where(size > 0, size, torch.ones_like(size))
        ends = []
        for sign in (1.0, -1.0):
            start.restore()
            ends.append(seen(seen.x + sign * size * u))
        return ((ends[0] - ends[1]) / (2.0 * size)).to(u)


def _against(seen: _Seen, w: Tensor, start: RandomState) -> Tensor:
    """Return the transposed derivative of the block along a direction."""
    start.restore()
    with torch.enable_grad():
        x = seen.x.detach().requires_grad_()
        y = seen(x)
        (gradient,) = torch.autograd.grad(y, x, w.to(y), allow_unused=True)
    return torch.zeros_like(w) if gradient is None else gradient.to(w)


@contextlib.contextmanager
def _without_backward_hooks(block: nn.Module) -> Iterator[None]:
    """Take the backward hooks off all modules of a block: the derivatives here are none of a training."""
    kept = [
        (holder, name, holder[name])
        for holder in [*map(vars, block.modules()), vars(torch.nn.modules.module)]
        for name in ("_backward_hooks", "_backward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
        if holder.get(name)
    ]
    try:
        for holder, name, hooks in kept:
            holder[name] = type(hooks)()
        yield
    finally:
        for holder, name, hooks in kept:
            holder[name] = hooks


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if x.dtype in {torch.float16, torch.bfloat16} else x.dtype
    length = torch.linalg.vector_norm(x, dtype=wide)
    return (x / length.clamp_min(torch.finfo(wide).tiny)).to(x.dtype), length
