import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import helpers

SOURCES = Path(helpers.__file__).parents[1]
MODULES = sorted(SOURCES.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The full name of everything that a module imports, wherever in it."""
    package = path.relative_to(SOURCES).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def test_src_holds_the_two_packages() -> None:
    packages = {path.relative_to(SOURCES).parts[0] for path in MODULES}
    assert packages == {"helpers", "llm_stub"}


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(SOURCES).as_posix()
)
def test_neither_package_imports_the_other(path: Path) -> None:
    package = path.relative_to(SOURCES).parts[0]
    other = {"helpers": "llm_stub", "llm_stub": "helpers"}[package]
    assert other not in {name.partition(".")[0] for name in imports(path)}


def test_a_notebook_sees_three_names() -> None:
    public = {
        name
        for name, value in vars(helpers).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(helpers.__all__) == {"connect", "Timeline", "check"}


def test_importing_the_helpers_imports_nothing_heavy() -> None:
    code = "import sys, helpers; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    roots = {name.partition(".")[0] for name in found.split()}
    heavy = "matplotlib numpy langchain_core langchain_openai openai IPython aiohttp"
    assert roots & set(heavy.split()) == set()
    assert "helpers" in roots
