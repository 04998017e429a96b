"""The audit as a whole: nothing of ours is accused, nothing is changed, everything can be written down."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as Q

import stableopt as so
from stableopt import nn as sn
from stableopt.certify.audit import Audit, Finding, audit
from stableopt.cli.models import build_model
from stableopt.errors import UncertifiableError
from tests.certify.audit.foreign import Residual, of_kind

OURS = {
    "mlp": lambda: (build_model("mlp", (64,), 10, 1.0), (64,)),
    "resnet": lambda: (build_model("resnet", (64,), 10, 1.0), (64,)),
    "cnn": lambda: (build_model("cnn", (1, 8, 8), 10, 1.0), (1, 8, 8)),
    "blocks": lambda: (
        nn.Sequential(
            sn.GradientBlock(6, 8), sn.InfNormBlock(6), sn.SkewBlock(6), sn.HamiltonianBlock(6), sn.SLL(6, 8), sn.Householder(6)
        ),
        (6,),
    ),
    "convolutions": lambda: (so.stabilize(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), sn.MaxMin(), nn.Flatten())), (1, 6, 6)),
    "stored statistics": lambda: (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval(), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_clean_model_has_no_finding(name: str) -> None:
    model, shape = OURS[name]()
    found = audit(model, shape)
    assert [str(f) for f in found] == []
    assert found.ran
    assert (found.worst, bool(found), found.modules > 1) == (None, False, True)


def foreign() -> nn.Sequential:
    model = nn.Sequential(
        Q.spectral_norm(nn.Linear(6, 6)),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        nn.LayerNorm(6),
        Residual(nn.Linear(6, 6)),
        nn.GELU(),
    )
    model(torch.randn(3, 6))
    return model


def test_the_model_its_modes_and_the_random_numbers_to_come_stay_as_they_are() -> None:
    model = foreign()
    model[1].eval()
    before = {name: (id(t), t._version, t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    assert len(audit(model, (6,))) >= 4
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        identity, version, value = before[name]
        assert id(tensor) == identity
        assert tensor._version == version
        assert torch.equal(tensor, value)


def test_only_copies_are_run() -> None:
    class Counting(nn.Linear):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return super().forward(x)

    model = Counting(4, 4).to(torch.bfloat16)
    found = audit(model, (4,))
    assert of_kind(found, "low-precision")[0].attained > 0
    assert model.runs == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
    weight = hooked.weight
    assert of_kind(audit(hooked), "spectral-norm")
    assert hooked.weight is weight


def test_findings_are_the_same_again_worst_first_and_can_be_written_as_json() -> None:
    model = foreign()
    one, two = audit(model, (6,)), audit(model, (6,))
    assert json.dumps(one.as_dict(), allow_nan=False) == json.dumps(two.as_dict(), allow_nan=False)
    order = [("serious", "weak", "note").index(f.severity) for f in one]
    assert order == sorted(order)
    assert one.worst == "serious"
    assert len(one.at_least("note")) == len(one) > len(one.at_least("serious")) > 0
    assert {f.kind for f in one} >= {
        "sample-normalization",
        "batch-statistics",
        "active-dropout",
        "residual-sum",
        "steep-activation",
    }
    assert str(one).count("\n") == len(one)
    assert not of_kind(one, "not-audited")


def test_inputs_may_be_given_themselves() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    found = audit(model, inputs=(torch.randint(5, (7, 6)),))
    assert found.ran
    assert of_kind(found, "sample-normalization")
    assert audit(nn.Sequential(nn.Embedding(5, 4)), (6,)).ran
    assert audit(nn.Sequential(nn.Embedding(5, 4))).ran


def test_a_model_without_a_known_input_is_audited_without_a_run() -> None:
    found = audit(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))
    assert not found.ran or found.findings[0].kind == "sample-normalization"
    assert not audit(nn.ReLU()).ran
    assert "give the shape of an input" in str(audit(nn.ReLU()))


@pytest.mark.parametrize("shape", [(0,), (-1, 2), (1.5,), (True,)])
def test_a_shape_is_made_of_positive_integers(shape: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="positive integers"):
        audit(nn.Linear(2, 2), shape)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module"):
        audit(3)
    with pytest.raises(ValueError, match="not both"):
        audit(nn.Linear(2, 2), (2,), inputs=(torch.ones(1, 2),))
    with pytest.raises(UncertifiableError, match="meta"):
        audit(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="severity"):
        Finding("", "norm", "", "bad", "")
    with pytest.raises(ValueError, match="severity"):
        Audit((), modules=0, ran=True).at_least("bad")


def test_what_cannot_be_copied_is_refused_with_the_reason() -> None:
    class Sticky(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("glue")

    with pytest.raises(UncertifiableError, match="glue"):
        audit(Sticky())


def test_a_layer_that_fails_in_a_detector_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise IndexError("odd")

    found = audit(nn.Sequential(Failing(4), nn.GELU()))
    assert of_kind(found, "not-audited")
    assert "odd" in of_kind(found, "not-audited")[0].what
    assert of_kind(found, "steep-activation")


def test_numbers_that_are_not_known_are_not_written() -> None:
    data = Finding("a", "norm", "it is.", "note", "no.", numbers={"x": math.nan, "y": 1.0}).as_dict()
    assert data["numbers"] == {"y": 1.0}
    assert "claimed" not in data
    assert "bound" not in data
