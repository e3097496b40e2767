"""PickBestReplica: the one order by which router, SDK and tests choose a replica."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

from localmesh.core.ids import HolderId, ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica that may be picked, with what the pick looks at."""

    replica: ReplicaRecord
    in_flight: int
    """Own exact count plus what other holders published."""
    last_used: int
    """Logical time of the last use; never wall time."""
    free_bytes: int
    """Unclaimed memory of its devices."""


def candidates(
    snapshot: Snapshot,
    model: ModelName,
    *,
    holder: HolderId,
    own_in_flight: Callable[[ReplicaId], int],
    last_used: Callable[[ReplicaId], int],
    ejected: Callable[[ReplicaId], bool],
) -> list[Candidate]:
    """Return the replicas of a model that a holder may pick: routable, not ejected, below their limit."""
    found = []
    for replica in snapshot.routable_replicas(model):
        if ejected(replica.id):
            continue
        in_flight = own_in_flight(replica.id) + snapshot.in_flight(replica.id, without=holder)
        if in_flight >= replica.limit:
            continue
        found.append(
            Candidate(
                replica=replica,
                in_flight=in_flight,
                last_used=last_used(replica.id),
                free_bytes=snapshot.free_bytes(replica),
            )
        )
    return found


def pick_best_replica(candidates: Iterable[Candidate], *, salt: bytes) -> Candidate | None:
    """Return the best candidate: fewest in flight, then longest unused, then most free memory, then by chance.

    Args:
        candidates: As `candidates` returns them, in any order: the result does not depend on it.
        salt: Different for each holder, so that holders break ties differently, and the same for all its picks.

    Returns:
        The best, or None where there is no candidate.
    """
    return min(candidates, key=lambda c: _order(c, salt), default=None)


def _order(candidate: Candidate, salt: bytes) -> tuple[int, int, int, bytes]:
    chance = blake2b(str(candidate.replica.id).encode(), digest_size=8, key=salt[:64]).digest()
    return (candidate.in_flight, candidate.last_used, -candidate.free_bytes, chance)
