"""Time as an argument: whoever needs the time is given a clock."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component gets the time from."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back. Deadlines are points on it."""
        ...

    def time(self) -> float:
        """Return seconds since 1970, for people and records; never for deciding what came first."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        """See Clock."""
        return time.monotonic()  # noqa: TID251 - this is the one place

    def time(self) -> float:
        """See Clock."""
        return time.time()  # noqa: TID251 - this is the one place
