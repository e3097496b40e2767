"""Memory that was handed over (T7) to a replica which nobody placed: its placer died between T3 and T1."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from localmesh.core.ids import DeviceId, ReplicaId
from localmesh.core.snapshot import Snapshot

_NOBODY: Mapping[ReplicaId, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeBack:
    """Give back what a replica claims on devices that its record does not name, or without any record."""

    replica: ReplicaId
    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanPlan:
    """What to take back now."""

    actions: tuple[TakeBack, ...] = ()
    since: Mapping[ReplicaId, float] = field(default_factory=lambda: _NOBODY)
    """When each claim was first seen without its replica, on the caller's clock; to be given to the next plan."""
    wake_after_seconds: float | None = None
    """When a plan of the same snapshot may differ; None for never."""


def plan_take_back(
    snapshot: Snapshot, *, now: float, since: Mapping[ReplicaId, float] = _NOBODY, patience_seconds: float = 5.0
) -> OrphanPlan:
    """Return the claims that nobody came for.

    A claim waits for its replica for a while: a placer that is alive needs one transaction. As long as anything is
    still being stopped for the same replica, its placer waits, too, and the time does not begin.

    Args:
        snapshot: The mesh.
        now: Seconds on a monotonic clock.
        since: That of the plan before.
        patience_seconds: How long a claim waits.
    """
    awaited = {r.memory_for for r in snapshot.all_replicas() if r.memory_for is not None}
    found: dict[ReplicaId, list[DeviceId]] = {}
    for devices in snapshot.devices.values():
        for device in devices.values():
            for replica in device.claims:
                record = snapshot.replica(replica)
                if replica not in awaited and (record is None or device.id not in record.devices):
                    found.setdefault(replica, []).append(device.id)
    first = {replica: since.get(replica, now) for replica in sorted(found)}
    due = {replica: at + patience_seconds - now for replica, at in first.items()}
    return OrphanPlan(
        actions=tuple(
            TakeBack(replica=replica, devices=tuple(sorted(found[replica])))
            for replica, left in due.items()
            if left <= 0
        ),
        since=MappingProxyType(first),
        wake_after_seconds=min((left for left in due.values() if left > 0), default=None),
    )
