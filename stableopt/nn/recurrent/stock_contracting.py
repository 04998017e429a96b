r"""Keep torch's recurrent layers contracting while they are trained, by limits on the rows of their weights.

**Plain recurrence.** :math:`\|W_h\| \le a` in l2, linf or l1; nothing else is limited.

**GRU.** With :math:`z \le \zeta < 1` and the row sums N, R, Z of :math:`W_{hn}, W_{hr}, W_{hz}` of a unit, the row of the state
in the comparison map of ``stock_gru`` is at most :math:`z + (1 - z)\,(N + \tfrac14 Q R) + 2 z(1 - z) Z`, because
:math:`\sup_r rN + r(1 - r)QR \le N + \tfrac14 QR` and :math:`|h - n| \le 2`. Let
:math:`N + \tfrac14(m + \beta)R + 2\zeta Z \le m` and :math:`|b_{hn}| \le \beta`, so that :math:`N \le m` and
:math:`Q \le m + \beta`. Then the row is at most :math:`1 - (1 - z)(1 - m) \le 1 - (1 - \zeta)(1 - m)`, which is a for
:math:`m = \zeta = 1 - \sqrt{1 - a}`. The gate keeps :math:`z \le \zeta` if what it is told is at most
:math:`\Lambda = \log\frac{\zeta}{1 - \zeta}`: for inputs up to u half of it is for :math:`u\|W_{xz}\|`, a quarter for Z and an
eighth for each bias (two and one third without biases). All other weights and biases are free.

**LSTM.** With :math:`f \le \varphi`, hence :math:`|c| \le 1/(1 - \varphi)`, the row of c is at most
:math:`\sup_f f + f(1 - f) F/(1 - \varphi) + G + \tfrac14 I`. If :math:`\varphi F + G + \tfrac14 I \le a - \varphi` then
:math:`F \le (1 - \varphi)/\varphi`, the supremum is at :math:`f = \varphi`, and the row is at most a. The row of h is at most
:math:`\sup_o o\,a + o(1 - o) O`, which is a if :math:`O \le a`. The limits are taken for :math:`\varphi = 0.8\,a`; the gate f is
kept below it like z above. A projection gets row sums of at most 1.

**Gain.** With :math:`N + \tfrac14(m + \beta)R + 2\zeta Z \le m` for the state and the same combination of the rows of
:math:`W_{xn}, W_{xr}, W_{xz}` at most :math:`g(1 - m)`, the map S of ``stock_gru`` takes g to at most :math:`gm + g(1 - m) = g`:
states under inputs that differ by at most 1 differ by at most g in the maximum norm. For the LSTM it is :math:`g(1 - a)`.

The limits are sufficient, and a part of the weights that contract is outside of them: what is proved about the weights as they
are is said by :func:`stableopt.nn.layer_bounds`, and is at most the rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.constraints import Constraint, OneNormBall, SpectralBall
from stableopt.linalg import Bound
from stableopt.nn.arguments import check_positive
from stableopt.nn.constrain import check_parameter, check_unwrapped, constrain, projections
from stableopt.nn.dispatch import check_forward
from stableopt.nn.input_clip import clip_input, input_limit
from stableopt.nn.parametrized import remember_order
from stableopt.nn.recurrent.gate_balls import GateBalls
from stableopt.nn.recurrent.stock import STOCK_CELLS, STOCK_LAYERS
from stableopt.nn.uniform import uniform_rule

__all__ = ["contracting", "contracting_names", "forget_contracting"]

_Module = TypeVar("_Module", bound=nn.Module)

_RECORD = "_stableopt_contracting"
"""Plain attribute of a module: the names of the tensors that are limited, and the gain in linf that follows for all their
values. It follows deepcopy and pickle."""
_MARGIN = 1.0 - 2.0**-20
"""Factor of all limits, so that the rounding of a parametrization and of the proof stays below the rate."""
_SMALLEST_RATE = 0.8
"""Below it there is no room for a gate."""
_INNER_BIAS = 0.5
r""":math:`\beta`, the limit of :math:`b_{hn}` of a GRU."""


@dataclass(frozen=True)
class _Settings:
    """What is promised of one direction of one layer."""

    rate: float
    norm: str
    bound: float
    gain: float | None
    biases: bool = True

    @property
    def shares(self) -> tuple[float, float, float]:
        """Parts of what the keeping gate may be told: by the inputs, by the state, by each bias."""
        return (1 / 2, 1 / 4, 1 / 8) if self.biases else (2 / 3, 1 / 3, 1.0)

    def of_one_direction(self, layers: int, directions: int) -> _Settings:
        """Share the gain of a whole module: layers multiply, directions stand side by side."""
        if self.gain is None:
            return self
        joined = {"l2": math.sqrt(directions), "linf": 1.0, "l1": directions}[self.norm]
        return replace(self, gain=self.gain ** (1.0 / layers) / joined)


def contracting(
    module: _Module,
    rate: float = 0.95,
    *,
    by: Literal["parametrization", "projection"] = "parametrization",
    norm: Literal["l2", "linf", "l1"] | None = None,
    input_bound: float | None = None,
    gain: float | None = None,
) -> _Module:
    r"""Keep a recurrent layer of torch contracting, in place, for the whole training.

    From then on each step of each layer of the module forgets: two runs on the same input satisfy

    .. math:: \|h_t - h'_t\| \le \text{rate} \cdot \|h_{t-1} - h'_{t-1}\|,

    in the norm asked for of an RNN's state, and in the maximum norm of the state h of a GRU or (c, h) of an LSTM. The gated ones
    need their inputs within :math:`[-u, u]`, and get them clipped there; states must have started within the box in which runs
    from 0 stay, as torch's zero state does.

    Args:
        module: :class:`torch.nn.RNN`, :class:`~torch.nn.GRU`, :class:`~torch.nn.LSTM` or one of their cells, with any number of
            layers and directions. The weights start scaled down to their limits.
        rate: the limit of the factor of one step; in (0, 1) for an RNN, in [0.8, 1) for the gated ones. Of a GRU the gate that
            keeps is then at most :math:`1 - \sqrt{1 - \text{rate}}`, of an LSTM :math:`0.8 \cdot \text{rate}`.
        by: ``"parametrization"`` scales the rows of the weights by a common factor in each forward map, for any optimizer.
            ``"projection"`` keeps plain parameters, which an optimizer of this package projects after each step; pass it
            :func:`stableopt.nn.parameter_groups`.
        norm: ``"l2"`` (None), ``"linf"`` or ``"l1"`` for an RNN; the gated ones have ``"linf"`` (None).
        input_bound: :math:`u > 0`, from which on inputs are clipped, entry by entry; a must for the gated ones.
        gain: a limit of the gain from input to output sequences of any length in the norm, which limits the weights of the inputs
            too; None for none. With it, and by parametrization, a layer counts as this constant for :func:`stableopt.nn.stabilize`
            in ``"linf"``.

    Returns:
        The same module.

    Raises:
        TypeError: if ``module`` is none of these.
        ValueError: if an argument is out of range or missing, or a weight is constrained already, NaN, infinite, shared, or wrapped
            for distributed training.
        UncertifiableError: if a subclass or a hook may change the map.

    Note:
        :func:`stableopt.nn.layer_bounds` proves the factors of the weights as they are, :func:`stableopt.nn.lipschitz` the gain
        from input to output sequences. The limits hold up to the rounding of the dtype of the weights, which the proof counts.
        :func:`stableopt.nn.release` takes the limits off; the clipping stays.

    References:
        Miller and Hardt, *Stable Recurrent Models*, 2019 (projections of RNN and LSTM); Bonassi, Farina and Scattolini, *On the
        Stability Properties of Gated Recurrent Units Neural Networks*, 2021 (a GRU that resets before the matrix).

    Examples:
        >>> from stableopt.nn import layer_bounds
        >>> gru = contracting(nn.GRU(4, 8), 0.95, input_bound=1.0)
        >>> layer_bounds(gru, "linf")["l0"].state.upper <= 0.95
        True
    """
    kind = _kind_of(module)
    settings = _settings(kind, rate, by, norm, input_bound, gain)
    limits = _limits(module, kind, settings)
    if by == "projection":
        limits = {name: _apart(constraint) for name, constraint in limits.items()}
    check_unwrapped(module)
    for name in limits:
        check_parameter(module, name, root=module)
        if P.is_parametrized(module, name) or name in projections(module):
            raise ValueError(
                f"'{name}' of this {kind.__name__} is constrained already; call stableopt.nn.release(module), or remove its "
                "parametrization, first."
            )
    if input_bound is not None:
        clip_input(module, input_bound)
    for name, constraint in limits.items():
        if by == "projection" and isinstance(constraint, GateBalls):
            with torch.no_grad():  # the projection itself would start from sparse weights
                parameter: Tensor = getattr(module, name)
                parameter.copy_(constraint.map(parameter))
        remember_order(module)
        constrain(module, name, constraint, by=by)
    promised = settings.gain if by == "parametrization" and settings.norm == "linf" else None
    vars(module)[_RECORD] = (tuple(limits), promised, math.inf if input_bound is None else float(input_bound))
    return module


def contracting_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors of a module that :func:`contracting` limits.

    Examples:
        >>> contracting_names(contracting(nn.RNN(2, 2)))
        ('weight_hh_l0',)
    """
    return vars(module).get(_RECORD, ((),))[0]


def forget_contracting(module: nn.Module) -> None:
    """Forget that a module is kept contracting.

    Examples:
        >>> forget_contracting(rnn := contracting(nn.RNN(2, 2)))
        >>> contracting_names(rnn)
        ()
    """
    vars(module).pop(_RECORD, None)


def _kind_of(module: nn.Module) -> type[nn.Module]:
    for kind in (*STOCK_LAYERS, *STOCK_CELLS):
        if isinstance(module, kind):
            check_forward(module, kind)
            return kind
    raise TypeError(
        f"contracting needs an RNN, GRU, LSTM or one of their cells, got {type(module).__name__}; call it on that part of the "
        "model."
    )


def _settings(
    kind: type[nn.Module], rate: float, by: str, norm: str | None, input_bound: float | None, gain: float | None
) -> _Settings:
    """Check the arguments."""
    plain = issubclass(kind, nn.RNN | nn.RNNCell)
    lowest = 0.0 if plain else _SMALLEST_RATE
    if not (lowest <= rate < 1.0 and rate > 0.0):
        interval = "(0, 1)" if plain else f"[{_SMALLEST_RATE}, 1)"
        raise ValueError(f"the rate of a contracting {kind.__name__} must lie in {interval}, got {rate!r}.")
    if by not in {"parametrization", "projection"}:
        raise ValueError(f"by must be 'parametrization' or 'projection', got {by!r}.")
    norms = ("l2", "linf", "l1") if plain else ("linf",)
    if norm is not None and norm not in norms:
        raise ValueError(f"the norm of a contracting {kind.__name__} must be one of {', '.join(norms)}, got {norm!r}.")
    if gain is not None:
        check_positive(gain=gain)
    if input_bound is not None:
        check_positive(input_bound=input_bound)
    elif not plain:
        raise ValueError(
            f"a {kind.__name__} needs input_bound: large inputs hold its gates open, and nothing is forgotten then. Give a bound "
            "that your inputs keep, such as 3.0 for standardized ones; what exceeds it is clipped."
        )
    return _Settings(float(rate), norm or norms[0], 1.0 if input_bound is None else float(input_bound), gain)


def _limits(module: nn.Module, kind: type[nn.Module], settings: _Settings) -> dict[str, Constraint]:
    """Return the sets of all tensors of a module that are limited, by name."""
    suffixes, first = [""], 1
    if not issubclass(kind, nn.RNNCellBase):
        layers, ends = range(int(module.num_layers)), ["", "_reverse"] if module.bidirectional else [""]  # pyright: ignore[reportArgumentType]
        suffixes, first = [f"_l{layer}{end}" for layer in layers for end in ends], len(ends)
        settings = settings.of_one_direction(len(layers), len(ends))
    settings = replace(settings, biases=bool(module.bias))
    limits: dict[str, Constraint] = {}
    for index, suffix in enumerate(suffixes):
        inner = settings if index < first else replace(settings, bound=1.0)  # outputs of gated layers are within 1
        for name, limit in _of_one_step(kind, inner).items():
            if getattr(module, name + suffix, None) is not None:
                limits[name + suffix] = limit
    return limits


def _of_one_step(kind: type[nn.Module], settings: _Settings) -> dict[str, Constraint]:
    if issubclass(kind, nn.GRU | nn.GRUCell):
        return _gru(settings)
    if issubclass(kind, nn.LSTM | nn.LSTMCell):
        return _lstm(settings)
    limits = {"weight_hh": _norm_ball(settings.norm, settings.rate)}
    if settings.gain is not None:
        limits["weight_ih"] = _norm_ball(settings.norm, settings.gain * (1.0 - settings.rate))
    return limits


def _norm_ball(norm: str, radius: float) -> Constraint:
    radius *= _MARGIN
    return {"l2": SpectralBall(radius), "linf": GateBalls(((1.0 / radius,),)), "l1": OneNormBall(radius)}[norm]


def _gru(settings: _Settings) -> dict[str, Constraint]:
    """Return the limits of a GRU; gates r, z, n."""
    m = zeta = 1.0 - math.sqrt(1.0 - settings.rate)
    told = math.log(zeta / (1.0 - zeta))
    together = [0.25 * (m + _INNER_BIAS), 2.0 * zeta, 1.0]
    from_input, from_state, from_bias = (told * share for share in settings.shares)
    inputs = [[0.0, settings.bound / from_input, 0.0]]
    if settings.gain is not None:
        inputs.append([w / (settings.gain * (1.0 - m)) for w in together])
    return {
        "weight_hh": _balls([0.0, 1.0 / from_state, 0.0], [w / m for w in together]),
        "weight_ih": _balls(*inputs),
        "bias_ih": _balls([0.0, 1.0 / from_bias, 0.0]),
        "bias_hh": _balls([0.0, 1.0 / from_bias, 0.0], [0.0, 0.0, 1.0 / _INNER_BIAS]),
    }


def _lstm(settings: _Settings) -> dict[str, Constraint]:
    """Return the limits of an LSTM; gates i, f, g, o."""
    rate, phi = settings.rate, 0.8 * settings.rate
    told = math.log(phi / (1.0 - phi))
    room = rate - phi
    together, output = [0.25, phi, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]
    from_input, from_state, from_bias = (told * share for share in settings.shares)
    inputs = [[0.0, settings.bound / from_input, 0.0, 0.0]]
    if settings.gain is not None:
        inputs += [[w / (settings.gain * (1.0 - rate)) for w in ball] for ball in (together, output)]
    return {
        "weight_hh": _balls(
            [0.0, 1.0 / from_state, 0.0, 0.0], [w / room for w in together], [w / rate for w in output]
        ),
        "weight_ih": _balls(*inputs),
        "bias_ih": _balls([0.0, 1.0 / from_bias, 0.0, 0.0]),
        "bias_hh": _balls([0.0, 1.0 / from_bias, 0.0, 0.0]),
        "weight_hr": _balls([1.0]),
    }


def _balls(*weights: list[float]) -> GateBalls:
    return GateBalls(tuple(tuple(w / _MARGIN for w in ball) for ball in weights))


def _apart(constraint: Constraint) -> Constraint:
    """Return balls without a common gate that are within the given ones: each gate stays in its last ball, with the largest weight.

    A projection on them is the nearest point, which one after the other would not be.
    """
    if not isinstance(constraint, GateBalls):
        return constraint
    largest = [max(gate) for gate in zip(*constraint.balls, strict=True)]
    last = [
        max(k for k, ball in enumerate(constraint.balls) if ball[g] > 0.0) if w > 0.0 else -1
        for g, w in enumerate(largest)
    ]
    balls = [tuple(w if last[g] == k else 0.0 for g, w in enumerate(largest)) for k in range(len(constraint.balls))]
    return GateBalls(tuple(ball for ball in balls if any(ball)))


@uniform_rule.register(nn.RNN)
@uniform_rule.register(nn.GRU)
@uniform_rule.register(nn.LSTM)
def _uniform(module: nn.Module, norm: str) -> Bound | None:
    names, gain, limit = vars(module).get(_RECORD, ((), None, math.inf))
    if gain is None or norm != "linf" or not all(P.is_parametrized(module, name) for name in names):
        return None
    if input_limit(module) > limit:  # clipped anew, or no more: the weights are limited for smaller inputs
        return None
    return Bound(0.0, gain)
