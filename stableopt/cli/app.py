"""The commands: train, certify, verify, report, doctor, profile, audit."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stableopt._version import __version__
from stableopt.certify.verifier import main as run_verifier
from stableopt.cli.progress import LiveProgress
from stableopt.cli.train import EPSILONS, Settings, certify_run
from stableopt.cli.train import train as run_training
from stableopt.errors import CertificateError, StableoptError

__all__ = ["app", "run"]

app = typer.Typer(
    help="Stability-constrained training: enforced while training, measured, and proved in a file that anyone can check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


def run() -> None:
    """Run the command line; a foreseen failure is one sentence on standard error and exit code 2."""
    try:
        app()
    except (StableoptError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    model: Annotated[str, typer.Option(help="mlp, resnet or cnn.")] = "mlp",
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "adamw",
    lipschitz: Annotated[float, typer.Option(help="Limit of the Lipschitz constant (Euclidean norm).")] = 1.0,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training set; by default the model's recipe.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default the model's recipe.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Inputs per step; by default the model's recipe.")] = None,
    guard: Annotated[str, typer.Option(help="off, monitor, backtrack or strict.")] = "backtrack",
    data: Annotated[str, typer.Option(help="digits, or a .npz file with x_train y_train x_test y_test.")] = "digits",
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/digits"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the batches.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch; the bytes of a run depend on them.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show loss, trust, edge and alarms of each step as it goes.")
    ] = False,
) -> None:
    """Train a model under the guard, certify it, and print what is proved."""
    settings = Settings(model, optimizer, lipschitz, epochs, lr, batch_size, guard, data, seed, threads)
    try:
        with LiveProgress(console, settings.resolved().epochs or 0, live=live) as progress:
            metrics = run_training(settings, out, resume=resume, progress=progress)
    except KeyboardInterrupt:
        metrics = certify_run(out)
        _print_metrics(metrics, out)
        console.print(
            f"[yellow]interrupted[/] after epoch {metrics['epochs']}; the folder is usable, continue with --resume"
        )
        raise typer.Exit(130) from None
    _print_metrics(metrics, out)


@app.command()
def certify(run_folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Certify the last checkpoint of a run again and measure it on its test set."""
    _print_metrics(certify_run(run_folder), run_folder)


@app.command()
def verify(
    certificate: Annotated[Path | None, typer.Argument(help="A model.cert.json, or the folder that holds it.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Prove the norms in integers; slower.")] = False,
    replay: Annotated[Path | None, typer.Option(help="An npz file (x, y): repeat the claims about these data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    sig: Annotated[Path | None, typer.Option(help="A public key (PEM): check the signature of the folder too.")] = None,
    standalone: Annotated[
        Path | None, typer.Option(help="Write the verifier itself, as one file that needs numpy only, to this path.")
    ] = None,
) -> None:
    """Prove a certificate again from the bytes of the weights; exit 0 verified, 1 rejected, 2 error."""
    if standalone is not None:
        from stableopt.certify.standalone import write_verifier

        console.print(f"wrote {write_verifier(standalone)}", highlight=False)
    if certificate is None:
        if standalone is None:
            raise ValueError("give the path of a model.cert.json, or of the folder that holds it.")
        return
    path = certificate / "model.cert.json" if certificate.is_dir() else certificate
    if sig is not None:
        _check_signature(path.parent, sig)
    flags = [*(["--json"] if as_json else []), *(["--exact"] if exact else [])]
    raise typer.Exit(run_verifier([str(path), *flags, *([] if replay is None else ["--replay", str(replay)])]))


def _check_signature(folder: Path, key: Path) -> None:
    from stableopt.certify.signing import verify_signature

    if not key.is_file():
        raise FileNotFoundError(f"there is no public key '{key}'.")
    try:
        verify_signature(folder, key)
    except CertificateError as error:
        console.print(f"rejected: {error}", highlight=False)
        raise typer.Exit(1) from None


@app.command()
def report(
    run_folders: Annotated[list[Path], typer.Argument(help="One or more run folders; several are overlaid.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page with the energy, the steps, the norms and the certified accuracy."""
    from stableopt.report import write_report

    console.print(f"wrote {write_report(run_folders, out)}", highlight=False)


@app.command()
def doctor(
    subject: Annotated[
        str,
        typer.Argument(help="FILE.py:FUNCTION, which returns (model, loss) or (model, inputs[, targets[, loss_fn]])."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what can be measured on a model while it trains: each way to curvature, its cost, and the tiers of the monitor."""
    from stableopt.cli.subject import load_subject
    from stableopt.lyapunov.doctor import diagnose

    found = diagnose(*load_subject(subject))
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)  # noqa: T201


@app.command()
def audit(
    subject: Annotated[
        str,
        typer.Argument(help="FILE.py:FUNCTION, which returns (model, loss) or (model, inputs[, targets[, loss_fn]])."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    fail_on: Annotated[
        str, typer.Option(help="Exit with 1 at a finding as bad as this or worse: serious, weak, note or never.")
    ] = "never",
) -> None:
    """List what breaks or weakens a guarantee in a model of anybody's, where, and how large each error is measured to be."""
    from stableopt.cli.audit import audit_subject, fails

    found = audit_subject(subject)
    failed = fails(found, fail_on)
    print(json.dumps(found.as_dict(), indent=1, allow_nan=False) if as_json else found)  # noqa: T201
    raise typer.Exit(int(failed))


@app.command()
def profile(
    subject: Annotated[
        str,
        typer.Argument(
            help="A run folder with a profile, or one that `stableopt train` left; or FILE.py:FUNCTION with an optimizer."
        ),
    ],
    steps: Annotated[int, typer.Option(help="Steps to train, where there is no profile.")] = 300,
    directions: Annotated[int, typer.Option(help="Perturbations to follow then.")] = 4,
    out: Annotated[Path, typer.Option(help="The folder for the profile of a FILE.py:FUNCTION.")] = Path("runs/profile"),
    again: Annotated[bool, typer.Option("--again", help="Measure anew, although there is a profile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Say how perturbations of a training grow: verdict, exponents, largest windows, energy; measure it first if need be."""
    from stableopt.cli.profile import (
        measure_profile,
        measure_subject,
        profile_json,
        profile_text,
        read_profile,
    )
    from stableopt.report.profiles import has_profile

    made = ".py:" in subject
    folder = out if made else Path(subject)
    if made or again or not has_profile(folder):
        measure = partial(measure_subject, subject) if made else measure_profile
        measure(folder, steps=steps, directions=directions)
    found = read_profile(folder)
    print(json.dumps(profile_json(found), indent=1) if as_json else profile_text(found))  # noqa: T201


def _print_metrics(metrics: dict[str, Any], out: Path) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("proved Lipschitz bound", f"{metrics['lipschitz']:.9f}")
    table.add_row("test accuracy", f"{metrics['test_accuracy']:.4f}")
    for eps in EPSILONS:
        table.add_row(f"certified accuracy, radius {eps:g}", f"{metrics['certified_accuracy'][str(eps)]:.4f}")
    for kind in ("actions", "verdicts"):
        table.add_row(
            f"{kind} of {metrics['steps']} steps", ", ".join(f"{n} {name}" for name, n in sorted(metrics[kind].items()))
        )
    table.add_row("run folder", str(out))
    console.print(table)
