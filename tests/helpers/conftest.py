"""Fixtures and functions shared by the tests of `helpers`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import openai
import psutil
import pytest

from helpers import connect, connection
from helpers.connection import Provider

TIMEOUT = 120.0  # seconds for anything, on a busy machine
POLL_INTERVAL = 0.02  # seconds
MODEL = "gpt-3.5-turbo-instruct"
PROMPT = "Hello how are you?"


@contextlib.contextmanager
def never_connected() -> Iterator[None]:
    """As if this process had never called connect(); undoes changes afterwards."""
    with mock.patch.object(connection, "_current", None), mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith(("LLM_", "OPENAI_", "LANGSMITH_")) or (
                name.lower().endswith("_proxy")
            ):
                del os.environ[name]
        yield


@pytest.fixture(scope="module")
def shared_stub() -> Iterator[Provider]:
    with never_connected():
        provider = connect(first_token=0, per_token=0)
    yield provider
    provider.stop()


@pytest.fixture
def clean_environment() -> Iterator[None]:
    """As if connect() had never been called; stops the stubs that a test started."""
    before = psutil.Process().children()
    with never_connected():
        yield
    for process in psutil.Process().children():
        if process not in before and is_stub(process):
            process.kill()


@pytest.fixture
def connected(clean_environment: None, shared_stub: Provider) -> Provider:
    """A running stub, so that connect() doesn't need to start one."""
    connection._current = shared_stub
    shared_stub.configure(seed=0, first_token=0, per_token=0, jitter=0.2, models=None)
    return shared_stub


def is_stub(process: psutil.Process) -> bool:
    try:
        return "llm_stub" in process.cmdline()
    except psutil.NoSuchProcess:  # also raised for a zombie
        return False


def process_of(provider: Provider) -> psutil.Process:
    assert provider._process is not None
    return psutil.Process(provider._process.pid)


def kill(provider: Provider) -> None:
    process_of(provider).kill()
    wait_until(lambda: provider.exit_code is not None)


def ask_openai() -> str:
    client = openai.OpenAI(max_retries=0, timeout=TIMEOUT)
    return client.completions.create(model=MODEL, prompt=PROMPT).choices[0].text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"it took more than {TIMEOUT} s"
        time.sleep(POLL_INTERVAL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextlib.contextmanager
def manually_started_stub() -> Iterator[str]:
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


def run_script(code: str) -> Any:
    """Run a script in a new Python process; return the JSON that it prints."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)
