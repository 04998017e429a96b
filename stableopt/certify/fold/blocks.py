r"""The rules of residual and isometric blocks, which are certified as a whole by the theorem of the block."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import nn

from stableopt.certify.fold.fields import add_field_steps, infinity_step
from stableopt.certify.fold.parts import (
    activation_node,
    add_residual,
    conv_operator,
    euler,
    linear_operator,
    storage,
)
from stableopt.certify.fold.registry import fold
from stableopt.certify.program import Builder, Value
from stableopt.certify.publish_blocks import storable
from stableopt.nn.branches import refuse_in_place
from stableopt.nn.continuous import ContinuousDepth
from stableopt.nn.dispatch import lipschitz_rule
from stableopt.nn.isometric import HamiltonianBlock, SkewBlock, SkewEulerBlock
from stableopt.nn.residual import (
    SLL,
    AveragedResidual,
    CFLBlock,
    CompensatedPair,
    ConvGradientBlock,
    GradientBlock,
    InfNormBlock,
    ResidualStack,
    RungeKuttaBlock,
)
from stableopt.nn.residual.fields import Field, check_field
from stableopt.nn.residual.gradient_step import GradientStep
from stableopt.nn.residual.sll import FoldedSLL
from stableopt.nn.sandwich import FoldedSandwich, Sandwich

__all__: list[str] = []


@fold.register(GradientBlock)
@fold.register(ConvGradientBlock)
def _(module: GradientStep, graph: Builder, value: Value) -> Value:
    rows = module.bound == "rows"
    if isinstance(module, ConvGradientBlock):
        operator = conv_operator(module.weight, module.bias, module.geometry)
    else:
        operator = linear_operator(module.weight, module.bias)
    settings = euler(
        operator,
        module.activation,
        step=1.0 if rows else float(module.step_size()),
        steps=module.step_sizes() if rows else None,
        decay=1 - Fraction(float(module.damping())) if module.strong else 1.0,
    )
    return graph.add("euler", value, **settings)


@fold.register(SLL)
@fold.register(FoldedSLL)
def _(module: SLL | FoldedSLL, graph: Builder, value: Value) -> Value:
    steps = module.step_sizes() if isinstance(module, SLL) else module.step
    operator = linear_operator(module.weight, module.bias)
    return graph.add("euler", value, **euler(operator, module.activation, step=1.0, steps=steps))


@fold.register(InfNormBlock)
def _(module: InfNormBlock, graph: Builder, value: Value) -> Value:
    check_field(module.field)
    return graph.add("infinity", value, **infinity_step(module.field, module.step_sizes()))


@fold.register(RungeKuttaBlock)
def _(module: RungeKuttaBlock, graph: Builder, value: Value) -> Value:
    check_field(module.field)
    return add_field_steps(graph, value, module.field, float(module.step_size()), module.tableau, module.substeps)


@fold.register(ContinuousDepth)
def _(module: ContinuousDepth, graph: Builder, value: Value) -> Value:
    fields = [field for field in module.fields if isinstance(field, Field)]
    for field, step, count in zip(fields, module.step_sizes(), module.steps, strict=True):
        check_field(field)
        value = add_field_steps(graph, value, field, float(step), module.tableau, count)
    return value


@fold.register(SkewBlock)
def _(module: SkewBlock, graph: Builder, value: Value) -> Value:
    weight = module.rotation().double() * float(module.decay())
    return graph.add("linear", value, weight=weight.to(module.skew.dtype), bias=module.bias, transposed=False)


@fold.register(SkewEulerBlock)
def _(module: SkewEulerBlock, graph: Builder, value: Value) -> Value:
    K, h = (module.skew - module.skew.mT).double(), float(module.step_size())
    weight = h * K + (1.0 - h * module.damping) * torch.eye(len(K), dtype=torch.float64, device=K.device)
    return graph.add("linear", value, weight=weight.to(module.skew.dtype), bias=module.bias, transposed=False)


@fold.register(HamiltonianBlock)
def _(module: HamiltonianBlock, graph: Builder, value: Value) -> Value:
    dtype, half = module.weight_q.dtype, module.weight_q.shape[1]
    if value.shape[-1:] != (2 * half,):
        raise ValueError(f"a HamiltonianBlock of {2 * half} features follows the shape {value.shape}.")
    parts = [
        linear_operator(weight, bias)
        for weight, bias in ((module.weight_q, module.bias_q), (module.weight_p, module.bias_p))
    ]
    steps = [storable(float(h), dtype) for h in module.step_sizes()]
    decay = storable(module.decay if module.damping else 1.0, dtype)
    activation = activation_node(module.activation)
    return graph.add(
        "shear", value, half=half, first=parts[0], second=parts[1], steps=steps, decay=decay, activation=activation
    )


@fold.register(Sandwich)
def _(module: Sandwich, graph: Builder, value: Value) -> Value:
    return fold(module.folded(), graph, value)


@fold.register(FoldedSandwich)
def _(module: FoldedSandwich, graph: Builder, value: Value) -> Value:
    lipschitz_rule(module, "l2")  # refuses parts that the scales are not about
    if graph.norm == "linf":  # of the parts
        for name, part in module.named_children():
            value = graph.fold(part, value, name)
        return value
    first, activation, last = module
    inside = Builder(value.shape, rule=graph.rule)
    inside.fold(activation, inside.input, "1")
    node = {key: entry for key, entry in inside.nodes[0].items() if key != "in"}
    scales = torch.tensor(module.scales, dtype=torch.float64)
    parts = [linear_operator(part.weight, part.bias) for part in (first, last) if isinstance(part, nn.Linear)]
    return graph.add("sandwich", value, first=parts[0], second=parts[1], scales=scales, activation=node)


@fold.register(AveragedResidual)
def _(module: AveragedResidual, graph: Builder, value: Value) -> Value:
    refuse_in_place(module)
    output, weight = graph.fold(module.branch, value, "branch"), Fraction(float(module.step_size()))
    return _residual(graph, value, output, [1 - weight, weight], module)


@fold.register(CompensatedPair)
def _(module: CompensatedPair, graph: Builder, value: Value) -> Value:
    refuse_in_place(module)
    state = graph.fold(module.contractive, value, "contractive")
    output = graph.fold(module.branch, state, "branch")
    return _residual(graph, state, output, [Fraction(1), Fraction(float(module.step_size()))], module)


@fold.register(CFLBlock)
def _(module: CFLBlock, graph: Builder, value: Value) -> Value:
    """Fold the sum: what is declared of the branch is not proved, so its constant is that of the branch."""
    refuse_in_place(module)
    output, step = graph.fold(module.branch, value, "branch"), Fraction(float(module.step_size()))
    if module.kind != "averaged":
        return _residual(graph, value, output, [Fraction(1), step], module)
    scale = Fraction(float(module._scale()))  # noqa: SLF001 the factor that its forward map uses
    return _residual(graph, value, output, [1 - step, step * scale], module)


@fold.register(ResidualStack)
def _(module: ResidualStack, graph: Builder, value: Value) -> Value:
    refuse_in_place(module)
    for index, (branch, step) in enumerate(zip(module.branches, module.step_sizes().tolist(), strict=True)):
        output = graph.fold(branch, value, f"branches.{index}")
        value = _residual(graph, value, output, [Fraction(1), Fraction(step)], module)
    return value


def _residual(graph: Builder, value: Value, output: Value, factors: list[Fraction], module: nn.Module) -> Value:
    return add_residual(graph, value, output, factors, storage(module), type(module).__name__)
