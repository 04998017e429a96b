"""The fractional form of a chain at one sample, with a bound of all rounding, and the two coarser bounds of its norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stableopt.linalg import Bound
from stableopt.linalg.proved import gamma, gram_upper
from stableopt.lyapunov.profile.nonsmooth.chain import Call, NotAChain, matrix_of
from stableopt.lyapunov.profile.nonsmooth.fractional import Block, Fractional
from stableopt.lyapunov.profile.nonsmooth.slopes import group_options, groups_of, slopes_of
from stableopt.nn.activations import GroupSort

__all__ = ["Assembled", "Layer", "assemble", "layers_of"]

Array = NDArray[np.float64]

_TINY = 2.0**-1074


@dataclass(frozen=True)
class Layer:
    """A layer of a chain at all samples.

    Args:
        name: path of the module.
        matrix: of an affine layer, else None.
        magnitude: moduli from which its entries are summed.
        roundings: of each entry.
        lower: smallest slopes of an elementwise activation, of shape ``(samples, units)``.
        upper: largest ones.
        chosen: those that automatic differentiation takes.
        orders: of a layer that sorts: for each sample and group its units and the orders that they may have.
        sorted_as: for each sample and group what automatic differentiation takes, a matrix.
    """

    name: str
    matrix: Array | None = None
    magnitude: Array | None = None
    roundings: int = 0
    lower: Array | None = None
    upper: Array | None = None
    chosen: Array | None = None
    orders: tuple[tuple[tuple[tuple[int, ...], list[tuple[int, ...]]], ...], ...] = ()
    sorted_as: tuple[tuple[Array, ...], ...] = ()

    @property
    def units(self) -> int:
        """How many units or groups of it one sample has."""
        return 0 if self.matrix is not None else len(self.orders[0]) if self.orders else self._slopes()[0].shape[1]

    def undecided(self, sample: int) -> int:
        """How many of them are not decided at a sample."""
        if self.matrix is not None:
            return 0
        if self.orders:
            return sum(len(options) > 1 for _, options in self.orders[sample])
        lower, upper, _ = self._slopes()
        return int((lower[sample] < upper[sample]).sum())

    def _slopes(self) -> tuple[Array, Array, Array]:
        if self.lower is None or self.upper is None or self.chosen is None:
            raise ValueError(f"layer {self.name!r} has no slopes.")
        return self.lower, self.upper, self.chosen

    def slopes(self, sample: int) -> tuple[Array, Array, Array]:
        """Return the smallest, largest and chosen slopes of an elementwise activation at a sample.

        Raises:
            ValueError: if it is none.
        """
        lower, upper, chosen = self._slopes()
        return lower[sample], upper[sample], chosen[sample]


@dataclass(frozen=True)
class Assembled:
    r"""What is known at one sample.

    Args:
        form: the fractional form.
        absolute: an upper bound of :math:`\|\,|A_m| \bar D_m \cdots \bar D_1 |A_0|\,\|_2`, :math:`\bar D` the largest moduli of
            slopes.
        product: an upper bound of :math:`\prod \|A_i\|_2 \prod \|\bar D_i\|_2`.
        roundings: on a path; they are relative to ``absolute``.
    """

    form: Fractional
    absolute: float
    product: float
    roundings: int


def layers_of(calls: list[Call], reach: float) -> list[Layer]:
    r"""Return the layers of a chain as matrices and slopes.

    Args:
        calls: of the model.
        reach: in units of the root mean square of the inputs of an activation, over the whole batch.

    Raises:
        NotAChain: if a layer mixes samples, or its matrix is too large.
        ValueError: if a weight or a pre-activation is NaN or infinite.
    """
    samples = calls[0].z.shape[0]
    layers = []
    for call in calls:
        if call.z.ndim < 2 or call.z.shape[0] != samples:
            raise NotAChain(f"layer {call.name!r} gets a batch of another size, or samples without a dimension")
        if not bool(call.z.isfinite().all()):
            raise ValueError(f"no bound holds where the input of layer {call.name!r} is NaN or infinite.")
        shape = tuple(call.z.shape[1:])
        if call.part is not None:
            part = call.part
            matrix, magnitude = matrix_of(part.apply, shape), matrix_of(part.magnitude, shape)
            if not np.isfinite(magnitude).all():
                raise ValueError(f"no bound holds for layer {call.name!r} with NaN or infinite weights.")
            layers.append(Layer(call.name, matrix, magnitude, part.roundings))
            continue
        z = call.z.detach()
        distance = reach * float(torch.linalg.vector_norm(z.double())) / math.sqrt(z.numel())
        layers.append(_sorting(call, z, distance) if call.pieces is None else _elementwise(call, z, distance))
    return layers


def _elementwise(call: Call, z: Tensor, distance: float) -> Layer:
    assert call.pieces is not None  # noqa: S101 for the type checker
    lower, upper = call.pieces.interval(z, distance)
    chosen = slopes_of(call.module, z)
    if bool(((chosen < lower) | (chosen > upper)).any()):
        raise NotAChain(f"automatic differentiation takes a slope of {call.name!r} that none of its pieces has")
    rows = [t.reshape(len(z), -1).cpu().numpy() for t in (lower, upper, chosen)]
    return Layer(call.name, lower=rows[0], upper=rows[1], chosen=rows[2])


def _sorting(call: Call, z: Tensor, distance: float) -> Layer:
    module = call.module
    assert isinstance(module, GroupSort)  # noqa: S101 for the type checker
    groups = groups_of(module, tuple(z.shape[1:]))
    values = z.double().reshape(len(z), -1).cpu()[:, groups]  # (samples, groups, g)
    orders = tuple(
        tuple((tuple(group), group_options(tuple(v), distance)) for group, v in zip(groups.tolist(), row, strict=True))
        for row in values.tolist()
    )
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        output = module(leaf).reshape(len(z), -1)[:, groups]
        rows = [torch.autograd.grad(output[..., k].sum(), leaf, retain_graph=True)[0] for k in range(groups.shape[1])]
    taken = torch.stack([row.double().reshape(len(z), -1).cpu()[:, groups] for row in rows], 2).numpy()
    return Layer(call.name, orders=orders, sorted_as=tuple(tuple(sample) for sample in taken))


_New = tuple[list[tuple[Block, tuple[int, ...]]], float, Array, Array]
"""Undecided blocks with their units in the layer; the norm of the layer; its reference, and the largest moduli of its entries."""


def _blocks(layer: Layer, sample: int, start: int) -> _New:
    return _group_blocks(layer, sample, start) if layer.orders else _unit_blocks(layer, sample, start)


def _unit_blocks(layer: Layer, sample: int, start: int) -> _New:
    lower, upper, chosen = layer.slopes(sample)
    blocks = []
    reference, size = lower.copy(), np.abs(lower)
    for i, unit in enumerate(np.flatnonzero(lower < upper)):
        options = np.array([lower[unit], upper[unit]]).reshape(2, 1, 1)
        block = Block((start + i,), options, chosen[unit].reshape(1, 1))
        blocks.append((block, (int(unit),)))
        reference[unit] = block.reference.item()
        size[unit] = abs(block.reference.item()) + block.radius.item()
    largest = float(np.maximum(np.abs(lower), np.abs(upper)).max(initial=0.0))
    return blocks, largest, reference, size


def _group_blocks(layer: Layer, sample: int, start: int) -> _New:
    blocks, references, sizes = [], [], []
    for (units, orders), chosen in zip(layer.orders[sample], layer.sorted_as[sample], strict=True):
        options = np.stack([np.eye(len(units))[list(order)] for order in orders])
        block = Block(tuple(range(start, start + len(units))), options, chosen)
        references.append(block.reference)
        sizes.append(np.abs(block.reference) + block.radius)
        if len(orders) > 1:
            blocks.append((block, units))
            start += len(units)
    return blocks, 1.0, np.stack(references), np.stack(sizes)


def _apply(by: Array, columns: Array, layer: Layer, sample: int) -> Array:
    if by.ndim == 1:
        return by[:, None] * columns
    places = np.array([units for units, _ in layer.orders[sample]])
    result = np.empty_like(columns)
    result[places] = by @ columns[places]
    return result


class _Path:
    """What has come of a chain so far: columns of the input, and of what is added at each undecided unit."""

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._columns, self._moduli, self._product = np.eye(inputs), np.eye(inputs), Bound.point(1.0)
        self._blocks: list[Block] = []
        self._rows: list[Array] = []
        self._roundings, self._operations, self._amplified = 0, 0.0, 1.0

    def through(self, matrix: Array, magnitude: Array, roundings: int) -> None:
        """Go through an affine layer."""
        self._columns, self._moduli = matrix @ self._columns, magnitude @ self._moduli
        size = float(magnitude.max(initial=0.0)) * magnitude.size**0.5  # at least the norm
        self._product = self._product * (Bound.point(gram_upper(matrix[None])) + gamma(roundings) * size * 2.0)
        self._roundings += matrix.shape[1] + roundings + 2
        self._operations += float(matrix.size)
        self._amplified *= max(1.0, size * 2.0)

    def across(self, layer: Layer, sample: int) -> None:
        """Go through an activation."""
        new, norm, reference, size = _blocks(layer, sample, self._units())
        outside = [u for _, units in new for u in units]
        if new:
            self._rows.append(self._columns[outside])
            self._blocks += [block for block, _ in new]
        self._columns = _apply(reference, self._columns, layer, sample)
        self._moduli = _apply(size, self._moduli, layer, sample)
        if new:
            injected = np.zeros((len(self._columns), len(outside)))
            injected[outside, np.arange(len(outside))] = 1.0
            self._columns = np.concatenate([self._columns, injected], 1)
        self._product = self._product * norm
        self._roundings += 4 + size.shape[-1] * (size.ndim > 1)
        self._amplified *= max(1.0, norm * 2.0)

    def end(self) -> Assembled:
        """Return the form, and bounds of all that was rounded."""
        inputs, units, depth = self._inputs, self._units(), len(self._rows)
        P = np.concatenate([row[:, :inputs] for row in self._rows]) if self._rows else np.zeros((0, inputs))
        G, start = np.zeros((units, units)), 0
        for row in self._rows:
            G[start : start + len(row), : row.shape[1] - inputs] = row[:, inputs:]
            start += len(row)
        K = self._roundings + (depth + 3) * (9 * units + 24)  # the chain, and the series up to three times
        slack = 1.0 + 4.0 * gamma(K)
        operations = self._operations + 8.0 * (len(self._columns) + units + inputs) ** 2
        tiny = 16.0 * _TINY * operations * (inputs + units + 1) * self._amplified  # what may underflow
        absolute = (Bound.point(gram_upper(self._moduli[None])) * slack + tiny).upper
        error = (Bound.point(gamma(K)) * absolute * slack + tiny).upper
        form = Fractional(self._columns[:, :inputs], self._columns[:, inputs:], G, P, tuple(self._blocks), depth, error)
        return Assembled(form, absolute, (self._product + tiny).upper, K)

    def _units(self) -> int:
        return sum(len(block.units) for block in self._blocks)


def assemble(layers: list[Layer], sample: int, inputs: int) -> Assembled:
    """Return the fractional form of a chain at one sample, and the coarser bounds.

    Args:
        layers: of the chain.
        sample: its place in the batch.
        inputs: numbers in it.
    """
    path = _Path(inputs)
    for layer in layers:
        if layer.matrix is not None and layer.magnitude is not None:
            path.through(layer.matrix, layer.magnitude, layer.roundings)
        else:
            path.across(layer, sample)
    return path.end()
