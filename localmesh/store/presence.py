"""One holder's presence on one replica: what is known of it here, and its key in the store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from localmesh.core.errors import Conflict
from localmesh.core.ids import HolderId, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import KeyValue, RangeResult, UnknownOutcome
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import StoreAccess, new_token, unsettled
from localmesh.store.errors import readable, translated, unavailable


@dataclass(frozen=True, slots=True)
class Taken:
    """The key as T2 left it."""

    create_revision: int
    revision: int
    count: int
    token: str


@dataclass(slots=True)
class Presence:
    """What a holder knows of one replica. At most one task at a time takes or releases its key."""

    replica: ReplicaId
    count: int = 0
    """Requests in flight."""
    life: int = 0
    """Create-revision of the replica's record that was locked."""
    taken: Taken | None = None
    """The key, while it is known to exist under the present lease."""
    releasing: bool = False
    published: int = 0
    """Count in the store."""
    write_due: float = 0.0
    """Point on the monotonic clock before which the count is not written again."""
    task: asyncio.Task[Conflict | None] | None = field(default=None, repr=False)

    @property
    def held(self) -> bool:
        """Whether the key protects requests."""
        return self.taken is not None and not self.releasing

    @property
    def unused(self) -> bool:
        """Whether there is nothing to remember."""
        return self.count == 0 and self.taken is None and self.task is None


class PresenceKeys:
    """The transactions of a holder."""

    def __init__(self, store: StoreAccess, holder: HolderId) -> None:
        self._store = store
        self._holder = holder

    def _key(self, replica: ReplicaId) -> bytes:
        return self._store.keys.inflight(replica, self._holder)

    async def take(self, replica: ReplicaRecord, snapshot: Snapshot, lease: int, count: int) -> Taken:
        """T2: see Holder.acquire. A key that is there already, from before, is taken over.

        Raises:
            LeaseGone: The holder's lease has expired.
            Conflict: The replica cannot be locked as the snapshot shows it.
            StoreUnavailable: etcd does not answer.
        """
        keys, key, token = self._store.keys, self._key(replica.id), new_token()
        if not _lockable(replica, snapshot):
            raise _conflict(replica.id)
        compare = [
            t.mod(keys.replica(replica.id)) == replica.mod_revision,
            t.mod(keys.model(replica.id.model)) == snapshot.models[replica.id.model].mod_revision,
            t.mod(keys.approval(replica.id.node)) == snapshot.approvals[replica.id.node].mod_revision,
            t.lease(keys.node(replica.id.node)) == replica.incarnation,
        ]

        async def settle() -> KeyValue | None:
            kv = await self._store.read_key(key)
            with readable(replica.id):
                return kv if kv is not None and codec.decode_inflight(kv.value)[1] == token else None

        put = t.put(key, codec.encode_inflight(count, token), lease)
        outcome = await self._store.commit(compare, [put, t.get(key)], settle=settle)
        if not outcome.succeeded:
            raise _conflict(replica.id)
        if outcome.settled_by is not None:
            return Taken(outcome.settled_by.create_revision, outcome.revision, count, token)
        found = [kv for answer in outcome.responses if isinstance(answer, RangeResult) for kv in answer.kvs]
        return Taken(found[0].create_revision, outcome.revision, count, token)

    async def write_count(self, replica: ReplicaId, taken: Taken, count: int) -> bool:
        """Rewrite the count; return False if the key that was taken is gone.

        IF the key has the create-revision of T2 THEN put, keeping the lease. A lost answer needs no settling: the
        count is written again.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        key = self._key(replica)
        put = t.put(key, codec.encode_inflight(count, taken.token), ignore_lease=True)
        try:
            with translated():
                result = await self._store.etcd.transaction([t.create(key) == taken.create_revision], [put])
        except UnknownOutcome as error:
            raise unavailable("etcd did not say whether it took a count.") from error
        return result.succeeded

    async def release(self, replica: ReplicaId, taken: Taken) -> None:
        """Delete the key that was taken. One that is gone already is fine; sent again after an unknown outcome.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        key = self._key(replica)
        await self._store.commit([t.create(key) == taken.create_revision], [t.delete(key)], settle=unsettled)

    async def release_unknown(self, replica: ReplicaId) -> None:
        """Delete a key that nobody here knows of: a late outcome, or what is left of an earlier process of this name.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        key = self._key(replica)
        kv = await self._store.read_key(key)
        if kv is not None:
            await self._store.commit([t.mod(key) == kv.mod_revision], [t.delete(key)], settle=unsettled)


def _lockable(replica: ReplicaRecord, snapshot: Snapshot) -> bool:
    """Whether the snapshot shows this record, and lets requests be sent to it."""
    shown = snapshot.replica(replica.id)
    return shown is not None and shown.mod_revision == replica.mod_revision and snapshot.routable(replica)


def _conflict(replica: ReplicaId) -> Conflict:
    return Conflict(f"The replica {replica} takes no new requests as it was seen. Pick again.", replica=replica)
