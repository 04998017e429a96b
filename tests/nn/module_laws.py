"""The laws of every module with a Lipschitz constant, for the tests of activations, pooling, structure and heads."""

from __future__ import annotations

import copy
import io
import math
import warnings

import torch
from torch import Tensor, nn

from stableopt.nn import lipschitz_rule
from tests.nn.catalogue import jacobian

EPS = torch.finfo(torch.float64).eps
NORMS = ("l2", "linf", "l1")
ORDER = {"l2": 2, "linf": math.inf, "l1": 1}


def constant(module: nn.Module, norm: str) -> float:
    """The proved upper end in evaluation mode."""
    mode = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            bound = lipschitz_rule(module, norm)
    finally:
        for part, training in mode:
            part.training = training
    assert bound.proved
    assert 0.0 <= bound.lower <= bound.upper < math.inf
    return bound.upper


def matrix_norm(J: Tensor, norm: str) -> float:
    """The oracle: largest singular value, row sum or column sum."""
    return float(torch.linalg.matrix_norm(J, ORDER[norm]))


def check_pairs(module: nn.Module, shape: tuple[int, ...], norm: str) -> None:
    """No pair of inputs is spread by more than the constant."""
    L, p = constant(module, norm), ORDER[norm]
    for scale in (1e-3, 1.0, 30.0):
        for distance in (1e-3, 1.0, 10.0):
            x = scale * torch.randn(32, *shape)
            y = x + distance * torch.randn_like(x) * (torch.rand_like(x) < 0.5)
            with torch.no_grad():
                fx, fy = (module(v).flatten(1) for v in (x, y))
            spread = torch.linalg.vector_norm(fx - fy, p, dim=1)
            gap = torch.linalg.vector_norm((x - y).flatten(1), p, dim=1)
            size = fx.abs().sum(1) + fy.abs().sum(1) + x.flatten(1).abs().sum(1) + y.flatten(1).abs().sum(1) + 1
            assert (spread <= L * gap + 64 * EPS * size).all()


def check_jacobians(module: nn.Module, shape: tuple[int, ...], norm: str) -> None:
    """No Jacobian is larger than the constant."""
    L = constant(module, norm)
    for scale in (0.3, 3.0):
        for _ in range(3):
            J = jacobian(module, scale * torch.randn(1, *shape))
            assert matrix_norm(J, norm) <= L * (1 + 64 * EPS * max(J.shape))


def attained(module: nn.Module, x: Tensor, norm: str) -> float:
    """How much of the constant the Jacobian at ``x`` uses; a bound that is attained gives 1 there."""
    return matrix_norm(jacobian(module, x), norm) / constant(module, norm)


def check_copies(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Copies, a saved state, a compiled and a functional call compute the same."""
    x = torch.randn(3, *shape)
    module.eval()
    expected = module(x)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    for y in (
        copy.deepcopy(module)(x),
        twin(x),
        torch.func.functional_call(module, state, (x,)),
        torch.compile(module, backend="eager", fullgraph=True)(x),
    ):
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    module.train()
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x), rtol=0, atol=0)
    module.eval()
    assert str(module).startswith(type(module).__name__ + "(")


def check_devices_and_dtypes(module: nn.Module, shape: tuple[int, ...]) -> None:
    """The meta device keeps shapes; every float type keeps its dtype, and the bound of the cast numbers holds."""
    module.eval()
    x = torch.randn(16, *shape)
    y = x + torch.randn_like(x)
    meta = copy.deepcopy(module).to("meta")
    assert meta(x.to("meta")).shape == module(x).shape
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cast = copy.deepcopy(module).to(dtype)
        with torch.no_grad():
            fx, fy = cast(x.to(dtype)), cast(y.to(dtype))
        assert fx.dtype == dtype
        u = torch.finfo(dtype).eps
        gap = (x.to(dtype).double() - y.to(dtype).double()).flatten(1)
        spread = (fx.double() - fy.double()).flatten(1)
        L = constant(cast, "l2")
        size = x.flatten(1).norm(dim=1) + y.flatten(1).norm(dim=1) + 1
        assert (spread.norm(dim=1) <= L * gap.norm(dim=1) * (1 + 8 * u) + 16 * u * (1 + L) * size).all()


def check_gradients(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Autograd agrees with differences, no parameter is dead, and torch.func sees the same derivative."""
    module.train()
    x = 1.5 * torch.randn(64, *shape)
    x.requires_grad_()
    weight = torch.randn_like(module(x))
    (module(x) * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert bool((parameter.grad != 0).all()), name
    module.eval()
    point = torch.randn(1, *shape)
    assert torch.autograd.gradcheck(module, point.requires_grad_(), eps=1e-7, atol=1e-5)
    tangent = torch.randn_like(point)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its own decompositions on first use
        _, forward = torch.func.jvp(module, (point,), (tangent,))
    expected = jacobian(module, point.detach()) @ tangent.flatten()
    torch.testing.assert_close(forward.flatten(), expected)


def keeps_gradient_norms(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether every Jacobian is orthogonal at generic points."""
    J = jacobian(module, 2 * torch.randn(1, *shape))
    return J.shape[0] == J.shape[1] and bool(torch.allclose(J @ J.mT, torch.eye(len(J)), rtol=0, atol=1e-13))
