"""Snapshots as they would be after a step of a plan, so that the next step can be planned."""

from collections.abc import Collection
from dataclasses import replace
from types import MappingProxyType

from localmesh.core.ids import DeviceId
from localmesh.core.memory import Devices, sharing
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
    return without_replicas(snapshot, (replica,))


def without_replicas(snapshot: Snapshot, gone: Collection[ReplicaRecord]) -> Snapshot:
    """Return the snapshot as it is once all of these have exited."""
    replicas, devices, measured = dict(snapshot.replicas), dict(snapshot.devices), dict(snapshot.measured)
    names = {replica.id for replica in gone}
    for model in {replica.id.model for replica in gone}:
        siblings = snapshot.replicas.get(model, {})
        replicas[model] = MappingProxyType({r: record for r, record in siblings.items() if r not in names})
    for node in {replica.id.node for replica in gone}:
        known = snapshot.devices.get(node, {})
        left = {
            key: replace(device, claims=MappingProxyType({r: n for r, n in device.claims.items() if r not in names}))
            for key, device in known.items()
        }
        devices[node] = MappingProxyType(left)
        if node in measured:
            free = dict(measured[node].free_bytes)
            for replica in gone:
                if replica.id.node == node and not replica.state.coming:
                    _set_free(free, known, replica)
            measured[node] = replace(measured[node], free_bytes=MappingProxyType(free))
    return replace(
        snapshot,
        replicas=MappingProxyType(replicas),
        devices=MappingProxyType(devices),
        measured=MappingProxyType(measured),
    )


def _set_free(free: dict[DeviceId, int], devices: Devices, replica: ReplicaRecord) -> None:
    for device, size in replica.devices.items():
        for shared in sharing(devices, device) if device in devices else ():
            if shared.id in free:
                free[shared.id] += size
