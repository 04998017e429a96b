"""Constraints beside the peers: agreement, wrong operators reproduced, infeasible results counted exactly, and time.

Run ``python -m tests.benchmarks.constraints [agreement] [audit] [feasible] [matrices] [speed]`` (all without arguments). The peers
(optax, jaxopt, pyproximal, proxtorch, prox_tv, scikit-learn) are taken where they are installed and named where they are not.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType

import mpmath
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stableopt import constraints as C
from tests.benchmarks.timing import device_name, medians, report

COUNT = 1_000_000
SIZE = 10


def peer(name: str) -> ModuleType | None:
    """Return a peer's module, or None and a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"  ({name} is not installed: left out)")
        return None


# Agreement -----------------------------------------------------------------------------------------------------------------


def agreements() -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray], Callable[[Tensor], Tensor]]]:
    """Yield a name, the peer's operator and ours."""
    if (jax := peer("jax")) is not None:
        jax.config.update("jax_enable_x64", True)
    if jax is not None and (optax := peer("optax.projections")) is not None:
        as_array = jax.numpy.asarray
        yield "optax l1_ball", lambda x: optax.projection_l1_ball(as_array(x), 1.7), C.L1Ball(1.7).project
        yield "optax l2_ball", lambda x: optax.projection_l2_ball(as_array(x), 1.7), C.L2Ball(1.7).project
        yield "optax linf_ball", lambda x: optax.projection_linf_ball(as_array(x), 0.7), C.LinfBall(0.7).project
        yield "optax simplex", lambda x: optax.projection_simplex(as_array(x), 1.5), C.Simplex(1.5).project
        yield "optax box", lambda x: optax.projection_box(as_array(x), -0.5, 0.7), C.Box(-0.5, 0.7).project
        yield "optax non_negative", lambda x: optax.projection_non_negative(as_array(x)), C.NonNegative().project
        yield "optax l2_sphere", lambda x: optax.projection_l2_sphere(as_array(x), 1.3), C.Sphere(1.3).project
        normal = np.linspace(-1.0, 2.0, SIZE)
        half = C.HalfSpace(tuple(normal), 0.3)
        yield "optax halfspace", lambda x: optax.projection_halfspace(as_array(x), normal, 0.3), half.project
        plane = C.Hyperplane(tuple(normal), 0.3)
        yield "optax hyperplane", lambda x: optax.projection_hyperplane(as_array(x), normal, 0.3), plane.project
    if jax is not None and (jaxopt := peer("jaxopt")) is not None:
        as_array = jax.numpy.asarray
        P, R = jaxopt.projection, jaxopt.prox
        yield "jaxopt l1_ball", lambda x: P.projection_l1_ball(as_array(x), 1.7), C.L1Ball(1.7).project
        yield "jaxopt simplex", lambda x: P.projection_simplex(as_array(x), 1.5), C.Simplex(1.5).project
        yield (
            "jaxopt box_section",
            lambda x: P.projection_box_section(as_array(x), (np.zeros(SIZE), np.full(SIZE, 0.4), np.ones(SIZE), 1.5)),
            C.CappedSimplex(1.5, 0.4).project,
        )
        yield "jaxopt lasso", lambda x: R.prox_lasso(as_array(x), 0.3, 0.7), lambda x: C.L1(0.3).prox(x, 0.7)
        yield (
            "jaxopt elastic_net",
            lambda x: R.prox_elastic_net(as_array(x), (0.3, 2.0), 0.7),
            lambda x: C.ElasticNet(0.3, 0.6).prox(x, 0.7),
        )
        yield "jaxopt ridge", lambda x: R.prox_ridge(as_array(x), 0.3, 0.7), lambda x: C.L2Squared(0.3).prox(x, 0.7)
        yield (
            "jaxopt group_lasso",
            lambda x: R.prox_group_lasso(as_array(x), 0.3, 0.7),
            lambda x: C.L2(0.3).prox(x, 0.7),
        )
    if (pyproximal := peer("pyproximal")) is not None:
        yield "pyproximal L1", lambda x: pyproximal.L1(0.3).prox(x, 0.7), lambda x: C.L1(0.3).prox(x, 0.7)
        yield "pyproximal Euclidean", lambda x: pyproximal.Euclidean(0.3).prox(x, 0.7), lambda x: C.L2(0.3).prox(x, 0.7)
        yield (
            "pyproximal L2 squared",
            lambda x: pyproximal.L2(sigma=0.3).prox(x, 0.7),
            lambda x: C.L2Squared(0.3).prox(x, 0.7),
        )
        yield (
            "pyproximal SCAD",
            lambda x: pyproximal.SCAD(0.5, 3.7).prox(x, 1.0),
            lambda x: C.SCAD(0.5, 3.7).prox(x, 1.0),
        )
        yield (
            "pyproximal EuclideanBall",
            lambda x: pyproximal.EuclideanBall(0.0, 1.7).prox(x, 1.0),
            C.L2Ball(1.7).project,
        )
    if (prox_tv := peer("prox_tv")) is not None:
        yield "prox_tv tv1_1d", lambda x: prox_tv.tv1_1d(x, 0.4), C.TV1D(0.4).prox
    if (sklearn := peer("sklearn.isotonic")) is not None:
        yield "scikit-learn isotonic_regression", sklearn.isotonic_regression, C.Monotone().project


def agreement() -> None:
    """Print the largest difference to each peer over 200 random vectors."""
    print(f"\nAgreement in float64, {SIZE} entries, 200 vectors: largest absolute difference")
    rng = np.random.default_rng(0)
    points = [rng.normal(size=SIZE) * s for s in (0.3, 1.0, 10.0, 1.0) for _ in range(50)]
    for name, theirs, ours in agreements():
        difference = max(
            float(np.abs(np.asarray(theirs(x.copy())) - ours(torch.from_numpy(x.copy())).numpy()).max()) for x in points
        )
        print(f"  {name:<36s} {difference:.1e}")


# Audit of the peers -----------------------------------------------------------------------------------------------------------


def firmness(prox: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> float:
    """Return by how much firm nonexpansiveness, |Px-Py|^2 <= <Px-Py, x-y>, is violated over 2000 random pairs."""
    rng = np.random.default_rng(1)
    worst = -math.inf
    for _ in range(2000):
        x, y = rng.normal(size=(2, *shape)) * rng.choice([0.5, 2.0, 5.0])
        p, q = np.asarray(prox(x.copy())), np.asarray(prox(y.copy()))
        worst = max(worst, float(((p - q) ** 2).sum() - ((p - q) * (x - y)).sum()))
    return worst


def through_torch(prox: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a torch operator as one of numpy."""
    return lambda x: prox(torch.from_numpy(x)).detach().numpy()


def audit() -> None:
    """Print firm nonexpansiveness of the peers' operators that are known to be wrong, beside ours."""
    print("\nViolation of firm nonexpansiveness over 2000 random pairs (0 up to rounding is right)")
    rows: list[tuple[str, Callable[[np.ndarray], np.ndarray], tuple[int, ...]]] = []
    if (pyproximal := peer("pyproximal")) is not None:
        rows.append(("pyproximal Huber(alpha=1)", lambda x: pyproximal.Huber(alpha=1.0).prox(x, 0.7), (1,)))
        print(
            f"  pyproximal Huber(alpha=1).prox(1.2, 0.7) = {float(pyproximal.Huber(alpha=1.0).prox(np.array([1.2]), 0.7)[0]):.5f}"
        )
        truth = float(C.Huber(1.0, 1.0).prox(torch.tensor([1.2], dtype=torch.float64), 0.7))
        print(f"  ours and the minimizer                  = {truth:.5f}")
    if peer("proxtorch") is not None:
        operators = importlib.import_module("proxtorch.operators")
        for name, make in (
            ("Huber", lambda: operators.Huber(1.0)),
            ("FusedLasso", lambda: operators.FusedLasso(1.0)),
        ):
            try:
                operator = make()
            except (TypeError, AttributeError) as error:
                print(f"  proxtorch {name}: {error}")
                continue
            rows.append(
                (
                    f"proxtorch {name}",
                    through_torch(lambda t, f=operator: f.prox(t, 0.7)),
                    (1,) if name == "Huber" else (6,),
                )
            )
        x = torch.tensor([3.0, -0.2, 0.1])
        before = x.clone()
        operators.Huber(1.0).prox(x, 0.7)
        print(f"  proxtorch Huber changes its input: {not torch.equal(x, before)}")
    rows += [
        ("ours Huber", through_torch(lambda t: C.Huber(1.0, 1.0).prox(t, 0.7)), (1,)),
        ("ours FusedLasso", through_torch(lambda t: C.FusedLasso(1.0, 1.0).prox(t, 0.7)), (6,)),
        ("ours NuclearBall", through_torch(C.NuclearBall(1.0).project), (3, 4)),
    ]
    for name, prox, shape in rows:
        print(f"  {name:<30s} {max(firmness(prox, shape), 0.0):.1e}")
    audit_sets()
    if peer("jaxopt") is not None:
        import jax
        import jaxopt

        gradient = jax.grad(lambda x: jaxopt.prox.prox_group_lasso(x, 1.0).sum())(jax.numpy.zeros(3))
        leaf = torch.zeros(3, requires_grad=True)
        (ours,) = torch.autograd.grad(C.L2(1.0).prox(leaf).sum(), leaf)
        print(f"  gradient of the group lasso at 0: jaxopt {np.asarray(gradient)}, ours {ours.numpy()}")


def not_nearest(
    project: Callable[[np.ndarray], np.ndarray], member: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> float:
    """Return the largest <x - p, u - p> over random points x with projection p and members u; at most 0 for a projection."""
    generator = np.random.default_rng(5)
    worst = -math.inf
    for _ in range(2000):
        x = 2.0 * generator.standard_normal(shape)
        p = project(x)
        worst = max(worst, float(((x - p) * (member() - p)).sum()))
    return worst


def audit_sets() -> None:
    """Print whether the peers' projections are the nearest points, and where they fail at all."""
    print("\nViolation of <x - p, u - p> <= 0 over 2000 random points x and members u (0 up to rounding is right)")
    generator = np.random.default_rng(6)

    def nuclear_member() -> np.ndarray:
        u = generator.standard_normal((3, 4))
        return u / np.linalg.svd(u, compute_uv=False).sum()

    def l1_member() -> np.ndarray:
        u = generator.standard_normal(6)
        return u / np.abs(u).sum()

    rows = [
        ("ours NuclearBall", through_torch(C.NuclearBall(1.0).project), nuclear_member, (3, 4)),
        ("ours L1Ball", through_torch(C.L1Ball(1.0).project), l1_member, (6,)),
    ]
    if peer("proxtorch") is not None:
        sets = importlib.import_module("proxtorch.constraints")
        rows.append(("proxtorch TraceNorm ball", through_torch(sets.TraceNorm(1.0).prox), nuclear_member, (3, 4)))
        try:
            sets.L1Ball(1.0).prox(torch.ones(2, 3))
        except RuntimeError as error:
            print(f"  proxtorch L1Ball on a 2 x 3 tensor: RuntimeError {str(error)[:60]}")
    if (pyproximal := peer("pyproximal")) is not None:
        ball = pyproximal.L1Ball(6, 1.0)
        rows.append(("pyproximal L1Ball", lambda x: ball.prox(x, 1.0), l1_member, (6,)))
    for name, project, member, shape in rows:
        print(f"  {name:<30s} {max(not_nearest(project, member, shape), 0.0):.1e}")


# Feasibility ------------------------------------------------------------------------------------------------------------------

SHIFT = 256


def integers(x: Tensor) -> list[list[int]]:
    """Return the stored numbers times 2^SHIFT: exact integers, whatever the dtype."""
    limit, ulps = 2.0 ** (SHIFT - 60), x.double().abs()
    if bool(((ulps > 0) & (ulps < 1 / limit)).any()):
        raise ValueError(f"an entry needs more than {SHIFT} bits after the point")
    return [[int(math.ldexp(v, SHIFT)) for v in row] for row in x.double().tolist()]


def scaled(number: float) -> int:
    """Return a float times 2^SHIFT, exactly."""
    n, d = number.as_integer_ratio()
    return (n << SHIFT) // d


def squares(row: list[int]) -> int:
    """Return the sum of squares."""
    return sum(k * k for k in row)


NORMAL = tuple(float(v) for v in np.linspace(-1.0, 2.0, SIZE))


def vector_sets() -> list[tuple[str, C.Constraint, Callable[[list[int]], bool], Callable[[Tensor], Tensor] | None]]:
    """Return a name, the set, its exact membership, and what everybody else computes, in the dtype of the data."""
    one, near_one = scaled(1.0), scaled(1.3)
    return [
        ("L1Ball(1.3)", C.L1Ball(1.3, dims=-1), lambda r: sum(map(abs, r)) <= near_one, usual_l1),
        ("L2Ball(1.3)", C.L2Ball(1.3, dims=-1), lambda r: squares(r) <= near_one**2, usual_l2),
        ("LinfBall(0.7)", C.LinfBall(0.7), lambda r: max(map(abs, r)) <= scaled(0.7), lambda x: x.clamp(-0.7, 0.7)),
        ("Simplex(1)", C.Simplex(1.0, dims=-1), lambda r: min(r) >= 0 and sum(r) == one, usual_simplex),
        (
            "CappedSimplex(2, 0.5)",
            C.CappedSimplex(2.0, 0.5, dims=-1),
            lambda r: min(r) >= 0 and max(r) <= one // 2 and sum(r) == 2 * one,
            None,
        ),
        (
            "HalfSpace",
            C.HalfSpace(NORMAL, 0.3, dims=-1),
            lambda r: sum(scaled(a) * k for a, k in zip(NORMAL, r, strict=True)) <= scaled(0.3) << SHIFT,
            usual_half_space,
        ),
        (
            "SecondOrderCone",
            C.SecondOrderCone(dims=-1),
            lambda r: r[-1] >= 0 and squares(r[:-1]) <= r[-1] ** 2,
            usual_cone,
        ),
        ("Monotone", C.Monotone(dims=-1), lambda r: r == sorted(r), None),
        ("Sparsity(3)", C.Sparsity(3, dims=-1), lambda r: sum(k != 0 for k in r) <= 3, None),
    ]


def usual_l2(x: Tensor) -> Tensor:
    """Shorten by the computed norm."""
    return x * (1.3 / x.norm(dim=-1, keepdim=True)).clamp(max=1.0)


def usual_simplex(x: Tensor, total: float = 1.0) -> Tensor:
    """Sort, cumulative sums, subtract, clip."""
    work = x.float() if x.element_size() == 2 else x
    ordered, _ = work.sort(dim=-1, descending=True)
    sums = ordered.cumsum(dim=-1) - total
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device)
    active = (ordered - sums / counts > 0).sum(dim=-1, keepdim=True)
    theta = sums.gather(-1, active - 1) / active
    return (work - theta).clamp(min=0).to(x.dtype)


def usual_l1(x: Tensor) -> Tensor:
    """Project the moduli on the simplex."""
    outside = x.abs().sum(dim=-1, keepdim=True) > 1.3
    return torch.where(outside, x.sign() * usual_simplex(x.abs(), 1.3), x)


def usual_half_space(x: Tensor) -> Tensor:
    """Subtract the excess along the normal."""
    normal = torch.tensor(NORMAL, dtype=x.dtype)
    excess = (x @ normal - 0.3).clamp(min=0)
    return x - excess[:, None] * normal / normal.square().sum()


def usual_cone(x: Tensor) -> Tensor:
    """Use the closed form."""
    rest, t = x[:, :-1], x[:, -1:]
    norm = rest.norm(dim=-1, keepdim=True)
    factor = ((norm + t) / 2).clamp(min=0)
    moved = torch.cat([rest / norm * factor, factor], dim=-1)
    return torch.where(norm <= t, x, moved)


def feasible() -> None:
    """Count, in exact integers, results outside of the set."""
    print(
        f"\nInfeasible among {COUNT:,} projections of {SIZE} gaussian entries, decided in exact integers: ours / the usual formula"
    )
    generator = torch.Generator().manual_seed(0)
    batch = 100_000
    for name, constraint, inside, usual in vector_sets():
        line = []
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            bad = other = 0
            for part in range(COUNT // batch):
                x = (2 * torch.randn(batch, SIZE, generator=generator, dtype=torch.float64)).to(dtype)
                bad += sum(not inside(row) for row in integers(constraint.project(x)))
                if usual is not None and part == 0:
                    other += sum(not inside(row) for row in integers(usual(x)))
            beside = f"{100 * other / batch:.0f} %" if usual is not None else "-"
            line.append(f"{str(dtype)[6:]} {bad} / {beside}")
        print(f"  {name:<24s} {'   '.join(line)}", flush=True)


def semidefinite(rows: list[list[Fraction]]) -> bool:
    """Decide exactly whether a symmetric rational matrix is positive semidefinite, by elimination."""
    A = [row[:] for row in rows]
    for k in range(len(A)):
        if A[k][k] < 0 or (A[k][k] == 0 and any(A[k][j] != 0 for j in range(k, len(A)))):
            return False
        if A[k][k] == 0:
            continue
        for i in range(k + 1, len(A)):
            factor = A[i][k] / A[k][k]
            for j in range(k, len(A)):
                A[i][j] -= factor * A[k][j]
    return True


def fractions(x: Tensor) -> list[list[Fraction]]:
    """Return the stored entries of a matrix, exactly."""
    return [[Fraction(v) for v in row] for row in x.double().tolist()]


def below(W: list[list[Fraction]], radius: Fraction) -> bool:
    """Decide exactly whether the spectral norm is at most ``radius``."""
    n = len(W[0])
    gram = [[sum((row[i] * row[j] for row in W), Fraction(0)) for j in range(n)] for i in range(n)]
    return semidefinite([[(radius**2 if i == j else 0) - gram[i][j] for j in range(n)] for i in range(n)])


def above(A: list[list[Fraction]], low: Fraction) -> bool:
    """Decide exactly whether a symmetric matrix is at least ``low`` times the identity."""
    n = len(A)
    if any(A[i][j] != A[j][i] for i in range(n) for j in range(n)):
        return False
    return semidefinite([[A[i][j] - (low if i == j else 0) for j in range(n)] for i in range(n)])


def contractive(A: list[list[Fraction]], rate: Fraction) -> bool:
    """Decide exactly whether the symmetric part is at most ``-rate`` times the identity."""
    n = len(A)
    return above([[-(A[i][j] + A[j][i]) / 2 for j in range(n)] for i in range(n)], rate)


def not_below(W: list[list[Fraction]], low: Fraction) -> bool:
    """Decide exactly whether the smallest singular value of a tall matrix is at least ``low``."""
    n = len(W[0])
    return above([[sum((row[i] * row[j] for row in W), Fraction(0)) for j in range(n)] for i in range(n)], low**2)


def nuclear(W: list[list[Fraction]]) -> mpmath.mpf:
    """The sum of the singular values, to 50 digits."""
    with mpmath.workdps(50):
        return mpmath.fsum(
            mpmath.svd_r(
                mpmath.matrix([[mpmath.mpf(v.numerator) / v.denominator for v in row] for row in W]), compute_uv=False
            )
        )


def stochastic(A: list[list[Fraction]]) -> bool:
    """Decide exactly whether the entries are nonnegative and all rows and columns sum to 1."""
    columns = [list(c) for c in zip(*A, strict=True)]
    return all(v >= 0 for row in A for v in row) and all(sum(line) == 1 for line in A + columns)


def feasible_matrices(count: int = 10_000) -> None:
    """Count, in exact rational arithmetic, results outside of a set of matrices."""
    print(f"\nInfeasible among {count:,} projections of matrices, decided in exact rational arithmetic: ours")
    cases: list[tuple[str, C.Constraint, tuple[int, int], Callable[[list[list[Fraction]]], bool]]] = [
        ("SpectralBall(0.9)", C.SpectralBall(0.9), (4, 3), lambda W: below(W, Fraction(0.9))),
        ("Orthogonal: norm <= 1", C.Orthogonal(), (4, 3), lambda W: below(W, Fraction(1))),
        ("PSD(0.1, 0.9)", C.PSD(0.1, 0.9), (3, 3), lambda W: above(W, Fraction(0.1)) and below(W, Fraction(0.9))),
        ("Hurwitz(0.2)", C.Hurwitz(0.2), (3, 3), lambda W: contractive(W, Fraction(0.2))),
        ("DoublyStochastic", C.DoublyStochastic(), (4, 4), stochastic),
        ("InfNormBall(0.9)", C.InfNormBall(0.9), (4, 3), lambda W: all(sum(map(abs, r)) <= Fraction(0.9) for r in W)),
        (
            "OneNormBall(0.9)",
            C.OneNormBall(0.9),
            (4, 3),
            lambda W: all(sum(map(abs, c)) <= Fraction(0.9) for c in zip(*W, strict=True)),
        ),
        (
            "AlmostOrthogonal(0.1)",
            C.AlmostOrthogonal(0.1),
            (4, 3),
            lambda W: below(W, 1 + Fraction(0.1)) and not_below(W, 1 - Fraction(0.1)),
        ),
        ("NuclearBall(0.9), 50 digits", C.NuclearBall(0.9), (4, 3), lambda W: nuclear(W) <= 0.9),
    ]
    generator = torch.Generator().manual_seed(0)
    for name, constraint, shape, inside in cases:
        line = []
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            bad = 0
            for _ in range(count):
                x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                bad += not inside(fractions(constraint.project(x)))
            line.append(f"{str(dtype)[6:]} {bad}")
        print(f"  {name:<24s} {'   '.join(line)}", flush=True)


# Time ---------------------------------------------------------------------------------------------------------------------------


def speed() -> None:
    """Print ratios to the obvious yardstick."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).to(device)
    total = float(x.abs().double().sum())
    for share in (0.001, 0.1, 0.9):
        contenders: dict[str, Callable[[], object]] = {
            "torch.sort": lambda: torch.sort(x),
            "L1Ball": lambda r=share * total: C.L1Ball(r).project(x),
            "Simplex": lambda r=share * total: C.Simplex(r).project(x),
        }
        report(
            f"{COUNT:,} float32, radius {share:g} |x|_1, {device_name()}", medians(contenders, rounds=9), "torch.sort"
        )
    large = torch.randn(10 * COUNT, generator=torch.Generator().manual_seed(0)).to(device)
    contenders = {
        "F.softshrink": lambda: F.softshrink(large, 0.3),
        "L1(0.3).prox": lambda: C.L1(0.3).prox(large),
        "sign(x) * relu(|x| - 0.3)": lambda: large.sign() * (large.abs() - 0.3).clamp(min=0),
    }
    report(f"{10 * COUNT:,} float32, {device_name()}", medians(contenders, rounds=9), "F.softshrink")
    prox_tv = peer("prox_tv")
    for name, signal in (("noise", x.cpu()), ("random walk", x.cpu().cumsum(0))):
        for weight in (1.0, 10.0):
            wide = signal.double()
            contenders = {"TV1D, float64": lambda w=weight, s=wide: C.TV1D(w).prox(s)}
            if prox_tv is not None:
                numbers = wide.numpy()
                for method in ("condat", "hybridtautstring"):
                    contenders[f"prox_tv {method} (C++)"] = lambda w=weight, s=numbers, m=method: prox_tv.tv1_1d(
                        s, w, method=m
                    )
            seconds = medians(contenders, rounds=5, warm_up=1)
            report(f"total variation, weight {weight:g}, {COUNT:,} entries, {name}", seconds, list(seconds)[-1])
            print(f"  TV1D: {1e9 * seconds['TV1D, float64'] / COUNT:.0f} ns per sample")


def main() -> None:
    """Run the parts that are named, or all."""
    torch.set_num_threads(1)
    parts = {
        "agreement": agreement,
        "audit": audit,
        "feasible": feasible,
        "matrices": feasible_matrices,
        "speed": speed,
    }
    for name in sys.argv[1:] or list(parts):
        parts[name]()


if __name__ == "__main__":
    main()
