"""What a notebook imports: a provider to talk to, and an eye on it.

    from helpers import connect, Timeline, check
    provider = connect()

`connect` starts a local server that plays OpenAI and points the OpenAI
clients of this process at it. `Timeline` shows what that server saw. `check`
turns a claim into a test.
"""

from .checks import check
from .connection import connect
from .timeline import Timeline

__all__ = ["Timeline", "check", "connect"]
