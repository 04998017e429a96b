"""What a recurrence computes in a runtime stays within the analysis, which the factor of a step keeps from growing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt.certify.deployed import CertifiedModel
from stableopt.certify.execute import apply, lower, run
from stableopt.certify.execute_sequences import recurrence_step
from stableopt.certify.produce import certify
from stableopt.certify.program import Program
from stableopt.certify.publish import publish
from stableopt.certify.rounding import Analysis, State
from stableopt.certify.rounding_recurrence import recurrence_error, state_conversion
from stableopt.certify.rounding_terms import size
from stableopt.certify.runtime import RUNTIMES
from stableopt.nn import ContractingCell, LastStep, Recurrence
from tests.certify.fold.sequence_laws import changed, program_of
from tests.certify.fold.test_sequences import CELLS, D, made

T = 12
NORMS = ("l2", "linf", "token_max")
SLOW = pytest.mark.slow


def programs(name: str, norm: str, length: int = T) -> Program:
    """A published recurrence whose numbers every runtime holds; its bounds are those of these numbers."""
    module = made(name, spread=0.2)
    program = program_of(module, (length, D), norm)
    kept = {key: value.bfloat16() for key, value in program.tensors.items()}
    bare = tuple(
        {k: v for k, v in node.items() if k not in {"bound", "rate", "push", "weight_bound"}} for node in program.nodes
    )
    return publish(Program(bare, kept, program.shape, norm))


def lowered(program: Program, x: Tensor, runtime: str) -> Tensor:
    """Run the simple operations, as a deployed network does."""
    kind = RUNTIMES[runtime]
    tensors = {key: value.to(kind.dtype) for key, value in program.tensors.items()}
    values = [x.to(kind.dtype)]
    with torch.no_grad(), torch.autocast("cpu", dtype=kind.autocast, enabled=kind.autocast is not None):
        for node in program.nodes:
            values.append(run(lower(node), tensors, [values[v] for v in node["in"]]))
    return values[-1].double()


def analysed(program: Program, x: Tensor, runtime: str) -> Any:
    tensors = {key: value.double() for key, value in program.tensors.items()}
    analysis = Analysis(program.nodes, tensors, RUNTIMES[runtime], program.norm)
    return analysis.settled(analysis.run(x.double()))


def exact(program: Program, x: Tensor) -> Tensor:
    return run(program.nodes, {key: value.double() for key, value in program.tensors.items()}, [x.double()])


def attacked(program: Program, x: Tensor, runtime: str, radius: float, rounds: int) -> Tensor:
    """Climb at random to inputs in the ball at which the run is as far from the exact value as possible."""
    best = torch.zeros(len(x))
    place = x.clone()
    for _ in range(rounds):
        step = torch.randn_like(x) * 10.0 ** torch.randint(-8, 1, (len(x), 1, 1))
        new = place + step
        away = new - x
        new = x + away * (radius / size(away, program.norm).clamp_min(radius) * (1 - 1e-9)).reshape(-1, 1, 1)
        error = size(lowered(program, new, runtime) - exact(program, new), program.norm)
        place = torch.where((error > best).reshape(-1, 1, 1), new, place)
        best = torch.maximum(best, error)
    return best


@pytest.mark.parametrize(
    ("name", "norm", "runtime"),
    [
        pytest.param(name, norm, runtime, marks=[] if (name, norm, runtime) in {
            ("weighted", "l2", "float32"), ("initial", "linf", "bfloat16"), ("rnn_deep", "token_max", "float16"),
            ("antisymmetric_reverse", "l2", "bfloat16"), ("metric", "token_max", "float32"),
        } else [SLOW])
        for name in CELLS for norm in NORMS for runtime in ("float32", "bfloat16", "float16")
    ],
)  # fmt: skip
def test_no_run_on_a_ball_is_further_from_the_exact_value(name: str, norm: str, runtime: str) -> None:
    program = programs(name, norm)
    x = torch.randn(8, T, D) * torch.logspace(-1, 1, 8).reshape(-1, 1, 1)
    state = analysed(program, x, runtime)
    for radius in (1e-12, 0.3):
        found = attacked(program, x, runtime, radius, 6)
        limit = state.e0 + state.e1 * radius + state.d
        assert bool((found <= limit).all()), float((found / limit).max())
        assert bool((state.cap > 0).all())


def test_scales_of_a_metric_are_no_part_of_what_a_runtime_rounds() -> None:
    model = nn.Sequential(made("metric").float(), LastStep(), nn.Linear(5, 3)).float().eval()
    claim = certify(model, (T, D))
    assert claim.program.tensors[claim.program.nodes[0]["scaling"]].dtype == torch.float64
    answer = CertifiedModel(claim, "float32").predict(3.0 * torch.randn(8, T, D, dtype=torch.float32))
    assert float(answer.radii.max()) > 0


def test_errors_that_add_up_are_counted_at_every_step() -> None:
    """One unit loses what is added to 1 at every step: a factor of a step below the true one would be seen."""
    rnn: Any = nn.RNN(1, 1, batch_first=True, nonlinearity="relu", bias=False)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(1.0)
        rnn.weight_ih_l0.fill_(1.0)
    program = program_of(rnn.float(), (300, 1), "linf")
    x = torch.full((1, 300, 1), 2.0**-25)
    x[0, 0] = 1.0
    found = size(lowered(program, x, "float32") - exact(program, x), "linf")  # the input is exact
    assert found <= own(program, x) <= 20 * found
    assert found > own(changed(program, 0, rate=0.9 * program.nodes[0]["rate"]), x)


def own(program: Program, x: Tensor) -> Tensor:
    """The error that the recurrence adds to an exact input."""
    tensors, zero = {key: value.double() for key, value in program.tensors.items()}, x.new_zeros(len(x))
    start = State(x, zero, zero, 0.0, zero, 0.0, zero + math.inf)
    return recurrence_error(Analysis(program.nodes, tensors, RUNTIMES["float32"], "linf"), program.nodes[0], start).e0


@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=SLOW)])
def test_a_contracting_cell_keeps_nearly_its_radius_over_many_steps(norm: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Recurrence(ContractingCell(D, 16)), LastStep(), nn.Linear(16, 3)).float().eval()
    claim = certify(model, (100, D), norm=norm)
    x = 4.0 * torch.randn(4, 100, D, dtype=torch.float32)
    single, double = (
        CertifiedModel(claim, runtime).predict(x.to(RUNTIMES[runtime].dtype)) for runtime in ("float32", "float64")
    )
    assert bool((double.radii > 0).all())
    assert bool((single.radii <= double.radii).all())
    assert bool((single.radii >= 0.9 * double.radii - 1e-3).all())


@pytest.mark.parametrize("name", ["weighted", "antisymmetric", "rnn", "leaky_linf"])
def test_one_step_after_the_other_is_the_recurrence(name: str) -> None:
    program = programs(name, "l2", 4)
    node, tensors = program.nodes[0], {key: value.float() for key, value in program.tensors.items()}
    x = torch.randn(2, 4, D, dtype=torch.float32)
    states = apply(node, tensors, [x])
    order = [3, 2, 1, 0] if node["reverse"] else [0, 1, 2, 3]
    for before, t in itertools.pairwise(order):
        inputs = [x[:, t : t + 1], states[:, before : before + 1]]
        torch.testing.assert_close(run(recurrence_step(node), tensors, inputs), states[:, t : t + 1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("state", ["l2", "linf"])
def test_the_norms_of_states_are_converted_by_what_a_vector_attains(norm: str, state: str) -> None:
    d = torch.tensor([0.5, 1.0, 4.0])
    into, out = state_conversion({"state": state}, d, norm)
    h = torch.cat(
        [
            torch.randn(2000, 3),
            torch.randn(2000, 3).sign(),
            d * torch.randn(2000, 3).sign(),
            torch.eye(3),
            d * torch.eye(3),
        ]
    )
    inner = (d * h).norm(dim=1) if state == "l2" else (h.abs() / d).amax(1)
    outer = h.abs().amax(1) if norm == "linf" else h.norm(dim=1)
    assert 1.0 <= into / float((inner / outer).max()) <= 1.01
    assert 1.0 <= out / float((outer / inner).max()) <= 1.01
