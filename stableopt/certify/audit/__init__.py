r"""Audit of a model that somebody else wrote: what breaks a guarantee, where, and how large the error is.

Each finding is measured: by a proved enclosure of a norm where there is one, and by a pair of inputs that a module moves further
apart than it is taken to do. An audit runs copies of the model and leaves the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.audit.attention import growing_attention
from stableopt.certify.audit.blocks import foreign_blocks, functional_layers, unread
from stableopt.certify.audit.findings import SEVERITIES, Audit, Finding, Witness
from stableopt.certify.audit.normalization import batch_statistics, sample_normalizations
from stableopt.certify.audit.scene import Scene, scene
from stableopt.certify.audit.search import generator
from stableopt.certify.audit.sequences import recurrent_layers, recurrent_weights, state_spaces
from stableopt.certify.audit.shared import low_precision, not_finite, tied_apart, unsynchronised
from stableopt.certify.audit.spatial import active_dropout, copying_layers, steep_activations
from stableopt.certify.audit.weights import claimed_norms, padded_convolutions
from stableopt.errors import UncertifiableError
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.nn.sharded import refuse_spread

__all__ = ["DETECTORS", "SEVERITIES", "Audit", "Finding", "Witness", "audit"]

DETECTORS: tuple[Callable[[Scene], Iterator[Finding]], ...] = (
    not_finite, sample_normalizations, batch_statistics, claimed_norms, padded_convolutions, tied_apart, unsynchronised,
    low_precision, copying_layers, steep_activations, active_dropout, growing_attention, foreign_blocks, functional_layers,
    recurrent_layers, recurrent_weights, state_spaces,
)  # fmt: skip
"""What is looked for."""


def audit(
    model: nn.Module, input_shape: Sequence[int] | None = None, *, inputs: tuple[Any, ...] | None = None
) -> Audit:
    """List what breaks or weakens a guarantee in a model, with the measured size of each error.

    Args:
        model: any model. Copies of it are run, in evaluation mode and float64; it, its modes, its buffers and the random numbers to
            come stay as they are.
        input_shape: shape of one input without the batch, so that forward maps which are no module's can be seen as well; None for
            the shape that the first layer suggests.
        inputs: the arguments of the model themselves, in place of a shape, for example integers; their first sample is taken.

    Returns:
        The findings, the worst first.

    Raises:
        TypeError: if ``model`` is no module, or ``inputs`` no tuple.
        ValueError: if the shape holds anything but positive integers, or both a shape and inputs are given.
        UncertifiableError: if the model cannot be copied, or ``fully_shard`` has spread it over several processes.

    Note:
        That nothing is found proves nothing. Searches begin at seeded points, so the same model gives the same findings.

    Examples:
        >>> found = audit(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        >>> [(f.path, f.kind, f.severity) for f in found]
        [('1', 'sample-normalization', 'serious')]
        >>> from stableopt.nn import GroupSort, stabilize
        >>> len(audit(stabilize(nn.Sequential(nn.Linear(4, 4), GroupSort(2), nn.Linear(4, 2))).eval()))
        0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit needs a torch.nn.Module, got {type(model).__name__}.")
    if input_shape is not None and inputs is not None:
        raise ValueError("give input_shape or inputs, not both.")
    refuse_spread(model, UncertifiableError)
    with undisturbed(model):
        found = scene(model, _inputs(model, input_shape, inputs))
        guessed = input_shape is None and inputs is None
        if guessed and found.failure:
            found = scene(model, ())
        findings = [finding for detector in DETECTORS for finding in _tried(detector, found)]
        findings += unread(found, frozenset(finding.path for finding in findings))
    modules = [path for path, _ in found.modules()]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Audit(tuple(findings), modules=len(modules), ran=bool(found.calls) and not found.failure)


def _tried(detector: Callable[[Scene], Iterator[Finding]], found: Scene) -> Iterator[Finding]:
    """Yield what a detector finds; where a layer of somebody else fails in it, say so."""
    try:
        yield from detector(found)
    except Exception as error:  # foreign code fails in many ways
        yield Finding(
            "",
            "not-audited",
            f"{detector.__name__} could not finish ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}).",
            "weak",
            "Audit the parts of the model one by one.",
        )


def _inputs(model: nn.Module, shape: Sequence[int] | None, inputs: tuple[Any, ...] | None) -> tuple[Any, ...]:
    if inputs is not None:
        if not isinstance(inputs, tuple | list):
            raise TypeError(f"inputs must be the tuple of the arguments of the model, got {type(inputs).__name__}.")
        return tuple(x[:1] if isinstance(x, Tensor) and x.ndim else x for x in inputs)
    first = next((m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False))), None)
    if shape is None:
        shape = _suggested(first)
        if shape is None:
            return ()
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"input_shape must hold positive integers, got {tuple(shape)}.")
    if isinstance(first, nn.Embedding):
        return (torch.randint(first.num_embeddings, (1, *shape), generator=generator()),)
    return (torch.randn(1, *shape, generator=generator(), dtype=torch.float64),)


def _suggested(first: nn.Module | None) -> tuple[int, ...] | None:
    """Return the shape of an input that the first layer with parameters takes."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    if isinstance(first, convolutions):
        return (first.in_channels, *[16] * len(first.kernel_size))
    if isinstance(first, nn.Embedding):
        return (8,)
    if isinstance(first, nn.RNNBase):
        return (8, first.input_size)
    return None
