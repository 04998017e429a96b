r"""Weight maps: parametrizations :math:`V \mapsto W` that keep the operator norm of a layer within a radius, by many methods."""

from stableopt.nn.weights.aol import AlmostOrthogonal
from stableopt.nn.weights.base import WeightMap
from stableopt.nn.weights.geometry import NORMS, Geometry
from stableopt.nn.weights.orthogonal import Bjorck, Cayley, Cholesky, Exponential
from stableopt.nn.weights.orthogonal_conv import OrthogonalConv
from stableopt.nn.weights.power import Power
from stableopt.nn.weights.reflectors import BlockReflector
from stableopt.nn.weights.rescale import Frobenius, Gram, Rescale, RowSum, Schur

METHODS: dict[str, type[WeightMap]] = {
    method.name: method
    for method in (
        Power,
        Gram,
        Frobenius,
        Schur,
        RowSum,
        AlmostOrthogonal,
        BlockReflector,
        Cholesky,
        Cayley,
        Exponential,
        Bjorck,
        OrthogonalConv,
    )
}
"""The methods by their names, as :func:`stableopt.nn.stabilize` takes them."""

__all__ = [
    "METHODS",
    "NORMS",
    "AlmostOrthogonal",
    "Bjorck",
    "BlockReflector",
    "Cayley",
    "Cholesky",
    "Exponential",
    "Frobenius",
    "Geometry",
    "Gram",
    "OrthogonalConv",
    "Power",
    "Rescale",
    "RowSum",
    "Schur",
    "WeightMap",
]
