r"""What of a perturbation is seen: :math:`\log\|G_j^{1/2}R_{j-1}\cdots R_0\|_2` for the Gram matrices of an observation.

If an observation :math:`C_j` of the state has the inner products :math:`G_j = Q_j^\top C_j^\top C_jQ_j` on the directions, this is
the norm of :math:`C_j\Phi(t_j,t_0)` on them. It is the norm of a product with a root of :math:`G_j`, not the root of a quadratic
form: what an observation sees may be :math:`e^{-400}` of what it does not see, and its square would be lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.growth.scaled import Scaled
from stableopt.lyapunov.profile.growth.windows import FactorsLike

__all__ = ["observed", "products"]

Array = NDArray[np.float64]


def products(factors: FactorsLike, places: NDArray[np.int64] | None = None) -> Scaled:
    r"""Return :math:`R_{j-1}\cdots R_0` at some boundaries j, whatever its size.

    Args:
        factors: n of them, finite.
        places: the boundaries, not decreasing, each in 0..n; None for all.

    Returns:
        ``(m, k, k)``, one matrix for each place.

    Examples:
        >>> from stableopt.lyapunov.profile.growth.factors import Factors
        >>> made = products(Factors(np.full((1000, 1, 1), 0.01), np.arange(1001), dimension=1), np.array([0, 1000]))
        >>> made.log_norm().round(2)
        array([    0.  , -4605.17])
    """
    R = np.asarray(factors.R, dtype=np.float64)
    wanted = np.arange(len(R) + 1) if places is None else np.asarray(places, dtype=np.int64)
    made = Scaled.of(np.tile(np.eye(R.shape[-1]), (len(wanted), 1, 1)))
    step, product, at = Scaled.of(R), Scaled.of(np.eye(R.shape[-1])), 0
    for i, j in enumerate(wanted):
        for t in range(at, int(j)):
            product = step[t] @ product
        made.unit[i], made.exponent[i], at = product.unit, product.exponent, max(at, int(j))
    return made


def observed(products: Scaled, grams: Array) -> Array:
    r"""Return :math:`\log\|G_j^{1/2}P_j\|_2`.

    Args:
        products: the :math:`P_j`, ``(m, k, k)``.
        grams: the positive semidefinite :math:`G_j`, ``(m, k, k)``.

    Returns:
        ``(m,)``; ``-inf`` where nothing is seen, NaN where a Gram matrix is not finite.

    Note:
        Eigenvalues of a Gram matrix that are within its rounding, once its diagonal is scaled to one, are taken for zero.

    Examples:
        >>> P = Scaled.of(np.array([np.diag([1.0, 1e-200])]))
        >>> np.log10(np.exp(observed(P, np.array([np.diag([0.0, 4.0])])))).round(3)
        array([-199.699])
    """
    sane = np.isfinite(grams).all(axis=(1, 2))
    found = np.full(len(grams), np.nan)
    if sane.any():
        found[sane] = (Scaled.of(_roots(grams[sane])) @ products[sane]).log_norm()
    return found


def _roots(grams: Array) -> Array:
    r"""Return F with :math:`F^\top F = G`, accurate however different the sizes on the diagonal are."""
    k = grams.shape[-1]
    sizes = np.sqrt(np.maximum(np.diagonal(grams, axis1=1, axis2=2), 0.0))
    units = np.where(sizes > 0, sizes, 1.0)
    even = (grams + np.swapaxes(grams, 1, 2)) / 2 / units[:, :, None] / units[:, None, :]
    even[sizes == 0] = 0.0
    np.swapaxes(even, 1, 2)[sizes == 0] = 0.0
    values, vectors = np.linalg.eigh(even)
    noise = k * np.finfo(np.float64).eps * values[:, -1:]
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    return np.swapaxes(vectors * roots[:, None, :], 1, 2) * sizes[:, None, :]
