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

LIMIT = 2.0  # seconds in which a provider must be gone: the requirement
PATIENCE = 30.0  # seconds that anything else may take on a busy machine
POLL = 0.02

posix_only = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no fork and no signals to end a process by"
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
warnings.simplefilter("ignore")  # Python 3.12 and later warn of forks
child = os.fork()
if child == 0:
    import signal
    while True:
        signal.pause()
print(child)
"""


class Kernel:
    """A kernel in which connect() was called, as JupyterLab would start it."""

    def __init__(self, manager: type[KernelManager], folder: Path) -> None:
        specs = KernelSpecManager(
            kernel_dirs=[str(Path(sys.prefix, "share", "jupyter", "kernels"))]
        )
        self.manager = manager(kernel_name="python3", kernel_spec_manager=specs)
        environment = {**os.environ, "IPYTHONDIR": str(folder)}
        environment.pop("LLM_PROVIDER_URL", None)
        self.manager.start_kernel(env=environment)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.providers: list[psutil.Process] = []
        self.children: list[psutil.Process] = []

    def connect(self) -> None:
        self.client.wait_for_ready(timeout=PATIENCE)
        executable, pid, self.url = self.run(CONNECT).split()
        assert Path(executable) == Path(sys.executable)
        self.process = psutil.Process(int(pid))
        self.providers = providers_below(self.process)
        assert self.providers

    def run(self, code: str) -> str:
        """Run a cell; return what it printed."""
        printed = []

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(
            code, output_hook=keep, timeout=PATIENCE
        )
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed)

    def run_a_long_call(self) -> str:
        """Start a cell that waits for the provider; return its message id."""
        # An interrupted cell aborts what reaches the kernel soon after its error.
        message: str = self.client.execute(CALL, stop_on_error=False)
        wait_until(lambda: stats(self.url)["in_flight"] == 1)
        return message

    def end(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        for process in self.providers + self.children:
            if runs(process):
                process.kill()


def providers_below(parent: psutil.Process) -> list[psutil.Process]:
    return [
        child
        for child in parent.children(recursive=True)
        if "llm_stub" in child.cmdline()
    ]


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ask(url: str, path: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = json.dumps(changes).encode() if changes else None
    method = "PATCH" if changes else "GET"
    request = urllib.request.Request(url + path, data, method=method)
    with opener.open(request, timeout=PATIENCE) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def stats(url: str) -> dict[str, Any]:
    return ask(url, "/_provider/stats")


def wait_until(holds: Callable[[], bool], limit: float = PATIENCE) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, f"it took more than {limit} s"
        time.sleep(POLL)


def assert_gone_in_time(providers: list[psutil.Process]) -> None:
    wait_until(lambda: not any(map(runs, providers)), LIMIT)


@pytest.fixture
def kernel(kernel_manager: type[KernelManager], tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(kernel_manager, tmp_path)
    try:
        kernel.connect()
        yield kernel
    finally:
        kernel.end()


def test_the_provider_ends_when_the_kernel_is_shut_down(kernel: Kernel) -> None:
    kernel.manager.shutdown_kernel()
    assert_gone_in_time(kernel.providers)


def test_the_temporary_files_of_a_killed_kernel_go_with_its_manager(
    kernel_manager: type[KernelManager], tmp_path: Path
) -> None:
    kernel = Kernel(kernel_manager, tmp_path)
    try:
        kernel.client.wait_for_ready(timeout=PATIENCE)
        made = Path(kernel.run("import tempfile; print(tempfile.mkdtemp(), end='')"))
        kernel.manager.shutdown_kernel(now=True)
        assert made.is_dir()
    finally:
        kernel.end()
    del kernel
    gc.collect()
    assert not made.exists()


def test_the_provider_ends_when_the_kernel_is_restarted_and_connect_starts_another(
    kernel: Kernel,
) -> None:
    kernel.manager.restart_kernel()
    assert_gone_in_time(kernel.providers)
    kernel.connect()
    assert stats(kernel.url)["requests"] == 0


def test_the_provider_ends_when_the_kernel_is_restarted_in_a_running_cell(
    kernel: Kernel,
) -> None:
    kernel.run_a_long_call()
    kernel.manager.restart_kernel()
    assert_gone_in_time(kernel.providers)


def test_the_provider_survives_an_interrupt_and_answers_afterwards(
    kernel: Kernel,
) -> None:
    message = kernel.run_a_long_call()
    kernel.manager.interrupt_kernel()
    reply = kernel.client._recv_reply(message, timeout=PATIENCE)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    answered = kernel.run(
        "provider.configure(first_token=0)\n"
        "print(urllib.request.urlopen(provider.url + '/v1/completions', body).status)"
    )
    assert answered.strip() == "200"
    assert all(map(runs, kernel.providers))


def test_the_provider_ends_when_the_kernel_is_killed(kernel: Kernel) -> None:
    kernel.process.kill()
    assert_gone_in_time(kernel.providers)


@posix_only
def test_the_provider_ends_when_the_kernel_is_killed_and_a_fork_of_it_lives_on(
    kernel: Kernel,
) -> None:
    child = psutil.Process(int(kernel.run(FORK)))
    kernel.children.append(child)
    kernel.process.kill()
    assert_gone_in_time(kernel.providers)
    assert runs(child), "the fork was to hold the pipe open all the while"


@pytest.fixture
def by_hand() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, such as this run may be, ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield process
    process.kill()
    process.communicate()


def test_started_by_hand_it_outlives_its_standard_input_and_its_parent() -> None:
    start_and_leave = (
        "import subprocess, sys\n"
        "provider = subprocess.Popen(\n"
        "    [sys.executable, '-m', 'llm_stub', '--port', '0'],\n"
        "    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "print(provider.stdout.readline(), flush=True)\n"
    )
    left = subprocess.run(
        [sys.executable, "-c", start_and_leave],
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=True,
    )
    ready = json.loads(left.stdout)
    provider = psutil.Process(ready["pid"])
    try:
        with pytest.raises(psutil.TimeoutExpired):
            provider.wait(LIMIT)
        assert stats(ready["url"])["requests"] == 0
    finally:
        provider.kill()


@posix_only
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_started_by_hand_a_signal_ends_it_during_a_call_without_a_traceback(
    by_hand: subprocess.Popen[str], end: signal.Signals
) -> None:
    assert by_hand.stdout is not None
    url = json.loads(by_hand.stdout.readline())["url"]
    ask(url, "/_provider/config", {"first_token": 600})
    body = b'{"model": "gpt-3.5-turbo-instruct", "prompt": "Hello how are you?"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: provider\r\nContent-Length: %d\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as caller:
        caller.sendall(head % len(body) + b"\r\n" + body)
        wait_until(lambda: stats(url)["in_flight"] == 1)
        by_hand.send_signal(end)
        said, errors = by_hand.communicate(timeout=PATIENCE)
    assert (said, errors) == ("", "")
    assert by_hand.returncode in {0, -signal.SIGTERM}
