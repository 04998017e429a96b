"""A short training on scikit-learn's digits, for the slow tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from stableopt.nn import MarginCrossEntropy


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs in [0, 1] and labels, for training and (every fifth image) for testing."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    test = np.arange(len(x)) % 5 == 4
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return inputs[~test], labels[~test], inputs[test], labels[test]


def train(model: nn.Module, temperature: float, offset: float, *, lr: float, epochs: int) -> torch.Tensor:
    """Train with AdamW and a cosine schedule; return the margins on the test set, negative where the class is wrong."""
    x, y, x_test, y_test = digits()
    loss = MarginCrossEntropy(temperature, offset)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            opt.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            opt.step()
        schedule.step()
    with torch.no_grad():
        z = model.eval()(x_test)
    own = z.gather(1, y_test[:, None]).squeeze(1)
    others = z.scatter(1, y_test[:, None], -torch.inf).amax(1)
    return own - others
