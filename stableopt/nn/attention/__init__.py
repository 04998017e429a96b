r"""Attention that is Lipschitz with a constant for every length, blocks made of it, and normalizations that keep a constant."""

from stableopt.nn.attention.clipped import ClippedAttention
from stableopt.nn.attention.norms import BoundedNorm
from stableopt.nn.attention.transformer import JoinTokens, Positions, TransformerBlock

__all__ = ["BoundedNorm", "ClippedAttention", "JoinTokens", "Positions", "TransformerBlock"]
