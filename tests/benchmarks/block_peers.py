"""Blocks of ours and of the peers side by side: does the claimed condition hold while training, and what does it cost?

Run ``python -m tests.benchmarks.block_peers residual|sequences [epochs] [seeds] [part of a name]`` with ``OMP_NUM_THREADS=1``.
Peers (deel-torchlip, orthogonium, neural-ssm, torchrecurrent, s5-pytorch) are taken where they are installed. All contenders of a
table get the same data, epochs and batch size; residual blocks the better of two learning rates on a part of the training set,
sequence models one rate for all. Tests are scored once. *Violations* counts the layers, over the steps that are read, whose
constant in the weights of the next training step exceeds what the block claims, *worst* is the largest such constant; *found* is
what :mod:`tests.nn.adversary` finds for the trained model in evaluation: the largest ratio of differences. The gain that
neural-ssm claims is another one, that of an output to its input, both from zero.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from stableopt import nn as stable
from tests.benchmarks.layers import peer
from tests.benchmarks.timing import device_name
from tests.nn.adversary import worst_ratio
from tests.nn.training import digits

WIDTH, DEPTH = 64, 32
TOLERANCE = 1e-5
"""What a constant may exceed its claim by: the rounding of float32 weights."""


@dataclass(frozen=True)
class Contender:
    """A block or a layer for sequences.

    Args:
        name: for the table.
        make: builds the model.
        constants: the constants of its layers that are to be at most 1 for the weights in force; empty if it claims nothing.
        norm: in which the claim is made.
        claim: the constant of the whole model that is claimed; None for none.
    """

    name: str
    make: Callable[[], nn.Module]
    constants: Callable[[nn.Module], list[float]]
    norm: str = "l2"
    claim: Callable[[nn.Module], float] | None = None


# ------------------------------------------------------------------------------------------------------------------ baselines


class ConvexPotential(nn.Module):
    r"""The layer :math:`x - 2\hat s^{-2} A^\top\sigma(Ax+b)` with :math:`\hat s` from power iteration, as its paper trains it.

    One step of power iteration per forward pass while training, a hundred in evaluation (Meunier et al., 2022). A baseline only.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_normal_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(dim), dim=0))

    def squared_norm(self) -> Tensor:
        """The estimate of the squared norm that the next forward pass uses."""
        u = self.u
        for _ in range(1 if self.training else 100):
            with torch.no_grad():
                v = F.normalize(self.weight @ u, dim=0)
                u = F.normalize(self.weight.mT @ v, dim=0)
        if self.training:
            self.u.copy_(u)
        return (self.weight @ u).square().sum()

    def forward(self, x: Tensor) -> Tensor:
        """Take the step."""
        return x - 2.0 / self.squared_norm() * F.relu(F.linear(x, self.weight, self.bias)) @ self.weight


class Plain(nn.Module):
    """The usual residual block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.branch(x)


class Mixed(nn.Module):
    """A residual module of torchlip, which takes the input and the image of its branch."""

    def __init__(self, branch: nn.Module, mix: nn.Module) -> None:
        super().__init__()
        self.branch, self.mix = branch, mix

    def forward(self, x: Tensor) -> Tensor:
        """Mix the input and its image."""
        return self.mix(x, self.branch(x))


def norm_of(weight: Tensor) -> float:
    """The true spectral norm."""
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def convex_potential_constants(model: nn.Module) -> list[float]:
    """The block is nonexpansive for steps up to 2 / ||A||^2, and expands by h ||A||^2 - 1 beyond."""
    found = []
    for block in blocks_of(model, ConvexPotential):
        step = 2.0 / float(block.squared_norm().detach())
        found.append(max(1.0, step * norm_of(block.weight) ** 2 - 1.0))
    return found


def blocks_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """The blocks of one class."""
    return (part for part in model.modules() if isinstance(part, kind))


def branch_constants(model: nn.Module) -> list[float]:
    """The norms of the linear maps of branches that are to be 1, the only thing that can break such a block."""
    maps = [part for path, part in model.named_modules() if isinstance(part, nn.Linear) and "branch" in path]
    maps += [part for path, part in model.named_modules() if isinstance(part, nn.Linear) and ".fn." in path]
    return [norm_of(part.weight) for part in maps]


def proved_constants(
    kind: type[nn.Module] | tuple[type[nn.Module], ...], norm: str
) -> Callable[[nn.Module], list[float]]:
    """The proved constants of our blocks."""
    return lambda model: [stable.lipschitz(block, norm).upper for block in blocks_of(model, kind)]


# ------------------------------------------------------------------------------------------------------------------- residual


def framed(block: Callable[[], nn.Module], norm: str = "l2", depth: int = DEPTH) -> nn.Module:
    """A stack of blocks between two linear layers that are limited to 1 by us, so that contenders differ in their blocks."""
    ends = [
        stable.stabilize(nn.Linear(64, WIDTH), 1.0, norm=norm),
        stable.stabilize(nn.Linear(WIDTH, 10), 1.0, norm=norm),
    ]
    return nn.Sequential(ends[0], *[block() for _ in range(depth)], ends[1])


def residual_contenders() -> list[Contender]:
    """Our residual blocks and the peers' that are installed."""
    one = lambda model: 1.0  # noqa: E731
    branch = lambda: nn.Sequential(stable.stabilize(nn.Linear(WIDTH, WIDTH), 1.0, method="bjorck"), stable.GroupSort(2))  # noqa: E731
    ours = [
        Contender(
            "GradientBlock",
            lambda: framed(lambda: stable.GradientBlock(WIDTH, depth=DEPTH)),
            proved_constants(stable.GradientBlock, "l2"),
            claim=one,
        ),
        Contender(
            "InfNormBlock (linf)",
            lambda: framed(lambda: stable.InfNormBlock(WIDTH, depth=DEPTH), "linf"),
            proved_constants(stable.InfNormBlock, "linf"),
            "linf",
            one,
        ),
        Contender(
            "AveragedResidual",
            lambda: framed(lambda: stable.AveragedResidual(branch(), depth=DEPTH)),
            proved_constants(stable.AveragedResidual, "l2"),
            claim=one,
        ),
        Contender(
            "convex potential layer",
            lambda: framed(lambda: ConvexPotential(WIDTH)),
            convex_potential_constants,
            claim=one,
        ),
        Contender("plain residual", lambda: framed(lambda: Plain(WIDTH)), lambda model: []),
    ]
    if torchlip := peer("deel.torchlip"):
        lip = lambda: Mixed(  # noqa: E731
            nn.Sequential(torchlip.SpectralLinear(WIDTH, WIDTH), torchlip.GroupSort2()), torchlip.LipResidual()
        )
        ours.append(Contender("torchlip LipResidual", lambda: framed(lip), branch_constants, claim=one))
    if (layers := peer("orthogonium.layers")) and (residual := peer("orthogonium.layers.residual")):
        for name in ("AdditiveResidual", "PrescaledAdditiveResidual"):
            make = getattr(residual, name)
            wrapped = lambda make=make: make(nn.Sequential(layers.OrthoLinear(WIDTH, WIDTH), stable.GroupSort(2)))  # noqa: E731
            ours.append(
                Contender(f"orthogonium {name}", lambda wrapped=wrapped: framed(wrapped), branch_constants, claim=one)
            )
    return ours


# ------------------------------------------------------------------------------------------------------------------ sequences

STEPS, MODEL, STATE, GAIN = 64, 32, 32, 64.0


class Read(nn.Module):
    """A peer's model for sequences between two linear maps; the output is the mean over time, as for ours."""

    def __init__(self, body: nn.Module, encoder: nn.Module, head: nn.Module, **options: object) -> None:
        super().__init__()
        self.encoder, self.body, self.head, self.options = encoder, body, head, options

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        found = self.body(self.encoder(x), **self.options)
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


def eigenvalue_moduli(model: nn.Module) -> list[float]:
    """The largest modulus of a multiplier of each layer of S5, which is stable below 1."""
    return [
        float((part.Lambda.detach().real * part.log_step.detach().exp().flatten()).exp().max())
        for part in model.modules()
        if hasattr(part, "Lambda") and hasattr(part, "log_step")
    ]


def memory_of(model: nn.Module) -> list[float]:
    """How much the last output of a cell depends on its first state, which an antisymmetric cell promises to keep at 1."""
    body, width = model.body, MODEL
    x = digits()[0][:1, :, None]
    with torch.no_grad():
        inputs = model.encoder(x)

    def last(h: Tensor) -> Tensor:
        return body(inputs, h.view(1, 1, width))[0][0, -1]

    J = torch.autograd.functional.jacobian(last, torch.zeros(width))
    return [norm_of(torch.as_tensor(J))]


def sequence_contenders() -> list[Contender]:
    """Our gain-certified stack, cells, and the peers' that are installed, with one size of model and of state."""
    gain = lambda model: GAIN / math.sqrt(STEPS)  # noqa: E731 the mean over time divides by the root of the length
    stack = lambda: nn.Sequential(  # noqa: E731
        stable.StateSpaceStack(1, MODEL, STATE, 2, 10, gain=GAIN, step=0.9, radius=(0.9, 0.999)),
        stable.MeanOverTime(STEPS),
    )
    ours = [
        Contender("StateSpaceStack", stack, lambda model: [stable.lipschitz(model).upper / gain(model)], claim=gain),
        Contender(
            "AntisymmetricCell over time",
            lambda: Read(
                stable.Recurrence(stable.AntisymmetricCell(1, MODEL, memory=STEPS)), nn.Identity(), nn.Linear(MODEL, 10)
            ),
            lambda model: [stable.cell_bound(model.body.cell).state.upper],
        ),
        Contender(
            "nn.GRU",
            lambda: Read(nn.GRU(1, MODEL, batch_first=True), nn.Identity(), nn.Linear(MODEL, 10)),
            memory_of,
        ),
    ]
    if neural := peer("neural_ssm"):
        for param, mode in (("l2n", "conv"), ("tv", "scan"), ("lru", "conv")):
            claims = param != "lru"
            options = {"ff": "MBLIP", "gamma": GAIN} if claims else {"ff": "GLU"}
            make = lambda param=param, options=options: neural.DeepSSM(  # noqa: E731
                d_input=1, d_output=10, d_model=MODEL, d_state=STATE, n_layers=2, param=param, **options
            )
            ours.append(
                Contender(
                    f"neural-ssm {param}",
                    lambda make=make, mode=mode: Read(make(), nn.Identity(), nn.Identity(), mode=mode),
                    (lambda model: [float(model.body.certified_gain_bound()) / GAIN]) if claims else (lambda model: []),
                    claim=gain if claims else None,
                )
            )
    if s5 := peer("s5"):
        blocks = lambda: nn.Sequential(*[s5.S5Block(MODEL, STATE, False) for _ in range(2)])  # noqa: E731
        ours.append(
            Contender(
                "s5-pytorch", lambda: Read(blocks(), nn.Linear(1, MODEL), nn.Linear(MODEL, 10)), eigenvalue_moduli
            )
        )
    if recurrent := peer("torchrecurrent"):
        for name in ("AntisymmetricRNN", "GatedAntisymmetricRNN", "coRNN"):
            make = lambda name=name: getattr(recurrent, name)(1, MODEL, batch_first=True)  # noqa: E731
            ours.append(
                Contender(
                    f"torchrecurrent {name}",
                    lambda make=make: Read(make(), nn.Identity(), nn.Linear(MODEL, 10)),
                    memory_of if name != "coRNN" else (lambda model: []),
                )
            )
    return ours


# ----------------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """What one training gave."""

    accuracy: float
    violations: int
    readings: int
    worst: float
    milliseconds: float
    model: nn.Module


def train(
    contender: Contender, lr: float, epochs: int, seed: int, data: tuple[Tensor, ...], loss: nn.Module, watch: int
) -> Run:
    """Train with AdamW and a cosine schedule; read the constants on a copy every ``watch`` steps, 0 for never."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = data
    model = contender.make().train()
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    constants: list[float] = []
    seconds, steps = 0.0, 0
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64 if x.ndim > 2 else 128):
            start = time.perf_counter()
            opt.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            opt.step()
            seconds, steps = seconds + time.perf_counter() - start, steps + 1
            if watch and steps % watch == 0:
                constants += contender.constants(twin_of(contender, model))
        schedule.step()
    with torch.no_grad():
        accuracy = float((model.eval()(x_test).argmax(1) == y_test).double().mean())
    above = [c for c in constants if not c <= 1.0 + TOLERANCE]
    worst = max((math.inf if math.isnan(c) else c for c in constants), default=math.nan)
    return Run(accuracy, len(above), len(constants), worst, 1e3 * seconds / steps, model)


def twin_of(contender: Contender, model: nn.Module) -> nn.Module:
    """A copy of a model in its mode; some peers keep tensors with a graph, which cannot be copied."""
    state = torch.random.get_rng_state()
    twin = contender.make().train(model.training)
    torch.random.set_rng_state(state)
    twin.load_state_dict(model.state_dict())
    return twin


def best_lr(
    contender: Contender, epochs: int, data: tuple[Tensor, ...], loss: nn.Module, rates: tuple[float, ...]
) -> float:
    """The learning rate that is best on every fifth training image."""
    if len(rates) == 1:
        return rates[0]
    x, y = data[:2]
    held = torch.arange(len(x)) % 5 == 4
    inner = (x[~held], y[~held], x[held], y[held])
    return max(rates, key=lambda lr: train(contender, lr, epochs, 100, inner, loss, 0).accuracy)


def found_constant(contender: Contender, model: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest constant that the adversary finds in float64, with the weights that the model has in evaluation."""
    twin = twin_of(contender, model).eval()
    for part in twin.modules():
        if P.is_parametrized(part, "weight") and type(part).__module__ != "stableopt.nn.parametrized":
            P.remove_parametrizations(part, "weight")  # those of a peer need not run in float64
    twin = twin._apply(
        lambda t: (
            t.to(torch.complex128 if t.is_complex() else torch.float64)
            if t.dtype.is_floating_point or t.is_complex()
            else t
        )
    )
    return max(worst_ratio(twin, shape, contender.norm, scale=scale, starts=8, steps=40) for scale in (0.1, 1.0))


def compare(
    contenders: list[Contender],
    data: tuple[Tensor, ...],
    epochs: int,
    seeds: int,
    loss: nn.Module,
    rates: tuple[float, ...],
    watch: int,
) -> None:
    """Train each contender and print its row."""
    print(
        f"{'contender':<36s} {'accuracy':>20s} {'violations':>14s} {'worst':>9s} {'claim':>9s} {'found':>9s} {'ms/step':>8s}  lr"
    )
    for contender in contenders:
        try:
            lr = best_lr(contender, epochs, data, loss, rates)
            runs = [train(contender, lr, epochs, seed, data, loss, watch) for seed in range(seeds)]
            claim = contender.claim(runs[0].model) if contender.claim else math.inf
            found = found_constant(contender, runs[0].model, tuple(data[0].shape[1:]))
        except Exception as error:
            print(
                f"{contender.name:<36s} {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}", flush=True
            )
            continue
        accuracies = " ".join(f"{run.accuracy:.3f}" for run in runs)
        violations = f"{sum(run.violations for run in runs)}/{sum(run.readings for run in runs)}"
        worst = max(run.worst for run in runs)
        print(
            f"{contender.name:<36s} {accuracies:>20s} {violations:>14s} {worst:9.4g} {claim:9.4g} {found:9.4g} "
            f"{min(run.milliseconds for run in runs):8.2f}  {lr:g}",
            flush=True,
        )


def main(table: str = "residual", epochs: int = 10, seeds: int = 2, part: str = "") -> None:
    """Print one table, or the rows whose names contain a text."""
    warnings.filterwarnings("ignore")
    print(f"{device_name()}, {epochs} epochs")
    torch.set_default_dtype(torch.float32)
    if table == "residual":
        print(f"digits, {DEPTH} blocks of width {WIDTH}")
        loss = stable.MarginCrossEntropy(16.0, 0.4)
        compare(
            [c for c in residual_contenders() if part in c.name], digits(), epochs, seeds, loss, (1e-3, 1e-2), watch=4
        )
        return
    if table == "sequences":
        print(f"digits, {STEPS} single pixels, models of {MODEL} with {STATE} states")
        x, y, x_test, y_test = digits()
        data = (x[..., None], y, x_test[..., None], y_test)
        compare(
            [c for c in sequence_contenders() if part in c.name],
            data,
            epochs,
            seeds,
            nn.CrossEntropyLoss(),
            (5e-3,),
            watch=20,
        )
        return
    raise SystemExit(f"there is no table {table!r}; the tables are residual and sequences.")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments[0] if arguments else "residual", *map(int, arguments[1:3]), *arguments[3:4])
