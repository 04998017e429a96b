"""The page holds what the folders hold, harmlessly, and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from stableopt.lyapunov import Event, StepRecord
from stableopt.report import write_report
from tests.report.folders import LIPSCHITZ, run_folder, some_records, watched_records
from tests.report.profiled import exponent_entry, numbers, system, write_profile

PLAIN = [StepRecord(step=1, loss=1.0, energy_before=1.0, energy_after=0.5, verdict="decreased")]
EVIL = "<script>alert('x')<&\"$\\frac{_"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(folders, tmp_path) -> Page:
    return Page(write_report(folders, tmp_path / "report.html").read_text(encoding="utf-8"))


def pictures(page: Page) -> list[dict[str, str | None]]:
    return [attrs for attrs in page.of("svg") if attrs["class"] == "plot"]


def cells(page_html: str, row: str) -> list[str]:
    """Return the cells of a table row by its heading."""
    match = re.search(rf'<tr><th scope="row">{re.escape(row)}</th>(.*?)</tr>', page_html)
    assert match, row
    return re.findall(r"<td>(.*?)</td>", match.group(1))


ALLOWED = set(
    re.findall(
        r"\w+",
        "html head meta title style body header nav main section footer h1 h2 h3 p ul li a figure figcaption div span details "
        "summary table caption thead tbody tr th td code strong svg g path text",
    )
)


def assert_harmless(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag in ALLOWED, tag
        assert not any(name.startswith("on") or name in {"src", "srcset", "action", "style"} for name in attrs), attrs
        assert all((value or "").startswith("#") for name, value in attrs.items() if name.endswith("href")), attrs
    assert not page.open


def test_the_page_is_one_harmless_file(tmp_path):
    folders = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", records=watched_records(120, fault=50))]
    page = page_of(folders, tmp_path)
    assert_harmless(page)
    assert len(pictures(page)) > 20
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert not re.search(r"url\(|@import|http(?!-equiv)|//", html)
    assert {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    } in page.of("meta")


def test_everything_can_be_read_aloud(tmp_path):
    page = page_of(run_folder(tmp_path / "a", records=watched_records(120, fault=50)), tmp_path)
    assert page.of("html") == [{"lang": "en"}]
    assert all(len(picture["aria-label"] or "") > 40 and picture["role"] == "img" for picture in pictures(page))
    assert all(heading["scope"] in {"row", "col"} for heading in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) > 3
    assert len(page.of("figcaption")) == len(page.of("figure")) == len(pictures(page))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in page.of("div") if box["class"] == "scroll")
    ids = [heading["id"] for heading in page.of("h2")]
    assert [section["aria-labelledby"] for section in page.of("section")] == ids
    assert len(set(ids)) == len(ids)
    assert {(link["href"] or "")[1:] for link in page.of("a")} <= set(ids)


def test_the_panels_stand_in_the_order_in_which_they_are_read(tmp_path):
    page = page_of(run_folder(tmp_path / "a", records=watched_records(120, fault=50)), tmp_path)
    assert [heading["id"] for heading in page.of("h2")] == [
        "overview",
        "energy",
        "trust",
        "curvature",
        "updates",
        "gradients",
        "layers",
        "steps",
        "events",
        "cost",
        "accuracy",
        "certificates",
        "settings",
    ]


def test_a_panel_without_data_is_left_out_and_named(tmp_path):
    page = page_of(run_folder(tmp_path / "a", records=PLAIN), tmp_path)
    assert [heading["id"] for heading in page.of("h2")] == [
        "overview",
        "energy",
        "accuracy",
        "certificates",
        "settings",
    ]
    assert "Not measured: trust ratio, sharpness, trace, noise scale, update ratios" in page.words


def test_events_are_in_a_table_with_evidence_and_advice(tmp_path):
    records = watched_records(130, fault=50)
    write_report(run_folder(tmp_path / "a", records=records), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    section = html[html.index('id="events"') : html.index('id="cost"')]
    rows = re.findall(r"<tr>(?!<th scope=\"col\")(.*?)</tr>", section)
    events = [event for record in records for event in record.events]
    assert len(rows) == len(events) == 4
    for row, event in zip(rows, events, strict=True):
        texts = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        assert texts == [
            str(event.step),
            event.kind,
            event.channel or "—",
            event.what,
            event.evidence or "—",
            str(event.since or "—"),
            event.action,
            event.advice or "—",
        ]
    words = Page(html).words
    assert "3 alarms, the first at step 54 (increase: the loss of the same batch rose" in words
    assert cells(html, "alarms") == ["1 increase, 1 nonfinite, 1 sublevel"]
    assert "the monitor took 3.2 % of the time of the training; products with the Hessian: 2 exact." in words


def test_of_very_many_events_the_first_and_the_last_are_listed_and_all_counted(tmp_path):
    def at(step):
        return StepRecord(step=step, loss=1.0, events=(Event(step, "alarm", "level", "warn", f"rise {step}"),))

    page = page_of(run_folder(tmp_path / "a", records=[at(k) for k in range(1, 501)]), tmp_path)
    assert "of 500 the first and the last, 200 in all" in page.words
    assert "rise 100 " in page.words
    assert "rise 101 " not in page.words
    assert "rise 401 " in page.words


def test_names_and_values_are_text_never_markup(tmp_path):
    records = [
        StepRecord(
            step=k,
            loss=1.0,
            energy_after=1.0,
            norms={EVIL: 1.0},
            limits={EVIL: 2.0},
            cfl={EVIL: 0.1},
            update_ratio={EVIL: 0.1},
            reason=EVIL,
            hvp=EVIL,
            events=(Event(k, "alarm", EVIL, "warn", EVIL, EVIL, k, EVIL),),
        )
        for k in (1, 2)
    ]
    metrics = {
        "test_accuracy": EVIL,
        "certified_accuracy": {EVIL: 0.5, "0.1": EVIL, "0.2": 0.3},
        "actions": {EVIL: EVIL},
        "verdicts": [EVIL],
        "steps": {EVIL: [EVIL]},
    }
    folder = run_folder(tmp_path / EVIL, records=records, settings={EVIL: EVIL}, metrics=metrics, layer=EVIL)
    page = page_of([folder, folder], tmp_path)
    assert_harmless(page)
    assert page.words.count(EVIL) >= 20
    assert EVIL in (pictures(page)[0]["aria-label"] or "")


def test_any_folder_name_is_drawn(tmp_path):
    names = ["_hidden", "$x$", "$\\frac{$", "a\x01b", "tab\tline\nbreak", "数据", "x" * 200, "--", "\udcff"]
    page = page_of([run_folder(tmp_path / name, records=PLAIN) for name in names], tmp_path)
    assert_harmless(page)
    assert len(pictures(page)) == 3
    assert all(name in page.words for name in names if name.isprintable())


def test_the_numbers_are_in_the_tables(tmp_path):
    write_report(
        [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", metrics={"test_accuracy": 0.5}, lipschitz=2.0)],
        tmp_path / "r.html",
    )
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert cells(html, "test accuracy") == ["0.9625", "0.5"]
    assert cells(html, "certified accuracy at 0.1") == ["0.9", "—"]
    assert cells(html, "proved Lipschitz bound") == ["≤ 1.00001", "≤ 2"]
    assert cells(html, "actions") == ["10 accepted, 2 shrunk", "—"]
    assert cells(html, "lr") == ["0.003", "0.003"]
    assert cells(html, "undecided") == [str(sum(r.verdict == "undecided" for r in some_records()))] * 2
    assert cells(html, "undone") == [str(sum(r.action == "undone" for r in some_records()))] * 2
    assert LIPSCHITZ.hex() in html
    order = [html.index(f"certified accuracy at {radius}<") for radius in ("0.1", "0.5", "2", "10")]
    assert order == sorted(order)


def test_the_digest_of_the_weights_is_compared(tmp_path):
    good, bad, gone = (run_folder(tmp_path / name, records=[], metrics={}) for name in ("good", "bad", "gone"))
    (bad / "model.safetensors").write_bytes(b"other weights")
    (gone / "model.safetensors").unlink()
    words = page_of([good, bad, gone], tmp_path).words
    expected = ["; matches model.safetensors", "does not match model.safetensors", "the weights are not in the folder"]
    places = [words.index(text) for text in expected]
    assert places == sorted(places)


def test_the_same_folders_are_the_same_bytes(tmp_path):
    folders = [run_folder(tmp_path / "a", records=watched_records(60, layers=20, fault=20))]
    pages = [write_report(folders, tmp_path / f"{k}.html").read_bytes() for k in (1, 2)]
    assert pages[0] == pages[1]


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    folders = [run_folder(tmp_path / "a", records=watched_records(60, layers=20, fault=20))]
    page = write_report(folders, tmp_path / "1.html").read_bytes()
    code = "import sys; from stableopt.report import write_report; write_report(sys.argv[2:], sys.argv[1])"
    other = {**os.environ, "PYTHONHASHSEED": "1", "LANG": "C"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "2.html", *folders], check=True, env=other)
    assert (tmp_path / "2.html").read_bytes() == page


FILES = {
    "energy.jsonl": "energy",
    "metrics.json": "accuracy",
    "model.cert.json": "certificates",
    "run.json": "settings",
}


def sections(page: Page) -> set[str | None]:
    return {heading["id"] for heading in page.of("h2")}


@pytest.mark.parametrize("name", FILES)
def test_an_absent_file_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = run_folder(tmp_path / "a", records=PLAIN)
    (folder / name).unlink()
    page = page_of(folder, tmp_path)
    assert f"{name} is not there." in page.words
    assert "cannot be read" not in page.words
    assert sections(page) == {"overview", *FILES.values()} - {FILES[name]}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = run_folder(tmp_path / "a", records=PLAIN)
    (folder / name).write_bytes(b"<script>\n")
    page = page_of(folder, tmp_path)
    assert_harmless(page)
    assert f"{name} cannot be read" in page.words
    assert "is not there" not in page.words
    assert sections(page) == {"overview", *FILES.values()} - {FILES[name]}


def test_a_file_that_some_runs_lack_is_named_with_them(tmp_path):
    folders = [run_folder(tmp_path / name, records=PLAIN) for name in "abc"]
    for folder in folders[1:]:
        (folder / "run.json").unlink()
    assert "run.json is not there (b, c)." in page_of(folders, tmp_path).words


def test_an_empty_folder_makes_a_page_that_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    page = page_of(tmp_path / "a", tmp_path)
    assert_harmless(page)
    assert "a : no step was recorded." in page.words
    assert all(f"{name} is not there" in page.words for name in FILES)
    assert sections(page) == {"overview"}
    assert not pictures(page)
    assert not page.of("table")


def test_odd_values_in_the_json_files_do_no_harm(tmp_path):
    folders = []
    for number, value in enumerate(["nan", "inf", 1e308, -1e308, 5e-324, 0.0, "0", None, [], True, "x", {}, 10**400]):
        keys = ("test_accuracy", "certified_accuracy", "lipschitz", "steps", "actions", "curve", "seconds", "verdicts")
        settings = {"lr": value, "versions": value}
        folders.append(
            run_folder(tmp_path / f"a{number}", records=[], metrics=dict.fromkeys(keys, value), settings=settings)
        )
        curve = {"radius": [value, 1], "certified_accuracy": [1, value]}
        metrics = {"certified_accuracy": {"0.1": value}, "curve": curve, "test_accuracy": value}
        folders.append(run_folder(tmp_path / f"b{number}", records=[], metrics=metrics))
    page = page_of(folders, tmp_path)
    assert_harmless(page)
    assert len(pictures(page)) == 1


def test_a_profile_is_shown_with_its_verdict_figures_and_tables(tmp_path):
    folders = [run_folder(tmp_path / name, records=PLAIN) for name in ("stable", "plain", "unstable")]
    write_profile(folders[0])
    write_profile(folders[2], numbers(growth=0.02), system(growth=0.02))
    page = page_of(folders, tmp_path)
    assert_harmless(page)
    assert "profile" in sections(page)
    assert "stable : exponentially stable on 200 steps, 0 to 200: every perturbation" in page.words
    assert "plain : no profile." in page.words
    assert "unstable : exponentially unstable on 200 steps" in page.words
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = html[html.index('id="profile"') : html.index('id="accuracy"')]
    assert section.count('<svg class="plot"') == 3 + 2 * 9
    assert section.count("<caption>Exponents: mean") == 2
    assert cells(html, "largest eigenvalue M of all P") == ["60"]
    assert "profile" not in sections(page_of(folders[1], tmp_path))


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
def test_half_a_profile_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = write_profile(run_folder(tmp_path / "a", records=PLAIN))
    (folder / name).write_bytes(b"<script>\n")
    page = page_of(folder, tmp_path)
    assert_harmless(page)
    assert f"{name} cannot be read" in page.words
    (folder / name).unlink()
    page = page_of(folder, tmp_path)
    assert f"{name} is not there." in page.words
    assert ("exponentially stable on 200 steps" in page.words) == (name != "profile.json")


def test_a_profile_with_words_of_any_kind_is_text(tmp_path):
    evil = dict.fromkeys(numbers(), EVIL) | {
        "schema": 1,
        "layers": [EVIL] * 5,
        "metric": {EVIL: EVIL},
        "missing": [{"step": EVIL, "reason": EVIL}],
    }
    evil |= {
        "verdict": {"kind": EVIL, "reason": EVIL, "horizon": 1},
        "exponents": [exponent_entry(0.1, kind=EVIL, reason=EVIL)] * 2,
    }
    evil |= {
        "forward": [{"table_key": "forward/0", "step": EVIL, "how": EVIL}],
        "hyper": [{"name": "lr"}, {"name": EVIL}],
    }
    page = page_of(write_profile(run_folder(tmp_path / "a", records=PLAIN), evil), tmp_path)
    assert_harmless(page)
    assert page.words.count(EVIL) > 20


def test_one_name_twice_is_numbered(tmp_path):
    page = page_of([run_folder(tmp_path / k / "a", records=[], metrics={}) for k in "xy"], tmp_path)
    assert "a (1)" in page.words
    assert "a (2)" in page.words


def test_a_folder_of_the_machine_is_not_shown(tmp_path):
    folder = run_folder(tmp_path / "a", records=PLAIN)
    write_report(folder, tmp_path / "r.html")
    assert str(tmp_path) not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_wrong_calls_are_refused(tmp_path):
    folder = run_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="not a folder"):
        write_report([folder, tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="one file"):
        write_report([folder], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_missing_library_is_named_with_the_command(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2.*pip install 'stableopt\[cli\]'"):
        write_report(folder, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_crash_leaves_the_old_page(tmp_path, monkeypatch):
    folder, out = run_folder(tmp_path / "a", records=[], metrics={}), tmp_path / "pages" / "r.html"
    before = write_report(folder, out).read_bytes()
    (folder / "run.json").unlink()

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_report(folder, out)
    assert out.read_bytes() == before
    assert len(list(out.parent.iterdir())) == 1
    assert write_report(folder, out).read_bytes() != before


def test_a_run_of_many_steps_makes_a_page_of_bounded_size(tmp_path):
    def many(count):
        return [
            StepRecord(step=k, loss=k * 7919 % 101, energy_after=k * 31 % 97, verdict="increased")
            for k in range(1, count + 1)
        ]

    sizes = [
        write_report(run_folder(tmp_path / str(n), records=many(n), metrics={}), tmp_path / f"{n}.html").stat().st_size
        for n in (1_000, 4_000)
    ]
    assert sizes[1] < 1.2 * sizes[0]


def test_json_settings_of_every_kind_are_shown(tmp_path):
    settings = {"versions": {"torch": "2.13", "python": "3.11"}, "list": [1, 2], "none": None, "flag": True}
    write_report(run_folder(tmp_path / "a", records=[], metrics={}, settings=settings), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert cells(html, "versions") == ["python: 3.11, torch: 2.13"]
    assert cells(html, "list") == ["[1, 2]"]
    assert cells(html, "none") == ["—"]
    assert cells(html, "flag") == ["True"]
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == settings


def test_records_before_a_damage_are_shown_and_the_damage_is_named(tmp_path):
    folder = run_folder(tmp_path / "a")
    lines = (folder / "energy.jsonl").read_text().splitlines(keepends=True)
    (folder / "energy.jsonl").write_text(
        "".join([*lines[:7], lines[7].replace('"loss": 0.25', '"loss": 0.125'), *lines[8:]])
    )
    page = page_of(folder, tmp_path)
    assert "energy.jsonl is used up to step 7: energy.jsonl, line 8" in page.words
    assert "7 records of steps 1 to 7" in page.words


def test_what_it_needs_is_installed_with_it():
    """The templates are part of the package."""
    from importlib import resources

    folder = resources.files("stableopt.report").joinpath("templates")
    assert {item.name for item in folder.iterdir()} == {"report.html", "parts.html", "style.css"}
