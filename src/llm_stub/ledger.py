"""How much live mode has used, and its caps, in a file that several stubs share."""

import json
import sqlite3
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    calls INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0,
    caps TEXT NOT NULL DEFAULT '{}'
);
INSERT OR IGNORE INTO ledger (id) VALUES (1);
"""
WAIT = 10  # seconds for another stub to finish writing


class Ledger:
    """One count of calls and tokens, and one set of caps, in an SQLite file.

    All stubs that are given the same file share the count and the caps, whether they
    run at the same time or one after another. Both survive if a stub crashes or is
    killed. Every method raises sqlite3.Error if the file can't be read or written.
    """

    def __init__(self, path: str = ":memory:") -> None:
        self._db = sqlite3.connect(
            path, timeout=WAIT, isolation_level=None, check_same_thread=False
        )
        self._db.execute("PRAGMA synchronous = OFF")  # a power cut may lose the count
        self._db.executescript(SCHEMA)

    @property
    def used(self) -> tuple[int, int]:
        """Calls and tokens counted so far."""
        calls, tokens = self._db.execute("SELECT calls, tokens FROM ledger").fetchone()
        return calls, tokens

    def take(self, tokens: int, max_calls: int, max_tokens: int) -> bool:
        """Count a call and its tokens; return False instead if that exceeds a cap."""
        update = """UPDATE ledger SET calls = calls + 1, tokens = tokens + ?1
            WHERE calls + 1 <= ?2 AND tokens + ?1 <= ?3"""
        return self._db.execute(update, (tokens, max_calls, max_tokens)).rowcount == 1

    def add(self, calls: int, tokens: int) -> None:
        """Change the count by these numbers, regardless of the caps."""
        update = "UPDATE ledger SET calls = calls + ?, tokens = tokens + ?"
        self._db.execute(update, (calls, tokens))

    @property
    def caps(self) -> dict[str, Any]:
        """The settings that were stored last."""
        [text] = self._db.execute("SELECT caps FROM ledger").fetchone()
        caps: dict[str, Any] = json.loads(text)
        return caps

    @caps.setter
    def caps(self, caps: dict[str, Any]) -> None:
        self._db.execute("UPDATE ledger SET caps = ?", (json.dumps(caps),))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
