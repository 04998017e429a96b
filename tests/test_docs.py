"""Every example of the README and of the documentation runs and prints what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The fenced python blocks of a page, each with the line on which it starts."""
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in FENCE.finditer(text)]


def run_blocks(blocks: list[tuple[int, str]], page: str) -> int:
    """Run the blocks one after the other in one namespace; return the number of examples that failed."""
    names: dict[str, object] = {"__name__": "__main__"}
    failures = 0
    for line, block in blocks:
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, names, page, page, line - 1)
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            failures += runner.run(test, clear_globs=False).failed
            names = test.globs
        else:
            exec(compile("\n" * (line - 1) + block, page, "exec"), names)
    return failures


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_python_block_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as a user would find it
    failures = run_blocks(python_blocks(page.read_text(encoding="utf-8")), page.name)
    assert failures == 0, capsys.readouterr().out


def test_a_wrong_example_would_be_noticed() -> None:
    wrong = "text\n```python\n>>> 1 + 1\n3\n\n```\n"
    assert run_blocks(python_blocks(wrong), "wrong.md") == 1
    with pytest.raises(ZeroDivisionError):
        run_blocks(python_blocks("```python\n1 / 0\n```\n"), "wrong.md")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_exactly_two_set_up_commands() -> None:
    blocks = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    commands = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(commands) == 2
    assert "stableopt train" in commands[0]
    assert "pytest" in commands[1]
    assert all("-c constraints.txt" in command for command in commands)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name in navigation
