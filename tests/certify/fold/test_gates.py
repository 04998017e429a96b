"""Certificates of GRU and LSTM layers: what runs, what is proved, how tight it is, and what is rejected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.produce import certify
from stableopt.certify.program import Program
from stableopt.certify.publish_gates import publish_gated
from stableopt.certify.verifier import verify
from stableopt.certify.verifier.gate_steps import Step, _logistic, _mixed
from stableopt.errors import CertificateError, UncertifiableError
from stableopt.nn import LastStep, Recurrence, clip_input, contracting, lipschitz
from stableopt.nn.input_clip import input_limit
from tests.certify.fold.sequence_laws import (
    SLACK,
    changed,
    constant,
    output,
    output_of,
    program_of,
    rejected,
    walked,
    with_tensor,
)
from tests.nn.adversary import worst_ratio

NORMS = ("l2", "linf", "token_max")
T, D = 6, 3
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: clip_input(nn.GRU(D, 4, batch_first=True), 1.0),
    "gru_deep": lambda: clip_input(nn.GRU(D, 3, 2, batch_first=True, bidirectional=True), 0.5),
    "gru_plain": lambda: clip_input(nn.GRU(D, 4, batch_first=True, bias=False), 2.0),
    "gru_open": lambda: nn.GRU(D, 3, batch_first=True),
    "gru_cell": lambda: Recurrence(clip_input(nn.GRUCell(D, 4), 1.0), reverse=True),
    "lstm": lambda: clip_input(nn.LSTM(D, 4, batch_first=True), 1.0),
    "lstm_deep": lambda: clip_input(nn.LSTM(D, 3, 2, batch_first=True, bidirectional=True, bias=False), 0.5),
    "lstm_short": lambda: clip_input(nn.LSTM(D, 4, batch_first=True, proj_size=2), 1.0),
    "lstm_open": lambda: nn.LSTM(D, 3, batch_first=True),
}
KEPT: dict[str, Callable[[], nn.Module]] = {
    "gru_kept": lambda: contracting(nn.GRU(D, 5, batch_first=True), 0.8, input_bound=1.0),
    "lstm_kept": lambda: contracting(nn.LSTM(D, 5, batch_first=True), 0.8, input_bound=1.0),
}
ALL = LAYERS | KEPT


def few(names: Iterable[str], *cheap: str) -> list[Any]:
    """All names for the slow run, a few for the others."""
    return [pytest.param(name, marks=[] if name in cheap else [pytest.mark.slow]) for name in names]


def mixed(names: Iterable[str], *cheap: tuple[str, str]) -> list[Any]:
    """All pairs of a name and a norm for the slow run, a few for the others."""
    return [
        pytest.param(name, norm, marks=[] if (name, norm) in cheap else [pytest.mark.slow])
        for name in names
        for norm in NORMS
    ]


def made(name: str) -> nn.Module:
    """A module whose parameters are not those of the start."""
    torch.manual_seed(len(name))
    module = ALL[name]()
    if name in LAYERS:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def published(name: str, norm: str = "l2") -> tuple[Program, dict[str, Any]]:
    program = program_of(made(name), (T, D), norm)
    return program, program.nodes[0]


@pytest.mark.parametrize("name", few(ALL, "gru_cell", "lstm_short"))
def test_a_program_computes_what_the_module_computes(name: str) -> None:
    module = made(name)
    for length in (1, T):
        x = 3.0 * torch.randn(4, length, D)
        program = program_of(module, (length, D), "linf")
        torch.testing.assert_close(output(program, x), output_of(module, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "norm"), mixed(KEPT, ("gru_kept", "l2"), ("lstm_kept", "linf")))
def test_the_verifier_proves_what_is_published_and_it_is_not_above_the_rule(name: str, norm: str) -> None:
    module = made(name)
    program = program_of(module, (T, D), norm)
    assert constant(program) <= lipschitz(module, norm).upper * SLACK
    assert constant(program, exact=True) == constant(program)


@pytest.mark.parametrize(("name", "norm"), mixed(ALL, ("lstm_kept", "l2"), ("gru", "token_max")))
def test_no_adversary_stretches_more_than_is_proved(name: str, norm: str) -> None:
    program = program_of(made(name), (T, D), norm)
    found = worst_ratio(lambda x: output(program, x), (T, D), norm, starts=8, steps=8)
    assert 0.0 < found <= constant(program)


# ------------------------------------------------------------------------------------------------------ the comparison map


@pytest.mark.parametrize("name", few(["gru", "gru_open", "lstm", "lstm_open", "lstm_short"], "gru", "lstm_short"))
def test_no_step_moves_an_entry_further_than_the_comparison_map(name: str) -> None:
    """The Jacobian of a step, at states that runs reach, and pairs of steps on the same side of the box."""
    module: Any = made(name)
    step, lstm = step_of(module), "lstm" in name
    cell = one_step(module)
    x = (10.0 if math.isinf(step.limit) else 1.0) * torch.randn(60, 12, D)
    h, c = torch.zeros(60, len(step.reach)), torch.zeros(60, step.n)
    A = step.grown(np.eye(step.states), step.still)
    B = step.grown(np.zeros((step.states, 1)), step.V)
    for t in range(12 if step.endless else T):
        state = torch.cat([c, h], 1) if lstm else h
        J_s, J_x = torch.func.vmap(torch.func.jacrev(cell, argnums=(0, 1)))(state, x[:, t])
        assert (J_s.abs().amax(0).numpy() <= A).all()
        assert (J_x.abs().amax(0).numpy() <= B).all()
        after = torch.func.vmap(cell)(state, x[:, t])
        for k in range(0, 60, 2):  # differences, large ones too
            w, dx = ((v[k] - v[k + 1]).abs().numpy()[:, None] for v in (state, x[:, t].clamp(-step.limit, step.limit)))
            most = step.grown(w, step.V @ dx)[:, 0]
            assert ((after[k] - after[k + 1]).abs().numpy() <= most).all()
        c, h = (after[:, : step.n], after[:, step.n :]) if lstm else (c, after)
        assert (h.abs().amax(0).numpy() <= step.reach).all()


def step_of(module: nn.Module, size: int = D, length: int = T) -> Any:
    program = program_of(module, (length, size), "l2")
    node, tensors = program.nodes[0], {k: v.numpy() for k, v in program.tensors.items()}
    biases = np.stack([tensors[node["bias"]], tensors[node["hidden_bias"]]])
    limit = math.inf if node["limit"] is None else node["limit"]
    projection = None if node["projection"] is None else tensors[node["projection"]]
    step: Any = Step(node["kind"], tensors[node["weight"]], tensors[node["input"]], biases, projection, limit, length)
    step.limit = limit
    return step


def one_step(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    W, V, b, d = (p.detach() for p in list(module.parameters())[:2][::-1] + list(module.parameters())[2:4])
    R = module.weight_hr_l0.detach() if getattr(module, "proj_size", 0) else None
    limit = input_limit(module)

    def gru(h: Tensor, x: Tensor) -> Tensor:
        (r, z, n), (r_h, z_h, n_h) = (V @ x.clamp(-limit, limit) + b).chunk(3), (W @ h + d).chunk(3)
        z = (z + z_h).sigmoid()
        return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h

    def lstm(state: Tensor, x: Tensor) -> Tensor:
        n = module.hidden_size
        i, f, g, o = (V @ x.clamp(-limit, limit) + b + W @ state[n:] + d).chunk(4)
        memory = f.sigmoid() * state[:n] + i.sigmoid() * g.tanh()
        y = o.sigmoid() * memory.tanh()
        return torch.cat([memory, y if R is None else R @ y])

    return gru if isinstance(module, nn.GRU) else lstm


def test_the_logistic_function_is_within_its_limit() -> None:
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([-math.inf, math.inf, 0.0, 1e300])])
    assert float(np.abs(_logistic(x.numpy()) - x.sigmoid().numpy()).max()) < 2.0**-41


def test_the_mix_is_the_supremum_over_the_gate() -> None:
    torch.manual_seed(0)
    keep, new, cross = (torch.rand(50, 1) * 10.0 ** torch.randint(-2, 3, (50, 1)) for _ in range(3))
    low = torch.rand(50) * torch.tensor([0.0, 1.0]).repeat(25)
    high = low + (1 - low) * torch.rand(50)
    z = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 2001)
    most = (z * keep + (1 - z) * new + z * (1 - z) * cross).amax(1, keepdim=True)
    found = torch.from_numpy(_mixed((low.numpy(), high.numpy()), keep.numpy(), new.numpy(), cross.numpy()))
    assert (found >= most * (1 - 1e-15)).all()
    torch.testing.assert_close(found, most, rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------------------------------------------------------- tight


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("norm", ["linf", "token_max"])
def test_a_unit_with_fixed_gates_attains_its_bound(kind: str, norm: str) -> None:
    module: Any = clip_input((nn.GRU if kind == "gru" else nn.LSTM)(1, 1, batch_first=True), 1.0)
    new = 2
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[new] = 1.0
        module.bias_ih_l0[1] = 1.5  # the gate that keeps
    z = 1 / (1 + math.exp(-1.5))
    gain = (1 - z if kind == "gru" else 0.25) * sum(z**k for k in range(T))
    assert gain <= constant(program_of(module, (T, 1), norm)) <= gain * (1 + 1e-8)
    x = torch.full((1, T, 1), 1e-5)
    assert float((output_of(module, x) - output_of(module, -x)).abs().max() / 2e-5) >= gain * (1 - 1e-8)


def test_a_gate_that_moves_a_full_state_attains_the_comparison_map() -> None:
    gru: Any = clip_input(nn.GRU(1, 1, batch_first=True), 1.0)
    lstm: Any = clip_input(nn.LSTM(1, 1, batch_first=True), 0.01)
    with torch.no_grad():
        for parameter in (*gru.parameters(), *lstm.parameters()):
            parameter.zero_()
        gru.weight_ih_l0.copy_(torch.tensor([[0.0], [0.1], [30.0]]))  # a state near 1 and a candidate near -1
        lstm.weight_ih_l0[1] = 0.1
        lstm.bias_ih_l0.copy_(torch.tensor([30.0, 1.0, 0.01, 0.0]))  # a memory near 0.01/(1 - f)
    for module, x in ((gru, torch.tensor([1.0] * 60 + [-1.0])), (lstm, torch.zeros(60))):
        x = x.reshape(1, -1, 1).requires_grad_()
        slope = torch.autograd.grad(module(x)[0][0, -1, 0], x)[0][0, -1, 0].abs()
        step = step_of(module, 1, 60)
        pushed = step.V * (np.arange(len(step.V)) == 1)[:, None, None]  # by the gate that keeps alone
        most = step.grown(np.zeros((step.states, 1)), pushed)
        assert 0.995 * most[-1, 0] <= slope <= most[-1, 0]


@pytest.mark.parametrize(("name", "norm"), mixed(KEPT))
def test_bounds_grow_with_the_length_up_to_the_gain_of_every_length(name: str, norm: str) -> None:
    module = made(name)
    bounds = [constant(program_of(module, (length, D), norm)) for length in (1, 5, 25, 1000)]
    assert bounds == sorted(bounds)
    walk = walked(program_of(module, (1000, D), norm))
    rate, gain = walk.g.stable[id(walk.nodes[0])]
    assert rate < 1
    assert gain is not None
    assert bounds[-1] <= float(gain) * (1 + 1e-6)
    long = worst_ratio(lambda x: output_of(module, x), (20, D), norm, starts=4, steps=4)
    assert long <= gain


# ------------------------------------------------------------------------------------------------------------- rejected


@pytest.mark.parametrize(
    ("name", "norm"), mixed([n for n in ALL if "deep" not in n], ("gru", "l2"), ("lstm_kept", "linf"))
)
def test_smaller_numbers_are_rejected(name: str, norm: str) -> None:
    program, node = published(name, norm)
    assert not rejected(program)
    for field in ("bound", "rate", "push"):
        assert rejected(changed(program, 0, **{field: node[field] * (1 - 1e-6)})), field


@pytest.mark.parametrize("name", few(["gru", "lstm", "lstm_short", "gru_kept"], "lstm_short"))
def test_another_layer_is_rejected(name: str) -> None:
    program, node = published(name)
    other = "lstm" if node["kind"] == "gru" else "gru"
    program = with_tensor(program, "wide", torch.ones(len(program.tensors[node["weight"]]), 11))
    wrong = {
        "limit": (1.01 * node["limit"], 100.0, None, 0.0), "kind": (other, "rnn"), "reverse": (1,), "length": (T + 1, float(T)),
        "weight": ("wide", "missing"), "input": ("wide",), "bias": ("wide", node["scaling"]), "hidden_bias": (node["scaling"],),
        "scaling": (node["bias"], None), "projection": ("wide", node["weight"]),
    }  # fmt: skip
    for field, values in wrong.items():
        for value in values:
            assert rejected(changed(program, 0, **{field: value})), (field, value)
    for field in ("weight", "input", "projection"):
        if node[field] is not None:
            assert rejected(with_tensor(program, node[field], 1.02 * program.tensors[node[field]])), field
            assert rejected(with_tensor(program, node[field], 1e300 * program.tensors[node[field]])), field
    for w in (-1.0, 0.0, 1e-30):
        assert rejected(with_tensor(program, node["scaling"], torch.full_like(program.tensors[node["scaling"]], w)))


def test_a_bound_needs_the_clip_that_the_operation_makes() -> None:
    """Beyond the box the layer is steeper than the bound of the clipped one, so the clip must be part of what runs."""
    module = nn.LSTM(1, 1, batch_first=True)
    values = [[8.0, 0, 3, 0], [0.0] * 4, [-6.0, -4, 0, 5], [0.0] * 4]
    with torch.no_grad():
        for parameter, entries in zip(module.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(entries).reshape(parameter.shape))
    x = torch.full((1, T, 1), 0.75)
    opened = output_of(module, x + 0.01) - output_of(module, x)
    program = program_of(clip_input(module, 0.25), (T, 1), "linf")
    assert opened.abs().max() / 0.01 > 1.0 > 0.2 > constant(program)
    assert torch.equal(output(program, x + 0.01), output(program, x))


@pytest.mark.parametrize("name", ["gru_open", "lstm_open"])
def test_gates_that_may_stay_open_have_a_bound_of_one_length_only(name: str) -> None:
    walk = walked(published(name)[0])
    rate, gain = walk.g.stable[id(walk.nodes[0])]
    assert rate >= 1
    assert gain is None


# -------------------------------------------------------------------------------------------------------- whole certificates


@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_a_certificate_of_a_classifier_of_sequences(norm: str, tmp_path: Path) -> None:
    cell = contracting(nn.GRUCell(D, 5), 0.8, input_bound=1.0)
    model = nn.Sequential(Recurrence(cell), LastStep(), nn.Linear(5, 2)).eval()
    certificate = certify(model, (T, D), norm=norm)
    assert {"stability", "margin_constants"} <= {claim["id"] for claim in certificate.claims["proved"]}
    found = verify(certificate.save(tmp_path)[1], exact=True)
    assert found.verified, found.reason
    with pytest.raises(CertificateError, match="'gated' has no rule"):
        CertifiedModel(certificate, "float64").predict(torch.randn(1, T, D))


class Classifier(nn.Module):
    def __init__(self, kind: Any, *, last: bool) -> None:
        super().__init__()
        self.rnn: nn.Module = clip_input(kind(D, 4, batch_first=True), 1.0)
        self.head, self.last = nn.Linear(4, 2), last

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.rnn(x)
        return self.head(states[-1] if self.last else outputs[:, -1])


@pytest.mark.parametrize(
    "kind", [pytest.param(nn.RNN, marks=pytest.mark.slow), nn.GRU, pytest.param(nn.LSTM, marks=pytest.mark.slow)]
)
def test_a_layer_inside_of_a_forward_gives_its_outputs(kind: type[nn.RNNBase]) -> None:
    certificate = certify(Classifier(kind, last=False).eval(), (T, D))
    assert certificate.lipschitz > 0
    with pytest.raises(UncertifiableError, match="last states"):
        certify(Classifier(kind, last=True).eval(), (T, D))


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.GRU(D, 2), "batch_first"),
        (nn.LSTM(D, 2), "batch_first"),
        (Recurrence(nn.GRUCell(D, 2), learn_initial=True), "learn_initial=False"),
    ],
)
def test_what_has_no_rule_says_why(module: nn.Module, word: str) -> None:
    with pytest.raises(UncertifiableError, match=word):
        program_of(module, (T, D), "l2")


def test_a_bound_that_no_number_holds_is_refused() -> None:
    settings = {"kind": "lstm", "bias": None, "hidden_bias": None, "projection": None, "limit": None, "length": 10**6}
    node = settings | {"weight": "W", "input": "V", "scaling": None}
    tensors = {"W": 3 * torch.ones(8, 2), "V": torch.ones(8, 1)}
    with pytest.raises(UncertifiableError, match="input_bound"):
        publish_gated(node, tensors, "l2")
    with pytest.raises(UncertifiableError, match="2\\^60"):
        publish_gated(node, tensors | {"W": 1e30 * tensors["W"]}, "linf")
    with pytest.raises(ValueError, match="shape"):
        program_of(clip_input(nn.GRU(D, 2, batch_first=True), 1.0), (D,), "l2")
