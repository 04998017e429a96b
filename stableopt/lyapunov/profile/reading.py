r"""What a profile says: exponents with intervals, the norms of all windows, the verdict, the energy, and the blocks over time."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from stableopt.lyapunov.profile.finite.twin import Twin
from stableopt.lyapunov.profile.growth.energies import EnergySynthesis, synthesize
from stableopt.lyapunov.profile.growth.exponents import Exponent, exponent, spectrum
from stableopt.lyapunov.profile.growth.factors import Factors
from stableopt.lyapunov.profile.growth.gains import CoupledGains, coupled_gains
from stableopt.lyapunov.profile.growth.judged import judge_factors
from stableopt.lyapunov.profile.growth.observed import observed, products
from stableopt.lyapunov.profile.growth.scaled import Scaled
from stableopt.lyapunov.profile.growth.verdicts import Verdict
from stableopt.lyapunov.profile.growth.windows import Windows, measure_windows
from stableopt.lyapunov.profile.representations.looks import Look
from stableopt.lyapunov.profile.tangents.responses import ErrorResponses, HyperResponse

__all__ = ["ProfileReading"]

Array = NDArray[np.float64]

_HUGE = 1e100
"""A gain beyond is cut off: it fails by far anyway, and squares have to stay floats."""


@dataclass(frozen=True)
class FiniteSize:
    r"""The exponent of a perturbation of finite size, from a twin of the run.

    Args:
        size: relative to the norm of the parameters; NaN where it was never known.
        exponent: of the distance, per step.
        kinks: what the model has of kinks, which such a perturbation feels.
        stopped: why the twin ended early; empty if it did not.

    Examples:
        >>> FiniteSize(1e-3, exponent(np.full(40, -0.1)), (), "").exponent.sign
        -1
    """

    size: float
    exponent: Exponent
    kinks: tuple[str, ...]
    stopped: str

    @classmethod
    def of(cls, twin: Twin, first: int = 0) -> FiniteSize:
        """Return what a twin has found.

        Args:
            twin: of a run.
            first: how many steps of its growth to leave out.
        """
        return cls(
            math.nan if twin.size is None else twin.size, exponent(twin.growth[first:]), twin.kinks, twin.stopped
        )


@dataclass(frozen=True)
class ProfileReading:
    r"""The Learning Stability Profile of a run, as measured.

    Nothing in it is proved: exponents are estimates with intervals, norms are those of the measured directions, which is all of
    them only where ``factors.full``.

    Args:
        pieces: the factors, one piece for each window; a single piece if the whole run was followed.
        theta: for each piece ``(n + 1, k, k)`` the inner products of the parameter parts of the orthonormal directions.
        backend: how products with the Hessian were made; ``difference`` is a finite difference, the others are exact.
        optimizer: the name of its class.
        metric: name -> unit of that entry of the state.
        seed: of the directions.
        products: number of products with the Hessian.
        windowed: whether only windows of the run were followed.
        reason: why it ended early or took another way; empty if it did not.
        errors: responses to errors in single updates.
        hyper: responses to hyper-parameters.
        looks: the representations at some steps.
        finite_size: the exponent of a perturbation of finite size, beside the infinitesimal ones.

    Examples:
        >>> factors = Factors(np.full((200, 1, 1), 0.9), np.arange(201), dimension=1)
        >>> reading = ProfileReading(pieces=(factors,), theta=(np.ones((201, 1, 1)),))
        >>> reading.verdict.kind, round(reading.exponents[0].value, 4)
        ('exponentially stable', -0.1054)
    """

    pieces: tuple[Factors, ...]
    theta: tuple[Array, ...]
    backend: str = "exact"
    optimizer: str = ""
    metric: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    products: int = 0
    windowed: bool = False
    reason: str = ""
    errors: ErrorResponses | None = None
    hyper: tuple[HyperResponse, ...] = ()
    looks: tuple[Look, ...] = ()
    finite_size: FiniteSize | None = None

    @property
    def factors(self) -> Factors:
        """The factors of the run, of its last window if there are several."""
        return self.pieces[-1]

    @cached_property
    def exponents(self) -> tuple[Exponent, ...]:
        """The largest k exponents per step, almost surely, each with its interval or the reason why it has none."""
        log_diagonal = np.concatenate([piece.log_diagonal for piece in self.pieces])
        spacing = np.concatenate([piece.spacing for piece in self.pieces])
        if not len(spacing):
            return ()
        return spectrum(log_diagonal, spacing=spacing)

    @cached_property
    def windows(self) -> Windows:
        r"""The norms of :math:`\Phi(t,s)` over all windows of the (last) piece, started late too."""
        return measure_windows(self.factors, **_effort(self.factors.directions))

    @cached_property
    def verdict(self) -> Verdict:
        """One of the four verdicts or inconclusive, on all pieces of the run that were seen."""
        return judge_factors(self.pieces, windows=self.windows, **_effort(self.factors.directions))

    @cached_property
    def energy(self) -> EnergySynthesis | None:
        """The Lyapunov energy that the factors of the (last) piece give; None without a step."""
        return synthesize(self.factors, self.windows) if self.factors.count else None

    @cached_property
    def parametric(self) -> Array:
        r""":math:`\log\|\Pi_\theta\,\Phi(t, t_0)\|` on the directions of the (last) piece, ``(n + 1,)``.

        Where the profile began with a fresh optimizer its directions are those of the parameters, and this is
        :math:`\log\|D_{\theta_0}\theta_t\|` on them.
        """
        return observed(self._products, self.theta[-1])

    @cached_property
    def _products(self) -> Scaled:
        return products(self.factors)

    @property
    def followed(self) -> int:
        """The number of steps that were followed.

        Examples:
            >>> factors = Factors(np.full((40, 1, 1), 0.9), np.arange(41), dimension=1)
            >>> ProfileReading(pieces=(factors,), theta=(np.ones((41, 1, 1)),)).followed
            40
        """
        return sum(int(piece.spacing.sum()) for piece in self.pieces)

    @property
    def determinant(self) -> float:
        r"""The growth of the volume of all k directions, :math:`\sum_j \log\det R_j`, per step; NaN without a step.

        With ``factors.full`` it is the mean of :math:`\log|\det A_t|`, the sum of all exponents.
        """
        steps = self.followed
        return float(sum(piece.log_volume.sum() for piece in self.pieces)) / steps if steps else math.nan

    @cached_property
    def mixed(self) -> tuple[NDArray[np.int64], dict[str, Array]]:
        r"""The mixed block: steps ``(m,)`` and, per layer, :math:`\log\|D_\theta h_l\,\Pi_\theta\Phi(t, t_0)\|` there, ``(m,)``.

        Looks without the block are left out; a layer that one of them lacks, or where it is not finite, is NaN there.
        """
        places, looks = self._looked
        steps = np.array([look.step for look in looks], dtype=np.int64)
        made, unknown = self._products[places], np.full((self.factors.directions,) * 2, np.nan)
        names = dict.fromkeys(name for look in looks for name in look.grams)
        grams = {name: np.array([look.grams.get(name, unknown) for look in looks]) for name in names}
        return steps, {name: observed(made, gram) for name, gram in grams.items()}

    @property
    def _looked(self) -> tuple[NDArray[np.int64], list[Look]]:
        """The looks at the (last) piece that have the mixed block, and at which boundaries they were taken."""
        where = {int(step): place for place, step in enumerate(self.factors.steps)}
        last = len(self.pieces) - 1
        looks = [look for look in self.looks if look.piece == last and look.grams and look.step in where]
        return np.array([where[look.step] for look in looks], dtype=np.int64), looks

    @cached_property
    def gains(self) -> CoupledGains | None:
        r"""The small-gain matrix of the coupled system of representations and parameters (T6); None without looks.

        Per look: a is :math:`\|D_{h_0}h_L\|`, b the norm of :math:`D_\theta h_L` on the directions for the whole probe, c is zero
        (no batch depends on a representation of the step before), d the largest norm of a step on the directions since the look
        before. Looks that failed are passed over.

        All that may be an estimate from below: the directions are not all of them, a factor of several steps is their geometric
        mean, or a block of a look was estimated. Small gains then exclude nothing, and the verdict says so.
        """
        places, looks = self._looked
        found = [
            (i, look, look.forward) for i, look in zip(places.tolist(), looks, strict=True) if look.forward is not None
        ]
        found = [
            (i, look, f) for i, look, f in found if math.isfinite(look.gain) and not math.isnan(f.log_norms[-1, 0])
        ]
        spans = [(i, j, look, f) for (i, _, _), (j, look, f) in pairwise(found) if j > i]
        if not spans:
            return None
        sizes = np.array([np.linalg.norm(R, 2) for R in self.factors.R]) ** (1.0 / self.factors.spacing)
        known = self.factors.full and self.backend != "difference" and bool((self.factors.spacing == 1).all())
        return coupled_gains(
            a=[math.exp(min(f.log_norms[-1, 0], math.log(_HUGE))) for _, _, _, f in spans],
            b=[min(look.gain, _HUGE) for _, _, look, _ in spans],
            c=[0.0] * len(spans),
            d=[min(float(sizes[i:j].max()), _HUGE) for i, j, _, _ in spans],
            exact=known and all(f.exact and look.how == "forward" for _, _, look, f in spans),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``profile.json`` and ``profile.safetensors`` into a run folder, each as a whole.

        Args:
            folder: made if it is not there.

        Raises:
            ImportError: if safetensors is not installed.

        Examples:
            >>> import tempfile
            >>> factors = Factors(np.full((40, 1, 1), 0.9), np.arange(41), dimension=1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     ProfileReading(pieces=(factors,), theta=(np.ones((41, 1, 1)),)).save(folder)
            ...     sorted(os.listdir(folder))
            ['profile.json', 'profile.safetensors']
        """
        from stableopt.lyapunov.profile.files import write_reading

        write_reading(self, folder)

    def __str__(self) -> str:
        """Say in some lines what was found."""
        lines = [str(self.verdict)]
        lines += [f"exponent {i}: {e}" for i, e in enumerate(self.exponents, start=1)]
        w = self.windows
        which = (
            "all directions"
            if self.factors.full
            else f"{self.factors.directions} directions of {self.factors.dimension}"
        )
        above = f", none above {math.exp(min(w.sup_upper, 700.0)):.4g}" if w.sup_upper > w.sup else ""
        last = " (of the last piece)" if len(self.pieces) > 1 else ""
        largest = f"K({w.end}, {w.start}) = {math.exp(min(w.sup, 700.0)):.4g}"
        lines.append(f"largest window{last}: {largest}{above} on {which}")
        if self.finite_size is not None:
            lines.append(f"at the finite size {self.finite_size.size:.3g}: {self.finite_size.exponent}")
        if self.reason:
            lines.append(self.reason)
        return "\n".join(lines)


def _effort(directions: int) -> dict[str, int]:
    """Return how closely windows are looked at, so that some seconds suffice: norms of k directions take the cube of k."""
    grid = int(max(20.0, min(200.0, math.sqrt(2e9 / directions**3))))
    return {"grid": grid, "refine": int(max(40.0, min(400.0, 4e5 / directions**3)))}
