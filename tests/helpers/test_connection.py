import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
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

from helpers import Timeline, connect, connection
from helpers.connection import Provider, ProviderError

PATIENCE = 30.0  # seconds that anything may take on a busy machine
FIRST_ANSWER = 2.0  # seconds from connect() to an answer: the requirement
POLL = 0.02
MODEL = "gpt-3.5-turbo-instruct"
ANSWERED = "Hello how are you?"

NOT_INHERITED = {
    "LLM_PROVIDER_URL",
    "LANGSMITH_TRACING",
    "OPENAI_API_BASE",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
}


@contextlib.contextmanager
def never_connected() -> Iterator[None]:
    """A process that never called connect(), and its environment afterwards."""
    with mock.patch.object(connection, "_current", None), mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name in NOT_INHERITED or name.lower().endswith("_proxy"):
                del os.environ[name]
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[Provider]:
    with never_connected():
        provider = connect(first_token=0, per_token=0)
    yield provider
    provider.stop()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = psutil.Process().children()
    with never_connected():
        yield
    for process in psutil.Process().children():
        if process not in before and is_provider(process):
            process.kill()


@pytest.fixture
def connected(shared: Provider) -> Provider:
    """A provider that runs already, so that connect() need not start one."""
    connection._current = shared
    shared.configure(seed=0, first_token=0, per_token=0, jitter=0.2, models=None)
    return shared


def is_provider(process: psutil.Process) -> bool:
    try:
        return "llm_stub" in process.cmdline()
    except psutil.NoSuchProcess:  # or a zombie
        return False


def process_of(provider: Provider) -> psutil.Process:
    assert provider._process is not None
    return psutil.Process(provider._process.pid)


def kill(provider: Provider) -> None:
    process_of(provider).kill()
    wait_until(lambda: provider.exit_code is not None)


def ask_openai() -> str:
    client = openai.OpenAI(max_retries=0, timeout=PATIENCE)
    return client.completions.create(model=MODEL, prompt=ANSWERED).choices[0].text


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"it took more than {PATIENCE} s"
        time.sleep(POLL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextlib.contextmanager
def started_by_hand() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.communicate()


def script(code: str) -> Any:
    """Run a script in a fresh Python; return the JSON that it prints."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# One provider


def test_a_second_connect_gives_the_same_provider() -> None:
    first = connect()
    process = process_of(first)
    second = connect()
    assert second is first
    assert process_of(second) == process


@pytest.mark.usefixtures("connected")
def test_a_second_connect_changes_the_settings_it_names_and_no_others() -> None:
    before = connect(seed=7).configure()
    after = connect(jitter=0.5).configure()
    assert after == {**before, "jitter": 0.5}
    assert after["seed"] == 7


def test_it_listens_on_loopback_only(connected: Provider) -> None:
    process = process_of(connected)
    listening = [
        place.laddr.ip
        for process in [process, *process.children()]
        for place in process.net_connections(kind="inet")
        if place.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_it_works_in_a_plain_script_and_does_not_import_ipython() -> None:
    assert script(
        "import json, sys\n"
        "from helpers import connect\n"
        "requests = connect().ask('/_provider/stats')['requests']\n"
        "print(json.dumps([requests, 'IPython' in sys.modules]))\n"
    ) == [0, False]


def test_the_first_answer_comes_within_two_seconds_of_connect() -> None:
    def seconds() -> float:
        taken: float = script(
            "import time\n"
            "from langchain_openai import OpenAI\n"
            "start = time.perf_counter()\n"
            "from helpers import connect\n"
            "connect(first_token=0, per_token=0)\n"
            "OpenAI().invoke('Hello how are you?')\n"
            "print(time.perf_counter() - start)\n"
        )
        return taken

    # A busy machine may be slow once; it need not be slow three times.
    assert any(seconds() < FIRST_ANSWER for _ in range(3))


# The environment


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("stale", [None, "http://127.0.0.1:9/v1"])
def test_the_openai_clients_are_pointed_at_it(stale: str | None) -> None:
    names = "OPENAI_BASE_URL", "OPENAI_API_BASE"
    if stale:
        os.environ.update(dict.fromkeys(names, stale))
    url = connect().url
    assert [os.environ[name] for name in names] == [f"{url}/v1"] * 2
    assert ask_openai()


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(
    ("before", "after"), [(None, "stub"), ("", "stub"), ("sk-my-own", "sk-my-own")]
)
def test_a_key_is_set_only_where_the_reader_has_none(
    before: str | None, after: str
) -> None:
    if before is not None:
        os.environ["OPENAI_API_KEY"] = before
    connect()
    assert os.environ["OPENAI_API_KEY"] == after


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(("before", "after"), [(None, "false"), ("true", "true")])
def test_langsmith_stays_silent_unless_the_reader_wants_it(
    before: str | None, after: str
) -> None:
    if before is not None:
        os.environ["LANGSMITH_TRACING"] = before
    connect()
    assert os.environ["LANGSMITH_TRACING"] == after


@pytest.mark.usefixtures("connected")
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no case in these names")
@pytest.mark.parametrize(
    "before",
    [
        {},
        {"NO_PROXY": "intra.example"},
        {"no_proxy": "intra.example"},
        {"NO_PROXY": "intra.example", "no_proxy": "intra.example"},
        {"NO_PROXY": "*"},
        {"no_proxy": "localhost, intra.example"},
    ],
    ids=str,
)
def test_hosts_without_a_proxy_stay_without_one_and_loopback_joins_them(
    before: dict[str, str],
) -> None:
    os.environ |= {"HTTP_PROXY": "http://proxy.example:3128", **before}
    connect()
    for host in "127.0.0.1", "localhost":
        assert urllib.request.proxy_bypass(host)
    assert bool(before) == bool(urllib.request.proxy_bypass("intra.example"))


@pytest.mark.usefixtures("connected")
def test_the_hosts_without_a_proxy_do_not_grow_with_every_connect() -> None:
    os.environ["HTTP_PROXY"] = "http://proxy.example:3128"
    connect()
    once = os.environ["NO_PROXY"]
    connect()
    assert os.environ["NO_PROXY"] == once


@pytest.mark.usefixtures("connected")
def test_where_there_is_no_proxy_none_is_spoken_of() -> None:
    with mock.patch("urllib.request.getproxies", return_value={}):
        connect()
    assert not [name for name in os.environ if name.lower().endswith("_proxy")]


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_that_leads_nowhere_does_not_break_calls(name: str) -> None:
    os.environ[name] = f"http://127.0.0.1:{free_port()}"
    connect()
    assert ask_openai()


# The reader's key


def test_the_key_is_in_no_process_arguments_and_not_in_the_journal() -> None:
    key = os.environ["OPENAI_API_KEY"] = "sk-a-key-of-the-reader"
    provider = connect(first_token=0, per_token=0)
    ask_openai()
    assert key not in " ".join(process_of(provider).cmdline())
    journal = provider.ask("/_provider/journal")
    assert len(journal["attempts"]) == 1
    for told in (
        journal,
        provider.ask("/_provider/stats"),
        provider.configure(),
        provider,
    ):
        assert key not in repr(told)


# The limit on open files

LOW_LIMIT = 256
MANY = 400
OVER_THE_LIMIT = f"""
import json, resource, socket
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, ({LOW_LIMIT}, hard))
from helpers import connect
provider = connect()
soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
place = provider.url.removeprefix("http://").split(":")
calls = [socket.create_connection(place, 5) for _ in range({MANY} * (soft > {MANY}))]
answered = 0
try:
    for call in calls:
        call.sendall(b"GET /_provider/stats HTTP/1.1\\r\\nHost: provider\\r\\n\\r\\n")
    for call in calls:
        answered += call.recv(65536).startswith(b"HTTP/1.1 200")
except TimeoutError:
    pass
print(json.dumps([soft, hard, answered]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_low_limit_on_open_files_is_raised_here_and_in_the_provider() -> None:
    soft, hard, answered = script(OVER_THE_LIMIT)
    if 0 < hard <= MANY:
        pytest.skip(f"this machine allows {hard} open files and no more")
    assert soft > MANY
    assert answered == MANY


# LLM_PROVIDER_URL


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_provider_started_by_hand_is_used_and_left_running(ending: str) -> None:
    with started_by_hand() as url:
        os.environ["LLM_PROVIDER_URL"] = url + ending
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
    "beginning", ["http://127.0.0.1:", "127.0.0.1:", "localhost:", ""]
)
def test_a_url_that_leads_nowhere_is_named_with_what_to_do(beginning: str) -> None:
    url = os.environ["LLM_PROVIDER_URL"] = f"{beginning}{free_port()}"
    with pytest.raises(ProviderError) as caught:
        connect()
    assert_says_what_to_do(caught.value, url)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 700\r\n\r\n{",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"",
    ],
    ids=["404", "no JSON", "half an answer", "no HTTP", "nothing"],
)
def test_a_url_of_another_server_is_named_with_what_to_do(answer: bytes) -> None:
    def serve() -> None:
        caller, _ = server.accept()
        with caller:
            caller.recv(65536)
            caller.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        os.environ["LLM_PROVIDER_URL"] = url
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(ProviderError) as caught:
            connect()
        thread.join(PATIENCE)
    assert_says_what_to_do(caught.value, url)


def test_the_api_address_in_place_of_the_provider_s_is_named_with_what_to_do() -> None:
    with started_by_hand() as url:
        os.environ["LLM_PROVIDER_URL"] = f"{url}/v1"
        with pytest.raises(ProviderError) as caught:
            connect()
        assert_says_what_to_do(caught.value, f"{url}/v1")


def test_once_a_bad_url_is_unset_connect_starts_a_provider_of_its_own() -> None:
    os.environ["LLM_PROVIDER_URL"] = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ProviderError):
        connect()
    del os.environ["LLM_PROVIDER_URL"]
    assert connect().ask("/_provider/stats")["requests"] == 0


def test_a_taken_port_is_one_clear_sentence_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "llm_stub", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
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
    "how", [connect, lambda **s: connect().configure(**s)], ids=["connect", "configure"]
)
def test_a_wrong_setting_is_named_with_its_value(
    how: Callable[..., object], setting: str, value: object
) -> None:
    with pytest.raises(ValueError, match=setting) as caught:
        how(**{setting: value})
    assert repr(value) in str(caught.value)


def test_a_wrong_setting_changes_nothing(connected: Provider) -> None:
    before = connected.configure()
    with pytest.raises(ValueError, match="jitter"):
        connected.configure(seed=1, jitter=2)
    assert connected.configure() == before


def test_behaving_holds_for_its_block_only(connected: Provider) -> None:
    before = connected.configure()
    with connected.behaving(first_token=0, models=[MODEL]):
        inside = connected.configure()
    assert inside == {**before, "first_token": 0, "models": [MODEL]}
    assert connected.configure() == before


def test_behaving_ends_with_its_block_after_an_error_too(connected: Provider) -> None:
    before = connected.configure()
    with pytest.raises(ZeroDivisionError), connected.behaving(seed=9):
        _ = 1 / 0
    assert connected.configure() == before


# A provider that ends while it is used


def test_a_killed_provider_is_what_every_question_to_it_says() -> None:
    provider = connect()
    kill(provider)
    with pytest.raises(ProviderError, match=r"has ended .* Run connect\(\) again"):
        provider.ask("/_provider/stats")
    with (
        pytest.raises(ProviderError, match=r"has ended .* Run connect\(\) again"),
        Timeline("one call"),
    ):
        pass


def test_that_it_has_ended_is_said_even_in_the_moment_of_its_end() -> None:
    def ask_on() -> NoReturn:
        while True:
            provider.ask("/_provider/stats")

    for _ in range(3):
        provider = connect()
        process_of(provider).kill()
        with pytest.raises(ProviderError, match="has ended"):
            ask_on()


def test_after_connect_at_the_same_address_a_client_built_before_works_again() -> None:
    first = connect(first_token=0, per_token=0)
    client = openai.OpenAI(max_retries=0)
    client.completions.create(model=MODEL, prompt=ANSWERED)
    kill(first)
    with pytest.raises(openai.APIConnectionError):
        client.completions.create(model=MODEL, prompt=ANSWERED)
    second = connect(first_token=0, per_token=0)
    assert second.url == first.url
    assert client.completions.create(model=MODEL, prompt=ANSWERED).choices[0].text


def test_where_the_address_was_taken_meanwhile_connect_finds_another() -> None:
    first = connect()
    kill(first)
    host, port = first.url.removeprefix("http://").split(":")
    with socket.create_server((host, int(port))):
        second = connect()
        assert second.url != first.url
        assert os.environ["OPENAI_BASE_URL"] == f"{second.url}/v1"
        assert second.ask("/_provider/stats")["requests"] == 0


class Cell:
    """What a cell wrote, and the error it ended with."""

    def __init__(self, client: BlockingKernelClient, code: str) -> None:
        self.stdout = self.stderr = self.error = ""
        client.execute_interactive(code, output_hook=self._keep, timeout=PATIENCE)

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
        client.wait_for_ready(timeout=PATIENCE)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def test_a_notebook_says_that_its_provider_was_killed_and_how_to_go_on(
    kernel: BlockingKernelClient,
) -> None:
    told = "Run connect() again: it starts a new one at the same address."
    begun = Cell(
        kernel,
        "from helpers import connect, Timeline\n"
        "provider = connect(first_token=600)\n"
        "from openai import OpenAI\n"
        "client = OpenAI(max_retries=0)\n"
        "def call():\n"
        f"    return client.completions.create(model={MODEL!r}, prompt='')\n"
        "print(provider.url, provider._process.pid)\n",
    )
    assert (begun.stderr, begun.error) == ("", "")
    url, pid = begun.stdout.split()

    provider = Provider(url)

    def kill_in_the_call() -> None:
        wait_until(lambda: provider.ask("/_provider/stats")["in_flight"] == 1)
        psutil.Process(int(pid)).kill()

    killer = threading.Thread(target=kill_in_the_call)
    killer.start()
    during = Cell(kernel, "call()")
    killer.join()
    assert during.error.startswith("APIConnectionError")
    # The call may fail a moment before the process counts as ended.
    said = during.stderr or Cell(kernel, "None").stderr
    assert said.startswith("The provider has ended (exit code ")
    assert said.strip().endswith(told)
    assert len(said.splitlines()) == 1

    after = Cell(kernel, "with Timeline('one call'):\n    call()")
    assert after.error.startswith("ProviderError: The provider has ended (exit code ")
    assert after.error.endswith(told)

    again = Cell(
        kernel,
        "print(connect(first_token=0, per_token=0).url)\nprint(len(call().choices))",
    )
    assert again.stdout.split() == [url, "1"]
    assert (again.stderr, again.error) == ("", "")
