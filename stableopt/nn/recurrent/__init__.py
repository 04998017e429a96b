"""Recurrent cells that contract by construction, stock recurrent layers that are made to, and what is proved about their gain."""

from stableopt.nn.recurrent.bounds import CellBound, cell_bound, cell_rule, sequence_gain

__all__ = ["CellBound", "cell_bound", "cell_rule", "sequence_gain"]
