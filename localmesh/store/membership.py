"""T0 and the life of a node: register, renew, measure, deregister."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from localmesh.core.errors import Conflict, IncarnationLost, InternalError, InvalidRequest, MeshError, NodePending
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.records import EngineInfo, MeasuredRecord, NodeRecord, ReplicaRecord, SourceRecord
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import KeyValue, LeaseExpired
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import MAX_OPERATIONS, LeaseGone, StoreAccess, new_token, unsettled
from localmesh.store.admission import waiting
from localmesh.store.builder import Complaints, SnapshotBuilder
from localmesh.store.errors import translated
from localmesh.store.keys import Table
from localmesh.store.registration import Registered, Registration, RegistrationPlan, plan_registration
from localmesh.store.v1 import records_pb2 as pb

logger = logging.getLogger(__name__)

M = TypeVar("M", pb.Node, pb.Device)

MAX_DEVICES = 48
"""So that all devices of a node fit into one transaction with the node."""

_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """Times to live of a node's leases, in seconds."""

    presence_seconds: int = 5
    record_seconds: int = 15 * 60


@dataclass(frozen=True, slots=True)
class _Read:
    """What T0 decides upon, and the node's keys as they were."""

    view: Snapshot
    keys: Mapping[bytes, KeyValue]

    def unchanged(self, key: bytes) -> t.Compare:
        """Return the condition that a key is as read. Revision 0 is what etcd compares where there is no key."""
        kv = self.keys.get(key)
        return t.mod(key) == (kv.mod_revision if kv is not None else 0)

    def value_of(self, key: bytes) -> bytes | None:
        """Return the stored value, so that what a newer version put there is kept."""
        kv = self.keys.get(key)
        return kv.value if kv is not None else None

    def leases(self) -> set[int]:
        """Return the leases that the node's keys hang on."""
        return {kv.lease for kv in self.keys.values() if kv.lease}


@dataclass(frozen=True, slots=True)
class _Step:
    """Operations that belong together, and what must be true for them."""

    compare: tuple[t.Compare, ...]
    operations: tuple[t.Op, ...]

    @property
    def fits(self) -> bool:
        """Whether etcd takes it as one transaction."""
        return max(len(self.compare), len(self.operations)) <= MAX_OPERATIONS

    def joined(self, other: _Step) -> _Step:
        """Return both in one; what both compare is compared once."""
        return _Step(tuple(dict.fromkeys((*self.compare, *other.compare))), (*self.operations, *other.operations))


class Membership(StoreAccess):
    """Transactions of nodes."""

    async def register(self, reg: Registration, times: LeaseTimes | None = None) -> Registered:
        """T0: make a worker a node under a new incarnation, and take over what it runs (see plan_registration).

        IF the approval, `nodes/<node>`, the node's devices and each record that is written are as read THEN put them
        with a new record lease, and `nodes/<node>` with a new presence lease: in one transaction, or, where that would
        be more than 128 operations, records first and devices with the node last. Every T1 on this node writes a
        device, so that none can come in between unseen. For a record that is made again also: model and policy as read
        and no replica of that model created since. Leases that the node had before are revoked afterwards.

        An unknown outcome of the last transaction is settled by the lease of `nodes/<node>`; of earlier ones by
        reading and deciding anew.

        Of a node that nobody has approved, its key is kept, for an operator to approve.

        Raises:
            NodePending: Nobody has approved the node.
            NodeNameTaken: The name belongs to another key.
            InvalidRequest: More than 48 devices.
            Conflict: Others kept changing what is compared.
            StoreUnavailable: etcd does not answer.
        """
        if len({device.id for device in reg.devices}) > MAX_DEVICES:
            raise InvalidRequest(f"A node has at most {MAX_DEVICES} devices.", field="devices")
        times = times or LeaseTimes()
        read = await self._read_node(reg.node)
        try:
            plan_registration(reg, read.view, incarnation=0, token="")  # refuses before anything is granted
        except NodePending:
            await self._remember(reg, read)
            raise
        record_lease = await self.grant(times.record_seconds)
        presence = await self.grant(times.presence_seconds)
        try:
            read, plan = await self._register(reg, read, presence, record_lease)
        except MeshError:
            # The record lease stays: records may hang on it already, and it ends by itself.
            await self._revoke_quietly({presence})
            raise
        await self._revoke_quietly(read.leases() - {presence, record_lease})
        return Registered(
            incarnation=presence,
            record_lease=record_lease,
            presence_ttl_seconds=float(times.presence_seconds),
            adopted=plan.adopted,
            stop=plan.stop,
        )

    async def _remember(self, reg: Registration, read: _Read) -> None:
        """Keep for operators that a node waits, and with which key.

        IF the approval is as read THEN put it. Whoever said something meanwhile is heard when the node asks again; an
        unknown outcome does not matter for the same reason.
        """
        known = read.view.approvals.get(reg.node)
        record = waiting(reg.key_fingerprint, known)
        if record == known or not reg.remember:
            return
        key = self.keys.approval(reg.node)
        message = codec.fresh(pb.Approval, read.value_of(key))
        codec.fill_approval(message, record)
        await self.commit([read.unchanged(key)], [t.put(key, codec.encode(message))], settle=unsettled)

    async def _register(
        self, reg: Registration, read: _Read, presence: int, record_lease: int
    ) -> tuple[_Read, RegistrationPlan]:
        """Decide and commit, and again after reading, until it holds; return what the last decision was made of."""
        for _ in range(_TRIES):
            plan = plan_registration(reg, read.view, incarnation=presence, token=new_token())
            node = _node_record(reg, presence, record_lease)
            steps = [
                *(self._keep_step(record, read, record_lease) for record in plan.kept),
                *(self._create_step(record, read, record_lease) for record in plan.created),
                *(self._delete_step(replica, read) for replica in plan.deleted),
            ]
            if await self._commit_registration(read, steps, self._last_step(plan, node, read), node):
                return read, plan
            read = await self._read_node(reg.node)
        raise Conflict(f"The node {reg.node} is being changed by others all the time. Register again.")

    async def _commit_registration(self, read: _Read, steps: list[_Step], last: _Step, node: NodeRecord) -> bool:
        """Commit in as few transactions as etcd allows; return False as soon as something was not as read."""
        node_key = self.keys.node(node.name)
        always = {self.keys.approval(node.name), node_key}
        base = tuple(read.unchanged(key) for key in sorted(always))

        async def settle_by_presence() -> KeyValue | None:
            kv = await self.read_key(node_key)
            return kv if kv is not None and kv.lease == node.incarnation else None

        *early, rest = _packed(steps, base, last)
        for step in early:
            if not (await self.commit(step.compare, step.operations, settle=unsettled)).succeeded:
                return False
        return (await self.commit(rest.compare, rest.operations, settle=settle_by_presence)).succeeded

    def _keep_step(self, record: ReplicaRecord, read: _Read, record_lease: int) -> _Step:
        key = self.keys.replica(record.id)
        message = codec.fresh(pb.Replica, read.value_of(key))
        codec.fill_replica(message, record)
        return _Step((read.unchanged(key),), (t.put(key, codec.encode(message), record_lease),))

    def _create_step(self, record: ReplicaRecord, read: _Read, record_lease: int) -> _Step:
        keys, view, model = self.keys, read.view, record.id.model
        message = pb.Replica()
        codec.fill_replica(message, record)
        policy = view.policies.get(model)
        compare: tuple[t.Compare, ...] = (
            t.create(keys.replica(record.id)) == 0,
            t.mod(keys.model(model)) == view.models[model].mod_revision,
            t.mod(keys.policy(model)) == (policy.mod_revision if policy is not None else 0),
            t.create(keys.replicas(model), prefix=True) < view.revision + 1,
            # Who else is in its groups; those who came to this node meanwhile have written a device: see register.
            *(
                [t.mod(keys.table(Table.POLICIES), prefix=True) < view.revision + 1]
                if view.policy(model).groups
                else []
            ),
        )
        return _Step(compare, (t.put(keys.replica(record.id), codec.encode(message), record_lease),))

    def _delete_step(self, replica: ReplicaId, read: _Read) -> _Step:
        key = self.keys.replica(replica)
        return _Step((read.unchanged(key),), (t.delete(key), t.delete(self.keys.progress(replica))))

    def _last_step(self, plan: RegistrationPlan, node: NodeRecord, read: _Read) -> _Step:
        """Return the devices with their claims, the approval and the node itself."""
        compare: list[t.Compare] = []
        operations: list[t.Op] = []
        for device in plan.devices:
            key = self.keys.device(node.name, device.id)
            stored_device = _as_far_as_readable(pb.Device, read.value_of(key))
            codec.fill_device(stored_device, device)
            compare.append(read.unchanged(key))
            operations.append(t.put(key, codec.encode(stored_device), node.record_lease))
        for gone in plan.gone_devices:
            key = self.keys.device(node.name, gone)
            compare.append(read.unchanged(key))
            operations.append(t.delete(key))
        if plan.approval is not None:
            key = self.keys.approval(node.name)
            approval = codec.fresh(pb.Approval, read.value_of(key))  # was readable, or is absent: see _read_node
            codec.fill_approval(approval, plan.approval)
            operations.append(t.put(key, codec.encode(approval)))
        key = self.keys.node(node.name)
        stored_node = _as_far_as_readable(pb.Node, read.value_of(key))
        codec.fill_node(stored_node, node)
        operations.append(t.put(key, codec.encode(stored_node), node.incarnation))
        return _Step(tuple(compare), tuple(operations))

    async def _read_node(self, name: NodeName) -> _Read:
        """Read what T0 decides upon, as of one revision.

        Raises:
            InternalError: What an operator said of the node cannot be read.
        """
        keys = self.keys
        approval_key = keys.approval(name)
        answers = await self.read(
            t.get(approval_key),
            t.get(keys.node(name)),
            t.get(keys.devices(name), prefix=True),
            t.get(keys.table(Table.REPLICAS), prefix=True),
            t.get(keys.table(Table.MODELS), prefix=True),
            t.get(keys.table(Table.POLICIES), prefix=True),
        )
        builder = SnapshotBuilder(Snapshot(), keys, Complaints())
        for answer in answers:
            for kv in answer.kvs:
                builder.put(kv)
        view = builder.build(answers[0].revision)
        stored = {kv.key: kv for answer in answers[:3] for kv in answer.kvs}
        own = {keys.replica(record.id) for record in view.all_replicas() if record.id.node == name}
        stored.update({kv.key: kv for kv in answers[3].kvs if kv.key in own})
        if approval_key in stored and name not in view.approvals:
            # To take it for absent would be to approve a node of which an operator said something else, perhaps.
            raise InternalError(f"What the store says of the node {name} cannot be read by this version.", node=name)
        return _Read(view, MappingProxyType(stored))

    async def renew(self, node: NodeName, incarnation: int, record_lease: int) -> float:
        """Renew both leases of a node; return the seconds that the presence lease lives from now.

        No transaction: a refresh that is lost is repeated with the next heartbeat.

        Raises:
            IncarnationLost: A lease has expired, or the node was registered anew.
            StoreUnavailable: etcd does not answer.
        """
        try:
            with translated():
                seconds = await self.etcd.keep_alive_once(incarnation)
                await self.etcd.keep_alive_once(record_lease)
        except LeaseExpired as error:
            raise _lost(node) from error
        return float(seconds)

    async def deregister(self, node: NodeName, incarnation: int) -> None:
        """End a registration at once, with all records of the node: its worker has stopped its processes.

        IF presence of that incarnation THEN delete `nodes/<node>`; then both leases are revoked, and with them devices,
        replicas and progress go. Should that be cut off, the record lease ends by itself. An unknown outcome is settled
        by the absence of the key, which no longer matters to whoever deregisters.

        Raises:
            IncarnationLost: The node is not registered in that incarnation.
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.node(node)
        kv = await self.read_key(key)
        if kv is None or kv.lease != incarnation:
            raise _lost(node)
        record_lease = _as_far_as_readable(pb.Node, kv.value).record_lease
        outcome = await self.commit([t.lease(key) == incarnation], [t.delete(key)], settle=unsettled)
        if not outcome.succeeded and (now := await self.read_key(key)) is not None and now.lease != incarnation:
            raise _lost(node)
        await self.revoke(incarnation)
        if record_lease:
            await self.revoke(record_lease)

    async def put_measured(self, node: NodeName, incarnation: int, measured: MeasuredRecord) -> None:
        """Publish a node's measurement under its presence lease. The caller leaves out what did not change by 5 %.

        IF presence of that incarnation THEN put. Sent again after an unknown outcome: twice is the same as once.

        Raises:
            IncarnationLost: The node is not present in that incarnation.
            StoreUnavailable: etcd does not answer.
        """
        message = pb.Measured()
        codec.fill_measured(message, measured)
        await self._put_of_node(node, incarnation, self.keys.measured(node), codec.encode(message))

    async def put_sources(self, node: NodeName, incarnation: int, sources: Mapping[ModelName, SourceRecord]) -> None:
        """Publish all that a node knows of the models' files under its presence lease. As put_measured."""
        message = pb.Sources()
        codec.fill_sources(message, sources)
        await self._put_of_node(node, incarnation, self.keys.sources(node), codec.encode(message))

    async def put_engines(self, node: NodeName, incarnation: int, engines: tuple[EngineInfo, ...]) -> None:
        """Replace the engines of a node that is present; all else of it stays.

        IF presence of that incarnation AND the node is as read THEN put. The same engines again change nothing.

        Raises:
            IncarnationLost: The node is not present in that incarnation.
            Conflict: The node was changed meanwhile, again and again.
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.node(node)
        for _ in range(_TRIES):
            stored = await self.read_key(key)
            if stored is None or stored.lease != incarnation:
                raise _lost(node)
            record = codec.decode_node(node, stored.value, stored.lease, stored.mod_revision)
            if record.engines == engines:
                return
            message = codec.fresh(pb.Node, stored.value)
            codec.fill_node(message, replace(record, engines=engines))
            compare = [t.lease(key) == incarnation, t.mod(key) == stored.mod_revision]
            try:
                outcome = await self.commit(compare, [t.put(key, codec.encode(message), incarnation)], settle=unsettled)
            except LeaseGone as error:
                raise _lost(node) from error
            if outcome.succeeded:
                return
        raise Conflict(f"the node {node} was changed by others again and again: try again")

    async def _put_of_node(self, node: NodeName, incarnation: int, key: bytes, value: bytes) -> None:
        compare = [t.lease(self.keys.node(node)) == incarnation]
        try:
            outcome = await self.commit(compare, [t.put(key, value, incarnation)], settle=unsettled)
        except LeaseGone as error:
            raise _lost(node) from error
        if not outcome.succeeded:
            raise _lost(node)

    async def _revoke_quietly(self, leases: set[int]) -> None:
        for lease in leases:
            try:
                await self.revoke(lease)
            except MeshError as error:
                logger.info("lease %x was not revoked, it expires by itself: %s", lease, error)


def _lost(node: NodeName) -> IncarnationLost:
    return IncarnationLost(f"The registration of the node {node} has ended. Register again.", node=node)


def _node_record(reg: Registration, presence: int, record_lease: int) -> NodeRecord:
    return NodeRecord(
        name=reg.node,
        incarnation=presence,
        record_lease=record_lease,
        endpoint=reg.endpoint,
        labels=reg.labels,
        engines=reg.engines,
        max_replicas_per_model=reg.max_replicas_per_model,
        key_fingerprint=reg.key_fingerprint,
        disk_total_bytes=reg.disk_total_bytes,
        version=reg.version,
    )


def _as_far_as_readable(kind: type[M], value: bytes | None) -> M:
    """Return the stored message to write over; an empty one where it is unreadable: all of it is written anew."""
    try:
        return codec.fresh(kind, value)
    except ValueError:
        return kind()


def _packed(steps: list[_Step], base: tuple[t.Compare, ...], last: _Step) -> list[_Step]:
    """Pack steps into transactions that etcd takes, each with the base conditions; the last step is in the last one."""
    empty = _Step(base, ())
    packed: list[_Step] = []
    current = empty
    for step in (*steps, last):
        joined = current.joined(step)
        if not joined.fits:
            packed.append(current)
            joined = empty.joined(step)
        current = joined
    return [*packed, current]
