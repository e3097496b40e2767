"""T5: what operators say of nodes, and forgetting one. Only the registry calls these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from localmesh.core.budgets import with_budget
from localmesh.core.errors import Conflict, NodeInUse, NodeNotFound
from localmesh.core.ids import NodeName, ReplicaId
from localmesh.core.records import ApprovalRecord
from localmesh.etcd import KeyValue, RangeResult
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import StoreAccess, unsettled
from localmesh.store.errors import readable
from localmesh.store.keys import DeviceKey, ReplicaKey, Table
from localmesh.store.v1 import records_pb2 as pb

_TRIES = 16

Edit = Callable[[ApprovalRecord | None], ApprovalRecord]
"""Returns what is to be said of a node, from what is said now; raises a MeshError where that is not possible."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What went with a node that was forgotten."""

    replicas: tuple[ReplicaId, ...]
    leases: frozenset[int]
    revision: int = 0
    """Of the store, from which on the node is not known."""


class Oversight(StoreAccess):
    """Transactions of what operators say of nodes."""

    async def read_approval(self, node: NodeName) -> ApprovalRecord | None:
        """Return what is said of a node now.

        Raises:
            InternalError: It cannot be read by this version.
            StoreUnavailable: etcd does not answer.
        """
        kv = await self.read_key(self.keys.approval(node))
        with readable(f"the node {node}"):
            return codec.decode_approval(kv.value, kv.mod_revision) if kv is not None else None

    async def edit_approval(self, node: NodeName, edit: Edit) -> ApprovalRecord:
        """T5: approve, cordon, drain or label a node, or override what its worker says.

        From the revision of a cordon on there is no new lock there. An edit that changes nothing writes nothing.

        IF the approval is as just read, and every device whose budget changes with it, THEN put them: a budget holds
        from the revision on at which the operator set it. Devices keep their leases and claims. On a conflict it reads
        and edits again. An unknown outcome is settled by the value.

        Returns:
            What is said now, with its revision.

        Raises:
            MeshError: What the edit raises.
            Conflict: Others changed it all the time.
            InternalError: What is stored cannot be read by this version.
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.approval(node)
        for _ in range(_TRIES):
            read, devices = await self.read(t.get(key), t.get(self.keys.devices(node), prefix=True))
            kv = read.kvs[0] if read.kvs else None
            with readable(f"the node {node}"):
                known = codec.decode_approval(kv.value, kv.mod_revision) if kv is not None else None
                message = codec.fresh(pb.Approval, kv.value if kv is not None else None)
            wanted = edit(known)
            budgets = self._budgets(devices, wanted)
            if wanted == known and not budgets:
                return wanted
            codec.fill_approval(message, wanted)
            put = t.put(key, codec.encode(message))
            compare = [
                t.mod(key) == (known.mod_revision if known is not None else 0),
                *(t.mod(kv.key) == kv.mod_revision for kv, _ in budgets),
            ]
            outcome = await self.commit(compare, [put, *(p for _, p in budgets)], settle=self.settle_by_value(put))
            if outcome.succeeded:
                return replace(wanted, mod_revision=outcome.revision)
        raise Conflict(f"The node {node} is being changed by others all the time. Try again.", node=node)

    async def forget_node(self, node: NodeName, *, force: bool = False) -> Forgotten:
        """Delete what is said of a node, and with it its registration and records.

        IF the approval and `nodes/<node>` are as just read AND none of its devices was written since (as every
        placement and registration does) THEN delete approval, node, devices and what is known of it. Then its leases
        are revoked, and with them replicas and progress go: should that be cut off, they end by themselves.

        Args:
            node: Which.
            force: Also while there are replicas on it.

        Returns:
            What went with it.

        Raises:
            NodeNotFound: Nothing is known of it.
            NodeInUse: It has replicas.
            Conflict: Others changed it all the time.
            StoreUnavailable: etcd does not answer.
        """
        keys = self.keys
        approval, present = keys.approval(node), keys.node(node)
        tried: Forgotten | None = None
        for _ in range(_TRIES):
            said, there, devices, replicas = await self.read(
                t.get(approval),
                t.get(present),
                t.get(keys.devices(node), prefix=True),
                t.get(keys.table(Table.REPLICAS), prefix=True),
            )
            if not said.kvs and not there.kvs:
                if tried is None:
                    raise _not_found(node)
                return await self._gone(tried, said.revision)  # by the try whose answer was lost
            own = {found: kv for kv in replicas.kvs if (found := self._replica_of(kv, node)) is not None}
            if own and not force:
                count = "a replica" if len(own) == 1 else f"{len(own)} replicas"
                raise NodeInUse(f"The node {node} has {count}. Drain it first.", node=node, replicas=len(own))
            leases = {kv.lease for kv in (*there.kvs, *devices.kvs, *own.values()) if kv.lease}
            tried = Forgotten(tuple(sorted(own)), frozenset(leases))
            compare = [
                _unchanged(approval, said),
                _unchanged(present, there),
                t.mod(keys.devices(node), prefix=True) < said.revision + 1,
            ]
            deletes = [
                t.delete(approval),
                t.delete(present),
                t.delete(keys.measured(node)),
                t.delete(keys.sources(node)),
                t.delete(keys.devices(node), prefix=True),
            ]
            outcome = await self.commit(compare, deletes, settle=unsettled)
            if outcome.succeeded:
                return await self._gone(tried, outcome.revision)
        raise Conflict(f"The node {node} is being changed by others all the time. Try again.", node=node)

    async def _gone(self, going: Forgotten, revision: int) -> Forgotten:
        for lease in going.leases:
            await self.revoke(lease)
        return replace(going, revision=revision)

    def _budgets(self, devices: RangeResult, approval: ApprovalRecord) -> list[tuple[KeyValue, t.Put]]:
        """Return the puts of devices whose budget is another one by the approval; unreadable devices are left alone."""
        found: list[tuple[KeyValue, t.Put]] = []
        for kv in devices.kvs:
            try:
                key = self.keys.parse(kv.key)
                if not isinstance(key, DeviceKey):
                    continue
                before = codec.decode_device(key.node, key.device, kv.value, kv.mod_revision)
            except ValueError:
                continue
            after = with_budget(before, approval.memory_budgets)
            if after.budget_bytes != before.budget_bytes:
                message = codec.fresh(pb.Device, kv.value)
                codec.fill_device(message, after)
                found.append((kv, t.put(kv.key, codec.encode(message), ignore_lease=True)))
        return found

    def _replica_of(self, kv: KeyValue, node: NodeName) -> ReplicaId | None:
        try:
            key = self.keys.parse(kv.key)
        except ValueError:
            return None
        return key.replica if isinstance(key, ReplicaKey) and key.replica.node == node else None


def _unchanged(key: bytes, read: RangeResult) -> t.Compare:
    return t.mod(key) == (read.kvs[0].mod_revision if read.kvs else 0)


def _not_found(node: NodeName) -> NodeNotFound:
    return NodeNotFound(f"there is no node {node!r}. `localmesh nodes` lists those that there are.", node=node)
