"""`Chooser`: the pick of localmesh.core.pick, with what this process knows, and with the reason when there is none."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, unique

from localmesh.balancing.ejection import Ejections
from localmesh.balancing.load import LocalLoad
from localmesh.core.ids import HolderId, ModelName, ReplicaId
from localmesh.core.pick import Candidate, candidates, pick_best_replica
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot


@unique
class Shortage(Enum):
    """Why no replica can be chosen."""

    NO_REPLICA = "no replica is ready"
    """None is routable: one has to be loaded, or is being loaded."""
    FULL = "every replica is at its limit"
    """There are routable ones, but each is at its limit, or has refused this request."""
    EJECTED = "every replica that is ready was lost a moment ago"
    """There are routable ones, but each is ejected."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Either a replica, or why there is none."""

    replica: ReplicaRecord | None
    shortage: Shortage | None = None


class Chooser:
    """Chooses replicas for one holder. It remembers nothing but what `load` and `ejections` hold.

    Args:
        holder: Whose own requests `load` counts; what it has published itself is left out of the sums.
        load: Its own requests.
        ejections: Replicas that it saw fail.
        salt: Breaks ties; different for each holder.
        dice: Source of the two samples of the power of two choices; seeded by the caller.
        many_holders: From this number of holders on (this one included) a pick looks at two sampled candidates only.
            Each holder's view is old by the time it acts: if many apply the full order, they all run to the same best
            replica; two random candidates spread them, and are nearly as good.
    """

    def __init__(
        self,
        *,
        holder: HolderId,
        load: LocalLoad,
        ejections: Ejections,
        salt: bytes,
        dice: random.Random,
        many_holders: int = 5,
    ) -> None:
        self._holder = holder
        self._load = load
        self._ejections = ejections
        self._salt = salt
        self._dice = dice
        self._many_holders = many_holders

    def choose(
        self, snapshot: Snapshot, model: ModelName, *, now: float, avoid: Collection[ReplicaId] = frozenset()
    ) -> Choice:
        """Choose a replica for a request, without counting it: that is `LocalLoad.begin`.

        Args:
            snapshot: The newest.
            model: The model asked for.
            now: Point in time, for the ejections.
            avoid: Replicas that have refused this very request.
        """
        eligible: Sequence[Candidate] = candidates(
            snapshot,
            model,
            holder=self._holder,
            own_in_flight=self._load.in_flight,
            last_used=self._load.last_used,
            ejected=lambda replica: replica in avoid or self._is_ejected(snapshot, replica, now),
        )
        if self._samples(snapshot, model):
            eligible = self._two_of(eligible)
        best = pick_best_replica(eligible, salt=self._salt)
        if best is not None:
            return Choice(best.replica)
        return Choice(None, self._shortage(snapshot, model, now))

    def _is_ejected(self, snapshot: Snapshot, replica_id: ReplicaId, now: float) -> bool:
        replica = snapshot.replica(replica_id)
        return replica is not None and self._ejections.ejected(replica, now=now)

    def _samples(self, snapshot: Snapshot, model: ModelName) -> bool:
        return 1 + len(other_holders(snapshot, model, self._holder)) >= self._many_holders

    def _two_of(self, eligible: Sequence[Candidate]) -> Sequence[Candidate]:
        if len(eligible) <= 2:
            return eligible
        return self._dice.sample(sorted(eligible, key=lambda c: c.replica.id), 2)

    def _shortage(self, snapshot: Snapshot, model: ModelName, now: float) -> Shortage:
        routable = [replica for replica in snapshot.replicas_of(model) if snapshot.routable(replica)]
        if not routable:
            return Shortage.NO_REPLICA
        if all(self._ejections.ejected(replica, now=now) for replica in routable):
            return Shortage.EJECTED
        return Shortage.FULL


def other_holders(snapshot: Snapshot, model: ModelName, holder: HolderId) -> set[HolderId]:
    """Return the holders that have published requests on the model's replicas, without `holder`.

    The replicas' own counts (holder "self") are no holders: they pick nothing.
    """
    found: set[HolderId] = set()
    for replica in snapshot.replicas_of(model):
        found.update(snapshot.inflight.get(replica.id, ()))
    return found - {holder, SELF}


SELF = HolderId("self")
"""The holder name under which a replica's own count of running calls stands in the store."""
