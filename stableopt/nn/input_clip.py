r"""Inputs within a box, which the bounds of gated cells need: a gate is only known to stay open for inputs of limited size."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stableopt.nn.arguments import check_positive

__all__ = ["ClippedInput", "clip_input", "input_limit"]

_Module = TypeVar("_Module", bound=nn.Module)


class ClippedInput:
    r"""A forward pre-hook that clamps the first input of a module to :math:`[-u, u]`, entry by entry.

    The clamp is 1-Lipschitz in l2, linf and l1, so no bound of a module that it is registered on becomes false.

    Args:
        bound: :math:`u > 0`.

    Examples:
        >>> import torch
        >>> ClippedInput(1.0)(nn.Identity(), (torch.tensor([3.0, 0.5]),), {})
        ((tensor([1.0000, 0.5000]),), {})
    """

    def __init__(self, bound: float) -> None:
        check_positive(input_bound=bound)
        self.bound = float(bound)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments with the first one clamped."""
        if args:
            return (self._clamped(args[0]), *args[1:]), kwargs
        return args, {name: self._clamped(value) if name == "input" else value for name, value in kwargs.items()}

    def _clamped(self, x: Any) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=x.data.clamp(-self.bound, self.bound))
        return x.clamp(-self.bound, self.bound) if isinstance(x, Tensor) else x

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return f"ClippedInput({self.bound})"


def clip_input(module: _Module, bound: float) -> _Module:
    r"""Clamp the inputs of a module to :math:`[-u, u]` from now on, in place.

    Args:
        module: a module whose first input is a tensor or a PackedSequence, such as :class:`torch.nn.GRU`.
        bound: :math:`u`, finite and positive; it replaces an earlier one.

    Returns:
        The same module.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if the bound is not finite and positive.

    Note:
        It is a forward pre-hook, which ``deepcopy`` and ``pickle`` of the module keep and a state dict does not hold.

    Examples:
        >>> import torch
        >>> gru = clip_input(nn.GRU(2, 3), 1.0)
        >>> x = torch.randn(5, 2)
        >>> torch.equal(gru(10 * x)[0], gru((10 * x).clamp(-1, 1))[0])
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"clip_input needs a torch.nn.Module, got {type(module).__name__}.")
    hook = ClippedInput(bound)
    for key, present in list(module._forward_pre_hooks.items()):  # noqa: SLF001 torch has no public accessor
        if isinstance(present, ClippedInput):
            del module._forward_pre_hooks[key]  # noqa: SLF001
            module._forward_pre_hooks_with_kwargs.pop(key, None)  # noqa: SLF001
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return module


def input_limit(module: nn.Module) -> float:
    """Return the limit that :func:`clip_input` set; infinity if there is none.

    Examples:
        >>> input_limit(nn.GRU(1, 1)), input_limit(clip_input(nn.GRU(1, 1), 2.0))
        (inf, 2.0)
    """
    hooks = module._forward_pre_hooks.values()  # noqa: SLF001 torch has no public accessor
    return min((hook.bound for hook in hooks if isinstance(hook, ClippedInput)), default=float("inf"))
