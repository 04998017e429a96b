"""Each example runs and the claim that it prints is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _as_a_user_runs_it() -> None:
    torch.set_default_dtype(torch.float32)


def test_every_example_is_short_and_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert len(example.read_text(encoding="utf-8").splitlines()) < 80, example.name
        assert f'load("{example.stem}")' in text, f"{example.name} has no test"


def check_guard(steps: int) -> None:
    result = load("guard_at_any_learning_rate").main(steps=steps)
    assert result["raised"] == 0
    assert result["taken"] > 0.5 * 6 * steps
    assert result["diverged"] == 1
    for factor in (1, 10, 100):
        assert result[f"full batch x{factor} strict"] < 1.0
        # the guard judges a step by its own batch: at 100 times a good rate other batches suffer, but the run stays bounded
        assert result[f"mini-batch x{factor} strict"] < 10.0


def test_the_guard_never_raises_the_energy_at_any_learning_rate() -> None:
    check_guard(steps=60)


@pytest.mark.slow
def test_the_guard_never_raises_the_energy_in_a_longer_run() -> None:
    check_guard(steps=300)


def test_the_lasso_reaches_its_optimum_with_exact_zeros() -> None:
    result = load("lasso").main(steps=1500)
    assert result["distance"] < 1e-8
    assert result["zeros"] == result["zeros_of_optimum"] > 5
    assert result["raised"] == 0


@pytest.mark.slow
def test_a_deep_certified_network_learns() -> None:
    result = load("deep_residual").main()
    assert result["stable accuracy"] >= 0.93
    assert result["stable bound"] <= 1.0
    assert result["plain accuracy"] >= 0.93
    assert result["plain bound"] >= 1e20


def test_a_shallow_version_of_the_deep_network_is_certified(tmp_path: Path) -> None:
    result = load("deep_residual").main(steps=10, depth=4, picture=str(tmp_path / "growth.svg"))
    assert (tmp_path / "growth.svg").read_text().startswith("<svg")
    assert result["stable bound"] <= 1.0 < result["plain bound"]


def test_no_certified_point_is_broken_and_tampering_is_noticed() -> None:
    result = load("certify_and_attack").main(steps=150)
    assert result["accuracy"] > 0.9
    assert result["bound"] <= 1.0
    assert result["broken"] == 0
    assert result["honest"] == 1
    assert result["tampered"] == 0


def test_three_learning_rates_leave_their_profiles_and_pictures(tmp_path: Path) -> None:
    example = load("profile_digits")
    verdicts = example.main(out=str(tmp_path), steps=13, start=3, pictures=str(tmp_path / "img"))
    assert list(verdicts) == ["stable", "edge", "unstable"]
    assert all((tmp_path / name / "profile.json").exists() for name in verdicts)
    assert {path.stem for path in (tmp_path / "img").iterdir()} == {
        f"profile_{name}" for name in example.SHOWN.values()
    }


@pytest.mark.slow
def test_a_run_is_stable_at_a_small_rate_and_unstable_at_a_large_one(tmp_path: Path) -> None:
    verdicts = load("profile_digits").main(out=str(tmp_path))
    assert verdicts["stable"] == "exponentially stable"
    assert verdicts["edge"] in {"inconclusive", "subexponential", "profile-bounded"}
    assert verdicts["unstable"] == "exponentially unstable"


def test_an_observer_forgets_its_start_at_the_proved_rate(tmp_path: Path) -> None:
    result = load("observer").main(steps=10, picture=str(tmp_path / "observer.svg"))
    assert result["rate"] < 1.0
    assert result["above"] <= 1.0 + 1e-4  # the largest measured difference over the proved one; the rounding of float32
    assert (tmp_path / "observer.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_an_observer_is_better_than_differences_of_positions() -> None:
    result = load("observer").main()
    assert result["error"] < 0.5 * result["differences"]
    assert result["above"] <= 1.0 + 1e-4


def test_a_foreign_model_is_audited_and_a_clean_one_is_silent() -> None:
    result = load("audit_foreign").main()
    assert result["clean"] == 0.0
    assert abs(result["seen"] / result["sample-normalization"] - 1.0) < 1e-6
    for kind, least in (
        ("kernel-norm", 1.5),
        ("overlapping-pool", 2.0),
        ("negative-slope", 1.2),
        ("spectral-norm", 1.0),
    ):
        assert result[kind] >= least


def test_no_certified_sequence_is_broken(tmp_path: Path) -> None:
    result = load("certified_sequences").main(epochs=1, images=150, picture=str(tmp_path / "sequences.svg"))
    assert result["bound"] <= 100.0
    assert result["broken"] <= 0.0
    assert (tmp_path / "sequences.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_sequences_are_classified_under_a_limit_of_the_gain() -> None:
    result = load("certified_sequences").main()
    assert result["accuracy"] >= 0.88
    assert result["bound"] <= 100.0
    assert result["broken"] <= 0.0
    assert result["median radius"] > 0.005


def check_losses(steps: int, picture: Path, least: float) -> None:
    result = load("certified_training").main(steps=steps, picture=picture)
    assert picture.read_text().startswith("<svg")
    plain = result.pop("cross-entropy")
    for name, found in result.items():
        assert found.clean > least, name
        assert found.at(0.25) > plain.at(0.25), name


def test_losses_that_know_the_radius_certify_more(tmp_path: Path) -> None:
    check_losses(40, tmp_path / "curves.svg", 0.85)


@pytest.mark.slow
def test_losses_that_know_the_radius_certify_more_after_a_longer_training(tmp_path: Path) -> None:
    check_losses(300, tmp_path / "curves.svg", 0.95)
