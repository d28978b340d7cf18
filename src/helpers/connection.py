"""Start, find and stop the provider, and point the OpenAI clients at it."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

START_LIMIT = 30  # seconds; a start takes well under one on a quiet machine
FILES_WANTED = 8192  # open files: one a connection, and macOS begins with 256

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_current: "Provider | None" = None


class ProviderError(RuntimeError):
    """The provider could not be started, found, or told something."""


class Provider:
    """The server that plays OpenAI, as a notebook sees it."""

    def __init__(self, url: str, process: subprocess.Popen[str] | None = None) -> None:
        self.url = url
        """Its address; the OpenAI API stands under /v1."""
        self._process = process

    def __repr__(self) -> str:
        where = "started by this process" if self._process else "found running"
        return f"<Provider: a stub of OpenAI on this machine, {where}>"

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs or was not started here."""
        return self._process.poll() if self._process else None

    def configure(self, **settings: Any) -> dict[str, Any]:
        """Change settings and return all of them; see `connect` for their names.

        Raises ValueError for an unknown name or a value out of range.
        """
        config: dict[str, Any] = self.ask("/_provider/config", "PATCH", settings)
        return config

    @contextlib.contextmanager
    def behaving(self, **settings: Any) -> Iterator["Provider"]:
        """Have other settings for the length of a `with` block.

        with provider.behaving(first_token=2):
            llm.invoke("Hello how are you?")
        """
        before = self.configure()
        self.configure(**settings)
        try:
            yield self
        finally:
            self.configure(**{name: before[name] for name in settings})

    def stats(self) -> dict[str, Any]:
        """Requests, tokens, calls in flight and their peak, answers by status."""
        stats: dict[str, Any] = self.ask("/_provider/stats")
        return stats

    def stop(self) -> None:
        """End the provider's process, if this process started it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Send a control request; return the JSON that it answers.

        Raises ProviderError where the provider does not answer, and
        ValueError where it refuses the request.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with _opener.open(request, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                reason = json.loads(reason)["error"]
            raise ValueError(f"the provider refused: {reason}") from None
        except (OSError, ValueError) as error:
            raise ProviderError(self._lost(error)) from None

    def _lost(self, error: Exception) -> str:
        if self.exit_code is not None:
            return ended_message(self.exit_code)
        return (
            f"No provider answers at {self.url} ({error}). If LLM_PROVIDER_URL "
            "is set, start one there (python -m helpers.provider --port 8000) "
            "or unset it; then run connect() again."
        )


def connect(**settings: Any) -> Provider:
    """Start the provider and point this process's OpenAI clients at it.

    Call it before you build a client. A second call gives the same provider,
    and starts it anew, at the same address, where it has ended. Where
    LLM_PROVIDER_URL is set, the provider there is used.

    Settings, all optional: `first_token` and `per_token` (seconds), `jitter`
    (0 to 1, by how much a prompt's latency may differ), `seed`, `models` (the
    only model names that exist; None for any).

    Raises ProviderError where it cannot be started or reached, ValueError for
    a setting that does not exist or is out of range.
    """
    global _current
    url = os.environ.get("LLM_PROVIDER_URL", "").rstrip("/")
    if url:
        _current = Provider(url)
    elif _current is None or _current.exit_code is not None:
        _current = _start(_current.url if _current else None)
    _current.configure(**settings)
    _set_environment(_current.url)
    _raise_file_limit()
    _tell_when_it_ends()
    return _current


def current() -> Provider:
    """The provider that `connect` gave last; ProviderError before the first."""
    if _current is None:
        raise ProviderError("There is no provider yet: run connect() first.")
    return _current


def ended_message(exit_code: int) -> str:
    """What to tell a reader whose provider has gone."""
    return (
        f"The provider has ended (exit code {exit_code}), so calls cannot be "
        "answered. Run connect() again: it starts a new one at the same address."
    )


def _start(earlier: str | None) -> Provider:
    """Start the process, at an earlier address where that is still free."""
    port = earlier.rpartition(":")[2] if earlier else "0"
    # A file: a pipe that nobody reads would fill. It goes with the process.
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers.provider", "--port", port]
        + ["--parent", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # A session of its own: Jupyter's Interrupt must not reach it.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    assert process.stdout is not None
    too_long = threading.Timer(START_LIMIT, process.kill)
    too_long.start()
    ready = process.stdout.readline()
    too_long.cancel()
    if ready:
        return Provider(json.loads(ready)["url"], process)
    process.wait()
    if earlier:
        return _start(None)
    errors.seek(0)
    raise ProviderError(
        f"The provider could not be started (exit code {process.returncode}). "
        f"It said: {errors.read().strip() or 'nothing'}"
    )


def _set_environment(url: str) -> None:
    """Set what the OpenAI clients, LangChain and their HTTP library read."""
    environ = os.environ
    # LangChain reads the second name, and prefers it to the first.
    environ["OPENAI_BASE_URL"] = environ["OPENAI_API_BASE"] = f"{url}/v1"
    environ["OPENAI_API_KEY"] = environ.get("OPENAI_API_KEY") or "stub"
    environ.setdefault("LANGSMITH_TRACING", "false")
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in environ.get(name, "").split(",") if host]
        missing = {"127.0.0.1", "localhost"}.difference(hosts)
        environ[name] = ",".join(hosts + sorted(missing))


def _raise_file_limit() -> None:
    """Let this process open enough sockets for the larger lessons."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tell_when_it_ends() -> None:
    """In a notebook, say under a cell that the provider is no longer there."""
    ipython = sys.modules.get("IPython")  # a script has none, and needs none
    shell = ipython.get_ipython() if ipython else None
    if shell and _notice not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _notice)


def _notice(result: object) -> None:
    if _current is not None and _current.exit_code is not None:
        print(ended_message(_current.exit_code), file=sys.stderr)
