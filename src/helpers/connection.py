"""Start, find and stop the stub, and point the OpenAI clients at it."""

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

from . import environment

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_current: "Provider | None" = None


class ProviderError(RuntimeError):
    """The stub could not be started, or doesn't answer."""


class Provider:
    """The stub, as a notebook sees it."""

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[str] | None = None,
        *,
        live: bool = False,
    ) -> None:
        self.url = url  # the OpenAI API is under /v1
        self.live = live
        self.started_with: dict[str, str] = {}  # live mode's upstream and model
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
        """Exit code of the process; None if it is running or wasn't started here."""
        return self._process.poll() if self._process else None

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
        if self._process:
            self._process.terminate()
            self._process.wait()

    def ask(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Send a control request; return the JSON of the response.

        Raises ProviderError if the stub doesn't answer, and ValueError if it
        rejects the request.
        """
        data = None if body is None else json.dumps(body).encode()
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

    def explain_no_answer(self, error: Exception | None = None) -> str:
        """Message for a stub that doesn't answer: what happened, and what to do."""
        if self._process:  # its socket may close a moment before it exits
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        if self.exit_code is not None:
            return (
                f"The stub has stopped (exit code {self.exit_code}). Run connect() "
                "again: it starts a new one at the same address."
            )
        reason = getattr(error, "reason", None) or error
        message = f"Can't reach the stub at {self.url} ({reason}). "
        if self._process:
            return message + "Restart the kernel, then run connect() again."
        return message + (
            "LLM_PROVIDER_URL points there. Start it with `python -m llm_stub --port "
            "8000`, or unset LLM_PROVIDER_URL. Then run connect() again."
        )


def connect(*, live: bool | None = None, **settings: Any) -> Provider:
    """Start the stub and point the OpenAI clients of this process at it.

    Call it before you build a client. A second call returns the same stub, or
    starts a new one at the same address if it has stopped. If LLM_PROVIDER_URL is
    set, `connect` uses the stub at that address.

    Settings, all optional: `first_token` and `per_token` (seconds), `jitter`
    (0 to 1, how far a prompt's latency may deviate from these), `seed`,
    `models` (the only model names that exist; None accepts any), and the limits,
    capacity and faults in `llm_stub/settings.py`.

    With `live`, or LLM_LIVE=1 in the environment, calls are forwarded to the
    server at OPENAI_BASE_URL, or to OpenAI, with the key from OPENAI_API_KEY and
    the model from LLM_MODEL. They are refused once `max_calls` or `max_tokens`
    is reached.

    Raises ProviderError if the stub can't be started or reached, and ValueError
    for a setting that doesn't exist or is out of range.
    """
    global _current
    environment.raise_file_limit()
    if live is None:
        live = environment.live_wanted()
    url = os.environ.get("LLM_PROVIDER_URL", "").rstrip("/")
    if url and live:
        raise ProviderError(
            f"Live mode starts its own stub, but LLM_PROVIDER_URL is set to {url}. "
            "Unset it, or start the stub there with --live and unset LLM_LIVE."
        )
    environment.remember_own_addresses(_current.url if _current else None)
    own = environment.own_addresses
    if live and not own and not environment.has_key():
        raise ProviderError(
            "Live mode calls OpenAI, and OPENAI_API_KEY is not set. Set it, or set "
            "OPENAI_BASE_URL to a server that needs no key. Then run connect() again."
        )
    wanted = own | {"LLM_MODEL": os.environ.get("LLM_MODEL", "")} if live else {}
    if url:
        _current = Provider(url)
    elif _current is None or _current._process is None:
        _current = _start(None, live)
    elif (
        _current.exit_code is not None
        or _current.live != live
        or _current.started_with != wanted
    ):
        _current.stop()
        _current = _start(_current.url, live)
    _current.started_with = wanted
    _current.configure(**settings)
    if url:
        _current.live = bool(_current.ask("/_provider/stats")["live"])
    environment.point_clients_at(_current.url)
    _report_when_it_ends()
    return _current


def current() -> Provider:
    """The stub that `connect` returned last; ProviderError if there is none."""
    if _current is None:
        raise ProviderError("There is no stub yet: run connect() first.")
    return _current


def _start(earlier_url: str | None, live: bool) -> Provider:
    """Start the process, at the earlier address if that is free."""
    port = earlier_url.rpartition(":")[2] if earlier_url else "0"
    # A file, because a pipe that nobody reads would fill up.
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_stub", "--port", port]
        + ["--parent", str(os.getpid())]
        + ["--live"] * live,
        env=environment.for_stub_process(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # Its own process session, so that Jupyter's Interrupt doesn't reach it.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    if ready:
        return Provider(json.loads(ready)["url"], process, live=live)
    process.wait()
    if earlier_url:
        return _start(None, live)
    errors.seek(0)
    raise ProviderError(
        f"The stub could not be started (exit code {process.returncode}). "
        f"Its error output: {errors.read().strip() or 'none'}"
    )


def _report_when_it_ends() -> None:
    """In a notebook, print a message below the cell if the stub has stopped."""
    ipython = sys.modules.get("IPython")  # a script has none, and needs none
    shell = ipython.get_ipython() if ipython else None
    if shell and _report not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _report)


def _report(result: object) -> None:
    if _current is not None and _current.exit_code is not None:
        print(_current.explain_no_answer(), file=sys.stderr)
