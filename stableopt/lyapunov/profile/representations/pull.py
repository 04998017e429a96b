"""Cotangents pulled back from each cut of a chain to the one before, along the graph of one evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.lyapunov.layers.walk import ProbeError, Walk, floating, replaced
from stableopt.lyapunov.profile.representations.cuts import Chain, at
from stableopt.lyapunov.profile.representations.inside import private_buffers

__all__ = ["Pull"]


class Pull:
    r"""The transposed derivatives of the layers of a chain.

    The graph is that of one evaluation and is kept: the memory is that of a training step.

    Args:
        chain: of which.

    Examples:
        >>> from stableopt.lyapunov.profile.representations.survey import chain_of
        >>> layer = nn.Linear(2, 3)
        >>> pull = Pull(chain_of(layer, torch.ones(4, 2)))
        >>> bool((pull.back(0, torch.eye(3)[:, None].expand(3, 4, 3))[:, 0] == layer.weight).all())
        True
    """

    def __init__(self, chain: Chain) -> None:
        self._chain, self._together = chain, True
        observer = _Recorder(chain)

        def with_graph(evaluate: Callable[[], Any]) -> None:
            with torch.enable_grad(), private_buffers(chain.modules):
                evaluate()

        with chain.quiet():
            Walk(chain.model, chain.probe, observer).run_in(with_graph, chain.start)
        self._leaves, self._arrived = observer.leaves, observer.arrived
        chain.passes.forward += 1
        if not chain.agrees([rows.detach() for rows in observer.arrived]):
            raise NotImplementedError(
                "the model computes something else with a graph than without: it draws other random numbers"
            )

    def back(self, layer: int, cotangents: Tensor) -> Tensor:
        """Pull cotangents back through one layer.

        Args:
            layer: its number, from 0.
            cotangents: ``(count, samples, width after)``.

        Returns:
            ``(count, samples, width before)``.
        """
        chain, leaves, arrived = self._chain, self._leaves[layer], self._arrived[layer]
        chain.passes.adjoints += cotangents.shape[0] / len(chain.layers)
        if not arrived.requires_grad:
            return cotangents.new_zeros(*cotangents.shape[:2], chain.widths[layer])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the loops that torch writes where it has no rule for several at once
            if self._together:
                try:
                    found = self._gradients(arrived, leaves, cotangents, batched=True)
                except RuntimeError:  # an operation without a rule for several at once; what else is wrong shows below
                    self._together = False
                else:
                    return torch.stack(
                        [chain.cuts[layer].rows(list(one), chain.samples) for one in zip(*found, strict=True)]
                    )
            each = [self._gradients(arrived, leaves, c, batched=False) for c in cotangents]
        return torch.stack([chain.cuts[layer].rows(one, chain.samples) for one in each])

    def forward(self, layer: int, tangents: Tensor) -> Tensor:
        r"""Push tangents through one layer: :math:`Jv = \nabla_u \langle J^\top u, v\rangle`, where there is no forward mode.

        Args:
            layer: its number, from 0.
            tangents: ``(count, samples, width before)``.

        Returns:
            ``(count, samples, width after)``.

        Raises:
            NotImplementedError: if an operation has no second derivative.
        """
        chain, leaves, arrived = self._chain, self._leaves[layer], self._arrived[layer]
        chain.passes.adjoints += 2 * tangents.shape[0] / len(chain.layers)
        if not arrived.requires_grad:
            return tangents.new_zeros(*tangents.shape[:2], chain.widths[layer + 1])
        u = torch.zeros_like(arrived, requires_grad=True)
        pulled = torch.autograd.grad(arrived, leaves, u, retain_graph=True, create_graph=True, allow_unused=True)
        joined = [leaf if g is None else g for g, leaf in zip(pulled, leaves, strict=True)]
        reached = torch.cat([torch.full((chain.samples, leaf.numel() // chain.samples), g is not None) for g, leaf in
                             zip(pulled, leaves, strict=True)], 1).to(arrived.device)  # fmt: skip
        rows = chain.cuts[layer].rows(joined, chain.samples)
        try:  # without a second derivative the graph ends, or raises
            found = [torch.autograd.grad(rows, u, (v * reached).to(rows), retain_graph=True)[0] for v in tangents]
        except RuntimeError as error:
            raise NotImplementedError("an operation has neither forward mode nor a second derivative") from error
        return torch.stack(found)

    @staticmethod
    def _gradients(arrived: Tensor, leaves: list[Tensor], cotangents: Tensor, *, batched: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            arrived, leaves, cotangents, retain_graph=True, is_grads_batched=batched, materialize_grads=True
        )
        return list(found)


class _Recorder:
    """Lets a new graph begin at every cut."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._index = {name: i for i, name in enumerate(chain.layers) if i > 0}
        self.start()

    def start(self) -> None:
        self.leaves: list[list[Tensor]] = []
        self.arrived: list[Tensor] = []

    def source(self, x: Tensor) -> Tensor:
        return self._leaf([x])[0]

    def enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        index = self._index.get(name)
        if index is None:
            return None
        if index != len(self.arrived) + 1:
            raise ProbeError(f"the layer {name!r} was called out of turn")
        cut = self._chain.cuts[index]
        tensors = at(cut, floating((args, kwargs)))
        self.arrived.append(cut.rows(tensors, self._chain.samples))
        return replaced((args, kwargs), dict(zip(map(id, tensors), self._leaf(tensors), strict=True)))

    def leave(self, name: str, module: nn.Module, output: Any) -> None: ...

    def result(self, outputs: list[Tensor]) -> list[Tensor]:
        cut = self._chain.cuts[-1]
        self.arrived.append(cut.rows(at(cut, outputs), self._chain.samples))
        return [y.detach().clone() for y in outputs]

    def _leaf(self, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        self.leaves.append(leaves)
        return [t.clone() for t in leaves]  # the model may write into them
