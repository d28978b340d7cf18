"""The environment variables that OpenAI clients read, and the open-file limit."""

import os
import sys
import urllib.request

FILES_WANTED = 8192  # open files: one per connection, and macOS starts with 256
ADDRESSES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")  # LangChain prefers the second
NO_KEY = "stub"  # the key for clients that require one

own_addresses: dict[str, str] = {}
"""The ADDRESSES as they were set before `point_clients_at` replaced them."""


def live_wanted() -> bool:
    """Whether LLM_LIVE turns live mode on."""
    return os.environ.get("LLM_LIVE", "0") not in ("", "0")


def has_key() -> bool:
    """Whether a real API key is set."""
    return os.environ.get("OPENAI_API_KEY", "") not in ("", NO_KEY)


def remember_own_addresses(stub_url: str | None) -> None:
    """Store the addresses that aren't the stub's, before they are replaced."""
    stub = f"{stub_url}/v1" if stub_url else None
    if any(os.environ.get(name) != stub for name in ADDRESSES):
        found = {name: os.environ.get(name, "") for name in ADDRESSES}
        own_addresses.clear()
        own = {name: url for name, url in found.items() if url not in ("", stub)}
        own_addresses.update(own)


def for_stub_process() -> dict[str, str]:
    """The environment of the stub's process.

    It has no API key, because clients send theirs with each call. It has the
    user's own addresses, because live mode forwards to them.
    """
    hidden = {*ADDRESSES, "OPENAI_API_KEY"}
    environ = {name: text for name, text in os.environ.items() if name not in hidden}
    return environ | own_addresses


def point_clients_at(url: str) -> None:
    """Make OpenAI clients, LangChain and their HTTP library use the stub."""
    environ = os.environ
    for name in ADDRESSES:
        environ[name] = f"{url}/v1"
    environ["OPENAI_API_KEY"] = environ.get("OPENAI_API_KEY") or NO_KEY
    environ.setdefault("LANGSMITH_TRACING", "false")
    if not urllib.request.getproxies():
        return  # with NO_PROXY set, LangChain would warn about proxies
    # If both spellings are set, clients read only the lower-case one.
    listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    if "*" not in hosts:
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
