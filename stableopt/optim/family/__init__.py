"""The optimizers: torch's own classes, each with its rule."""

from stableopt.optim.family.adam import Adam, AdamW
from stableopt.optim.family.lion import Lion
from stableopt.optim.family.muon import Muon
from stableopt.optim.family.nadam import NAdam
from stableopt.optim.family.radam import RAdam
from stableopt.optim.family.rmsprop import RMSprop
from stableopt.optim.family.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "Muon", "NAdam", "RAdam", "RMSprop"]
