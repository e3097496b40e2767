"""When each replica was last used by anybody, as far as this router can see."""

from collections.abc import Callable, Mapping

from localmesh.core.clock import Clock
from localmesh.core.ids import ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot

_SETTLING_SECONDS = 1.0
"""A replica that has just become READY is left to those who asked for it: their locks are on their way."""


class UsageLog:
    """Remembers in which revision of the store somebody last held a replica.

    The revision is the logical clock that all routers share, so their evictions agree on what was used longest ago. A
    hold that is shorter than the time between two views may be missed; holders keep theirs for a while at zero, so this
    happens to a router that lags only. What was not seen in use counts from when its record was last written.

    Args:
        clock: The time.
        waiting: Returns how many requests of this router wait for a model.
        in_flight: Returns how many requests this router has on a replica.
    """

    def __init__(
        self, clock: Clock, *, waiting: Callable[[ModelName], int], in_flight: Callable[[ReplicaId], int]
    ) -> None:
        self._clock = clock
        self._waiting = waiting
        self._in_flight = in_flight
        self._held_at: dict[ReplicaId, int] = {}
        self._ready_since: dict[ReplicaId, float] = {}
        self._inflight: Mapping[ReplicaId, object] = {}
        self._replicas: object = None

    def observe(self, snapshot: Snapshot) -> None:
        """Take note of a view."""
        # Who is held now was held up to now; who was held in the view before may have been until just before this one.
        for replica in {*self._inflight, *snapshot.inflight}:
            self._held_at[replica] = snapshot.revision
        self._inflight = snapshot.inflight
        if snapshot.replicas is not self._replicas:
            self._replicas = snapshot.replicas
            now = self._clock.monotonic()
            ready = {r.id for r in snapshot.all_replicas() if r.state is ReplicaState.READY}
            self._ready_since = {r: self._ready_since.get(r, now) for r in ready}
            self._held_at = {r: at for r, at in self._held_at.items() if snapshot.replica(r) is not None}

    def last_used(self, replica: ReplicaRecord) -> int:
        """Return the revision of the store at which it was last seen in use."""
        return max(self._held_at.get(replica.id, 0), replica.mod_revision)

    def needed(self, snapshot: Snapshot) -> frozenset[ReplicaId]:
        """Return the replicas that are wanted by requests which hold no lock yet."""
        now = self._clock.monotonic()
        return frozenset(
            r.id
            for r in snapshot.all_replicas()
            if r.state is ReplicaState.READY
            and (
                self._in_flight(r.id)
                or self._waiting(r.id.model)
                or now - self._ready_since.get(r.id, now) < _SETTLING_SECONDS
            )
        )
