"""What a notebook imports: a stub of OpenAI to call, and timelines of the calls.

    from helpers import connect, Timeline, check
    provider = connect()

`connect` starts a local server that plays OpenAI, the stub, and points the
OpenAI clients of this process at it. `Timeline` shows what the stub saw. `check`
turns a claim into a test.
"""

from .checks import check
from .connection import connect
from .timeline import Timeline

__all__ = ["Timeline", "check", "connect"]
