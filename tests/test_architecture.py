import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import helpers

HELPERS = Path(helpers.__file__).parent
PROVIDER = sorted((HELPERS / "provider").rglob("*.py"))
NOTEBOOK_SIDE = sorted(set(HELPERS.rglob("*.py")) - set(PROVIDER))


def imports(path: Path) -> set[str]:
    """The full names of all that a module imports, wherever in it."""
    package = ["helpers", *path.relative_to(HELPERS).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def lies_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_both_sides_have_modules() -> None:
    assert {"app.py", "wire.py"} <= {path.name for path in PROVIDER}
    assert {"connection.py", "timeline.py"} <= {path.name for path in NOTEBOOK_SIDE}


@pytest.mark.parametrize("path", PROVIDER, ids=lambda path: path.name)
def test_the_provider_imports_nothing_of_the_notebook_side(path: Path) -> None:
    ours = {name for name in imports(path) if lies_in(name, "helpers")}
    assert {name for name in ours if not lies_in(name, "helpers.provider")} == set()


@pytest.mark.parametrize("path", NOTEBOOK_SIDE, ids=lambda path: path.name)
def test_the_notebook_side_imports_nothing_of_the_provider(path: Path) -> None:
    found = {name for name in imports(path) if lies_in(name, "helpers.provider")}
    assert found == set()


@pytest.mark.parametrize(
    ("paths", "most"), [(NOTEBOOK_SIDE, 680), (PROVIDER, 3300)], ids=["notebook", "llm"]
)
def test_a_side_stays_small(paths: list[Path], most: int) -> None:
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in paths}
    assert sum(lines.values()) < most, lines


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
