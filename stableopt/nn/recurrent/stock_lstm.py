r"""What is proved about one step of torch's long short-term memory, :class:`torch.nn.LSTM` and :class:`torch.nn.LSTMCell`.

With the gates i, f, o (sigmoids) and g (tanh) of :math:`W_x x + W_h h + b`,

.. math:: c^+ = f \circ c + i \circ g, \qquad y^+ = o \circ \tanh(c^+), \qquad h^+ = y^+ \text{ or } W_{hr}\, y^+ .

**States.** For :math:`|h| \le \bar h`, :math:`|x| \le u` the gates have upper ends, and :math:`|c| \le \bar c` is kept for ever by
:math:`\bar c = \bar\imath\,\bar g / (1 - \bar f)`, and then :math:`|y| \le \bar o \tanh \bar c`.
Starting from :math:`|y| \le 1`, each such pair contains the zero state and bounds the gates of the next, smaller one.

**Slopes.** On this convex box and for one unit

.. math::
    |\delta c^+| &\le f\,|\delta c| + f(1 - f)\,\bar c\,|\delta a_f|
        + i\,(1 - g^2)\,|\delta a_g| + i(1 - i)\,\bar g\,|\delta a_i| , \\
    |\delta y^+| &\le o\,|\delta c^+| + o(1 - o)\,\tanh(\bar c)\,|\delta a_o| , \qquad
    |\delta a| \le |W_h|\,|\delta h| + |W_x|\,|\delta x| ,

because tanh has slopes up to 1. The state is the pair (c, h). Without a limit u of the inputs f may be 1: nothing is bounded then.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from stableopt.linalg.proved import as_matrix
from stableopt.nn.recurrent.comparison import Comparison
from stableopt.nn.recurrent.gates import Array, Mix, Rows, ends, rows_times, up

__all__ = ["MemoryStep"]

_PASSES = 12
"""How often the box of the states is shrunk."""


class MemoryStep(Comparison):
    r"""One step of an LSTM.

    Args:
        W_h: ``(4 n, p)``, the rows of i, f, g and o.
        W_x: ``(4 n, m)``.
        b_x: ``(4 n,)``, or None.
        b_h: ``(4 n,)``, or None.
        W_hr: the projection ``(p, n)``, or None for :math:`p = n` without one.
        inputs: limits of the moduli of the inputs, ``(m,)``, possibly infinite.

    Examples:
        >>> import torch
        >>> step = MemoryStep(torch.zeros(4, 1), torch.zeros(4, 1), None, None, None, np.ones(1))
        >>> float(step.cells[0]) < 1e-12  # no input can reach the memory
        True
    """

    def __init__(
        self, W_h: Tensor, W_x: Tensor, b_x: Tensor | None, b_h: Tensor | None, W_hr: Tensor | None, inputs: Array
    ) -> None:
        first, second = ([None] * 4 if b is None else list(b.chunk(4)) for b in (b_x, b_h))
        blocks = zip(W_h.chunk(4), W_x.chunk(4), first, second, strict=True)
        self.input, self.forget, self.cell, self.output = (Rows(*block) for block in blocks)
        self.size = len(self.input.hidden)
        self.projection = None if W_hr is None else np.abs(as_matrix(W_hr))
        self.reach = self._projected(np.ones(self.size))
        self.states = self.size + len(self.reach)
        self.visible = slice(self.size, self.states)
        for _ in range(_PASSES):
            self._enclose(inputs)
        reach, cells = (float(limit.max(initial=0.0)) for limit in (self.reach, self.cells))
        self.metric = f"the maximum norm of (c, h) with moduli up to {cells:.4g} and {reach:.4g}"

    def _projected(self, y: Array) -> Array:
        return y if self.projection is None else up(self.projection @ y, self.size)

    def _enclose(self, inputs: Array) -> None:
        """Enclose the gates for outputs within reach, then the memory, then shrink the reach."""
        told = [rows.interval(self.reach, inputs) for rows in (self.input, self.forget, self.cell, self.output)]
        self.i, self.f, self.o = (ends("sigmoid", *told[k]) for k in (0, 1, 3))
        g = ends("tanh", *told[2])
        self.g = np.maximum(-g[0], g[1])
        nearest = np.maximum(np.maximum(g[0], -g[1]), 0.0)  # to 0, the steepest place
        self.slope = np.minimum(up(1.0 - np.nextafter(nearest * nearest, 0.0)), 1.0)
        escape = np.nextafter(1.0 - self.f[1], 0.0)
        with np.errstate(divide="ignore"):
            self.cells = up(np.where(escape > 0.0, self.i[1] * self.g / escape, np.inf), 2)
        self.tanh = ends("tanh", np.zeros(self.size), self.cells)[1]
        self.reach = np.minimum(self.reach, self._projected(up(self.o[1] * self.tanh)))

    @property
    def initial(self) -> float:
        """The smallest side of the box of states (c, h)."""
        return float(min(self.cells.min(initial=math.inf), self.reach.min(initial=math.inf)))

    def grown(self, w: Array, norm: str | None, mix: Mix) -> Array:
        """Return the comparison map; see the module."""
        shape = (-1, *[1] * (w.ndim - 1))
        gates = (self.input, self.forget, self.cell, self.output)
        c, h = w[: self.size], w[self.size :]
        return self._mixed(c, [up(g.from_state(h) + g.from_input(norm).reshape(shape)) for g in gates], mix)

    def input_columns(self, mix: Mix) -> Array:
        """Return the comparison map of differences in single inputs."""
        told = [gate.inputs for gate in (self.input, self.forget, self.cell, self.output)]
        return self._mixed(np.zeros_like(told[0]), told, mix)

    def _mixed(self, c: Array, told: list[Array], mix: Mix) -> Array:
        zero = np.zeros_like(c)
        let_in, forget, cell, output = told
        if not np.isfinite(self.cells).all():
            return np.full((self.states, *c.shape[1:]), np.inf)
        kept = mix(*self.f, keep=c, new=zero, cross=up(rows_times(self.cells, forget)))
        gained = mix(*self.i, keep=up(rows_times(self.slope, cell)), new=zero, cross=up(rows_times(self.g, let_in)))
        memory = up(kept + gained)
        y = mix(*self.o, keep=memory, new=zero, cross=up(rows_times(self.tanh, output)))
        return np.concatenate([memory, self._projected(y)])
