"""Replicas that this process does not pick for a while, because it saw them fail."""

from localmesh.core.ids import ReplicaId
from localmesh.core.records import ReplicaRecord


class Ejections:
    """Who is ejected, and until when. An ejection is local, short, and ends early when the replica's record changes.

    The early end is what makes it safe to be quick: a replica that was replaced, reported anew or adopted is another
    record, and gets its chance at once.
    """

    def __init__(self) -> None:
        self._entries: dict[ReplicaId, tuple[int, float]] = {}

    def eject(self, replica: ReplicaRecord, *, until: float) -> None:
        """Do not pick the replica, as it is recorded now, before `until`. A longer ejection is never shortened."""
        known = self._entries.get(replica.id)
        if known is not None and known[0] == replica.mod_revision:
            until = max(until, known[1])
        self._entries[replica.id] = (replica.mod_revision, until)

    def ejected(self, replica: ReplicaRecord, *, now: float) -> bool:
        """Whether the replica is ejected at the point in time `now`."""
        entry = self._entries.get(replica.id)
        return entry is not None and entry[0] == replica.mod_revision and now < entry[1]

    def next_end(self, *, now: float) -> float | None:
        """Return the point in time at which the next ejection ends, and forget those that have ended."""
        self._entries = {replica: entry for replica, entry in self._entries.items() if now < entry[1]}
        return min((until for _, until in self._entries.values()), default=None)
