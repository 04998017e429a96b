"""The house keeps its shape: imports go to the right only, every public definition is documented, nothing is unsafe."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stableopt"
LAYERS = [
    {"cli", "integrations"},
    {"report"},
    {"certify"},
    {"lyapunov"},
    {"nn", "optim"},
    {"constraints"},
    {"theory"},
    {"linalg"},
    {"errors", "files", "_version"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> list[str]:
    """Every module that a file imports, also inside functions; relative imports are made absolute."""
    package = ["stableopt", *file.relative_to(PACKAGE).parts[:-1]]
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
            module = ".".join(part for part in base if part)
            modules += [f"{module}.{alias.name}" for alias in node.names] if module == "stableopt" else [module]
    return modules


def imported_rooms(file: Path) -> set[str]:
    parts = [module.split(".") for module in imported_modules(file)]
    return {p[1] for p in parts if p[0] == "stableopt" and len(p) > 1}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_to_the_right_only(file: Path) -> None:
    room = room_of(file)
    if room in {"__init__", "__main__"}:
        return
    allowed = {other for other, level in LEVEL.items() if level > LEVEL[room]} | {room}
    assert imported_rooms(file) <= allowed


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above would be empty if the reader missed a form of import."""
    room = tmp_path / "linalg"
    room.mkdir()
    (room / "a.py").write_text(
        "import stableopt.nn\nfrom stableopt.optim import SGD\nfrom stableopt import cli\nfrom ..report import page\n"
        "def f():\n    from stableopt.certify.radius import g\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert imported_rooms(room / "a.py") == {"nn", "optim", "cli", "report", "certify"}


def test_geotorch_has_one_importer() -> None:
    importers = [f for f in FILES if any(m.split(".")[0] == "geotorch" for m in imported_modules(f))]
    assert importers == [PACKAGE / "constraints" / "manifolds.py"]


def test_the_verifier_stands_alone() -> None:
    """A folder of files that need numpy, the standard library and each other, each short enough to be read in one sitting."""
    folder = PACKAGE / "certify" / "verifier"
    sources = sorted(folder.glob("*.py"))
    assert {source.stem for source in sources} >= {"__init__", "__main__", "checking", "command", "files", "numbers"}
    for source in sources:
        text = source.read_text(encoding="utf-8")
        levels = {node.level for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert levels <= {0, 1}, f"{source} imports from outside of its folder"
        inside = "stableopt.certify.verifier"
        foreign = {m.split(".")[0] for m in imported_modules(source) if m != inside and not m.startswith(f"{inside}.")}
        assert foreign <= set(sys.stdlib_module_names) | {"numpy", "__future__"}, source
        assert not re.search(r"import pickle|allow_pickle=True|from stableopt|import stableopt", text), source
        assert len(text.splitlines()) < 400, source


def test_every_room_has_its_tests_and_its_page() -> None:
    for room in sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()):
        assert list((PACKAGE.parent / "tests" / room).glob("test_*.py")), f"no tests for {room}"
        page = {"lyapunov": "monitor"}.get(room, room)
        assert (PACKAGE.parent / "docs" / f"{page}.md").exists(), f"no page for {room}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_public_definition_is_documented(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module docstring"

    def visit(node: ast.AST, inside_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith(
                "_"
            ):
                overload = any("overload" in ast.unparse(d) for d in getattr(child, "decorator_list", []))
                assert overload or ast.get_docstring(child), f"{child.name} (line {child.lineno}) is not documented"
                if isinstance(child, ast.ClassDef):
                    visit(child, inside_class=True)

    visit(tree, inside_class=False)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_is_unsafe(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for pattern in (
        r"weights_only\s*=\s*False",
        r"\bpickle\.loads?\b",
        r"\beval\(\s*['\"]",
        r"yaml\.load\(",
        r"raise Exception\b",
    ):
        assert not re.search(pattern, text), pattern
    for load in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in load
