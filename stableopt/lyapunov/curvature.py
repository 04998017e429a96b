"""Curvature on a probe batch: sharpness against the limit in use, the trace of the Hessian, and the noise scale of the gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.hutchinson import orthonormal, trace_beside
from stableopt.lyapunov.running import RunningMean, student_quantile
from stableopt.lyapunov.undisturbed import undisturbed
from stableopt.optim import Sharpness, SharpnessReading
from stableopt.optim.curvature import Curvature, Method, dot, gradients
from stableopt.optim.limits import known_limits
from stableopt.optim.modules import buffers_put_back, modules_at_hand
from stableopt.optim.packing import Packing
from stableopt.optim.preconditioner import Preconditioner
from stableopt.optim.rules.base import real_view

__all__ = ["CurvatureProbe", "CurvatureReading", "Loss", "apart"]

Loss = Callable[[], Tensor]

_SAVED = 3  # how many measurements without a need are saved up for one that has it


@dataclass(frozen=True)
class CurvatureReading:
    r"""One look at the curvature; NaN for what is not measured, and then ``reason`` says why.

    Args:
        sharpness: :math:`v^\top H v/\|v\|_P^2` along the sharpest direction found in the metric P of the optimizer: an estimate of
            the largest eigenvalue *from below*.
        edge: the fraction of the limit of the optimizer in use along it, in the same way; infinite if it is unstable at any
            curvature.
        plain_sharpness: :math:`v^\top H v/\|v\|^2` along the same direction, at most the largest eigenvalue of H.
        residual: the residual of that eigenvector relative to the eigenvalue: some eigenvalue is that near, not always the largest.
        trace: estimate of :math:`\operatorname{tr} H`.
        trace_error: its standard error over the random vectors; what it covers is said at :class:`CurvatureProbe`.
        trace_count: how many equally weighted vectors would say as much.
        noise_scale: :math:`\operatorname{tr}\Sigma/\|G\|^2`, in samples; infinite if the noise drowns the gradient.
        hvp: how the products with H were made: ``graph``, ``exact``, ``forward``, ``difference``; empty if there were none.
        products: how many there were.
        reason: one sentence if something is not measured, or not the first way; else empty.

    Examples:
        >>> CurvatureReading.missing("no loss").sharpness
        nan
    """

    sharpness: float
    edge: float
    plain_sharpness: float
    residual: float
    trace: float
    trace_error: float
    trace_count: float
    noise_scale: float
    hvp: str
    products: int
    reason: str

    @classmethod
    def missing(cls, reason: str) -> CurvatureReading:
        """Return the reading of a look that failed.

        Args:
            reason: why.

        Examples:
            >>> CurvatureReading.missing("no loss").reason
            'no loss'
        """
        nan = math.nan
        return cls(nan, nan, nan, nan, nan, nan, 0.0, nan, "", 0, reason)

    def trace_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return an interval for the trace by Student's t.

        Args:
            level: the share of random vectors for which it holds the trace, under what :class:`CurvatureProbe` says.

        Returns:
            Its ends; NaN before the second vector.

        Examples:
            >>> reading = CurvatureReading(1.0, 0.5, 1.0, 0.0, 10.0, 2.0, 11.0, 0.0, "exact", 4, "")
            >>> [round(end, 2) for end in reading.trace_interval()]
            [5.54, 14.46]
        """
        if not self.trace_error >= 0.0 or self.trace_count <= 1.0:
            return math.nan, math.nan
        half = student_quantile(0.5 + level / 2.0, self.trace_count - 1.0) * self.trace_error
        return self.trace - half, self.trace + half


class CurvatureProbe:
    r"""Measure curvature on a fixed batch again and again, at few products with the Hessian, and change nothing.

    *Sharpness* is followed by :class:`stableopt.optim.Sharpness` from the direction kept: about ``products`` products each time.
    What an easy look saves is kept for a hard one, up to what three looks take, which is there from the start. Once the residual
    is small, the runner-up is looked at, so that an eigenvalue that overtakes is seen.

    *Trace*: random signs z with :math:`\mathbb{E}\,zz^\top=I`. The span Q of the vectors of the sharpness, whose products are
    there, is taken out, which leaves the estimate unbiased and takes the largest eigenvalues out of its variance:

    .. math:: \operatorname{tr} H = \operatorname{tr} Q^\top H Q + \mathbb{E}\, z^\top P H P z, \qquad P = I - QQ^\top .

    The first part is that of the present look, the second a mean that forgets (a factor 0.9 a look). ``trace_error`` covers the
    random vectors: it is right if the second part stays as it is over the last twenty looks; where that drifts, the mean lags by
    nine.

    *Noise scale*: with m micro-batches of b samples each, :math:`|G_b|^2` the mean of their squared gradients and
    :math:`|G_{mb}|^2` the square of the mean gradient,

    .. math:: \|G\|^2 \approx \frac{m |G_{mb}|^2 - |G_b|^2}{m-1}, \qquad
              \operatorname{tr}\Sigma \approx b\,m\,\frac{|G_b|^2 - |G_{mb}|^2}{m-1},

    both without bias for micro-batches drawn independently, and both averaged before they are divided. The samples are those of
    the probe: more looks average over the run, not over the data.

    Parameters, buffers, training modes, ``.grad``, the state of the optimizer and all random states are left bit for bit as they
    are. Each look draws the same random numbers, so dropout has the same masks each time.

    Args:
        model: whose buffers and modes are put back.
        optimizer: of its parameters; where nothing is known about its limits, only the plain sharpness is measured.
        loss: returns the loss of the probe batch with its graph, forward only; or several such functions, of micro-batches of equal
            size, whose mean is the loss.
        method: how products are made, see :class:`stableopt.optim.Sharpness`.
        products: for the sharpness, in the mean over many looks, at least 1.
        traces: random vectors a look, each one more product; 0 for no trace.
        batch_size: samples in each micro-batch; by default the noise scale is in micro-batches.
        seed: of the random vectors and of what the loss draws.

    Raises:
        TypeError: if the model is no module, or a loss cannot be called.
        ValueError: if a number is out of range.

    Note:
        In several processes each looks at its own probe batch and nothing is communicated, also if the loss calls the model in its
        DDP wrapper; sharded parameters are not measured. A look that fails returns a reading that says so.

    References:
        Knyazev, Toward the optimal preconditioned eigensolver, 2001; Hutchinson, A stochastic estimator of the trace of the
        influence matrix, 1989; Meyer, Musco, Musco and Woodruff, Hutch++, 2021; McCandlish, Kaplan, Amodei et al., An empirical
        model of large-batch training, 2018, appendix A.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> probe = CurvatureProbe(model, optimizer, lambda: 3.0 * model.weight.square().sum())
        >>> reading = probe.measure()
        >>> round(reading.sharpness, 3), round(reading.edge, 3), reading.products  # H = 6 I, the limit is 2 / 0.1
        (6.0, 0.3, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss | Sequence[Loss],
        *,
        method: Method = "auto",
        products: int = 3,
        traces: int = 1,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"the probe needs a torch.nn.Module as model, got {type(model).__name__}.")
        for name, value, least in (("products", products, 1), ("traces", traces, 0), ("batch_size", batch_size, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
        self.model, self.optimizer = model, optimizer
        self.losses = _losses(loss)
        self._loss = partial(_mean, self.losses)  # not a method, so that the modules which a loss calls are at hand
        self.products, self.traces, self.batch_size, self.seed = products, traces, batch_size, seed
        self._only_plain, followed = "", optimizer
        try:
            known_limits(optimizer)
            Preconditioner.of(optimizer)
        except ValueError as error:  # a gradient step has the Euclidean metric
            self._only_plain = f"only the plain sharpness: {error}"
            followed = torch.optim.SGD([p for group in optimizer.param_groups for p in group["params"]], lr=1.0)
        self._sharpness = Sharpness(followed, self._loss, method=method, products=products, fresh=None, seed=seed)
        self._saved = _SAVED * products
        self._generator = torch.Generator().manual_seed(seed)
        self._rest, self._signal, self._noise = RunningMean(), RunningMean(), RunningMean()

    def measure(self, graph: Tensor | None = None) -> CurvatureReading:
        """Look now.

        Args:
            graph: the loss of the probe batch at the present parameters, with a graph that is still there: saves its evaluation.

        Returns:
            The reading; if something failed, with the reason and without the rest.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> probe = CurvatureProbe(model, torch.optim.SGD(model.parameters()), lambda: 1 / 0)
            >>> probe.measure().reason
            'the curvature was not measured: ZeroDivisionError: division by zero'
        """
        try:
            with undisturbed(self.model), apart(self.model, self._loss):
                _draw_from(self.seed)
                return self._look(graph)
        except Exception as error:  # whatever it is, the training goes on
            said = str(error).strip().splitlines()
            return CurvatureReading.missing(
                f"the curvature was not measured: {type(error).__name__}: {said[0] if said else ''}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same readings: directions, sums, random state.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> probe = CurvatureProbe(model, torch.optim.SGD(model.parameters()), lambda: model.weight.sum())
            >>> sorted(probe.state_dict())
            ['generator', 'noise', 'rest', 'saved', 'sharpness', 'signal']
        """
        return {
            "sharpness": self._sharpness.state_dict(),
            "saved": self._saved,
            "generator": self._generator.get_state(),
            **{name: vars(getattr(self, f"_{name}")).copy() for name in ("rest", "signal", "noise")},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state_dict: as :meth:`state_dict` gives it.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> probe = CurvatureProbe(model, torch.optim.SGD(model.parameters()), lambda: model.weight.sum())
            >>> probe.load_state_dict(probe.state_dict())
        """
        self._sharpness.load_state_dict(state_dict["sharpness"])
        self._saved = state_dict["saved"]
        self._generator.set_state(state_dict["generator"].cpu())
        for name in ("rest", "signal", "noise"):
            setattr(self, f"_{name}", RunningMean(**state_dict[name]))

    def _look(self, graph: Tensor | None) -> CurvatureReading:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        choice = self._sharpness.choice
        reading, trace, curvature = choice.run(parameters, self._products, graph)
        known = reading.measured and not self._only_plain
        return CurvatureReading(
            sharpness=reading.sharpness if known else math.nan,
            edge=math.nan if self._only_plain else reading.edge,
            plain_sharpness=reading.plain,
            residual=reading.residual / abs(reading.edge) if reading.edge else math.nan,
            trace=trace,
            trace_error=self._rest.error if self.traces else math.nan,
            trace_count=self._rest.count,
            noise_scale=self._noise_scale(parameters),
            hvp=curvature.name if curvature.count else "",
            products=curvature.count,
            reason="; ".join(part for part in (self._only_plain, reading.reason, choice.reason) if part),
        )

    def _products(self, curvature: Curvature) -> tuple[SharpnessReading, float, Curvature]:
        """Do all that takes products, in one context."""
        curvature.last = type(curvature.last)(maxlen=max(3, self.products))
        self._sharpness.products = self.products + self._saved
        reading = self._sharpness.measure_within(curvature)
        packing, used = Packing.of(curvature.parameters), curvature.count
        known = orthonormal(
            [(packing.pack(map(real_view, v)), packing.pack(map(real_view, Hv))) for v, Hv in curvature.last]
        )
        curvature.last.clear()
        state = self._generator.get_state()
        try:
            rest = [trace_beside(curvature, packing, known, self._generator) for _ in range(self.traces)]
        except BaseException:
            self._generator.set_state(state)
            raise
        self._saved = min(_SAVED * self.products, max(0, self._saved + self.products - used)) if used else self._saved
        finite = [x for x in rest if math.isfinite(x)]
        if finite:
            self._rest.add(*finite)
        top = math.fsum(dot(q, Hq) for q, Hq in known)
        return reading, top + self._rest.mean if finite else math.nan, curvature

    def _noise_scale(self, parameters: Sequence[Tensor]) -> float:
        m = len(self.losses)
        if m < 2:
            return math.nan
        packing = Packing.of(parameters)
        total: list[Tensor] | None = None
        each = 0.0
        torch.clear_autocast_cache()
        for loss in self.losses:
            with torch.enable_grad(), buffers_put_back(loss):
                grads = gradients(loss(), parameters)
            packed = packing.pack(
                [real_view(torch.zeros_like(p) if g is None else g) for p, g in zip(parameters, grads, strict=True)]
            )
            each += dot(packed, packed) / m
            total = packed if total is None else [a + b for a, b in zip(total, packed, strict=True)]
        torch.clear_autocast_cache()  # an autocast around us would keep weights whose graph is gone
        together = dot(total or [], total or []) / m**2
        if not math.isfinite(each):
            return math.nan
        self._signal.add((m * together - each) / (m - 1))
        self._noise.add(self.batch_size * m * (each - together) / (m - 1))
        return self._noise.mean / self._signal.mean if self._signal.mean > 0.0 else math.inf


def _mean(losses: Sequence[Loss]) -> Tensor:
    values = [loss() for loss in losses]
    return values[0] if len(values) == 1 else torch.stack([value.reshape(()) for value in values]).mean()


def _losses(loss: Loss | Sequence[Loss]) -> list[Loss]:
    losses = list(loss) if isinstance(loss, Sequence) else [loss]
    wrong = next((x for x in losses if not callable(x)), None)
    if not losses or wrong is not None:
        raise TypeError(
            f"the probe needs a function that returns the loss with its graph, or several, got {type(wrong or loss).__name__}."
        )
    return losses


def _draw_from(seed: int) -> None:
    """Seed the global generators; they are put back by others."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is meant
    random.seed(seed)


@contextmanager
def apart(model: nn.Module, loss: Loss) -> Iterator[None]:
    """Let the DDP wrappers of a model neither wait for a ``backward`` nor talk to the other processes.

    Args:
        model: that is looked at.
        loss: what calls it, maybe in its wrapper.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> with apart(model, lambda: model(torch.ones(1)).sum()):
        ...     pass
    """
    with ExitStack() as stack:
        for module in {id(m): m for m in (*model.modules(), *modules_at_hand(loss))}.values():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
                module.require_forward_param_sync = False
                stack.enter_context(module.no_sync())
        yield
