"""Command line of this project: lab, test, doctor, notebooks, exercises, bench.

    python run.py lab        open the notebooks in JupyterLab
    python run.py test       run every check: style, types, tests, notebooks
    python run.py doctor     check that this machine can run the notebooks
    python run.py notebooks  execute the notebooks and store their outputs
    python run.py exercises  write the exercises from their solutions
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
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ROOT / "notebooks"
SOLUTIONS = NOTEBOOKS / "solutions"
EXERCISES = NOTEBOOKS / "exercises"
BENCHMARKS = ROOT / "benchmarks"
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PICTURE = NOTEBOOKS / "timelines.png"  # the picture in README.md
STAMP = VENV / "installed.txt"  # which Python and lock .venv has
QUIET = [] if sys.stderr.isatty() else ["--quiet"]  # a terminal shows progress bars


def fail(sentence: str) -> NoReturn:
    """Print what went wrong and what to do about it; exit with code 2."""
    print("run.py: " + sentence, file=sys.stderr)
    sys.exit(2)


def call(*words: object, **options: Any) -> int:
    """Run a command in the project's folder; return its exit code."""
    process = subprocess.Popen([str(word) for word in words], cwd=str(ROOT), **options)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the command gets it too: let it finish
            pass


class SetUpError(Exception):
    """The setup failed. The message says what to do about it."""


def set_up() -> None:
    """Install exactly what requirements.lock lists into `.venv`.

    A `.venv` can't be moved, because its scripts contain its path. A moved or
    copied project gets a new one. Raises SetUpError if the setup fails.
    """
    lock = LOCK.read_text("utf-8")
    wanted = "python {}.{}, lock {}, in {}\n".format(
        *sys.version_info[:2], hashlib.sha256(lock.encode()).hexdigest(), ROOT
    )
    if STAMP.exists() and PYTHON.exists() and STAMP.read_text("utf-8") == wanted:
        return
    started = time.monotonic()
    tell("Setting up .venv. This happens once and takes about half a minute.")
    tell("  1/3 creating the virtual environment")
    if install(sys.executable, "-m", "venv", "--clear", VENV):
        raise SetUpError(
            "could not create the virtual environment {}; see the error above. On "
            "Debian and Ubuntu, install the package python3-venv. Then run the same "
            "command again.".format(VENV)
        )
    tell("  2/3 installing uv, a fast package installer")
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *QUIET]
    uv = [PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, *QUIET]
    packages = ["--require-hashes", "-r", LOCK]
    project = ["--no-deps", "--no-build-isolation", "-e", ROOT]
    only_uv = VENV / "uv.txt"  # the part of the lock that pins uv
    only_uv.write_text("".join(re.findall(r"^uv==(?:.*\\\n)*.*", lock, re.M)), "utf-8")
    has_uv = install(*pip, "--require-hashes", "-r", only_uv) == 0
    tell("  3/3 installing the packages in requirements.lock")
    settings = uv_settings() if has_uv else {}
    if not has_uv or any(
        install(*uv, *what, **settings) for what in (packages, project)
    ):
        tell("      uv failed. Trying pip, which takes a few minutes")
        if install(*pip, *packages) or install(*pip, *project):
            raise SetUpError(
                "could not install the packages in requirements.lock; see the error "
                "above. The first run needs the network, or a package index that pip "
                "is configured to use. Check both, then run the same command again."
            )
    STAMP.write_text(wanted, "utf-8")
    tell("Done in {:.0f} seconds.".format(time.monotonic() - started))


def tell(line: str) -> None:
    """Show progress on standard error; standard output belongs to the command."""
    print(line, file=sys.stderr, flush=True)


def install(*words: object, **settings: str) -> int:
    """Run a command that installs something; return its exit code."""
    return call(*words, stdout=sys.stderr, env={**os.environ, **settings})


def uv_settings() -> "dict[str, str]":
    """Environment variables that give uv pip's settings and a writable cache.

    Variables that are already set stay as they are.
    """
    command = [str(PYTHON), "-m", "pip", "config", "list"]
    listed = subprocess.check_output(command).decode()
    pip = {}
    for section in "global", "install", ":env:":  # the last one wins
        lines = re.findall("^{}[.](.+?)='(.*)'$".format(section), listed, re.M)
        for name, text in lines:  # a list may have one value per line
            pip[name] = " ".join(text.replace("\\n", " ").split())
    settings = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_INDEX": pip.get("extra-index-url"),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # as in pip; the hashes make it safe
        "UV_NO_INDEX": pip.get("no-index"),
        "UV_FIND_LINKS": pip.get("find-links", "").replace(" ", ","),
        "UV_INSECURE_HOST": pip.get("trusted-host"),
        "HTTPS_PROXY": pip.get("proxy"),
        "SSL_CERT_FILE": pip.get("cert"),
        "UV_SYSTEM_CERTS": "true",
        "UV_CACHE_DIR": None if has_cache() else str(VENV / "cache"),
    }
    return {
        name: value
        for name, value in settings.items()
        if value and not {name, name.lower()} & set(os.environ)
    }


def has_cache() -> bool:
    """Whether uv can write to its cache folder, which is usually in the home folder."""
    command = [str(PYTHON), "-m", "uv", "cache", "dir"]
    try:
        cache = subprocess.check_output(command, stderr=subprocess.DEVNULL)
        folder = Path(cache.decode().strip())
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(folder)):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


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
    module = [str(PYTHON), "-m"]
    steps = [
        [*module, "ruff", "check", "."],
        [*module, "ruff", "format", "--check", "."],
        [str(PYTHON.with_name("typos"))],  # not a Python module
        [*module, "mypy"],
        [*module, "pytest", *words],
    ]
    for step in steps:
        print("---", *step, flush=True)
        code = call(*step)
        if code:
            return code
    return 0


def notebooks(*names: str) -> int:
    """Execute all notebooks, or those named, and store their outputs."""
    paths = in_folder(NOTEBOOKS, names)
    code = execute(paths)
    if code == 0:
        PICTURE.write_bytes(last_picture(NOTEBOOKS / "00_start_here.ipynb"))
    return code


def exercises(*names: str) -> int:
    """Execute the solutions, all or those named, and write the exercises from them.

    An exercise is a solution without the cells that have the tag `solution`.
    """
    paths = in_folder(SOLUTIONS, names)
    for path in paths:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        if not any("solution" in cell["metadata"].get("tags", []) for cell in cells):
            fail(
                "no cell of {} has the tag `solution`, so the exercise would show the "
                "solution. Add the tag.".format(path.relative_to(ROOT))
            )
    options = [
        "--ClearOutputPreprocessor.enabled=True",
        "--TagRemovePreprocessor.enabled=True",
        "--TagRemovePreprocessor.remove_cell_tags=solution",
        "--output-dir={}".format(EXERCISES),
    ]
    return (
        execute(paths)
        or call(PYTHON, "-m", "nbconvert", "--to=notebook", *options, *paths)
        or execute([EXERCISES / path.name for path in paths])
    )


def in_folder(folder: Path, names: "tuple[str, ...]") -> "list[Path]":
    """The notebooks with these names, or all in the folder."""
    paths = [folder / (Path(name).stem + ".ipynb") for name in names]
    for path in paths:
        if not path.exists():
            fail(
                "no such notebook: {}. Use a name from the folder {}, for example "
                "02_use_a_thread_pool.".format(
                    path.relative_to(ROOT), folder.relative_to(ROOT)
                )
            )
    return paths or sorted(folder.glob("*.ipynb"))


def execute(paths: "list[Path]") -> int:
    """Execute notebooks and store their outputs; return the exit code."""
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
    code = call(PYTHON, "-m", "nbconvert", *options, *paths)
    if code == 0:
        for path in paths:
            drop_widget_views(path)
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


def doctor(*words: str) -> int:
    """Check that this machine can run the notebooks."""
    sys.path.insert(0, str(ROOT))  # missing with -P or PYTHONSAFEPATH
    from doctor import main

    return main(words)


COMMANDS = {
    "lab": lab,
    "test": test,
    "doctor": doctor,
    "notebooks": notebooks,
    "exercises": exercises,
    "bench": bench,
}


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
    if words[0] != "doctor":  # it reports a failed setup with its other results
        try:
            set_up()
        except SetUpError as error:
            fail(str(error))
    return COMMANDS[words[0]](*words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
