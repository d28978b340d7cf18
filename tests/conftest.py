import os
import time
from collections.abc import Callable, Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager
from openai import DefaultHttpxClient, OpenAI
from xdist.scheduler import LoadFileScheduling

from helpers import connect, connection
from helpers.connection import Provider
from llm_stub.settings import Settings

# Files that mostly wait, the longest first. Begun last, they would keep one
# worker busy when the others have ended.
LONG = [
    "test_lab.py",
    "test_panel.py",
    "04_choose_threads_or_asyncio.ipynb",
    "test_run_all.py",
    "11_use_more_than_one_process.ipynb",
    "15_choose.ipynb",
    "test_cluster.py",
    "test_durable_job.py",
    "test_bench.py",
    "test_batch_lesson.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, then the other notebooks, then the rest."""

    def place(item: pytest.Item) -> int:
        if item.path.name in LONG:
            return LONG.index(item.path.name)
        return len(LONG) + (item.path.suffix != ".ipynb")

    items.sort(key=place)


class Parted(LoadFileScheduling):
    """A file's tests in one worker, but for Run All: the longest file by far.

    Its tests share nothing, so each goes to whoever is free.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "test_run_all.py" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return Parted(config, log)


class SocketKernelManager(KernelManager):
    """Speaks with its kernel over socket files, not over ports.

    Jupyter looks for five free ports and the kernel binds them a second later;
    by then another test may have one of them, and the kernel dies.
    """

    def __init__(self, **options: Any) -> None:
        # Removed with the manager; a child that still writes there must not fail it.
        self.folder = TemporaryDirectory(ignore_cleanup_errors=True)
        super().__init__(transport="ipc", ip=f"{self.folder.name}/kernel", **options)

    def start_kernel(
        self, *, env: Mapping[str, str] = os.environ, **options: Any
    ) -> None:
        """A killed kernel leaves its temporary files: they go with the folder."""
        super().start_kernel(env={**env, "TMPDIR": self.folder.name}, **options)


nbval.kernel.KernelManager = SocketKernelManager


@pytest.fixture(scope="session")
def kernel_manager() -> type[KernelManager]:
    return SocketKernelManager


@pytest.fixture(scope="session")
def stopped_at_the_end() -> Iterator[None]:
    yield
    if connection._current is not None:
        connection._current.stop()


@pytest.fixture
def provider(stopped_at_the_end: None) -> Iterator[Provider]:
    """A provider process with default settings and an empty journal."""
    with mock.patch.dict(os.environ):
        os.environ.pop("LLM_PROVIDER_URL", None)
        provider = connect(**Settings().model_dump())
        provider.ask("/_provider/journal?settle=5")
        provider.ask("/_provider/reset", "POST")
        yield provider


@pytest.fixture(scope="session")
def connections() -> Iterator[DefaultHttpxClient]:
    # Shared, as each would load all certificates anew: 50 ms a test.
    with DefaultHttpxClient() as connections:
        yield connections


@pytest.fixture
def client(provider: Provider, connections: DefaultHttpxClient) -> OpenAI:
    """The SDK's own client, as `OpenAI()` gives it, without retries."""
    return OpenAI(max_retries=0, http_client=connections)


@pytest.fixture
def until_in_flight(provider: Provider) -> Callable[[int], None]:
    """Wait until so many calls are in flight."""

    def wait(calls: int) -> None:
        deadline = time.monotonic() + 10
        while (stats := provider.ask("/_provider/stats"))["in_flight"] != calls:
            assert time.monotonic() < deadline, stats

    return wait
