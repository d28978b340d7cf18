"""Run All, the way JupyterLab does it: all cells are queued at once.

nbval and nbclient send one cell at a time, so they can't notice a queued cell
that the kernel never runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING

import nbformat
import nbval.kernel
import pytest
from jupyter_client.blocking.client import BlockingKernelClient

if TYPE_CHECKING:
    from .conftest import KernelIn

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = [
    path
    for pattern in ("*.ipynb", "exercises/*.ipynb", "solutions/*.ipynb")
    for path in sorted(FOLDER.glob(pattern))
]


def name(path: Path) -> str:
    """The path below the folder `notebooks`, without its suffix."""
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def replies(
    client: BlockingKernelClient, cells: list[str], *, within: float
) -> list[str]:
    """Queue all cells; return each reply's status, or "lost" if it never arrived."""
    sent = [client.execute(cell, stop_on_error=False) for cell in cells]
    statuses: dict[str, str] = {}
    deadline = time.monotonic() + within
    while len(statuses) < len(sent) and time.monotonic() < deadline:
        try:
            reply = client.get_shell_msg(timeout=deadline - time.monotonic())
        except Empty:
            break
        if reply["parent_header"]["msg_id"] not in sent:
            continue  # a late reply to wait_for_ready
        content = reply["content"]
        error = content.get("evalue", "")
        status = content["status"] + (f": {error}" if error else "")
        statuses[reply["parent_header"]["msg_id"]] = status
    return [statuses.get(message, "lost") for message in sent]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.runs_all(name(path)), id=name(path))
        for path in NOTEBOOKS
    ],
)
def test_run_all_answers_every_cell(path: Path, kernel_in: KernelIn) -> None:
    cells = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]

    with kernel_in(path.parent) as client:
        statuses = replies(client, [cell.source for cell in cells], within=300)

    for cell, status in zip(cells, statuses, strict=True):
        if "raises-exception" in cell.metadata.get("tags", []):
            assert status.startswith("error"), cell.source
        else:
            assert status == "ok", cell.source


@pytest.mark.parametrize(
    ("shim", "ran"),
    [
        ("nest_asyncio", "only some, without an error"),
        ("nest_asyncio2", "all five"),
    ],
)
def test_run_all_with_a_shim_is_as_the_table_of_lesson_03_says(
    shim: str, ran: str, kernel_in: KernelIn, tmp_path: Path
) -> None:
    lesson = FOLDER / "03_gather_coroutines.ipynb"
    cells = nbformat.read(lesson, as_version=4).cells
    first = f"import asyncio, {shim}; {shim}.apply(); asyncio.run(asyncio.sleep(1))"

    with kernel_in(tmp_path) as client:
        client.execute_interactive("0", timeout=30)
        statuses = replies(client, [first, "2", "3", "4", "5"], within=10)

    assert any(f"| `{shim}` | {ran} |" in cell.source for cell in cells)
    assert set(statuses) == ({"ok"} if ran == "all five" else {"ok", "lost"})


def test_nbval_kernels_use_their_own_sockets_instead_of_ports() -> None:
    kernels = [nbval.kernel.start_new_kernel() for _ in range(2)]
    try:
        addresses = [manager.get_connection_info() for manager, _ in kernels]
    finally:
        for manager, client in kernels:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    assert [address["transport"] for address in addresses] == ["ipc", "ipc"]
    assert addresses[0]["ip"] != addresses[1]["ip"]
