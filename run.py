"""Command line of this project: lab, test, notebooks, bench.

    python run.py lab        open the notebooks in JupyterLab
    python run.py test       run every check: style, types, tests, notebooks
    python run.py notebooks  execute the notebooks and store their outputs
    python run.py bench      compare all ways; also `bench bounds`, `bench stub`

Each command sets up `.venv` first: once, and again when requirements.lock changes or
the folder has moved.
Any further arguments are passed to the tool: `python run.py lab --no-browser`,
`python run.py test -k timeline`, `python run.py notebooks 01_make_one_call`,
`python run.py bench --help`.
"""
# Standard library only, and no syntax newer than Python 3.6, so that an old Python
# can read this file and say that it is too old.

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Mapping, NoReturn, Optional

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ROOT / "notebooks"
BENCHMARKS = ROOT / "benchmarks"
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PICTURE = NOTEBOOKS / "timelines.png"  # the picture in README.md
STAMP = VENV / "installed.txt"  # which Python and lock .venv has


def fail(sentence: str) -> NoReturn:
    """Print what went wrong and what to do about it; exit with code 2."""
    print("run.py: " + sentence, file=sys.stderr)
    sys.exit(2)


def call(*words: object, environment: Optional[Mapping[str, str]] = None) -> int:
    """Run a command in the project's folder; return its exit code."""
    process = subprocess.Popen(
        [str(word) for word in words], cwd=str(ROOT), env=environment
    )
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command gets it too: let it finish
            pass


def set_up() -> None:
    """Install exactly what requirements.lock lists into `.venv`.

    A `.venv` can't be moved, because its scripts contain its path. A moved or
    copied project gets a new one.
    """
    wanted = "python {}.{}, lock {}, in {}\n".format(
        *sys.version_info[:2], hashlib.sha256(LOCK.read_bytes()).hexdigest(), ROOT
    )
    if STAMP.exists() and PYTHON.exists() and STAMP.read_text() == wanted:
        return
    print("Setting up .venv. This happens once and takes a minute or two.", flush=True)
    uv = shutil.which("uv")
    if uv:
        make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, VENV]
        pip = [uv, "pip", "install", "--quiet", "--python", PYTHON]
    else:
        make = [sys.executable, "-m", "venv", "--clear", VENV]
        pip = [PYTHON, "-m", "pip", "install", "--quiet"]
        pip += ["--disable-pip-version-check"]
    if call(*make):
        fail(
            "could not create the virtual environment {}; see the error above. On "
            "Debian and Ubuntu, install the package python3-venv. Then run the same "
            "command again.".format(VENV)
        )
    locked = pip + ["--require-hashes", "-r", LOCK]
    ours = pip + ["--no-deps", "--no-build-isolation", "-e", ROOT]
    if call(*locked) or call(*ours):
        fail(
            "could not install the packages in requirements.lock; see the error "
            "above. The first run needs the network, or a package index that pip "
            "is configured to use. Fix that and run the same command again."
        )
    STAMP.write_text(wanted)


def lab(*words: str) -> int:
    """Open JupyterLab on the notebooks."""
    options = [
        "--ServerApp.root_dir={}".format(NOTEBOOKS),
        "--LabApp.default_url=/lab/tree/00_start_here.ipynb",
        # Stay offline: don't check for updates or news.
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.app_settings_dir={}".format(ROOT / ".jupyter"),
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")  # containers usually run as root
    return call(PYTHON, "-m", "jupyterlab", *options, *words)


def test(*words: str) -> int:
    """Run every check; stop at the first tool that fails."""
    steps = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["pytest", *words],
    ]
    for step in steps:
        print("---", *step, flush=True)
        code = call(PYTHON, "-m", *step)
        if code:
            return code
    return 0


def notebooks(*names: str) -> int:
    """Execute all notebooks, or those named, and store their outputs."""
    paths = [NOTEBOOKS / (Path(name).stem + ".ipynb") for name in names]
    for path in paths:
        if not path.exists():
            fail(
                "no such notebook: {}. Use a name from the folder notebooks, for "
                "example 01_make_one_call.".format(path.relative_to(ROOT))
            )
    options = [
        "--to=notebook",
        "--execute",
        "--inplace",
        "--ExecutePreprocessor.timeout=120",
        "--ExecutePreprocessor.record_timing=False",
        "--ExecutePreprocessor.store_widget_state=False",
        # Keep only metadata that is the same on every machine.
        "--ClearMetadataPreprocessor.enabled=True",
        "--ClearMetadataPreprocessor.clear_cell_metadata=False",
        "--ClearMetadataPreprocessor.preserve_nb_metadata_mask="
        "{'kernelspec', ('language_info', 'name')}",
    ]
    paths = paths or sorted(NOTEBOOKS.glob("*.ipynb"))
    code = call(PYTHON, "-m", "nbconvert", *options, *paths)
    if code == 0:
        for path in paths:
            drop_widget_views(path)
        PICTURE.write_bytes(last_picture(NOTEBOOKS / "00_start_here.ipynb"))
    return code


def drop_widget_views(notebook: Path) -> None:
    """Remove widget views: they need a running kernel, and their ids are random."""
    content = json.loads(notebook.read_text("utf-8"))
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    notebook.write_text(text, "utf-8")


def bench(*words: str) -> int:
    """Run the benchmark named by the first argument, by default the scoreboard."""
    known = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
    if not words or words[0].startswith("-"):
        words = ("scoreboard",) + words
    if words[0] not in known:
        fail(
            "unknown benchmark {!r}. Choose from: {}.".format(
                words[0], ", ".join(known)
            )
        )
    return call(PYTHON, BENCHMARKS / (words[0] + ".py"), *words[1:])


def last_picture(notebook: Path) -> bytes:
    """The last PNG in a notebook's stored outputs: the picture in the README."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [
        output["data"]["image/png"]
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    return base64.b64decode("".join(pictures[-1]))


COMMANDS = {"lab": lab, "test": test, "notebooks": notebooks, "bench": bench}


def main(words: "list[str]") -> int:
    """Run the command; return its exit code."""
    if sys.version_info < (3, 11):
        fail(
            "this project needs Python 3.11 or newer, and this is Python {}.{}. "
            "Start it with a newer one, for example: python3.13 run.py".format(
                *sys.version_info[:2]
            )
        )
    if not words or words[0] not in COMMANDS:
        print(__doc__)
        problem = "unknown command {!r}".format(words[0]) if words else "no command"
        fail("{}. Choose from: {}.".format(problem, ", ".join(COMMANDS)))
    set_up()
    return COMMANDS[words[0]](*words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
