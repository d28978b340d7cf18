import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import openai
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from helpers import Timeline, connect
from helpers.connection import Provider, ProviderError
from tests.helpers.conftest import (
    MODEL,
    PROMPT,
    TIMEOUT,
    ask_openai,
    free_port,
    kill,
    manually_started_stub,
    process_of,
    run_script,
    wait_until,
)

MAX_STARTUP = 2.0  # seconds from connect() to the first answer: the requirement

pytestmark = pytest.mark.usefixtures("clean_environment")


# Starting the stub


def test_second_connect_returns_the_same_stub() -> None:
    first = connect()
    process = process_of(first)
    second = connect()
    assert second is first
    assert process_of(second) == process


@pytest.mark.usefixtures("connected")
def test_second_connect_changes_only_the_given_settings() -> None:
    before = connect(seed=7).configure()
    after = connect(jitter=0.5).configure()
    assert after == {**before, "jitter": 0.5}
    assert after["seed"] == 7


def test_stub_listens_on_loopback_only(connected: Provider) -> None:
    process = process_of(connected)
    listening = [
        listener.laddr.ip
        for process in [process, *process.children()]
        for listener in process.net_connections(kind="inet")
        if listener.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_connect_works_in_a_plain_script_without_importing_ipython() -> None:
    assert run_script(
        "import json, sys\n"
        "from helpers import connect\n"
        "requests = connect().ask('/_provider/stats')['requests']\n"
        "print(json.dumps([requests, 'IPython' in sys.modules]))\n"
    ) == [0, False]


def test_first_answer_arrives_within_two_seconds_of_connect() -> None:
    def seconds() -> float:
        elapsed: float = run_script(
            "import time\n"
            "from langchain_openai import OpenAI\n"
            "start = time.perf_counter()\n"
            "from helpers import connect\n"
            "connect(first_token=0, per_token=0)\n"
            "OpenAI().invoke('Hello how are you?')\n"
            "print(time.perf_counter() - start)\n"
        )
        return elapsed

    # On a busy machine some starts are slow, but not all ten.
    assert any(seconds() < MAX_STARTUP for _ in range(10))


# The environment


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("earlier", [None, "http://127.0.0.1:9/v1"])
def test_openai_clients_use_the_stub_after_connect(earlier: str | None) -> None:
    names = "OPENAI_BASE_URL", "OPENAI_API_BASE"
    if earlier:
        os.environ.update(dict.fromkeys(names, earlier))
    url = connect().url
    assert [os.environ[name] for name in names] == [f"{url}/v1"] * 2
    assert ask_openai()


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(
    ("before", "after"), [(None, "stub"), ("", "stub"), ("sk-my-own", "sk-my-own")]
)
def test_api_key_is_set_only_if_there_is_none(before: str | None, after: str) -> None:
    if before is not None:
        os.environ["OPENAI_API_KEY"] = before
    connect()
    assert os.environ["OPENAI_API_KEY"] == after


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(("before", "after"), [(None, "false"), ("true", "true")])
def test_langsmith_tracing_is_off_unless_the_user_turned_it_on(
    before: str | None, after: str
) -> None:
    if before is not None:
        os.environ["LANGSMITH_TRACING"] = before
    connect()
    assert os.environ["LANGSMITH_TRACING"] == after


@pytest.mark.usefixtures("connected")
@pytest.mark.skipif(
    os.name == "nt", reason="on Windows, names of variables are case-insensitive"
)
@pytest.mark.parametrize(
    "before",
    [
        {},
        {"NO_PROXY": "intra.example"},
        {"no_proxy": "intra.example"},
        {"NO_PROXY": "intra.example", "no_proxy": "intra.example"},
        {"NO_PROXY": "*"},
        {"NO_PROXY": "intra.example, *"},
        {"no_proxy": "localhost, intra.example"},
    ],
    ids=str,
)
def test_no_proxy_keeps_its_hosts_and_gains_loopback(
    before: dict[str, str],
) -> None:
    os.environ |= {"HTTP_PROXY": "http://proxy.example:3128", **before}
    connect()
    for host in "127.0.0.1", "localhost":
        assert urllib.request.proxy_bypass(host)
    assert bool(before) == bool(urllib.request.proxy_bypass("intra.example"))


@pytest.mark.usefixtures("connected")
def test_no_proxy_does_not_grow_with_every_connect() -> None:
    os.environ["HTTP_PROXY"] = "http://proxy.example:3128"
    connect()
    once = os.environ["NO_PROXY"]
    connect()
    assert os.environ["NO_PROXY"] == once


@pytest.mark.usefixtures("connected")
def test_no_proxy_is_not_set_if_there_is_no_proxy() -> None:
    with mock.patch("urllib.request.getproxies", return_value={}):
        connect()
    assert not [name for name in os.environ if name.lower().endswith("_proxy")]


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_unreachable_proxy_does_not_break_calls(name: str) -> None:
    os.environ[name] = f"http://127.0.0.1:{free_port()}"
    connect()
    assert ask_openai()


# The user's API key


def test_api_key_is_in_no_process_arguments_and_not_in_the_journal() -> None:
    key = os.environ["OPENAI_API_KEY"] = "sk-a-key-of-the-user"
    provider = connect(first_token=0, per_token=0)
    ask_openai()
    assert key not in " ".join(process_of(provider).cmdline())
    journal = provider.ask("/_provider/journal")
    assert len(journal["attempts"]) == 1
    stats, settings = provider.ask("/_provider/stats"), provider.configure()
    for shown in (journal, stats, settings, provider):
        assert key not in repr(shown)


# The limit on open files

LOW_LIMIT = 256
CONNECTIONS = 400
MORE_THAN_THE_LIMIT = f"""
import json, resource, socket
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, ({LOW_LIMIT}, hard))
from helpers import connect
provider = connect()
soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
address = provider.url.removeprefix("http://").split(":")
count = {CONNECTIONS} if soft > {CONNECTIONS} else 0
connections = [socket.create_connection(address, 5) for _ in range(count)]
answered = 0
try:
    for connection in connections:
        connection.sendall(b"GET /_provider/stats HTTP/1.1\\r\\n")
        connection.sendall(b"Host: localhost\\r\\n\\r\\n")
    for connection in connections:
        answered += connection.recv(65536).startswith(b"HTTP/1.1 200")
except TimeoutError:
    pass
print(json.dumps([soft, hard, answered]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on open files")
def test_low_limit_on_open_files_is_raised_here_and_in_the_stub() -> None:
    soft, hard, answered = run_script(MORE_THAN_THE_LIMIT)
    if 0 < hard <= CONNECTIONS:
        pytest.skip(f"this machine allows only {hard} open files")
    assert soft > CONNECTIONS
    assert answered == CONNECTIONS


# LLM_PROVIDER_URL


@pytest.mark.parametrize("suffix", ["", "/"])
def test_manually_started_stub_is_used_and_left_running(suffix: str) -> None:
    with manually_started_stub() as url:
        os.environ["LLM_PROVIDER_URL"] = url + suffix
        provider = connect(first_token=0, per_token=0)
        assert provider.url == url
        assert ask_openai()
        assert provider.ask("/_provider/stats")["requests"] == 1
        provider.stop()
        assert provider.ask("/_provider/stats")["requests"] == 1


def assert_says_what_to_do(error: ProviderError, url: str) -> None:
    assert url in str(error)
    assert "LLM_PROVIDER_URL" in str(error)
    assert "python -m llm_stub --port" in str(error)
    assert "connect()" in str(error)


@pytest.mark.parametrize(
    "prefix", ["http://127.0.0.1:", "127.0.0.1:", "localhost:", ""]
)
def test_error_for_an_unreachable_url_names_it_and_says_what_to_do(prefix: str) -> None:
    url = os.environ["LLM_PROVIDER_URL"] = f"{prefix}{free_port()}"
    with pytest.raises(ProviderError) as caught:
        connect()
    assert_says_what_to_do(caught.value, url)


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 700\r\n\r\n{",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"",
    ],
    ids=["404", "not JSON", "truncated", "not HTTP", "nothing"],
)
def test_error_for_the_url_of_another_server_names_it_and_says_what_to_do(
    response: bytes,
) -> None:
    def serve() -> None:
        client, _ = server.accept()
        with client:
            client.recv(65536)
            client.sendall(response)

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        os.environ["LLM_PROVIDER_URL"] = url
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(ProviderError) as caught:
            connect()
        thread.join(TIMEOUT)
    assert_says_what_to_do(caught.value, url)


def test_error_for_a_url_that_ends_in_v1_names_it_and_says_what_to_do() -> None:
    with manually_started_stub() as url:
        os.environ["LLM_PROVIDER_URL"] = f"{url}/v1"
        with pytest.raises(ProviderError) as caught:
            connect()
        assert_says_what_to_do(caught.value, f"{url}/v1")


def test_connect_starts_a_stub_once_a_bad_url_is_unset() -> None:
    os.environ["LLM_PROVIDER_URL"] = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ProviderError):
        connect()
    del os.environ["LLM_PROVIDER_URL"]
    assert connect().ask("/_provider/stats")["requests"] == 0


def test_occupied_port_gives_a_one_line_error_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "llm_stub", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert f"can't listen on port {port}" in line
    assert "Choose another --port" in line


# Settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temprature", 1),
        ("first_token", -1),
        ("per_token", float("nan")),
        ("jitter", 1.5),
        ("seed", "seven"),
        ("models", []),
    ],
)
@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(
    "change",
    [connect, lambda **s: connect().configure(**s)],
    ids=["connect", "configure"],
)
def test_error_for_an_invalid_setting_names_it_and_its_value(
    change: Callable[..., object], setting: str, value: object
) -> None:
    with pytest.raises(ValueError, match=setting) as caught:
        change(**{setting: value})
    assert repr(value) in str(caught.value)


def test_behaving_applies_to_its_block_only(connected: Provider) -> None:
    before = connected.configure()
    with connected.behaving(first_token=0, models=[MODEL]) as provider:
        assert provider is connected
        inside = connected.configure()
    assert inside == {**before, "first_token": 0, "models": [MODEL]}
    assert connected.configure() == before


def test_behaving_restores_the_settings_after_an_error(connected: Provider) -> None:
    before = connected.configure()
    with pytest.raises(ZeroDivisionError), connected.behaving(seed=9):
        _ = 1 / 0
    assert connected.configure() == before


# A stub that stops while it is in use


def test_every_request_to_a_killed_stub_says_that_it_has_stopped() -> None:
    provider = connect()
    kill(provider)
    with pytest.raises(ProviderError, match=r"has stopped .* Run connect\(\) again"):
        provider.ask("/_provider/stats")
    with (
        pytest.raises(ProviderError, match=r"has stopped .* Run connect\(\) again"),
        Timeline("one call"),
    ):
        pass


def test_request_at_the_moment_the_stub_is_killed_says_that_it_has_stopped() -> None:
    def ask_until_error() -> NoReturn:
        while True:
            provider.ask("/_provider/stats")

    for _ in range(3):
        provider = connect()
        process_of(provider).kill()
        with pytest.raises(ProviderError, match="has stopped"):
            ask_until_error()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals like SIGABRT")
def test_message_for_a_crashed_stub_ends_with_its_error_output() -> None:
    os.environ["PYTHONFAULTHANDLER"] = "1"  # its traceback is the error output
    provider = connect()
    process_of(provider).send_signal(signal.SIGABRT)
    wait_until(lambda: provider.exit_code is not None)
    with pytest.raises(ProviderError) as caught:
        provider.ask("/_provider/stats")
    advice, _, output = str(caught.value).partition(" The end of its error output:\n")
    assert advice.endswith(
        "Run connect() again: it starts a new one at the same address."
    )
    assert "llm_stub/__main__.py" in output  # in the traceback
    assert len(output) <= 2000
    assert connect().ask("/_provider/stats")["requests"] == 0


def test_message_for_a_stopped_stub_is_one_line() -> None:
    provider = connect()
    provider.stop()
    with pytest.raises(ProviderError, match="has stopped") as caught:
        provider.ask("/_provider/stats")
    assert len(str(caught.value).splitlines()) == 1


def test_connect_restarts_at_the_same_address_so_existing_clients_work_again() -> None:
    first = connect(first_token=0, per_token=0)
    client = openai.OpenAI(max_retries=0)
    client.completions.create(model=MODEL, prompt=PROMPT)
    kill(first)
    with pytest.raises(openai.APIConnectionError):
        client.completions.create(model=MODEL, prompt=PROMPT)
    second = connect(first_token=0, per_token=0)
    assert second.url == first.url
    assert client.completions.create(model=MODEL, prompt=PROMPT).choices[0].text


def test_connect_uses_another_address_if_the_old_one_is_occupied() -> None:
    first = connect()
    kill(first)
    host, port = first.url.removeprefix("http://").split(":")
    with socket.create_server((host, int(port))):
        second = connect()
        assert second.url != first.url
        assert os.environ["OPENAI_BASE_URL"] == f"{second.url}/v1"
        assert second.ask("/_provider/stats")["requests"] == 0


class Cell:
    """The output of a cell and the error that it raised."""

    def __init__(self, client: BlockingKernelClient, code: str) -> None:
        self.stdout = self.stderr = self.error = ""
        client.execute_interactive(code, output_hook=self._keep, timeout=TIMEOUT)

    def _keep(self, message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            self.stdout += content["text"]
        elif message["msg_type"] == "stream":
            self.stderr += content["text"]
        elif message["msg_type"] == "error":
            self.error = f"{content['ename']}: {content['evalue']}"


@pytest.fixture
def kernel(
    kernel_manager: type[KernelManager], tmp_path: Path
) -> Iterator[BlockingKernelClient]:
    specs = KernelSpecManager(
        kernel_dirs=[str(Path(sys.prefix, "share", "jupyter", "kernels"))]
    )
    manager = kernel_manager(kernel_name="python3", kernel_spec_manager=specs)
    manager.start_kernel(env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=TIMEOUT)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def test_notebook_says_that_its_stub_was_killed_and_how_to_restart_it(
    kernel: BlockingKernelClient,
) -> None:
    advice = "Run connect() again: it starts a new one at the same address."
    setup = Cell(
        kernel,
        "from helpers import connect, Timeline\n"
        "provider = connect(first_token=600)\n"
        "from openai import OpenAI\n"
        "client = OpenAI(max_retries=0)\n"
        "def call():\n"
        f"    return client.completions.create(model={MODEL!r}, prompt='')\n"
        "print(provider.url, provider._process.pid)\n",
    )
    assert (setup.stderr, setup.error) == ("", "")
    url, pid = setup.stdout.split()

    provider = Provider(url)

    def kill_during_the_call() -> None:
        wait_until(lambda: provider.ask("/_provider/stats")["in_flight"] == 1)
        psutil.Process(int(pid)).kill()

    killer = threading.Thread(target=kill_during_the_call)
    killer.start()
    during = Cell(kernel, "call()")
    killer.join()
    assert during.error.startswith("APIConnectionError")
    # The call may fail shortly before the process is known to have ended.
    notice = during.stderr or Cell(kernel, "None").stderr
    assert notice.startswith("The stub has stopped (exit code ")
    assert notice.strip().endswith(advice)
    assert len(notice.splitlines()) == 1

    after = Cell(kernel, "with Timeline('one call'):\n    call()")
    assert after.error.startswith("ProviderError: The stub has stopped (exit code ")
    assert after.error.endswith(advice)

    again = Cell(
        kernel,
        "print(connect(first_token=0, per_token=0).url)\nprint(len(call().choices))",
    )
    assert again.stdout.split() == [url, "1"]
    assert (again.stderr, again.error) == ("", "")


def test_setting_that_is_no_json_is_a_value_error_that_names_it(
    provider: Provider,
) -> None:
    with pytest.raises(ValueError, match=r"'seed': <object .* can't be sent as JSON"):
        provider.configure(seed=object())


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_port_out_of_range_is_rejected_with_a_message(port: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llm_stub", "--port", port],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"--port must be from 0 to 65535, not {port}" in done.stderr
