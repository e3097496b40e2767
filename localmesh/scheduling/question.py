"""What is to be placed, and on what: everything that filters and scorers ask for, worked out once."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.memory import Devices, left_bytes, sharing, unclaimed_bytes
from localmesh.core.records import DeviceRecord, EngineInfo, ModelRecord, NodeRecord, Policy, SourceRecord
from localmesh.core.snapshot import Snapshot

GANG_OVERHEAD_BYTES = 512 << 20
"""What each GPU of a replica on several of them holds by itself: the driver's context and buffers of its own."""

_NO_INDICES: frozenset[int] = frozenset()
_NO_DEVICES: Devices = {}


@dataclass(frozen=True, kw_only=True)  # no slots: what several filters ask for is worked out once
class Question:
    """What is to be placed, and on what."""

    snapshot: Snapshot
    model: ModelRecord
    policy: Policy
    excluded: frozenset[NodeName] = frozenset()
    """Nodes that the caller does not want."""
    hypothetical: bool = False
    """The model is not declared: nobody can have looked for its files, and that is nothing against a node."""

    def node(self, name: NodeName) -> NodeRecord:
        """Return a node that is known to be present."""
        return self.snapshot.nodes[name]

    def engine(self, name: NodeName) -> EngineInfo | None:
        """Return the model's engine on a node."""
        return self.node(name).engine(self.model.spec.backend)

    def source(self, name: NodeName) -> SourceRecord | None:
        """Return what a node knows of the model's files, if that is about the present revision."""
        found = self.snapshot.sources.get(name, {}).get(self.model.spec.name)
        return found if found is not None and found.revision == self.model.revision else None

    @property
    def device_count(self) -> int:
        """Number of devices that a replica takes."""
        return max(1, self.model.spec.device_count)

    def needed_bytes(self, name: NodeName) -> int:
        """Return the memory that a replica takes on each of its devices on a node; 0 where nobody can tell."""
        total = self.model.spec.memory_bytes
        if not total:
            source = self.source(name)
            total = source.memory_bytes if source is not None else 0
        count = self.device_count
        return total if count == 1 else -(-total // count) + GANG_OVERHEAD_BYTES

    @cached_property
    def replica_count(self) -> int:
        """Number of the model's replicas, in whatever state they are."""
        return sum(1 for _ in self.snapshot.replicas_of(self.model.spec.name))

    def indices(self, name: NodeName) -> frozenset[int]:
        """Return the indices that the model's replicas occupy on a node, in whatever state they are."""
        return self._indices.get(name, _NO_INDICES)

    @cached_property
    def _indices(self) -> Mapping[NodeName, frozenset[int]]:
        found: dict[NodeName, set[int]] = {}
        for replica in self.snapshot.replicas_of(self.model.spec.name):
            found.setdefault(replica.id.node, set()).add(replica.id.index)
        return {node: frozenset(indices) for node, indices in found.items()}

    def replica(self, name: NodeName) -> ReplicaId:
        """Return the replica that the model would get on a node: the lowest free index.

        Except where memory was handed over to one that is not there yet (T7): then it is that one.
        """
        if name not in self._next:
            taken, model = self.indices(name), self.model.spec.name
            claimants = {replica for device in self.all_devices(name).values() for replica in device.claims}
            heirs = [r for r in claimants if r.model == model and r.node == name and r.index not in taken]
            free = next(i for i in range(len(taken) + 1) if i not in taken)
            self._next[name] = min(heirs, default=ReplicaId(model, name, free))
        return self._next[name]

    @cached_property
    def _next(self) -> dict[NodeName, ReplicaId]:
        return {}

    @cached_property
    def current_nodes(self) -> frozenset[NodeName]:
        """Nodes that hold a replica of the present revision, in whatever state it is."""
        replicas = self.snapshot.replicas_of(self.model.spec.name)
        return frozenset(r.id.node for r in replicas if r.revision == self.model.revision)

    @cached_property
    def members_by_node(self) -> Mapping[NodeName, ModelName]:
        """Nodes that hold a replica of a model that never shares a node with this one, each with the first such."""
        found: dict[NodeName, ModelName] = {}
        for member in sorted(self.snapshot.group_members(self.model.spec.name)):
            for replica in self.snapshot.replicas_of(member):
                found.setdefault(replica.id.node, member)
        return found

    def kinds(self, name: NodeName) -> tuple[str, ...]:
        """Return the kinds of device that both the engine and the spec allow on a node, the better ones first."""
        engine = self.engine(name)
        allowed = engine.device_kinds if engine is not None else ()
        wanted = self.model.spec.device_kind or ("gpu" if self.device_count > 1 else "")
        return tuple(kind for kind in ("gpu", "cpu") if kind in allowed and wanted in ("", kind))

    def all_devices(self, name: NodeName) -> Devices:
        """Return a node's devices."""
        return self.snapshot.devices.get(name, _NO_DEVICES)

    def devices(self, name: NodeName) -> list[tuple[DeviceRecord, int]]:
        """Return the node's devices of those kinds with their room, the better kinds first, then the more room."""
        if name not in self._devices:
            kinds = self.kinds(name)
            found = ((d, self.room_bytes(d)) for d in self.all_devices(name).values() if d.kind in kinds)
            self._devices[name] = sorted(found, key=lambda df: (kinds.index(df[0].kind), -df[1], df[0].id))
        return self._devices[name]

    @cached_property
    def _devices(self) -> dict[NodeName, list[tuple[DeviceRecord, int]]]:
        return {}

    def choice(self, name: NodeName) -> dict[DeviceId, int] | None:
        """Return the devices that a replica would take on a node, with the bytes on each; None if they do not fit.

        All are of one kind, a better kind before another, and of that the ones with most room, equal ones by name.
        """
        if name not in self._choices:
            self._choices[name] = self._choose(name)
        return self._choices[name]

    @cached_property
    def _choices(self) -> dict[NodeName, dict[DeviceId, int] | None]:
        return {}

    def _choose(self, name: NodeName) -> dict[DeviceId, int] | None:
        needed, count, devices = self.needed_bytes(name), self.device_count, self.devices(name)
        if count == 1:
            return next(({device.id: needed} for device, room in devices if room >= needed), None)
        for kind in self.kinds(name):
            fitting = [d for d, room in devices if d.kind == kind and room >= needed]
            chosen = {device.id: needed for device in fitting[:count]}
            # Devices that share memory may each have room for one part, and not for all of them.
            if len(chosen) == count and min(self._left(name, chosen)) >= 0:
                return chosen
        return None

    def _left(self, name: NodeName, sizes: Mapping[DeviceId, int]) -> list[int]:
        devices = self.all_devices(name)
        left = list(left_bytes(devices, sizes, claimant=self.replica(name)).values())
        for device in sizes:
            measured = self._measured_bytes(devices[device])
            if measured is not None:
                left.append(measured - sum(sizes.get(d.id, 0) for d in sharing(devices, device)))
        return left

    def room_bytes(self, device: DeviceRecord) -> int:
        """Return what can be claimed on a device; negative after a budget was lowered.

        That is what is unclaimed of its budget, or what was measured to be free if that is less. A device without a
        measurement is not a full one.
        """
        unclaimed = unclaimed_bytes(self.all_devices(device.node), device.id, claimant=self.replica(device.node))
        measured = self._measured_bytes(device)
        return unclaimed if measured is None else min(unclaimed, measured)

    def _measured_bytes(self, device: DeviceRecord) -> int | None:
        """Return what was measured to be free of a device.

        The measurement does not show yet what replicas that are still loading will take: their claims come off. What
        was handed over to this one is counted as free: the exit that freed it may be younger than the measurement.
        """
        measured = self.snapshot.measured.get(device.node)
        if measured is None or device.id not in measured.free_bytes:
            return None
        shared = sharing(self.all_devices(device.node), device.id)
        loading = sum(n for d in shared for replica, n in d.claims.items() if self._coming(replica))
        heir = self.replica(device.node)
        return measured.free_bytes[device.id] - loading + sum(d.claims.get(heir, 0) for d in shared)

    def _coming(self, replica: ReplicaId) -> bool:
        record = self.snapshot.replica(replica)
        return record is not None and record.state.coming

    def residents(self, name: NodeName) -> frozenset[ReplicaId]:
        """Return the replicas of any model that have memory on a node."""
        return frozenset(replica for device in self.all_devices(name).values() for replica in device.claims)
