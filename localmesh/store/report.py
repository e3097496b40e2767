"""T6, T7 and the other things that a registry writes about a replica for its worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from localmesh.core.errors import InvalidRequest
from localmesh.core.ids import DeviceId
from localmesh.core.records import FailureRecord, ProgressRecord, ReplicaRecord, ReplicaState
from localmesh.etcd import KeyValue, Leadership
from localmesh.etcd import transactions as t
from localmesh.scheduling.failures import FailurePolicy
from localmesh.store import codec
from localmesh.store.access import LeaseGone, guard, unsettled
from localmesh.store.history import Note, Remembering
from localmesh.store.keys import SELF_HOLDER
from localmesh.store.life import StoredDevice, StoredReplica, conflict, same_life
from localmesh.store.registration import raised_claims

_TRIES = 8


class Reporting(Remembering):
    """Transactions of what was observed. Reports are levels: whoever gets a Conflict reports again what is so then."""

    async def report(
        self,
        replica: ReplicaRecord,
        *,
        state: ReplicaState,
        endpoint: str = "",
        limit: int = 0,
        measured: Mapping[DeviceId, int] | None = None,
    ) -> ReplicaRecord:
        """T6: put the worker's new state of a replica.

        IF the replica is that placement under that incarnation, and as it was just read, THEN put state, endpoint and
        limit. A state never goes back: one that is leaving stays so, and an older report of one that is coming changes
        nothing. When it becomes READY, each of its claims becomes the larger of estimate and `measured` (bytes by
        device), once: that puts its devices in the same transaction, as they were just read, and forgets loads of the
        same revision that failed there before. Nothing is written where nothing changes. An unknown outcome is settled
        by the value.

        Args:
            replica: The record as the snapshot shows it; `incarnation` must be the reporter's.
            state: STAGING, LOADING or READY.
            endpoint: Its address, host:port; empty leaves what is known.
            limit: Requests that it accepts at once; 0 leaves what is known.
            measured: What it uses.

        Returns:
            The record as it is now.

        Raises:
            Conflict: It is another placement or incarnation, or was being changed all the time.
            InvalidRequest: The state is none that a worker reports.
            StoreUnavailable: etcd does not answer.
        """
        if state.leaving or state is ReplicaState.PLACED:
            raise InvalidRequest(f"A worker does not report the state {state.name}.", field="state")
        for _ in range(_TRIES):
            stored, devices = await self.stored_with_devices(replica.id, replica.devices)
            if stored is None or not same_life(replica, stored):
                raise conflict(replica.id)
            before = codec.encode(stored.message)
            claims = _apply_report(stored, state, endpoint, limit, measured or {})
            value = codec.encode(stored.message)
            if value == before:
                return stored.record
            became_ready = stored.record.state.coming and state is ReplicaState.READY
            note = await self.note_success(stored.record) if became_ready else Note()
            changed = [device for device in devices if device.id in claims]
            for device in changed:
                codec.set_claim(device.message, replica.id, claims[device.id])
            outcome = await self.commit(
                [stored.unchanged(), *(device.unchanged() for device in changed), *note.compare],
                [stored.put(), *(device.put() for device in changed), *note.operations],
                settle=self.settle_by_value(stored.put()),
            )
            if outcome.succeeded:
                return codec.decode_replica(replica.id, value, outcome.revision, stored.record.create_revision)
        raise conflict(replica.id)

    async def exited(
        self,
        replica: ReplicaRecord,
        *,
        failure: FailureRecord | None = None,
        died: bool = False,
        policy: FailurePolicy | None = None,
    ) -> None:
        """T7: the process and all its children are gone: delete the record and give the memory back.

        IF the replica is that placement under that incarnation, and it and its devices are as just read, THEN delete
        replica, progress and its own count, and remove its claims, or hand them to the replica that T3 named, unless
        that is there already. With `failure` what went wrong is remembered, IF what is remembered of the model there
        is as just read, too: it keeps the model away for a while that grows each time. One that is gone already, or
        that was placed again since, changes nothing. An unknown outcome is settled by the absence of the record.

        Args:
            replica: The record as the snapshot shows it.
            failure: Why it is gone, if that was not wanted.
            died: It was READY before: that keeps the model away only if it happens again and again.
            policy: For how long.

        Raises:
            Conflict: It was taken over by a later incarnation, or was being changed all the time.
            StoreUnavailable: etcd does not answer.
        """
        policy = policy or FailurePolicy()
        for _ in range(_TRIES):
            stored, devices = await self.stored_with_devices(replica.id, replica.devices)
            if stored is None or stored.record.create_revision != replica.create_revision:
                return
            if stored.record.incarnation != replica.incarnation:
                raise conflict(replica.id)
            if set(stored.record.devices) != set(replica.devices):
                raise conflict(replica.id)
            note = Note() if failure is None else await self.note_failure(failure, died=died, policy=policy)
            if await self._remove(stored, devices, note.compare, note.operations):
                return
            await self.withdraw(note)
        raise conflict(replica.id)

    async def forget_replica(self, replica: ReplicaRecord, *, leader: Leadership | None = None) -> None:
        """Delete the record of a replica whose node is not there any more in the incarnation it belongs to.

        IF the node is not present in the replica's incarnation AND replica and devices are as just read THEN delete
        the replica, its progress and its claims. Whether the processes of a node that is away still run nobody knows:
        use it when the node has registered again without the replica, or is gone for good. One that is gone already
        changes nothing. An unknown outcome is settled by the absence of the record.

        Raises:
            Conflict: The node is there, or the replica was being changed all the time.
            StoreUnavailable: etcd does not answer.
        """
        away = t.lease(self.keys.node(replica.id.node)) != replica.incarnation
        for _ in range(_TRIES):
            stored, devices = await self.stored_with_devices(replica.id, replica.devices)
            if stored is None or stored.record.create_revision != replica.create_revision:
                return
            node = await self.read_key(self.keys.node(replica.id.node))
            if not same_life(replica, stored) or (node is not None and node.lease == replica.incarnation):
                raise conflict(replica.id)
            if await self._remove(stored, devices, [away, *guard(leader)], []):
                return
        raise conflict(replica.id)

    async def put_progress(self, replica: ReplicaRecord, progress: ProgressRecord, *, record_lease: int) -> bool:
        """Publish what a replica that is coming does. The caller sends at most one a second for each replica.

        IF that placement exists THEN put under the node's record lease. Sent again after an unknown outcome.

        Returns:
            False if the replica is gone, or the lease.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        put = t.put(self.keys.progress(replica.id), codec.encode_progress(progress), record_lease)
        return await self._put_beside(replica, put)

    async def put_self_inflight(self, replica: ReplicaRecord, count: int) -> bool:
        """Publish a replica's own number of running calls as holder `self`, under the presence lease.

        IF that placement exists THEN put the count, or at 0 delete the key: it would keep the replica from being
        unloaded. Sent again after an unknown outcome.

        Returns:
            False if the replica is gone, or the incarnation.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.inflight(replica.id, SELF_HOLDER)
        if count <= 0:
            return await self._put_beside(replica, t.delete(key))
        return await self._put_beside(replica, t.put(key, codec.encode_inflight(count, ""), replica.incarnation))

    async def _put_beside(self, replica: ReplicaRecord, operation: t.Op) -> bool:
        placed = t.create(self.keys.replica(replica.id)) == replica.create_revision
        try:
            return (await self.commit([placed], [operation], settle=unsettled)).succeeded
        except LeaseGone:  # the lease has expired: so has what it was for
            return False

    async def _remove(
        self, stored: StoredReplica, devices: list[StoredDevice], compare: Sequence[t.Compare], more: Sequence[t.Op]
    ) -> bool:
        """Delete a replica and its claims; return False if something was not as read."""
        replica, heir = stored.record, stored.record.memory_for
        if heir is not None:
            # One that is there already has what it needs: more would be nobody's.
            there = await self.read_key(self.keys.replica(heir))
            as_read = t.create(self.keys.replica(heir)) == (there.create_revision if there is not None else 0)
            heir, compare = heir if there is None else None, [*compare, as_read]
        for device in devices:
            codec.drop_claim(device.message, replica.id, heir=heir)

        async def settle_by_absence() -> KeyValue | None:
            now = await self.read_key(stored.key)
            gone = now is None or now.create_revision != replica.create_revision
            return KeyValue(stored.key, b"", 0, 0, 0, 0) if gone else None

        outcome = await self.commit(
            [stored.unchanged(), *(device.unchanged() for device in devices), *compare],
            [
                t.delete(stored.key),
                t.delete(self.keys.progress(replica.id)),
                t.delete(self.keys.inflight(replica.id, SELF_HOLDER)),
                *(device.put() for device in devices),
                *more,
            ],
            settle=settle_by_absence,
        )
        return outcome.succeeded


def _apply_report(
    stored: StoredReplica, state: ReplicaState, endpoint: str, limit: int, measured: Mapping[DeviceId, int]
) -> Mapping[DeviceId, int]:
    """Change the message as T6 says; return the claims that grow with it, by device."""
    now, message = stored.record, stored.message
    if state.value < now.state.value and not now.state.leaving:
        return {}  # an older report that comes late
    if not now.state.leaving:
        message.state = codec.wire_state(state)
    message.endpoint = endpoint or message.endpoint
    message.limit = limit or message.limit
    if not (now.state.coming and state is ReplicaState.READY):
        return {}
    raised = raised_claims(now.devices, measured)
    grown = {device: size for device, size in raised.items() if size != now.devices[device]}
    for device, size in grown.items():
        message.devices[device] = size
    return grown
