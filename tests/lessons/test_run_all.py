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

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


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
    [pytest.param(p, marks=pytest.mark.runs_all(p.stem), id=p.stem) for p in NOTEBOOKS],
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


def test_nest_asyncio2_answers_every_queued_cell(
    kernel_in: KernelIn, tmp_path: Path
) -> None:
    nested = (
        "import asyncio, nest_asyncio2\n"
        "nest_asyncio2.apply()\n"
        "asyncio.run(asyncio.sleep(0.5))"  # the others arrive while it runs
    )

    with kernel_in(tmp_path) as client:
        client.execute_interactive("0", timeout=30)
        statuses = replies(client, [nested, "2", "3", "4", "5"], within=30)

    assert statuses == ["ok"] * 5


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
