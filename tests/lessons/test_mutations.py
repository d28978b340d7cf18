"""A lesson whose code no longer does what it claims must fail in CI."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ROOT / "tests" / "nbval.cfg"


def run_nbval(notebook: Path) -> subprocess.CompletedProcess[str]:
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "--nbval", "-x", "-q"]
    options += ["--nbval-cell-timeout=120", f"--nbval-sanitize-with={SANITIZE}"]
    command = [sys.executable, "-m", "pytest", *options, str(notebook)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def mutated_copy(name: str, until: str, old: str, new: str, folder: Path) -> Path:
    """Copy the notebook up to the cell that contains `until`, and change its code."""
    shutil.copy(ROOT / "notebooks" / "prompts.txt", folder)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if until in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    for cell in notebook.cells:
        if "article" not in cell.metadata.get("tags", []) and old in cell.source:
            cell.source = cell.source.replace(old, new)
            cell.metadata.tags = ["nbval-ignore-output"]  # only the check may fail
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.mark.parametrize(
    ("name", "claim", "old", "new"),
    [
        (
            "02_use_a_thread_pool",
            "two calls were in flight at once",
            "ThreadPoolExecutor(max_workers=2)",
            "ThreadPoolExecutor(max_workers=1)",
        ),
        (
            "03_gather_coroutines",
            "all twelve were in flight together",
            "answers = await asyncio.gather(*[llm.ainvoke(p) for p in prompts])",
            "answers = [await llm.ainvoke(p) for p in prompts]",
        ),
        (
            "05_bound_what_is_in_flight",
            "the semaphore held",
            "asyncio.Semaphore(8)",
            "asyncio.Semaphore(48)",
        ),
    ],
)
def test_mutated_lesson_fails_at_its_claim(
    name: str, claim: str, old: str, new: str, tmp_path: Path
) -> None:
    unchanged = mutated_copy(name, claim, old, old, tmp_path)
    assert old in unchanged.read_text("utf-8").replace('\\"', '"')

    result = run_nbval(mutated_copy(name, claim, old, new, tmp_path))

    assert result.returncode == 1
    assert f"✗ {claim}" in result.stdout


def test_output_edited_by_hand_fails(tmp_path: Path) -> None:
    path = mutated_copy("00_start_here", "sys.version_info", "", "", tmp_path)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata.tags = []
    nbformat.write(notebook, path)
    assert run_nbval(path).returncode == 0

    notebook.cells[-1].outputs[0].text = "Everything is fine.\n"
    nbformat.write(notebook, path)

    assert run_nbval(path).returncode == 1
