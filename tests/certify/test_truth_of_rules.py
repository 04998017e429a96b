"""The rules themselves are attacked: no Jacobian of a random program, and no change of its output, exceeds what is verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stableopt.certify.execute import apply
from stableopt.certify.program import Builder, Program
from stableopt.certify.publish import from_file, publish, to_file
from stableopt.certify.verifier import check
from tests.certify.random_programs import Draft, document, random_draft, safetensors
from tests.certify.second_reader import RefusedError
from tests.certify.second_rules import RULES as KNOWN
from tests.certify.second_verifier import constants

Nodes = list[dict[str, Any]]


def run(nodes: Nodes, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    values = [x[None]]
    for node in nodes:
        values.append(apply(node, tensors, [values[v] for v in node["in"]]))
    return values[-1][0]


def size(x: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return x.norm()
    return x.abs().max() if metric == "linf" else x.reshape(-1, x.shape[-1]).norm(dim=-1).max()


def steepest(function: Callable[[Tensor], Tensor], x: Tensor, metric: str) -> float:
    """A lower bound of the constant near x: the norm of the Jacobian; in token_max by ascent over directions."""
    J = torch.autograd.functional.jacobian(function, x, vectorize=False)
    y = function(x)
    matrix = J.reshape(y.numel(), x.numel())
    if metric == "l2":
        return float(torch.linalg.matrix_norm(matrix, 2))
    if metric == "linf":
        return float(matrix.abs().sum(1).max())
    best, tokens = 0.0, J.reshape(-1, y.shape[-1], x.numel() // x.shape[-1], x.shape[-1])
    for block in tokens:  # one output token: (d_out, tokens in, d_in)
        u = torch.randn(block.shape[0])
        for _ in range(20):
            v = torch.einsum("o,oti->ti", u / u.norm().clamp_min(1e-300), block)
            v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-300)
            u = torch.einsum("ti,oti->o", v, block)
        best = max(best, float(u.norm()))
    return best


def attack(nodes: Nodes, tensors: dict[str, Tensor], shape: tuple[int, ...], metric: str, points: int) -> float:
    """The greatest constant seen: of Jacobians at points of several sizes, and of differences between them."""
    best, previous = 0.0, None
    for k in range(points):
        x = torch.randn(shape) * 10.0 ** (k % 4 - 2)
        best = max(best, steepest(lambda x: run(nodes, tensors, x), x, metric))
        if previous is not None:
            change = size(run(nodes, tensors, x) - run(nodes, tensors, previous), metric)
            best = max(best, float(change / size(x - previous, metric)))
        previous = x
    return best


def judged(draft: Draft, points: int) -> float:
    """Attack a random program; return how much of its verified constant was seen."""
    weights = safetensors(draft.tensors)
    with np.errstate(all="ignore"):
        total = float(constants(draft.predicate([]), weights)[-1])
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(draft.values[name]).reshape(size))
        for name, (_, size, _) in draft.tensors.items()
    }
    seen = attack([from_file(node) for node in draft.nodes], tensors, tuple(draft.input["shape"]), draft.metric, points)
    assert seen <= total * (1 + 1e-7) + 1e-12, (draft.metric, draft.input, draft.nodes)
    return seen / total if total else 1.0


def modest(rng: np.random.Generator) -> Draft:
    """A random program whose numbers are not so wild that rounding hides the constant."""
    while True:
        draft = random_draft(rng, set(KNOWN) | {"sum", "concat"})
        sizes = [np.abs(v).max(initial=0.0) for v in draft.values.values()]
        if draft.dtype == "F64" and all(s == 0 or 1e-6 < s < 1e6 for s in sizes):
            try:
                constants(draft.predicate([]), safetensors(draft.tensors))
            except RefusedError:  # a value is not used
                continue
            return draft


def test_no_jacobian_of_a_random_program_exceeds_its_constant() -> None:
    rng = np.random.default_rng(0)
    ratios = [judged(modest(rng), 3) for _ in range(40)]
    assert max(ratios) > 0.99


@pytest.mark.slow
def test_no_jacobian_of_many_random_programs_exceeds_its_constant() -> None:
    rng = np.random.default_rng(1)
    ratios = [judged(modest(rng), 6) for _ in range(1000)]
    assert sum(r > 0.9 for r in ratios) > 100


# ------------------------------------------------------------------------------------- blocks, recurrences, attention as they run


def shear(d: int, _t: int) -> dict[str, Any]:
    half, width = d // 2, 3
    line = {"op": "linear", "bias": None, "transposed": False}
    return {
        "op": "shear", "half": half, "first": {**line, "weight": torch.randn(width, half)}, "decay": 0.9,
        "second": {**line, "weight": torch.randn(width, half)}, "steps": [0.7, 0.4],
        "activation": {"op": "activation", "name": "tanh"},
    }  # fmt: skip


def euler(d: int, _t: int) -> dict[str, Any]:
    K = torch.randn(d, d)
    line = {"op": "linear", "bias": None, "transposed": False}
    return {
        "op": "euler", "operator": {**line, "weight": torch.randn(3, d)}, "steps": torch.rand(3), "step": 0.5, "decay": 0.8,
        "skew": (K - K.T) * 0.2, "skew_bound": None, "times": 2, "activation": {"op": "activation", "name": "relu"},
        "free": {"inner": {**line, "weight": torch.randn(2, d)}, "outer": {**line, "weight": torch.randn(d, 2)}, "scale": 0.1},
    }  # fmt: skip


def recurrence(d: int, t: int) -> dict[str, Any]:
    n = 3
    W = torch.randn(n, n) * float(torch.rand(()))
    outer = float(torch.rand(())) < 0.4
    return {
        "op": "recurrence", "weight": W, "input": torch.randn(n, d), "bias": torch.randn(n), "initial": torch.randn(n),
        "step": torch.rand(n) * 1.2, "outer": 0.8 * torch.linalg.qr(torch.randn(n, n))[0] if outer else None,
        "activation": {"op": "activation", "name": "tanh"}, "reverse": bool(torch.rand(()) < 0.5), "length": t,
        "state": "l2" if outer or torch.rand(()) < 0.5 else "linf", "scaling": None if outer else torch.rand(n) + 0.2,
    }  # fmt: skip


def statespace(d: int, t: int) -> dict[str, Any]:
    n, radius, turn = 2, torch.rand(2) * 0.95, torch.randn(2) * 3
    skip = torch.randn(3, d) if torch.rand(()) < 0.5 else None
    return {
        "op": "statespace", "real": radius * turn.cos(), "imag": radius * turn.sin(), "input": torch.randn(2 * n, d),
        "output": torch.randn(3, 2 * n), "skip": skip, "bidirectional": bool(torch.rand(()) < 0.5), "length": t, "states": n,
        "scaling": torch.rand(n) + 0.2, "split": None if skip is None else 0.7,
    }  # fmt: skip


def attention(d: int, _t: int) -> dict[str, Any]:
    heads, w = 2, 2
    parts = {f"{side}_weight": torch.randn(heads * w, d) for side in ("query", "key", "value")}
    parts |= {f"{side}_bias": torch.randn(heads * w) for side in ("query", "key", "value")}
    return {
        "op": "attention", **parts, "output_weight": torch.randn(d, heads * w), "output_bias": None,
        "causal": bool(torch.rand(()) < 0.5),
        "scales": torch.rand(heads), "radii": [1.0, 1.5, 2.0],
    }  # fmt: skip


def gated(d: int, t: int) -> dict[str, Any]:
    """GRU and LSTM layers, some with strong weights, some with a projection."""
    kind, n = ("gru", "lstm")[int(torch.randint(2, ()))], 3
    gates, size = {"gru": 3, "lstm": 4}[kind], float(torch.rand(())) * 2
    projected = kind == "lstm" and float(torch.rand(())) < 0.5
    return {
        "op": "gated", "kind": kind, "weight": torch.randn(gates * n, 2 if projected else n) * size,
        "input": torch.randn(gates * n, d), "bias": torch.randn(gates * n), "hidden_bias": torch.randn(gates * n),
        "projection": torch.randn(2, n) if projected else None, "limit": 2.0 if torch.rand(()) < 0.7 else None,
        "reverse": bool(torch.rand(()) < 0.5), "length": t, "scaling": None,
    }  # fmt: skip


CASES = {
    "shear": (shear, ("l2", "token_max")),
    "euler": (euler, ("l2", "token_max")),
    "recurrence": (recurrence, ("l2", "linf", "token_max")),
    "statespace": (statespace, ("l2", "linf", "token_max")),
    "gated": (gated, ("l2", "linf", "token_max")),
    "attention": (attention, ("l2", "token_max")),
}


def verified(program: Program, metric: str) -> float:
    """The bound of a program of one operation, which the verifier accepts, and which it refuses if it is lowered."""
    draft = Draft(np.random.default_rng(0), metric, program.shape)
    draft.tensors = {k: ("F64", tuple(v.shape), v.contiguous().numpy().tobytes()) for k, v in program.tensors.items()}
    draft.nodes = [to_file(dict(node)) for node in publish(program).nodes]
    weights = safetensors(draft.tensors)

    def accepted(bound: str) -> bool:
        draft.nodes[0]["bound"] = bound
        statement = document(draft.predicate([{"id": "lipschitz", "norm": metric, "L": bound}]), weights)
        result = check(json.dumps(statement).encode(), lambda _: weights)
        return result.verified

    bound = draft.nodes[0]["bound"]
    assert accepted(bound)
    assert not accepted((float.fromhex(bound) * (1 - 1e-6)).hex())
    return float.fromhex(bound)


@pytest.mark.parametrize(("op", "metric"), [(op, metric) for op, (_, metrics) in CASES.items() for metric in metrics])
def test_no_jacobian_of_a_composite_operation_exceeds_its_bound(op: str, metric: str) -> None:
    for seed in range(2 if op != "gated" else 6):
        torch.manual_seed(seed)
        graph = Builder((3, 4), norm=metric)
        graph.add(*[(settings := CASES[op][0](4, 3)).pop("op")], graph.input, **settings)
        program = graph.program()
        bound = verified(program, metric)
        seen = attack(list(program.nodes), program.tensors, (3, 4), metric, 3)
        assert seen <= bound * (1 + 1e-9)
        assert seen > bound * 1e-3
