"""The representations at some steps of a profile: the forward block, and what the perturbations of the parameters do to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from stableopt.lyapunov.profile.representations.cuts import Chain
from stableopt.lyapunov.profile.representations.depth import ForwardProfile
from stableopt.lyapunov.profile.representations.forward import forward_profile
from stableopt.lyapunov.profile.representations.mixed import RepresentationTangents, representation_tangents
from stableopt.lyapunov.profile.representations.survey import INPUT, chain_of
from stableopt.lyapunov.profile.tangents.products import first_line
from stableopt.lyapunov.profile.tangents.system import PARAMETER, System

__all__ = ["Look", "Looks", "ProbeInput"]

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
        how: how the mixed block was measured: ``forward`` is exact, ``difference`` is not.

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
    how: str = "forward"

    @property
    def gain(self) -> float:
        r"""The norm of :math:`D_\theta h_L` on the span of the directions, for the whole probe; NaN without the mixed block.

        Examples:
            >>> Look(0, 0, None, {"0": 4.0 * np.eye(2)}, np.eye(2)).gain
            2.0
        """
        gram = list(self.grams.values())[-1] if self.grams else np.full((1, 1), math.nan)
        if not (np.isfinite(gram).all() and np.isfinite(self.theta).all()):
            return math.nan
        values, vectors = np.linalg.eigh(self.theta)
        kept = values > 1e-12 * values[-1]
        if not kept.any():  # no direction has a part in the parameters
            return math.nan
        whitened = vectors[:, kept] / np.sqrt(values[kept])
        return math.sqrt(max(float(np.linalg.eigvalsh(whitened.T @ gram @ whitened)[-1]), 0.0))


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
        self._chain: Chain | None = None  # found once: the layers and the shapes of the representations stay

    def take(self, step: int, piece: int, rows: int) -> None:
        """Look now; what goes wrong, in the probe as well, is the reason of the look and no error of the training.

        Args:
            step: how many steps were taken.
            piece: the number of the piece of the profile.
            rows: how many of the perturbations are directions.
        """
        directions = [column[PARAMETER][:rows] for column in self._system.columns]
        forward, grams, how, reasons = None, {}, "forward", []
        try:
            forward = forward_profile(self._model, self._probe)
        except Exception as error:  # whatever a probe of the user raises
            reasons.append(f"the forward block: {first_line(error)}")
        try:
            found = self._tangents(directions)
            grams = {name: gram.cpu().numpy() for name, gram in found.gram.items() if name != INPUT}
            how = found.how
        except Exception as error:
            reasons.append(f"the mixed block: {first_line(error)}")
        self._made.append(Look(step, piece, forward, grams, self._system.gram(rows), "; ".join(reasons), how))

    def _tangents(self, directions: list[Tensor]) -> RepresentationTangents:
        if self._chain is not None:
            try:
                return self._along(directions, self._chain)
            except Exception:  # the model or the probe has changed
                self._chain = None
        chain = chain_of(self._model, self._probe, one_by_one=False, search=False, forward=False)
        found = self._along(directions, chain)
        self._chain = chain
        return found

    def _along(self, directions: list[Tensor], chain: Chain) -> RepresentationTangents:
        return representation_tangents(
            self._model, self._probe, directions, parameters=self._system.parameters, chain=chain
        )

    def made(self) -> tuple[Look, ...]:
        """Return the looks so far."""
        return tuple(self._made)
