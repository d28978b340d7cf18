"""A real JupyterLab on a fresh copy of the project, and a real browser.

The home folder is empty, JupyterLab has its default settings, and the tests use
mouse and keyboard like a reader.

Set SCREENSHOTS to a folder to keep the screenshots.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from doctor import find_chromium

ROOT = Path(__file__).resolve().parents[2]
FIRST = "00_start_here"
MAY_FAIL = {"raises-exception", "nbval-raises-exception"}  # tags of cells
TIMEOUT = 60.0  # seconds for startup, shutdown or a reaction on a busy machine
RUN_ALL_TIMEOUT = 120.0  # seconds for all cells of a notebook
END_OF_OUTPUT = "(end of output)"


class Lab:
    """JupyterLab as `python run.py lab` starts it, on a copy of the project."""

    def __init__(self, folder: Path, link_environment: Callable[[Path], None]) -> None:
        self.project = folder / "project"
        ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_c*")
        shutil.copytree(ROOT, self.project, ignore=ignored)
        link_environment(self.project)
        home = folder / "home"
        home.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "run.py", "lab", "--no-browser", "--port=0"],
            cwd=self.project,
            env={"HOME": str(home), "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that Ctrl+C reaches it but not pytest
            # A shell's background jobs and their children ignore Ctrl+C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._output: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._wait_for_url()
        """The URL that JupyterLab prints, with its token."""

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._output.put(line)
        self._output.put(END_OF_OUTPUT)

    def _wait_for_url(self) -> str:
        log, deadline = "", time.monotonic() + TIMEOUT
        while END_OF_OUTPUT not in log:
            try:
                log += self._output.get(timeout=max(0, deadline - time.monotonic()))
            except Empty:
                break
            if url := re.search(r"http://127\.0\.0\.1:(\d+)/\S+token=\w+", log):
                # JupyterLab prints the URL a moment before it listens there.
                while not is_open(int(url[1])):
                    assert time.monotonic() < deadline, log
                return url[0]
        self.stop()
        pytest.fail(f"JupyterLab printed no URL:\n{log}")

    def url_of(self, notebook: str) -> str:
        """The URL that opens this notebook and closes all others."""
        return self.url.replace(FIRST, notebook) + "&reset"

    def read(self, notebook: str) -> list[dict[str, Any]]:
        """The code cells of a notebook, read from its file in the copy."""
        path = self.project / "notebooks" / f"{notebook}.ipynb"
        cells: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]

    def stop(self) -> list[psutil.Process]:
        """Press Ctrl+C; kill and return any process that survives it."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGINT)
        deadline = time.monotonic() + TIMEOUT
        alive: list[psutil.Process] = processes
        while alive and time.monotonic() < deadline:
            _, alive = psutil.wait_procs(alive, timeout=0.2)
            alive = [process for process in alive if not is_zombie(process)]
        for process in alive:
            process.kill()
        self._process.wait(TIMEOUT)
        return alive


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_zombie(process: psutil.Process) -> bool:
    """Whether the process has exited, and only waits for its parent to reap it."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Notebook:
    """A notebook that a reader has opened in JupyterLab."""

    def __init__(self, lab: Lab, page: Page, name: str) -> None:
        self.lab, self.page, self.name = lab, page, name
        self.stored = lab.read(name)
        page.goto(lab.url_of(name))
        self.wait_for_the_kernel()

    def wait_for_the_kernel(self) -> None:
        # The toolbar's indicator says "idle" even before there is a kernel.
        status = self.page.locator(".jp-StatusBar-TextItem")
        expect(status.filter(has_text="(ipykernel) | Idle")).to_be_visible()

    def choose(self, menu: str, item: str) -> None:
        """Click a menu item."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()

    def run_all(self) -> list[dict[str, Any]]:
        """Clear all outputs and run all cells; return the cells as saved afterwards."""
        cells = len(self.stored)
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        expect(prompts).to_have_count(cells)
        self.choose("Edit", "Clear Outputs of All Cells")
        expect(prompts).to_have_text(["[ ]:"] * cells)
        self.choose("Run", "Run All Cells")
        # After an error, even an allowed one, JupyterLab no longer shows [*] for the
        # cells that are still queued. Only the last cell's number says that all ran.
        with suppress(AssertionError):  # the saved file shows which cell failed and why
            expect(prompts.last).to_have_text(
                f"[{cells}]:", timeout=RUN_ALL_TIMEOUT * 1000
            )
            self.wait_for_the_kernel()
        self.save()
        saved = self.lab.read(self.name)
        assert [error for cell in saved for error in errors(cell)] == []
        counts = [cell["execution_count"] for cell in saved]
        assert counts == list(range(1, cells + 1))
        return saved

    def save(self) -> None:
        def is_saved(response: Response) -> bool:
            name = urlsplit(response.url).path.rpartition("/")[2]
            return response.request.method == "PUT" and name == f"{self.name}.ipynb"

        with self.page.expect_response(is_saved) as saved:
            self.page.keyboard.press("Control+s")
        assert saved.value.ok

    def take_screenshot(self, folder: Path) -> None:
        """Save a picture of the whole notebook, in a window as tall as the notebook."""
        panel = self.page.locator(".jp-WindowedPanel-outer")
        height = panel.evaluate("panel => panel.scrollHeight")
        self.page.set_viewport_size(
            {"width": 1280, "height": min(height + 150, 16_000)}
        )
        panel.evaluate("panel => panel.scrollTo(0, 0)")
        self.page.screenshot(path=folder / f"{self.name}.png")

    def messages(self) -> list[str]:
        """The texts of all dialogs and notifications."""
        return self.page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()


def errors(cell: dict[str, Any]) -> list[str]:
    """The errors in a cell's outputs, unless its tags allow them."""
    if MAY_FAIL.intersection(cell["metadata"].get("tags", [])):
        return []
    return [
        f"{output['ename']}: {output['evalue']}\n{''.join(cell['source'])}"
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if os.name == "nt":
        pytest.skip("Windows can't send Ctrl+C to a single program")
    if not (found := find_chromium()):
        pytest.skip(
            "no browser found: install one (apt-get install chromium), or set the "
            "environment variable CHROMIUM to the path of its program"
        )
    expect.set_options(timeout=TIMEOUT * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(
    browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
    link_environment: Callable[[Path], None],
) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), link_environment)
    yield lab
    assert lab.stop() == [], "Ctrl+C left processes of JupyterLab, kernels or stubs"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A browser window. Fails the test if it sent a request to another machine."""
    requested: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(TIMEOUT * 1000)
    context.on("request", lambda request: requested.append(request.url))
    page = context.new_page()
    page.on("websocket", lambda socket: requested.append(socket.url))
    yield page
    context.close()
    assert [url for url in requested if not is_local(url)] == []


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    local_hosts = {"127.0.0.1", "localhost"}
    return parts.scheme in {"data", "blob"} or parts.hostname in local_hosts


@pytest.fixture
def open_notebook(lab: Lab, page: Page) -> Callable[[str], Notebook]:
    """Open a notebook by name and wait for its kernel."""
    return lambda name: Notebook(lab, page, name)


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    return Path(os.environ.get("SCREENSHOTS", tmp_path))
