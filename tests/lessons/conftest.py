import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

KernelIn = Callable[[Path], AbstractContextManager[BlockingKernelClient]]


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
