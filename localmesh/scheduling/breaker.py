"""The breaker of models that fit nowhere: they are left alone for a while, unless capacity changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from localmesh.core.errors import PlacementFailed
from localmesh.core.ids import ModelName
from localmesh.core.snapshot import Snapshot

_NOTICEABLE_PART = 20
"""A twentieth of a device is what must have come free, by measurement, to be worth another look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When a model is unsatisfiable, and for how long. Times are seconds."""

    ticks: int = 3
    """Looks for a place, one after the other, that found none."""
    tick_seconds: float = 1.0
    """From one look that counts to the next, at least: the mesh may change many times a second."""
    seconds: float = 300.0
    """How long no place is looked for then, unless capacity changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A model that was found no place for."""

    error: PlacementFailed = field(compare=False)
    """Why, the last time."""
    looks: int
    """How many looks counted."""
    counted_at: float
    """When the last one did, on the caller's clock."""

    def open(self, config: BreakerConfig) -> bool:
        """Whether the model is unsatisfiable."""
        return self.looks >= config.ticks

    def ends_at(self, config: BreakerConfig) -> float:
        """Return when an unsatisfiable model is looked at again."""
        return self.counted_at + config.seconds


def failed_again(trouble: Trouble | None, error: PlacementFailed, *, now: float, config: BreakerConfig) -> Trouble:
    """Return the trouble after another look that found no place."""
    if trouble is None:
        return Trouble(error=error, looks=1, counted_at=now)
    if now - trouble.counted_at < config.tick_seconds:
        return Trouble(error=error, looks=trouble.looks, counted_at=trouble.counted_at)
    return Trouble(error=error, looks=trouble.looks + 1, counted_at=now)


def remaining(
    troubles: Mapping[ModelName, Trouble],
    before: Snapshot | None,
    after: Snapshot,
    *,
    now: float,
    config: BreakerConfig,
) -> Mapping[ModelName, Trouble]:
    """Return the troubles that still stand: neither over nor in doubt, because capacity has changed.

    Args:
        troubles: Those of the last plan.
        before: What the last plan saw.
        after: What this one sees.
        now: On the clock of the troubles.
        config: When they are over.
    """
    if not troubles or before is None or _capacity_changed(before, after):
        return MappingProxyType({})
    return MappingProxyType(
        {
            name: trouble
            for name, trouble in troubles.items()
            if name in after.models
            and not (trouble.open(config) and now >= trouble.ends_at(config))
            and not _model_changed(name, before, after)
        }
    )


def _capacity_changed(before: Snapshot, after: Snapshot) -> bool:
    """Whether there may be room now that was not there, for any model."""
    return (
        before.nodes != after.nodes
        or before.approvals != after.approvals
        or before.policies != after.policies
        or _replica_gone(before, after)
        or _more_to_claim(before, after)
        or _more_measured(before, after)
    )


def _replica_gone(before: Snapshot, after: Snapshot) -> bool:
    if before.replicas is after.replicas:
        return False
    return any(
        replicas is not after.replicas.get(model) and any(after.replica(r) is None for r in replicas)
        for model, replicas in before.replicas.items()
    )


def _more_to_claim(before: Snapshot, after: Snapshot) -> bool:
    if before.devices is after.devices:
        return False
    return any(
        device.id not in old or device.unclaimed_bytes > old[device.id].unclaimed_bytes
        for node, devices in after.devices.items()
        if devices is not (old := before.devices.get(node, MappingProxyType({})))
        for device in devices.values()
    )


def _more_measured(before: Snapshot, after: Snapshot) -> bool:
    if before.measured is after.measured:
        return False
    for node, measured in after.measured.items():
        old = before.measured.get(node)
        if old is None or measured is old:
            continue
        for device, free in measured.free_bytes.items():
            record = after.devices.get(node, {}).get(device)
            noticeable = record.total_bytes // _NOTICEABLE_PART if record is not None else 0
            if free > old.free_bytes.get(device, free) + noticeable:
                return True
    return False


def _model_changed(model: ModelName, before: Snapshot, after: Snapshot) -> bool:
    return (
        before.models.get(model) != after.models.get(model)
        or before.failures.get(model) != after.failures.get(model)
        or (
            before.sources is not after.sources
            and any(
                known.get(model) != before.sources.get(node, {}).get(model) for node, known in after.sources.items()
            )
        )
    )
