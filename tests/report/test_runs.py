"""Numbers are read exactly and printed on the safe side."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stableopt.certify import certify
from stableopt.report import read_run, write_report
from stableopt.report.runs import as_number, round_up_text
from tests.report.folders import LIPSCHITZ, certificate, run_folder, some_records


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.integers(1, 17))
@example(1.0, 6)
@example(math.nextafter(1.0, 2.0), 6)
@example(999999.5, 6)
@example(5e-324, 6)
@example(1.7976931348623157e308, 1)
def test_a_printed_bound_is_never_below_the_bound_and_less_than_a_unit_above(value, digits):
    text = round_up_text(value, digits)
    printed, exact = Fraction(text), Fraction(value)
    assert printed >= exact
    if value:
        unit = Fraction(10) ** (math.floor(math.log10(value)) - digits + 2)  # one digit of slack for log10's rounding
        assert printed - exact < unit
    else:
        assert text == "0"


def test_a_printed_bound_is_exact_where_it_can_be():
    assert [round_up_text(x) for x in (0.0, 1.0, 0.5, 100000.0, math.inf)] == ["0", "1", "0.5", "100000", "inf"]
    assert round_up_text(math.nextafter(1.0, 2.0)) == "1.00001"


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.5, 0.5), ("0.5", 0.5), ("0x1.8p+1", 3.0), ("-0x1p-1", -0.5), ("inf", math.inf), ("-inf", -math.inf)],
)
def test_numbers_are_read_as_they_are_spelled(value, number):
    assert as_number(value) == number


@pytest.mark.parametrize("value", [None, True, "x", "0x", [], {}, "nan", 10**400, "0x1p+99999"])
def test_what_is_no_number_is_nan(value):
    assert math.isnan(as_number(value))


def test_a_folder_is_read_completely(tmp_path):
    run = read_run(run_folder(tmp_path / "a"))
    assert run.name == "a"
    assert run.problems == {}
    assert run.absent == ()
    assert run.history.count == len(some_records())
    assert run.history.last is not None
    assert run.history.last.to_json() == some_records()[-1].to_json()
    assert run.settings["model"] == "mlp"
    assert run.metrics["test_accuracy"] == 0.9625
    assert run.certificate is not None
    assert run.certificate.lipschitz == LIPSCHITZ
    assert run.certificate.weights_match is True
    assert run.certificate.layers == (("0.weight", "linear", LIPSCHITZ), ("layer 1", "activation relu", 1.0))


def test_the_name_is_of_the_folder_also_for_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(run_folder(tmp_path / "a"))
    assert read_run(".").name == "a"


@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b"\xff\n", b"null\n", b"[" * 100_000, b'{"predicate": {"graph": 3}}\n']
)
@pytest.mark.parametrize("name", ["energy.jsonl", "metrics.json", "model.cert.json", "run.json"])
def test_a_damaged_file_is_a_problem_and_the_rest_is_read(tmp_path, name, damage):
    folder = run_folder(tmp_path / "a")
    (folder / name).write_bytes(damage)
    run = read_run(folder)
    torn = name == "energy.jsonl" and b"\n" not in damage  # as a killed process leaves it
    valid = damage.startswith(b'{"predicate') and name in {"run.json", "metrics.json"}
    assert set(run.problems) == (set() if torn or valid else {name})
    assert all(why.startswith("cannot be read") for why in run.problems.values())
    assert bool(run.history.count) == (name != "energy.jsonl")
    assert (run.certificate is None) == (name == "model.cert.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c["subject"].clear(),
        lambda c: c["subject"][0].pop("digest"),
        lambda c: c.pop("predicate"),
        lambda c: c["predicate"].pop("graph"),
        lambda c: c["predicate"]["graph"].append({"op": "linear"}),
        lambda c: c["predicate"]["graph"].append({"op": "linear", "bound": "one"}),
        lambda c: c["predicate"]["graph"].append({"op": "linear", "bound": 1.0}),
        lambda c: c["predicate"]["graph"].append(None),
        lambda c: c["predicate"]["claims"]["proved"][0].update(L="0x1p+99999"),
        lambda c: c["predicate"]["claims"]["proved"][0].update(L="large"),
        lambda c: c["predicate"].update(claims=[]),
    ],
)
def test_a_certificate_of_another_layout_is_a_problem_not_a_crash(tmp_path, spoil):
    folder = run_folder(tmp_path / "a")
    statement = certificate(b"weights")
    spoil(statement)
    (folder / "model.cert.json").write_text(json.dumps(statement))
    run = read_run(folder)
    assert run.certificate is None
    assert run.problems["model.cert.json"].startswith("cannot be read")


def test_a_real_certificate_with_branches_is_read(tmp_path):
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.relu(self.inner(x))

    folder = run_folder(tmp_path / "a")
    cert = certify(Residual(), (4,), norm="linf")
    cert.save(folder)
    run = read_run(folder)
    assert run.problems == {}
    assert run.certificate is not None
    assert (run.certificate.lipschitz, run.certificate.norm) == (cert.lipschitz, "linf")
    assert float.fromhex(run.certificate.lipschitz_hex) == cert.lipschitz
    names, kinds, bounds = zip(*run.certificate.layers, strict=True)
    assert (names, kinds) == (("inner.weight", "layer 1", "layer 2"), ("linear", "activation relu", "sum"))
    assert bounds[:2] == tuple(node["bound"] for node in cert.program.nodes[:2])
    assert math.isnan(bounds[2])
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert f"Lipschitz bound (maximum norm)</th><td>≤ {round_up_text(cert.lipschitz)} (exactly" in page
    assert "<td>layer 2</td><td>sum</td><td>—</td>" in page


def test_a_certificate_without_a_lipschitz_claim_has_none(tmp_path):
    folder = run_folder(tmp_path / "a")
    statement = certificate(b"weights")
    statement["predicate"]["claims"]["proved"] = [{"id": "margin_constants", "L": []}]
    (folder / "model.cert.json").write_text(json.dumps(statement))
    summary = read_run(folder).certificate
    assert summary is not None
    assert math.isnan(summary.lipschitz)
    assert len(summary.layers) == 2
