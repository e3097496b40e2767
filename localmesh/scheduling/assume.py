"""Snapshots as they would be after a step of a plan, so that the next step can be planned."""

from dataclasses import replace
from types import MappingProxyType

from localmesh.core.memory import sharing
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.placement import PlacementPlan


def with_placement(snapshot: Snapshot, plan: PlacementPlan) -> Snapshot:
    """Return the snapshot as it is once the plan was carried out: the replica PLACED, its memory claimed."""
    replica, node = plan.replica, plan.replica.node
    record = ReplicaRecord(
        id=replica,
        state=ReplicaState.PLACED,
        revision=plan.revision,
        incarnation=plan.incarnation,
        devices=plan.devices,
    )
    devices = dict(snapshot.devices[node])
    for device, size in plan.devices.items():
        claims = MappingProxyType({**devices[device].claims, replica: size})
        devices[device] = replace(devices[device], claims=claims)
    siblings = MappingProxyType({**snapshot.replicas.get(replica.model, {}), replica: record})
    return replace(
        snapshot,
        replicas=MappingProxyType({**snapshot.replicas, replica.model: siblings}),
        devices=MappingProxyType({**snapshot.devices, node: MappingProxyType(devices)}),
    )


def without_replica(snapshot: Snapshot, replica: ReplicaRecord) -> Snapshot:
    """Return the snapshot as it is once the replica has exited: record and claims gone, memory free again."""
    name, node = replica.id, replica.id.node
    devices = {
        key: replace(device, claims=MappingProxyType({r: n for r, n in device.claims.items() if r != name}))
        for key, device in snapshot.devices.get(node, {}).items()
    }
    siblings = {r: record for r, record in snapshot.replicas.get(name.model, {}).items() if r != name}
    measured = dict(snapshot.measured)
    if node in measured:
        free = dict(measured[node].free_bytes)
        known = snapshot.devices.get(node, {})
        for device, size in replica.devices.items():
            if device in known and not replica.state.coming:
                for shared in sharing(known, device):
                    if shared.id in free:
                        free[shared.id] += size
        measured[node] = replace(measured[node], free_bytes=MappingProxyType(free))
    return replace(
        snapshot,
        replicas=MappingProxyType({**snapshot.replicas, name.model: MappingProxyType(siblings)}),
        devices=MappingProxyType({**snapshot.devices, node: MappingProxyType(devices)}),
        measured=MappingProxyType(measured),
    )
