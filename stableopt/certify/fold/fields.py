r"""Steps along fields: Euler's method as one operation, other methods as sums of Euler steps or by circle contractivity (T3h)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from stableopt.certify.fold.parts import activation_node, conv_operator, euler, linear_operator
from stableopt.certify.program import Builder, Value
from stableopt.errors import UncertifiableError
from stableopt.linalg import round_down
from stableopt.nn.residual.dissipative import DissipativeField
from stableopt.nn.residual.fields import Field, GradientField
from stableopt.nn.residual.infinity import InfNormField
from stableopt.nn.weights.geometry import Geometry
from stableopt.theory import EULER, ButcherTableau, circle_contractivity_radius, monotonicity_radius

__all__ = ["add_field_steps", "add_map", "field_step", "infinity_step"]

Settings = dict[str, Any]

_MOST = 256
"""The most Euler steps into which one block is taken apart."""


def add_field_steps(
    graph: Builder, value: Value, field: Field, step: float, tableau: ButcherTableau, count: int
) -> Value:
    r"""Append a number of equal steps of an explicit method along a field.

    Args:
        graph: the program.
        value: the state.
        field: a :class:`GradientField`, :class:`DissipativeField` or :class:`InfNormField`.
        step: the length of one step.
        tableau: the method.
        count: how many steps.

    Raises:
        UncertifiableError: if the field has no rule, or the method no bound in the norm of the program.

    Examples:
        >>> from stableopt.theory import HEUN
        >>> graph = Builder((2,))
        >>> with torch.no_grad():
        ...     _ = add_field_steps(graph, graph.input, GradientField(2), 0.5, HEUN, 1)
        >>> [node["op"] for node in graph.nodes]
        ['euler', 'euler', 'sum']
    """
    if tableau == EULER:
        return add_map(graph, value, field_step(field, step, times=count))
    radius, weights = _radius(field, tableau, step)
    settings = field_step(field, step / radius)
    if weights is None:
        return _by_contractivity(graph, value, settings, tableau, radius, count)
    if count * len(weights) > _MOST:
        raise UncertifiableError(
            f"{count} steps of {tableau.name} are {count * len(weights)} Euler steps; a certificate has at most {_MOST} for a "
            "block. Use method='euler', which needs one operation for all."
        )
    for _ in range(count):
        value, settings = _by_euler_steps(graph, value, settings, weights)
    return value


def add_map(graph: Builder, value: Value, settings: Settings) -> Value:
    """Append the step of a field, from :func:`field_step`.

    Args:
        graph: the program.
        value: its input.
        settings: of the step.

    Examples:
        >>> graph = Builder((2,))
        >>> with torch.no_grad():
        ...     _ = add_map(graph, graph.input, field_step(GradientField(2), 0.5))
        >>> graph.nodes[0]["step"]
        0.5
    """
    return graph.add("euler" if "skew" in settings else "infinity", value, **settings)


def field_step(field: Field, step: float, *, times: int = 1) -> Settings:
    r"""Return the settings of :math:`h + \tau f(h)`.

    Args:
        field: the field.
        step: :math:`\tau`.
        times: how often the step is taken.

    Raises:
        UncertifiableError: if the field has no rule.

    Examples:
        >>> with torch.no_grad():
        ...     settings = field_step(GradientField(2, strong=1.0), 0.5)
        >>> settings["decay"], settings["step"]
        (0.5, 0.5)
    """
    if isinstance(field, GradientField):
        operator, decay = linear_operator(field.weight, field.bias), 1 - Fraction(step) * Fraction(field.strong)
        return euler(operator, field.activation, step=step, decay=decay, times=times)
    if isinstance(field, DissipativeField):
        return _dissipative(field, step, times)
    if isinstance(field, InfNormField):
        steps = torch.full((field.dim,), step, dtype=torch.float64).to(field.weight.dtype)
        return infinity_step(field, steps, times=times)
    raise UncertifiableError(
        f"the field {type(field).__name__} has no rule for certificates; those with one are GradientField, DissipativeField and "
        "InfNormField."
    )


def _dissipative(field: DissipativeField, step: float, times: int) -> Settings:
    skew = (field.rotation().double() * step).to(field.weight.dtype)  # each entry rounds like its opposite
    scale, free = field.free_scale(), None
    if scale is not None and field.inner is not None and field.outer is not None:
        inner, outer = linear_operator(field.inner, field.inner_bias), linear_operator(field.outer, None)
        free = {"inner": inner, "outer": outer, "scale": step * float(scale)}
    decay = 1 - Fraction(step) * Fraction(float(field.current_rate() + field.free))
    operator = linear_operator(field.weight, field.bias)
    return euler(operator, field.activation, step=step, decay=decay, skew=skew, free=free, times=times)


def infinity_step(field: InfNormField, steps: torch.Tensor, *, times: int = 1) -> Settings:
    r"""Return the settings of :math:`h_i + t_i(-ch_i + \sigma(Ah + b)_i)`.

    Args:
        field: the field.
        steps: t, one for each neuron, at least 0.
        times: how often the step is taken.

    Examples:
        >>> with torch.no_grad():
        ...     infinity_step(InfNormField(2), torch.ones(2))["decay"]
        1.0
    """
    matrix = field.matrix()
    padding = tuple(k // 2 for k in field.kernel)
    if field.kernel:
        operator = conv_operator(matrix, field.bias, Geometry("conv", padding=padding))
    else:
        operator = linear_operator(matrix, field.bias)
    activation = activation_node(field.activation)
    return {"operator": operator, "steps": steps, "decay": field.decay, "activation": activation, "times": times}


def _radius(field: Field, tableau: ButcherTableau, step: float) -> tuple[float, list[list[Fraction]] | None]:
    """Return by what an Euler step is shorter, and the weights of the Euler steps, None where only contractivity is known."""
    radius = monotonicity_radius(tableau)
    if radius > 0.0:
        return radius, _convex_form(tableau, Fraction(radius))
    radius = 0.0 if isinstance(field, InfNormField) else circle_contractivity_radius(tableau)
    if radius <= 0.0:
        raise UncertifiableError(
            f"a step of {step:.6g} of {tableau.name} along {type(field).__name__} has no bound but that of its parts; use "
            "method='euler'."
        )
    return radius * (1.0 - 2.0**-22), None  # less than the slack of a RungeKuttaBlock, more than any rounding


def _convex_form(tableau: ButcherTableau, radius: Fraction) -> list[list[Fraction]]:
    r"""Return :math:`[(I + rK)^{-1}e,\ rK(I + rK)^{-1}]`: the weights of the start and of the Euler steps of each stage."""
    rows: list[list[Fraction]] = []
    for i, given in enumerate((*tableau.A, tableau.b)):
        scaled = [radius * a for a in given[:i]]
        steps = [scaled[j] - sum((scaled[k] * rows[k][1 + j] for k in range(j + 1, i)), Fraction(0)) for j in range(i)]
        start = 1 - sum((scaled[k] * rows[k][0] for k in range(i)), Fraction(0))
        rows.append([start, *steps])
    return rows


def _by_euler_steps(
    graph: Builder, value: Value, settings: Settings, weights: list[list[Fraction]]
) -> tuple[Value, Settings]:
    """Append one step as convex combinations of Euler steps, with the tensors of the first."""
    steps: list[Value] = []
    state = value
    for start, *parts in weights:
        used = [(v, round_down(a)) for v, a in zip([value, *steps], [start, *parts], strict=True) if a != 0]
        state = value if used == [(value, 1.0)] else used[0][0]
        if len(used) > 1 or used[0][1] != 1.0:
            state = graph.add("sum", *(v for v, _ in used), factors=[a for _, a in used])
        if len(steps) < len(weights) - 1:
            steps.append(add_map(graph, state, settings))
            settings = {
                key: entry for key, entry in graph.nodes[-1].items() if key not in {"op", "in"}
            }  # tensors by name
    return state, settings


def _by_contractivity(
    graph: Builder, value: Value, settings: Settings, tableau: ButcherTableau, radius: float, count: int
) -> Value:
    stages = [[float(Fraction(radius) * a) for a in row[:i]] for i, row in enumerate(tableau.A)]
    weights = [float(Fraction(radius) * b) for b in tableau.b]
    nested = {"op": "euler", **settings}
    return graph.add("runge_kutta", value, euler=nested, weights=weights, stages=stages, times=count)
