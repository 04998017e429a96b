r"""Recurrences and state spaces that are called stable by their eigenvalues, and recurrent layers without a bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.certify.audit.findings import Finding, Witness
from stableopt.certify.audit.scene import Call, Scene, called, is_foreign
from stableopt.certify.audit.search import Map, generator, quotient, steepest
from stableopt.errors import UncertifiableError
from stableopt.linalg import spectral_norm
from stableopt.nn import cell_bound, lipschitz

__all__ = ["Counterexample", "counterexample", "recurrent_layers", "recurrent_weights", "state_spaces"]

_LENGTHS = (8, 32)
_STEPS = 20
_LONG = 1024


def recurrent_layers(scene: Scene) -> Iterator[Finding]:
    """Find RNN, GRU and LSTM layers and cells that have no bound for sequences of every length, and measure their gain at two.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> found = next(recurrent_layers(scene(nn.LSTM(2, 4, dtype=torch.float64), ())))
        >>> found.kind, sorted(found.numbers)
        ('unbounded-recurrence', ['gain at length 32', 'gain at length 8'])
    """
    for path, module in scene.modules():
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase) or _bounded(module):
            continue
        gains, pair = _gains(scene.exact.get_submodule(path))
        yield Finding(
            path,
            "unbounded-recurrence",
            f"No bound for sequences of every length is known for this {called(module)}: its weights do not contract.",
            "weak",
            "Use stableopt.nn.contracting(layer), or a ContractingCell, whose bound holds for every length.",
            attained=pair.gain,
            witness=pair,
            numbers=gains,
        )


def _bounded(module: nn.Module) -> bool:
    try:
        if isinstance(module, nn.RNNCellBase):
            return cell_bound(module).state.upper < 1
        return math.isfinite(lipschitz(module).upper)
    except (UncertifiableError, ValueError):
        return False


def _gains(module: Any) -> tuple[dict[str, float], Witness]:
    """Measure how far the output at the last step moves with the whole sequence, at a short and at a long one."""
    width = module.input_size

    def run(x: Tensor) -> Tensor:
        if isinstance(module, nn.RNNBase):
            out = module(x if module.batch_first else x.transpose(0, 1))[0]
            return out if module.batch_first else out.transpose(0, 1)
        state: Any = None
        steps = []
        for t in range(x.shape[1]):
            state = module(x[:, t], state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(steps, 1)

    pairs = []
    for length in _LENGTHS:
        x = torch.randn(1, length, width, generator=generator(), dtype=torch.float64)
        pairs.append(max((steepest(run, s * x, iterations=6) for s in (0.0, 1.0)), key=lambda pair: pair.gain))
    return {f"gain at length {n}": pair.gain for n, pair in zip(_LENGTHS, pairs, strict=True)}, pairs[-1]


@dataclass(frozen=True)
class Counterexample:
    r"""A constant drive of :math:`h' = \sigma(Wh+u)` under which two states move apart although :math:`\rho(W) < 1`.

    Args:
        drive: u.
        state: a fixed point.
        direction: the perturbation that grows.
        active: which units have the slope 1 there; the others have (almost) none.
        rate: the growth per step, :math:`\rho(W_{SS})` of the active units S.

    Examples:
        >>> counterexample(torch.tensor([[1.5, -2.0], [1.5, -1.5]], dtype=torch.float64), "relu").rate
        1.5
    """

    drive: Tensor
    state: Tensor
    direction: Tensor
    active: Tensor
    rate: float

    def grown(self, W: Tensor, activation: str, steps: int) -> Witness:
        """Return the pair of states and the growth of their distance over some steps, run in float64.

        Examples:
            >>> W = torch.tensor([[1.5, -2.0], [1.5, -1.5]], dtype=torch.float64)
            >>> round(counterexample(W, "relu").grown(W, "relu", 10).gain / 1.5**10, 6)
            1.0
        """
        sigma = {"relu": torch.relu, "tanh": torch.tanh}[activation]

        def run(h: Tensor) -> Tensor:
            for _ in range(steps):
                h = sigma(h @ W.T + self.drive)
            return h

        small = 1e-4 / max(1.0, self.rate) ** steps
        return quotient(run, (self.state + small * self.direction)[None], self.state[None])


def counterexample(W: Tensor, activation: str) -> Counterexample | None:
    r"""Search for active units S with :math:`\rho(W_{SS}) > 1`, and build the drive that keeps exactly them active.

    All sets are tried up to 10 units, otherwise some. ReLU units are switched off by a negative drive, tanh units by saturation.

    Args:
        W: a square matrix in float64.
        activation: ``"relu"`` or ``"tanh"``.

    Returns:
        The worst that was found, None if no set has a radius above 1.

    Examples:
        >>> counterexample(0.5 * torch.eye(2, dtype=torch.float64), "relu") is None
        True
    """
    masks = _masks(W)
    radii = torch.linalg.eigvals(masks[:, :, None] * W * masks[:, None, :]).abs().amax(1)
    best = int(radii.argmax())
    rate, on = float(radii[best]), masks[best].bool()
    if not rate > 1 + 1e-9:
        return None
    off = ~on
    h = torch.where(on, 1.0 if activation == "relu" else 0.0, 0.0 if activation == "relu" else -1.0).to(W.dtype)
    u = torch.where(on, h, -20.0) - W @ h
    if activation == "tanh":
        h = torch.where(off, torch.tanh(torch.tensor(-20.0, dtype=W.dtype)), h)
    values, vectors = torch.linalg.eig(masks[best][:, None] * W * masks[best])
    direction = vectors[:, int(values.abs().argmax())].real
    return Counterexample(u, h, direction / direction.norm(), on, rate)


def _masks(W: Tensor) -> Tensor:
    n = len(W)
    if n <= 10:
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n))[1:], dtype=W.dtype)
    count = 128 if n <= 64 else 8
    drawn = (torch.rand(count, n, generator=generator(), dtype=W.dtype) < 0.5).to(W.dtype)
    U, _, Vh = torch.linalg.svd(W)
    signs = [(s * U[:, 0] > 0) & (s * Vh[0] > 0) for s in (1, -1)]
    return torch.cat([drawn, *(m.to(W.dtype)[None] for m in signs)])


def recurrent_weights(scene: Scene) -> Iterator[Finding]:
    r"""Find recurrent matrices with :math:`\rho(W) < 1 < \|W\|_2`, which their eigenvalues do not make stable.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> layer = nn.RNN(2, 2, nonlinearity="relu", dtype=torch.float64)
        >>> _ = layer.weight_hh_l0.data.copy_(torch.tensor([[1.5, -2.0], [1.5, -1.5]]))
        >>> found = next(recurrent_weights(scene(layer, ())))
        >>> found.severity, found.numbers["growth per step"]
        ('serious', 1.5)
    """
    for path, module in scene.modules():
        for name, W, activation in _recurrences(scene, path, module):
            rho, norm = float(torch.linalg.eigvals(W).abs().max()), spectral_norm(W)
            if not rho < 1 < norm.lower:
                continue
            found = counterexample(W, activation)
            rate = norm.lower if found is None else found.rate
            witness = None if found is None else found.grown(W, activation, _STEPS)
            yield Finding(
                f"{path}.{name}".lstrip("."),
                "spectral-radius",
                f"The recurrent matrix has spectral radius {rho:.4g} < 1 but norm {norm.lower:.4g}: with {activation} "
                + (
                    "a constant input makes two states move apart at every step."
                    if found
                    else "one step can expand by that much."
                ),
                "weak" if found is None else "serious",
                "Limit the norm, not the eigenvalues: stableopt.nn.contracting(layer) or ContractingCell.",
                claimed=1.0,
                attained=rate,
                bound=norm.upper,
                witness=witness,
                numbers={"spectral radius": rho, "norm": norm.lower}
                | (
                    {}
                    if found is None
                    else {
                        "growth per step": found.rate,
                        f"growth over {_STEPS} steps": witness.gain if witness else 0.0,
                    }
                ),
            )


def _recurrences(scene: Scene, path: str, module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the square matrices that a module applies again and again, with the activation between."""
    if isinstance(module, nn.RNN | nn.RNNCell):
        for name, W in [*module.named_parameters(recurse=False)]:
            if name.startswith("weight_hh"):
                yield name, W.detach().cpu().double(), str(module.nonlinearity)
        return
    call = scene.calls.get(path)
    if call is None or not is_foreign(module):
        return
    activation = next((name for name in ("relu", "tanh") if call.ops.count(name) >= 3), None)
    for name, W in scene.exact.get_submodule(path).named_parameters():
        often = call.products[W.untyped_storage().data_ptr()] >= 3
        if activation and often and W.ndim == 2 and W.shape[0] == W.shape[1]:
            yield name, W.detach(), activation


def state_spaces(scene: Scene) -> Iterator[Finding]:
    r"""Find linear systems over time, with a response that decays, whose gain is above 1 although their eigenvalues are below.

    A mode :math:`\lambda` with input gain :math:`\sqrt{1-r^2}`, :math:`r=|\lambda|`, has the gain :math:`\sqrt{(1+r)/(1-r)}`. The
    witness is a wave at the frequency where the response is largest.

    Examples:
        >>> from stableopt.certify.audit.scene import scene
        >>> class Leaky(nn.Module):
        ...     __module__ = "mine"
        ...
        ...     def forward(self, x):
        ...         h, out = 0.0, []
        ...         for t in range(x.shape[1]):
        ...             h = 0.5 * h + x[:, t]
        ...             out.append(h)
        ...         return torch.stack(out, 1)
        >>> found = next(state_spaces(scene(Leaky(), (torch.ones(1, 16, 1),))))
        >>> round(found.numbers["eigenvalue"], 6), 1.99 < found.attained < 2.0
        (0.5, True)
    """
    for path, module in scene.modules():
        call = scene.calls.get(path)
        if call is None or not is_foreign(module) or not _is_sequence(call) or (call.residual and _inner(scene, path)):
            continue
        f = scene.run(path)
        try:
            response = _response(f, call)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            continue
        if response is None:
            continue
        pair, peak, r = _wave(f, response, call.args[0].shape[2])
        if pair.gain > 1 + 1e-6:
            stable = r < 1
            yield Finding(
                path,
                "eigenvalue-only" if stable else "unstable",
                f"{called(module)} is a linear system over time with eigenvalues up to {r:.4g}"
                + (": that it is stable does not limit its gain." if stable else ": it is not stable."),
                "serious",
                "Scale the input by 1 - |lambda| (gain at most 1), or use stableopt.nn.DiagonalStateSpace, whose gain is limited.",
                claimed=1.0,
                attained=pair.gain,
                witness=pair,
                numbers={"eigenvalue": r, "peak of the frequency response": peak}
                | ({"sqrt((1+r)/(1-r))": math.sqrt((1 + r) / (1 - r))} if stable else {}),
            )


def _inner(scene: Scene, path: str) -> bool:
    return any(p.startswith(f"{path}.") for p in scene.calls if is_foreign(scene.exact.get_submodule(p)))


def _is_sequence(call: Call) -> bool:
    x, y = call.single, call.output
    return (
        x is not None
        and isinstance(y, Tensor)
        and x.ndim == y.ndim == 3
        and x.shape[:2] == y.shape[:2]
        and x.shape[1] >= 4
    )


def _response(f: Map, call: Call) -> Tensor | None:
    """Return the impulse response, shape (time, outputs, inputs), of a linear system with a long one; None for another map."""
    shape = call.args[0].shape
    x, y = (torch.randn(1, *shape[1:], generator=generator(s), dtype=torch.float64) for s in (0, 1))
    zero = torch.zeros_like(x)
    with torch.no_grad():
        base, scale = f(zero), float(f(x).norm() + f(y).norm())
        if float((f(x + y) - f(x) - f(y) + base).norm()) > 1e-10 * scale:
            return None
        if _impulses(f, shape[1], shape[2])[-1].abs().max() == 0:
            return None
        late = zero.clone()
        late[:, 1:] = x[:, :-1]
        if float(((f(late) - base)[:, 1:] - (f(x) - base)[:, :-1]).norm()) > 1e-9 * scale:
            return None
        try:
            return _impulses(f, _LONG, shape[2])
        except RuntimeError:  # a fixed length
            return _impulses(f, shape[1], shape[2])


def _impulses(f: Map, length: int, width: int) -> Tensor:
    n = min(width, 64)
    x = torch.zeros(n, length, width, dtype=torch.float64)
    x[range(n), 0, range(n)] = 1.0
    return (f(x) - f(torch.zeros_like(x))).permute(1, 2, 0)


def _wave(f: Map, response: Tensor, width: int) -> tuple[Witness, float, float]:
    """Return the pair of silence and the loudest wave, the peak of the frequency response, and the decay per step."""
    length, _, n = response.shape
    H = torch.fft.rfft(response, n=4 * length, dim=0)
    gains = torch.linalg.matrix_norm(H, 2)
    k = int(gains.argmax())
    v = torch.linalg.svd(H[k])[2][0].conj()
    time = torch.arange(length, dtype=torch.float64)
    phase = torch.exp(1j * 2 * math.pi * k / (4 * length) * time)
    pairs = []
    for window in (torch.ones_like(time), torch.sin(math.pi * (time + 0.5) / length)):
        x = torch.zeros(1, length, width, dtype=torch.float64)
        x[0, :, :n] = (phase[:, None] * v * window[:, None]).real
        pairs.append(quotient(f, x, torch.zeros_like(x)))
    sizes = response.flatten(1).norm(dim=1)
    last = int((sizes > 1e-12 * sizes.max()).nonzero().max())
    half = last // 2
    r = float((sizes[last] / sizes[half]) ** (1 / (last - half))) if half and sizes[half] > 0 else 0.0
    return max(pairs, key=lambda pair: pair.gain), float(gains[k]), r
