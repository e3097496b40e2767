"""What this process itself has in flight on each replica, and when it last used it."""

from collections.abc import Collection

from localmesh.core.ids import ReplicaId


class LocalLoad:
    """Exact counts of own requests, and a logical clock of own picks.

    A request counts from the moment it was assigned to a replica, before anything is awaited: so requests that arrive
    together see one another and spread. The clock is a counter of picks, never the time of day; a replica that was
    never picked is older than all others.
    """

    def __init__(self) -> None:
        self._picks = 0
        self._in_flight: dict[ReplicaId, int] = {}
        self._last_used: dict[ReplicaId, int] = {}

    def begin(self, replica: ReplicaId) -> None:
        """Count a request that was assigned to the replica."""
        self._picks += 1
        self._last_used[replica] = self._picks
        self._in_flight[replica] = self._in_flight.get(replica, 0) + 1

    def end(self, replica: ReplicaId) -> None:
        """Count it out again: it ended, in whatever way.

        Raises:
            ValueError: More requests ended than began, which would make the replica look idle for ever.
        """
        count = self._in_flight.get(replica, 0) - 1
        if count < 0:
            raise ValueError(f"a request on {replica} ended that never began")
        if count:
            self._in_flight[replica] = count
        else:
            del self._in_flight[replica]

    def in_flight(self, replica: ReplicaId) -> int:
        """Return the number of own requests in flight."""
        return self._in_flight.get(replica, 0)

    def last_used(self, replica: ReplicaId) -> int:
        """Return the logical time of the last pick; 0 if there was none."""
        return self._last_used.get(replica, 0)

    def forget_all_but(self, replicas: Collection[ReplicaId]) -> None:
        """Forget the last use of replicas that are gone. Counts stay until their requests end."""
        self._last_used = {r: used for r, used in self._last_used.items() if r in replicas or r in self._in_flight}

    @property
    def total(self) -> int:
        """Own requests in flight, on all replicas."""
        return sum(self._in_flight.values())
