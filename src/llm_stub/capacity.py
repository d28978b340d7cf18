"""A limit on how many calls are answered at once, with a first-in, first-out queue."""

import asyncio
from collections import deque


class Capacity:
    """Slots for calls. A call waits in the queue until a slot is free."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self._used = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    def change(self, limit: int | None) -> None:
        """Change the limit (None for no limit). Waiting calls start if they now fit."""
        self.limit = limit
        self._admit()

    async def enter(self) -> bool:
        """Take a slot; return whether the call had to wait. `leave` frees the slot."""
        if self._free():  # then nobody else is waiting either
            self._used += 1
            return False
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it got its slot just before it was cancelled
                self.leave()
            raise
        return True

    def leave(self) -> None:
        """Free a slot."""
        self._used -= 1
        self._admit()

    def _free(self) -> bool:
        return self.limit is None or self._used < self.limit

    def _admit(self) -> None:
        while self._queue and self._free():
            turn = self._queue.popleft()
            if not turn.done():  # if done, it was cancelled while it waited
                self._used += 1
                turn.set_result(None)
