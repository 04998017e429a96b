r"""The set of all products of matrices and uncertain slopes, as one fractional form, and bounds of its norms that count rounding.

A chain :math:`A_m D_m A_{m-1} \cdots D_1 A_0` in which some blocks of the :math:`D_i` are not decided is, with these blocks at a
reference and :math:`\Delta` the block-diagonal matrix of what they are more than that,

.. math:: J(\Delta) = C + S \Delta (I - G\Delta)^{-1} P = C + S\Delta\,(I + G\Delta + (G\Delta)^2 + \cdots)\,P :

:math:`P` from the input to the undecided units, :math:`S` from there to the output, :math:`G` from earlier to later ones. The
series ends after as many terms as there are layers with such units. J is linear in each block, and a norm is convex, so over a
convex hull of options for each block the largest norm is at a choice of options (a *vertex*).

Every entry of a computed J is a sum of products of stored numbers, each off by a factor :math:`1 + \theta`,
:math:`|\theta| \le \gamma_K`, K the largest number of roundings on a path. Hence
:math:`\|\hat J - J\|_2 \le \gamma_K \||J|\|_2`, with :math:`|J|` the same sum of absolute values, for all vertices at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopt.linalg import Bound, spectral_norm
from stableopt.linalg.proved import gamma, gram_upper

__all__ = ["Block", "Fractional"]

Array = NDArray[np.float64]

_ENTRIES = 2**21
"""Of a batch of matrices that is made at once."""
_PASSES = 4
"""Times that a search goes through all blocks."""


@dataclass(frozen=True)
class Block:
    r"""Some units of one layer that are not decided: one with an interval of slopes, or a group that is sorted.

    Args:
        units: their places among all undecided units, ascending.
        options: of shape ``(k, g, g)``: what the block of the layer may be.
        chosen: of shape ``(g, g)``: what it is in automatic differentiation.

    Examples:
        >>> relu = Block((0,), np.array([[[0.0]], [[1.0]]]), np.array([[0.0]]))
        >>> relu.reference, relu.radius
        (array([[0.5]]), array([[0.5]]))
    """

    units: tuple[int, ...]
    options: Array
    chosen: Array

    @functools.cached_property
    def reference(self) -> Array:
        """The middle of the smallest and the largest entry, of shape ``(g, g)``."""
        return (self.options.min(0) + self.options.max(0)) / 2

    @functools.cached_property
    def moves(self) -> Array:
        """The options from the reference, of shape ``(k, g, g)``."""
        return self.options - self.reference

    @functools.cached_property
    def radius(self) -> Array:
        """The largest modulus of an entry of a move."""
        return np.abs(self.moves).max(0)


@dataclass(frozen=True)
class Fractional:
    r"""All :math:`J(\Delta)`, :math:`\Delta` in the convex hull of the options of each block.

    Args:
        C: of shape ``(m, n)``.
        S: of shape ``(m, units)``.
        G: of shape ``(units, units)``, strictly block lower triangular.
        P: of shape ``(units, n)``.
        blocks: with these units, in order.
        depth: number of layers that they are in.
        error: a bound of :math:`\|\hat J - J\|_2` for all J that are computed here; ``math.inf`` where none is known, and then
            nothing is proved.

    Examples:
        >>> one, relu = np.ones((1, 1)), Block((0,), np.array([[[0.0]], [[1.0]]]), np.array([[0.0]]))
        >>> form = Fractional(C=0.5 * one, S=one, G=0.0 * one, P=one, blocks=(relu,), depth=1, error=0.0)
        >>> round(form.chosen().upper, 9), round(form.exact().upper, 9), round(form.interval(), 9)
        (0.0, 1.0, 1.0)
    """

    C: Array
    S: Array
    G: Array
    P: Array
    blocks: tuple[Block, ...]
    depth: int
    error: float

    @property
    def proved(self) -> bool:
        """Whether rounding is counted."""
        return math.isfinite(self.error)

    @property
    def vertices(self) -> int:
        """How many choices of options there are."""
        return math.prod(len(block.options) for block in self.blocks)

    def taken(self) -> Array:
        """Return J as automatic differentiation takes it."""
        return self.at(self._delta([block.chosen - block.reference for block in self.blocks])[None])[0]

    def chosen(self) -> Bound:
        """Enclose the norm of what automatic differentiation gives."""
        return self._norm(self.taken())

    def size(self) -> float:
        """Estimate the norm of the largest moduli of all entries."""
        return _length(np.abs(self.C) + self.radius())

    def exact(self) -> Bound:
        """Enclose the largest norm of all vertices, each of which is computed.

        Examples:
            >>> Fractional(np.eye(2), np.zeros((2, 0)), np.zeros((0, 0)), np.zeros((0, 2)), (), 0, 0.0).exact().proved
            True
        """
        choices = itertools.product(*[range(len(block.options)) for block in self.blocks])
        upper, best, witness = 0.0, -1.0, self.C
        for batch in self._batches(choices):
            J = self.at(batch)
            sizes = _sizes(J)
            upper = max(upper, gram_upper(J, guess=float(sizes.max())))
            if sizes.max() > best:
                best, witness = float(sizes.max()), J[int(sizes.argmax())]
        return self._with_error(spectral_norm(witness).lower, upper)

    def search(self, samples: int, seed: int) -> Bound:
        """Bound the largest norm from below: random vertices, and from the best one better choices of one block after the other.

        Args:
            samples: number of random vertices.
            seed: of them.

        Returns:
            The enclosure of the norm of one vertex.
        """
        if not self.blocks:
            return self._norm(self.C)
        generator = np.random.default_rng(seed)
        counts = np.array([len(block.options) for block in self.blocks])
        drawn = generator.integers(0, counts, size=(max(1, samples), len(counts)))
        sizes = np.concatenate([_sizes(self.at(batch)) for batch in self._batches(map(tuple, drawn.tolist()))])
        choice, best = drawn[int(sizes.argmax())].copy(), float(sizes.max())
        for _ in range(_PASSES):
            start = best
            for i, count in enumerate(counts):
                tries = np.repeat(choice[None], count, 0)
                tries[:, i] = np.arange(count)
                sizes = np.concatenate([_sizes(self.at(batch)) for batch in self._batches(map(tuple, tries.tolist()))])
                choice[i], best = int(sizes.argmax()), float(sizes.max())
            if best <= start:
                break
        return self._norm(self.at(next(self._batches([tuple(choice.tolist())])))[0])

    def interval(self) -> float:
        r"""Bound the largest norm from above by :math:`\|C\|_2 + \|R\|_2`, R the largest moduli of the entries of J - C.

        Examples:
            >>> Fractional(
            ...     2 * np.eye(2), np.zeros((2, 0)), np.zeros((0, 0)), np.zeros((0, 2)), (), 0, 0.0
            ... ).interval() < 2.0 + 1e-12
            True
        """
        return self._upper(Bound.point(_norm_upper(self.C)) + _norm_upper(self.radius()))

    def entrywise(self) -> float:
        r"""Bound the largest norm from above by :math:`\|\,|C| + R\,\|_2`, as the norm of the largest moduli of the entries of J.

        Examples:
            >>> Fractional(
            ...     2 * np.eye(2), np.zeros((2, 0)), np.zeros((0, 0)), np.zeros((0, 2)), (), 0, 0.0
            ... ).entrywise() < 2.0 + 1e-12
            True
        """
        return self._upper(Bound.point(_norm_upper(np.abs(self.C) + self.radius())))

    def branched(self, vertices: int) -> float:
        r"""Bound the largest norm from above with all choices of the blocks that matter most, and the radius of the others.

        With some blocks at :math:`\Delta_T`, :math:`T = (I - G\Delta_T)^{-1}`, what the others add is
        :math:`S'\Delta(I - G'\Delta)^{-1}P'` with :math:`S' = S + S\Delta_T T G`, :math:`G' = TG`, :math:`P' = TP`, so the bound is
        :math:`\max_T \|C_T\|_2 + \|R_T\|_2`: exact if all blocks are chosen, :meth:`interval` if none is.

        Args:
            vertices: up to how many choices.

        Examples:
            >>> relu = Block((0,), np.array([[[0.0]], [[1.0]]]), np.array([[0.0]]))
            >>> form = Fractional(np.zeros((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), np.ones((1, 1)), (relu,), 1, 0.0)
            >>> round(form.branched(1), 9), round(form.branched(2), 9)
            (0.5, 0.5)
        """
        first = self._most(vertices)
        rest = self._delta([block.radius * (i not in first) for i, block in enumerate(self.blocks)])
        counts = [range(len(block.options)) if i in first else (-1,) for i, block in enumerate(self.blocks)]
        worst = 0.0
        for delta in self._batches(itertools.product(*counts)):
            T = _series(self.G, delta, self.depth)
            G = T @ self.G
            S, P = np.abs(self.S + self.S @ (delta @ G)), np.abs(T @ self.P)
            J = self.C + (self.S @ (delta @ T)) @ self.P
            R = S @ (rest @ (_series(np.abs(G), rest, self.depth) @ P))
            worst = max(worst, _sums_upper(J, R))
        return self._upper(Bound.point(worst))

    def _most(self, vertices: int) -> frozenset[int]:
        """Return the blocks with the largest influence, as many as have that many choices together."""
        gains = [
            _length(self.S[:, block.units]) * float(block.radius.max()) * _length(self.P[block.units, :])
            for block in self.blocks
        ]
        first: list[int] = []
        total = 1
        for i in sorted(range(len(gains)), key=lambda i: -gains[i]):
            total *= len(self.blocks[i].options)
            if total > vertices:
                break
            first.append(i)
        return frozenset(first)

    def radius(self) -> Array:
        r"""Return :math:`R = |S| r (I + |G| r + \cdots) |P|` with the radii r of the blocks."""
        radii = self._delta([block.radius for block in self.blocks])
        return np.abs(self.S) @ (radii @ (_series(np.abs(self.G), radii, self.depth) @ np.abs(self.P)))

    def at(self, delta: Array) -> Array:
        r"""Return :math:`J(\Delta)` for a batch.

        Args:
            delta: of shape ``(b, units, units)``.

        Returns:
            Of shape ``(b, m, n)``.
        """
        inner = delta @ _series(self.G, delta, self.depth)
        left = self.S @ inner
        return self.C + left @ self.P

    def _norm(self, J: Array) -> Bound:
        norm = spectral_norm(J)
        return self._with_error(norm.lower, norm.upper)

    def _with_error(self, lower: float, upper: float) -> Bound:
        if not self.proved:
            return Bound(min(lower, upper), upper, proved=False)
        error = Bound(-self.error, self.error)
        return Bound(max(0.0, (Bound.point(lower) + error).lower), (Bound.point(upper) + error).upper)

    def _upper(self, bound: Bound) -> float:
        """Add what rounding may hide: of C, and twice of R, the error each, and once more where they were scaled; sums within R."""
        if not self.proved:
            return bound.upper
        terms = 1.0 + 2.0 * gamma((self.depth + 2) * (2 * len(self.S.T) + 4))
        return (bound * terms + 6.0 * self.error).upper

    def _delta(self, moves: Sequence[Array]) -> Array:
        delta = np.zeros(self.G.shape)
        for block, move in zip(self.blocks, moves, strict=True):
            delta[np.ix_(block.units, block.units)] = move
        return delta

    def _batches(self, choices: Iterator[tuple[int, ...]] | Sequence[tuple[int, ...]]) -> Iterator[Array]:
        size = max(1, _ENTRIES // max(1, self.C.size, self.G.size, self.S.size, self.P.size))
        source = iter(choices)
        while batch := list(itertools.islice(source, size)):
            picked = np.array(batch, dtype=np.int64).reshape(len(batch), len(self.blocks))
            delta = np.zeros((len(batch), *self.G.shape))
            for i, block in enumerate(self.blocks):
                rows, columns = np.ix_(block.units, block.units)
                moves = np.concatenate([block.moves, np.zeros_like(block.reference)[None]])  # -1 is the reference
                delta[:, rows, columns] = moves[picked[:, i]]
            yield delta


def _series(G: Array, delta: Array, depth: int) -> Array:
    r"""Return :math:`(I - G\Delta)^{-1}`, a sum that ends after ``depth`` terms."""
    eye = np.eye(G.shape[-1])
    step = G @ delta
    total = np.broadcast_to(eye, delta.shape)
    for _ in range(depth - 1):
        total = eye + step @ total
    return total


def _sizes(J: Array) -> Array:
    """Estimate the norms of a batch."""
    J = J if J.shape[-2] <= J.shape[-1] else J.transpose(0, 2, 1)
    largest = float(np.abs(J).max(initial=0.0))
    if largest == 0.0:
        return np.zeros(len(J))
    J = J / largest  # squares would overflow
    return largest * np.sqrt(np.maximum(np.linalg.eigvalsh(J @ J.transpose(0, 2, 1))[:, -1], 0.0))


def _sums_upper(J: Array, R: Array) -> float:
    r"""Bound :math:`\max_b \|J_b\|_2 + \|R_b\|_2`, but for the rounding of a division of each entry of J.

    One bound for the whole batch is enough: with :math:`\|R_b\| \le r_b` and, for :math:`q_b = t - r_b > 0`,
    :math:`\|J_b / q_b\| \le c`, the sum is at most :math:`c q_b + r_b \le \max(c, 1)\, t`.
    """
    r, j = _sizes(R), _sizes(J)
    if r.max() > 0.0:  # else R is zero
        r = np.maximum(r, r.max() * 2.0**-60)
        r = np.nextafter(gram_upper(R / r[:, None, None]) * (1.0 + 2.0**-50) * r, np.inf)
    t = float((j + r).max()) * (1.0 + 2.0**-40)
    q = t - r  # at least the norm of J, and at least t 2^-41
    if t == 0.0 or not (q > 0.0).all():
        return (Bound.point(gram_upper(J)) + float(r.max())).upper
    c = gram_upper(J / q[:, None, None])
    return (Bound.point(max(c, 1.0)) * t * (1.0 + 2.0**-50)).upper


def _length(A: Array) -> float:
    """Estimate the Frobenius norm; squares would overflow."""
    largest = float(np.abs(A).max(initial=0.0))
    return largest * float(np.linalg.norm(A / largest)) if largest > 0.0 else 0.0


def _norm_upper(A: Array) -> float:
    return gram_upper(A[None])
