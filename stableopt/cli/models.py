"""The models of the command line, built from layers that have a Lipschitz rule, and the recipe that trains each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from stableopt.cli.data import Dataset
from stableopt.nn import GradientBlock, GroupSort, stabilize

__all__ = ["RECIPES", "Recipe", "build_model", "prepare"]


@dataclass(frozen=True)
class Recipe:
    """The settings that train a model well on small images in seconds.

    Args:
        epochs: passes over the training set.
        lr: learning rate of the first epoch for each optimizer by name; it falls to zero along a cosine.
        batch_size: inputs per step.
        temperature: of :class:`stableopt.nn.MarginCrossEntropy`, in units of 1 / logit.
        offset: the margin that the loss asks for, in units of the logits.

    Examples:
        >>> RECIPES["mlp"].batch_size
        128
    """

    epochs: int
    lr: dict[str, float]
    batch_size: int
    temperature: float
    offset: float


RECIPES = {
    "mlp": Recipe(epochs=80, lr={"sgd": 0.1, "adamw": 3e-3}, batch_size=128, temperature=16.0, offset=0.4),
    "resnet": Recipe(epochs=80, lr={"sgd": 0.1, "adamw": 5e-3}, batch_size=128, temperature=16.0, offset=0.4),
    "cnn": Recipe(epochs=80, lr={"sgd": 0.1, "adamw": 1e-2}, batch_size=128, temperature=16.0, offset=0.4),
}


def prepare(model: str, data: Dataset) -> Dataset:
    """Return the data in the shape that the model takes: images for the cnn, vectors for the others.

    Raises:
        ValueError: if the model is unknown, or flat inputs are no square images.

    Examples:
        >>> from stableopt.cli.data import load_data
        >>> prepare("cnn", load_data("digits")).shape
        (1, 8, 8)
    """
    if model not in RECIPES:
        raise ValueError(f"unknown model '{model}': choose one of {', '.join(RECIPES)}.")
    return data.as_images() if model == "cnn" else data.as_vectors()


def build_model(model: str, shape: tuple[int, ...], classes: int, lipschitz: float) -> nn.Sequential:
    """Build a model whose layers are wrapped so that its Lipschitz constant stays at most ``lipschitz``.

    Args:
        model: ``"mlp"`` (three dense layers with GroupSort), ``"resnet"`` (eight residual blocks that respect their step
            limit) or ``"cnn"`` (two convolutions and two dense layers).
        shape: the shape of one input.
        classes: the number of logits.
        lipschitz: the limit, in output units per input unit, both in the Euclidean norm.

    Returns:
        The model in float32.

    Raises:
        ValueError: if the model is unknown.

    Examples:
        >>> model = build_model("mlp", (64,), 10, lipschitz=1.0)
        >>> model(__import__("torch").zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    if model not in RECIPES:
        raise ValueError(f"unknown model '{model}': choose one of {', '.join(RECIPES)}.")
    features = math.prod(shape)
    if model == "mlp":
        net = nn.Sequential(
            nn.Linear(features, 128), GroupSort(2), nn.Linear(128, 128), GroupSort(2), nn.Linear(128, classes)
        )
    elif model == "resnet":
        blocks = [GradientBlock(64, depth=8) for _ in range(8)]
        net = nn.Sequential(nn.Linear(features, 64), *blocks, nn.Linear(64, classes))
    else:
        net = _cnn(shape, classes)
    # the smooth bound acts on all large singular values: under a tight limit it learns more than an estimate of one
    stabilize(net.float(), lipschitz=lipschitz, method="gram")
    return net


def _cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        GroupSort(2),
        nn.Conv2d(8, 8, 3, padding=1),
        GroupSort(2),
        nn.Flatten(),
        nn.Linear(8 * height * width, 128),
        GroupSort(2),
        nn.Linear(128, classes),
    )
