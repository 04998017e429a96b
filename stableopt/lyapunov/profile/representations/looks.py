"""The representations at some steps of a profile: the forward block, and what the perturbations of the parameters do to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from stableopt.lyapunov.layers.walk import ProbeError
from stableopt.lyapunov.profile.representations.depth import ForwardProfile
from stableopt.lyapunov.profile.representations.forward import forward_profile
from stableopt.lyapunov.profile.representations.mixed import representation_tangents
from stableopt.lyapunov.profile.tangents.system import PARAMETER, System

__all__ = ["Look", "Looks", "ProbeInput"]

INPUT = "input"
"""The name of the representation that no parameter changes."""

ProbeInput: TypeAlias = Callable[[], Any] | Tensor | Sequence[Any]


@dataclass(frozen=True)
class Look:
    r"""The representations at one step.

    Args:
        step: how many steps were taken.
        piece: the number of the piece of the profile that it belongs to.
        forward: the norms of :math:`D_{h_k}h_l`, None if they could not be measured.
        grams: layer -> ``(k, k)``, the inner products of :math:`D_\theta h_l\,\delta\theta` over the directions.
        theta: ``(k, k)``, the inner products of their :math:`\delta\theta`.
        reason: why something is missing; empty if nothing is.

    Examples:
        >>> Look(step=0, piece=0, forward=None, grams={}, theta=np.eye(1), reason="no probe").reason
        'no probe'
    """

    step: int
    piece: int
    forward: ForwardProfile | None
    grams: dict[str, NDArray[np.float64]]
    theta: NDArray[np.float64]
    reason: str = ""

    @property
    def gain(self) -> float:
        r"""The norm of :math:`D_\theta h_L` on the span of the directions, for the whole probe; NaN without the mixed block.

        Examples:
            >>> Look(0, 0, None, {"0": 4.0 * np.eye(2)}, np.eye(2)).gain
            2.0
        """
        if not self.grams:
            return math.nan
        values, vectors = np.linalg.eigh(self.theta)
        kept = values > 1e-12 * values[-1]
        whitened = vectors[:, kept] / np.sqrt(values[kept])
        return math.sqrt(max(float(np.linalg.eigvalsh(whitened.T @ list(self.grams.values())[-1] @ whitened)[-1]), 0.0))


class Looks:
    """Look at the representations of a probe, and leave the model as it is.

    Args:
        model: the model.
        probe: inputs, or a function that evaluates the model.
        system: the perturbations.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> system = System(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> system.begin(2, seed=0)
        >>> looks = Looks(model, torch.ones(1, 2), system)
        >>> looks.take(step=0, piece=0, rows=2)
        >>> look = looks.made()[0]
        >>> look.forward.exact, [gram.shape for gram in look.grams.values()]
        (True, [(2, 2), (2, 2)])
    """

    def __init__(self, model: nn.Module, probe: ProbeInput, system: System) -> None:
        self._model, self._probe, self._system = model, probe, system
        self._made: list[Look] = []

    def take(self, step: int, piece: int, rows: int) -> None:
        """Look now.

        Args:
            step: how many steps were taken.
            piece: the number of the piece of the profile.
            rows: how many of the perturbations are directions.
        """
        directions = [column[PARAMETER][:rows] for column in self._system.columns]
        forward, grams, reasons = None, {}, []
        try:
            forward = forward_profile(self._model, self._probe)
        except (ProbeError, NotImplementedError, RuntimeError) as error:
            reasons.append(f"the forward block: {_sentence(error)}")
        try:
            found = representation_tangents(self._model, self._probe, directions, parameters=self._system.parameters)
            grams = {name: gram.cpu().numpy() for name, gram in found.gram.items() if name != INPUT}
        except (ProbeError, NotImplementedError, RuntimeError) as error:
            reasons.append(f"the mixed block: {_sentence(error)}")
        self._made.append(Look(step, piece, forward, grams, self._system.gram(rows), "; ".join(reasons)))

    def made(self) -> tuple[Look, ...]:
        """Return the looks so far."""
        return tuple(self._made)


def _sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
