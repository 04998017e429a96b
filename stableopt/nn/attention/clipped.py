r"""Softmax attention whose queries, keys and values are clipped to balls, hence Lipschitz with a constant for every length."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound, frobenius_norm, gram_norm, spectral_norm
from stableopt.linalg.bound import Real
from stableopt.nn.arguments import check_positive, check_sizes
from stableopt.nn.attention.masks import allowed
from stableopt.nn.centering import into_ball
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.precision import full_precision, wide
from stableopt.nn.residual.steps import rounding_slack
from stableopt.nn.tokens import token_rule
from stableopt.nn.uniform import uniform_rule
from stableopt.theory import attention_constant, attention_head_constant, attention_weight_sum

__all__ = ["ClippedAttention"]

_LOGS = 4096.0
"""Roundings of a unit in logarithms up to some hundreds, in the constant that the output is divided by."""
_RANGE = 10.0
"""The scale of the logits is kept between e^-10 and e^10 times the one at the start."""


class ClippedAttention(nn.Module):
    r"""Multi-head attention with a Lipschitz constant that depends neither on the length nor on the mask.

    .. math::
        y_i = a\,W_O\,\bigl(\sum_j P^h_{ij} v^h_j\bigr)_h + b_O, \quad
        P^h = \operatorname{softmax}(s_h\langle q^h_i, k^h_j\rangle), \quad
        q = \Pi_{R_q}(W_Qx + b_Q),\; k = \Pi_{R_k}(W_Kx + b_K),\; v = \Pi_{R_v}(W_Vx + b_V),

    with the projections :math:`\Pi_R(x) = x\min(1, R/\|x\|)` onto balls. In the norm :math:`\max_i \|x_i\|_2` (``"token_max"``) and
    with :math:`\kappa_h = s_hR_vR_q\|W_K^h\|` the constant is at most :math:`a\,C`,

    .. math::
        C = \|W_O\|\,\Bigl(\Bigl(\sum_h \tfrac14\bigl(\|W_V^h\| + \kappa_h + \sqrt{\|W_V^h\|^2 + \kappa_h^2}\bigr)^2\Bigr)^{1/2}
        + \bigl\|(s_hR_vR_kW_Q^h)_h\bigr\|\Bigr), \qquad a = \min(1, L/C),

    by :func:`stableopt.theory.attention_head_constant`, where the proof stands. The factor :math:`a` is computed from upper
    bounds of the norms in every forward pass, so the constant is at most L for every value of the parameters. Without clipping
    there is none: the slopes of dot-product attention grow with the square of its input.

    Args:
        dim: size of the last dimension of input and output.
        heads: number of heads.
        head_dim: size of queries, keys and values of a head; None for ``dim // heads``.
        radius: :math:`R_q, R_k, R_v`, or one number for all three, in units of the input.
        logit_scale: :math:`s` at the start, one for all heads; None for :math:`1/(R_qR_k)`. It is learned for each head, times
            :math:`e^r` with the parameter ``log_scale``; no logit exceeds :math:`sR_qR_k`. Learned radii would add nothing: scaling
            a matrix does the same.
        lipschitz: L, the limit of the constant in the token-max norm; None for :math:`a = 1`.
        causal: whether a token attends only to itself and to those before it.
        bias: whether the four maps have biases, which are translations and cost nothing.
        dropout: probability with which weights of the softmax are dropped, in training only.
        max_length: the largest number of tokens, for an l2 bound with ``causal=True``; None for any.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the input has not the shape ``(batch, ..., tokens, dim)``, is
            too long, or a mask does not fit.

    Note:
        In l2 over the whole sequence one token that all others attend to changes all of them. Without a mask the weights that it
        gets add up to at most :math:`e^{2sR_qR_k}`, which gives a bound for every length. The l2 rule speaks of calls without
        masks; the bound in the token-max norm holds for any mask. A token that may attend to nothing gets the bias of the output
        instead of NaN. With a ``context`` the constant is for input and context together, in the larger of their norms. The
        bounds are those of evaluation, without dropout.

    References:
        Kim, Papamakarios and Mnih, *The Lipschitz Constant of Self-Attention*, 2021 (dot-product attention has none); Castin, Ablin
        and Peyré, *How Smooth Is Attention?*, 2024 (on balls it grows with the root of the length in l2).

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> layer = ClippedAttention(8, heads=2)
        >>> x, y = 10 * torch.randn(1, 5, 8), 10 * torch.randn(1, 5, 8)
        >>> spread = (layer(x) - layer(y)).norm(dim=-1).max()
        >>> bool(spread <= (x - y).norm(dim=-1).max())
        True
    """

    query_bias: nn.Parameter | None
    key_bias: nn.Parameter | None
    value_bias: nn.Parameter | None
    output_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        head_dim: int | None = None,
        radius: float | tuple[float, float, float] = 1.0,
        logit_scale: float | None = None,
        lipschitz: float | None = 1.0,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, heads=heads)
        if head_dim is None and dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}; or give head_dim.")
        width = dim // heads if head_dim is None else head_dim
        check_sizes(head_dim=width, max_length=1 if max_length is None else max_length)
        radii = tuple(map(float, radius)) if isinstance(radius, tuple | list) else (float(radius),) * 3
        if len(radii) != 3:
            raise ValueError(f"radius must be one number or those of queries, keys and values, got {radius!r}.")
        check_positive(query_radius=radii[0], key_radius=radii[1], value_radius=radii[2])
        self.start = 1.0 / (radii[0] * radii[1]) if logit_scale is None else float(logit_scale)
        check_positive(logit_scale=self.start, lipschitz=1.0 if lipschitz is None else lipschitz)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}.")
        self.dim, self.heads, self.head_dim, self.radii = dim, heads, width, radii
        self.lipschitz = None if lipschitz is None else float(lipschitz)
        self.causal, self.dropout, self.max_length = bool(causal), float(dropout), max_length
        self.query_weight, self.query_bias = _affine(heads * width, dim, bias=bias)
        self.key_weight, self.key_bias = _affine(heads * width, dim, bias=bias)
        self.value_weight, self.value_bias = _affine(heads * width, dim, bias=bias)
        self.output_weight, self.output_bias = _affine(dim, heads * width, bias=bias)
        self.log_scale = nn.Parameter(torch.zeros(heads))
        self.reset_parameters()

    @classmethod
    def from_torch(
        cls,
        attention: nn.MultiheadAttention,
        radius: float | tuple[float, float, float],
        *,
        lipschitz: float | None = None,
        causal: bool = False,
    ) -> ClippedAttention:
        r"""Take the weights of torch's attention; where nothing is clipped or limited the outputs are the same.

        Args:
            attention: self-attention with one size of queries, keys and values.
            radius: as for the class. Without a limit the constant grows with it.
            lipschitz: as for the class.
            causal: as for the class; torch takes the mask at every call instead.

        Raises:
            TypeError: if ``attention`` is no MultiheadAttention.
            ValueError: if it has keys or values of other sizes, ``add_bias_kv`` or ``add_zero_attn``.

        Examples:
            >>> plain = nn.MultiheadAttention(8, 2, batch_first=True)
            >>> x = torch.randn(1, 3, 8)
            >>> layer = ClippedAttention.from_torch(plain, radius=100.0)
            >>> torch.allclose(layer(x), plain(x, x, x)[0], atol=1e-5)
            True
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"from_torch needs a torch.nn.MultiheadAttention, got {type(attention).__name__}.")
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "from_torch needs a MultiheadAttention with one size of queries, keys and values and without add_bias_kv and "
                "add_zero_attn, which this layer does not have."
            )
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        layer = cls(
            attention.embed_dim, attention.num_heads,
            radius=radius, logit_scale=attention.head_dim**-0.5, lipschitz=lipschitz, causal=causal, bias=bias is not None,
            dropout=attention.dropout,
        ).to(weight)  # fmt: skip
        state = dict(zip(("query_weight", "key_weight", "value_weight"), weight.detach().chunk(3), strict=True))
        state |= {"output_weight": attention.out_proj.weight.detach(), "log_scale": layer.log_scale.detach()}
        if bias is not None:
            state |= dict(zip(("query_bias", "key_bias", "value_bias"), bias.detach().chunk(3), strict=True))
            state["output_bias"] = attention.out_proj.bias.detach()
        layer.load_state_dict(state)
        return layer

    def reset_parameters(self) -> None:
        """Draw new weights with orthonormal rows or columns and set the biases to zero; the scale of the logits stays."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.orthogonal_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def logit_scale(self) -> Tensor:
        r"""Return :math:`s` of each head, in at least float32.

        Examples:
            >>> ClippedAttention(4, 2, radius=(1.0, 4.0, 1.0)).logit_scale().detach()
            tensor([0.2500, 0.2500])
        """
        return self.start * wide(self.log_scale).clamp(-_RANGE, _RANGE).exp()

    def output_factor(self) -> Tensor | float:
        r"""Return the factor :math:`a` that ``forward`` uses now, a 0-d tensor in at least float32, or 1 without a limit.

        It is shrunk against the rounding in its own computation, which is in logarithms, so that nothing over- or underflows.

        Examples:
            >>> layer = ClippedAttention(4)
            >>> _ = nn.init.zeros_(layer.output_weight)
            >>> round(float(layer.output_factor().detach()), 2), ClippedAttention(4, lipschitz=None).output_factor()
            (1.0, 1.0)
        """
        if self.lipschitz is None:
            return 1.0
        R_q, R_k, R_v = (math.log(R) for R in self.radii)
        output = wide(self.output_weight)
        with full_precision(output):
            log_s = math.log(self.start) + wide(self.log_scale).clamp(-_RANGE, _RANGE)
            steepest = log_s.detach().amax()  # taken out, so that no product overflows
            relative = (log_s - steepest).exp()[:, None, None]
            queries = _log_norm((relative * self._by_head(self.query_weight)).flatten(0, 1)) + steepest + (R_v + R_k)
            value = _log_norm(self._by_head(self.value_weight))
            key = _log_norm(self._by_head(self.key_weight)) + log_s + (R_v + R_q)
            root = 0.5 * torch.logaddexp(2.0 * value, 2.0 * key)
            heads = torch.logaddexp(torch.logaddexp(value, key), root) - math.log(2.0)
            constant = _log_norm(output) + torch.logaddexp(0.5 * torch.logsumexp(2.0 * heads, 0), queries)
            weights = (self.query_weight, self.key_weight, self.value_weight, self.output_weight)
            slack = _LOGS * torch.finfo(output.dtype).eps + sum(rounding_slack(wide(W)) for W in weights)
            stored = torch.finfo(
                self.output_weight.dtype
            )  # in half precision the product and the scale are rounded once more
            slack += (
                4.0 * math.sqrt(min(output.shape)) * stored.eps if stored.eps > torch.finfo(output.dtype).eps else 0.0
            )
            factor: Tensor = (1.0 - slack) * (math.log(self.lipschitz) - constant).clamp_max(0.0).exp()
            few_digits = factor < torch.finfo(factor.dtype).tiny  # a subnormal number
            return torch.where(few_digits, 0.0, factor)

    def forward(
        self,
        input: Tensor,  # noqa: A002 the name torch uses
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        r"""Return the mixed tokens.

        Args:
            input: of shape ``(batch, ..., N, dim)``.
            context: what is attended to, of shape ``(batch, ..., M, dim)``; None for the input itself.
            mask: as that of :func:`torch.nn.functional.scaled_dot_product_attention`, of shape ``(N, M)`` or one that broadcasts to
                ``(batch, ..., heads, N, M)``: True where token i may attend to token j, or numbers that are added to the logits.
            padding: of shape ``(batch, ..., M)``, True for tokens that nobody may attend to, as ``key_padding_mask`` of torch.
        """
        source = input if context is None else context
        self._check(input, source)
        q, k, v = (
            into_ball(self._split(F.linear(x, weight, bias)), R, (-1,))
            for x, weight, bias, R in (
                (input, self.query_weight, self.query_bias, self.radii[0]),
                (source, self.key_weight, self.key_bias, self.radii[1]),
                (source, self.value_weight, self.value_bias, self.radii[2]),
            )
        )
        q = q * self.logit_scale().to(q.dtype)[:, None, None]
        rows = allowed(q, k, mask, padding, causal=self.causal)
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, rows.mask, dropout_p=p, is_causal=rows.causal, scale=1.0)
        if rows.empty is not None:
            mixed = mixed.masked_fill(rows.empty, 0.0)
        return F.linear(mixed.transpose(-3, -2).flatten(-2), self.output_matrix(), self.output_bias)

    def output_matrix(self) -> Tensor:
        r"""Return :math:`a W_O` as ``forward`` uses it, in the dtype of the weights.

        Examples:
            >>> layer = ClippedAttention(4)
            >>> bool(torch.allclose(layer.output_matrix(), layer.output_factor() * layer.output_weight))
            True
        """
        return (self.output_factor() * wide(self.output_weight)).to(self.output_weight.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(-3, -2)

    def _by_head(self, weight: Tensor) -> Tensor:
        return wide(weight).unflatten(0, (self.heads, self.head_dim))

    def _check(self, input: Tensor, context: Tensor) -> None:  # noqa: A002
        for name, x in (("an input", input), ("a context", context)):
            if x.ndim < 3 or x.shape[-1] != self.dim:
                raise ValueError(
                    f"ClippedAttention needs {name} of shape (batch, ..., tokens, {self.dim}), got {tuple(x.shape)}; for one "
                    "sequence, unsqueeze(0) adds the batch."
                )
            if self.max_length is not None and x.shape[-2] > self.max_length:
                raise ValueError(
                    f"ClippedAttention got {name} with {x.shape[-2]} tokens, more than its max_length={self.max_length}."
                )

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return (
            f"{self.dim}, heads={self.heads}, head_dim={self.head_dim}, radius={self.radii}, logit_scale={self.start}, "
            f"lipschitz={self.lipschitz}, causal={self.causal}"
        )


def _affine(rows: int, columns: int, *, bias: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
    return nn.Parameter(torch.empty(rows, columns)), nn.Parameter(torch.zeros(rows)) if bias else None


def _log_norm(W: Tensor) -> Tensor:
    """Return the logarithm of the Gram bound of matrices; a zero matrix counts as the smallest normal number."""
    return gram_norm(W).clamp_min(torch.finfo(W.dtype).tiny).log()


def _constant(module: ClippedAttention, weight_sums: list[Real] | None) -> Bound:
    """Bound the module by its stored numbers, a times C."""
    with torch.no_grad():
        output = module.output_matrix()
    scales = module.logit_scale().detach().to(output.dtype).to("cpu", torch.float64)
    if not all(bool(t.isfinite().all()) for t in (output, *module.parameters())):
        raise ValueError("no bound holds for a ClippedAttention with NaN or infinite parameters.")
    R_q, R_k, R_v = module.radii
    query, key, value = (
        W.detach().to("cpu", torch.float64).unflatten(0, (module.heads, module.head_dim))
        for W in (module.query_weight, module.key_weight, module.value_weight)
    )
    heads = [
        attention_head_constant(
            0.0, spectral_norm(K), spectral_norm(V),
            query_radius=R_q, key_radius=R_k, value_radius=R_v, logit_scale=Bound.point(float(s)),
        )
        for K, V, s in zip(key, value, scales, strict=True)
    ]  # fmt: skip
    scaled = (scales[:, None, None] * query).flatten(0, 1)  # each entry rounded once
    rounding = frobenius_norm(scaled) * 2.0**-52 + scaled.numel() * 2.0**-1074
    queries = (spectral_norm(scaled) + rounding) * R_v * R_k
    total = attention_constant(spectral_norm(output), heads, queries=queries, weight_sums=weight_sums)
    return Bound(0.0, total.upper)  # pyright: ignore[reportAttributeAccessIssue] a Bound, since the norm is one


@token_rule.register(ClippedAttention)
def _token(module: ClippedAttention) -> Bound:
    return _constant(module, None)


@lipschitz_rule.register(ClippedAttention)
def _clipped_attention(module: ClippedAttention, norm: str) -> Bound:
    r"""Bound it in l2 by the sums of weights that no mask at call time limits; refuse linf and l1."""
    if norm != "l2":
        raise UncertifiableError(
            f"no {norm} Lipschitz rule is known for ClippedAttention: its balls are Euclidean, so only the norm of whole tokens is "
            "limited. Ask for norm='token_max', or l2."
        )
    if module.causal and module.max_length is None:
        raise UncertifiableError(
            "the l2 Lipschitz constant of causal attention over the whole sequence grows with its length. Give max_length, or ask "
            "for norm='token_max', whose bound holds for every length and for l2 perturbations of the input."
        )
    R_q, R_k, _ = module.radii
    used = module.logit_scale().detach().to(module.query_weight.dtype)
    limits = [Bound.point(float(s)) * R_q * R_k for s in used]
    sums = [attention_weight_sum(B, module.max_length, causal=module.causal) for B in limits]
    return _constant(module, sums)


@uniform_rule.register(ClippedAttention)
def _uniform(module: ClippedAttention, norm: str) -> Bound | None:
    return Bound(0.0, module.lipschitz) if norm == TOKEN_MAX and module.lipschitz is not None else None
