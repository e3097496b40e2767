"""Ports of replicas: any free one, or one of a range that is not reused at once."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from localmesh.core.errors import LoadFailed

QUARANTINE_SECONDS = 15.0
"""A port rests this long after its replica, so that a late caller of the old one does not reach a new one."""


class PortsExhausted(LoadFailed):
    """Every port of the range is taken or rests."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: They are no ports, or the wrong way round.
        """
        if not 1 <= self.first <= self.last <= 65535:
            raise ValueError(f"not a range of ports: {self.first}-{self.last} (expected e.g. 9600-9699)")

    @classmethod
    def parse(cls, text: str) -> "PortRange":
        """Read "9600-9699", or "9600" for one port.

        Raises:
            ValueError: It is no range of ports.
        """
        match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", text)
        if match is None:
            raise ValueError(f"not a range of ports: {text!r} (expected e.g. 9600-9699)")
        first, last = match.groups()
        return cls(int(first), int(last or first))


class PortAllocator:
    """Hands out ports of a range, each to one replica at a time.

    Args:
        ports: The range; None lets the system choose, which is port 0.
        is_free: Whether nobody else listens on a port. Asked before a port is handed out.
    """

    def __init__(self, ports: PortRange | None, *, is_free: Callable[[int], bool]) -> None:
        self._ports = ports
        self._is_free = is_free
        self._taken: set[int] = set()
        self._rests_until: dict[int, float] = {}

    def take(self, *, now: float) -> int:
        """Return a port, 0 where the system shall choose.

        Raises:
            PortsExhausted: None is free.
        """
        if self._ports is None:
            return 0
        for port in range(self._ports.first, self._ports.last + 1):
            if port in self._taken or self._rests_until.get(port, now) > now or not self._is_free(port):
                continue
            self._rests_until.pop(port, None)
            self._taken.add(port)
            return port
        raise PortsExhausted(
            f"every port from {self._ports.first} to {self._ports.last} is in use or rests for"
            f" {QUARANTINE_SECONDS:.0f} s after its last use: give the worker a wider range of replica ports"
        )

    def give_back(self, port: int, *, now: float) -> None:
        """End the use of a port. What `take` did not hand out is ignored."""
        if port in self._taken:
            self._taken.discard(port)
            self._rests_until[port] = now + QUARANTINE_SECONDS
