"""The environment variables that OpenAI clients read, and the open-file limit."""

import contextlib
import json
import os
import re
import secrets
import ssl
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass, field
from typing import Any

FILES_WANTED = 8192  # open files: one per connection, and macOS starts with 256
ADDRESSES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")  # LangChain prefers the second
BEDROCK = "AWS_BEDROCK_BASE_URL"  # where the SDK's Bedrock clients send calls
KEY = "OPENAI_API_KEY"
NO_KEY = "stub"  # the key for clients that require one
NO_STUB = "http://127.0.0.1:9"  # an address without a server
ON = ("1", "true", "yes", "on", "y", "t")
OFF = ("", "0", "false", "no", "off", "n", "f")

# Variables that the user may have set for other programs. They can stop a client
# from being built, keep it from reaching the stub, or send its calls elsewhere.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
PROXY = re.compile(
    r"(https?://)?([^\s/?#@]*@)?([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?/?", re.IGNORECASE
)
NO_PROXY_HOST = re.compile(r"[\w.*-]+(:\d+)?(/\d+)?|[\da-f:.]+", re.IGNORECASE)
HEADERS = (KEY, "OPENAI_ORG_ID", "OPENAI_ORGANIZATION", "OPENAI_PROJECT_ID")
UNWANTED = (
    "OPENAI_PROXY",  # LangChain uses it even for loopback
    "OPENAI_API_TYPE",  # this and the next three make the SDK call Azure
    "AZURE_OPENAI_API_KEY",
    "AZURE_OPENAI_AD_TOKEN",
    "AZURE_OPENAI_ENDPOINT",
    "LANGCHAIN_TRACING",  # these two are obsolete, and LangChain rejects them
    "LANGCHAIN_HANDLER",
)
UNWANTED_UNLESS_LIVE = (
    "OPENAI_CUSTOM_HEADERS",  # can be malformed or replace the client's own headers
    "LC_OUTPUT_VERSION",  # changes the type of LangChain's answers
    "LANGCHAIN_OPENAI_STREAM_CHUNK_TIMEOUT_S",  # the stub can be slow on purpose
)

NEVER_RESTORED = frozenset(HEADERS + UNWANTED)  # values not recorded: some are keys

RECORD = "LLM_STUB_OF_PARENT"


@dataclass
class Record:
    """What `connect` has done, kept in a variable that child processes inherit."""

    url: str = ""  # where it pointed the clients, without /v1
    live: bool = False
    started_with: dict[str, str] | None = None  # None if connect() didn't start it
    count: str = ""  # the file in which live mode counts what it uses
    counting: bool = False  # whether live mode has created that file
    own: dict[str, str] = field(default_factory=dict)  # the user's ADDRESSES
    aside: dict[str, str] = field(default_factory=dict)  # variables it removed


def record() -> Record:
    """What `connect` has done in this process or in its parent."""
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        found = Record(**json.loads(os.environ.get(RECORD, "{}")))
        texts = [found.url, found.count, *found.own.values(), *found.aside.values()]
        texts += (found.started_with or {}).values()
        if all(isinstance(text, str) for text in texts):
            return found
    return Record()


def switch(name: str) -> bool:
    """Whether a variable is on; ValueError if its value means neither on nor off."""
    text = os.environ.get(name, "")
    word = text.strip().lower()
    if word in ON or word in OFF:
        return word in ON
    raise ValueError(
        f"{name}={text!r} is not a valid value. Set it to {', '.join(ON)} (on) or "
        f"{', '.join(OFF[1:])} (off), or unset it."
    )


def provider_url() -> str:
    """LLM_PROVIDER_URL without a trailing slash; empty if it isn't set."""
    return os.environ.get("LLM_PROVIDER_URL", "").strip().rstrip("/")


def has_key() -> bool:
    """Whether a real API key is set."""
    return os.environ.get(KEY, "") not in ("", NO_KEY)


def unusable_headers() -> list[str]:
    """The variables whose values can't be sent in a header."""
    return [name for name in HEADERS if name in record().aside]


def for_stub_process(*, live: bool) -> dict[str, str]:
    """The environment of the stub's process.

    It has no API key, because clients send theirs with each call. In live mode it
    has the user's own addresses, proxies and certificates.
    """
    hidden = {*ADDRESSES, KEY, RECORD}
    environ = {name: text for name, text in os.environ.items() if name not in hidden}
    if live:
        aside = {name: text for name, text in record().aside.items() if text}
        environ |= aside | record().own
        if "SSLKEYLOGFILE" in record().aside:  # the stub couldn't even start with it
            del environ["SSLKEYLOGFILE"]
    return environ


def point_clients_at(
    url: str, *, live: bool = False, started_with: dict[str, str] | None = None
) -> None:
    """Make OpenAI clients, LangChain and their HTTP library use the stub.

    Records the user's own addresses before replacing them. Removes the variables that
    would break clients, and records those as well.
    """
    environ, last = os.environ, record()
    now = Record(url, live, started_with, last.count or _new_file())
    now.counting, now.own = last.counting, last.own
    if live and started_with is not None:  # not a stub that somebody else has started
        now.counting = True
    replaced = f"{last.url}/v1"
    if any(environ.get(name) != replaced for name in ADDRESSES):  # set by the user
        found = {name: environ.get(name, "") for name in ADDRESSES}
        now.own = {name: at for name, at in found.items() if at not in ("", replaced)}
    # First of all: the rest takes a moment, and can be interrupted.
    now.aside = last.aside
    for name in ADDRESSES:
        environ[name] = f"{url}/v1"
    # A live stub would forward the AWS token to another provider.
    environ[BEDROCK] = f"{NO_STUB if live else url}/v1"
    environ[RECORD] = json.dumps(asdict(now))
    now.aside = {}
    for name, text in last.aside.items():
        if environ.get(name) in (None, NO_KEY):  # the user hasn't set it since
            if name in NEVER_RESTORED:
                now.aside[name] = ""
            else:
                environ[name] = text
    for name, text in [*environ.items()]:
        if _breaks_clients(name, text, live):
            now.aside[name] = "" if name in NEVER_RESTORED else text
            del environ[name]
    environ[KEY] = environ.get(KEY) or NO_KEY
    environ.setdefault("LANGSMITH_TRACING", "false")
    environ[RECORD] = json.dumps(asdict(now))
    _bypass_proxies()
    _forget_module_client()


def count_is_lost() -> bool:
    """Whether live mode has counted what it uses, but the file with it is gone."""
    with contextlib.suppress(OSError):
        return record().counting and os.stat(record().count).st_size == 0  # noqa: PTH116
    return record().counting


def _forget_module_client() -> None:
    """Make `openai.chat` and the like use the new address.

    The openai SDK builds the client behind them when they are first looked at, which
    can be long before a call.
    """
    sdk: Any = sys.modules.get("openai")
    if hasattr(sdk, "_reset_client"):
        sdk._reset_client()
        sdk.api_key = sdk.api_key or None  # it was stored as "" if there was no key


def _new_file() -> str:
    """A path for the count, or "" if there is no temporary folder.

    Only live mode creates the file.
    """
    with contextlib.suppress(OSError):
        name = f"llm_stub_{secrets.token_hex(16)}.sqlite"
        return os.path.join(tempfile.gettempdir(), name)  # noqa: PTH118
    return ""


def _breaks_clients(name: str, text: str, live: bool) -> bool:
    """Whether the variable would make clients fail, or call another server."""
    if not text:
        return False
    if name.upper() in PROXIES:  # clients ignore their case
        return not PROXY.fullmatch(text)
    if name in HEADERS:
        return not (text.isascii() and text.isprintable() and text == text.strip())
    try:
        if name == "SSL_CERT_FILE":
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(text)
        elif name == "SSLKEYLOGFILE":
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = text
    except OSError:
        return True
    return name in UNWANTED or (not live and name in UNWANTED_UNLESS_LIVE)


def _bypass_proxies() -> None:
    """Make clients connect to loopback without a proxy."""
    environ = os.environ
    if not urllib.request.getproxies():
        return  # with NO_PROXY set, LangChain would warn about proxies
    # If both spellings are set, clients read only the lower-case one.
    listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    if listed.strip() == "*":  # no host needs a proxy
        return
    hosts = [host.strip() for host in listed.split(",")]
    hosts = [host for host in hosts if NO_PROXY_HOST.fullmatch(host)]
    hosts += sorted({"127.0.0.1", "localhost"}.difference(hosts))
    environ["NO_PROXY"] = environ["no_proxy"] = ",".join(hosts)


def raise_file_limit() -> None:
    """Let this process open enough sockets for the larger lessons."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < FILES_WANTED:  # below 0 means unlimited
            wanted = min(hard, FILES_WANTED) if hard >= 0 else FILES_WANTED
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
