"""Numbers of a reading are fetched together and keep their order."""

from __future__ import annotations

import math

import torch

from stableopt.lyapunov.layers.readout import Readout


def test_numbers_of_all_dtypes_come_out_in_their_order():
    readout = Readout()
    readout.add("half", torch.tensor(1.5, dtype=torch.bfloat16))
    readout.add("known", 2)
    readout.add("one", torch.tensor([3.0], requires_grad=True))
    readout.add("count", torch.tensor(4))
    readout.add("nan", torch.tensor(math.nan))
    found = readout.fetch()
    assert list(found) == ["half", "known", "one", "count", "nan"]
    assert list(found.values())[:4] == [1.5, 2.0, 3.0, 4.0]
    assert math.isnan(found["nan"])


def test_nothing_is_nothing():
    assert Readout().fetch() == {}
