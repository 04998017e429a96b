r"""Transformer blocks that never expand in the norm of tokens, and the positions that they need."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from stableopt.linalg import Bound
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.attention.clipped import ClippedAttention
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.residual.averaged import AveragedResidual
from stableopt.nn.residual.gradient import GradientBlock
from stableopt.nn.rules import lipschitz
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_bound, uniform_rule

__all__ = ["JoinTokens", "Positions", "TransformerBlock"]


class Positions(nn.Module):
    r"""Add a vector to each token that depends on its place.

    .. math:: x_i \mapsto x_i + p_i

    It is a translation, so its constant is exactly 1 in every norm.

    Args:
        max_length: the largest number of tokens.
        dim: size of a token.
        learned: whether :math:`p` is a parameter, drawn at the start; otherwise its entries are sines and cosines of the place.
        size: norm of a vector :math:`p_i` at the start, in the units of the tokens (on average, if drawn). A position much larger
            than the tokens and the radii of attention hides them.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the input is too long or of another dimension.

    References:
        Vaswani et al., *Attention Is All You Need*, 2017, section 3.5.

    Examples:
        >>> layer = Positions(16, 4, learned=False)
        >>> layer(torch.zeros(1, 2, 4)).round(decimals=2)
        tensor([[[0.0000, 0.7100, 0.0000, 0.7100],
                 [0.6000, 0.3800, 0.0100, 0.7100]]])
    """

    vectors: Tensor

    def __init__(self, max_length: int, dim: int, *, learned: bool = True, size: float = 1.0) -> None:
        super().__init__()
        check_sizes(max_length=max_length, dim=dim)
        check_positive(size=size)
        self.size, self.learned = float(size), bool(learned)
        vectors = torch.empty(max_length, dim)
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the vectors, or compute them anew."""
        if self.learned:
            self.vectors.normal_(std=self.size / math.sqrt(self.vectors.shape[1]))
            return
        length, dim = self.vectors.shape
        place = torch.arange(length, dtype=torch.float64, device=self.vectors.device)[:, None]
        entry = torch.arange(dim, dtype=torch.float64, device=self.vectors.device)
        angle = place * 10_000.0 ** (-2.0 * (entry // 2) / dim) + entry % 2 * (math.pi / 2.0)
        self.vectors.copy_(self.size * math.sqrt(2.0 / dim) * angle.sin())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the tokens with their places; the input has the shape ``(batch, ..., tokens, dim)``."""
        length, dim = self.vectors.shape
        if input.ndim < 3 or input.shape[-1] != dim or input.shape[-2] > length:
            raise ValueError(
                f"Positions({length}, {dim}) needs an input of shape (batch, ..., tokens <= {length}, {dim}), got "
                f"{tuple(input.shape)}."
            )
        return input + self.vectors[: input.shape[-2]].to(input.dtype)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        length, dim = self.vectors.shape
        return f"{length}, {dim}, learned={self.learned}"


class JoinTokens(nn.Module):
    r"""Join the tokens of a sequence into one vector, so that a linear map can read them all.

    .. math:: (x_1, \dots, x_N) \mapsto (x_1, \dots, x_N) / \sqrt N

    From the norm :math:`\max_i\|x_i\|_2` to the Euclidean norm of one vector the constant is exactly 1, attained where all tokens
    move alike; in l2, linf and l1 it is :math:`1/\sqrt N`. The mean of the tokens is this layer and a matrix of norm 1.

    Args:
        tokens: N, the number of tokens, which is fixed.

    Raises:
        ValueError: if ``tokens`` is no positive integer; in ``forward``, if the input has another number of tokens.

    Examples:
        >>> JoinTokens(4)(torch.ones(1, 4, 2)).tolist()
        [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        check_sizes(tokens=tokens)
        self.tokens = tokens
        self.divisor = Bound.point(tokens).sqrt().upper  # rounded up, so that the constant is at most 1

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return one vector for each item of the batch; the input has the shape ``(batch, ..., tokens, dim)``."""
        if input.ndim < 3 or input.shape[-2] != self.tokens:
            raise ValueError(
                f"JoinTokens({self.tokens}) needs an input of shape (batch, ..., {self.tokens}, dim), got {tuple(input.shape)}."
            )
        return input.flatten(-2) / self.divisor

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return f"{self.tokens}"


class TransformerBlock(nn.Module):
    r"""Attention and a layer for each token, both residual, that together never expand.

    .. math:: x \mapsto G(y), \qquad y = (1 - a)\,x + a\,T(x), \qquad G(y) = y - \tau A^\top \sigma(Ay + b) .

    T is :class:`ClippedAttention` with a constant of at most 1 in the norm :math:`\max_i\|x_i\|_2`, so the average with the input
    has one, and so has G, a :class:`GradientBlock` on each token. The block has a constant of at most 1 in this norm for every
    value of its parameters, any length and any mask, and so has a stack of any depth. A perturbation of the whole sequence of
    Euclidean size :math:`\varepsilon` is one of at most :math:`\varepsilon` in it.

    Args:
        dim: size of a token.
        heads: number of heads.
        hidden: rows of A; None for ``dim``.
        depth: number of blocks in the stack: both steps start at :math:`1/\max(2, \text{depth})` of their limits.
        activation: that of the gradient block.
        norm: a module for the input of the block, with a constant of at most 1 for each token, as :class:`BoundedNorm`; None for
            none.
        radius: as for :class:`ClippedAttention`.
        logit_scale: as for :class:`ClippedAttention`.
        causal: as for :class:`ClippedAttention`.
        dropout: as for :class:`ClippedAttention`.

    Raises:
        ValueError: if an argument is out of range.

    Note:
        The parts are ``norm``, ``attention`` (an :class:`AveragedResidual`) and ``gradient``; a bound counts what they are now. In
        l2 over the whole sequence the block may expand.

    References:
        Vaswani et al., *Attention Is All You Need*, 2017 (the two parts).

    Examples:
        >>> blocks = nn.Sequential(*[TransformerBlock(8, heads=2, depth=4) for _ in range(4)])
        >>> lipschitz(blocks, "token_max").upper <= 1.0
        True
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        hidden: int | None = None,
        depth: int = 1,
        activation: str = "relu",
        norm: nn.Module | None = None,
        radius: float | tuple[float, float, float] = 1.0,
        logit_scale: float | None = None,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        mix = ClippedAttention(dim, heads, radius=radius, logit_scale=logit_scale, causal=causal, dropout=dropout)
        self.norm = nn.Identity() if norm is None else norm
        self.attention = AveragedResidual(mix, depth=depth)
        self.gradient = GradientBlock(dim, hidden, depth=depth, activation=activation)

    def forward(self, input: Tensor, *, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:  # noqa: A002
        """Return the next tokens; the masks are those of :meth:`ClippedAttention.forward`."""
        return self.gradient(self.attention(self.norm(input), mask=mask, padding=padding))


def _chain(module: TransformerBlock) -> nn.Sequential:
    return nn.Sequential(OrderedDict(module.named_children()))


@lipschitz_rule.register(TransformerBlock)
def _transformer_block(module: TransformerBlock, norm: str) -> Bound:
    return lipschitz(_chain(module), norm)


@token_rule.register(TransformerBlock)
def _token(module: TransformerBlock) -> Bound:
    return _transformer_block(module, TOKEN_MAX)


@uniform_rule.register(TransformerBlock)
def _uniform(module: TransformerBlock, norm: str) -> Bound | None:
    return uniform_bound(_chain(module), norm)


@lipschitz_rule.register(Positions)
def _positions(module: Positions, norm: str) -> Bound:  # noqa: ARG001 a translation in every norm
    if not bool(module.vectors.isfinite().all()):
        raise ValueError("no bound holds for Positions with NaN or infinite vectors.")
    return Bound.point(1.0)


@token_rule.register(Positions)
def _positions_token(module: Positions) -> Bound:
    return _positions(module, TOKEN_MAX)


@uniform_rule.register(Positions)
def _positions_uniform(module: Positions, norm: str) -> Bound:  # noqa: ARG001 a translation in every norm
    return Bound.point(1.0)


@lipschitz_rule.register(JoinTokens)
def _join(module: JoinTokens, norm: str) -> Bound:  # noqa: ARG001 a multiple of the identity in each of them
    return Bound.point(1.0) / module.divisor


@token_rule.register(JoinTokens)
def _join_token(module: JoinTokens) -> Bound:  # noqa: ARG001 for every number of tokens
    """Return 1: the divisor is the root of the number of tokens, rounded up."""
    return Bound(0.0, 1.0)


@uniform_rule.register(JoinTokens)
def _join_uniform(module: JoinTokens, norm: str) -> Bound:
    return _join_token(module) if norm == TOKEN_MAX else _join(module, norm)
