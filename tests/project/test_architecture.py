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
    """The full names of all imports in a module, inside functions too."""
    package = path.relative_to(SOURCES).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def test_slow_files_named_in_conftest_exist(pytestconfig: pytest.Config) -> None:
    tests = Path(__file__).parents[1]
    conftest = pytestconfig.pluginmanager.get_plugin(str(tests / "conftest.py"))
    assert conftest is not None
    files = [*tests.rglob("test_*.py"), *tests.parent.glob("notebooks/*.ipynb")]
    assert set(conftest.SLOW_FILES) - {path.name for path in files} == set()


def test_src_contains_exactly_two_packages() -> None:
    packages = {path.relative_to(SOURCES).parts[0] for path in MODULES}
    assert packages == {"helpers", "llm_stub"}


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(SOURCES).as_posix()
)
def test_neither_package_imports_the_other(path: Path) -> None:
    package = path.relative_to(SOURCES).parts[0]
    other = {"helpers": "llm_stub", "llm_stub": "helpers"}[package]
    assert other not in {name.partition(".")[0] for name in imports(path)}


def test_helpers_exports_exactly_three_names() -> None:
    public = {
        name
        for name, value in vars(helpers).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(helpers.__all__) == {"connect", "Timeline", "check"}


def test_importing_helpers_loads_no_heavy_package() -> None:
    code = "import sys, helpers; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded = {name.partition(".")[0] for name in output.split()}
    heavy = "matplotlib numpy langchain_core langchain_openai openai IPython aiohttp"
    assert loaded & set(heavy.split()) == set()
    assert "helpers" in loaded
