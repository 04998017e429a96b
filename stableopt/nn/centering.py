r"""Normalisation that keeps a Lipschitz constant: fixed statistics of the data, centering, projection onto a ball."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stableopt.errors import UncertifiableError
from stableopt.linalg import Bound
from stableopt.nn.activations import at_least_float32, channel_dim, channelwise
from stableopt.nn.dispatch import TOKEN_MAX, lipschitz_rule
from stableopt.nn.pooling import largest_entry
from stableopt.nn.precision import full_precision
from stableopt.nn.tokens import known_for_tokens, token_rule
from stableopt.nn.uniform import uniform_rule

__all__ = ["BallProjection", "BatchCentering", "InputNormalization", "LayerCentering", "into_ball"]


class InputNormalization(nn.Module):
    r"""Subtract the mean and divide by the standard deviation of the data, as a layer that a bound counts.

    .. math:: x_c \mapsto (x_c - \mu_c) / \sigma_c

    The map is affine with a diagonal matrix, so its constant is exactly :math:`1/\min_c \sigma_c` in l2, linf and l1 (not one over
    the largest: with different :math:`\sigma_c` that is too small). With this layer in front, the constant of the model and every
    radius are in the units of the raw input, for example of pixels in [0, 1].

    Args:
        mean: :math:`\mu`, one number or one per channel.
        std: :math:`\sigma > 0`, one number or one per channel.

    Raises:
        ValueError: if a number is not finite, a deviation is not positive, or the numbers of channels differ; in ``forward``, if
            the input has another number of channels.

    Note:
        Both are buffers: saved with the model, moved and cast with it, not trained. The bound is for the numbers stored now.

    References:
        Leino, Wang and Fredrikson, *Globally-Robust Neural Networks*, 2021 (radii in input units).

    Examples:
        >>> layer = InputNormalization(mean=[0.5, 0.0], std=[0.25, 2.0])
        >>> layer(torch.tensor([[1.0, 1.0]])).tolist()
        [[2.0, 0.5]]
        >>> lipschitz_rule(layer, "l2").upper
        4.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        super().__init__()
        center, spread = _numbers(mean), _numbers(std)
        if center.ndim > 1 or spread.ndim > 1 or (center.ndim and spread.ndim and len(center) != len(spread)):
            raise ValueError(
                f"mean and std must be single numbers or one per channel, "
                f"got shapes {tuple(center.shape)} and {tuple(spread.shape)}."
            )
        if not bool(center.isfinite().all()):
            raise ValueError(f"mean must be finite, got {center.tolist()}.")
        if not center.numel() or not spread.numel() or not bool((spread.isfinite() & (spread > 0)).all()):
            raise ValueError(
                f"std must be positive and finite, got {spread.tolist()}. A constant channel has no scale: drop it."
            )
        shape = torch.broadcast_shapes(center.shape, spread.shape)
        self.register_buffer("mean", center.expand(shape).clone())
        self.register_buffer("std", spread.expand(shape).clone())

    @classmethod
    def from_data(cls, data: Tensor) -> InputNormalization:
        """Build the layer from the mean and the standard deviation of each channel of ``data``, shape ``(N, C, ...)``.

        Raises:
            ValueError: if the data has fewer than two dimensions, or a channel is constant or not finite.

        Examples:
            >>> InputNormalization.from_data(torch.tensor([[0.0, 1.0], [2.0, 5.0]])).std.tolist()
            [1.0, 2.0]
        """
        if data.ndim < 2:
            raise ValueError(f"data must have the shape (N, C, ...), got {tuple(data.shape)}.")
        channels = data.detach().double().movedim(1, 0).flatten(1)
        dtype = torch.get_default_dtype()
        return cls(channels.mean(1).to(dtype), channels.std(1, correction=0).to(dtype))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the normalised input."""
        if self.mean.ndim == 0:
            return _as_input((input - self.mean) / self.std, input)
        channel_dim(input, len(self.mean), "InputNormalization")
        return _as_input((input - channelwise(self.mean, input)) / channelwise(self.std, input), input)

    def extra_repr(self) -> str:
        """Return the number of channels for printing."""
        return f"{self.mean.numel()}"


class LayerCentering(nn.Module):
    r"""Subtract the mean over the last dimensions; no division by a variance.

    .. math:: x \mapsto x - \tfrac1n \mathbf 1 \mathbf 1^\top x + b

    :math:`I - \mathbf 1\mathbf 1^\top/n` is an orthogonal projection: the l2 constant is exactly 1 (0 for :math:`n = 1`). Each row
    and each column has the absolute sum :math:`2 - 2/n`, which is the linf and the l1 constant. It is the part of
    :class:`torch.nn.LayerNorm` that has a useful bound: dividing by the deviation has slopes up to :math:`1/\sqrt\varepsilon`.

    Args:
        normalized_shape: sizes of the last dimensions, :math:`n` entries in all.
        bias: whether to add a learned :math:`b` of that shape, at first 0.

    Raises:
        ValueError: if a size is no integer of at least 1; in ``forward``, if the last dimensions of the input differ.

    References:
        Qi et al., *LipsFormer: Introducing Lipschitz Continuity to Vision Transformers*, 2023 (CenterNorm).

    Examples:
        >>> LayerCentering(2, bias=False)(torch.tensor([[1.0, 3.0]]))
        tensor([[-1., 1.]])
    """

    bias: nn.Parameter | None

    def __init__(self, normalized_shape: int | tuple[int, ...], *, bias: bool = True) -> None:
        super().__init__()
        shape = tuple(normalized_shape) if isinstance(normalized_shape, tuple | list) else (normalized_shape,)
        if not shape or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in shape):
            raise ValueError(f"normalized_shape must be integers >= 1, got {normalized_shape!r}.")
        self.normalized_shape = shape
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the centered input."""
        if tuple(input.shape[-len(self.normalized_shape) :]) != self.normalized_shape:
            raise ValueError(f"LayerCentering{self.normalized_shape} got an input of shape {tuple(input.shape)}.")
        centered = input - input.mean(tuple(range(-len(self.normalized_shape), 0)), keepdim=True)
        return centered if self.bias is None else _as_input(centered + self.bias, input)

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{self.normalized_shape}, bias={self.bias is not None}"


class BatchCentering(nn.Module):
    r"""Subtract the mean of each channel: that of the batch in training, a running one in evaluation.

    .. math:: x_c \mapsto x_c - \mu_c + b_c

    In evaluation :math:`\mu` is fixed, the map is a translation, and its constant is exactly 1 in l2, linf and l1. It is
    :class:`torch.nn.BatchNorm2d` without the division, for inputs with any number of spatial axes.

    Args:
        num_features: number of channels.
        momentum: weight of the newest batch in the running mean, in (0, 1].
        bias: whether to add a learned :math:`b`, at first 0.

    Raises:
        ValueError: if an argument is out of range; in ``forward``, if the input has another number of channels
            or no batch dimension.

    Note:
        In training an output depends on the whole batch, so no statement about single inputs is made then; the bound is that of
        evaluation.

    References:
        Ioffe and Szegedy, *Batch Normalization*, 2015 (the running statistics).

    Examples:
        >>> layer = BatchCentering(1, momentum=1.0)
        >>> layer(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-1.0, 1.0]
        >>> layer.eval()(torch.tensor([[5.0]])).tolist()
        [[3.0]]
    """

    running_mean: Tensor
    bias: nn.Parameter | None

    def __init__(self, num_features: int, *, momentum: float = 0.1, bias: bool = True) -> None:
        super().__init__()
        if not isinstance(num_features, int) or isinstance(num_features, bool) or num_features < 1:
            raise ValueError(f"num_features must be an integer >= 1, got {num_features!r}.")
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum!r}.")
        self.momentum = float(momentum)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the centered input; in training the running mean moves towards that of the batch."""
        if input.ndim < 2:
            raise ValueError(f"BatchCentering needs an input of shape (N, C, ...), got {tuple(input.shape)}.")
        channel_dim(input, len(self.running_mean), "BatchCentering")
        mean = self.running_mean
        if self.training:
            if not input.numel():
                raise ValueError(
                    f"BatchCentering cannot take the mean of an empty batch in training, got shape {tuple(input.shape)}; leave "
                    "such batches out."
                )
            mean = input.mean([0, *range(2, input.ndim)])
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        shift = mean if self.bias is None else mean - self.bias
        return _as_input(input - channelwise(shift, input), input)

    def reset_parameters(self) -> None:
        """Set the bias and the running mean to 0."""
        self.running_mean.zero_()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the arguments for printing."""
        return f"{len(self.running_mean)}, momentum={self.momentum}, bias={self.bias is not None}"


class BallProjection(nn.Module):
    r"""Project each sample onto the Euclidean ball of a radius.

    .. math:: x \mapsto x / \max(1, \|x\|_2 / R)

    A projection onto a convex set is firmly nonexpansive: the l2 constant is exactly 1, attained inside the ball. In linf and l1
    the constant grows with the dimension, and the rule refuses.

    Args:
        radius: :math:`R > 0`, in units of the input.

    Raises:
        ValueError: if ``radius`` is not positive and finite; in ``forward``, if the input has no batch dimension.

    Note:
        The norm is over all dimensions but the first. Half precision is computed in float32.

    References:
        Moreau, *Proximité et dualité dans un espace hilbertien*, 1965.

    Examples:
        >>> BallProjection(5.0)(torch.tensor([[6.0, 8.0], [0.0, 1.0]]))
        tensor([[3., 4.], [0., 1.]])
    """

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < radius < math.inf:
            raise ValueError(f"radius must be positive and finite, got {radius!r}.")
        self.radius = float(radius)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name torch uses
        """Return the nearest point of the ball to each sample."""
        if input.ndim < 2:
            raise ValueError(f"BallProjection needs an input of shape (N, ...), got {tuple(input.shape)}.")
        return into_ball(input, self.radius, tuple(range(1, input.ndim)))

    def extra_repr(self) -> str:
        """Return the argument for printing."""
        return f"radius={self.radius}"


def into_ball(input: Tensor, radius: float, dims: tuple[int, ...]) -> Tensor:  # noqa: A002
    r"""Project onto the Euclidean ball of a radius, over some dimensions; in at least float32, returned in the dtype of the input.

    Examples:
        >>> into_ball(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 2.5, (1,))
        tensor([[1.5000, 2.0000],
                [0.0000, 1.0000]])
    """
    with full_precision(input):
        x = at_least_float32(input)
        size = largest_entry(x, dims)  # so that no square over- or underflows
        unit = x / size
        norm = torch.linalg.vector_norm(unit, dim=dims, keepdim=True)  # at least 1, or 0 where all entries are zero
        scale = radius / norm.clamp_min(1.0)
        return torch.where(size * norm <= radius, x, unit * scale).to(input.dtype)


def _as_input(output: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return the output in the dtype of a floating-point input, as the layers of torch do, whatever that of the buffers is."""
    return output.to(input.dtype) if input.is_floating_point() else output


def _numbers(values: float | Sequence[float] | Tensor) -> Tensor:
    tensor = values.detach() if isinstance(values, Tensor) else torch.tensor(values)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


@lipschitz_rule.register(InputNormalization)
def _input_normalization(module: InputNormalization, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    smallest = float(module.std.min())
    if not (smallest > 0 and bool(module.std.isfinite().all()) and bool(module.mean.isfinite().all())):
        raise ValueError(
            f"no bound holds for an InputNormalization with deviations from {smallest} or with NaN or infinite numbers; a cast to "
            "a narrower dtype can do this."
        )
    return Bound.point(1.0) / smallest


@lipschitz_rule.register(LayerCentering)
def _layer_centering(module: LayerCentering, norm: str) -> Bound:
    n = math.prod(module.normalized_shape)
    _finite(module.bias, "LayerCentering")
    if n == 1:
        return Bound.point(0.0)
    return Bound.point(1.0) if norm == "l2" else Bound.point(2 * (n - 1)) / n


@lipschitz_rule.register(BatchCentering)
def _batch_centering(module: BatchCentering, norm: str) -> Bound:  # noqa: ARG001 the same in every norm
    _finite(module.running_mean, "BatchCentering")
    _finite(module.bias, "BatchCentering")
    return Bound.point(1.0)


@lipschitz_rule.register(BallProjection)
def _ball_projection(module: BallProjection, norm: str) -> Bound:  # noqa: ARG001 the same for every radius
    if norm == "l2":
        return Bound.point(1.0)
    raise UncertifiableError(
        f"the {norm} Lipschitz constant of a projection onto a Euclidean ball grows with the dimension; a bound is known in l2."
    )


def _finite(values: Tensor | None, name: str) -> None:
    if values is not None and not bool(values.isfinite().all()):
        raise ValueError(f"no bound holds for a {name} with NaN or infinite numbers.")


@token_rule.register(LayerCentering)
def _layer_centering_token(module: LayerCentering) -> Bound:
    if len(module.normalized_shape) > 1:
        raise UncertifiableError(
            f"LayerCentering({module.normalized_shape}) averages over tokens, for which no token_max bound is known; center the "
            "last dimension alone."
        )
    return _layer_centering(module, "l2")


@uniform_rule.register(LayerCentering)
@uniform_rule.register(BatchCentering)
def _centering_uniform(module: LayerCentering | BatchCentering, norm: str) -> Bound | None:
    """Return the constant itself: a bias only translates."""
    if norm != TOKEN_MAX:
        return lipschitz_rule(module, norm)
    return token_rule(module) if known_for_tokens(module) else None
