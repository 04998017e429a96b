r"""Margins on a ball around one input: larger radii than the global constants give, for networks with activations bent at 0.

On the ball :math:`\|x' - x\| \le r` every value before an activation lies in an interval: from intervals through the layers, from
the constant of each entry times :math:`r`, and from linear bounds. An activation whose interval has no kink is linear there;
otherwise it lies between two lines. Walking back through the network with the line that counts, each output difference is at least
:math:`a^\top x' + c \ge a^\top x + c - \|a\|_* r`: the joint linear part of all layers is measured once, not layer by layer.

Rounding is counted as in :mod:`stableopt.linalg.proved`: a computed coefficient is the coefficient, and what the exact one would
have given on top is bounded by :math:`\gamma_n |a| |L| |z|` with the largest :math:`|z|` on the ball, and subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from stableopt.certify.execute import apply
from stableopt.certify.program import Node, Program
from stableopt.errors import UncertifiableError
from stableopt.linalg.proved import gamma

__all__ = ["local_margins", "local_radii"]

Pair: TypeAlias = tuple[Tensor, Tensor]

_LINEAR = frozenset(
    {"linear", "conv", "affine", "scale", "reshape", "permute", "mean", "pad", "slice", "pool", "take", "center"}
)
_TINY = 2.0**-900
_U = 2.0**-52
_ROWS = 2**24
"""Coefficients that are held at once."""


def local_radii(program: Program, x: Tensor, radii: Tensor, *, steps: int = 12, refine: int = 512) -> Tensor:
    r"""Enlarge certified radii by bounds that hold on the ball alone.

    Args:
        program: a published program in ``"l2"`` or ``"linf"``: one value after another, of linear operations and activations that
            are linear on either side of 0 (``relu``, ``leaky_relu``, ``abs``, ``identity``).
        x: inputs, shape ``(batch, *shape)``.
        radii: radii that are certified already, shape ``(batch,)``; 0 where nothing is.
        steps: how many radii are tried for each input.
        refine: layers of so many units at most get linear bounds of their own; larger ones intervals.

    Returns:
        Radii, float64, at least ``radii``: the exact network predicts the class of ``x`` for all inputs at this distance or less.

    Raises:
        UncertifiableError: if the program has an operation that this cannot follow.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> from stableopt.certify.publish import publish
        >>> graph = Builder((1,))
        >>> value = graph.add(
        ...     "linear",
        ...     graph.input,
        ...     weight=torch.tensor([[1.0], [1.0]]),
        ...     bias=torch.tensor([0.0, -9.0]),
        ...     transposed=False,
        ... )
        >>> value = graph.add("activation", value, name="relu")
        >>> value = graph.add(
        ...     "linear", value, weight=torch.tensor([[1.0, 0.0], [0.0, 99.0]]), bias=None, transposed=False
        ... )
        >>> start = torch.tensor([1 / 99], dtype=torch.float64)  # 1 divided by the constant of the difference
        >>> bool(local_radii(publish(graph.program()), torch.tensor([[1.0]]), start) > 0.9)  # unit 2 is off until 9
        True
    """
    plan = _plan(program)
    x = x.detach().to("cpu", torch.float64)
    with torch.no_grad():
        best = radii.detach().to("cpu", torch.float64).clone()
        low, high, reach = best.clone(), torch.full_like(best, torch.inf), best.clamp(min=1e-6) * 1.5
        for _ in range(steps):
            good = (_margins(plan, program.norm, x, reach, refine)[0] > 0.0).all(dim=1) & (reach > 0.0)
            best = torch.where(good & (reach > best), reach, best)
            low, high = torch.where(good, reach, low), torch.where(good, high, reach)
            reach = torch.where(high.isinf(), 2.0 * low, (low + high) / 2.0)
    return best


def local_margins(program: Program, x: Tensor, radius: Tensor | float, *, refine: int = 512) -> Tensor:
    r"""Bound from below how far the predicted output of ``x`` is above each other one, on the whole ball around ``x``.

    Args:
        program: as for :func:`local_radii`.
        x: inputs, shape ``(batch, *shape)``.
        radius: radius of the balls, a number or one for each input.
        refine: as for :func:`local_radii`.

    Returns:
        Shape ``(batch, classes)``, float64; infinity for the class of ``x`` itself.

    Raises:
        UncertifiableError: as :func:`local_radii`.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> from stableopt.certify.publish import publish
        >>> graph = Builder((2,))
        >>> _ = graph.add("linear", graph.input, weight=torch.eye(2), bias=None, transposed=False)
        >>> margins = local_margins(publish(graph.program()), torch.tensor([[3.0, 1.0]]), 1.0)
        >>> bool(0.5857 < margins[0, 1] <= 2 - 2**0.5)
        True
    """
    x = x.detach().to("cpu", torch.float64)
    radii = torch.as_tensor(radius, dtype=torch.float64).expand(len(x))
    with torch.no_grad():
        lower, label = _margins(_plan(program), program.norm, x, radii, refine)
        classes = torch.full((len(x), lower.shape[1] + 1), torch.inf, dtype=torch.float64)
        return classes.scatter_(1, _others(label, lower.shape[1] + 1), lower)


@dataclass(frozen=True, eq=False)
class _Step:
    """One operation: a linear one with its tensors, or an activation with the slopes on either side of 0."""

    node: Node
    tensors: dict[str, Tensor]
    before: tuple[int, ...]
    after: tuple[int, ...]
    slopes: tuple[float, float] | None
    shift: Tensor
    """The bias as an output, without the batch."""
    entry: Tensor
    """A bound of the Lipschitz constant of each entry of its output."""

    @property
    def rounding(self) -> float:
        """A sum has at most so many terms, forwards and backwards."""
        return gamma(2 * (torch.Size(self.before).numel() + torch.Size(self.after).numel()) + 64) * (1.0 + 2.0**-20)

    def run(self, z: Tensor, *, absolute: bool = False) -> Tensor:
        """Apply the linear part, or that with the moduli of all coefficients."""
        kept = {k: v.abs() if absolute else v for k, v in self.tensors.items()}
        node = {k: None if k == "bias" else v for k, v in self.node.items()}
        if absolute and node["op"] == "scale":
            return z * abs(self.node["factor"])
        if absolute and node["op"] == "center":
            return z + z.mean(dim=-1, keepdim=True)
        return apply(node, kept, [z])

    def back(self, a: Tensor) -> Tensor:
        """Apply the transpose of the linear part to coefficients of shape (batch, rows, *after)."""
        if self.node["op"] == "linear":
            weight = self.tensors[self.node["weight"]]
            return a @ (weight.T if self.node["transposed"] else weight)
        with torch.enable_grad():
            z = torch.zeros(a.shape[0] * a.shape[1], *self.before, dtype=torch.float64, requires_grad=True)
            (out,) = torch.autograd.grad(self.run(z), z, a.reshape(-1, *self.after))
        return out.reshape(*a.shape[:2], *self.before)


def _plan(program: Program) -> list[_Step]:
    """Check that the program can be followed, and collect what is the same for every input."""
    if program.norm not in {"l2", "linf"}:
        raise UncertifiableError(f"local bounds are for balls of the norm l2 or linf, not {program.norm}.")
    steps, shape, constant = list[_Step](), program.shape, 1.0
    entry = torch.ones(shape, dtype=torch.float64)
    for index, node in enumerate(program.nodes):
        bent = _bent(node)
        average = node["op"] != "pool" or node["name"] == "avg"
        if node["in"] != [index] or (bent is None and (node["op"] not in _LINEAR or not average)):
            raise UncertifiableError(
                f"operation {index} ('{node['op']}' {node.get('name', '')}) cannot be followed on a ball: local bounds are for "
                "chains of linear operations and relu, leaky_relu, abs or identity."
            )
        tensors = {v: program.tensors[v].double() for v in node.values() if isinstance(v, str) and v in program.tensors}
        shift = torch.zeros(shape, dtype=torch.float64)
        if bent is None:
            shift = apply(node, tensors, [shift[None]])[0]
        step = _Step(node, tensors, shape, tuple(shift.shape), bent, shift, entry)
        entry = entry * max(map(abs, bent)) if bent else _entries(step, entry, constant, program.norm)
        constant = constant * node["bound"] * (1.0 + _U)
        entry = entry.clamp(max=constant) * (1.0 + 4.0 * _U)
        steps.append(replace(step, entry=entry))
        shape = step.after
    return steps


def _bent(node: Node) -> tuple[float, float] | None:
    """Return the slopes of an activation below and above 0, if it is linear on either side."""
    if node["op"] != "activation":
        return None
    known = {"relu": (0.0, 1.0), "abs": (-1.0, 1.0), "identity": (1.0, 1.0)}
    return (node["slope"], 1.0) if node["name"] == "leaky_relu" else known.get(node["name"])


def _entries(step: _Step, entry: Tensor, constant: float, norm: str) -> Tensor:
    """Bound the Lipschitz constant of each entry after a linear operation: by those before it, or by the constant of the whole."""
    whole = step.run(entry[None], absolute=True)[0]
    weight = step.tensors.get(step.node.get("weight", ""))
    if weight is not None and step.node["op"] == "linear" and step.node["transposed"]:
        weight = weight.T
    if norm == "l2" and weight is not None and (step.node["op"] == "linear" or _apart(step.node)):
        rows = _length(weight.flatten(1))
        shape = (-1,) if step.node["op"] == "linear" else (-1, *(1,) * (len(step.after) - 1))
        whole = torch.minimum(whole, (constant * rows.reshape(shape)).expand(step.after))
    return whole * (1.0 + 2.0 * step.rounding) + _TINY


def _apart(node: Node) -> bool:
    """Return whether each tap of an output of a convolution reads another pixel; on a small circle two may meet."""
    return not node["transposed"] and node["padding_mode"] != "circular"


def _length(rows: Tensor) -> Tensor:
    """Bound the 2-norm along the last axis from above; the largest entry is taken out, so that no square underflows."""
    size = rows.abs().amax(dim=-1, keepdim=True)
    size = torch.where(size == 0.0, 1.0, size)
    inner = (rows / size).square().sum(dim=-1).sqrt() * (1.0 + gamma(2 * rows.shape[-1] + 16))
    return torch.nextafter(inner * size.squeeze(-1), torch.full_like(inner, torch.inf))


@dataclass(eq=False)
class _Walk:
    """The bounds on the balls so far: for each operation the largest moduli before it, and the lines of an activation."""

    plan: Sequence[_Step]
    norm: str
    x: Tensor
    radii: Tensor
    sizes: list[Tensor] = field(default_factory=list[Tensor])
    lines: list[tuple[Pair, Pair] | None] = field(default_factory=list["tuple[Pair, Pair] | None"])

    def lower(self, a: Tensor, count: int) -> Tensor:
        """Bound a . z from below on the balls, z the value after ``count`` operations, a of shape (batch, rows, *after)."""
        c = torch.zeros(a.shape[:2], dtype=torch.float64)
        for index in reversed(range(count)):
            step, size = self.plan[index], self.sizes[index][:, None]
            line = self.lines[index]
            if line is not None:
                (low, low_at), (up, up_at) = line
                plus, minus = a.clamp(min=0.0), a.clamp(max=0.0)
                loss = a.abs() * (
                    (low.abs().maximum(up.abs()))[:, None] * size + low_at.abs()[:, None] + up_at.abs()[:, None]
                )
                c = _down(c + _total(plus * low_at[:, None] + minus * up_at[:, None]), _total(loss), step.rounding)
                a = plus * low[:, None] + minus * up[:, None]
            else:
                reach = step.run(self.sizes[index], absolute=True)[:, None]
                c = _down(c + _total(a * step.shift), _total(a.abs() * (reach + step.shift.abs())), step.rounding)
                a = step.back(a)
        flat, x = a.flatten(2), self.x.flatten(1)[:, None]
        dual = _length(flat) if self.norm == "l2" else flat.abs().sum(dim=2)
        loss = (flat.abs() * x.abs()).sum(dim=2) + dual * self.radii[:, None]
        return _down(c + (flat * x).sum(dim=2) - dual * self.radii[:, None], loss, gamma(2 * flat.shape[2] + 64))


def _total(values: Tensor) -> Tensor:
    return values.flatten(2).sum(dim=2)


def _down(value: Tensor, loss: Tensor, rounding: float) -> Tensor:
    """Lower a computed value by a multiple of what was rounded in it, and by its own last additions."""
    return value - (loss * (2.0 * rounding) + value.abs() * (8.0 * _U)) - _TINY


def _margins(plan: Sequence[_Step], norm: str, x: Tensor, radii: Tensor, refine: int) -> tuple[Tensor, Tensor]:
    """Return lower bounds of the differences of the predicted output and the others, and the predicted class."""
    width = max(1, min(refine, max(torch.Size(step.after).numel() for step in plan)))
    size = max(1, _ROWS // (width * max(torch.Size(step.before).numel() for step in plan)))
    parts = [
        _margins_of(_Walk(plan, norm, rows, r), refine)
        for rows, r in zip(x.split(size), radii.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _margins_of(walk: _Walk, refine: int) -> tuple[Tensor, Tensor]:
    plan, x, radii = walk.plan, walk.x, walk.radii
    middle, wide, at, error = x, torch.zeros_like(x) + _per_row(radii, x), x, torch.zeros_like(x)
    for index, step in enumerate(plan):
        walk.sizes.append(
            ((middle.abs() + wide) * (1.0 + 4.0 * _U)).minimum(_reach(at, error, plan, index, radii)) + _TINY
        )
        walk.lines.append(None)
        if step.slopes is None:
            wide, error = (_spread(step, z, w) for z, w in ((middle, wide), (at, error)))
            middle, at = step.run(middle) + step.shift, step.run(at) + step.shift
        else:
            low, high = _interval(walk, index, (middle, wide), (at, error), refine)
            walk.lines[index] = _lines(step.slopes, low, high)
            middle, wide = _image(step.slopes, low, high)
            at, error = _bend(step.slopes, at), _bent_error(step.slopes, at, error)
    label = at.argmax(dim=1)
    count = at.shape[1]
    eye = torch.eye(count, dtype=torch.float64)
    return walk.lower(eye[label][:, None] - eye[_others(label, count)], len(plan)), label


def _others(label: Tensor, count: int) -> Tensor:
    """Return the other classes of each row, shape (batch, count - 1)."""
    every = torch.arange(count - 1).expand(len(label), -1)
    return every + (every >= label[:, None])


def _per_row(radii: Tensor, like: Tensor) -> Tensor:
    return radii.reshape(-1, *(1,) * (like.ndim - 1))


def _spread(step: _Step, z: Tensor, wide: Tensor) -> Tensor:
    """Bound how far the exact output of a linear operation is from the computed one, for inputs within ``wide`` of z."""
    moduli = step.run(z.abs(), absolute=True) + step.shift.abs()
    return (step.run(wide, absolute=True) + moduli * (2.0 * step.rounding)) * (1.0 + 2.0 * step.rounding) + _TINY


def _reach(at: Tensor, error: Tensor, plan: Sequence[_Step], index: int, radii: Tensor) -> Tensor:
    """Bound the moduli of the value before an operation by its value at x and the constant of each entry."""
    entry = plan[index - 1].entry if index else torch.ones_like(at[0])
    return (at.abs() + error + _per_row(radii, at) * entry) * (1.0 + 8.0 * _U)


def _interval(walk: _Walk, index: int, box: Pair, center: Pair, refine: int) -> Pair:
    """Return lower and upper bounds of the value before an activation."""
    (middle, wide), (at, error) = box, center
    entry = walk.plan[index - 1].entry if index else torch.ones_like(at[0])
    spread = (error + _per_row(walk.radii, at) * entry) * (1.0 + 8.0 * _U)
    slack = 8.0 * _U
    low = torch.maximum(middle - wide - slack * (middle.abs() + wide), at - spread - slack * (at.abs() + spread))
    high = torch.minimum(middle + wide + slack * (middle.abs() + wide), at + spread + slack * (at.abs() + spread))
    size = at[0].numel()
    if index > 0 and size <= refine and any(line is not None for line in walk.lines[:index]):
        rows = torch.eye(size, dtype=torch.float64).reshape(1, size, *at.shape[1:]).expand(len(at), -1, *at.shape[1:])
        low = torch.maximum(low, walk.lower(rows, index).reshape(at.shape))
        high = torch.minimum(high, -walk.lower(-rows, index).reshape(at.shape))
    return low, high


def _bend(slopes: tuple[float, float], v: Tensor) -> Tensor:
    return torch.where(v < 0.0, slopes[0] * v, slopes[1] * v)


def _bent_error(slopes: tuple[float, float], at: Tensor, error: Tensor) -> Tensor:
    """Bound how far the exact output of an activation is from the computed one, for an input within ``error`` of ``at``."""
    return max(map(abs, slopes)) * (error * (1.0 + 4.0 * _U) + at.abs() * _U) + _TINY


def _image(slopes: tuple[float, float], low: Tensor, high: Tensor) -> Pair:
    """Return middle and half width of the values of an activation on intervals."""
    ends = torch.stack([_bend(slopes, low), _bend(slopes, high), torch.zeros_like(low)])
    ends[2] = torch.where((low < 0.0) & (high > 0.0), 0.0, ends[0])
    least, most = ends.amin(dim=0), ends.amax(dim=0)
    middle = (least + most) / 2.0
    return middle, torch.maximum(most - middle, middle - least) * (1.0 + 4.0 * _U) + (least.abs() + most.abs()) * (
        4.0 * _U
    ) + _TINY


def _lines(slopes: tuple[float, float], low: Tensor, high: Tensor) -> tuple[Pair, Pair]:
    """Return slope and offset of a line below and of a line above the activation on each interval."""
    below, above = slopes
    zero = torch.zeros_like(low)
    bent = (low < 0.0) & (high > 0.0)
    straight = torch.where(
        low >= 0.0, zero + above, torch.where(high <= 0.0, zero + below, torch.nan)
    )  # NaN proves nothing
    ray = torch.where(high > -low, zero + above, zero + below)  # through the kink, the slope of the longer side
    chord = torch.where(bent, (above * high - below * low) / (high - low), straight)
    gaps = torch.stack(
        [below * low - chord * low, above * high - chord * high]
    )  # offsets at which the chord meets the ends
    error = (chord.abs() + max(map(abs, slopes))) * torch.maximum(-low, high) * (8.0 * _U) + _TINY
    if above >= below:
        first = (torch.where(bent, ray, straight), zero)
        return first, (chord, torch.where(bent, gaps.amax(dim=0) + error, zero))
    second = (torch.where(bent, ray, straight), zero)
    return (chord, torch.where(bent, gaps.amin(dim=0) - error, zero)), second
