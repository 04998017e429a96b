"""Every model of the command line keeps its limit from the start and fits its data."""

from __future__ import annotations

import pytest
import torch

from stableopt import certify, lipschitz
from stableopt.cli.data import load_data
from stableopt.cli.models import RECIPES, build_model, prepare


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("limit", [1.0, 0.1, 5.0])
def test_a_new_model_respects_its_limit_and_uses_it(name: str, limit: float) -> None:
    data = prepare(name, load_data("digits"))
    model = build_model(name, data.shape, data.classes, limit).float().eval()
    assert model(data.x_test[:3]).shape == (3, 10)
    bound = lipschitz(model).upper
    assert 0.3 * limit < bound <= limit * (1 + 1e-5)  # in float32, before the certificate shrinks the weights
    assert certify(model, data.shape, lipschitz=limit).lipschitz <= limit


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of mlp"):
        build_model("transformer", (64,), 10, 1.0)
    with pytest.raises(ValueError, match="choose one of mlp"):
        prepare("transformer", load_data("digits"))


def test_initial_weights_depend_on_the_seed_only() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [p.detach() for p in build_model("cnn", (1, 8, 8), 10, 1.0).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(3), weights(4), strict=True))
