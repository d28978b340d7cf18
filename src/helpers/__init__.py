"""What a notebook imports: `connect`, `Timeline` and `check`.

    from helpers import connect, Timeline, check
    provider = connect()

`connect` starts the stub, a local server that imitates OpenAI's API, and points
the OpenAI clients of this process at it. `Timeline` shows the calls that the stub
received. `check` turns a claim into a test.
"""

from .checks import check
from .connection import connect
from .timeline import Timeline

__all__ = ["Timeline", "check", "connect"]
