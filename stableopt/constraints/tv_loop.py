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

/* One row: appends start[k], sign[k] of its segments from the last to the first; returns the new k. */
static size_t one_row(size_t at, size_t n, const double *x, const double *p, double tube, knot *K, bound *bounds,
                      long long *start, double *sign, size_t k) {
    size_t l = n, r = n; /* inner knots are l, ..., r - 1 */
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
        a = a + pi; b = b - px; c = c + pi; d = d - px;
        while (l < r && a * K[l].x + b <= 0.0) { a = a + K[l].a; b = b + K[l].b; l++; }
        while (l < r && c * K[r - 1].x + d >= 0.0) { r--; c = c - K[r].a; d = d - K[r].b; }
        if (l >= r) {
            if (xi > hi) { a = c; b = d + 2.0 * tube; }
            else { c = a; d = b - 2.0 * tube; }
        }
        a = a > pi ? a : pi;
        c = c > pi ? c : pi;
        lo = -b / a;
        hi = -d / c;
        bounds[i] = (bound){lo, hi};
    }
    b = b - tube;
    for (; l < r && !(a * K[l].x + b >= 0.0); l++) { a = a + K[l].a; b = b + K[l].b; }
    double u = -b / (a > p[n - 1] ? a : p[n - 1]);
    for (size_t i = n - 1; i > 0; i--) {
        const bound edge = bounds[i - 1];
        if (u < edge.low) { u = edge.low; start[k] = (long long)(at + i); sign[k++] = -1.0; }
        else if (u > edge.high) { u = edge.high; start[k] = (long long)(at + i); sign[k++] = 1.0; }
    }
    start[k] = (long long)at;
    sign[k] = 0.0;
    return k + 1;
}

/* All rows, from the last to the first; K has room for 2 n knots, bounds for n. Returns the number of segments. */
size_t tv_passes(size_t batch, size_t n, const double *x, const double *p, const double *tube, knot *K, bound *bounds,
                 long long *start, double *sign) {
    size_t k = 0;
    for (size_t row = batch; row-- > 0;)
        k = one_row(row * n, n, x + row * n, p + row * n, tube[row], K, bounds, start, sign, k);
    return k;
}
"""


def compiled_passes(values: np.ndarray, metric: np.ndarray, tube: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return where segments start, counted through all rows, and in which direction the jump to each of them goes.

    Args:
        values: float64 rows, ``(batch, n)``, with at least one entry.
        metric: positive, of the same shape.
        tube: the largest multiplier of each row, finite, > 0, ``(batch, 1)``.

    Returns:
        Starts and directions (-1, 1; 0 for the first of a row), in order; ``None`` where nothing can be compiled: then the loops in
        Python do the same.

    Examples:
        >>> found = compiled_passes(np.array([[0.0, 1.0, 9.0, 10.0]]), np.ones((1, 4)), np.ones((1, 1)))
        >>> found is None or [part.tolist() for part in found] == [[0, 2], [0.0, 1.0]]
        True
    """
    library = compiled(_SOURCE)
    if library is None:
        return None
    batch, n = values.shape
    x, p, w = (np.ascontiguousarray(part, np.float64) for part in (values, metric, tube))
    knots, bounds = np.empty(6 * n), np.empty(2 * n)
    start, sign = np.empty(values.size, np.int64), np.empty(values.size)
    function = library.tv_passes
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_size_t] * 2 + [ctypes.c_void_p] * 7
    count = function(batch, n, *(part.ctypes.data for part in (x, p, w, knots, bounds, start, sign)))
    return start[:count][::-1].copy(), sign[:count][::-1].copy()
