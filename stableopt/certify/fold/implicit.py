r"""The rules of implicit blocks: what is certified is the number of iterations that runs, not the solution of the equation."""

from __future__ import annotations

from typing import Any

import torch

from stableopt.certify.fold.fields import field_step
from stableopt.certify.fold.parts import euler, linear_operator
from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.certify.publish_blocks import storable
from stableopt.errors import UncertifiableError
from stableopt.nn.implicit import BackwardEulerBlock, ForwardBackward, ProximalBlock, ResolventBlock
from stableopt.nn.implicit.block import ImplicitBlock
from stableopt.nn.residual.fields import check_field

__all__: list[str] = []


@fold.register(ProximalBlock)
@fold.register(ResolventBlock)
def _(module: ImplicitBlock, graph: Builder, value: Value) -> Value:
    solver = module.solver
    if type(solver) is not ForwardBackward:
        raise UncertifiableError(
            f"the solver {type(solver).__name__} stops when its residual is small, and what it returns is a function of the input "
            "of which no constant is proved. Give the block solver=ForwardBackward(iterations=...), every iterate of which has "
            "one. Its parameters stay."
        )
    keep, move, mix, start, rotation = module.equation().splitting()
    dtype, resolvent = module.weight.dtype, None
    if rotation is not None:
        eye = torch.eye(len(rotation), dtype=torch.float64, device=rotation.device)
        resolvent = (0.5 * (eye + rotation.double())).to(dtype)
    operator = linear_operator(module.weight, module.bias)
    step = euler(operator, module.activation, step=float(move), decay=float(keep))
    numbers = [storable(float(number), dtype) for number in (start, mix)]
    return _iterated(graph, value, step, (numbers[0], 1.0, numbers[1]), resolvent, solver.iterations)


@fold.register(BackwardEulerBlock)
def _(module: BackwardEulerBlock, graph: Builder, value: Value) -> Value:
    check_field(module.field)
    tau, keep, mix = (float(number) for number in module.splitting())
    settings = field_step(module.field, tau)
    dtype = settings["operator"]["weight"].dtype
    return _iterated(
        graph, value, settings, (1.0, storable(keep, dtype), storable(mix, dtype)), None, module.iterations
    )


def _iterated(
    graph: Builder,
    value: Value,
    settings: dict[str, Any],
    numbers: tuple[float, float, float],
    resolvent: torch.Tensor | None,
    times: int,
) -> Value:
    r"""Append :math:`y_0 = sx,\ y_{k+1} = R(\kappa E(y_k) + \mu x)`."""
    start, keep, mix = numbers
    nested = {"op": "euler" if "skew" in settings else "infinity", **settings}
    return graph.add("implicit", value, map=nested, keep=keep, mix=mix, start=start, resolvent=resolvent, times=times)
