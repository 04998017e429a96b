"""The page in a real browser: at two widths, in light and dark, without a network."""

from __future__ import annotations

import re

import numpy as np
import pytest

from stableopt.report import write_report
from tests.report.chromium import Chromium, find_chromium
from tests.report.folders import run_folder, watched_records
from tests.report.profiled import numbers, system, write_profile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium on this machine"),
]

VIEWS = [(1280, False), (1280, True), (390, False), (390, True)]
CONTRAST = 4.5  # WCAG 2.2, 1.4.3, for text of usual size
DRAWN = 3.0  # WCAG 2.2, 1.4.11, for what a drawing needs to be understood

WIDE = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + " " + e.textContent.slice(0, 40))
"""
BOXES = """
[...document.querySelectorAll("svg.plot")].map(e => { const b = e.getBoundingClientRect(); return [b.x, b.width, b.height]; })
"""
TEXTS = """
(() => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.data.trim() || node.parentElement.closest("title, style")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getClientRects()[0];
    const frame = node.parentElement.closest(".scroll");
    if (!box || box.width < 1 || (frame && box.right > frame.getBoundingClientRect().right)) continue;
    const style = getComputedStyle(node.parentElement);
    const svg = node.parentElement.closest("svg");
    seen.push({words: node.data.trim().slice(0, 40), color: svg ? style.fill : style.color,
      size: svg ? 12 * svg.getBoundingClientRect().width / 420 : parseFloat(style.fontSize),
      x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height});
  }
  return seen;
})()
"""
COLORS = """
(() => {
  const paper = getComputedStyle(document.body).backgroundColor;
  const shown = [...document.querySelectorAll("svg.plot .line, svg.plot .mark, svg.plot .guide, svg.plot .alarm, svg.plot .axis")];
  return [paper, [...new Set(shown.map(e => { const s = getComputedStyle(e); return s.stroke == "none" ? s.fill : s.stroke; }))]];
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    runs = {
        "alarms": [("a-run-with-a-rather-long-name_and_no_space_in_it-2026", watched_records(300, fault=120))],
        "pair": [("adamw", watched_records(300, seed=1)), ("sgd", watched_records(200, seed=2, fault=80))],
        "deep": [("forty-layers", watched_records(200, layers=40))],
        "long": [("long", watched_records(8000, layers=2))],
    }
    for name, folders in runs.items():
        written = [run_folder(root / name / run, records=records) for run, records in folders]
        write_report(written, root / f"{name}.html")
    profiled = [run_folder(root / "profile" / name, records=[]) for name in ("stable", "unstable")]
    write_profile(profiled[0])
    write_profile(profiled[1], numbers(growth=0.02), system(120, 0.02, seed=1))
    write_report(profiled, root / "profile.html")
    (root / "empty" / "nothing").mkdir(parents=True)
    write_report(root / "empty" / "nothing", root / "empty.html")
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    assert program is not None
    with Chromium(program, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def luminance(color) -> float:
    part = np.asarray(color, dtype=float) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(a, b) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def rgb(color: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", color)[:3]]


@pytest.mark.parametrize(("width", "dark"), VIEWS)
@pytest.mark.parametrize("name", ["alarms", "pair", "deep", "long", "profile", "empty"])
def test_the_page_fits_asks_for_nothing_and_complains_of_nothing(pages, browser, name, width, dark):
    browser.open(pages / f"{name}.html", width=width, dark=dark)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [(pages / f"{name}.html").as_uri()]
    complaints = [e for e in browser.events if e["method"] in {"Log.entryAdded", "Runtime.exceptionThrown"}]
    assert complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(WIDE) == []
    assert browser.evaluate("document.compatMode") == "CSS1Compat"
    assert browser.evaluate("document.scripts.length + document.images.length") == 0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("name", "width"), [("alarms", 1280), ("pair", 390), ("profile", 1280), ("profile", 390)])
def test_every_text_can_be_read(pages, browser, name, width, dark):
    """Contrast from the pixels: the background is the most frequent color of a box, the text the one furthest from it."""
    browser.open(pages / f"{name}.html", width=width, dark=dark)
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 200
    for text, (background, letters) in zip(texts, browser.colors(texts), strict=True):
        assert (luminance(background) < 0.1) == dark, text
        assert text["size"] >= 10, text
        assert contrast(rgb(text["color"]), background) >= CONTRAST, (text, background)
        assert contrast(letters, background) >= CONTRAST, (text, letters, background)


@pytest.mark.parametrize("dark", [False, True])
def test_every_line_stands_out_from_the_paper(pages, browser, dark):
    browser.open(pages / "deep.html", width=1280, dark=dark)
    paper, colors = browser.evaluate(COLORS)
    assert len(colors) >= 8
    assert all(contrast(rgb(color), rgb(paper)) >= DRAWN for color in colors), (paper, colors)
    assert (luminance(rgb(paper)) < 0.1) == dark


@pytest.mark.parametrize("width", [1280, 390])
def test_figures_are_drawn_and_use_the_width(pages, browser, width):
    browser.open(pages / "pair.html", width=width, dark=False)
    boxes = browser.evaluate(BOXES)
    assert len(boxes) > 20
    assert all(box[1] > (400 if width > 600 else 330) and box[2] > 50 for box in boxes)
    columns = {round(x) for x, _, _ in boxes}
    assert len(columns) == (2 if width > 600 else 1)
    place = "document.querySelector('svg.plot .line').getBoundingClientRect()"
    ((paper, line),) = browser.colors(
        [browser.evaluate(f"(b => ({{x: b.x, y: b.y, width: b.width, height: b.height}}))({place})")]
    )
    assert contrast(paper, line) >= DRAWN


def test_on_paper_it_is_light_and_whole(pages, browser):
    browser.open(pages / "alarms.html", width=1280, dark=True)
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    paper, colors = browser.evaluate(COLORS)
    ink = browser.evaluate("getComputedStyle(document.body).color")
    assert contrast(rgb(ink), (255, 255, 255)) >= CONTRAST
    assert rgb(paper) == [255.0, 255.0, 255.0]
    assert all(contrast(rgb(color), (255, 255, 255)) >= DRAWN for color in colors)
