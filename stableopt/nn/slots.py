r"""Which tensors of a model are the weights of linear maps, and what linear map each of them is."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.nn.dispatch import named
from stableopt.nn.parametrized import plain_class
from stableopt.nn.weights import Geometry

__all__ = ["Slot", "find_slots", "slots_of"]

_CONVS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_ADJOINT = {"l2": "l2", "linf": "l1", "l1": "linf"}


@dataclass(frozen=True, eq=False)
class Slot:
    """One weight of a model.

    Args:
        path: dotted name of its module.
        module: the module.
        name: name of the parameter.
        geometry: the linear map of one part.
        parts: how many matrices are stacked along the first dimension, such as query, key and value, or the gates of an LSTM;
            each has the limit for itself.
        flat: whether the dimensions after the first count as one, as in a Bilinear form.
        adjoint: whether the module applies the transpose, as an Embedding does to one-hot vectors.

    Examples:
        >>> [slot.key for slot in slots_of(nn.Linear(2, 3), "head")]
        ['head.weight']
    """

    path: str
    module: nn.Module
    name: str
    geometry: Geometry
    parts: int = 1
    flat: bool = False
    adjoint: bool = False

    @property
    def key(self) -> str:
        """Name in the state dict of the plain model."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def where(self) -> str:
        """How a message calls the module."""
        return named(self.module, self.path)

    @property
    def value(self) -> Tensor:
        """The weight as it is used now, detached."""
        return getattr(self.module, self.name).detach()

    def matrices(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Split a weight into the tensors whose norms are limited; views."""
        return tuple((part.flatten(1) if self.flat else part) for part in weight.chunk(self.parts))

    def matrix_norm(self, norm: str) -> str:
        """Return which norm of the stored matrix is the operator norm ``norm`` of the map."""
        return operator_norm_of(norm, adjoint=self.adjoint)

    def fan(self) -> tuple[int, int]:
        """Return the numbers of inputs and outputs that one output and one input see."""
        weight = self.matrices(self.value)[0]
        taps = weight[0, 0].numel() if weight.ndim > 2 else 1
        rows, columns = weight.shape[0], weight.shape[1]
        swap = self.adjoint or self.geometry.kind == "conv_transpose"
        return (rows * taps, columns * taps) if swap else (columns * taps, rows * taps)


def operator_norm_of(norm: str, *, adjoint: bool) -> str:
    r"""Return which norm of the transpose is the norm of a matrix: :math:`\|W^\top\|_\infty = \|W\|_1`.

    Examples:
        >>> operator_norm_of("linf", adjoint=True)
        'l1'
    """
    return _ADJOINT[norm] if adjoint else norm


def find_slots(model: nn.Module, skip: Collection[str | type] = ()) -> Iterator[Slot]:
    """Iterate over the weights of all modules of a model, in the order of ``named_modules``.

    Args:
        model: any module.
        skip: modules to leave alone with everything below: dotted names, or classes.

    Examples:
        >>> model = nn.TransformerEncoderLayer(4, 2, 8)
        >>> [slot.key for slot in find_slots(model, skip=["linear1"])]
        ['self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'linear2.weight']
    """
    for path, module in model.named_modules():
        if not _inside_parametrization(path) and not skipped(model, path, skip):
            yield from slots_of(module, path)


def skipped(model: nn.Module, path: str, skip: Collection[str | type]) -> bool:
    """Return whether a module or one above it is in ``skip``.

    Examples:
        >>> skipped(nn.Sequential(nn.Linear(1, 1)), "0", [nn.Linear])
        True
    """
    names = path.split(".") if path else []
    prefixes = [".".join(names[: i + 1]) for i in range(len(names))]
    kinds = tuple(kind for kind in skip if isinstance(kind, type))
    return any(prefix in skip or isinstance(model.get_submodule(prefix), kinds) for prefix in ["", *prefixes])


def _inside_parametrization(path: str) -> bool:
    return "parametrizations" in path.split(".")


@functools.singledispatch
def slots_of(module: nn.Module, path: str) -> list[Slot]:  # noqa: ARG001 for classes that are registered
    """Return the weights of one module, without those of its children; register a function here for a class of your own.

    Args:
        module: the module.
        path: its dotted name.

    Returns:
        The slots; none for a class that is not known.

    Raises:
        ValueError: if an option of the module does not go with a limited weight.

    Examples:
        >>> [(slot.key, slot.parts) for slot in slots_of(nn.GRU(2, 3), "rnn")]
        [('rnn.weight_ih_l0', 3), ('rnn.weight_hh_l0', 3)]
        >>> slots_of(nn.ReLU(), "")
        []
    """
    return []


@slots_of.register(nn.Linear)
@slots_of.register(nn.Conv1d)
@slots_of.register(nn.Conv2d)
@slots_of.register(nn.Conv3d)
@slots_of.register(nn.ConvTranspose1d)
@slots_of.register(nn.ConvTranspose2d)
@slots_of.register(nn.ConvTranspose3d)
def _(module: nn.Module, path: str) -> list[Slot]:
    weight = module._parameters.get("weight")  # noqa: SLF001 torch has no public accessor without inherited names
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return [Slot(path, module, "weight", Geometry("linear"))]  # refused by its owner, for being lazy
    try:
        return [Slot(path, module, "weight", Geometry.of(module))]
    except UncertifiableError as error:
        raise UncertifiableError(f"in {named(module, path)}: {error}") from None


@slots_of.register(nn.Embedding)
def _(module: nn.Embedding, path: str) -> list[Slot]:
    if module.sparse:
        raise ValueError(
            f"{named(module, path)} has sparse=True: the gradient of a limited weight is dense. Make it with sparse=False."
        )
    if module.max_norm is not None:
        raise ValueError(
            f"{named(module, path)} has max_norm={module.max_norm}, which writes into the weight in each forward map; "
            "set max_norm to None, the limit takes its place."
        )
    return [Slot(path, module, "weight", Geometry("linear"), adjoint=True)]


@slots_of.register(nn.Bilinear)
def _(module: nn.Bilinear, path: str) -> list[Slot]:
    r"""The form :math:`x_1^\top W_k x_2` is the matrix ``(out, in1 * in2)`` applied to :math:`x_1 \otimes x_2`."""
    return [Slot(path, module, "weight", Geometry("linear"), flat=True)]


@slots_of.register(nn.MultiheadAttention)
def _(module: nn.MultiheadAttention, path: str) -> list[Slot]:
    if module._qkv_same_embed_dim:  # noqa: SLF001 torch's own name for it
        return [Slot(path, module, "in_proj_weight", Geometry("linear"), parts=3)]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [Slot(path, module, name, Geometry("linear")) for name in names]


@slots_of.register(nn.RNNBase)
def _(module: nn.RNNBase, path: str) -> list[Slot]:
    names = [name for name in module._flat_weights_names if name.startswith("weight")]  # noqa: SLF001 the only list there is
    gates = _GATES[module.mode]
    return [
        Slot(path, module, name, Geometry("linear"), parts=1 if name.startswith("weight_hr") else gates)
        for name in names
    ]


@slots_of.register(nn.RNNCellBase)
def _(module: nn.RNNCellBase, path: str) -> list[Slot]:
    gates = {nn.LSTMCell: 4, nn.GRUCell: 3}.get(plain_class(module), 1)  # pyright: ignore[reportArgumentType]
    return [Slot(path, module, name, Geometry("linear"), parts=gates) for name in ("weight_ih", "weight_hh")]
