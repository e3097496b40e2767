"""What a worker's reports mean for the store. Pure: the mesh and the reports in, commands out.

Reports are levels. The same level at the same state of the mesh gives the same commands, and once they are carried out
it gives none. A report counts for the placement that it names, under the incarnation that its stream belongs to: one of
an earlier life of the replica's name changes nothing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from localmesh.core.ids import DeviceId, ModelName, ReplicaId
from localmesh.core.records import (
    FailureRecord,
    MeasuredRecord,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.registry.config import RegistryConfig
from localmesh.store.keys import SELF_HOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The process is being prepared or loads."""

    state: ReplicaState
    """STAGING or LOADING."""
    progress: ProgressRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """It serves."""

    endpoint: str
    limit: int
    measured: Mapping[DeviceId, int] = field(default_factory=lambda: MappingProxyType({}))
    reported: int = 0
    """Calls that run on it."""
    in_flight: int = 0
    """As many of them as ran at the message before, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The process and all its children are gone."""

    reason: str = ""
    """Name of an error reason; empty when it stopped as told, or because its worker stops."""
    message: str = ""
    while_loading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A replica as its worker sees it."""

    id: ReplicaId
    revision: str
    placement: int
    """Create-revision of the record that the worker was told of; 0 when it was never told of one."""
    observed: Loading | Serving | Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class PutState:
    """T6."""

    replica: ReplicaRecord
    state: ReplicaState
    endpoint: str = ""
    limit: int = 0
    measured: Mapping[DeviceId, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeExit:
    """T7."""

    replica: ReplicaRecord
    failure: FailureRecord | None
    died: bool = False
    """It was ready before: no load that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutProgress:
    """Publish how far a load is."""

    replica: ReplicaRecord
    progress: ProgressRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PutSelf:
    """Publish calls that no holder sees."""

    replica: ReplicaRecord
    count: int


Command = PutState | TakeExit | PutProgress | PutSelf


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to do about the reports."""

    commands: tuple[Command, ...] = ()
    taken: tuple[ReplicaId, ...] = ()
    """Exits that need nothing (any more)."""


def plan_reports(
    snapshot: Snapshot,
    reports: Iterable[Report],
    *,
    incarnation: int,
    written: Mapping[ReplicaId, float],
    now: float,
    config: RegistryConfig,
) -> Outcome:
    """Decide what the store is told.

    Args:
        snapshot: The mesh.
        reports: The latest of each replica.
        incarnation: Of the node that reports.
        written: When progress or count of a replica were last published by this stream.
        now: Seconds on the monotonic clock.
        config: How often what may be written.
    """
    commands: list[Command] = []
    taken: list[ReplicaId] = []
    for report in sorted(reports, key=lambda r: r.id):
        record = snapshot.replica(report.id)
        if isinstance(report.observed, Exit):
            if _is_over(snapshot, report, record):
                taken.append(report.id)
            elif record is not None and _is_about(report, record, incarnation):
                failure = _failure(report, report.observed, record)
                died = failure is not None and not report.observed.while_loading
                commands.append(TakeExit(replica=record, failure=failure, died=died))
        elif record is not None and record.revision == report.revision and _is_about(report, record, incarnation):
            due = now - written.get(report.id, -math.inf) >= config.progress_seconds
            if isinstance(report.observed, Loading):
                commands.extend(_loading(snapshot, report.observed, record, due=due))
            else:
                commands.extend(_serving(snapshot, report.observed, record, due=due))
    return Outcome(commands=tuple(commands), taken=tuple(taken))


def _is_about(report: Report, record: ReplicaRecord, incarnation: int) -> bool:
    return record.incarnation == incarnation and report.placement in (0, record.create_revision)


def _is_over(snapshot: Snapshot, report: Report, record: ReplicaRecord | None) -> bool:
    """Whether the store knows already that this life of the replica is over."""
    if record is None:
        # A view from before the placement knows nothing of it yet.
        return snapshot.revision >= report.placement
    if report.placement == 0:
        # It cannot be about what the worker was never told of: the end of an earlier process.
        return record.state is ReplicaState.PLACED
    return report.placement < record.create_revision


def _failure(report: Report, exit_: Exit, record: ReplicaRecord) -> FailureRecord | None:
    if not exit_.reason or record.state.leaving:
        return None
    return FailureRecord(
        model=report.id.model,
        node=report.id.node,
        reason=exit_.reason,
        message=exit_.message,
        revision=record.revision,
    )


def _loading(snapshot: Snapshot, seen: Loading, record: ReplicaRecord, *, due: bool) -> Iterable[Command]:
    if not record.state.coming:
        return
    if seen.state.value > record.state.value:
        yield PutState(replica=record, state=seen.state)
    if seen.progress is not None and due and snapshot.progress.get(record.id) != seen.progress:
        yield PutProgress(replica=record, progress=seen.progress)


def _serving(snapshot: Snapshot, seen: Serving, record: ReplicaRecord, *, due: bool) -> Iterable[Command]:
    if record.state.coming or (
        record.state is ReplicaState.READY and (record.endpoint, record.limit) != (seen.endpoint, seen.limit)
    ):
        yield PutState(
            replica=record,
            state=ReplicaState.READY,
            endpoint=seen.endpoint,
            limit=seen.limit,
            measured=seen.measured,
        )
    # Holders publish theirs themselves: only what nobody accounts for is the replica's own.
    unseen = max(0, seen.in_flight - snapshot.in_flight(record.id, without=SELF_HOLDER))
    if due and unseen != snapshot.inflight.get(record.id, {}).get(SELF_HOLDER, 0):
        yield PutSelf(replica=record, count=unseen)


def worth_writing(
    new: MeasuredRecord, old: MeasuredRecord | None, *, age_seconds: float, config: RegistryConfig
) -> bool:
    """Whether a measurement is published: the first, a large change at once, any other change now and then."""
    if old is None:
        return True
    if new == old:
        return False
    if age_seconds >= config.measured_seconds or new.free_bytes.keys() != old.free_bytes.keys():
        return True
    pairs = [(new.free_bytes[device], old.free_bytes[device]) for device in new.free_bytes]
    pairs.append((new.disk_free_bytes, old.disk_free_bytes))
    return abs(new.cpu_load - old.cpu_load) > 5 * config.measured_change or any(
        abs(a - b) > config.measured_change * max(a, b) for a, b in pairs
    )


def known_sources(snapshot: Snapshot, told: Mapping[ModelName, SourceRecord]) -> Mapping[ModelName, SourceRecord]:
    """Return what a node told of models that are still declared."""
    return MappingProxyType({name: source for name, source in told.items() if name in snapshot.models})
