r"""Whether a program computes what the model computes: both run in float64 on random inputs, small and large.

The two may differ by rounding: a rule computes numbers in another order than the module, and stores them in the dtype of the model.
How much such differences can matter is measured: the program runs again with all its stored numbers, its input and the result of
each operation changed at random by one unit in the last place of the coarsest dtype that the model stores (and by a few of float64
of the numbers that an operation reads, which is what a formula loses where its terms cancel). The largest change that this makes,
times a factor for the luck of the draw, is the tolerance. It is far below what a rule that reads a module wrongly makes, unless the
mistake itself is of the size of a rounding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.certify.execute import apply
from stableopt.certify.program import Program
from stableopt.errors import UncertifiableError

__all__ = ["check_same_function", "perturbed_run"]

_SIZES = (1.0, 100.0, 0.01)
"""The sizes of the probes: kinks, thresholds and clips far from 0 are met, and so is what is smooth at 0."""
_FACTOR, _DRAWS = 8.0, 3
_DOUBLE = torch.finfo(torch.float64).eps
_SOFTPLUS_JUMP = 2.1e-9
"""torch goes over to the identity at 20/beta, by exp(-20)/beta too early."""


def check_same_function(model: nn.Module, program: Program) -> None:
    """Refuse a program that computes something else than the model.

    Args:
        model: the model in evaluation mode; it runs in float64 with the numbers that its parametrizations give now.
        program: the program.

    Raises:
        UncertifiableError: if the results differ, or the model cannot be run in float64.

    Examples:
        >>> from stableopt.certify.extract import extract
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> program = extract(model, (2,))
        >>> check_same_function(model, program)
        >>> check_same_function(model[0], program)
        Traceback (most recent call last):
        stableopt.errors.UncertifiableError: the operations of the certificate compute something else than the model: ...
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(20)
        x = torch.randn(len(_SIZES), *program.shape, dtype=torch.float64)
        x = x * torch.tensor(_SIZES, dtype=torch.float64).reshape(-1, *[1] * len(program.shape))
        expected = _model_in_double(model, x)
        doubles = {name: value.double() for name, value in program.tensors.items()}
        exact = perturbed_run(program, doubles, x, 0.0)
        unit = max((torch.finfo(d).eps for d in _dtypes(model)), default=_DOUBLE)
        changes = [_largest(perturbed_run(program, doubles, x, unit) - exact) for _ in range(_DRAWS)]
    if expected.shape != exact.shape:
        raise _different(f"it gives the shape {tuple(exact.shape[1:])}, the model {tuple(expected.shape[1:])}")
    tolerance = _FACTOR * torch.stack(changes).amax(0)
    difference = _largest(exact - expected)
    if not bool(
        (difference <= tolerance).all()
    ):  # some layers keep a margin for the rounding of the dtype that they run in
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference = torch.fmin(difference, _largest(exact - _model_as_it_is(model, x)))
    if not bool((difference <= tolerance).all()):  # also for NaN
        worst = int((difference - tolerance).nan_to_num(torch.inf).argmax())
        raise _different(
            f"on a random input of size {_SIZES[worst]} it differs by {float(difference[worst]):.2g}, where rounding explains "
            f"{float(tolerance[worst]):.2g}"
        )


def perturbed_run(program: Program, tensors: Mapping[str, Tensor], x: Tensor, unit: float) -> Tensor:
    """Run a program in float64 with relative changes of all numbers of at most ``unit``, drawn at random.

    Args:
        program: the program.
        tensors: its tensors in float64.
        x: a batch.
        unit: the largest relative change; 0 runs it as it is.

    Examples:
        >>> from stableopt.certify.program import Builder
        >>> perturbed_run(Builder((1,)).program(), {}, torch.ones(1, 1, dtype=torch.float64), 0.0)
        tensor([[1.]], dtype=torch.float64)
    """
    moved = {name: _moved(value, unit) for name, value in tensors.items()}
    values = [_moved(x, unit)]
    last = {number: place for place, node in enumerate(program.nodes) for number in node["in"]}
    for place, node in enumerate(program.nodes):
        inputs = [values[number] for number in node["in"]]
        output = _moved(apply(node, moved, inputs), unit)
        if unit:  # what a formula loses where its terms cancel
            size = torch.stack([_largest(value) for value in inputs]).amax(0).reshape(-1, *[1] * (output.ndim - 1))
            output = output + 4 * _DOUBLE * size * (2 * torch.rand_like(output) - 1)
        if node.get("name") == "softplus" and unit:
            output = output + _SOFTPLUS_JUMP / node["beta"] * (2 * torch.rand_like(output) - 1)
        values.append(output)
        for number in set(node["in"]):
            if last[number] == place:
                values[number] = torch.empty(0)  # no longer needed
    return values[-1]


def _moved(value: Tensor, unit: float) -> Tensor:
    return value * (1 + unit * (2 * torch.rand_like(value) - 1)) if unit else value


def _largest(value: Tensor) -> Tensor:
    return value.abs().reshape(len(value), -1).amax(1)


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}


def _model_in_double(model: nn.Module, x: Tensor) -> Tensor:
    try:
        if any(P.is_parametrized(part) or isinstance(part, nn.RNNBase) for part in model.modules()):
            output = _copied_in_double(model)(x)
        else:  # no copy
            output = functional_call(model, _numbers_in_double(model), (x,))
    except Exception as error:
        raise _different(f"the model could not be run in float64 to compare ({error})") from None
    if isinstance(output, tuple) and isinstance(model, nn.RNNBase):
        output = output[0]  # a certificate of a recurrent layer is one of its sequence of states
    if not isinstance(output, Tensor):
        raise _different(f"the model gives a {type(output).__name__}, not a tensor")
    return output


def _model_as_it_is(model: nn.Module, x: Tensor) -> Tensor:
    """Run a copy of the model in the dtype that it has."""
    kind = max(_dtypes(model), key=lambda dtype: torch.finfo(dtype).eps, default=x.dtype)
    output = copy.deepcopy(model).eval().cpu()(x.to(kind))
    return (output[0] if isinstance(output, tuple) else output).double()


def _numbers_in_double(model: nn.Module) -> dict[str, Tensor]:
    found = (*model.named_parameters(), *model.named_buffers())  # a tied tensor once: the call ties it again
    return {k: v.detach().cpu().double() if v.is_floating_point() else v.detach().cpu() for k, v in found}


def _copied_in_double(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).cpu().eval()
    for part in copied.modules():
        if P.is_parametrized(part):
            _keep_numbers(part)
    return copied.double()


def _keep_numbers(part: nn.Module) -> None:
    """Let a copy of a module use the weights that are certified, not those that its parametrizations would give in float64.

    Its class is shared with the model, so a class of its own gets the numbers, which hide the property that computes them.
    """
    chains: Any = part.parametrizations
    numbers = {name: getattr(part, name).detach().as_subclass(Tensor).double() for name in chains}
    part.__class__ = type(type(part).__name__, (type(part),), numbers)


def _different(reason: str) -> UncertifiableError:
    return UncertifiableError(
        f"the operations of the certificate compute something else than the model: {reason}. If you registered a rule with "
        "stableopt.certify.fold, it is wrong for this module; otherwise please report it."
    )
