import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager
from openai import DefaultHttpxClient, OpenAI
from xdist.scheduler import LoadFileScheduling

from doctor import find_chromium
from helpers import connect
from helpers.connection import Provider, ProviderError, current
from helpers.environment import RECORD
from llm_stub.settings import Settings

# Slow files, slowest first. They start first, so that no worker is left running
# a slow file alone after the others have finished.
SLOW_FILES = [
    "test_lab.py",
    "test_durable_job.py",
    "test_awkward_environments.py",
    "test_bench.py",
    "06_stay_under_the_rate_limit.ipynb",
    "test_run_all.py",
    "test_live.py",
    "test_panel.py",
    "11_use_more_than_one_process.ipynb",
    "04_choose_threads_or_asyncio.ipynb",
    "test_exercises.py",
    "test_mutations.py",
    "test_interrupt.py",
    "05_bound_what_is_in_flight.ipynb",
    "02_use_a_thread_pool.ipynb",
    "07_survive_failures.ipynb",
    "test_cluster.py",
    "test_batch.py",
]


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Order the tests, and leave out a kernel's Run All if a browser does the same.

    First come the slow files, then the other notebooks, then the rest.
    """
    if find_chromium():
        in_browser = {
            mark.args
            for item in items
            for mark in item.iter_markers("runs_all")
            if item.path.parent.name == "browser"
        }
        twice = [
            item
            for item in items
            for mark in item.iter_markers("runs_all")
            if item.path.parent.name != "browser" and mark.args in in_browser
        ]
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in twice]

    def rank(item: pytest.Item) -> int:
        if item.path.name in SLOW_FILES:
            return SLOW_FILES.index(item.path.name)
        return len(SLOW_FILES) + (item.path.suffix != ".ipynb")

    items.sort(key=rank)


class LoadFileExceptRunAll(LoadFileScheduling):  # type: ignore[misc] # has no types
    """Keeps each file's tests in one worker, except those of two slow files.

    The tests of test_run_all.py share nothing, so each of them goes to the next free
    worker. In test_exercises.py, the tests of a lesson stay together.
    """

    def _split_scope(self, nodeid: str) -> str:
        if "test_exercises.py" in nodeid:
            return nodeid.partition("[")[2][:2] or nodeid
        return nodeid if "test_run_all.py" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return LoadFileExceptRunAll(config, log)


class SocketKernelManager(KernelManager):
    """Talks to its kernel over Unix sockets instead of TCP ports.

    Jupyter picks five free ports, but the kernel binds them only a second later.
    If another test has taken one of them by then, the kernel dies.
    """

    def __init__(self, **options: Any) -> None:
        # Removed with the manager, even if a child process is still writing there.
        self.folder = TemporaryDirectory(ignore_cleanup_errors=True)
        super().__init__(transport="ipc", ip=f"{self.folder.name}/kernel", **options)

    def start_kernel(
        self, *, env: Mapping[str, str] = os.environ, **options: Any
    ) -> None:
        """Start the kernel with this folder as TMPDIR.

        A killed kernel can't remove its temporary files, so we remove the folder. Each
        kernel starts its own stub, and doesn't use the stub of the process that
        started the kernel.
        """
        own = {name: text for name, text in env.items() if name != RECORD}
        super().start_kernel(env={**own, "TMPDIR": self.folder.name}, **options)


nbval.kernel.KernelManager = SocketKernelManager


@pytest.fixture(scope="session")
def link_environment() -> Callable[[Path], None]:
    """Give a copy of the project the `.venv` of these tests, without installing it."""

    def link(project: Path) -> None:
        # Links to what is in it. If run.py recreates .venv, it removes the links only.
        (project / ".venv").mkdir()
        for part in Path(sys.prefix).iterdir():
            (project / ".venv" / part.name).symlink_to(part)
        # run.py would recreate an environment that was set up in another folder.
        stamp = project / ".venv" / "installed.txt"
        stamp.unlink(missing_ok=True)
        lock = (project / "requirements.lock").read_bytes()
        version, digest = sys.version_info, hashlib.sha256(lock).hexdigest()
        text = f"python {version[0]}.{version[1]}, lock {digest}, in {project}\n"
        stamp.write_text(text, "utf-8")

    return link


@pytest.fixture(scope="session")
def kernel_manager() -> type[KernelManager]:
    return SocketKernelManager


@pytest.fixture(scope="session")
def stop_stub_at_exit() -> Iterator[None]:
    yield
    with suppress(ProviderError):  # no test has called connect()
        current().stop()


@pytest.fixture
def provider(stop_stub_at_exit: None) -> Iterator[Provider]:
    """A running stub with default settings and an empty journal."""
    with mock.patch.dict(os.environ):
        for name in ("LLM_PROVIDER_URL", RECORD):
            os.environ.pop(name, None)
        provider = connect(**Settings().model_dump())
        provider.ask("/_provider/journal?settle=5")
        provider.ask("/_provider/reset", "POST")
        yield provider


@pytest.fixture(scope="session")
def connections() -> Iterator[DefaultHttpxClient]:
    # Shared, because each client loads all certificates: 50 ms per test.
    with DefaultHttpxClient() as connections:
        yield connections


@pytest.fixture
def client(provider: Provider, connections: DefaultHttpxClient) -> OpenAI:
    """The SDK's own client, without retries."""
    return OpenAI(max_retries=0, http_client=connections)


@pytest.fixture
def until_in_flight(provider: Provider) -> Callable[[int], None]:
    """Wait until exactly this many calls are in flight."""

    def wait(calls: int) -> None:
        deadline = time.monotonic() + 10
        while (stats := provider.ask("/_provider/stats"))["in_flight"] != calls:
            assert time.monotonic() < deadline, stats

    return wait
