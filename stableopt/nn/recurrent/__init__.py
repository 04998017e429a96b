"""Recurrent cells that contract by construction, stock recurrent layers that are made to, and what is proved about their gain."""

from stableopt.nn.recurrent.antisymmetric import AntisymmetricCell
from stableopt.nn.recurrent.bounds import CellBound, cell_bound, cell_rule, sequence_gain
from stableopt.nn.recurrent.cell import RecurrentCell
from stableopt.nn.recurrent.contracting import ContractingCell
from stableopt.nn.recurrent.diagonal_metric import DiagonalMetricCell
from stableopt.nn.recurrent.leaky import LeakyCell
from stableopt.nn.recurrent.over_time import LastStep, MeanOverTime, Recurrence
from stableopt.nn.recurrent.stock import layer_bounds
from stableopt.nn.recurrent.stock_contracting import contracting

__all__ = [
    "AntisymmetricCell",
    "CellBound",
    "ContractingCell",
    "DiagonalMetricCell",
    "LastStep",
    "LeakyCell",
    "MeanOverTime",
    "Recurrence",
    "RecurrentCell",
    "cell_bound",
    "cell_rule",
    "contracting",
    "layer_bounds",
    "sequence_gain",
]
