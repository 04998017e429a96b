"""What an audit looks at: copies of the model, so that it is left as it is, and what happened when one of them ran."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt.errors import UncertifiableError
from stableopt.lyapunov.undisturbed import undisturbed

__all__ = ["Call", "Scene", "called", "copied", "is_foreign", "scene"]

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "dot", "matmul", "linear"})
_SUMS = frozenset({"add", "add_", "sub", "sub_", "rsub"})


@dataclass
class Call:
    """What the first call of a module did.

    Args:
        args: its arguments.
        output: its output.
        ops: the names of torch's operations inside it, in order.
        products: storage of a parameter -> in how many products it took part.
        scores: whether two activations, neither of them a parameter, were multiplied as matrices.
        residual: whether its input was added to something at the end.

    Examples:
        >>> Call((torch.zeros(1, 2),)).single is not None
        True
    """

    args: tuple[Any, ...]
    output: Any = None
    ops: list[str] = field(default_factory=list)
    products: Counter[int] = field(default_factory=Counter)
    scores: bool = False
    residual: bool = False

    @property
    def single(self) -> Tensor | None:
        """Its argument, if it is one real floating tensor; None otherwise.

        Examples:
            >>> Call((torch.zeros(1), torch.zeros(1))).single is None
            True
        """
        x = self.args[0] if len(self.args) == 1 else None
        return x if isinstance(x, Tensor) and x.is_floating_point() and x.ndim else None


@dataclass(frozen=True)
class Scene:
    """The model under audit, in copies.

    Args:
        original: the model itself, of which only attributes are read.
        plain: a copy in the dtypes of the model, in evaluation mode.
        exact: a copy in float64 on the CPU, in evaluation mode.
        training: the modules that were in training mode, by path.
        calls: what the modules of ``exact`` did when it ran, by path; empty if it was not run.
        failure: why it could not be run, "" if it could or was not asked to.

    Examples:
        >>> sorted(scene(nn.Sequential(nn.ReLU()), ()).training)
        ['', '0']
    """

    original: nn.Module
    plain: nn.Module
    exact: nn.Module
    training: frozenset[str]
    calls: dict[str, Call]
    failure: str = ""

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the modules of ``plain`` with their paths, without those of parametrizations.

        Examples:
            >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))
            >>> [path for path, module in scene(layer, ()).modules()]
            ['']
        """
        for path, module in self.plain.named_modules():
            if "parametrizations" not in path.split("."):
                yield path, module

    def run(self, path: str) -> Callable[[Tensor], Tensor]:
        """Return the map of one module of ``exact``: of one tensor, to its first output, of a copy of its input.

        Examples:
            >>> scene(nn.Sequential(nn.ReLU()), ()).run("0")(torch.tensor([-1.0]))
            tensor([0.])
        """
        module = self.exact.get_submodule(path)
        return lambda x: _first(module(x.clone()))


def scene(model: nn.Module, inputs: tuple[Any, ...]) -> Scene:
    """Copy a model and run a copy once.

    Args:
        model: the model.
        inputs: the arguments of the run; empty to do without.

    Raises:
        UncertifiableError: if the model cannot be copied, or holds no numbers.

    Examples:
        >>> scene(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (torch.zeros(1, 2, 2),)).calls["1"].ops[-1]
        'addmm'
    """
    if any(part.is_meta for part in [*model.parameters(), *model.buffers()]):
        raise UncertifiableError("the model is on the meta device, which holds no numbers; load its weights first.")
    training = frozenset(path for path, module in model.named_modules() if module.training)
    plain = copied(model).eval()
    exact = copied(plain).to("cpu").double()
    calls, failure = _record(exact, inputs) if inputs else ({}, "")
    return Scene(model, plain, exact, training, calls, failure)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model whose modules keep results of a computation, as the old kind of spectral norm does.

    A DistributedDataParallel is replaced by the module in it.

    Raises:
        UncertifiableError: if the model cannot be copied.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> layer.cached = 2 * layer.weight
        >>> copied(layer).cached.requires_grad
        False
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module is not model:
            memo[id(module)] = copied(module.module)
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    try:
        return copy.deepcopy(inner, memo)
    except Exception as error:  # a deepcopy fails in many ways
        raise UncertifiableError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and an audit runs copies only; leave out what "
            "copy.deepcopy does not copy."
        ) from error


def is_foreign(module: nn.Module) -> bool:
    """Return whether the forward map of a module was written neither by torch nor by this package.

    Examples:
        >>> class Mine(nn.Sequential):
        ...     pass
        >>> is_foreign(Mine())
        False
    """
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            return not kind.__module__.startswith(("torch.", "stableopt."))
    return False


def called(module: nn.Module) -> str:
    """Return the name of the class of a module, without what a parametrization makes of it.

    Examples:
        >>> called(torch.nn.utils.parametrizations.weight_norm(nn.Linear(1, 1)))
        'Linear'
    """
    kind = type(module)
    return kind.__bases__[0].__name__ if P.is_parametrized(module) else kind.__name__


class _Recorder(TorchDispatchMode):
    """Attribute each operation of torch to the modules that run it."""

    def __init__(self, parameters: frozenset[int]) -> None:
        super().__init__()
        self.stack: list[Call] = []
        self.parameters = parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation and run it."""
        out = func(*args, **(kwargs or {}))
        if self.stack:
            name = func.overloadpacket.__name__
            tensors = [a for a in args if isinstance(a, Tensor)]
            for call in self.stack:
                self._note(call, name, tensors)
        return out

    def _note(self, call: Call, name: str, tensors: list[Tensor]) -> None:
        call.ops.append(name)
        if name in _PRODUCTS:
            factors = [_storage(x) for x in tensors]
            owned = [key for key in factors if key in self.parameters]
            call.products.update(set(owned))
            call.scores = call.scores or (name in {"bmm", "baddbmm"} and not owned)
        elif name in _SUMS and call.single is not None:
            own = [_storage(x) == _storage(call.single) and x.shape == call.single.shape for x in tensors]
            known = any(_storage(x) in self.parameters for x in tensors)  # a bias, or positions
            call.residual = call.residual or (len(own) == 2 and any(own) and not known)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _record(exact: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, Call], str]:
    """Run a model and note what each of its modules does at its first call."""
    calls: dict[str, Call] = {}
    recorder = _Recorder(frozenset(_storage(p) for p in [*exact.parameters(), *exact.buffers()]))
    args = tuple(_exact(x) for x in inputs)

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:
            call = Call(tuple(args))
            calls.setdefault(path, call)
            recorder.stack.append(call)

        return hook

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        recorder.stack.pop().output = output

    handles = []
    for path, module in exact.named_modules():
        if "parametrizations" not in path.split("."):
            handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
    try:
        with undisturbed(exact), torch.no_grad(), recorder:
            exact(*args)
    except Exception as error:  # foreign code fails in many ways
        return calls, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        for handle in handles:
            handle.remove()
    return calls, ""


def _first(output: Any) -> Any:
    """Return the first tensor of an output: of a tuple, of a dict, of the named output of a library."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    parts = output.values() if isinstance(output, dict) else output
    return next(part for part in parts if isinstance(part, Tensor))


def _exact(x: Any) -> Any:
    if isinstance(x, Tensor):
        x = x.detach().to("cpu")
        return x.double() if x.is_floating_point() else x
    return x
