r"""The mixed block of the profile: how representations change with the parameters, along given perturbations of those.

For a perturbation :math:`\delta\theta` of the parameters and :math:`\delta x` of the input,

.. math:: \delta h_l = D_\theta h_l\,\delta\theta + D_x h_l\,\delta x ;

with :math:`\delta\theta = D_{\theta_0}\theta_t\,v`, pushed along training, it is the block :math:`D_{\theta_0} h_{l,t}\,v`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating
from stableopt.lyapunov.profile.representations.cuts import Chain, Passes, at
from stableopt.lyapunov.profile.representations.difference import Operations, central_differences, size_of_difference
from stableopt.lyapunov.profile.representations.inside import primal, private_buffers, tangent_of
from stableopt.lyapunov.profile.representations.shapes import base_of
from stableopt.lyapunov.profile.representations.survey import as_probe, chain_of, in_forward_mode
from stableopt.optim import RandomState

__all__ = ["RepresentationTangents", "representation_tangents", "swapped"]


@dataclass(frozen=True)
class RepresentationTangents(Mapping[str, Tensor]):
    r"""The changes :math:`\delta h_l` of all representations, by the name of the layer that makes each; ``"input"`` for the first.

    Args:
        tangents: name -> ``(k, *shape)``; ``(k, numbers)`` for a representation of several tensors.
        how: ``"forward"`` for exact derivatives; ``"difference"`` for central differences, where an operation has no other.
        epsilon: size of the differences, relative to what is perturbed; 0 for derivatives.
        cost: work in units of one forward and one backward pass, counted as in ``Passes``, a
            tangent that parameters have as well counting twice.

    Examples:
        >>> found = RepresentationTangents({"0": torch.tensor([[3.0, 4.0]])})
        >>> found["0"].shape, found.gram["0"]
        (torch.Size([1, 2]), tensor([[25.]], dtype=torch.float64))
    """

    tangents: dict[str, Tensor] = field(repr=False)
    how: str = "forward"
    epsilon: float = 0.0
    cost: float = 0.0

    def __getitem__(self, name: str) -> Tensor:
        return self.tangents[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tangents)

    def __len__(self) -> int:
        return len(self.tangents)

    @cached_property
    def gram(self) -> dict[str, Tensor]:
        r"""Name -> :math:`\langle\delta h_l^i, \delta h_l^j\rangle`, ``(k, k)``, in float64.

        With the Gram matrix :math:`G_\theta` of the :math:`\delta\theta^i`, the norm of :math:`D_\theta h_l` on their span is
        the root of the largest eigenvalue of :math:`G_h w = \lambda G_\theta w`.
        """
        return {name: _gram(tangents) for name, tangents in self.tangents.items()}


def representation_tangents(
    model: nn.Module,
    probe: Callable[[], Any] | Tensor | Sequence[Any],
    d_parameters: Sequence[Tensor | None],
    *,
    parameters: Sequence[Tensor] | None = None,
    d_input: Tensor | None = None,
    layers: Sequence[str] | None = None,
    chain: Chain | None = None,
) -> RepresentationTangents:
    r"""Push perturbations of parameters (and of the input) to all representations, exactly, without changing the model.

    The model is evaluated in its present mode, with the random numbers that its next forward pass would draw; batch statistics are
    part of the map. Parametrized weights follow from the perturbed originals, tied ones move together.

    Args:
        model: the model.
        probe: as for :func:`stableopt.lyapunov.profile.representations.forward.forward_profile`.
        d_parameters: for each parameter :math:`k` perturbations ``(k, *shape)``, None for one that stays.
        parameters: to which they belong; None for ``model.parameters()``.
        d_input: ``(k, *shape)``, perturbations of the first tensor that the model gets, or of what an embedding makes of token
            indices.
        layers: names of calls at which to look, as :attr:`ForwardProfile.names` has them after the
            input; None to find those on the trunk first.
        chain: what :func:`chain_of` has found for the same model and shapes before; all that
            is left is one evaluation, and a plain one more if the model draws random numbers. Parameters, batch and mode may
            be others by now.

    Returns:
        The tangents of all representations, and their Gram matrices.

    Raises:
        ValueError: if shapes or numbers do not fit, or a parameter is not one of the model.
        ProbeError: if the probe does not call the model, or the output does not depend on the input.
        NotImplementedError: if an operation has no derivative in forward mode and a finite difference would lie
            (:mod:`stableopt.lyapunov.profile.representations.difference`).

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.fill_(3.0)
        >>> d = [torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), None]
        >>> found = representation_tangents(model, torch.tensor([[5.0, 7.0]]), d)
        >>> list(found), found["0"].flatten().tolist(), found["1"].flatten().tolist()
        (['input', '0', '1'], [5.0, 7.0], [15.0, 21.0])
    """
    own: list[Tensor] = [*(model.parameters() if parameters is None else parameters)]
    _checked(model, own, d_parameters, d_input)
    if chain is None:
        chain = chain_of(model, probe, layers, one_by_one=False, search=False, forward=False)
    elif chain.model is model:
        _again(chain, as_probe(model, probe))
    else:
        raise ValueError("the chain is that of another model.")
    if d_input is not None and tuple(d_input.shape[1:]) != chain.cuts[0].shapes[0]:
        raise ValueError(f"d_input must have the shape (k, *{chain.cuts[0].shapes[0]}), got {tuple(d_input.shape)}.")
    moved = [(p, d.to(p)) for p, d in zip(own, d_parameters, strict=True) if d is not None]
    tangents = [d for _, d in moved] + ([] if d_input is None else [d_input.to(chain.cuts[0].dtype)])
    reader = _Reader(chain, [p for p, _ in moved], with_input=d_input is not None)
    found, epsilon = _derivatives(chain, reader, tangents)
    return RepresentationTangents(
        {cut.name: _shaped(d, cut.shapes) for cut, d in zip(chain.cuts, found, strict=True)},
        how="difference" if epsilon else "forward",
        epsilon=epsilon,
        cost=chain.passes.equivalents,
    )


def _again(chain: Chain, probe: Callable[[], Any]) -> None:
    """Let a chain be that of the present state."""
    chain.probe, chain.start, chain.passes, chain.base, chain.samples = probe, RandomState.capture(), Passes(), (), 1
    if chain.draws or chain.modes != tuple(module.training for module in chain.modules.modules()):
        chain.base = base_of(chain)
        chain.passes.forward = 1


def _derivatives(chain: Chain, reader: _Reader, tangents: list[Tensor]) -> tuple[list[Tensor], float]:
    """Return the tangents of all representations, and the size of the differences if they are some."""
    count = tangents[0].shape[0]
    for plain in dict.fromkeys((chain.plain, True)) if chain.forward else ():
        chain.plain = plain
        try:
            found = _pushed(chain, reader, tangents)
        except NotImplementedError:  # of weights that are computed: the input alone has not met them
            continue
        chain.passes.tangents += 2 * count
        return found, 0.0
    chain.plain = False

    def evaluate(values: Sequence[Tensor]) -> list[Tensor]:
        chain.passes.forward += 1
        with chain.quiet(), private_buffers(chain.modules), reader.given(values):
            Walk(chain.model, chain.probe, reader).run(chain.start)
        return [x.clone() for x in reader.seen]

    with Operations() as seen:
        evaluate(reader.zeros())
    epsilon = size_of_difference(seen)
    return central_differences(evaluate, reader.zeros(), tangents, epsilon), epsilon


def _checked(model: nn.Module, own: Sequence[Tensor], given: Sequence[Tensor | None], d_input: Tensor | None) -> None:
    """Refuse shapes and numbers that do not fit."""
    if len(own) != len(given):
        raise ValueError(f"{len(own)} parameters need as many perturbations, got {len(given)}.")
    inside = {id(p) for p in model.parameters()}
    for i, (p, d) in enumerate(zip(own, given, strict=True)):
        if id(p) not in inside:
            raise ValueError(f"parameter {i}, of shape {tuple(p.shape)}, is not one of the model.")
        if d is not None and d.shape[1:] != p.shape:
            raise ValueError(
                f"the perturbations of parameter {i} must have the shape (k, *{tuple(p.shape)}), got {tuple(d.shape)}."
            )
    counts = {d.shape[0] for d in (*given, d_input) if d is not None}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"all perturbations must be of the same number, at least one, got {sorted(counts)}.")


def _pushed(chain: Chain, reader: _Reader, tangents: list[Tensor]) -> list[Tensor]:
    count = tangents[0].shape[0]
    found = _together(chain, reader, tangents) if count > 1 else None
    if found is not None:
        return found
    each = [_one(chain, reader, [t[i] for t in tangents]) for i in range(count)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def _together(chain: Chain, reader: _Reader, tangents: list[Tensor]) -> list[Tensor] | None:
    """Push all perturbations in one evaluation; None where that is not possible, or not the evaluation of the model."""

    def around(evaluate: Callable[[], Any]) -> Any:
        def pushed(*d: Tensor) -> Any:
            def map_(*values: Tensor) -> list[Tensor]:
                with reader.given(values), private_buffers(chain.modules):
                    evaluate()
                return reader.seen

            result: Any = torch.func.jvp(map_, tuple(reader.zeros()), d)
            return result

        return torch.vmap(pushed, randomness="same")(*tangents)

    try:
        with chain.quiet():
            values, found = Walk(chain.model, chain.probe, reader).run_in(around, chain.start)
    except ProbeError:
        raise
    except Exception:  # an operation without a rule for several tangents at once; what else is wrong shows one by one
        return None
    chain.passes.forward += 1
    return found if chain.agrees([value[0] for value in values[1:]]) else None


def _one(chain: Chain, reader: _Reader, tangents: list[Tensor]) -> list[Tensor]:
    def around(evaluate: Callable[[], Any]) -> list[Tensor]:
        with private_buffers(chain.modules):
            duals = [fwd.make_dual(x, d.contiguous()) for x, d in zip(reader.zeros(), tangents, strict=True)]
            with reader.given(duals):
                evaluate()
            if not chain.agrees([primal(x) for x in reader.seen[1:]]):
                raise NotImplementedError("the model computes something else with dual numbers than without")
            return [tangent_of(x).clone() for x in reader.seen]

    chain.passes.forward += 1
    with chain.quiet():
        return in_forward_mode(lambda: Walk(chain.model, chain.probe, reader).run_in(around, chain.start))


class _Reader:
    """Evaluates with other parameters, and reads what arrives at each cut."""

    def __init__(self, chain: Chain, parameters: list[Tensor], *, with_input: bool) -> None:
        self._chain, self._parameters, self._with_input = chain, parameters, with_input
        self._index = {name: i for i, name in enumerate(chain.layers) if i > 0}
        self._shift: Tensor | None = None
        self.seen: list[Tensor] = []

    def zeros(self) -> list[Tensor]:
        """Return where the derivative is taken: the parameters, and no shift of the input."""
        first = self._chain.cuts[0]
        shift = [torch.zeros(first.shapes[0], dtype=first.dtype, device=first.device)] if self._with_input else []
        return [p.detach() for p in self._parameters] + shift

    @contextmanager
    def given(self, values: Sequence[Tensor]) -> Iterator[None]:
        count = len(self._parameters)
        self._shift = values[count] if self._with_input else None
        with swapped(self._chain.modules, self._parameters, values[:count]):
            yield

    def start(self) -> None:
        self.seen = []

    def source(self, x: Tensor) -> Tensor:
        at(self._chain.cuts[0], [x])
        x = x.clone() if self._shift is None else x + self._shift
        self.seen.append(x.reshape(1, -1))
        return x.clone()  # the model may write into it

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self._index:
            self._see(self._index[name], floating((args, kwargs)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None: ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        self._see(len(self._chain.layers), outputs)
        return [primal(y).clone() for y in outputs]

    def _see(self, index: int, tensors: list[Tensor]) -> None:
        if index != len(self.seen):
            raise ProbeError(f"the layer {self._chain.layers[index - 1]!r} was called out of turn")
        cut = self._chain.cuts[index]
        self.seen.append(cut.rows(at(cut, tensors), 1).clone())  # somebody may write into it


@contextmanager
def swapped(modules: nn.Module, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let modules use other tensors in the place of their parameters, which are not written to.

    Args:
        modules: that and all within; a parameter that several of them share is replaced in each.
        parameters: which ones.
        values: what takes their places.

    Note:
        Weights that ``torch.nn.utils.parametrize.cached`` holds are not used meanwhile.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with swapped(layer, [layer.weight], [torch.full((1, 1), 2.0)]):
        ...     float(layer(torch.ones(1)))
        2.0
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """
    others = {id(p): value for p, value in zip(parameters, values, strict=True)}
    owned = [(m._parameters, n, p) for m in modules.modules() for n, p in m._parameters.items() if id(p) in others]  # noqa: SLF001
    kept = ("_flat_weights", "_flat_weight_refs")  # which a recurrent layer renews when it finds other parameters
    flat = [(vars(m), {key: vars(m)[key] for key in kept}) for m in modules.modules() if isinstance(m, nn.RNNBase)]
    cached = P._cache_enabled  # noqa: SLF001 the context knows only how to begin
    try:
        P._cache_enabled = 0  # noqa: SLF001
        for own, name, p in owned:
            own[name] = others[id(p)]  # pyright: ignore[reportArgumentType]
        yield
    finally:
        P._cache_enabled = cached  # noqa: SLF001
        for own, name, p in owned:
            own[name] = p
        for attributes, weights in flat:
            attributes.update(weights)


def _gram(tangents: Tensor) -> Tensor:
    flat = tangents.reshape(tangents.shape[0], -1)
    flat = flat.to("cpu" if flat.device.type == "mps" else flat.device, torch.float64)
    return flat @ flat.mT


def _shaped(tangents: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    count = tangents.shape[0]
    return tangents.reshape(count, *shapes[0]) if len(shapes) == 1 else tangents.reshape(count, -1)
