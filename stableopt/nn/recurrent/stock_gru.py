r"""What is proved about one step of torch's gated recurrent unit, :class:`torch.nn.GRU` and :class:`torch.nn.GRUCell`.

Torch resets after the product with the matrix,

.. math::
    r &= \sigma(W_{xr} x + W_{hr} h + b_r), & z &= \sigma(W_{xz} x + W_{hz} h + b_z), \\
    n &= \tanh\bigl(W_{xn} x + b_{xn} + r \circ (W_{hn} h + b_{hn})\bigr), & h^+ &= (1 - z) \circ n + z \circ h ,

while papers mostly reset before it, :math:`W_{hn}(r \circ h)`; their conditions are about another map.

**States.** :math:`h^+` lies between n and h, entry by entry. So :math:`|h| \le \bar h` is kept for ever by :math:`\bar h = 1`,
and by every :math:`\bar h` that is not below the :math:`\bar n = \max |n|` over :math:`|h| \le \bar h, |x| \le u`; iterating
:math:`\bar h \leftarrow \bar n` from 1 shrinks the box, which always contains the zero state that torch starts from.

**Slopes.** On this convex box and for one unit, with :math:`q = W_{hn} h + b_{hn}`, :math:`|q| \le Q`, the chain rule gives

.. math::
    dh^+ = z\,dh + (1 - z)\,(1 - n^2)\bigl[W_{xn}\,dx + r\,W_{hn}\,dh + q\,r(1 - r)\,(W_{xr}\,dx + W_{hr}\,dh)\bigr]
         + z(1 - z)\,(h - n)\,(W_{xz}\,dx + W_{hz}\,dh) .

With moduli this is the comparison map; for z and for r the supremum is taken of the whole expression
(:mod:`stableopt.nn.recurrent.gates`), and :math:`|h - n| \le \bar h + \bar n`. Without a limit u of the inputs z may be 1: then
nothing contracts, although the gain in linf may still be finite.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from stableopt.nn.recurrent.comparison import Comparison
from stableopt.nn.recurrent.gates import Array, Mix, Rows, ends, rows_times, up

__all__ = ["GatedStep"]

_PASSES = 12
"""How often the box of the states is shrunk."""


class GatedStep(Comparison):
    r"""One step of a GRU.

    Args:
        W_h: ``(3 n, n)``, the rows of r, z and n.
        W_x: ``(3 n, m)``.
        b_x: ``(3 n,)``, or None.
        b_h: ``(3 n,)``, or None.
        inputs: limits of the moduli of the inputs, ``(m,)``, possibly infinite.

    Examples:
        >>> import torch
        >>> step = GatedStep(torch.zeros(3, 1), torch.ones(3, 1), None, None, np.ones(1))
        >>> bool(step.reach[0] < np.tanh(1.0) + 1e-12)
        True
    """

    def __init__(self, W_h: Tensor, W_x: Tensor, b_x: Tensor | None, b_h: Tensor | None, inputs: Array) -> None:
        first, second = ([None] * 3 if b is None else list(b.chunk(3)) for b in (b_x, b_h))
        blocks = list(zip(W_h.chunk(3), W_x.chunk(3), first, second, strict=True))
        self.reset, self.update = Rows(*blocks[0]), Rows(*blocks[1])
        hidden, new_inputs, b_new, b_inner = blocks[2]
        self.new = Rows(hidden, new_inputs, b_new)  # what stands outside of the reset gate
        self.inner = Rows(hidden, new_inputs, b_inner)  # q, of which only the part of the state is used
        self.states = len(self.new.hidden)
        self.visible = slice(0, self.states)
        self.reach = np.ones(self.states)
        for _ in range(_PASSES):
            self._enclose(inputs)
        self.metric = f"the maximum norm of states with moduli up to {self.reach.max(initial=0.0):.4g}"

    def _enclose(self, inputs: Array) -> None:
        """Enclose the gates for states within reach, then shrink the reach."""
        self.r = ends("sigmoid", *self.reset.interval(self.reach, inputs))
        self.z = ends("sigmoid", *self.update.interval(self.reach, inputs))
        q = self.inner.interval(self.reach, np.zeros(len(inputs)))
        self.Q = np.maximum(-q[0], q[1])
        inside = [up(np.maximum(r * q[1], 0.0)) for r in self.r], [up(np.maximum(-r * q[0], 0.0)) for r in self.r]
        low, high = self.new.interval(np.zeros(self.states), inputs)
        low = np.nextafter(low - np.maximum(*inside[1]), -np.inf)
        high = np.nextafter(high + np.maximum(*inside[0]), np.inf)
        n = ends("tanh", low, high)
        top = np.maximum(-n[0], n[1])
        nearest = np.maximum(np.maximum(n[0], -n[1]), 0.0)  # to 0, the steepest place
        self.slope = np.minimum(up(1.0 - np.nextafter(nearest * nearest, 0.0)), 1.0)
        self.spread = up(self.reach + top)
        self.reach = np.minimum(self.reach, top)  # the gates are enclosed for the larger box, which contains this one

    @property
    def initial(self) -> float:
        """The smallest side of the box of states."""
        return float(self.reach.min(initial=math.inf))

    def grown(self, w: Array, norm: str | None, mix: Mix) -> Array:
        """Return the comparison map; see the module."""
        shape = (-1, *[1] * (w.ndim - 1))
        pushes = [rows.from_input(norm).reshape(shape) for rows in (self.reset, self.update, self.new)]
        return self._mixed(w, self.new.from_state(w), self.reset.from_state(w), self.update.from_state(w), pushes, mix)

    def input_columns(self, mix: Mix) -> Array:
        """Return the comparison map of differences in single inputs."""
        zero = np.zeros_like(self.new.inputs)
        return self._mixed(zero, zero, zero, zero, [self.reset.inputs, self.update.inputs, self.new.inputs], mix)

    def settled(self, w: Array, norm: str, mix: Mix) -> Array:
        r"""Return :math:`s + \hat z e`: the mix :math:`z w + (1 - z) s + z(1 - z) e` is at most w for all z if this is."""
        shape = (-1, *[1] * (w.ndim - 1))
        pushes = [rows.from_input(norm).reshape(shape) for rows in (self.reset, self.update, self.new)]
        told = self.new.from_state(w), self.reset.from_state(w), self.update.from_state(w)
        new, cross = self._parts(*told, pushes, mix)
        return up(new + rows_times(self.z[1], cross), 2)

    def _mixed(self, w: Array, new: Array, reset: Array, update: Array, pushes: list[Array], mix: Mix) -> Array:
        candidate, cross = self._parts(new, reset, update, pushes, mix)
        return mix(*self.z, keep=w + np.zeros_like(candidate), new=candidate, cross=cross)

    def _parts(self, new: Array, reset: Array, update: Array, pushes: list[Array], mix: Mix) -> tuple[Array, Array]:
        """Return what the gate z lets in, and what it adds by being moved itself."""
        zero = np.zeros_like(new + pushes[0])
        inner = mix(*self.r, keep=new + zero, new=zero, cross=rows_times(self.Q, up(reset + pushes[0])))
        candidate = up(rows_times(self.slope, up(inner + pushes[2], 2)))
        return candidate, up(rows_times(self.spread, up(update + pushes[1])), 2)
