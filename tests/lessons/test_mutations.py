"""A lesson whose code no longer does what it claims must fail in CI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from nbformat import NotebookNode

if TYPE_CHECKING:
    from .conftest import KernelIn

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
SETUP = "provider = connect("
SANITIZE = ROOT / "tests" / "nbval.cfg"

# Makes a kernel as good as new, but keeps the imported modules and the stub.
START_AGAIN = f"""\
%reset -f
import os
from helpers import connect
from llm_stub.settings import Settings
os.chdir({str(NOTEBOOKS)!r})
get_ipython().events.callbacks["pre_run_cell"].clear()
connect(**Settings().model_dump()).ask("/_provider/reset", "POST")
"""


@dataclass
class Mutation:
    """A change to a lesson, and the claim that is false after it."""

    lesson: str
    claim: str
    old: str
    new: str
    cells: tuple[str, ...] = ("",)
    """Run the setup cell and those that contain one of these; by default all."""
    without: tuple[str, ...] = ()
    """Of these, don't run those that contain one of these."""


MUTATIONS = [
    Mutation(
        "00_start_here",
        "one by one: never two in flight",
        "    for prompt in prompts:\n        llm.invoke(prompt)",
        "    llm.batch(prompts)",
    ),
    Mutation(
        "01_make_one_call",
        "one call in flight at a time",
        "for prompt in prompts:\n        answers.append(chat.invoke(prompt).content)",
        "answers = chat.batch(prompts)",
    ),
    Mutation(
        "02_use_a_thread_pool",
        "two calls were in flight at once",
        "as two:\n    with ThreadPoolExecutor(max_workers=2)",
        "as two:\n    with ThreadPoolExecutor(max_workers=1)",
    ),
    Mutation(
        "03_gather_coroutines",
        "all twelve were in flight together",
        "answer = await llm.ainvoke(prompt)\n    return threading",
        "answer = llm.invoke(prompt)\n    return threading",
    ),
    Mutation(
        "04_choose_threads_or_asyncio",
        "the pool size limits the calls",
        "[asyncio.to_thread(llm.invoke, prompt) for prompt in prompts]",
        "[llm.ainvoke(prompt) for prompt in prompts]",
        cells=("def run_pool", 'Timeline("to_thread")'),
    ),
    Mutation(
        "05_bound_what_is_in_flight",
        "the flood was hardly faster",
        "jitter=0, capacity=8",
        "jitter=0, capacity=48",
    ),
    Mutation(
        "06_stay_under_the_rate_limit",
        "and all others answered",
        "answered = [r for r in results if",
        "answered = [r for r in results[:0] if",
    ),
    Mutation(
        "07_survive_failures",
        "seven of nine were tried again",
        "timeout=1.5, max_retries=1",
        "timeout=1.5, max_retries=0",
    ),
    Mutation(
        "08_stream_and_show_progress",
        "the stream began in half the time",
        "[chunk.content async for chunk in llm.astream(prompt)]",
        "[(await llm.ainvoke(prompt)).content]",
    ),
    Mutation(
        "10_finish_the_job_tomorrow",
        "99 answers had come",
        'launch("list.py", kill_after=99)',
        'launch("list.py", kill_after=50)',
    ),
    Mutation(
        "11_use_more_than_one_process",
        "a fifth or less",
        "gc.freeze()\nfrozen",
        "frozen",
        cells=("from langchain_openai", "import time", "def full_coll", "frozen <"),
    ),
    Mutation(
        "12_let_the_provider_do_it",
        "twelve lines took more than 2.5 seconds",
        "batch_speed=4",
        "batch_speed=400",
    ),
    Mutation(
        "15_choose",
        "workers: the same 48 answers",
        "for name in here[1:]:\n    await score(name)",
        "await score('workers')\nrows['workers']['answers'].reverse()",
        without=("dask.close()", 'score("Batch API")'),
    ),
]


@pytest.fixture(scope="module")
def kernel(kernel_in: KernelIn) -> Iterator[BlockingKernelClient]:
    with kernel_in(NOTEBOOKS) as client:
        yield client


def run_cell(client: BlockingKernelClient, source: str) -> str:
    """Execute a cell; return its error, or an empty text."""
    message = client.execute(source, stop_on_error=False)
    while True:
        reply = client.get_shell_msg(timeout=120)
        if reply["parent_header"]["msg_id"] == message:
            error: str = reply["content"].get("evalue", "")
            return error


def cells_until(mutation: Mutation) -> list[str]:
    """The code of the cells that the mutation runs, up to the one with the claim."""
    path = NOTEBOOKS / f"{mutation.lesson}.ipynb"
    sources = [
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
        and any(part in cell.source for part in (SETUP, *mutation.cells))
        and not any(part in cell.source for part in mutation.without)
    ]
    _, _, claim = mutation.claim.rpartition(": ")  # what stands before may be computed
    last = next(i for i, source in enumerate(sources) if claim in source)
    return sources[: last + 1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.lesson)
def test_mutated_lesson_fails_at_its_claim(
    mutation: Mutation, kernel: BlockingKernelClient
) -> None:
    cells = cells_until(mutation)
    assert sum(cell.count(mutation.old) for cell in cells) == 1
    cells = [cell.replace(mutation.old, mutation.new) for cell in cells]

    assert run_cell(kernel, START_AGAIN) == ""
    errors = [run_cell(kernel, cell) for cell in cells]

    assert set(errors[:-1]) == {""}
    assert errors[-1].startswith(f"✗ {mutation.claim}\n")


def test_every_lesson_has_a_mutation() -> None:
    lessons = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    assert [mutation.lesson for mutation in MUTATIONS] == lessons


def test_nbval_fails_at_a_false_claim_and_at_an_output_edited_by_hand(
    tmp_path: Path,
) -> None:
    def cell(source: str, stored: str) -> NotebookNode:
        output = nbformat.v4.new_output("stream", name="stdout", text=stored)
        cell: NotebookNode = nbformat.v4.new_code_cell(source, outputs=[output])
        cell.execution_count = 1
        return cell

    cells = [
        cell('from helpers import check\ncheck("2 is 2", 2 == 2)', "✓ 2 is 2\n"),
        cell('check("2 is 2", 2 == 2)', "✓ 2 is 3\n"),
        cell('check("2 is 2", 2 == 3)', "✓ 2 is 2\n"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(notebook, tmp_path / "lesson.ipynb")
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "--nbval", "-rA"]
    options += [f"--nbval-sanitize-with={SANITIZE}", str(tmp_path)]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    verdicts = [
        line.split("lesson.ipynb::")
        for line in done.stdout.splitlines()
        if line.startswith(("PASSED ", "FAILED "))
    ]
    results = {cell.partition(" - ")[0]: result.split()[0] for result, cell in verdicts}
    assert results == {
        "Cell 0": "PASSED",
        "Cell 1": "FAILED",
        "Cell 2": "FAILED",
    }
    assert done.returncode == 1
