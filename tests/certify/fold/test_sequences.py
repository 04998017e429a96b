"""Certificates of recurrences and state spaces: what runs, what is proved, how tight it is, and what is rejected."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.certify.execute import apply, lower, run
from stableopt.certify.program import Program
from stableopt.certify.verifier.sequences import power_sum
from stableopt.errors import UncertifiableError
from stableopt.nn import (
    AntisymmetricCell,
    ContractingCell,
    DiagonalMetricCell,
    DiagonalStateSpace,
    LastStep,
    LeakyCell,
    MeanOverTime,
    Recurrence,
    StateSpaceBlock,
    StateSpaceStack,
    clip_input,
    contracting,
    lipschitz,
)
from tests.certify.fold.sequence_laws import (
    SLACK,
    changed,
    constant,
    output,
    output_of,
    pairs,
    program_of,
    rejected,
    walked,
    with_tensor,
)
from tests.nn.adversary import worst_ratio

NORMS = ("l2", "linf", "token_max")
T, D = 7, 3
CELLS: dict[str, Callable[[], nn.Module]] = {
    "contracting": lambda: Recurrence(ContractingCell(D, 5)),
    "weighted": lambda: Recurrence(ContractingCell(D, 5, weighted=True, activation="softplus"), reverse=True),
    "initial": lambda: Recurrence(ContractingCell(D, 4, activation="leaky_relu"), learn_initial=True),
    "leaky": lambda: Recurrence(LeakyCell(D, 5)),
    "leaky_linf": lambda: Recurrence(LeakyCell(D, 5, norm="linf", activation="hardtanh")),
    "metric": lambda: Recurrence(DiagonalMetricCell(D, 5)),
    "antisymmetric": lambda: Recurrence(AntisymmetricCell(D, 5)),
    "antisymmetric_reverse": lambda: Recurrence(AntisymmetricCell(D, 5, activation="relu"), reverse=True),
    "rnn_cell": lambda: Recurrence(nn.RNNCell(D, 4, nonlinearity="relu")),
    "rnn": lambda: nn.RNN(D, 4, batch_first=True),
    "rnn_deep": lambda: nn.RNN(D, 3, 2, batch_first=True, bidirectional=True),
    "rnn_clipped": lambda: clip_input(nn.RNN(D, 3, batch_first=True, bias=False), 0.75),
}
SPACES: dict[str, Callable[[], nn.Module]] = {
    "space": lambda: DiagonalStateSpace(D, 4, gain=2.0),
    "space_both": lambda: DiagonalStateSpace(D, 3, 2, bidirectional=True),
    "space_plain": lambda: DiagonalStateSpace(D, 4, skip=False),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "last": LastStep,
    "mean": lambda: MeanOverTime(T),
    "block": lambda: StateSpaceBlock(D, 4),
    "stack": lambda: StateSpaceStack(D, 4, 3, 2, 2, gain=3.0),
}
ALL = CELLS | SPACES | OTHERS


def made(name: str, *, spread: float = 0.5) -> nn.Module:
    """A module whose parameters are not those of the start."""
    torch.manual_seed(len(name))
    module = ALL[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", ALL)
def test_a_program_computes_what_the_module_computes(name: str) -> None:
    module = made(name)
    for length in (1, T):
        if name == "mean" and length < T:
            continue
        x = 3.0 * torch.randn(4, length, D)
        program = program_of(module, (length, D), "l2")
        torch.testing.assert_close(output(program, x), output_of(module, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "norm"), pairs(ALL, NORMS))
def test_the_verifier_proves_what_is_published_and_it_is_not_above_the_rule(name: str, norm: str) -> None:
    module = made(name)
    program = program_of(module, (T, D), norm)
    proved = constant(program)
    try:
        rule = lipschitz(module, norm).upper
    except UncertifiableError:
        return
    assert proved <= rule * SLACK, (proved, rule)


@pytest.mark.parametrize(("name", "norm"), pairs([*CELLS, *SPACES], NORMS))
def test_no_adversary_stretches_more_than_is_proved(name: str, norm: str) -> None:
    module = made(name)
    program = program_of(module, (T, D), norm)
    found = worst_ratio(lambda x: output(program, x), (T, D), norm, starts=8, steps=12)
    assert 0.0 < found <= constant(program)


@pytest.mark.parametrize("name", [*CELLS, *SPACES])
def test_the_simple_operations_of_a_recurrence_run_to_the_same_bits(name: str) -> None:
    program = program_of(made(name).float(), (T, D), "l2")
    tensors = {key: value.float() for key, value in program.tensors.items()}
    for node in program.nodes:
        if node["op"] in {"recurrence", "statespace"}:
            width = tensors[node["input"]].shape[1]
            x = torch.randn(3, T, width, dtype=torch.float32)
            assert torch.equal(apply(node, tensors, [x]), run(lower(node), tensors, [x]))


# ------------------------------------------------------------------------------------------------------------ tight


def scalar_rnn(weight: float, drive: float) -> nn.RNN:
    rnn = nn.RNN(1, 1, batch_first=True, nonlinearity="relu", bias=True)
    with torch.no_grad():
        for parameter, value in zip(rnn.parameters(), (drive, weight, 1.0, 0.0), strict=True):
            parameter.fill_(value)
    return rnn


@pytest.mark.parametrize("norm", ["linf", "token_max"])
@pytest.mark.parametrize("weight", [0.5, 0.9, 1.0, 1.5])
def test_the_sum_of_powers_is_attained_by_one_unit_under_a_constant_input(norm: str, weight: float) -> None:
    rnn, length = scalar_rnn(weight, 2.0), 6
    proved = constant(program_of(rnn, (length, 1), norm))
    x = torch.ones(1, length, 1)
    reached = float((output_of(rnn, 2 * x) - output_of(rnn, x)).abs().max())
    assert reached <= proved <= reached * (1 + 1e-8)


def test_a_state_space_attains_its_bound_for_a_real_positive_eigenvalue() -> None:
    layer = DiagonalStateSpace(1, 1, skip=False, gain=2.0)
    with torch.no_grad():
        layer.phase.zero_()
        layer.input_weight.copy_(torch.tensor([[1.0], [0.0]]))
        layer.output_weight.copy_(torch.tensor([[1.0, 0.0]]))
    length = 1500
    for norm in ("linf", "token_max", "l2"):
        program = program_of(layer, (length, 1), norm)
        x = torch.ones(1, length, 1)
        size = (lambda v: float(v.norm())) if norm == "l2" else (lambda v: float(v.abs().max()))
        reached = size(layer(x).detach()) / size(x)
        assert reached <= constant(program) <= reached * (1.1 if norm == "l2" else 1 + 1e-6)


def test_bounds_of_a_finite_length_approach_those_of_every_length() -> None:
    module = made("metric")
    every = lipschitz(module, "l2").upper
    bounds = [constant(program_of(module, (length, D), "l2")) for length in (1, 8, 64, 2000)]
    assert bounds == sorted(bounds)
    assert bounds[0] < 0.2 * every
    assert abs(bounds[-1] / every - 1) < 1e-6


def test_the_sum_of_powers_is_rounded_up_a_little() -> None:
    for a in (Fraction(0), Fraction(0.3), Fraction(1), Fraction(0.999), Fraction(7, 5)):
        for n in (1, 2, 3, 7, 64, 101):
            exact = sum((a**k for k in range(n)), Fraction(0))
            total, power = power_sum(a, n)
            assert exact <= total <= exact * (1 + Fraction(1, 2**80))
            assert power >= a**n


# --------------------------------------------------------------------------------------------------------- rejected


def node_of(name: str, norm: str = "l2") -> tuple[Program, int, dict[str, Any]]:
    program = program_of(made(name), (T, D), norm)
    index = next(i for i, node in enumerate(program.nodes) if node["op"] in {"recurrence", "statespace"})
    return program, index, program.nodes[index]


@pytest.mark.parametrize(("name", "norm"), pairs([*CELLS, *SPACES], NORMS))
def test_smaller_numbers_are_rejected(name: str, norm: str) -> None:
    program, index, node = node_of(name, norm)
    walked(program)
    for field in ("bound", "rate", "push", "state_gain", "weight_bound"):
        if node.get(field):
            assert rejected(changed(program, index, **{field: node[field] * (1 - 1e-6)})), field


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrence_with_other_settings_is_rejected(name: str) -> None:
    program, index, node = node_of(name)
    program = with_tensor(program, "wide", torch.ones(program.tensors[node["weight"]].shape[0], 11))
    wrong = {
        "length": T + 1, "reverse": 1, "state": "l1", "activation": {"op": "activation", "name": "silu"},
        "weight": "wide", "input": "wide", "scaling": node["input"],
    }  # fmt: skip
    for field, value in wrong.items():
        assert rejected(changed(program, index, **{field: value})), field
    larger = with_tensor(program, node["weight"], 1.01 * program.tensors[node["weight"]])
    faster = with_tensor(program, node["input"], 1.01 * program.tensors[node["input"]])
    assert rejected(faster)
    assert rejected(larger)
    if node["step"] is not None:
        assert rejected(with_tensor(program, node["step"], -program.tensors[node["step"]]))


@pytest.mark.parametrize(("name", "norm"), pairs(SPACES, NORMS))
def test_a_state_space_without_a_stable_eigenvalue_is_rejected(name: str, norm: str) -> None:
    program, index, node = node_of(name, norm)
    real, imag = program.tensors[node["real"]], program.tensors[node["imag"]]
    for size in (1.0, 1.0 + 1e-12, 2.0):
        grown = size * real / torch.hypot(real, imag)
        turned = size * imag / torch.hypot(real, imag)
        assert rejected(with_tensor(with_tensor(program, node["real"], grown), node["imag"], turned))
    for field, value in {"length": T + 1, "states": 3, "skip": node["output"], "bidirectional": None}.items():
        if node[field] != value:
            assert rejected(changed(program, index, **{field: value})), field
    assert rejected(with_tensor(program, node["output"], 1.01 * program.tensors[node["output"]]))
    assert rejected(with_tensor(program, node["input"], 1.01 * program.tensors[node["input"]]))


@pytest.mark.parametrize(("name", "norm"), pairs(["contracting", "leaky", "antisymmetric", "space"], NORMS))
def test_a_rate_and_a_gain_for_every_length_are_known_to_the_claims(name: str, norm: str) -> None:
    module = made(name)
    walk = walked(program_of(module, (400, D), norm))
    rate, gain = walk.g.stable[id(walk.nodes[0])]
    assert rate < 1
    assert gain is not None
    assert gain <= lipschitz(module, norm).upper * (1 + 1e-6)
    long = worst_ratio(lambda x: output_of(module, x[:, :30]), (30, D), norm, starts=4, steps=4)
    assert long <= gain


def test_a_recurrence_that_does_not_contract_has_no_gain_for_every_length() -> None:
    walk = walked(program_of(scalar_rnn(1.5, 1.0), (4, 1), "l2"))
    rate, gain = walk.g.stable[id(walk.nodes[0])]
    assert rate >= 1.5
    assert gain is None


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (Recurrence(LeakyCell(D, 2), return_state=True), "return_state=False"),
        (Recurrence(LeakyCell(D, 2), batch_first=False), "batch_first"),
        (nn.RNN(D, 2), "batch_first"),
        (LastStep(batch_first=False), "batch_first"),
        (MeanOverTime(batch_first=False), "batch_first"),
    ],
)
def test_what_has_no_rule_says_why(module: nn.Module, word: str) -> None:
    with pytest.raises(UncertifiableError, match=word):
        program_of(module, (T, D), "l2")


@pytest.mark.parametrize("module", [Recurrence(LeakyCell(D, 2), length=T - 1), MeanOverTime(T + 1)])
def test_lengths_that_a_module_refuses_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="declared"):
        program_of(module, (T, D), "l2")
    with pytest.raises(ValueError, match="shape"):
        program_of(Recurrence(LeakyCell(D, 2)), (D,), "l2")


def test_a_recurrence_that_is_kept_contracting_is_certified_for_a_thousand_steps() -> None:
    rnn = contracting(nn.RNN(D, 6, batch_first=True), 0.9)
    program = program_of(rnn, (1000, D), "l2")
    assert constant(program, exact=True) == constant(program) <= lipschitz(rnn).upper * SLACK
