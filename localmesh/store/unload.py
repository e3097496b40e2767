"""T3a and T3: how a replica stops taking requests, and how its node is told to end it."""

from __future__ import annotations

from localmesh.core.errors import InternalError
from localmesh.core.ids import ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.etcd import KeyValue, Leadership, RangeResult
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import Settle, guard
from localmesh.store.errors import readable
from localmesh.store.eviction import Evicting
from localmesh.store.life import StoredReplica, conflict, same_life
from localmesh.store.v1 import records_pb2 as pb


class Unloading(Evicting):
    """Transactions that end a replica."""

    async def drain_replica(self, replica: ReplicaRecord, *, leader: Leadership | None = None) -> ReplicaRecord:
        """T3a: from its revision on there is no new lock on the replica; what runs on it goes on.

        IF the replica has the mod-revision read THEN put it as DRAINING. One that is leaving already is returned as it
        is. An unknown outcome is settled by its state.

        Raises:
            Conflict: It has changed, or is gone.
            StoreUnavailable: etcd does not answer.
        """
        stored = await self._as_seen(replica)
        if stored.record.state.leaving:
            return stored.record
        _must_be_as_seen(stored, replica)
        stored.message.state = pb.REPLICA_STATE_DRAINING
        return await self._put_state(stored, [stored.unchanged(), *guard(leader)], ReplicaState.DRAINING)

    async def unload_replica(
        self, replica: ReplicaRecord, *, memory_for: ReplicaId | None = None, leader: Leadership | None = None
    ) -> bool:
        """T3: tell the node to end the replica, unless somebody holds it; against T2 exactly one of both wins.

        IF the replica has the mod-revision read AND `inflight/<replica>/` is empty THEN put it as UNLOADING, naming
        the replica that gets its memory, if any. An unknown outcome is settled by its state.

        Returns:
            True if it is UNLOADING now, False if a holder's presence keeps it.

        Raises:
            Conflict: It has changed, or is gone.
            StoreUnavailable: etcd does not answer.
        """
        stored = await self._as_seen(replica)
        if stored.record.state is ReplicaState.UNLOADING:
            return True
        _must_be_as_seen(stored, replica)
        stored.message.state = pb.REPLICA_STATE_UNLOADING
        stored.message.memory_for = "" if memory_for is None else str(memory_for)
        holders = self.keys.holders(replica.id)
        outcome = await self.commit(
            [stored.unchanged(), t.version(holders, prefix=True) == 0, *guard(leader)],
            [stored.put()],
            [t.get(stored.key), t.get(holders, prefix=True, count_only=True)],
            settle=self._settle_state(stored, ReplicaState.UNLOADING),
        )
        if outcome.succeeded:
            return True
        now, held = outcome.responses
        if not isinstance(now, RangeResult) or not isinstance(held, RangeResult):
            raise InternalError("etcd answered something else than was asked.")
        if held.count and now.kvs and now.kvs[0].mod_revision == stored.record.mod_revision:
            return False
        raise conflict(replica.id)

    async def _as_seen(self, replica: ReplicaRecord) -> StoredReplica:
        stored = await self.stored_replica(replica.id)
        if stored is None or not same_life(replica, stored):
            raise conflict(replica.id)
        return stored

    async def _put_state(self, stored: StoredReplica, compare: list[t.Compare], state: ReplicaState) -> ReplicaRecord:
        outcome = await self.commit(compare, [stored.put()], settle=self._settle_state(stored, state))
        if not outcome.succeeded:
            raise conflict(stored.record.id)
        value = outcome.settled_by.value if outcome.settled_by is not None else codec.encode(stored.message)
        return codec.decode_replica(stored.record.id, value, outcome.revision, stored.record.create_revision)

    def _settle_state(self, stored: StoredReplica, state: ReplicaState) -> Settle:
        async def settle() -> KeyValue | None:
            kv = await self.read_key(stored.key)
            if kv is None or kv.create_revision != stored.record.create_revision:
                return None
            with readable(stored.record.id):
                now = codec.decode_replica(stored.record.id, kv.value, kv.mod_revision, kv.create_revision)
            return kv if now.state.value >= state.value else None

        return settle


def _must_be_as_seen(stored: StoredReplica, replica: ReplicaRecord) -> None:
    if stored.record.mod_revision != replica.mod_revision:
        raise conflict(replica.id)
