"""Tangents of representations along perturbed parameters are derivatives: central differences, closed forms, dropout, no trace."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from stableopt.lyapunov.layers.walk import ProbeError
from stableopt.lyapunov.profile.representations.mixed import representation_tangents, swapped
from stableopt.lyapunov.profile.representations.survey import chain_of


def directions(model, k=3):
    return [torch.randn(k, *p.shape) for p in model.parameters()]


def outputs(model, layers, x, seed):
    """The inputs of the layers after the first, and the output, as the model has them now, with this seed."""
    seen, handles = {}, []
    for before, name in pairwise(layers):
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(lambda m, a, before=before: seen.update({before: a[0].clone()}))
        )
    torch.manual_seed(seed)
    with torch.no_grad():
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        seen[layers[-1]] = model(x)
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    for handle in handles:
        handle.remove()
    return seen


def differences(model, layers, x, d, dx=None, step=1e-6):
    """Central differences of all representations."""
    found = {name: [] for name in layers}
    for i in range(len(d[0])):
        ends = []
        for sign in (step, -step):
            with torch.no_grad():
                before = [p.clone() for p in model.parameters()]
                for p, v in zip(model.parameters(), d, strict=True):
                    p.add_(sign * v[i])
                ends.append(outputs(model, layers, x if dx is None else x + sign * dx[i], 7))
                for p, value in zip(model.parameters(), before, strict=True):
                    p.copy_(value)
        for name in layers:
            found[name].append((ends[0][name] - ends[1][name]) / (2.0 * step))
    return {name: torch.stack(parts) for name, parts in found.items()}


class Encoder(nn.Module):
    """Dropout of transposed tensors: the mask depends on the strides."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.3, activation="gelu")

    def forward(self, x):
        return self.layer(self.embed(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def nets():
    x, image = torch.randn(5, 4), torch.randn(3, 2, 6, 6)
    yield (
        "batch statistics",
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 2)),
        x,
        ["0", "4"],
    )
    yield (
        "convolutions",
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(48, 2)),
        image,
        ["0", "4"],
    )
    yield "encoder", Encoder(), torch.randn(2, 3, 4), ["embed", "layer"]
    yield "lstm", Recurrent(nn.LSTM), torch.randn(2, 4, 3), ["rnn", "head"]
    yield "gru", Recurrent(nn.GRU), torch.randn(2, 4, 3), ["rnn", "head"]
    yield (
        "parametrized",
        nn.Sequential(
            parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 2))
        ),
        x,
        ["0", "2"],
    )
    shared = nn.Linear(4, 4)
    yield (
        "tied",
        nn.Sequential(shared, nn.Tanh(), nn.Sequential(nn.Linear(4, 4)), nn.Tanh(), shared),
        x,
        ["0", "2.0", "0#2"],
    )


NETS = ["batch statistics", "convolutions", "encoder", "lstm", "gru", "parametrized", "tied"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_tangents_are_central_differences(name, training):
    _, model, x, layers = next(net for net in nets() if net[0] == name)
    model.train(training)
    d, dx = directions(model), torch.randn(3, *x.shape)
    for shift in (None, dx):
        torch.manual_seed(7)
        found = representation_tangents(model, x, d, d_input=shift)
        assert list(found) == ["input", *layers]
        if name == "tied":  # the helper sees the first call of a module only
            torch.manual_seed(7)
            end = differences(model, ["0#2"], x, d, shift)["0#2"]
            assert found["0#2"] == pytest.approx(end.numpy(), rel=1e-6, abs=1e-8)
            continue
        expected = differences(model, layers, x, d, shift)
        for layer in layers:
            assert found[layer].shape == (3, *expected[layer].shape[1:])
            assert torch.allclose(found[layer], expected[layer], rtol=1e-6, atol=1e-8), (layer, shift is None)
        assert torch.equal(found["input"], torch.zeros_like(dx) if shift is None else dx)


def test_a_chain_that_is_known_gives_the_same_for_fewer_passes():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))
    x, d = torch.randn(6, 4), directions(model)
    chain = chain_of(model.eval(), x, one_by_one=False)
    for training, forward in (
        (False, 1),
        (True, 2),
        (True, 2),
        (False, 2),
        (False, 1),
    ):  # 2: the modes have changed, or it draws
        model.train(training)
        with torch.no_grad():
            model[0].weight.add_(0.1)
        torch.manual_seed(5)
        expected = representation_tangents(model, 2.0 * x, d)
        torch.manual_seed(5)
        found = representation_tangents(model, 2.0 * x, d, chain=chain)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert found.cost == (forward + 6) / 3
    with pytest.raises(ValueError, match="another model"):
        representation_tangents(nn.Linear(4, 2), x, [None, None], d_input=x[None], chain=chain)


def test_a_linear_model_has_the_closed_form():
    model, x = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)), torch.randn(5, 3)
    (dA, dB), (A, B) = directions(model), [p.detach() for p in model.parameters()]
    dx = torch.randn(3, 5, 3)
    found = representation_tangents(model, x, [dA, dB], d_input=dx)
    dh = x @ dA.mT + dx @ A.T
    assert torch.allclose(found["0"], dh)
    assert torch.allclose(found["1"], dh @ B.T + x @ A.T @ dB.mT)
    flat = found["1"].reshape(3, -1)
    assert torch.allclose(found.gram["1"], flat @ flat.T)
    only = representation_tangents(model, x, [None, dB])
    assert torch.equal(only["0"], torch.zeros_like(dh))
    assert torch.allclose(only["1"], x @ A.T @ dB.mT)
    one = representation_tangents(model, x, [dA[:1], dB[:1]], d_input=dx[:1])
    assert torch.allclose(one["1"], found["1"][:1])
    some = representation_tangents(model, x, [dB], parameters=[model[1].weight], layers=["0", "1"])
    assert torch.allclose(some["1"], only["1"])


def test_the_embedding_moves_the_input():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
    tokens = torch.tensor([[1, 2, 3], [3, 0, 6]])
    d = directions(model, 2)
    found = representation_tangents(model, tokens, d)
    assert torch.equal(found["input"], d[0][:, tokens])
    shift = torch.randn(2, 2, 3, 4)
    both = representation_tangents(model, tokens, d, d_input=shift)
    assert torch.allclose(both["input"], d[0][:, tokens] + shift)
    end = next(reversed(list(both)))
    assert torch.allclose(both[end] - found[end], shift.reshape(2, 2, 12) @ model[2].weight.T)


def test_gram_matrices_of_low_precision_are_exact_products():
    model = nn.Linear(2, 3, bias=False).float()
    found = representation_tangents(model, torch.ones(1, 2, dtype=torch.float32), [torch.full((1, 3, 2), 1e30)])
    assert found.gram["Linear"].dtype == torch.float64
    assert float(found.gram["Linear"]) == pytest.approx(12e60, rel=1e-6)  # float32 ends at 3e38


def test_a_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 1),
    )
    model(torch.randn(5, 3)).sum().backward()
    tensors = [*model.parameters(), *model.buffers()]
    x, d, random = torch.randn(5, 3), directions(model), torch.get_rng_state()
    with parametrize.cached():
        held = model[3].weight  # moves the vectors of the power iteration, as every access in training
        before = [(t.detach().clone(), t._version, None if t.grad is None else t.grad.clone()) for t in tensors]
        found = representation_tangents(model, x, d)
        weight = [p for name, p in model.named_parameters() if name == "3.parametrizations.weight.original"]
        alone = representation_tangents(model, x, [torch.eye(4)[None]], parameters=weight)
        assert model[3].weight is held
    assert float(found["3"].norm()) > 0.0
    assert float(alone["3"].norm()) > 0.0  # the cached weight would not move
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    for t, (value, version, grad) in zip(tensors, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version
        assert (t.grad is None) == (grad is None)
        assert grad is None or torch.equal(t.grad, grad)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_error_leaves_the_parameters_in_their_places():
    class Breaks(nn.Linear):
        calls = 0

        def forward(self, x):
            Breaks.calls += 1
            if Breaks.calls > 3:
                raise RuntimeError("broken")
            return super().forward(x)

    model = Breaks(2, 2)
    own = list(model.parameters())
    with pytest.raises(RuntimeError, match="broken"):
        representation_tangents(model, torch.ones(1, 2), directions(model))
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_hook_computes_stay_tensors_without_tangents():
    model, x = nn.Sequential(weight_norm(nn.Linear(3, 2))), torch.randn(4, 3)
    model(x)
    kept = model[0].weight
    found = representation_tangents(model, x, directions(model))
    assert model[0].weight is kept
    assert float(found["0"].norm()) > 0.0


def test_wrong_shapes_are_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    d = directions(model)
    for args, words in [
        ((d[:1],), "need as many"),
        (([d[0], d[1][:2]],), "same number"),
        (([d[1], d[0]],), "must have the shape"),
        (([None, None],), "same number"),
    ]:
        with pytest.raises(ValueError, match=words):
            representation_tangents(model, x, *args)
    with pytest.raises(ValueError, match="d_input"):
        representation_tangents(model, x, d, d_input=torch.randn(3, 4, 2))
    with pytest.raises(ValueError, match="not one of the model"):
        representation_tangents(model, x, d, parameters=[nn.Parameter(torch.ones(2, 3)), model.bias])
    with pytest.raises(ProbeError, match="did not call"):
        representation_tangents(model, lambda: None, d)


def test_parameters_are_swapped_in_every_place():
    layer = nn.Linear(2, 2, bias=False)
    both = nn.ModuleList([layer, nn.Linear(2, 2, bias=False)])
    both[1].weight = layer.weight
    with swapped(both, [layer.weight], [torch.eye(2)]):
        assert torch.equal(both[1](torch.ones(1, 2)), torch.ones(1, 2))
    assert both[1].weight is layer.weight
    rnn = nn.RNN(1, 1)
    weights, references = rnn._flat_weights, rnn._flat_weight_refs
    with swapped(rnn, list(rnn.parameters()), [torch.zeros_like(p) for p in rnn.parameters()]):
        assert float(rnn(torch.ones(1, 1, 1))[0].abs()) == 0.0
    assert rnn._flat_weights is weights
    assert rnn._flat_weight_refs is references
