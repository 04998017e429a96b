"""The profile of a training that is run for the purpose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from stableopt.lyapunov.profile.growth.exponents import Exponent, mean_square_exponent
from stableopt.lyapunov.profile.reading import ProfileReading
from stableopt.lyapunov.profile.training import Profile

__all__ = ["Loss", "default_loss", "profile", "profile_ensemble", "steps_of"]

Loss = Callable[[nn.Module, Any], Tensor]


def profile(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    batches: Iterable[Any],
    *,
    steps: int,
    loss: Loss | None = None,
    **options: Any,
) -> ProfileReading:
    """Train a fresh model for some steps, and return the profile of that.

    Args:
        make_model: makes the model, with whatever seed it wants to have.
        make_optimizer: is given the model.
        batches: an iterable of batches, begun anew when it ends and is no iterator.
        steps: how many steps to take.
        loss: is given the model and a batch; None takes batches for pairs (inputs, targets), with cross entropy for class numbers
            and the mean squared error for real targets.
        **options: of :class:`Profile`.

    Returns:
        The reading.

    Raises:
        ValueError: if ``steps`` is not a positive integer, the batches end too early, or an option is out of range.

    Examples:
        >>> import torch
        >>> x = torch.randn(64, 3)
        >>> reading = profile(
        ...     lambda: nn.Linear(3, 1),
        ...     lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        ...     [(x, x.sum(1, keepdim=True))],
        ...     steps=120,
        ...     directions=2,
        ... )
        >>> reading.verdict.kind
        'exponentially stable'
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"profile needs steps as an integer >= 1, got {steps!r}.")
    model = make_model()
    optimizer = make_optimizer(model)
    evaluate = default_loss if loss is None else loss
    with Profile(model, optimizer, **options) as watched:
        for batch in steps_of(batches, steps):

            def closure(batch: Any = batch) -> Any:  # torch's annotations want a float
                optimizer.zero_grad()
                value = evaluate(model, batch)
                value.backward()
                return value

            optimizer.step(closure)
    return watched.result()


def profile_ensemble(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    batches: Callable[[int], Iterable[Any]],
    *,
    steps: int,
    members: int = 32,
    loss: Loss | None = None,
    level: float = 0.95,
    **options: Any,
) -> Exponent:
    r"""Estimate the mean-square exponent of a training over the draw of its batches.

    .. math:: \lambda_{\mathrm{ms}} = \lim_t \frac{1}{2t} \log \mathbb{E}\,\|\delta_t\|^2 \;\ge\; \lambda_{\mathrm{as}} .

    Each member begins with the same model and the same perturbation, and has batches of its own. The exponent along one run is the
    almost sure one: it may be negative while the mean square grows.

    Args:
        make_model: makes the model, the same each time.
        make_optimizer: is given the model.
        batches: is given the number of the member, and returns its batches.
        steps: how many steps each takes.
        members: how many runs.
        loss: as for :func:`profile`.
        level: of the interval.
        **options: of :class:`Profile`; there is one direction.

    Returns:
        The exponent, per step, with what it is known to.

    Raises:
        ValueError: as :func:`profile`, and if there are fewer than two members.

    Examples:
        >>> import torch
        >>> def batches(member):
        ...     generator = torch.Generator().manual_seed(member)
        ...     while True:
        ...         yield torch.randn(1, 1, generator=generator, dtype=torch.float64)
        >>> found = profile_ensemble(
        ...     lambda: nn.Linear(1, 1, bias=False, dtype=torch.float64),
        ...     lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        ...     batches,
        ...     steps=20,
        ...     members=40,
        ...     loss=lambda model, x: 0.5 * model(x).square().mean(),
        ...     directions=1,
        ... )
        >>> found.kind  # exactly: log(1 - 0.2 + 0.03) / 2 = -0.093
        'mean square'
    """
    if not isinstance(members, int) or isinstance(members, bool) or members < 2:
        raise ValueError(f"an ensemble needs members as an integer >= 2, got {members!r}.")
    paths = []
    for member in range(members):
        reading = profile(
            make_model,
            make_optimizer,
            batches(member),
            steps=steps,
            loss=loss,
            **{"cadence": 1, **options, "directions": 1},
        )
        if reading.factors.count != steps:
            raise ValueError(
                f"member {member} of the ensemble was followed for {reading.factors.count} of {steps} steps: {reading.reason}"
            )
        paths.append(np.concatenate([[0.0], np.cumsum(reading.factors.growth)]))
    return mean_square_exponent(np.stack(paths, axis=1), level=level)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross entropy for class numbers, the mean squared error for real targets.

    Args:
        model: is called with the inputs.
        batch: inputs and targets.

    Examples:
        >>> import torch
        >>> default_loss(nn.Identity(), (torch.zeros(2, 1), torch.ones(2, 1))).item()
        1.0
    """
    inputs, targets = batch
    outputs = model(inputs)
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


def steps_of(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """Yield so many batches, beginning anew when an iterable ends.

    Args:
        batches: an iterable; an iterator is gone through once.
        steps: how many.

    Raises:
        ValueError: if there are none, or an iterator ends too early.

    Examples:
        >>> list(steps_of([1, 2], 3))
        [1, 2, 1]
    """
    taken = 0
    while taken < steps:
        before = taken
        for batch in itertools.islice(iter(batches), steps - taken):
            taken += 1
            yield batch
        if taken == before or (taken < steps and isinstance(batches, Iterator)):
            raise ValueError(
                f"the batches ended after {taken} of {steps} steps: give more, or an iterable that begins anew."
            )
