"""Start, find and stop the provider, and point the OpenAI clients at it."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

FILES_WANTED = 8192  # open files: one a connection, and macOS begins with 256
ADDRESSES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")  # LangChain prefers the second
NO_KEY = "stub"  # stands where a client wants a key and the server none

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_current: "Provider | None" = None
_reader: dict[str, str] = {}  # the addresses that the reader has set


class ProviderError(RuntimeError):
    """The provider could not be started, or does not answer."""


class Provider:
    """The server that plays OpenAI, as a notebook sees it."""

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[str] | None = None,
        *,
        live: bool = False,
    ) -> None:
        self.url = url  # the OpenAI API stands under /v1
        self.live = live
        self.wish: dict[str, str] = {}  # what live mode was started with
        self._process = process
        self._settings: dict[str, Any] = {}

    def __repr__(self) -> str:
        if self.live:
            calls, tokens = (
                self._settings[f"max_{name}"] for name in ("calls", "tokens")
            )
            return f"<Provider: LIVE, up to {calls} calls and {tokens} tokens>"
        where = "started by this process" if self._process else "found running"
        return f"<Provider: a stub of OpenAI on this machine, {where}>"

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs or was not started here."""
        return self._process.poll() if self._process else None

    def configure(self, **settings: Any) -> dict[str, Any]:
        """Change settings, see `connect`; returns all. ValueError for a bad one."""
        self._settings = self.ask("/_provider/config", "PATCH", settings)
        return dict(self._settings)

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

    def stop(self) -> None:
        """End the provider's process, if this process started it."""
        if self._process:
            self._process.terminate()
            self._process.wait()

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Send a control request; return the JSON that it answers.

        Raises ProviderError where the provider does not answer, and
        ValueError where it refuses the request.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, method=method)
            with _opener.open(request, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 400:  # another server's answer
                raise ProviderError(self.lost(error)) from None
            raise ValueError(f"refused: {json.load(error)['error']}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ProviderError(self.lost(error)) from None

    def lost(self, error: Exception | None = None) -> str:
        """What to tell a reader whom the provider does not answer."""
        if self._process:  # its socket may be closed a moment before its end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        if self.exit_code is not None:
            return (
                f"The provider has ended (exit code {self.exit_code}). Run connect() "
                "again: it starts a new one at the same address."
            )
        return (
            f"No provider answers at {self.url} ({error}). If LLM_PROVIDER_URL "
            "is set, start one there (python -m llm_stub --port 8000) "
            "or unset it; then run connect() again."
        )


def connect(*, live: bool | None = None, **settings: Any) -> Provider:
    """Start the provider and point this process's OpenAI clients at it.

    Call it before you build a client. A second call gives the same provider,
    and starts it anew, at the same address, where it has ended. Where
    LLM_PROVIDER_URL is set, the provider there is used.

    Settings, all optional: `first_token` and `per_token` (seconds), `jitter`
    (0 to 1, by how much a prompt's latency may differ), `seed`, `models` (the
    only model names that exist; None for any), and what else stands in
    `llm_stub/behaviour.py`: limits, capacity, faults.

    With `live`, or LLM_LIVE=1 in the environment, calls are forwarded to the
    server that OPENAI_BASE_URL names, or to OpenAI, with the key in
    OPENAI_API_KEY and the model in LLM_MODEL, and refused past `max_calls`
    and `max_tokens`.

    Raises ProviderError where it cannot be started or reached, ValueError for
    a setting that does not exist or is out of range.
    """
    global _current
    _raise_file_limit()
    if live is None:
        live = os.environ.get("LLM_LIVE", "0") not in ("", "0")
    url = os.environ.get("LLM_PROVIDER_URL", "").rstrip("/")
    if url and live:
        raise ProviderError(
            "Live mode starts a provider of its own: unset LLM_PROVIDER_URL, or "
            "start the provider there with --live and leave LLM_LIVE out."
        )
    _note_addresses()
    if live and not _reader and _no_key():
        raise ProviderError(
            "Live mode calls OpenAI, and OPENAI_API_KEY is not set. Set it, or set "
            "OPENAI_BASE_URL to a server that needs none, and start again."
        )
    wish = _reader | {"LLM_MODEL": os.environ.get("LLM_MODEL", "")} if live else {}
    if url:
        _current = Provider(url)
    elif _current is None or _current._process is None:
        _current = _start(None, live)
    elif (
        _current.exit_code is not None or _current.live != live or _current.wish != wish
    ):
        _current.stop()
        _current = _start(_current.url, live)
    _current.wish = wish
    _current.configure(**settings)
    if url:
        _current.live = bool(_current.ask("/_provider/stats")["live"])
    _set_environment(_current.url)
    _tell_when_it_ends()
    return _current


def current() -> Provider:
    """The provider that `connect` gave last; ProviderError before the first."""
    if _current is None:
        raise ProviderError("There is no provider yet: run connect() first.")
    return _current


def _start(earlier: str | None, live: bool) -> Provider:
    """Start the process, at an earlier address where that is still free."""
    # It has no use for the key: the clients send it with each call.
    hidden = {*ADDRESSES, "OPENAI_API_KEY"}
    environ = {name: text for name, text in os.environ.items() if name not in hidden}
    port = earlier.rpartition(":")[2] if earlier else "0"
    # A file: a pipe that nobody reads would fill. It goes with the process.
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", port]
        + ["--parent", str(os.getpid())]
        + ["--live"] * live,
        env=environ | _reader,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # A session of its own: Jupyter's Interrupt must not reach it.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    if ready:
        return Provider(json.loads(ready)["url"], process, live=live)
    process.wait()
    if earlier:
        return _start(None, live)
    errors.seek(0)
    raise ProviderError(
        f"The provider could not be started (exit code {process.returncode}). "
        f"It said: {errors.read().strip() or 'nothing'}"
    )


def _note_addresses() -> None:
    """Remember the addresses that the reader set, before they are replaced."""
    ours = f"{_current.url}/v1" if _current else None
    if any(os.environ.get(name) != ours for name in ADDRESSES):
        found = {name: os.environ.get(name, "") for name in ADDRESSES}
        _reader.clear()
        theirs = {name: url for name, url in found.items() if url not in ("", ours)}
        _reader.update(theirs)


def _no_key() -> bool:
    return os.environ.get("OPENAI_API_KEY", "") in ("", NO_KEY)


def _set_environment(url: str) -> None:
    """Set what the OpenAI clients, LangChain and their HTTP library read."""
    environ = os.environ
    for name in ADDRESSES:
        environ[name] = f"{url}/v1"
    environ["OPENAI_API_KEY"] = environ.get("OPENAI_API_KEY") or NO_KEY
    environ.setdefault("LANGSMITH_TRACING", "false")
    if not urllib.request.getproxies():
        return  # and no NO_PROXY: LangChain would warn of a proxy set-up
    # Where both are set, the clients read the second name only.
    listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += sorted({"127.0.0.1", "localhost"}.difference(hosts))
    environ["NO_PROXY"] = environ["no_proxy"] = ",".join(hosts)


def _raise_file_limit() -> None:
    """Let this process open enough sockets for the larger lessons."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < FILES_WANTED:  # below 0: as many as wanted
            wanted = min(hard, FILES_WANTED) if hard >= 0 else FILES_WANTED
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tell_when_it_ends() -> None:
    """In a notebook, say under a cell that the provider is no longer there."""
    ipython = sys.modules.get("IPython")  # a script has none, and needs none
    shell = ipython.get_ipython() if ipython else None
    if shell and _notice not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _notice)


def _notice(result: object) -> None:
    if _current is not None and _current.exit_code is not None:
        print(_current.lost(), file=sys.stderr)
