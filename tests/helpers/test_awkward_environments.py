"""What connect() guarantees wherever it runs, with any environment variables.

- After connect(), clients reach the stub or nothing, even if connect() failed.
- A child process uses its parent's stub, and knows the user's own addresses.
- Threads that connect at the same time share one stub.
- A restarted kernel gets a new stub.
- No variable that the user has set for other programs breaks the clients.
"""

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import certifi
import langchain_openai
import openai
import psutil
import pytest
from jupyter_client.manager import KernelManager
from openai import AsyncOpenAI, OpenAI

from helpers import connect, environment
from helpers.connection import Provider, ProviderError
from tests.helpers.conftest import (
    TIMEOUT,
    ask_openai,
    free_port,
    is_stub,
    kill,
    manually_started_stub,
    process_of,
    run_script,
)
from tests.helpers.test_lifetime import Kernel, assert_stop_in_time, stats

ADDRESSES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
KEY = "sk-a-key-of-the-user"

pytestmark = pytest.mark.usefixtures("clean_environment")

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")


# A failed connect()


@pytest.fixture
def own_endpoint() -> Iterator[socket.socket]:
    """The user's own endpoint, set in the environment. No call may reach it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        os.environ.update(dict.fromkeys(ADDRESSES, url), OPENAI_API_KEY=KEY)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept()


@contextmanager
def another_server() -> Iterator[str]:
    """A server that answers every request with an empty JSON object."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *words: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def connect_with_an_unknown_setting() -> None:
    connect(temprature=1)


def connect_with_an_unknown_word_in_llm_live() -> None:
    os.environ["LLM_LIVE"] = "perhaps"
    connect()


def connect_to_an_unreachable_stub() -> None:
    os.environ["LLM_PROVIDER_URL"] = f"http://127.0.0.1:{free_port()}"
    connect()


def connect_to_openai_as_if_it_were_the_stub() -> None:
    os.environ["LLM_PROVIDER_URL"] = "https://api.openai.com"
    connect()


def connect_to_another_server() -> None:
    with another_server() as os.environ["LLM_PROVIDER_URL"]:
        connect()


def connect_in_live_mode_to_a_running_stub() -> None:
    os.environ["LLM_PROVIDER_URL"] = "http://127.0.0.1:8000"
    connect(live=True)


def connect_in_live_mode_with_an_unusable_key() -> None:
    os.environ["OPENAI_API_KEY"] = f"{KEY}\n"
    connect(live=True)


FAILING = [
    connect_with_an_unknown_setting,
    connect_with_an_unknown_word_in_llm_live,
    connect_to_an_unreachable_stub,
    connect_to_openai_as_if_it_were_the_stub,
    connect_to_another_server,
    connect_in_live_mode_to_a_running_stub,
    connect_in_live_mode_with_an_unusable_key,
]
failing = pytest.mark.parametrize("fail", FAILING, ids=lambda fail: fail.__name__)


def base_urls() -> set[str]:
    """Where new clients would send their calls."""
    chat, llm = langchain_openai.ChatOpenAI(), langchain_openai.OpenAI()
    clients = OpenAI(), AsyncOpenAI(), chat.root_client, llm.client._client
    return {str(client.base_url) for client in clients}


@failing
def test_without_a_stub_clients_reach_nothing_after_a_failed_connect(
    own_endpoint: socket.socket, fail: Callable[[], None]
) -> None:
    with pytest.raises((ProviderError, ValueError)):
        fail()
    if fail is connect_with_an_unknown_setting:  # it was rejected by a running stub
        assert ask_openai()
    else:
        assert base_urls() == {"http://127.0.0.1:9/v1/"}
        with pytest.raises(openai.APIConnectionError):
            ask_openai()


@failing
def test_with_a_running_stub_clients_still_reach_it_after_a_failed_connect(
    connected: Provider, own_endpoint: socket.socket, fail: Callable[[], None]
) -> None:
    with pytest.raises((ProviderError, ValueError)):
        fail()
    assert base_urls() == {f"{connected.url}/v1/"}
    assert ask_openai()


def test_clients_reach_nothing_if_the_stub_cannot_be_started(
    own_endpoint: socket.socket, tmp_path: Path
) -> None:
    (tmp_path / "llm_stub.py").write_text("raise SystemExit('no stub today')")
    os.environ["PYTHONPATH"] = str(tmp_path)
    with pytest.raises(ProviderError, match=r"could not be started.*no stub today"):
        connect()
    assert base_urls() == {"http://127.0.0.1:9/v1/"}
    del os.environ["PYTHONPATH"]
    connect(first_token=0, per_token=0)
    assert ask_openai()


def test_clients_reach_nothing_if_python_is_not_found(
    own_endpoint: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ProviderError, match=r"could not be started.*/no/such/python"):
        connect()
    assert base_urls() == {"http://127.0.0.1:9/v1/"}


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on open files there")
def test_process_without_a_free_file_gets_a_provider_error() -> None:
    script = (
        "import json, os, resource\n"
        "from helpers import connect\n"
        "from helpers.connection import ProviderError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "files = []\n"
        "try:\n"
        "    while True:\n"
        "        files.append(os.open(os.devnull, os.O_RDONLY))\n"
        "except OSError:\n"
        "    pass\n"
        "try:\n"
        "    connect()\n"
        "except ProviderError as error:\n"
        "    message = str(error)\n"
        "os.close(files.pop())\n"
        "print(json.dumps(message))\n"
    )
    assert run_script(script).startswith("The stub could not be started")


def test_clients_reach_nothing_if_live_mode_has_no_key() -> None:
    with pytest.raises(ProviderError, match="OPENAI_API_KEY"):
        connect(live=True)
    assert base_urls() == {"http://127.0.0.1:9/v1/"}


def test_next_connect_in_live_mode_still_uses_the_users_own_address() -> None:
    with manually_started_stub() as upstream:
        os.environ["OPENAI_BASE_URL"] = f"{upstream}/v1"
        os.environ["LLM_LIVE"] = "perhaps"
        with pytest.raises(ValueError, match="LLM_LIVE"):
            connect()
        os.environ["LLM_LIVE"] = "on"
        connect()
        assert ask_openai()
        assert stats(upstream)["requests"] == 1


# LLM_LIVE


@pytest.mark.parametrize("word", ["", "0", "false", "No", "OFF", " n ", "f"])
def test_the_usual_words_for_off_turn_live_mode_off(
    connected: Provider, word: str
) -> None:
    os.environ["LLM_LIVE"] = word
    assert connect() is connected
    assert not connected.live


def test_the_usual_words_for_on_turn_live_mode_on() -> None:
    os.environ["OPENAI_BASE_URL"] = f"http://127.0.0.1:{free_port()}/v1"
    for word in ("1", "true", "Yes", "ON", " y ", "t"):
        os.environ["LLM_LIVE"] = word
        assert connect().live


@pytest.mark.parametrize("word", ["perhaps", "2", "-", "live"])
def test_any_other_word_is_an_error_that_lists_the_allowed_words(
    connected: Provider, word: str
) -> None:
    os.environ["LLM_LIVE"] = word
    with pytest.raises(ValueError, match=f"LLM_LIVE='{word}'.*true.*false.*unset it"):
        connect()


# Child processes

CHILD = """
import json, multiprocessing, sys, urllib.request
from helpers import Timeline, connect
from helpers.connection import current

def child(pipe):
    if multiprocessing.get_start_method() == "fork":  # even before connect()
        with Timeline("inherited") as run:
            urllib.request.urlopen(current().url + "/v1/models").read()
        assert run.attempts == 1
    provider = connect()
    assert connect() is provider
    with Timeline("child") as run:
        urllib.request.urlopen(provider.url + "/v1/models").read()
    provider.stop()  # does nothing, because it's the parent's stub
    pipe.send([provider.url, provider.exit_code, repr(provider), run.attempts])

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    provider = connect(first_token=0, per_token=0, seed=7)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=child, args=[theirs])
    process.start()
    url, *rest = ours.recv()
    process.join()
    assert provider.exit_code is None
    seed = provider.configure()["seed"]
    print(json.dumps([url == provider.url, *rest, process.exitcode, seed]))
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=posix_only)])
def test_child_uses_its_parents_stub_and_does_not_own_it(
    method: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    process = subprocess.run(
        [sys.executable, script, method], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    same, exit_code, shown, attempts, child_exit_code, seed = json.loads(process.stdout)
    assert same
    assert exit_code is None
    assert shown == "<Provider: a stub of OpenAI on this machine, found running>"
    assert (attempts, child_exit_code, seed) == (1, 0, 7)


CONNECT = """
import json, os, urllib.request
from helpers import connect
provider = connect({live})
body = json.dumps({{"model": "m", "prompt": "Hi"}}).encode()
urllib.request.urlopen(os.environ["OPENAI_BASE_URL"] + "/completions", body).read()
print(json.dumps([provider.url, provider.live]))
"""


def connect_in_a_child(live: str = "") -> tuple[str, bool]:
    """Connect in a child and make a call; return the stub's address and mode."""
    url, is_live = run_script(CONNECT.format(live=live))
    return url, is_live


@pytest.fixture
def upstream() -> Iterator[str]:
    """The address of the user's own server, set in the environment."""
    with manually_started_stub() as url:
        os.environ["OPENAI_BASE_URL"] = f"{url}/v1"
        yield url


def test_child_in_live_mode_forwards_to_the_users_own_address(upstream: str) -> None:
    stub = connect()
    url, live = connect_in_a_child("live=True")
    assert live
    assert url not in (stub.url, upstream)
    assert stats(upstream)["requests"] == 1
    assert stats(stub.url)["requests"] == 0


def test_child_shares_the_live_stub_of_its_parent_and_its_cap(upstream: str) -> None:
    stub = connect(live=True)
    assert connect_in_a_child("live=True") == (stub.url, True)
    assert stub.ask("/_provider/stats")["live"]["calls"] == 1


def test_child_in_stub_mode_does_not_use_its_parents_live_stub(upstream: str) -> None:
    stub = connect(live=True)
    url, live = connect_in_a_child("live=False")
    assert not live
    assert url != stub.url
    assert stats(upstream)["requests"] == 0


def test_child_starts_its_own_stub_if_its_parents_does_not_answer() -> None:
    stub = connect()
    kill(stub)
    url, _ = connect_in_a_child()
    assert url != stub.url


def test_child_uses_the_stub_at_llm_provider_url_if_that_is_set() -> None:
    connect()
    with manually_started_stub() as os.environ["LLM_PROVIDER_URL"]:
        url = os.environ["LLM_PROVIDER_URL"]
        assert connect_in_a_child() == (url, False)
        assert stats(url)["requests"] == 1


def test_stub_at_llm_provider_url_is_not_used_once_that_is_unset() -> None:
    with manually_started_stub() as url:
        os.environ["LLM_PROVIDER_URL"] = url
        connect()
        del os.environ["LLM_PROVIDER_URL"]
        assert connect_in_a_child()[0] != url
        assert connect().url != url


def test_message_in_a_child_does_not_blame_llm_provider_url() -> None:
    stub = connect()
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from helpers import connect\n"
            "provider = connect()\n"
            "print('connected', flush=True)\n"
            "input()\n"
            "try:\n"
            "    provider.ask('/_provider/stats')\n"
            "except RuntimeError as error:\n"
            "    print(error)\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "connected\n"
    stub.stop()
    message, _ = child.communicate("continue\n", timeout=TIMEOUT)
    assert message.startswith(f"Can't reach the stub at {stub.url}")
    assert message.endswith("Run connect() again: it starts a new one.\n")


FORK_WHILE_CONNECTING = """
import json, os, subprocess, threading
from helpers import connect

start, starting, resume = subprocess.Popen, threading.Event(), threading.Event()

def slow_start(*args, **options):
    starting.set()
    resume.wait()
    return start(*args, **options)

subprocess.Popen = slow_start
thread = threading.Thread(target=connect)
thread.start()
starting.wait()
read, write = os.pipe()
if os.fork() == 0:
    subprocess.Popen = start
    os.write(write, connect().url.encode())
    os._exit(0)
in_child = os.read(read, 100).decode()
resume.set()
thread.join()
print(json.dumps([in_child, connect().url]))
"""


@posix_only
def test_process_forked_while_another_thread_connects_can_connect() -> None:
    in_child, in_parent = run_script(
        "import warnings; warnings.simplefilter('ignore')\n" + FORK_WHILE_CONNECTING
    )
    assert in_child.startswith("http://127.0.0.1:")
    assert in_child != in_parent


@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', '{"unknown": 1}'])
def test_malformed_record_of_the_parent_is_ignored(
    connected: Provider, text: str
) -> None:
    os.environ["LLM_STUB_OF_PARENT"] = text
    assert connect() is connected


# Threads


def test_threads_that_connect_at_the_same_time_share_one_stub() -> None:
    threads = 8
    barrier = threading.Barrier(threads)

    def connect_with_the_others(_: int) -> Provider:
        barrier.wait(TIMEOUT)
        return connect()

    before = set(filter(is_stub, psutil.Process().children()))
    with ThreadPoolExecutor(threads) as executor:
        providers = list(executor.map(connect_with_the_others, range(threads)))
    assert len({id(provider) for provider in providers}) == 1
    started = set(filter(is_stub, psutil.Process().children())) - before
    assert started == {process_of(providers[0])}


# Kernels


@pytest.fixture
def kernel(kernel_manager: type[KernelManager], tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(kernel_manager, tmp_path)
    try:
        kernel.connect()
        yield kernel
    finally:
        kernel.shut_down()


def test_stub_stops_when_the_kernel_restarts_and_connect_starts_a_new_one(
    kernel: Kernel,
) -> None:
    kernel.manager.restart_kernel()
    assert_stop_in_time(kernel.stubs)
    kernel.connect()
    assert stats(kernel.url)["requests"] == 0


def test_stub_stops_when_the_kernel_restarts_during_a_call(
    kernel: Kernel,
) -> None:
    kernel.start_long_call()
    kernel.manager.restart_kernel()
    assert_stop_in_time(kernel.stubs)


# The user's variables

NOWHERE = "http://127.0.0.1:9"
HOSTILE: dict[str, dict[str, str]] = {
    "SOCKS proxy": {"ALL_PROXY": "socks5://127.0.0.1:9"},
    "SOCKS proxy in lower case": {"all_proxy": "socks5h://127.0.0.1:9"},
    "SOCKS proxy in mixed case": {"Http_Proxy": "socks4://127.0.0.1:9"},
    "FTP proxy": {"HTTPS_PROXY": "ftp://127.0.0.1:9"},
    "proxy without a host": {"HTTP_PROXY": "http://"},
    "proxy with a bad port": {"HTTP_PROXY": f"{NOWHERE}x"},
    "proxy with half an address": {"HTTP_PROXY": "http://[::1"},
    "proxy with a line break": {"HTTP_PROXY": f"{NOWHERE}\n"},
    "unreachable proxies": dict.fromkeys(["HTTP_PROXY", "https_proxy"], NOWHERE),
    "LangChain's proxy": {"OPENAI_PROXY": NOWHERE},
    "NO_PROXY with networks": {
        "ALL_PROXY": NOWHERE,
        "NO_PROXY": "fd00::/8, 10.0.0.0/8",
    },
    "NO_PROXY with garbage": {"ALL_PROXY": NOWHERE, "no_proxy": "[::1, http://[,, a b"},
    "NO_PROXY with a star": {"HTTP_PROXY": NOWHERE, "NO_PROXY": "intra.example, *"},
    "missing certificates": {"SSL_CERT_FILE": "{folder}/missing.pem"},
    "empty certificates": {"SSL_CERT_FILE": "{folder}/empty"},
    "folder as certificates": {"SSL_CERT_FILE": "{folder}"},
    "missing folder of certificates": {"SSL_CERT_DIR": "{folder}/missing"},
    "file as a folder of certificates": {"SSL_CERT_DIR": "{folder}/empty"},
    "unwritable key log": {"SSLKEYLOGFILE": "{folder}/missing/log"},
    "key with a line break": {"OPENAI_API_KEY": f"{KEY}\n"},
    "key in quotes": {"OPENAI_API_KEY": f"“{KEY}”"},
    "key that isn't text": {"OPENAI_API_KEY": "sk-\udcff"},
    "blank key": {"OPENAI_API_KEY": " "},
    "other keys": {"OPENAI_ADMIN_KEY": "a\n", "OPENAI_WEBHOOK_SECRET": "ключ"},
    "organization id": {"OPENAI_ORG_ID": "org\n"},
    "organization": {"OPENAI_ORGANIZATION": "Müller"},
    "project": {"OPENAI_PROJECT_ID": "\tproject"},
    "custom host": {"OPENAI_CUSTOM_HEADERS": "Host: gateway.example"},
    "custom length": {"OPENAI_CUSTOM_HEADERS": "Content-Length: 1"},
    "bad custom headers": {"OPENAI_CUSTOM_HEADERS": "X Y: ü\nnothing\n: b"},
    "Azure": {"OPENAI_API_TYPE": "azure", "OPENAI_API_VERSION": "2024-02-01"},
    "Azure's key": {"AZURE_OPENAI_API_KEY": "a", "AZURE_OPENAI_ENDPOINT": NOWHERE},
    "Azure's token": {"AZURE_OPENAI_AD_TOKEN": "a"},
    "address without a scheme": {"OPENAI_BASE_URL": "gateway.example/v1"},
    "malformed address": {"OPENAI_API_BASE": "http://[\n"},
    "LangSmith's gateway": {"LANGSMITH_GATEWAY": "1", "LANGSMITH_API_KEY": "a\n"},
    "LangChain's old tracing": {"LANGCHAIN_TRACING": "true"},
    "LangChain's old handler": {"LANGCHAIN_HANDLER": "langchain"},
    "LangChain's content blocks": {"LC_OUTPUT_VERSION": "v1"},
    "LangChain's stream timeout": {"LANGCHAIN_OPENAI_STREAM_CHUNK_TIMEOUT_S": "0.001"},
    "LangChain's socket options": {"LANGCHAIN_OPENAI_TCP_KEEPIDLE": "soon"},
    "verbose logging": {"OPENAI_LOG": "debug"},
    "unknown logging": {"OPENAI_LOG": "everything"},
    "default login": {"NETRC": "{folder}/netrc", "HOME": "{folder}"},
    "malformed logins": {"NETRC": "{folder}/garbage"},
    "warnings as errors": {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that HOSTILE names."""
    login = "default login somebody password secret\n"
    files = {"netrc": login, ".netrc": login, "garbage": "}{", "empty": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return tmp_path


@pytest.fixture
def few_certificates(tmp_path: Path) -> None:
    """Save each client the 20 ms that loading all certificates takes."""
    end = "-----END CERTIFICATE-----\n"
    first, _, _ = Path(certifi.where()).read_text().partition(end)
    (tmp_path / "one.pem").write_text(first + end)
    os.environ["SSL_CERT_FILE"] = str(tmp_path / "one.pem")


async def answers(timeout: float) -> list[str]:
    """What each kind of client gets from the stub.

    LangChain's clients share their connections if they have the same timeout.
    """
    import httpx  # version 2 of the SDK is based on it
    import langchain_openai
    import openai

    models = f"{openai.OpenAI().base_url}models"
    hello: Any = {"model": "m", "prompt": "Hello"}
    options: Any = {"timeout": timeout, "max_retries": 0}
    chat: Any = langchain_openai.ChatOpenAI(**options)
    llm = langchain_openai.OpenAI(**options)
    embeddings = langchain_openai.OpenAIEmbeddings(
        check_embedding_ctx_length=False, **options
    )
    with openai.OpenAI(**options) as client:
        found = [
            httpx.get(models).text,
            client.completions.create(**hello).choices[0].text,
            chat.invoke("Hello").content,
            llm.invoke("Hello"),
            str(embeddings.embed_query("Hello")),
        ]
    async with (
        openai.AsyncOpenAI(**options) as on_httpx,
        openai.DefaultAioHttpClient() as connections,
        openai.AsyncOpenAI(http_client=connections, **options) as on_aiohttp,
    ):
        return [
            *found,
            (await on_httpx.completions.create(**hello)).choices[0].text,
            (await on_aiohttp.completions.create(**hello)).choices[0].text,
            (await chat.ainvoke("Hello")).content,
            "".join([chunk.content async for chunk in chat.astream("Hello")]),
            await llm.ainvoke("Hello"),
        ]


@pytest.mark.parametrize("variables", HOSTILE.values(), ids=HOSTILE)
def test_clients_work_with_any_environment_variables(
    connected: Provider,
    folder: Path,
    few_certificates: None,
    variables: dict[str, str],
) -> None:
    connected.configure(per_token=0.005)
    for name, text in variables.items():
        os.environ[name] = text.format(folder=folder)
    connect()
    unique = TIMEOUT + list(HOSTILE.values()).index(variables)
    received = asyncio.run(answers(timeout=unique))
    assert all(isinstance(text, str) and text for text in received)
    connect()
    assert ask_openai()


def test_stub_and_clients_work_if_all_variables_are_set_before_python_starts(
    folder: Path,
) -> None:
    for variables in HOSTILE.values():
        for name, text in variables.items():
            os.environ[name] = text.format(folder=folder)
    received = run_script(
        "import asyncio, json, helpers\n"
        "from typing import Any\n"
        "helpers.connect(first_token=0, per_token=0.005)\n"
        f"{inspect.getsource(answers)}\n"
        "print(json.dumps(asyncio.run(answers(timeout=30))))\n"
    )
    assert all(received)


def test_module_level_sdk_client_uses_the_stub_even_if_azure_is_configured(
    connected: Provider,
) -> None:
    script = (
        "import json\n"
        "from helpers import connect\n"
        "connect()\n"
        "import openai\n"
        "openai.completions.create(model='m', prompt='Hello')\n"
        "print(json.dumps('answered'))\n"
    )
    os.environ["OPENAI_API_TYPE"] = "azure"
    os.environ["AZURE_OPENAI_API_KEY"] = KEY
    os.environ["AZURE_OPENAI_ENDPOINT"] = NOWHERE
    assert run_script(script) == "answered"


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": "http://user:pass%20word@proxy.example:3128"},
        {"https_proxy": "proxy.example:3128"},
        {"ALL_PROXY": "https://[fd00::1]:3128/"},
        {"FTP_PROXY": "ftp://proxy.example"},
        {"SSL_CERT_FILE": certifi.where()},
        {"SSLKEYLOGFILE": "{folder}/log"},
        {"OPENAI_API_KEY": KEY, "OPENAI_ORG_ID": "org-1", "OPENAI_PROJECT_ID": "p 1"},
        {"LANGCHAIN_TRACING_V2": "true", "OPENAI_LOG": "info"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_harmless_variables_are_left_alone(
    connected: Provider, folder: Path, variables: dict[str, str]
) -> None:
    expected = {name: text.format(folder=folder) for name, text in variables.items()}
    os.environ.update(expected)
    connect()
    assert {name: os.environ[name] for name in expected} == expected


def test_live_stub_gets_the_variables_that_connect_removed(folder: Path) -> None:
    transport = {
        "ALL_PROXY": "socks5://proxy.example",
        "https_proxy": "socks5://proxy.example",
        "SSL_CERT_FILE": str(folder / "missing.pem"),
    }
    headers = {"OPENAI_CUSTOM_HEADERS": "X-Team: a", "OPENAI_API_KEY": KEY}
    unreadable = {"SSLKEYLOGFILE": str(folder / "missing" / "log")}
    own = {"OPENAI_BASE_URL": f"{NOWHERE}/own"}
    os.environ |= transport | headers | unreadable | own
    children = set(psutil.Process().children())

    def environments() -> tuple[dict[str, str], dict[str, str]]:
        [stub] = {*filter(is_stub, psutil.Process().children())} - children
        return dict(os.environ), stub.environ()

    connect()
    here, in_stub = environments()
    hidden = {*transport, "OPENAI_CUSTOM_HEADERS", *unreadable}
    assert not hidden & {*here}
    assert not {*hidden, *own, *headers, "LLM_STUB_OF_PARENT"} & {*in_stub}

    for _ in range(2):
        connect(live=True)
        here, in_stub = environments()
        assert not {*transport, *unreadable} & {*here}
        assert headers.items() <= here.items()
        assert (transport | own).items() <= in_stub.items()
        hidden = {*unreadable, "OPENAI_API_KEY", "LLM_STUB_OF_PARENT"}
        assert not hidden & {*in_stub}


def test_live_stub_of_a_child_gets_the_variables_that_its_parent_removed(
    upstream: str,
) -> None:
    os.environ["https_proxy"] = "socks5://proxy.example"
    connect()
    script = (
        "import json, psutil\n"
        "from helpers import connect\n"
        "connect(live=True)\n"
        "[stub] = psutil.Process().children()\n"
        "print(json.dumps(stub.environ()))\n"
    )
    in_stub = run_script(script)
    assert in_stub["https_proxy"] == "socks5://proxy.example"
    assert in_stub["OPENAI_BASE_URL"] == f"{upstream}/v1"


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_ORGANIZATION"]
)
def test_live_mode_names_the_variable_that_cannot_be_sent_in_a_header(
    name: str, upstream: str
) -> None:
    os.environ[name] = "value\n"
    connect()
    for _ in range(2):
        with pytest.raises(ProviderError, match=f"{name}.*line break.*Correct it"):
            connect(live=True)
    os.environ[name] = "value"
    assert connect(live=True).live
    assert os.environ[name] == "value"


def test_variable_that_the_user_has_corrected_is_used(connected: Provider) -> None:
    os.environ["ALL_PROXY"] = "socks5://127.0.0.1:9"
    connect()
    assert "ALL_PROXY" not in os.environ
    os.environ["ALL_PROXY"] = NOWHERE
    connect()
    assert os.environ["ALL_PROXY"] == NOWHERE
    assert ask_openai()


# Bedrock, which the openai SDK can also call

BEDROCK = """
import json, openai
{early}
from helpers import connect
try:
    connect({arguments})
except ValueError:
    pass
client = {client}(max_retries=0)
try:
    message = [dict(role="user", content="Hi")]
    answer = client.chat.completions.create(model="m", messages=message)
    print(json.dumps(answer.choices[0].message.content))
except openai.APIConnectionError:
    print(json.dumps("not reached"))
"""


@pytest.mark.parametrize(
    ("arguments", "reached"), [("", True), ("typo=1", True), ("live=True", False)]
)
def test_bedrock_clients_reach_the_stub_or_nothing(
    upstream: str, arguments: str, reached: bool
) -> None:
    os.environ |= {"AWS_REGION": "us-east-1", "AWS_BEARER_TOKEN_BEDROCK": "secret"}
    script = {"early": "", "client": "openai.BedrockOpenAI", "arguments": arguments}
    answer = run_script(BEDROCK.format(**script))
    assert (answer != "not reached") == reached
    assert stats(upstream)["requests"] == 0


def test_module_client_that_is_set_to_bedrock_reaches_the_stub(upstream: str) -> None:
    os.environ |= {"AWS_REGION": "us-east-1", "AWS_BEARER_TOKEN_BEDROCK": "secret"}
    os.environ["OPENAI_API_TYPE"] = "amazon-bedrock"
    early = "openai.api_type  # read before connect() can unset it"
    module = "(lambda **options: openai)"
    script = {"early": early, "client": module, "arguments": ""}
    assert run_script(BEDROCK.format(**script)) != "not reached"


def test_keys_are_not_copied_to_another_variable() -> None:
    os.environ |= {
        "AZURE_OPENAI_API_KEY": "secret-1",
        "AZURE_OPENAI_AD_TOKEN": "secret-2",
    }
    os.environ["OPENAI_API_KEY"] = "secret-3\n"
    connect()
    assert not [name for name, text in os.environ.items() if "secret-" in text]


@pytest.mark.parametrize("arguments", ["", "typo=1"])
def test_module_client_that_was_looked_at_before_reaches_the_stub(
    arguments: str,
) -> None:
    module = "(lambda **options: openai)"
    script = {"early": "repr(openai.chat)", "client": module, "arguments": arguments}
    assert run_script(BEDROCK.format(**script)) != "not reached"


RECORDS = ['{"aside": {"A": 1}}', '{"aside": []}', '{"own": {"OPENAI_BASE_URL": 1}}']
RECORDS += ['{"started_with": []}', '{"count": 1}', "garbage", "[1]", '{"url": null}']


@pytest.mark.parametrize("record", RECORDS)
def test_malformed_record_is_ignored(record: str) -> None:
    os.environ["LLM_STUB_OF_PARENT"] = record
    provider = connect()
    try:
        assert ask_openai()
    finally:
        provider.stop()


INTERRUPTED = """
import json, os, ssl
import helpers, openai
def interrupt(*arguments):
    raise KeyboardInterrupt
certificates = ssl.SSLContext.load_verify_locations
ssl.SSLContext.load_verify_locations = interrupt  # while variables are examined
try:
    helpers.connect()
except KeyboardInterrupt:
    ssl.SSLContext.load_verify_locations = certificates
    print(json.dumps(str(openai.OpenAI(api_key="a").base_url)))
"""


def test_clients_reach_nothing_if_connect_is_interrupted_early(
    few_certificates: None,
) -> None:
    assert run_script(INTERRUPTED) == f"{environment.NO_STUB}/v1/"
