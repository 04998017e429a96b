"""The rules that read a layer as the operations it computes: one rule per class, in one registry."""

from stableopt.certify.fold import simple, stock, structure  # noqa: F401 importing them registers rules
from stableopt.certify.fold.registry import fold

__all__ = ["fold"]
