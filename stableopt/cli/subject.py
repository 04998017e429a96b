"""The model and the loss that a command is to look at, made by a function in a file of the user."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["load_subject", "subject"]

Subject: TypeAlias = tuple[nn.Module, Callable[[], Tensor], Optimizer | None]

_SHAPES = "(model, loss), (model, inputs), (model, inputs, targets) or (model, inputs, targets, loss_fn), with an optimizer at will"


def load_subject(place: str) -> Subject:
    """Run ``FILE.py:FUNCTION`` and return what it makes.

    Args:
        place: a file and a function in it that is called without arguments; the folder of the file can be imported from.

    Returns:
        The model, a function that returns the loss with its graph, and the optimizer if there is one.

    Raises:
        ValueError: if the place has another form, the file has no such function, or the function fails or returns something else.
        FileNotFoundError: if there is no such file.

    Examples:
        >>> load_subject("model.py")
        Traceback (most recent call last):
        ValueError: expected FILE.py:FUNCTION, as in model.py:make, got 'model.py'.
    """
    name, colon, function = place.rpartition(":")
    if not colon or not name or not function:
        raise ValueError(f"expected FILE.py:FUNCTION, as in model.py:make, got '{place}'.")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}': give the path of a Python file and a function in it.")
    module = _imported(path)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"'{path}' has no function '{function}': write one that returns {_SHAPES}.")  # noqa: TRY004 - it is a value
    try:
        made = make()
    except Exception as error:
        raise ValueError(f"{function}() in '{path}' failed: {type(error).__name__}: {error}") from error
    return subject(made)


def subject(made: Any) -> Subject:
    """Return a model with its loss, from what a function has made.

    Without a loss function, class numbers are taken for targets of cross entropy and real numbers for those of the mean squared
    error. Without targets the loss is the attribute ``loss`` of the output, else half the mean square of the output.

    Args:
        made: a tuple: model and loss; or model and inputs (a tensor, a tuple of arguments, a dict of named ones), then targets and
            a loss function if there are any; an optimizer may be among them.

    Returns:
        The model, a function that returns the loss with its graph, and the optimizer if there is one.

    Raises:
        ValueError: if it is anything else.

    Examples:
        >>> import torch
        >>> model, loss, optimizer = subject((nn.Linear(2, 3), torch.ones(4, 2), torch.tensor([0, 1, 2, 0])))
        >>> loss().shape
        torch.Size([])
    """
    given = list(made) if isinstance(made, tuple | list) else [made]
    optimizer = next((part for part in given if isinstance(part, Optimizer)), None)
    parts = [part for part in given if not isinstance(part, Optimizer)]
    kinds = ", ".join(type(part).__name__ for part in given)
    if not 2 <= len(parts) <= 4 or not isinstance(parts[0], nn.Module):
        raise ValueError(f"expected {_SHAPES}, got ({kinds}).")
    model, inputs, *rest = parts
    if not rest and not isinstance(inputs, Tensor | dict | tuple | list):
        if not callable(inputs):
            raise ValueError(f"expected {_SHAPES}, got ({kinds}).")
        own_loss: Any = inputs
        return model, own_loss, optimizer

    def loss() -> Tensor:
        output = _called(model, inputs)
        if not rest:
            known = getattr(output, "loss", None)
            return known if isinstance(known, Tensor) else 0.5 * output.square().mean()
        targets, *function = rest
        return function[0](output, targets) if function else _default_loss(output, targets)

    return model, loss, optimizer


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_subject_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"'{path}' is no Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and the compiler look there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"'{path}' could not be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _default_loss(output: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(output, targets)
    if output.ndim == targets.ndim + 1 > 2:  # sequences: classes come last
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())
    return F.cross_entropy(output, targets)
