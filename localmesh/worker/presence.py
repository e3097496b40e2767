"""When a registration is surely over, and which registry to ask next. Pure: time and chance are given."""

from collections.abc import Sequence
from random import Random

BACKOFF_FIRST_SECONDS = 0.1
BACKOFF_MOST_SECONDS = 2.0


class Presence:
    """The life of one registration after another, as the worker can know it.

    The registry renews the node's leases when it gets a heartbeat. The worker learns of it by the answer, so what
    counts is when the answered heartbeat was sent, plus the time to live: from then on the registration may be over.
    """

    def __init__(self) -> None:
        self._incarnation = 0
        self._ttl_seconds = 0.0
        self._until = 0.0
        self._sent: dict[int, float] = {}

    @property
    def incarnation(self) -> int:
        """The present incarnation, 0 without one."""
        return self._incarnation

    def registered(self, incarnation: int, *, ttl_seconds: float, sent_at: float) -> None:
        """Begin a registration.

        Args:
            incarnation: Its id.
            ttl_seconds: How long it lives without a heartbeat.
            sent_at: When the request was sent.
        """
        self._incarnation = incarnation
        self._ttl_seconds = ttl_seconds
        self._until = sent_at + ttl_seconds
        self._sent.clear()

    def lost(self) -> None:
        """End it: the registry says so."""
        self._incarnation = 0
        self._sent.clear()

    def new_stream(self) -> None:
        """Forget the heartbeats of an earlier stream: their numbers are used again."""
        self._sent.clear()

    def sent(self, sequence: int, *, now: float) -> None:
        """A heartbeat is about to be sent."""
        self._sent[sequence] = now

    def acknowledged(self, sequence: int) -> None:
        """A heartbeat was answered, and those before it are as good as answered."""
        sent_at = self._sent.get(sequence)
        if sent_at is None:
            return
        self._until = max(self._until, sent_at + self._ttl_seconds)
        self._sent = {s: at for s, at in self._sent.items() if s > sequence}

    def alive(self, *, now: float) -> bool:
        """Whether the registration is surely not over yet."""
        return self._incarnation != 0 and now < self._until


class Rotation:
    """Which registry to use, and how long to wait after a failure.

    Args:
        endpoints: Addresses, at least one.
        chance: Spreads the workers' attempts.
    """

    def __init__(self, endpoints: Sequence[str], *, chance: Random) -> None:
        if not endpoints:
            raise ValueError("no registry is given")
        self._endpoints = tuple(endpoints)
        self._chance = chance
        self._index = 0
        self._failures = 0

    @property
    def endpoint(self) -> str:
        """The registry to use now."""
        return self._endpoints[self._index]

    def worked(self) -> None:
        """The registry answered: the next failure is the first again."""
        self._failures = 0

    def failed(self, *, rotate: bool) -> float:
        """Count a failure and return how many seconds to wait.

        Args:
            rotate: Use the next registry.
        """
        if rotate:
            self._index = (self._index + 1) % len(self._endpoints)
        most = min(BACKOFF_MOST_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return self._chance.uniform(BACKOFF_FIRST_SECONDS / 2, most)
