"""The two passes of the total variation prox over one row, compiled (see :mod:`stableopt.constraints.native`)."""

from __future__ import annotations

import ctypes

import numpy as np

from stableopt.constraints.native import compiled

__all__ = ["compiled_passes"]

# The same operations in the same order as _forward and _backward of tv.py, so that the bits agree; names as there.
_SOURCE = r"""
#include <stddef.h>

typedef struct { double x, a, b; } knot;
typedef struct { double low, high; } bound;

/* Fills bounds[i] for i < n, and start[k], sign[k] of the segments from the last to the first; returns their number. */
size_t tv_passes(size_t n, const double *x, const double *p, double tube, knot *K, bound *bounds, long long *start, double *sign) {
    size_t l = n, r = n, k = 0; /* inner knots are l, ..., r - 1 */
    double lo = x[0], hi = x[0], a = 0.0, c = 0.0, b = tube, d = -tube;
    for (size_t i = 0; i < n; i++) {
        const double xi = x[i], pi = p[i], px = pi * xi;
        if (xi < lo) {
            K[--l] = (knot){lo, a, b};
            a = 0.0; b = 0.0;
        } else if (xi > hi) {
            K[r++] = (knot){hi, -c, -d};
            c = 0.0; d = 0.0;
        }
        a += pi; b -= px; c += pi; d -= px;
        while (l < r && a * K[l].x + b <= 0.0) { a = a + K[l].a; b = b + K[l].b; l++; }
        while (l < r && c * K[r - 1].x + d >= 0.0) { r--; c = c - K[r].a; d = d - K[r].b; }
        if (l >= r) {
            if (xi > hi) { a = c; b = d + 2.0 * tube; }
            else { c = a; d = b - 2.0 * tube; }
        }
        lo = -b / (a > pi ? a : pi);
        hi = -d / (c > pi ? c : pi);
        bounds[i] = (bound){lo, hi};
    }
    b = b - tube;
    for (; l < r && !(a * K[l].x + b >= 0.0); l++) { a = a + K[l].a; b = b + K[l].b; }
    double u = -b / (a > p[n - 1] ? a : p[n - 1]);
    for (size_t i = n - 1; i > 0; i--) {
        const bound at = bounds[i - 1];
        if (u < at.low) { u = at.low; start[k] = (long long)i; sign[k++] = -1.0; }
        else if (u > at.high) { u = at.high; start[k] = (long long)i; sign[k++] = 1.0; }
    }
    start[k] = 0; sign[k++] = 0.0;
    return k;
}
"""


def compiled_passes(row: np.ndarray, metric: np.ndarray, tube: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Return where segments start and in which direction the jump to each of them goes (0 for the first).

    Args:
        row: float64, ``(n,)``, at least one entry.
        metric: positive, float64, ``(n,)``.
        tube: the largest multiplier, finite, > 0.

    Returns:
        ``None`` where nothing can be compiled: then the loops in Python do the same.

    Examples:
        >>> found = compiled_passes(np.array([0.0, 1.0, 9.0, 10.0]), np.ones(4), 1.0)
        >>> found is None or [part.tolist() for part in found] == [[0, 2], [0.0, 1.0]]
        True
    """
    library = compiled(_SOURCE)
    if library is None:
        return None
    n = row.size
    row, metric = np.ascontiguousarray(row, np.float64), np.ascontiguousarray(metric, np.float64)
    knots, bounds = np.empty(6 * n), np.empty(2 * n)
    start, sign = np.empty(n, np.int64), np.empty(n)
    function = library.tv_passes
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 2, ctypes.c_double, *[ctypes.c_void_p] * 4]
    count = function(
        n, row.ctypes.data, metric.ctypes.data, tube, knots.ctypes.data,
        bounds.ctypes.data, start.ctypes.data, sign.ctypes.data,
    )  # fmt: skip
    return start[:count][::-1].copy(), sign[:count][::-1].copy()
