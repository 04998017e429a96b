"""Operations that have a derivative in reverse mode only, or only one."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1.0 - y.square())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1.0 - y.square())


class ReverseOnly(nn.Module):
    """The hyperbolic tangent without a derivative in forward mode."""

    def forward(self, x):
        return _Tanh.apply(x)


class OnceOnly(nn.Module):
    """The hyperbolic tangent with one derivative in reverse mode."""

    def forward(self, x):
        return _Once.apply(x)
