"""The rules that read a layer as the operations it computes: one rule per class, in one registry."""

# ruff: noqa: F401 importing the modules registers their rules

from stableopt.certify.fold import (
    attention,
    blocks,
    gates,
    implicit,
    normalization,
    pools,
    sequences,
    simple,
    spatial,
    stock,
    structure,
)
from stableopt.certify.fold.registry import fold

__all__ = ["fold"]
