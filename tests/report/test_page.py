"""The page holds what the folders hold, harmlessly, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from stableopt.lyapunov import StepRecord
from stableopt.report import write_report
from tests.report.folders import LIPSCHITZ, run_folder, some_records

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


def pictures(page: Page) -> list[str]:
    prefix = "data:image/svg+xml;base64,"
    assert all(image["src"].startswith(prefix) for image in page.of("img"))
    return [base64.b64decode(image["src"].removeprefix(prefix)).decode("utf-8") for image in page.of("img")]


def cells(page_html: str, row: str) -> list[str]:
    """Return the cells of a table row by its heading."""
    match = re.search(rf'<tr><th scope="row">{re.escape(row)}</th>(.*?)</tr>', page_html)
    assert match, row
    return re.findall(r"<td>(.*?)</td>", match.group(1))


def assert_harmless(page: Page) -> None:
    allowed = [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
        "p",
        "ul",
        "li",
        "figure",
        "img",
        "figcaption",
        "div",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "code",
        "strong",
    ]
    for tag, attrs in page.tags:
        assert tag in allowed, tag
        assert not any(name.startswith("on") or name in {"href", "srcset", "action", "style"} for name in attrs), attrs
    assert not page.open
    for svg in pictures(page):
        for element in ET.fromstring(svg).iter():
            assert not element.tag.endswith("script")
            for name, value in element.attrib.items():
                assert not name.lower().startswith("on")
                if name.endswith("href"):
                    assert value.startswith("#")


def test_the_page_is_one_harmless_file_with_four_kinds_of_pictures(tmp_path):
    page = page_of([run_folder(tmp_path / "a"), run_folder(tmp_path / "b")], tmp_path)
    assert_harmless(page)
    assert len(pictures(page)) == 5  # energy, steps, layers of two runs, accuracy
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


def test_everything_can_be_read_aloud(tmp_path):
    page = page_of(run_folder(tmp_path / "a"), tmp_path)
    assert page.of("html") == [{"lang": "en"}]
    assert all(len(image["alt"]) > 40 for image in page.of("img"))
    assert all(heading["scope"] in {"row", "col"} for heading in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) > 3
    assert len(page.of("figcaption")) == len(page.of("figure")) == len(page.of("img")) == 4
    ids = [heading["id"] for heading in page.of("h2")]
    assert [section["aria-labelledby"] for section in page.of("section")] == ids
    assert len(set(ids)) == len(ids)


def test_names_and_values_are_text_never_markup(tmp_path):
    records = [
        StepRecord(
            step=k, loss=1.0, energy_after=1.0, norms={EVIL: 1.0}, limits={EVIL: 2.0}, cfl={EVIL: 0.1}, reason=EVIL
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
    assert page.words.count(EVIL) >= 8
    assert EVIL in page.of("img")[0]["alt"]


def test_any_folder_name_is_drawn(tmp_path):
    names = ["_hidden", "$x$", "$\\frac{$", "a\x01b", "tab\tline\nbreak", "数据", "x" * 200, "--", "\udcff"]
    page = page_of([run_folder(tmp_path / name, records=PLAIN) for name in names], tmp_path)
    assert_harmless(page)
    assert len(pictures(page)) == 3
    assert all(name in page.of("img")[0]["alt"] for name in names if name.isprintable())


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
    folders = [run_folder(tmp_path / "a")]
    pages = [write_report(folders, tmp_path / "1.html").read_bytes()]
    user = {"lines.linewidth": 9, "svg.hashsalt": "other", "text.usetex": True, "svg.fonttype": "none"}
    with mpl.rc_context(user):
        pages += [write_report(folders, tmp_path / "2.html").read_bytes() for _ in range(2)]
        assert {key: mpl.rcParams[key] for key in user} == user
    code = "import sys; from stableopt.report import write_report; write_report(sys.argv[2:], sys.argv[1])"
    other = {**os.environ, "PYTHONHASHSEED": "1", "MPLBACKEND": "svg", "LANG": "C"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "3.html", *folders], check=True, env=other)
    pages.append((tmp_path / "3.html").read_bytes())
    assert len(set(pages)) == 1


FILES = ["energy.jsonl", "metrics.json", "model.cert.json", "run.json"]
GONE = {
    "energy.jsonl": "No step was recorded",
    "metrics.json": "No certified accuracy is in metrics.json",
    "model.cert.json": "No certificate",
    "run.json": "No run.json was found",
}


@pytest.mark.parametrize("name", FILES)
def test_an_absent_file_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = run_folder(tmp_path / "a", records=PLAIN)
    (folder / name).unlink()
    page = page_of(folder, tmp_path)
    assert GONE[name] in page.words
    assert f"{name} is not there" in page.words
    assert not any(words in page.words for file, words in GONE.items() if file != name)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = run_folder(tmp_path / "a", records=PLAIN)
    (folder / name).write_bytes(b"<script>\n")
    page = page_of(folder, tmp_path)
    assert_harmless(page)
    assert f"{name} cannot be read" in page.words
    assert not any(words in page.words for file, words in GONE.items() if file != name)


def test_an_empty_folder_makes_a_page_that_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    page = page_of(tmp_path / "a", tmp_path)
    assert_harmless(page)
    assert all(words in page.words for words in GONE.values())
    assert all(f"{name} is not there" in page.words for name in FILES)
    assert not page.of("img")


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
    assert len(page.of("img")) == 1


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


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_the_command(tmp_path, monkeypatch, missing):
    folder = run_folder(tmp_path / "a")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'stableopt\[cli\]'"):
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
        for n in (1_000, 8_000)
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
