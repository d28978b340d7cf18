"""What the stop button (■) stops: the tables of lessons 02 and 03, with a real kernel.

JupyterLab's button sends SIGINT to the kernel.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import psutil
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


# The cells that lesson 03's table is about.
GATHER = """
answers = []
answers = await asyncio.gather(*[llm.ainvoke(prompt) for prompt in prompts])
"""
APPEND = """
answers = []
async def ask(prompt):
    answers.append(await llm.ainvoke(prompt))
await asyncio.gather(*[ask(prompt) for prompt in prompts])
"""
BLOCKING = """
answers = []
async def ask(prompt):
    answers.append(llm.invoke(prompt))
await asyncio.gather(*[ask(prompt) for prompt in prompts[:4]])
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
    [text] = [cell.source for cell in cells(lesson) if "button (■)" in cell.source]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    return [[field.strip() for field in row] for row in rows[2:]]


Interrupt = Callable[..., None]


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
    """Run a cell, press ■ in the middle, and wait for its end.

    That is when so many calls have been sent and answered, and the kernel is waiting.
    """
    printed, error = run_cell(kernel, SETUP)
    assert error == ""
    process = psutil.Process(int(printed))

    def interrupt(source: str, sent: int, answered: int = 0) -> None:
        provider.ask("/_provider/reset", "POST")
        message = kernel.execute(source, stop_on_error=False)
        deadline = time.monotonic() + TIMEOUT
        busy = -1.0
        while (
            requests(provider) < sent
            or ended(provider, "200") < answered
            or busy != (busy := process.cpu_times().user)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)  # the kernel computes for less than this at each event
        process.send_signal(signal.SIGINT)
        while kernel.get_shell_msg(timeout=TIMEOUT)["parent_header"]["msg_id"] != (
            message
        ):
            pass

    return interrupt


def requests(provider: Provider) -> int:
    return int(provider.ask("/_provider/stats")["requests"])


def ended(provider: Provider, status: str) -> int:
    """How many calls have ended with this status."""
    return int(provider.ask("/_provider/stats")["statuses"].get(status, 0))


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


@pytest.mark.parametrize(("code", "row"), [(GATHER, 0), (APPEND, 1), (BLOCKING, 2)])
def test_interrupt_of_coroutines_is_as_the_table_of_lesson_03_says(
    code: str,
    row: int,
    provider: Provider,
    kernel: BlockingKernelClient,
    interrupt: Interrupt,
    run_cell: RunCell,
) -> None:
    _, effect, left = table("03")[row]
    provider.configure(first_token=5, jitter=0.5)  # the answers arrive one by one

    interrupt(code, *((1, 0) if row == 2 else (12, 2)))

    answered, cancelled = ended(provider, "200"), ended(provider, "disconnected")
    kept = count(kernel, run_cell, "answers")
    if row == 2:
        assert effect == "nothing until all the calls have finished"
        assert left == "all"
        assert kept == answered == 4
    else:
        assert effect == "cancels the other calls when the next answer arrives"
        assert answered >= 3
        assert cancelled == 12 - answered > 0
        assert left == ("none" if row == 0 else "the ones that had arrived before")
        assert (kept > 0) == (row == 1)
        assert kept < answered  # the one that arrived after ■ is lost


def test_lesson_02_shows_the_code_that_its_table_is_about() -> None:
    codes = [code for code, _, _ in table("02")]

    assert "executor.map(" in codes[0]
    assert "answers = list(executor.map(" in MAP
    assert [re.sub("`", "", word) for word in codes[1].split(" and ")] == [
        "submit",
        "as_completed",
    ]
