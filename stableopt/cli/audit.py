"""The audit of a model that a function in a file of the user makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stableopt.certify.audit import SEVERITIES, Audit, audit
from stableopt.cli.subject import load_subject
from stableopt.lyapunov.undisturbed import undisturbed

__all__ = ["audit_subject", "fails"]


class _SeenError(Exception):
    """Carries the inputs of a model out of its loss, before the model runs."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.named = args, kwargs


def audit_subject(place: str) -> Audit:
    """Audit what ``FILE.py:FUNCTION`` makes, on the inputs that its loss gives to the model.

    Args:
        place: as for ``stableopt doctor``: a function that returns a model with a loss, or with inputs.

    Raises:
        ValueError: as :func:`stableopt.cli.subject.load_subject`.
        FileNotFoundError: if there is no such file.

    Examples:
        >>> audit_subject("model.py")
        Traceback (most recent call last):
        ValueError: expected FILE.py:FUNCTION, as in model.py:make, got 'model.py'.
    """
    model, loss, _ = load_subject(place)
    return audit(model, inputs=_inputs(model, loss))


def fails(found: Audit, severity: str) -> bool:
    """Return whether an audit is to fail: a finding is as bad as ``severity`` or worse; never for ``"never"``.

    Args:
        found: the audit.
        severity: ``"serious"``, ``"weak"``, ``"note"`` or ``"never"``.

    Raises:
        ValueError: if it is none of them.

    Examples:
        >>> fails(Audit((), modules=1, ran=True), "note"), fails(Audit((), modules=1, ran=True), "never")
        (False, False)
    """
    if severity not in (*SEVERITIES, "never"):
        raise ValueError(f"--fail-on must be one of {', '.join(SEVERITIES)} and never, got '{severity}'.")
    return severity != "never" and bool(found.at_least(severity))


def _inputs(model: nn.Module, loss: Any) -> tuple[Any, ...] | None:
    """Return the positional arguments that the loss gives to the model; None if it cannot be seen."""

    def seen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _SeenError(args, kwargs)

    handle = model.register_forward_pre_hook(seen, with_kwargs=True, prepend=True)
    try:
        with undisturbed(model), torch.no_grad():
            loss()
    except _SeenError as found:
        return found.inputs or None if not found.named else None
    except Exception:  # a loss fails in many ways; the audit then goes without inputs
        return None
    finally:
        handle.remove()
    return None
