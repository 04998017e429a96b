"""How differences grow in one step of a GRU or an LSTM (docs/soundness.md, S15.1-S15.6)."""

from __future__ import annotations

import numpy as np

from .numbers import Array

__all__ = ["GATES", "Step"]

GATES = {"gru": 3, "lstm": 4}
_PASSES, _SLACK = 12, 2.0**-40


def _logistic(x: Array) -> Array:
    """S15.1: 1/(1 + exp(-x)) within 2^-40, by the series of exp(|x|/64) and six squarings; beyond 32 it is below 2^-46."""
    y, power = np.minimum(np.abs(x), 32) / 64, np.ones_like(x)
    for k in range(14, 0, -1):
        power = 1 + y * power / k
    for _ in range(6):
        power = power * power
    return np.where(x > 0, 1 - 1 / (1 + power), 1 / (1 + power))


def _sigmoid(low: Array, high: Array) -> tuple[Array, Array]:
    return np.clip(_logistic(low) - _SLACK, 0, 1), np.clip(_logistic(high) + _SLACK, 0, 1)


def _tanh(low: Array, high: Array) -> tuple[Array, Array]:
    return np.clip(2 * _logistic(2 * low) - 1 - 4 * _SLACK, -1, 1), np.clip(
        2 * _logistic(2 * high) - 1 + 4 * _SLACK, -1, 1
    )


def _mixed(ends: tuple[Array, Array], keep: Array, new: Array | float, cross: Array) -> Array:
    """S15.3: the largest z keep + (1 - z) new + z(1 - z) cross for z between the ends, by a tangent of z(1 - z) at any p."""
    low, high = ends[0][:, None], ends[1][:, None]
    p = np.where(cross > 0, (keep - new + cross) / np.where(cross > 0, 2 * cross, 1), np.where(keep >= new, high, low))
    p = np.clip(p, low, high)
    first, second = (z * keep + (1 - z) * new + (p * p + (1 - 2 * p) * z + 2.0**-50) * cross for z in (low, high))
    return np.maximum(first, second)


def _times(a: Array, w: Array) -> Array:
    """S15.5: a @ w by plain sums, for proofs that do not rest on H2."""
    return (a * w).sum(axis=-1) if w.ndim == 1 else np.stack([(a * c).sum(axis=-1) for c in w.T], axis=-1)


class Step:
    """How differences grow in one step: |dh+| <= grown(|dh|, |dx|) entry by entry, monotone and sublinear; its ranges (S15.2)."""

    def __init__(
        self,
        kind: str,
        W: Array,
        V: Array,
        b: Array,
        R: Array | None,
        limit: float,
        length: int,
        *,
        exact: bool = False,
    ) -> None:
        self.gru, self.n, self.length, self.endless = kind == "gru", len(W) // GATES[kind], length, True
        self.times, self.b = _times if exact else np.matmul, b.reshape(2, GATES[kind], self.n)
        self.W, self.V = (np.abs(M).reshape(GATES[kind], self.n, -1) for M in (W, V))
        self.R, self.grow = None if R is None else np.abs(R), 1 + 2.0**-51 * (2 * self.n + W.shape[1] + V.shape[1] + 64)
        sums, self.still = self.V.sum(axis=2), np.zeros_like(self.V[..., :1])
        self.drive = np.where(sums > 0, sums * limit, 0.0)
        self.reach = self._seen(np.ones(self.n)) * self.grow
        self.states = len(self.reach) + (0 if self.gru else self.n)
        for _ in range(_PASSES):
            self._ranges()

    def _up(self, x: Array) -> Array:
        return x * self.grow + 2.0**-900

    def _seen(self, y: Array) -> Array:
        return y if self.R is None else self.times(self.R, y)

    def _around(self, radius: Array, biases: Array) -> tuple[Array, Array]:
        radius = self._up(radius) + 2.0**-50 * np.abs(biases).sum(axis=0)
        return biases.sum(axis=0) - radius, biases.sum(axis=0) + radius

    def _ranges(self) -> None:
        """S15.2: all states lie within reach, so the gates within these ends, so all states within a smaller reach."""
        from_state = self.times(self.W, self.reach)
        told = [self._around(h + x, self.b[:, k]) for k, (h, x) in enumerate(zip(from_state, self.drive, strict=True))]
        if self.gru:
            self.r, self.z = _sigmoid(*told[0]), _sigmoid(*told[1])
            q, x = self._around(from_state[2], self.b[1:, 2]), self._around(self.drive[2], self.b[:1, 2])
            self.q = np.maximum(-q[0], q[1])
            low, high = np.minimum(*(r * q[0] for r in self.r)), np.maximum(*(r * q[1] for r in self.r))
            most = 2.0**-50 * (np.maximum(-x[0], x[1]) + self.q)
            a = _tanh(x[0] + low - most, x[1] + high + most)
        else:
            self.i, self.f, self.o, a = _sigmoid(*told[0]), _sigmoid(*told[1]), _sigmoid(*told[3]), _tanh(*told[2])
        top, near = np.maximum(-a[0], a[1]), np.maximum(np.maximum(a[0], -a[1]), 0)
        self.slope = np.minimum(1 - near * near + 2.0**-50, 1)
        if self.gru:
            self.spread, seen = self.reach + top, top
        else:  # |c| <= f |c| + i |a|, at most as often as there are steps
            times = 1 / np.maximum(1 - self.f[1], 2.0**-60)
            self.endless = bool((times <= self.length).all())
            self.top, self.cells = top, self.i[1] * top * np.minimum(times, self.length) * self.grow
            self.tanh = np.maximum(_tanh(-self.cells, self.cells)[1], 0)
            seen = self._seen(self.o[1] * self.tanh) * self.grow
        self.reach = np.minimum(self.reach, seen)

    def grown(self, w: Array, pushed: Array) -> Array:
        """S15.4: the comparison map for the columns of w, and what the input adds to each gate; rounded up."""
        told = self.times(self.W, w[-len(self.reach) :])
        if self.gru:
            inner = _mixed(self.r, told[2], 0.0, self.q[:, None] * (told[0] + pushed[0])) + pushed[2]
            y = _mixed(self.z, w, self.slope[:, None] * inner, self.spread[:, None] * (told[1] + pushed[1]))
            return self._up(y)
        told = told + pushed
        memory = _mixed(self.f, w[: self.n], 0.0, self.cells[:, None] * told[1])
        memory = memory + _mixed(self.i, self.slope[:, None] * told[2], 0.0, self.top[:, None] * told[0])
        y = self._seen(_mixed(self.o, memory, 0.0, self.tanh[:, None] * told[3]))
        return self._up(np.concatenate([memory, y]))

    def pushes(self, norm: str) -> Array:
        """S15.4: how far an input difference of norm 1 moves each gate: the dual norms of the rows, rounded up."""
        sizes = self.V.sum(axis=2) if norm == "linf" else np.sqrt(np.square(self.V).sum(axis=2) + 2.0**-1000)
        return sizes[..., None] * self.grow

    def sums(self, length: int) -> Array:
        """S15.5: G = B + A B + ... + A^(length - 1) B for the linear map A|dh| + B|dx| above the comparison map, rounded up."""
        A, B = self.grown(np.eye(self.states), self.still), self.grown(np.zeros((self.states, 1)), self.V)
        total, power = B, A
        for bit in f"{length:b}"[1:]:
            total, power = self._up(self.times(power, total) + total), self._up(self.times(power, power))
            total, power = (
                (self._up(self.times(A, total) + B), self._up(self.times(A, power))) if bit == "1" else (total, power)
            )
        return total[-len(self.reach) :]

    def peak(self, norm: str, length: int) -> tuple[Array, bool]:
        """S15.6: limits of |dh| after that many steps with |dx| <= 1, and whether they hold for every number of steps."""
        w, pushed = np.zeros((self.states, 1)), self.pushes(norm)
        for _ in range(length):
            before, w = w, np.maximum(w, self.grown(w, pushed))
            if (w == before).all():
                return w[:, 0], self.endless
        return w[:, 0], False
