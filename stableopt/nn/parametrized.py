r"""The class of a module with a parametrized weight, without the traps of torch's own.

:func:`torch.nn.utils.parametrize.register_parametrization` gives each module a class of its own that a ``deepcopy`` shares, and
removing the parametrization of the copy deletes the weight of the original. Writing into the computed weight has no effect and
says nothing, a cached weight is used after the parameters have changed, an RNN goes on using the raw weights, and the model cannot
be pickled. :func:`adopt` replaces that class by one with none of this: there is one for each class of layer, nothing is ever
deleted from it, and torch's functions work with it.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as P
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from stableopt.constraints.sharding import is_sharded, whole
from stableopt.nn.folding import folded, is_foldable, same_numbers, sources_of
from stableopt.nn.sharded import class_of

__all__ = ["adopt", "compute", "plain_class", "remember_order", "restored"]

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_PREFIX = "Parametrized|"
_GUARDED = "_stableopt_guarded"
"""Plain attribute of a module: the tensors that must not be written into, and their shapes. It follows deepcopy and pickle."""
_ORDER = "_stableopt_order"
"""Plain attribute of a module: the names of its parameters in their order before, which optimizers count on."""


class _Shared(type):
    """The type of these classes: what torch sets and deletes on a class for one module must not change the other modules."""

    def __setattr__(cls, name: str, value: Any) -> None:
        """Put our own property where torch injects one."""
        type.__setattr__(cls, name, _weight_property(name) if isinstance(value, property) else value)

    def __delattr__(cls, name: str) -> None:
        """Keep the property: it falls back to a plain parameter where nothing is parametrized."""


def adopt(module: nn.Module, guard: str | None = None, shape: torch.Size | None = None) -> None:
    """Give a module that torch has just parametrized the class of this file.

    Args:
        module: a module with parametrizations.
        guard: name of a parametrized tensor; writing into it, which has no effect, will be refused.
        shape: the shape of that tensor; assigning one of another shape will be refused.

    Examples:
        >>> import copy
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> adopt(layer)
        >>> _ = P.remove_parametrizations(copy.deepcopy(layer), "weight")
        >>> layer.weight.shape
        torch.Size([2, 2])
    """
    if not P.is_parametrized(module):
        return
    cls = type(module)
    if not isinstance(cls, _Shared):
        cls = _class_for(cls.__bases__[0])
        module.__class__ = cls
    for name in module.get_submodule("parametrizations")._modules:  # noqa: SLF001 the names, without building a list of modules
        if name not in vars(cls):
            type.__setattr__(cls, name, _weight_property(name))
    if guard is not None:
        vars(module)[_GUARDED] = {**vars(module).get(_GUARDED, {}), guard: shape}


def remember_order(module: nn.Module) -> None:
    """Remember the order of the parameters of a module that is about to be parametrized, for :func:`restored`.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> remember_order(layer)
        >>> layer.weight = layer._parameters.pop("weight")
        >>> restored(layer)
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """
    if not P.is_parametrized(module):
        vars(module)[_ORDER] = tuple(module._parameters)  # noqa: SLF001 torch has no public access


def compute(chain: nn.Module) -> Tensor:
    """Compute a weight; where fully_shard holds only a part of an original here, all processes must ask, and it is gathered.

    Args:
        chain: the parametrizations of one tensor, as torch keeps them.

    Examples:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> torch.equal(compute(layer.parametrizations.weight), layer.weight)
        True
    """
    own: Any = chain._parameters  # noqa: SLF001 the originals, without building a list
    if all(type(p) is nn.Parameter for p in own.values()):
        return chain()
    gathered = {name: whole(p) for name, p in chain.named_parameters() if is_sharded(p)}
    return functional_call(chain, gathered, ())


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before it was parametrized.

    Examples:
        >>> plain_class(nn.Linear(1, 1))
        <class 'torch.nn.modules.linear.Linear'>
    """
    kind = class_of(module)
    if not P.is_parametrized(module):
        return kind
    return next((base for base in kind.__mro__ if _CLASSES.get(base) is kind), kind.__bases__[0])  # pyright: ignore[reportReturnType]


def _class_for(base: type[nn.Module]) -> type[nn.Module]:
    """Return the one class of parametrized modules of the class ``base``, making it on first use."""
    if base not in _CLASSES:
        members: dict[str, Any] = {
            "__module__": __name__,
            "__qualname__": f"{_PREFIX}{base.__module__}|{base.__qualname__}".replace(".", "/"),
            "__doc__": base.__doc__,
            "__setstate__": _setstate,
            "__setattr__": _setattr,
        }
        if issubclass(base, nn.RNNBase):
            members |= {
                "_flat_weights": property(_flat_weights, _ignore),
                "_init_flat_weights": _ignore,
                "_update_flat_weights": _ignore,
                "flatten_parameters": _ignore,
                "forward": _forward_once,
            }
        if base.forward is nn.Linear.forward:
            members["forward"] = _forward_linear
        if type(base) is type:
            _CLASSES[base] = _Shared(f"Parametrized{base.__name__}", (base,), members)  # pyright: ignore[reportArgumentType]
        else:  # a metaclass of somebody else's
            both: Any = type("_SharedToo", (_Shared, type(base)), {})
            _CLASSES[base] = both(f"Parametrized{base.__name__}", (base,), members)
    return _CLASSES[base]


def __getattr__(name: str) -> type[nn.Module]:
    """Find the class of a pickled module by the name that :func:`_class_for` gave it."""
    if name.startswith(_PREFIX):
        module, _, qualified = name.removeprefix(_PREFIX).replace("/", ".").partition("|")
        base: Any = importlib.import_module(module)
        for part in qualified.split("."):
            base = getattr(base, part)
        if isinstance(base, type) and issubclass(base, nn.Module):
            return _class_for(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _setstate(self: nn.Module, state: dict[str, Any]) -> None:
    """Restore a pickled module: the names must be properties of the class before anything reads them."""
    nn.Module.__setstate__(self, state)
    adopt(self)
    base: Any = plain_class(self)
    base.__setstate__(self, state)


def is_adopted(kind: type) -> bool:
    """Return whether a class is one of those that :func:`adopt` makes: their maps are those of the class below.

    Examples:
        >>> is_adopted(nn.Linear)
        False
    """
    return any(kind is own for own in _CLASSES.values())


def _setattr(self: nn.Module, name: str, value: Any) -> None:
    """Assign a weight also where it comes as a parameter, as torch's layers take it."""
    if isinstance(value, nn.Parameter) and name in vars(self).get(_GUARDED, ()):
        value = value.detach()
    nn.Module.__setattr__(self, name, value)


# ----------------------------------------------------------------------------------------------------------------- properties


def _weight_property(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        chains: Any = self._modules.get("parametrizations")
        if chains is None or name not in chains:
            for store in (self._parameters, self._buffers, self._modules):
                if name in store:
                    return store[name]  # pyright: ignore[reportReturnType]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        chain = chains[name]
        if torch.compiler.is_compiling():
            return chain()
        if is_foldable(chain):
            weight = folded(chain, compute)
        else:
            weight = _cached(self, name, chain) if P._cache_enabled else compute(chain)  # noqa: SLF001 torch has no public question
        guarded = type(weight) is Tensor and name in vars(self).get(_GUARDED, ())
        return weight.as_subclass(_ComputedWeight) if guarded else weight

    def set_original(self: nn.Module, value: Tensor) -> None:
        chains: Any = self._modules.get("parametrizations")
        if chains is None or name not in chains:
            nn.Module.__setattr__(self, name, value)
        else:
            shape = vars(self).get(_GUARDED, {}).get(name)
            if shape is not None and getattr(value, "shape", None) != shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(
                    f"'{name}' of this {plain_class(self).__name__} has the shape {tuple(shape)}, got {found}; assign a tensor of "
                    "that shape, which is moved within the limit."
                )
            chains[name].right_inverse(value.detach().clone())  # torch would share the memory of the value

    return property(get, set_original)


def _cached(module: nn.Module, name: str, chain: nn.Module) -> Tensor:
    """Return the weight of this ``P.cached()`` region, computed anew when anything that it depends on has changed."""
    cache: Any = P._cache  # noqa: SLF001 torch has no public access
    key = (id(module), name)
    sources = sources_of(chain)
    if key not in cache or not _unchanged(sources, cache[*key, "sources"]):
        cache[key] = compute(chain)
        cache[*key, "sources"] = [_Source.of(t) for t in sources]  # afterwards, for some maps have a state that moves
    return cache[key]


@dataclass(frozen=True, eq=False)
class _Source:
    """A tensor that a weight of a ``P.cached()`` region depends on, and its numbers where comparing them costs no waiting."""

    tensor: Tensor
    stamp: tuple[int, int]
    numbers: Tensor | None

    @classmethod
    def of(cls, t: Tensor) -> _Source:
        return cls(t, _stamp(t), t.detach().clone() if t.device.type == "cpu" else None)

    def is_still(self, t: Tensor) -> bool:
        same = self.tensor is t and self.stamp == _stamp(t)
        return same and (self.numbers is None or same_numbers(self.numbers, t))


def _stamp(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t._version  # noqa: SLF001 torch has no public access


def _unchanged(sources: list[Tensor], known: list[_Source]) -> bool:
    return len(sources) == len(known) and all(one.is_still(t) for one, t in zip(known, sources, strict=True))


class _ComputedWeight(Tensor):
    """A weight that was just computed: reading it gives plain tensors, writing into it is refused, for it would be lost."""

    @classmethod
    def __torch_function__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` as on a plain tensor, unless it writes."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 as torch's own subclasses do
            if args and type(args[0]) is cls:
                name = getattr(func, "__name__", "")
                if name in _UNWRAPPED:
                    return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
                if name == "__get__" and getattr(func, "__self__", None) is _DATA:
                    return func(*args, **kwargs).clone().as_subclass(cls)  # a write through .data would be lost as well
                if name in _READERS:  # what they give shares its memory with somebody who writes past all of this
                    return func(args[0].as_subclass(Tensor).clone(), *args[1:], **kwargs)
                if _writes(func, name):
                    raise RuntimeError(_LOST)
            if _writes_into(cls, func, args, kwargs):
                raise RuntimeError(_LOST)
            if all(kind is cls for kind in types):
                return func(*args, **kwargs)
            args, kwargs = tree_map_only(cls, _plain, (args, kwargs))
        return func(*args, **kwargs)  # somebody else's subclass decides  # pyright: ignore[reportCallIssue]


def _plain(weight: Tensor) -> Tensor:
    return weight.as_subclass(Tensor)  # pyright: ignore[reportReturnType]


def _out_of_place(name: str) -> Callable[[Tensor, Any], Any]:
    """Return ``a op= b`` as ``a = a op b``: ``layer.weight *= 2`` goes on to assign the result."""
    return lambda self, other: getattr(self, f"__{name}__")(other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_ComputedWeight, f"__i{_name}__", _out_of_place(_name))

_DATA: Any = Tensor.data
_READERS = frozenset({"numpy", "__array__", "__dlpack__"})
_UNWRAPPED = frozenset({"__repr__", "__format__", "__deepcopy__", "__reduce_ex__"})
_HARMLESS = frozenset({"requires_grad_", "share_memory_"})
_LOST = (
    "this weight is computed from an unconstrained original, so writing into it would have no effect. "
    "Assign the attribute instead (layer.weight = value; the value is moved within the limit), "
    "or call stableopt.nn.release(model) first."
)


def _writes(func: Callable[..., Any], name: str) -> bool:
    """Return whether a method assigns to its tensor."""
    return name == "__setitem__" or (name == "__set__" and getattr(func, "__self__", None) is _DATA)


def _writes_into(cls: type, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a function is told by its arguments to write into a computed weight, as those of ``nn.init`` are."""
    name = getattr(func, "__name__", "")
    if kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS):
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        return type(first) is cls or (isinstance(first, list | tuple) and any(type(t) is cls for t in first))
    out = kwargs.get("out")
    return any(type(o) is cls for o in (out if isinstance(out, tuple) else (out,)))


# ------------------------------------------------------------------------------------------------------------ recurrent layers


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    """Return the weights that the kernels get, computed now; during one forward map, once."""
    known = vars(self).get("_stableopt_weights")
    return known if known is not None else [getattr(self, name) for name in self._flat_weights_names]


def _forward_once(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    """Run the forward map with the weights computed once."""
    weights = [
        w.as_subclass(Tensor) if type(w) is _ComputedWeight else w
        for w in (getattr(self, name) for name in self._flat_weights_names)
    ]
    vars(self)["_stableopt_weights"] = weights
    try:
        base: Any = plain_class(self)
        return base.forward(self, *args, **kwargs)
    finally:
        del vars(self)["_stableopt_weights"]


# --------------------------------------------------------------------------------------------------------------- linear layers


def _forward_linear(self: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 the name that torch gives it
    """Run the linear map; a weight map that can multiply without making its weight does."""
    chains: Any = self._modules.get("parametrizations")
    chain = chains._modules.get("weight") if chains is not None else None  # noqa: SLF001 without building a list
    cached = P._cache_enabled  # noqa: SLF001 torch has no public question
    if chain is not None and len(chain) == 1 and chain.is_tensor and not (torch.compiler.is_compiling() or cached):
        multiply = getattr(chain[0], "multiply", None)
        product = None if multiply is None else multiply(chain.original, input, self.bias)
        if product is not None:
            return product
    return F.linear(input, self.weight, self.bias)


# ------------------------------------------------------------------------------------------------------------ recurrent layers


def _ignore(self: nn.RNNBase, *_: object) -> None:
    """Do nothing: the list of weights is computed, never stored."""


def restored(module: nn.Module) -> None:
    """Let a layer whose parametrizations are gone be as before; a recurrent one uses its own parameters again.

    Examples:
        >>> restored(nn.RNN(1, 1))
    """
    if not P.is_parametrized(module):
        vars(module).pop(_GUARDED, None)
        order = vars(module).pop(_ORDER, ())
        own = module._parameters  # noqa: SLF001 torch has no public access
        for name in [*(name for name in order if name in own), *(name for name in list(own) if name not in order)]:
            own[name] = own.pop(name)
    if isinstance(module, nn.RNNBase) and not P.is_parametrized(module):
        names = module._flat_weights_names  # noqa: SLF001 torch has no public access
        module._flat_weights = [getattr(module, name) for name in names]  # noqa: SLF001
        module._flat_weight_refs = [weakref.ref(w) for w in module._flat_weights]  # noqa: SLF001
        module.flatten_parameters()
