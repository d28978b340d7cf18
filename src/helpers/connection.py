"""Start, find and stop the stub, and point the OpenAI clients at it."""

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

from . import environment

MAX_ERROR_OUTPUT = 2000  # characters in a message

_opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({}),
    # Otherwise Python 3.12 and later load certificates here, which can fail.
    urllib.request.HTTPSHandler(context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)),
)
_current: "Provider | None" = None
_lock = threading.Lock()  # held by the thread that is connecting


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may hold it during a fork
    os.register_at_fork(after_in_child=_renew_lock)


class ProviderError(RuntimeError):
    """The stub could not be started, or doesn't answer."""


class Provider:
    """The stub, as a notebook sees it."""

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[str] | None = None,
        *,
        errors: IO[bytes] | None = None,
        live: bool = False,
        started_with: dict[str, str] | None = None,
    ) -> None:
        self.url = url  # the OpenAI API is under /v1
        self.live = live
        # Live mode's upstream and model; None if connect() didn't start the stub.
        self.started_with = started_with
        self._process = process
        self._errors = errors  # the file with the error output of the process
        self._owner = os.getpid()
        self._settings: dict[str, Any] = {}

    def __repr__(self) -> str:
        if self.live:
            calls, tokens = (
                self._settings[f"max_{name}"] for name in ("calls", "tokens")
            )
            return f"<Provider: LIVE, up to {calls} calls and {tokens} tokens>"
        where = "started by this process" if self._own_process else "found running"
        return f"<Provider: a stub of OpenAI on this machine, {where}>"

    @property
    def _own_process(self) -> subprocess.Popen[str] | None:
        """The stub's process; None if this process didn't start it."""
        forked = os.getpid() != self._owner  # the parent's process isn't our child
        return None if forked else self._process

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process; None if it is running or wasn't started here."""
        return self._own_process.poll() if self._own_process else None

    def configure(self, **settings: Any) -> dict[str, Any]:
        """Change settings (see `connect`), and return all of them.

        Raises ValueError for a setting that doesn't exist or is out of range.
        """
        self._settings = self.ask("/_provider/config", "PATCH", settings)
        return dict(self._settings)

    @contextlib.contextmanager
    def behaving(self, **settings: Any) -> Iterator["Provider"]:
        """Change settings inside a `with` block.

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
        """Stop the stub, if this process started it."""
        if self._own_process:
            self._own_process.terminate()
            self._own_process.wait()

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Send a control request; return the JSON of the response.

        Raises ProviderError if the stub doesn't answer, and ValueError if it
        rejects the request.
        """
        try:
            data = None if body is None else json.dumps(body).encode()
        except TypeError as error:
            raise ValueError(f"{body!r:.200} can't be sent as JSON: {error}") from None
        try:
            request = urllib.request.Request(self.url + path, data, method=method)
            with _opener.open(request, timeout=10) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 400:  # another server is answering
                raise ProviderError(self.explain_no_answer(error)) from None
            raise ValueError(
                f"The stub rejected the request: {json.load(error)['error']}"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ProviderError(self.explain_no_answer(error)) from None

    def _recognize(self) -> None:
        """Find out whether the stub is live; ProviderError if it doesn't answer."""
        try:
            self.live = bool(self.ask("/_provider/stats")["live"])
        except (LookupError, OSError, TypeError, ValueError, http.client.HTTPException):
            error = OSError("another server answers there")
            raise ProviderError(self.explain_no_answer(error)) from None

    def explain_no_answer(self, error: Exception | None = None) -> str:
        """Message for a stub that doesn't answer: what happened, and what to do."""
        if self._own_process:  # its socket may close a moment before it exits
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._own_process.wait(1)
        if self.exit_code is not None:
            message = (
                f"The stub has stopped (exit code {self.exit_code}). Run connect() "
                "again: it starts a new one at the same address."
            )
            output = _end_of(self._errors)
            if output and self.exit_code not in (0, -signal.SIGTERM):
                message += f" The end of its error output:\n{output}"
            return message
        reason = getattr(error, "reason", None) or error
        message = f"Can't reach the stub at {self.url} ({reason}). "
        if self._own_process:
            return message + "Restart the kernel, then run connect() again."
        if self.url != environment.provider_url():
            return message + "Run connect() again: it starts a new one."
        return message + (
            "LLM_PROVIDER_URL points there. Start it with `python -m llm_stub --port "
            "8000`, or unset LLM_PROVIDER_URL. Then run connect() again."
        )


def connect(*, live: bool | None = None, **settings: Any) -> Provider:
    """Start the stub and point the OpenAI clients of this process at it.

    Call it before you build a client. A second call returns the same stub, or
    starts a new one at the same address if it has stopped. A child process uses
    its parent's stub, if it is running in the same mode. If LLM_PROVIDER_URL is
    set, `connect` uses the stub at that address.

    Settings, all optional: `first_token` and `per_token` (seconds), `jitter`
    (0 to 1, how far a prompt's latency may deviate from these), `seed`,
    `models` (the only model names that exist; None accepts any), and the limits,
    capacity and faults in `llm_stub/settings.py`.

    With `live`, or LLM_LIVE=1 in the environment, calls are forwarded to the
    server at OPENAI_BASE_URL, or to OpenAI, with the key from OPENAI_API_KEY and
    the model from LLM_MODEL, which doesn't apply to embeddings. They are refused
    once `max_calls` or `max_tokens` is reached. A chat or response without a token
    limit is sent with `max_answer_tokens`. The count and the caps survive when you
    switch modes or stop the stub. Child processes share them if you call `connect`
    before you start them.

    Raises ProviderError if the stub can't be started or reached, and ValueError
    for a setting that doesn't exist or is out of range. Even after an error, no
    client calls another server: calls go to a running stub, or fail. The exceptions
    are clients that your code points elsewhere, for example with `base_url`,
    `azure_endpoint`, `data_residency` or `provider`.
    """
    with _lock:
        return _connect(live, settings)


def _connect(live: bool | None, settings: dict[str, Any]) -> Provider:
    global _current
    running = _running()
    # Until it is clear that live mode is wanted, no call may be forwarded.
    _point_clients_at(running if running and not running.live else None)
    environment.raise_file_limit()
    if live not in (True, False, None):
        raise ValueError(f"live={live!r} must be True, False or None.")
    asked_for_stub = live is False
    if live is None:
        live = environment.switch("LLM_LIVE")
    url = environment.provider_url()
    wanted = {}
    if live:
        _reject_unusable_live_mode(url)
        wanted = environment.record().own
        wanted["LLM_MODEL"] = os.environ.get("LLM_MODEL", "")
    if url:
        found = Provider(url)
        found._recognize()
        if found.live and asked_for_stub:
            raise ProviderError(
                f"live=False, but LLM_PROVIDER_URL is set to {url}, and the stub there "
                "is in live mode. Unset LLM_PROVIDER_URL, or leave out live=False."
            )
    elif running and (running.live, running.started_with) == (live, wanted):
        found = running
    else:
        _point_clients_at(None)
        earlier = _current if _current and _current._own_process else None
        if earlier:
            earlier.stop()
        found = _start(earlier.url if earlier else None, live)
        found.started_with = wanted
    _current = found
    if not found.live:  # in live mode, no call may be sent before the caps are set
        _point_clients_at(found)
    _current.configure(**settings)
    _point_clients_at(found)
    _report_when_it_ends()
    return _current


def _point_clients_at(stub: Provider | None) -> None:
    """Point clients at the stub; without one, at an address that has no server."""
    stub = stub or Provider(environment.NO_STUB)
    environment.point_clients_at(
        stub.url, live=stub.live, started_with=stub.started_with
    )


def _running() -> Provider | None:
    """The stub that this process or its parent started, if it is running."""
    if _current and _current._own_process:
        return _current if _current.exit_code is None else None
    last = environment.record()
    if last.started_with is None:
        return None
    found = _current
    if found is None or found.url != last.url:
        found = Provider(last.url, started_with=last.started_with)
    with contextlib.suppress(ProviderError):
        found._recognize()
        return found
    return None


def _reject_unusable_live_mode(url: str) -> None:
    """Raise ProviderError if live mode can't work in this environment."""
    if url:
        raise ProviderError(
            f"Live mode starts its own stub, but LLM_PROVIDER_URL is set to {url}. "
            "Unset it, unless the stub there was started with --live. In that case, "
            "leave out live=True and unset LLM_LIVE."
        )
    for name in environment.unusable_headers():
        raise ProviderError(
            f"Live mode sends {name} in a header, but its value contains a line break, "
            "a non-ASCII character, or a space at the start or end. Correct it, then "
            "run connect() again."
        )
    if len({address.rstrip("/") for address in environment.record().own.values()}) > 1:
        raise ProviderError(
            "OPENAI_BASE_URL and OPENAI_API_BASE are set to different servers, so live "
            "mode doesn't know where to send calls. Unset one of them, then run "
            "connect() again."
        )
    if environment.count_is_lost():
        raise ProviderError(
            "The file in which live mode counts what it uses has been deleted: "
            f"{environment.record().count}. To start from zero, restart Python."
        )
    if not environment.record().own and not environment.has_key():
        raise ProviderError(
            "Live mode calls OpenAI, and OPENAI_API_KEY is not set. Set it, or set "
            "OPENAI_BASE_URL to a server that needs no key. Then run connect() again."
        )


def current() -> Provider:
    """The stub that `connect` returned last; ProviderError if there is none."""
    if _current is None:
        raise ProviderError("There is no stub yet: run connect() first.")
    return _current


def _start(earlier_url: str | None, live: bool) -> Provider:
    """Start the process, at the earlier address if that is free."""
    port = earlier_url.rpartition(":")[2] if earlier_url else "0"
    try:
        # A file, because a pipe that nobody reads would fill up.
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_stub", "--port", port]
            + ["--parent", str(os.getpid())]
            + ["--live", "--count", environment.record().count] * live,
            env=environment.for_stub_process(live=live),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Its own process session, so that Jupyter's Interrupt doesn't reach it.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    except (OSError, TypeError) as error:  # TypeError: sys.executable is None
        raise ProviderError(f"The stub could not be started: {error}") from None
    assert process.stdout is not None
    ready = process.stdout.readline()
    if ready:
        return Provider(json.loads(ready)["url"], process, errors=errors, live=live)
    process.wait()
    if earlier_url:
        return _start(None, live)
    raise ProviderError(
        f"The stub could not be started (exit code {process.returncode}). "
        f"Its error output: {_end_of(errors) or 'none'}"
    )


def _end_of(errors: IO[bytes] | None) -> str:
    """The end of the error output of a stub that has stopped."""
    if errors is None:  # not started by connect()
        return ""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4 * MAX_ERROR_OUTPUT))
    return errors.read().decode(errors="replace").strip()[-MAX_ERROR_OUTPUT:]


def _report_when_it_ends() -> None:
    """In a notebook, print a message below the cell if the stub has stopped."""
    ipython = sys.modules.get("IPython")  # a script has none, and needs none
    shell = ipython.get_ipython() if ipython else None
    if shell and _report not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _report)


def _report(result: object) -> None:
    if _current is not None and _current.exit_code is not None:
        print(_current.explain_no_answer(), file=sys.stderr)
