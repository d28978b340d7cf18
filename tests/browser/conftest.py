"""A real JupyterLab on a fresh copy of the project, and a real browser.

The home folder holds nothing and JupyterLab keeps its default settings. The
mouse and the keyboard do what a reader would do.

Where SCREENSHOTS names a folder, pictures of what was seen are left there.
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

ROOT = Path(__file__).resolve().parents[2]
FIRST = "00_start_here"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
MAY_FAIL = {"raises-exception", "nbval-raises-exception"}  # tags of cells
PATIENCE = 60.0  # seconds for a start, an end or a reaction on a busy machine
RUN_LIMIT = 120.0  # seconds for all the cells of a notebook


class Lab:
    """JupyterLab as `python run.py lab` starts it, on a copy of the project."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        ignored = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_c*")
        shutil.copytree(ROOT, self.project, ignore=ignored)
        # The environment is lent, link by link, so that nothing is installed
        # again; a set-up would remove the links and not what they point to.
        (self.project / ".venv").mkdir()
        for part in Path(sys.prefix).iterdir():
            (self.project / ".venv" / part.name).symlink_to(part)
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
            start_new_session=True,  # Ctrl+C reaches it, and not pytest
            # A shell's background jobs, and what they start, ignore Ctrl+C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._printed: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self._printed_url()
        """The address that JupyterLab prints, with its token."""

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._printed.put(line)
        self._printed.put("(the end)")

    def _printed_url(self) -> str:
        log, deadline = "", time.monotonic() + PATIENCE
        while "(the end)" not in log:
            try:
                log += self._printed.get(timeout=max(0, deadline - time.monotonic()))
            except Empty:
                break
            if url := re.search(r"http://127\.0\.0\.1:(\d+)/\S+token=\w+", log):
                # JupyterLab prints the address a moment before it listens there.
                while not is_open(int(url[1])):
                    assert time.monotonic() < deadline, log
                return url[0]
        self.stop()
        pytest.fail(f"JupyterLab printed no address:\n{log}")

    def url_of(self, notebook: str) -> str:
        """Where a notebook is opened, without those that were open before."""
        return self.url.replace(FIRST, notebook) + "&reset"

    def read(self, notebook: str) -> list[dict[str, Any]]:
        """The code cells of a notebook, as its file in the copy has them."""
        path = self.project / "notebooks" / f"{notebook}.ipynb"
        cells: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
        return [cell for cell in cells if cell["cell_type"] == "code"]

    def stop(self) -> list[psutil.Process]:
        """Press Ctrl+C; return the processes that outlive it, after ending them."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGINT)
        left, deadline = family, time.monotonic() + PATIENCE
        while left and time.monotonic() < deadline:
            _, left = psutil.wait_procs(left, timeout=0.2)
            left = [process for process in left if not is_zombie(process)]
        for process in left:
            process.kill()
        self._process.wait(PATIENCE)
        return left


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended, and its new parent has only not asked how."""
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
        # The toolbar's own sign says "idle" before there is a kernel.
        status = self.page.locator(".jp-StatusBar-TextItem")
        expect(status.filter(has_text="(ipykernel) | Idle")).to_be_visible()

    def choose(self, menu: str, item: str) -> None:
        """Click an item of a menu."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()

    def run_all(self) -> list[dict[str, Any]]:
        """Run all cells from a clean sheet; return them as they were then saved."""
        cells = len(self.stored)
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        expect(prompts).to_have_count(cells)
        self.choose("Edit", "Clear Outputs of All Cells")
        expect(prompts).to_have_text(["[ ]:"] * cells)
        self.choose("Run", "Run All Cells")
        # After an error, even one that a tag allows, JupyterLab no longer shows
        # [*] beside the cells that are still to run: only their numbers tell.
        with suppress(AssertionError):  # the saved file says what was not done, and why
            expect(prompts.last).to_have_text(f"[{cells}]:", timeout=RUN_LIMIT * 1000)
            self.wait_for_the_kernel()
        self.save()
        done = self.lab.read(self.name)
        assert [error for cell in done for error in errors(cell)] == []
        counts = [cell["execution_count"] for cell in done]
        assert counts == list(range(1, cells + 1))
        return done

    def save(self) -> None:
        def is_saved(response: Response) -> bool:
            name = urlsplit(response.url).path.rpartition("/")[2]
            return response.request.method == "PUT" and name == f"{self.name}.ipynb"

        with self.page.expect_response(is_saved) as saved:
            self.page.keyboard.press("Control+s")
        assert saved.value.ok

    def take_a_picture(self, folder: Path) -> None:
        """Of the whole notebook, in a window as tall as that."""
        panel = self.page.locator(".jp-WindowedPanel-outer")
        height = panel.evaluate("panel => panel.scrollHeight")
        self.page.set_viewport_size(
            {"width": 1280, "height": min(height + 150, 16_000)}
        )
        panel.evaluate("panel => panel.scrollTo(0, 0)")
        self.page.screenshot(path=folder / f"{self.name}.png")

    def messages(self) -> list[str]:
        """What JupyterLab asks or tells the reader in a box of its own."""
        return self.page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()


def errors(cell: dict[str, Any]) -> list[str]:
    """What went wrong in a cell, unless its tags say that it may."""
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
        pytest.skip("Windows cannot send Ctrl+C to one program alone")
    installed = filter(None, map(shutil.which, BROWSERS))
    found = os.environ.get("CHROMIUM") or next(installed, None)
    if not found:
        pytest.skip(
            "no browser: install one (apt-get install chromium) or name its "
            "program in the environment variable CHROMIUM"
        )
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    assert lab.stop() == [], "Ctrl+C ends JupyterLab, its kernels and the providers"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A browser's window; at the end, what it asked for was on this machine."""
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE * 1000)
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("websocket", lambda socket: asked.append(socket.url))
    yield page
    context.close()
    assert [url for url in asked if not is_local(url)] == []


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    here = {"127.0.0.1", "localhost"}
    return parts.scheme in {"data", "blob"} or parts.hostname in here


@pytest.fixture
def opened(lab: Lab, page: Page) -> Callable[[str], Notebook]:
    """Open a notebook as a reader does, and wait for its kernel."""
    return lambda name: Notebook(lab, page, name)


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    return Path(os.environ.get("SCREENSHOTS", tmp_path))
