"""Lines of a model's replicas, fetched from the nodes that run them or ran them, and merged by time."""

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from localmesh.core.clock import Clock
from localmesh.core.errors import ComponentUnreachable, MeshError, NodeNotFound, ReplicaNotFound
from localmesh.core.ids import ModelName, NodeName
from localmesh.core.snapshot import Snapshot
from localmesh.router.views import require_model
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.identity import server_name
from localmesh.store.mirror import Mirror
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import worker_service_pb2, worker_service_pb2_grpc

logger = logging.getLogger(__name__)

_HISTORY_SECONDS = 10.0
"""A node that says nothing for so long is left out of the lines that were there; a stream that follows takes it in
later."""
_AGAIN_SECONDS = 0.5

Write = Callable[[pb.StreamLogsResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSelection:
    """Whose lines, and how many."""

    model: ModelName
    index: int | None
    node: NodeName | None
    """None for any."""
    tail_lines: int
    follow: bool

    def nodes(self, snapshot: Snapshot) -> list[NodeName]:
        """Return the nodes that are asked, of those that are there."""
        return sorted(name for name in snapshot.nodes if self.node in (None, name))

    def has_replica(self, snapshot: Snapshot) -> bool:
        """Whether there is a replica of the kind, so that having no lines is no mistake in its name."""
        return any(
            self.index in (None, replica.id.index) and self.node in (None, replica.id.node)
            for replica in snapshot.replicas_of(self.model)
        )


class _Source:
    """The lines of one node: one stream after the other, each of which goes on where the last one ended."""

    def __init__(self, node: NodeName, selection: LogSelection, mirror: Mirror, channels: ChannelPool) -> None:
        self.node = node
        self._selection = selection
        self._mirror = mirror
        self._channels = channels
        self._seen: dict[int, int] = {}
        self._resume = False
        self._call: Any = None
        self._endpoint = ""

    def resume_from_start(self) -> None:
        """Take every line that the node has: it came after the stream began."""
        self._resume = True

    def open(self) -> None:
        """Begin a stream.

        Raises:
            ComponentUnreachable: The node is not there.
        """
        record = self._mirror.snapshot.nodes.get(self.node)
        if record is None:
            raise ComponentUnreachable(f"the node {self.node!r} has left", endpoint="")
        selection, self._endpoint = self._selection, record.endpoint
        channel = self._channels.get(record.endpoint, server_name=server_name("node", self.node))
        request = worker_service_pb2.StreamModelLogsRequest(
            model=selection.model,
            index=selection.index,
            follow=selection.follow,
            tail_lines=selection.tail_lines,
            resume=self._resume or bool(self._seen),
            seen=[worker_service_pb2.LogPosition(life=life, sequence=n) for life, n in self._seen.items()],
        )
        self._call = worker_service_pb2_grpc.WorkerServiceStub(channel).StreamModelLogs(request)

    async def read(self) -> Any:
        """Return the next message, or None at the end of the stream.

        Raises:
            MeshError: The stream broke.
        """
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, endpoint=self._endpoint) from error
        if message is grpc.aio.EOF:
            return None
        if message.caught_up:
            self._resume = True
            for position in message.positions:
                self._seen[position.life] = max(position.sequence, self._seen.get(position.life, 0))
        else:
            self._seen[message.life] = message.sequence
        return message

    def close(self) -> None:
        """End the stream."""
        if self._call is not None:
            self._call.cancel()


class LogRelay:
    """Reads lines from workers and hands them on, one at a time."""

    def __init__(self, mirror: Mirror, channels: ChannelPool, clock: Clock) -> None:
        self._mirror = mirror
        self._channels = channels
        self._clock = clock

    async def relay(self, selection: LogSelection, write: Write) -> None:
        """Write the selected lines; with `follow` until cancelled.

        Raises:
            ModelNotFound: The model is not declared, and there is no line of it.
            NodeNotFound: The node is not there.
            ReplicaNotFound: There is neither a line nor a replica, and nothing to come is asked for.
            ComponentUnreachable: Not one of the workers answers, and nothing to come is asked for.
        """
        snapshot = self._mirror.snapshot
        nodes = selection.nodes(snapshot)
        if selection.node is not None and not nodes and not (selection.follow and selection.node in snapshot.approvals):
            raise NodeNotFound(f"there is no node {selection.node!r} now", node=selection.node)
        if selection.follow:
            require_model(snapshot, selection.model)
        sources = {node: _Source(node, selection, self._mirror, self._channels) for node in nodes}
        try:
            written, failures = await self._history(list(sources.values()), write)
            if selection.follow:
                await self._follow(selection, sources, frozenset(failures), write)
        finally:
            for source in sources.values():
                source.close()
        if written:
            return
        require_model(snapshot, selection.model)
        if failures and len(failures) == len(nodes):
            raise next(iter(failures.values()))
        if not selection.has_replica(snapshot):
            name = selection.model if selection.index is None else f"{selection.model}#{selection.index}"
            raise ReplicaNotFound(
                f"there is no replica {name!r} now, and no output of one; `localmesh replicas` lists those there are",
                replica=name,
            )

    async def _history(self, sources: list[_Source], write: Write) -> tuple[int, dict[NodeName, MeshError]]:
        """Write the lines that are there in the order of their time; return how many, and the nodes that failed."""
        failures: dict[NodeName, MeshError] = {}

        async def following(source: _Source, *, opening: bool = False) -> Any:
            try:
                async with asyncio.timeout(_HISTORY_SECONDS):
                    if opening:
                        source.open()
                    message = await source.read()
            except TimeoutError:
                failures[source.node] = ComponentUnreachable(f"the node {source.node!r} does not answer", endpoint="")
            except MeshError as error:
                failures[source.node] = error
            else:
                return None if message is None or message.caught_up else message
            logger.info("the lines of %s are incomplete: %s", source.node, failures[source.node])
            source.close()
            return None

        async with asyncio.TaskGroup() as group:
            firsts = [(s, group.create_task(following(s, opening=True))) for s in sources]
        heads = [(*_order(m, s.node), m, s) for s, task in firsts if (m := task.result()) is not None]
        heapq.heapify(heads)
        written = 0
        while heads:
            *_, message, source = heads[0]
            await write(_line(message))
            written += 1
            if (message := await following(source)) is not None:
                heapq.heapreplace(heads, (*_order(message, source.node), message, source))
            else:
                heapq.heappop(heads)
        return written, failures

    async def _follow(
        self, selection: LogSelection, sources: dict[NodeName, _Source], broken: frozenset[NodeName], write: Write
    ) -> None:
        """Write new lines until the model is deleted."""
        one_at_a_time = asyncio.Lock()

        async def write_one(line: pb.StreamLogsResponse) -> None:
            async with one_at_a_time:
                await write(line)

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._follow_node(s, write_one, is_open=node not in broken))
                for node, s in sources.items()
            ]
            async for snapshot in self._mirror.changes():
                if selection.model not in snapshot.models:
                    break
                for node in selection.nodes(snapshot):
                    if node not in sources:
                        sources[node] = source = _Source(node, selection, self._mirror, self._channels)
                        source.resume_from_start()
                        tasks.append(group.create_task(self._follow_node(source, write_one, is_open=False)))
            for task in tasks:
                task.cancel()
        require_model(self._mirror.snapshot, selection.model)

    async def _follow_node(self, source: _Source, write: Write, *, is_open: bool) -> None:
        """Write new lines of one node, again after each loss of it, until cancelled."""
        while True:
            try:
                if not is_open:
                    source.open()
                while (message := await source.read()) is not None:
                    if not message.caught_up:
                        await write(_line(message))
            except MeshError as error:
                logger.info("the lines of %s break off: %s", source.node, error)
            is_open = False
            source.close()
            await self._node_is_there(source.node)

    async def _node_is_there(self, node: NodeName) -> None:
        """Return when a node is worth another try."""
        await asyncio.sleep(_AGAIN_SECONDS)
        while node not in self._mirror.snapshot.nodes:
            try:
                await self._mirror.wait_for(
                    lambda s: s if node in s.nodes else None, self._clock.monotonic() + _HISTORY_SECONDS
                )
            except TimeoutError:
                continue


def _order(message: Any, node: NodeName) -> tuple[int, int, NodeName, int, int]:
    return message.time.seconds, message.time.nanos, node, message.life, message.sequence


def _line(message: Any) -> pb.StreamLogsResponse:
    return pb.StreamLogsResponse(
        ref=message.ref,
        line=message.line,
        time=message.time,
        life=message.life,
        sequence=message.sequence,
        lost_bytes=message.lost_bytes,
    )
