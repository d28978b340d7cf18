import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from helpers.environment import RECORD

STOP_TIMEOUT = 2.0  # seconds within which the stub must stop: the requirement
TIMEOUT = 30.0  # seconds for everything else, on a busy machine
POLL_INTERVAL = 0.02  # seconds

posix_only = pytest.mark.skipif(
    os.name == "nt", reason="Windows has neither fork nor signals that stop a process"
)

CONNECT = """
import os, sys
from helpers import connect
provider = connect()
print(sys.executable, os.getpid(), provider.url, sep="\\n")
"""

CALL = """
import urllib.request
provider.configure(first_token=600)
body = b'{"model": "gpt-3.5-turbo-instruct", "prompt": "Hello how are you?"}'
urllib.request.urlopen(provider.url + "/v1/completions", body)
"""

FORK = """
import warnings
warnings.simplefilter("ignore")  # Python 3.12 and later warn about forks
child = os.fork()
if child == 0:
    import signal
    while True:
        signal.pause()
print(child)
"""


class Kernel:
    """A kernel, started like JupyterLab does, in which connect() has been called."""

    def __init__(self, manager: type[KernelManager], folder: Path) -> None:
        specs = KernelSpecManager(
            kernel_dirs=[str(Path(sys.prefix, "share", "jupyter", "kernels"))]
        )
        self.manager = manager(kernel_name="python3", kernel_spec_manager=specs)
        environment = {**os.environ, "IPYTHONDIR": str(folder)}
        for name in ("LLM_PROVIDER_URL", RECORD):
            environment.pop(name, None)
        self.manager.start_kernel(env=environment)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.stubs: list[psutil.Process] = []
        self.children: list[psutil.Process] = []

    def connect(self) -> None:
        self.client.wait_for_ready(timeout=TIMEOUT)
        executable, pid, self.url = self.run(CONNECT).split()
        assert Path(executable) == Path(sys.executable)
        self.process = psutil.Process(int(pid))
        self.stubs = stubs_started_by(self.process)
        assert self.stubs

    def run(self, code: str) -> str:
        """Run a cell; return what it printed."""
        printed = []

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, output_hook=keep, timeout=TIMEOUT)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed)

    def start_long_call(self) -> str:
        """Start a cell that waits for the stub; return its message id."""
        # By default, an interrupted cell also aborts the requests that follow it.
        message_id: str = self.client.execute(CALL, stop_on_error=False)
        wait_until(lambda: stats(self.url)["in_flight"] == 1)
        return message_id

    def shut_down(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        for process in self.stubs + self.children:
            if is_running(process):
                process.kill()


def stubs_started_by(parent: psutil.Process) -> list[psutil.Process]:
    return [
        child
        for child in parent.children(recursive=True)
        if "llm_stub" in child.cmdline()
    ]


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ask(url: str, path: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = json.dumps(changes).encode() if changes else None
    method = "PATCH" if changes else "GET"
    request = urllib.request.Request(url + path, data, method=method)
    with opener.open(request, timeout=TIMEOUT) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def stats(url: str) -> dict[str, Any]:
    return ask(url, "/_provider/stats")


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"it took more than {timeout} s"
        time.sleep(POLL_INTERVAL)


def assert_stop_in_time(stubs: list[psutil.Process]) -> None:
    wait_until(lambda: not any(map(is_running, stubs)), STOP_TIMEOUT)


@pytest.fixture
def kernel(kernel_manager: type[KernelManager], tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(kernel_manager, tmp_path)
    try:
        kernel.connect()
        yield kernel
    finally:
        kernel.shut_down()


def test_stub_stops_when_the_kernel_is_shut_down(kernel: Kernel) -> None:
    kernel.manager.shutdown_kernel()
    assert_stop_in_time(kernel.stubs)


def test_temporary_files_of_a_killed_kernel_are_removed_with_its_manager(
    kernel_manager: type[KernelManager], tmp_path: Path
) -> None:
    kernel = Kernel(kernel_manager, tmp_path)
    try:
        kernel.client.wait_for_ready(timeout=TIMEOUT)
        folder = Path(kernel.run("import tempfile; print(tempfile.mkdtemp(), end='')"))
        kernel.manager.shutdown_kernel(now=True)
        assert folder.is_dir()
    finally:
        kernel.shut_down()
    del kernel
    gc.collect()
    assert not folder.exists()


def test_stub_survives_an_interrupt_and_still_answers(
    kernel: Kernel,
) -> None:
    message_id = kernel.start_long_call()
    kernel.manager.interrupt_kernel()
    reply = kernel.client._recv_reply(message_id, timeout=TIMEOUT)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    status = kernel.run(
        "provider.configure(first_token=0)\n"
        "print(urllib.request.urlopen(provider.url + '/v1/completions', body).status)"
    )
    assert status.strip() == "200"
    assert all(map(is_running, kernel.stubs))


def test_stub_stops_when_the_kernel_is_killed(kernel: Kernel) -> None:
    kernel.process.kill()
    assert_stop_in_time(kernel.stubs)


@posix_only
def test_stub_stops_when_the_kernel_is_killed_but_its_fork_still_runs(
    kernel: Kernel,
) -> None:
    child = psutil.Process(int(kernel.run(FORK)))
    kernel.children.append(child)
    kernel.process.kill()
    assert_stop_in_time(kernel.stubs)
    assert is_running(child), "the fork must keep the pipe open for the whole test"


@pytest.fixture
def stub_process() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If the tests run as a background job of a shell, SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield process
    process.kill()
    process.communicate()


def test_manually_started_stub_outlives_its_parent_and_its_standard_input() -> None:
    start_and_exit = (
        "import subprocess, sys\n"
        "stub = subprocess.Popen(\n"
        "    [sys.executable, '-m', 'llm_stub', '--port', '0'],\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "print(stub.stdout.readline(), flush=True)\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", start_and_exit],
        stdout=subprocess.PIPE,
        timeout=TIMEOUT,
        check=True,
    )
    ready = json.loads(parent.stdout)
    stub = psutil.Process(ready["pid"])
    try:
        with pytest.raises(psutil.TimeoutExpired):
            stub.wait(STOP_TIMEOUT)
        assert stats(ready["url"])["requests"] == 0
    finally:
        stub.kill()


@posix_only
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_signal_stops_a_manually_started_stub_during_a_call_without_a_traceback(
    stub_process: subprocess.Popen[str], stop: signal.Signals
) -> None:
    assert stub_process.stdout is not None
    url = json.loads(stub_process.stdout.readline())["url"]
    ask(url, "/_provider/config", {"first_token": 600})
    body = b'{"model": "gpt-3.5-turbo-instruct", "prompt": "Hello how are you?"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head % len(body) + b"\r\n" + body)
        wait_until(lambda: stats(url)["in_flight"] == 1)
        stub_process.send_signal(stop)
        stdout, stderr = stub_process.communicate(timeout=TIMEOUT)
    assert (stdout, stderr) == ("", "")
    assert stub_process.returncode in {0, -signal.SIGTERM}
