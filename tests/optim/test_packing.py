"""Vectors over parameters as long tensors: nothing is lost, and what belongs apart stays apart."""

from __future__ import annotations

import torch

from stableopt.optim.packing import Packing
from stableopt.optim.rules.base import real_view


def test_unpacking_undoes_packing() -> None:
    parameters = [
        torch.randn(2, 3),
        torch.randn(()),
        torch.randn(0),
        torch.randn(4, dtype=torch.complex128),
        torch.randn(5, dtype=torch.float32),
    ]
    packing = Packing.of(parameters)
    packed = packing.pack(real_view(p) for p in parameters)
    assert [(x.dtype, tuple(x.shape)) for x in packed] == [(torch.float64, (15,)), (torch.float32, (5,))]
    for p, x in zip(parameters, packing.unpack(packed), strict=True):
        assert torch.equal(real_view(p), x)
    assert packing.fits(packed)
    assert not packing.fits(packed[:1])
    assert not packing.fits([packed[0], packed[0]])


def test_owners_stay_apart_and_half_precision_is_held_in_float32() -> None:
    parameters = [torch.ones(2), torch.ones(3, dtype=torch.bfloat16), torch.ones(4), torch.ones(5)]
    packing = Packing.of(parameters, owners=[0, 0, 1, 0])
    assert packing.places == ((0, 3), (1,), (2,))
    assert [(owner, dtype) for owner, _, dtype in packing.keys] == [
        (0, torch.float64),
        (0, torch.float32),
        (1, torch.float64),
    ]
    packed = packing.pack(parameters)
    assert [len(x) for x in packed] == [7, 3, 4]
    assert packing.unpack(packed)[3].shape == (5,)
