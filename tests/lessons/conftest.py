import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

KernelIn = Callable[[Path], AbstractContextManager[BlockingKernelClient]]
RunCell = Callable[[BlockingKernelClient, str], tuple[str, str]]


@pytest.fixture(scope="session")
def kernel_in(kernel_manager: type[KernelManager]) -> KernelIn:
    """Start a kernel in a folder; stop it at the end of the block."""

    @contextmanager
    def started(folder: Path) -> Iterator[BlockingKernelClient]:
        manager = kernel_manager(kernel_name="python3")
        assert manager.kernel_spec
        manager.kernel_spec.argv[0] = sys.executable
        manager.start_kernel(cwd=str(folder))
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            yield client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    return started


@pytest.fixture(scope="session")
def run_cell() -> RunCell:
    """Execute a cell; return what it printed, and the name of its error or ""."""

    def run(client: BlockingKernelClient, source: str) -> tuple[str, str]:
        printed: list[str] = []

        def collect(message: dict[str, Any]) -> None:
            if message["content"].get("name") == "stdout":
                printed.append(message["content"]["text"])

        reply = client.execute_interactive(
            source, stop_on_error=False, timeout=120, output_hook=collect
        )
        return "".join(printed), reply["content"].get("ename", "")

    return run
