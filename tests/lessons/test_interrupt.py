"""What the stop button (■) stops: the tables of lessons 02 and 03, with a real kernel.

JupyterLab's button sends SIGINT to the kernel.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from helpers.connection import Provider

if TYPE_CHECKING:
    from .conftest import KernelIn, RunCell

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TIMEOUT = 60.0  # seconds for any one step, even on a busy machine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")

SETUP = """
import asyncio, os
from concurrent.futures import ThreadPoolExecutor, as_completed
from helpers import Timeline, connect
provider = connect(first_token=2, per_token=0, jitter=0)
from langchain_openai import ChatOpenAI
llm = ChatOpenAI(timeout=30)
prompts = [f"Question {number}" for number in range(12)]
answers = kept = []
print(os.getpid())
"""
MAP = """
with ThreadPoolExecutor(max_workers=4) as executor:
    answers = list(executor.map(llm.invoke, prompts))
"""
AS_COMPLETED = """
answers = []
with ThreadPoolExecutor(max_workers=4) as executor:
    futures = [executor.submit(llm.invoke, prompt) for prompt in prompts]
    for future in as_completed(futures):
        answers.append(future.result())
"""


def cells(lesson: str) -> list[Any]:
    [path] = NOTEBOOKS.glob(f"{lesson}_*.ipynb")
    return list(nbformat.read(path, as_version=4).cells)


def tagged(lesson: str, tag: str) -> str:
    """The source of the lesson's cell with this tag."""
    [cell] = [cell for cell in cells(lesson) if tag in cell.metadata.get("tags", [])]
    return str(cell.source)


def table(lesson: str) -> list[list[str]]:
    """The rows of the lesson's table about the stop button, without its head."""
    [text] = [cell.source for cell in cells(lesson) if "■" in cell.source[:400]]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    return [[field.strip() for field in row] for row in rows[2:]]


Interrupt = Callable[[str, int], None]


@pytest.fixture
def kernel(
    provider: Provider, kernel_in: KernelIn, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BlockingKernelClient]:
    monkeypatch.setenv("LLM_PROVIDER_URL", provider.url)
    with kernel_in(NOTEBOOKS) as client:
        yield client


@pytest.fixture
def interrupt(
    provider: Provider, kernel: BlockingKernelClient, run_cell: RunCell
) -> Interrupt:
    """Run a cell, press ■ when so many calls have been sent, and wait for its end."""
    process_id, error = run_cell(kernel, SETUP)
    assert error == ""

    def interrupt(source: str, sent: int) -> None:
        provider.ask("/_provider/reset", "POST")
        message = kernel.execute(source, stop_on_error=False)
        deadline = time.monotonic() + TIMEOUT
        while requests(provider) < sent:
            assert time.monotonic() < deadline
        os.kill(int(process_id), signal.SIGINT)
        while kernel.get_shell_msg(timeout=TIMEOUT)["parent_header"]["msg_id"] != (
            message
        ):
            pass

    return interrupt


def requests(provider: Provider) -> int:
    return int(provider.ask("/_provider/stats")["requests"])


def count(kernel: BlockingKernelClient, run_cell: RunCell, name: str) -> int:
    printed, _ = run_cell(kernel, f"print(len({name}))")
    return int(printed)


@pytest.mark.parametrize("row", range(3))
def test_interrupt_of_a_thread_pool_is_as_the_table_of_lesson_02_says(
    row: int,
    provider: Provider,
    kernel: BlockingKernelClient,
    interrupt: Interrupt,
    run_cell: RunCell,
) -> None:
    code = [MAP, AS_COMPLETED, tagged("02", "interrupt")][row]
    _, sent, answers = table("02")[row]

    interrupt(code, 8)  # four of twelve are answered, and four are in flight

    assert f"{requests(provider)} of 12" == sent
    kept = count(kernel, run_cell, "kept" if row == 2 else "answers")
    assert str(kept) == answers


def test_lesson_02_shows_the_code_that_its_table_is_about() -> None:
    codes = [code for code, _, _ in table("02")]

    assert "executor.map(" in codes[0]
    assert "answers = list(executor.map(" in MAP
    assert [re.sub("`", "", word) for word in codes[1].split(" and ")] == [
        "submit",
        "as_completed",
    ]
