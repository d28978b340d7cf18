"""Check that this machine can run the notebooks: `python run.py doctor`.

Each line says "ok" or how to fix the problem. A line marked "note" is about something
that no lesson needs. With --json, the report is one JSON object:

    {"ok": true, "checks": [{"name": "disk", "status": "ok", "text": "…"}, …]}

The exit code is 1 if a lesson would fail.
"""

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Literal

import run

MB = 1_000_000
ENVIRONMENT_SIZE = 900 * MB  # for .venv and the notebooks' files
ROOM_TO_WORK = 100 * MB
TIMEOUT = 120  # seconds for a kernel and a stub to start on a slow machine
CHROMIUM = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"

# What every lesson needs: a kernel, the real client and the stub.
CELL = """\
from langchain_openai import OpenAI
from helpers import Timeline, connect
connect(live=False)
with Timeline("one call") as run:
    OpenAI().invoke("Hello how are you?")
print(run.calls, "call answered")
"""

SET_UP_AGAIN = "Delete the folder .venv and run this command again."


@dataclass
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "fix"]
    text: str
    """What was found, and how to fix it."""


def main(words: Sequence[str]) -> int:
    """Print the report; return 1 if a lesson would fail, otherwise 0."""
    parser = argparse.ArgumentParser("run.py doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(words).json
    checks = []
    for check in examine():
        checks.append(check)
        if not as_json:
            print(f"{check.status:5} {check.name:9} {check.text}", flush=True)
    ok = all(check.status != "fix" for check in checks)
    if as_json:
        report = {"ok": ok, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    elif ok:
        print("This machine can run the notebooks: python run.py lab")
    else:
        print("Follow each line that begins with “fix”, then run this command again.")
    return 0 if ok else 1


def examine() -> Iterator[Check]:
    """Run all checks in order; yield each as soon as its result is known."""
    yield check_python()
    disk, port = check_disk(), check_port()
    yield from (disk, port)
    if disk.status == "ok":
        packages = check_packages()
        yield packages
        if packages.status == port.status == "ok":
            yield check_kernel()
    yield check_browser()
    yield check_chromium()


def check_python() -> Check:
    """Always ok, because run.py has already rejected an older Python."""
    version, system = platform.python_version(), platform.system()
    return Check("Python", "ok", f"{version} on {system} ({platform.machine()})")


def check_disk() -> Check:
    """The project's disk needs room for `.venv`; temporary files need less."""
    needed = ROOM_TO_WORK if run.STAMP.exists() else ENVIRONMENT_SIZE
    for folder, least in (run.ROOT, needed), (tempfile.gettempdir(), ROOM_TO_WORK):
        free = shutil.disk_usage(folder).free
        if free < least:
            text = f"{free // MB:,} MB free in {folder}, but {least // MB} are needed"
            return Check("disk", "fix", text + ". Delete files you don't need.")
    return Check("disk", "ok", f"{shutil.disk_usage(run.ROOT).free // MB:,} MB free")


def check_port() -> Check:
    """The stub and JupyterLab listen on ports on 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        text = f"programs can't connect to ports on 127.0.0.1 ({error}). "
        return Check("port", "fix", text + "Allow Python in your firewall.")
    try:
        socket.create_server(("127.0.0.1", 8888)).close()
    except OSError:
        return Check("port", "ok", "8888 is in use; JupyterLab will use another one")
    return Check("port", "ok", "8888 is free for JupyterLab")


def check_packages() -> Check:
    """`.venv` is set up and contains everything that requirements.lock lists."""
    try:
        run.set_up()
    except run.SetUpError as error:
        return Check("packages", "fix", str(error))
    options = ["--isolated", "--disable-pip-version-check", "--dry-run", "--no-index"]
    options += ["--no-deps", "--require-hashes", "--requirement", str(run.LOCK)]
    done = execute("pip", "install", *options)
    if done.returncode:  # its last line names the package
        text = (
            f"don't match requirements.lock: {last_line(done.stderr)}. {SET_UP_AGAIN}"
        )
        return Check("packages", "fix", text)
    return Check("packages", "ok", "all match requirements.lock")


def check_kernel() -> Check:
    """A kernel starts, and the stub answers a call that the real client makes in it."""
    found = execute("jupyter_client.kernelspecapp", "list", "--json").stdout
    folder = json.loads(found or "{}").get("kernelspecs", {}).get("python3", {})
    place = Path(folder.get("resource_dir", run.VENV))
    if not place.is_relative_to(run.VENV):
        text = (
            f"another kernel named python3 is used instead of .venv's. Rename {place}"
        )
        return Check("kernel", "fix", text)
    cell = {"cell_type": "code", "source": CELL, "metadata": {}, "outputs": []}
    code = cell | {"execution_count": None}
    notebook = {"cells": [code], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    options = ["--to=notebook", "--execute", "--stdin", "--stdout"]
    started = time.monotonic()
    done = execute("nbconvert", *options, text=json.dumps(notebook))
    if done.returncode == 0 and "1 call answered" in done.stdout:
        seconds = time.monotonic() - started
        return Check("kernel", "ok", f"started and made a call in {seconds:.0f} s")
    text = f"could not make a call: {last_line(done.stderr)}. If the reason isn't "
    text += f"clear, try this. {SET_UP_AGAIN} If that doesn't help, open an issue with "
    text += "this line."
    return Check("kernel", "fix", text)


def check_browser() -> Check:
    """JupyterLab opens its page in a browser, if it finds one."""
    try:
        webbrowser.get()
    except webbrowser.Error:
        text = "none found. In a browser, open the address that JupyterLab prints."
        return Check("browser", "note", text)
    return Check("browser", "ok", "JupyterLab can open it")


def check_chromium() -> Check:
    """The browser tests are skipped without it."""
    if find_chromium():
        return Check("Chromium", "ok", "the browser tests can run")
    text = "not found. Only `python run.py test` needs it. Install it (on Debian: "
    text += "apt-get install chromium), or set CHROMIUM to the path of its program."
    return Check("Chromium", "note", text)


def find_chromium() -> str | None:
    """The path of the browser for the tests: CHROMIUM, or one that is installed."""
    installed = filter(None, map(shutil.which, CHROMIUM))
    return os.environ.get("CHROMIUM") or next(installed, None)


def execute(module: str, *options: str, text: str = "") -> CompletedProcess[str]:
    """Run a module with .venv's Python, as a notebook would be run."""
    command = [str(run.PYTHON), "-m", module, *options]
    try:
        return subprocess.run(
            command,
            cwd=run.NOTEBOOKS,
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CompletedProcess(command, 1, "", str(error))


def last_line(output: str) -> str:
    """The last line that isn't empty: where Python and pip say what went wrong."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", output)  # without colours
    lines = [line for line in plain.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else "no message"
