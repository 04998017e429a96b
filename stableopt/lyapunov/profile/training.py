"""The Learning Stability Profile of a training, taken while it runs."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.hooks import Closure, StepHooks
from stableopt.lyapunov.profile.arguments import check_count, check_surroundings, check_window, twin_of
from stableopt.lyapunov.profile.reading import FiniteSize, ProfileReading
from stableopt.lyapunov.profile.representations.looks import Looks, ProbeInput
from stableopt.lyapunov.profile.tangents.agreement import NotTheRuleError
from stableopt.lyapunov.profile.tangents.clipping import Clipping
from stableopt.lyapunov.profile.tangents.products import GradientTap, NoDerivativeError
from stableopt.lyapunov.profile.tangents.recorder import Recorder
from stableopt.lyapunov.profile.tangents.responses import Responses
from stableopt.lyapunov.profile.tangents.system import Before, System

__all__ = ["Profile"]

Method = Literal["auto", "graph", "exact", "forward", "difference"]


class Profile:
    r"""Push perturbations through a training as it runs, and read from them how stable it is.

    k perturbations :math:`(\delta\theta, \delta u)` of the parameters and the state of the optimizer are carried along by the exact
    derivative of each step, made orthonormal (Benettin's method), and give the triangular factors of
    :class:`~stableopt.lyapunov.profile.Factors`, from which exponents, the norms of all :math:`\Phi(t,s)` started late, the
    verdict and an energy follow.

    The run is bit for bit that without a profile: parameters, gradients, buffers, optimizer state and random numbers.

    Args:
        model: the model that is trained.
        optimizer: with a rule (:func:`stableopt.optim.rule_for`): those of torch and stableopt that have one, guarded or not.
        run_dir: folder for ``profile.json`` and ``profile.safetensors``, written at :meth:`close`; None writes nothing.
        directions: k, or ``"all"`` for the whole state, which is for models of some hundred parameters; then the profile begins
            when the state of the optimizer is there.
        probe: inputs, or a function that evaluates the model on some, for the representations: with it the forward and mixed blocks
            are measured, every ``look_every`` steps.
        method: how products with the Hessian are made: ``auto`` uses the graph of the training's own loss and takes other ways
            where that has no second derivative; ``graph``, ``exact``, ``forward`` for one exact way; ``difference`` for a finite
            difference.
        cadence: number of steps between two orthonormalizations; ``auto`` chooses it from how fast the directions part.
        start: number of steps before the profile begins.
        window: ``(W, K)`` follows the perturbations during W of each K steps only, which costs W/K and is biased by transients;
            None for all steps.
        errors: a number W of steps: every W steps an additive error :math:`e_s` of unit norm and random direction is made in the
            update, and its response :math:`\|D_{e_s}\theta_t\,e_s\|` is followed for W steps; None for none.
        hyper: names of hyper-parameters, such as ``("lr",)``, whose effect :math:`\|D_\eta\theta_t\|` is followed.
        clip_norm: as given to ``clip_grad_norm_``, if the training does that.
        clip_value: as given to ``clip_grad_value_``, if the training does that.
        look_every: number of steps between two looks at the representations.
        finite_size: run a :class:`Twin` beside, for the exponent of a perturbation of this size relative to the parameters, which
            feels the kinks that a derivative does not see; True for the median size of the first updates. It needs closures.
        seed: of the random directions.

    Attributes:
        reason: one sentence if the profile ended before the training, or another way of making products was taken; else empty.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another type.
        ValueError: if an argument is out of range, the optimizer has no rule, or parameters are sharded or in half precision.

    Note:
        With the graph of the training one direction costs 2 to 4 forward+backward passes per step, of several each about 2
        (measured: docs/benchmarks.md), and memory for that graph; k numbers are kept per parameter and entry of the optimizer's
        state, and with ``"all"`` the factors of each step, 16 N² bytes.
        Buffers (running statistics, power-iteration vectors) are taken as given: what a perturbation does to them is not followed.
        The gradient is made a second time with a graph of its own, after the training's own backward pass. Where that has no second
        derivative, or hooks or functions with a backward of their own stand in it, the closure is evaluated again, so it must not
        draw a new batch. After each step the pure update map is compared with what the optimizer did, before each step parameters
        and state with where the last one left them; where they differ the profile ends, says why, and the training goes on.
        Parameters that begin outside of their set are such a case: call ``optimizer.project_()`` first.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        >>> x = torch.randn(16, 2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (model(x) - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> with Profile(model, optimizer, directions="all") as profile:
        ...     for _ in range(61):
        ...         _ = optimizer.step(closure)
        >>> reading = profile.result()
        >>> reading.factors.full, round(float(reading.factors.log_volume.sum()) / 60, 4), "of 3 log(1/2)"
        (True, -2.0794, 'of 3 log(1/2)')
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        directions: int | Literal["all"] = 4,
        probe: ProbeInput | None = None,
        method: Method = "auto",
        cadence: int | Literal["auto"] = "auto",
        start: int = 0,
        window: tuple[int, int] | None = None,
        errors: int | None = None,
        hyper: Sequence[str] = (),
        clip_norm: float | None = None,
        clip_value: float | None = None,
        look_every: int = 50,
        finite_size: float | bool | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Profile needs a torch.nn.Module as model, got {type(model).__name__}.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Profile needs a torch.optim.Optimizer as optimizer, got {type(optimizer).__name__}.")
        if directions != "all":
            check_count("directions", directions)
        if cadence != "auto":
            check_count("cadence", cadence)
        check_count("look_every", look_every)
        check_count("start", start, least=0)
        if errors is not None:
            check_count("errors", errors)
        check_window(window)
        check_surroundings(optimizer)
        if window is not None and (errors is not None or hyper):
            raise ValueError(
                "errors and hyper follow every step, so they cannot be had with a window: leave one of them out."
            )
        self.reason = ""
        self._model, self._optimizer, self._directions, self._seed = model, optimizer, directions, seed
        self._start, self._look_every = start, look_every
        self._window = None if window is None or window[0] == window[1] else window
        self._system = System(optimizer, Clipping(clip_norm, clip_value))
        if directions != "all" and directions > self._system.dimension:
            raise ValueError(
                f"directions must be at most the number {self._system.dimension} of parameters at the beginning, got {directions}; "
                "use 'all' for the whole state."
            )
        self._tap = GradientTap(self._system.parameters, method, model)
        self._hyper = tuple(hyper)
        self._responses = Responses(self._system, errors, self._hyper, seed)
        self._recorder = Recorder(self._system, cadence)
        self._looks = Looks(model, probe, self._system) if probe is not None else None
        self._twin = twin_of(model, optimizer, finite_size, seed)
        self._path = None if run_dir is None else Path(run_dir)
        self._step, self._origin, self._products, self._backend = 0, 0, 0, ""
        self._begun = self._active = self._ended = False
        self._pending: tuple[Before, list[Tensor | None]] | None = None
        self._twin_steps = 0
        self._hooks = StepHooks(optimizer, self._before, self._after)

    def attach(self) -> Self:
        """Begin to follow the steps; does nothing if it does already.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> profile = Profile(model, optimizer, directions=1).attach()
            >>> profile.backward(model(torch.ones(1, 1)).square().sum())
            >>> optimizer.step()
            >>> profile.close()
            >>> profile.result().factors.count
            1
        """
        if self._hooks.attach():
            self._active = False  # a new piece: nobody knows what was done meanwhile
        if self._twin is not None:
            self._twin.attach()
        return self

    def close(self) -> None:
        """Stop following, and write the files if there is a folder for them; may be called twice."""
        self._hooks.remove()
        if self._twin is not None:
            self._twin.detach()
        self._settle()
        if self._path is not None and self._begun:
            try:
                self.result().save(self._path)
            except OSError as error:
                warnings.warn(f"the profile could not be written to '{self._path}': {error}", stacklevel=2)

    def __enter__(self) -> Self:
        """Begin to follow the steps."""
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop following."""
        self.close()

    def backward(self, loss: Tensor) -> None:
        """Do ``loss.backward()`` where the optimizer gets no closure; called again before the step, gradients are accumulated.

        Args:
            loss: one real number with its graph.

        Note:
            If the gradient has no derivative in the graph of the loss, the profile ends, and the training goes on; give the
            optimizer a closure, for which there are other ways.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with Profile(model, optimizer, directions=1) as profile:
            ...     for _ in range(3):
            ...         optimizer.zero_grad()
            ...         profile.backward((model(torch.ones(1, 1)) - 1).square().sum())
            ...         optimizer.step()
            >>> profile.result().factors.steps
            array([0, 1, 2, 3])
        """
        if not self._follows():
            loss.backward()
            return
        try:
            self._tap.backward(loss, self._system.directions())
        except NoDerivativeError as error:
            self._end(f"step {self._step}: {error}", self._step)

    def result(self) -> ProfileReading:
        """Return what is known so far.

        Raises:
            ValueError: if the profile has not begun: no step was taken yet, or none after ``start``.

        Examples:
            >>> model = nn.Linear(1, 1)
            >>> Profile(model, torch.optim.SGD(model.parameters()), directions=1).result()
            Traceback (most recent call last):
            ValueError: the profile has not begun: it has seen 0 steps of the optimizer, and begins after 0.
        """
        if not self._begun:
            raise ValueError(
                f"the profile has not begun: it has seen {self._step} steps of the optimizer, and begins after {self._start}"
                f"{' and when the state of the optimizer is there' if self._directions == 'all' else ''}."
            )
        self._settle()
        return ProfileReading(
            pieces=self._recorder.pieces(),
            theta=self._recorder.theta(),
            backend=self._backend,
            optimizer=type(self._optimizer).__name__,
            metric=self._metric(),
            seed=self._seed,
            products=self._products,
            windowed=self._window is not None,
            reason=self.reason or self._tap.reason,
            errors=self._responses.errors(),
            hyper=self._responses.hyper(),
            looks=() if self._looks is None else self._looks.made(),
            finite_size=None if self._twin is None else FiniteSize.of(self._twin, self._twin_steps),
        )

    def _follows(self) -> bool:
        """Begin if it is time, and say whether the step to come is followed."""
        if self._ended or (not self._begun and not self._begins()):
            return False
        if self._window is not None and (self._step - self._origin) % self._window[1] >= self._window[0]:
            self._settle()
            self._active = False
            return False
        if not self._active:
            self._system.leave()
            self._recorder.begin(self._step)
            self._active = True
            self._look()
        elif self._pending is None and self._tap.gradient is None and (change := self._system.change()):
            self._end(f"step {self._step}: {change}", self._step)
            return False
        return True

    def _begins(self) -> bool:
        """Begin if it is time."""
        if self._step < self._start:
            return False
        if self._directions == "all" and not self._system.stateless and not (self._step and self._system.complete):
            return False
        rows = self._directions if isinstance(self._directions, int) else self._system.dimension
        try:
            self._system.begin(rows, self._seed)
        except (NotTheRuleError, ValueError) as error:
            self._ended, self.reason = True, f"the profile could not begin: {error}"
            warnings.warn(self.reason, stacklevel=2)
            return False
        self._responses.begin()
        self._recorder.rows, self._begun, self._origin = rows, True, self._step
        self._twin_steps = 0 if self._twin is None else self._twin.steps
        return True

    def _before(self, closure: Closure | None, trial: bool) -> Closure | None:
        self._pending = None
        if not self._follows():
            return None
        if closure is not None:
            return self._followed(closure)
        if self._tap.gradient is None:
            said = "the step had no closure, and loss.backward() was called in place of profile.backward(loss)"
            self._end(f"step {self._step}: {said}", self._step)
        else:
            self._note(self._system.before(hyper=bool(self._hyper)))
        return None

    def _followed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, whose first evaluation in the step is followed."""
        seen = False

        @functools.wraps(closure)
        def evaluate() -> Any:
            nonlocal seen
            if seen or self._ended or not torch.is_grad_enabled():
                return closure()
            seen = True
            before = self._system.before(hyper=bool(self._hyper))
            try:
                value = self._tap.evaluate(closure, self._system.directions())
            except NoDerivativeError as error:
                self._end(f"step {self._step}: {error}", self._step)
                return self._tap.value
            self._note(before)
            return value

        return evaluate

    def _note(self, before: Before) -> None:
        used = [
            p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad for p in self._system.parameters
        ]
        self._pending = before, used

    def _after(self) -> None:
        step, self._step = self._step, self._step + 1
        pending, gradient, self._pending = self._pending, self._tap.gradient, None
        self._tap.forget()
        if pending is None or gradient is None or self._ended:
            return
        self._backend = gradient.backend
        self._products += gradient.products
        try:
            self._system.advance(pending[0], gradient, pending[1], self._responses.forcing())
            self._system.leave()
            self._responses.advanced(step)
            self._recorder.advanced(self._step)
            if (self._step - self._origin) % self._look_every == 0:
                self._look()
        except (RuntimeError, ValueError, ArithmeticError) as error:  # the training goes on without the profile
            self._end(f"step {step}: {error}", step)

    def _look(self) -> None:
        if self._looks is not None:
            self._settle()
            self._looks.take(self._step, self._recorder.count - 1, self._recorder.rows)

    def _settle(self) -> None:
        """Make the directions orthonormal now, so that the factors reach to the present step; not within one."""
        if self._begun and self._active and not self._ended and self._tap.gradient is None:
            try:
                self._recorder.settle(self._step)
            except ValueError as error:
                self._end(str(error), None)

    def _end(self, reason: str, step: int | None) -> None:
        """End the profile: with the steps before this one, or with its last factor."""
        self.reason, self._ended = f"the profile ended early: {reason}", True
        self._tap.forget()
        if step is not None and self._active:
            with contextlib.suppress(ValueError):  # a direction that is not finite
                self._recorder.settle(step)
        warnings.warn(self.reason, stacklevel=2)

    def _metric(self) -> dict[str, float]:
        several = len(self._optimizer.param_groups) > 1
        units = {(f"{g}/{name}" if several else name): unit for (g, name), unit in self._system.units.items()}
        return {"parameters": 1.0, **units}
