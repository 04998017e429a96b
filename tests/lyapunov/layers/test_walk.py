"""A walk sees the calls in order and takes its hooks away again, whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.lyapunov.layers import LayerProbe
from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating


class Log:
    """Writes down what it is told; multiplies the source and the result."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def start(self):
        self.calls, self.sources, self.results = [], [], []

    def source(self, x):
        self.sources.append(x)
        return self.factor * x

    def enter(self, name, module, args, kwargs):
        self.calls.append(name)

    def leave(self, name, module, output):
        self.calls.append(f"/{name}")

    def result(self, outputs):
        self.results.append(outputs)
        return [self.factor * y for y in outputs]


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_calls_are_named_in_order_and_numbered():
    shared = nn.Linear(2, 2)
    model, log = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared)), Log()
    Walk(model, lambda: model(torch.ones(1, 2)).sum() + model(torch.ones(1, 2)).sum(), log).run()
    assert log.calls == [
        "",
        "0",
        "/0",
        "1",
        "1.0",
        "/1.0",
        "0#2",
        "/0#2",
        "/1",
        "/",
    ]  # the second call of the model is not seen
    assert hooks(model) == []


def test_the_source_is_the_first_tensor_or_what_an_embedding_makes_of_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(4, 2), nn.Linear(2, 1)

        def forward(self, indices, mask):
            return {"out": self.head(self.tokens(indices)) + mask, "mask": mask}

    model, log = Model(), Log(0.0)
    seen = {}

    def probe():
        seen["out"] = model(torch.tensor([[0, 1]]), mask=torch.ones(1))["out"]
        return seen["out"].sum()

    Walk(model, probe, log).run()
    assert [x.shape for x in log.sources] == [(1, 2, 2)]  # the embedded tokens, not the mask
    assert [len(outputs) for outputs in log.results] == [2]
    assert seen["out"].eq(0.0).all()
    linear, log = nn.Linear(2, 1), Log()
    Walk(linear, lambda: linear(input=torch.ones(1, 2)).sum(), log).run()
    assert [x.shape for x in log.sources] == [(1, 2)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_hooks_are_gone_after_an_error(error):
    class Bad(nn.Module):
        def forward(self, x):
            raise error

    model = nn.Sequential(nn.Linear(2, 2), Bad())
    with pytest.raises(error):
        Walk(model, lambda: model(torch.ones(1, 2)).sum(), Log()).run()
    assert hooks(model) == []


def test_a_probe_that_does_not_call_the_model_is_told_so():
    with pytest.raises(ProbeError, match="did not call the model"):
        Walk(nn.Linear(1, 1), lambda: 1.0, Log()).run()


def test_a_closure_that_needs_a_graph_is_seen_once():
    model, log = nn.Sequential(nn.Linear(2, 1)), Log()
    x = torch.ones(1, 2, requires_grad=True)

    def penalty():
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    Walk(model, penalty, log).run()
    assert log.calls == ["", "0", "/0", "/"]


def test_a_model_that_needs_a_graph_within_is_seen_from_the_beginning():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 1)

        def forward(self, x):
            x.requires_grad_()
            return torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]

    model, log = Slope(), Log()
    Walk(model, lambda: model(torch.ones(1, 2)).sum(), log).run()
    assert log.calls == ["", "inner", "/inner", "/"]


def test_fused_layers_in_evaluation_call_their_modules():
    layer, log = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), Log()
    Walk(layer, lambda: layer(torch.ones(1, 3, 4)).sum(), log).run()
    assert "linear1" in log.calls
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True).eval(), torch.ones(1, 3, 4)
    probe = LayerProbe(attention, lambda: attention(x, x, x)[0].sum())
    assert probe.measure().how == "forward"  # the fused kernel has no derivative in forward mode


@pytest.mark.slow
def test_compiled_models_call_their_modules():
    model, log = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"), Log()
    model(torch.ones(1, 2))
    Walk(model, lambda: model(torch.ones(1, 2)).sum(), log).run()
    assert "_orig_mod.1" in log.calls


def test_different_floating_point_tensors_are_found_once():
    x, y = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    assert [t.dtype for t in floating([x, {"y": y, "again": x}, torch.ones(1, dtype=torch.int64), None, "text"])] == [
        x.dtype,
        y.dtype,
    ]


def test_arguments_can_be_replaced_where_a_call_begins():
    class Doubles(Log):
        def enter(self, name, module, args, kwargs):
            super().enter(name, module, args, kwargs)
            return ((2.0 * args[0],), kwargs) if name == "1" else None

        def result(self, outputs):
            self.output = outputs[0]
            return outputs

    model, observer = nn.Sequential(nn.Identity(), nn.Identity()), Doubles()
    Walk(model, lambda: model(torch.ones(1)).sum(), observer).run()
    assert float(observer.output) == 2.0


def test_a_transform_evaluates_as_often_as_it_likes_and_leaves_random_states():
    model, before = nn.Sequential(nn.Dropout(0.5)), torch.get_rng_state()
    walk = Walk(model, lambda: model(torch.ones(50)), Log())
    first, second = walk.run_in(lambda evaluate: (evaluate(), evaluate()))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ProbeError, match="did not call"):
        Walk(model, lambda: 0.0, Log()).run_in(lambda evaluate: evaluate())
