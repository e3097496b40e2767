"""The life line of one registered worker: one stream, four tasks, nothing shared with other streams but the store.

```
worker ──► receive: renews the leases, keeps the latest reports ──► acknowledgements ──┐
mirror ──► follow: is the node still there? did the wanted set change? ────────────────┼─► send ──► worker
reports ─► apply: plan_reports over the mirror's snapshot ──► store ──► exits taken ───┘
```

Each task waits for its own things only. A store that hangs in `apply` does not delay a renewal, and a worker that does
not read what it is sent stops nothing but its own stream.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict, IncarnationLost, InternalError, InvalidRequest, MeshError, StoreUnavailable
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.records import EngineInfo, MeasuredRecord, NodeRecord, SourceRecord
from localmesh.core.snapshot import Snapshot
from localmesh.registry import facts
from localmesh.registry.config import RegistryConfig
from localmesh.registry.reports import (
    Command,
    Exit,
    PutProgress,
    PutSelf,
    PutState,
    Report,
    Serving,
    TakeExit,
    known_sources,
    plan_reports,
    worth_writing,
)
from localmesh.registry.wanted import ViewCache, WantedKey
from localmesh.rpc.convert import replica_ref
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2 as pb

logger = logging.getLogger(__name__)

_UNREAD_ANSWERS = 64
_MAX_REPORTS = 4096

Send = Callable[[pb.HeartbeatResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the streams of a registry share. None of it is changed by one stream so that another one would wait."""

    store: MeshStore
    mirror: Mirror
    views: ViewCache
    config: RegistryConfig
    clock: Clock
    closing: asyncio.Event
    """Set when the registry stops: streams end, and their workers go to another registry."""


class _Ended(Exception):
    """The stream is over, and nothing is wrong."""


class WorkerStream:
    """Serves one Heartbeat call. `run` returns when the worker ends the stream or the registry closes."""

    def __init__(self, around: Surroundings, node: NodeRecord) -> None:
        self._around = around
        self._node = node.name
        self._incarnation = node.incarnation
        self._record_lease = node.record_lease
        self._reports: dict[ReplicaId, Report] = {}
        self._measured: MeasuredRecord | None = None
        self._sources: dict[ModelName, SourceRecord] = {}
        self._engines: tuple[EngineInfo, ...] | None = None
        """None while they are those of the registration."""
        self._answers: asyncio.Queue[int] = asyncio.Queue(_UNREAD_ANSWERS)
        self._outbox = asyncio.Event()
        self._inbox = asyncio.Event()
        self._exits_taken: set[ReplicaId] = set()

    async def run(self, first: pb.HeartbeatRequest, requests: AsyncIterator[pb.HeartbeatRequest], send: Send) -> None:
        """Serve the stream.

        Raises:
            IncarnationLost: The registration has ended.
            InvalidRequest: The worker sent what it may not.
            StoreUnavailable: etcd does not answer: another registry may know better.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(first, requests), name=f"heartbeat-receive {self._node}")
                group.create_task(self._send(send), name=f"heartbeat-send {self._node}")
                group.create_task(self._follow(), name=f"heartbeat-follow {self._node}")
                group.create_task(self._apply(), name=f"heartbeat-apply {self._node}")
                group.create_task(self._close(), name=f"heartbeat-close {self._node}")
        except BaseExceptionGroup as group_error:
            _raise_the_cause(group_error)

    async def _close(self) -> NoReturn:
        await self._around.closing.wait()
        raise _Ended

    async def _receive(self, first: pb.HeartbeatRequest, requests: AsyncIterator[pb.HeartbeatRequest]) -> NoReturn:
        await self._take(first)
        async for request in requests:
            await self._take(request)
        raise _Ended

    async def _take(self, request: pb.HeartbeatRequest) -> None:
        self._remember(request)
        self._inbox.set()
        await self._around.store.renew(self._node, self._incarnation, self._record_lease)
        await self._answers.put(request.sequence)
        self._outbox.set()

    def _remember(self, request: pb.HeartbeatRequest) -> None:
        before = self._reports
        latest = dict(before)
        for message in request.replicas:
            report = facts.report(message, self._node)
            latest[report.id] = report
        if len(latest) > _MAX_REPORTS:
            raise InvalidRequest(f"a node reports on at most {_MAX_REPORTS} replicas", field="replicas")
        self._reports = {name: _steady(report, before.get(name)) for name, report in latest.items()}
        if request.HasField("measurement"):
            self._measured = facts.measurement(request.measurement)
        self._sources.update(facts.sources(request.sources))
        if request.HasField("facts"):
            self._engines = facts.engines(request.facts)

    async def _follow(self) -> NoReturn:
        async for snapshot in self._around.mirror.changes():
            present = snapshot.nodes.get(self._node)
            if present is None or present.incarnation != self._incarnation:
                raise _lost(self._node)
            self._outbox.set()
            self._inbox.set()
        raise _Ended

    async def _send(self, send: Send) -> NoReturn:
        wanted: WantedKey | None = None
        catalog: pb.Catalog | None = None
        while True:
            await self._outbox.wait()
            self._outbox.clear()
            response = pb.HeartbeatResponse()
            # The first message answers the first request, with everything in it.
            answers = wanted is None or not self._answers.empty()
            if answers:
                response.sequence = await self._answers.get()
            view = self._around.views.view(self._around.mirror.snapshot)
            key = view.wanted_key(self._node, self._incarnation)
            if key != wanted:
                wanted = key
                response.wanted.CopyFrom(view.wanted_set(self._node, self._incarnation))
            if view.catalog is not catalog:
                catalog = view.catalog
                response.catalog.CopyFrom(catalog)
            taken, self._exits_taken = self._exits_taken, set()
            response.exits_taken.extend(replica_ref(name) for name in sorted(taken))
            if answers or response.ByteSize():
                await send(response)
            while not self._answers.empty():
                await send(pb.HeartbeatResponse(sequence=self._answers.get_nowait()))

    async def _apply(self) -> NoReturn:
        """Carry reports out until the store shows what they say. The worker's next message is the next try."""
        written: dict[ReplicaId, float] = {}
        seen_at: dict[ReplicaId, int] = {}
        measured: tuple[MeasuredRecord, float] | None = None
        sources: Mapping[ModelName, SourceRecord] | None = None
        engines: tuple[EngineInfo, ...] | None = None
        while True:
            await self._inbox.wait()
            self._inbox.clear()
            snapshot = self._around.mirror.snapshot
            now = self._around.clock.monotonic()
            try:
                await self._apply_reports(snapshot, now, written, seen_at)
                measured = await self._apply_measurement(now, measured)
                sources = await self._apply_sources(snapshot, sources)
                engines = await self._apply_engines(engines)
            except StoreUnavailable as error:
                logger.warning("what %s reports waits for etcd: %s", self._node, error)

    async def _apply_reports(
        self, snapshot: Snapshot, now: float, written: dict[ReplicaId, float], seen_at: dict[ReplicaId, int]
    ) -> None:
        outcome = plan_reports(
            snapshot,
            self._reports.values(),
            incarnation=self._incarnation,
            written=written,
            now=now,
            config=self._around.config,
        )
        for name in outcome.taken:
            self._exit_taken(name)
        for command in outcome.commands:
            name = command.replica.id
            if snapshot.revision < seen_at.get(name, 0):
                continue  # the mirror does not show yet what was written here last
            try:
                seen_at[name] = await self._carry_out(command)
            except Conflict as conflict:
                logger.info("a report on %s was overtaken: %s", name, conflict)
            except InternalError as error:
                logger.error("a report on %s cannot be written: %s", name, error)  # must not cost the node its lease
            if isinstance(command, PutProgress | PutSelf):
                written[name] = now

    async def _carry_out(self, command: Command) -> int:
        """Run one transaction; return the store revision from which on its effect is seen, 0 where that is unknown."""
        store = self._around.store
        match command:
            case PutState(replica=replica):
                record = await store.report(
                    replica,
                    state=command.state,
                    endpoint=command.endpoint,
                    limit=command.limit,
                    measured=command.measured,
                )
                logger.info("%s is %s", replica.id, record.state.name)
                return record.mod_revision
            case TakeExit(replica=replica, failure=failure, died=died):
                await store.exited(replica, failure=failure, died=died, policy=self._around.config.failures)
                logger.info("%s has exited%s", replica.id, f": {failure.reason}" if failure else "")
                # The worker may have been given this name anew while that was written: only the exit is done with.
                latest = self._reports[replica.id]
                if isinstance(latest.observed, Exit) and latest.placement in (0, replica.create_revision):
                    self._exit_taken(replica.id)
            case PutProgress(replica=replica, progress=progress):
                await store.put_progress(replica, progress, record_lease=self._record_lease)
            case PutSelf(replica=replica, count=count):
                await store.put_self_inflight(replica, count)
        return 0

    def _exit_taken(self, name: ReplicaId) -> None:
        del self._reports[name]
        self._exits_taken.add(name)
        self._outbox.set()

    async def _apply_measurement(
        self, now: float, last: tuple[MeasuredRecord, float] | None
    ) -> tuple[MeasuredRecord, float] | None:
        new = self._measured
        old, at = last if last is not None else (None, now)
        if new is None or not worth_writing(new, old, age_seconds=now - at, config=self._around.config):
            return last
        await self._around.store.put_measured(self._node, self._incarnation, new)
        return new, now

    async def _apply_engines(self, last: tuple[EngineInfo, ...] | None) -> tuple[EngineInfo, ...] | None:
        told = self._engines
        if told is None or told == last:
            return last
        try:
            await self._around.store.put_engines(self._node, self._incarnation, told)
        except Conflict as conflict:
            logger.info("the engines of %s are told again: %s", self._node, conflict)
            return last
        return told

    async def _apply_sources(
        self, snapshot: Snapshot, last: Mapping[ModelName, SourceRecord] | None
    ) -> Mapping[ModelName, SourceRecord]:
        # What the snapshot shows may still be that of the node's life before, about to vanish with its lease: each
        # stream begins by writing its own.
        told = known_sources(snapshot, self._sources)
        if told != last:
            await self._around.store.put_sources(self._node, self._incarnation, told)
        return told


def _steady(report: Report, before: Report | None) -> Report:
    """Return the report with the calls that ran at the message before, too.

    Holders publish their counts on a path of their own: what is in one of the two for a moment only is in flight
    between them.
    """
    now = report.observed
    if not isinstance(now, Serving):
        return report
    then = before.observed if before is not None else None
    known = then.reported if isinstance(then, Serving) else 0
    return replace(report, observed=replace(now, in_flight=min(now.reported, known)))


def _lost(node: NodeName) -> IncarnationLost:
    return IncarnationLost(f"The registration of the node {node} has ended. Register again.", node=node)


def _raise_the_cause(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise what ended a stream: a failure of the mesh before its consequences; nothing if it simply ended."""
    leaves = list(_leaves(group))
    for kind in (IncarnationLost, MeshError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                raise leaf from None
    if not all(isinstance(leaf, _Ended) for leaf in leaves):
        raise group


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
