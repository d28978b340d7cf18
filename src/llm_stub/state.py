"""The state of a running stub: one object that all routes share."""

import copy
from dataclasses import dataclass, field
from typing import Any

from .capacity import Capacity
from .journal import Journal
from .limits import Limits
from .plan import Tries
from .settings import Settings


@dataclass
class State:
    """The settings, and everything that depends on them or on earlier calls."""

    settings: Settings = field(default_factory=Settings)
    journal: Journal = field(default_factory=Journal)
    limits: Limits = field(default_factory=Limits)
    capacity: Capacity = field(default_factory=Capacity)
    tries: Tries = field(default_factory=Tries)

    def change(self, changes: dict[str, Any]) -> None:
        """Change settings. If one is invalid, raise ValueError and change nothing.

        Unless `changes` is empty, the count of every prompt's tries restarts, even if
        no value is different.
        """
        changed = self.settings.changed(changes)
        if changes:
            self.tries.clear()
        if changed == self.settings:
            return
        self.settings = changed
        # Calls that have started keep the limits that they started with.
        self.limits = copy.copy(self.limits)
        self.limits.change(changed, self.journal.now())
        self.capacity.change(changed.capacity)
