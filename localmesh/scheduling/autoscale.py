"""How much a model is used, and what follows for the number of its replicas.

Use is seen, not told: what holders publish at the times of the plans, on the clock of whoever plans. A holder keeps
its presence for a while after its last request, so a short request between two plans is seen, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, unique
from types import MappingProxyType

from localmesh.core.ids import HolderId, ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot

_SELF = HolderId("self")
"""The holder under which a replica counts all its running calls: those of other holders among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleConfig:
    """When the number of replicas follows the load. Times are seconds."""

    busy_seconds: float = 3.0
    """A model whose replicas are all busy for this long gets another one."""
    idle_seconds: float = 300.0
    """A model that nobody used for this long gives its replicas up; one with more than its load needs, one of them."""
    blind_seconds: float = 30.0
    """After a gap of more than this between two looks nothing is known of the use meanwhile."""
    spare_part: float = 0.5
    """A replica is more than the load needs when this part of the others' limits would do. Well below 1, so that the
    model is not busy as soon as the replica is gone."""


@unique
class Trend(Enum):
    """What the use of a model calls for."""

    STAY = "as many"
    MORE = "one more"
    FEWER = "one fewer"
    NONE = "none at all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How a model that can be called was used of late. Points in time are the caller's."""

    replicas: int
    """Replicas that could be called when it was looked at."""
    used_at: float
    """When somebody was last seen to use it, or when it was first seen."""
    busy_since: float | None = None
    """Since when all these replicas were busy at every look."""
    spare_since: float | None = None
    """Since when one of these replicas fewer would have done at every look."""


def observe(
    snapshot: Snapshot,
    *,
    now: float,
    before: Mapping[ModelName, Usage],
    waiting: Mapping[ModelName, int],
    config: AutoscaleConfig,
) -> Mapping[ModelName, Usage]:
    """Return the usage of every model that can be called.

    Args:
        snapshot: The mesh.
        now: Point in time of this look.
        before: The usage at the last look.
        waiting: Requests that wait for a slot, where that is known: at the router that plans.
        config: When a replica is more than is needed.
    """
    found = {}
    for name in sorted(snapshot.replicas):
        serving = snapshot.routable_replicas(name)
        if serving:
            old = before.get(name)
            same = old if old is not None and old.replicas == len(serving) else None
            used, full, spare = _load(snapshot, serving, config)
            busy = full or (used and not spare and waiting.get(name, 0) > 0)
            found[name] = Usage(
                replicas=len(serving),
                used_at=now if used or old is None else old.used_at,
                busy_since=_since(busy, same.busy_since if same is not None else None, now),
                spare_since=_since(spare, same.spare_since if same is not None else None, now),
            )
    return MappingProxyType(found)


def _load(snapshot: Snapshot, serving: Sequence[ReplicaRecord], config: AutoscaleConfig) -> tuple[bool, bool, bool]:
    """Return whether replicas are used, all at their limits, and whether one fewer would do."""
    if not any(r.id in snapshot.inflight for r in serving):
        return False, False, len(serving) > 1  # most models, most of the time: this is made many times a second
    loads = [load_of(snapshot, r.id) for r in serving]
    used = any(in_use(snapshot, r.id) for r in serving)
    full = all(load >= r.limit for load, r in zip(loads, serving, strict=True))
    limits = sorted(r.limit for r in serving)
    spare = len(serving) > 1 and sum(loads) <= config.spare_part * sum(limits[:-1])
    return used, full, spare


def trend(usage: Usage, *, now: float, config: AutoscaleConfig) -> Trend:
    """Return what the usage calls for."""
    if usage.busy_since is not None and now - usage.busy_since >= config.busy_seconds:
        return Trend.MORE
    if now - usage.used_at >= config.idle_seconds:
        return Trend.NONE
    if usage.spare_since is not None and now - usage.spare_since >= config.idle_seconds:
        return Trend.FEWER
    return Trend.STAY


def next_change(usages: Mapping[ModelName, Usage], *, now: float, config: AutoscaleConfig) -> float | None:
    """Return in how many seconds a trend changes if the use does not; None for never."""
    ends = [u.busy_since + config.busy_seconds for u in usages.values() if u.busy_since is not None]
    ends += [u.used_at + config.idle_seconds for u in usages.values()]
    ends += [u.spare_since + config.idle_seconds for u in usages.values() if u.spare_since is not None]
    return min((end - now for end in ends if end > now), default=None)


def load_of(snapshot: Snapshot, replica: ReplicaId) -> int:
    """Return the requests in flight on a replica: those that holders publish, or that it counts itself if more."""
    holders = snapshot.inflight.get(replica, {})
    return max(snapshot.in_flight(replica, without=_SELF), holders.get(_SELF, 0))


def in_use(snapshot: Snapshot, replica: ReplicaId) -> bool:
    """Whether somebody holds the replica, or did a moment ago."""
    return any(count > 0 or holder != _SELF for holder, count in snapshot.inflight.get(replica, {}).items())


def _since(true: bool, before: float | None, now: float) -> float | None:
    if not true:
        return None
    return now if before is None else before
