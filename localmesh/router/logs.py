"""Lines of a model's replicas, fetched from the workers that run them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from localmesh.core.errors import ComponentUnreachable, MeshError, ReplicaNotFound
from localmesh.core.ids import ModelName, ReplicaId
from localmesh.core.records import ReplicaRecord
from localmesh.core.snapshot import Snapshot
from localmesh.router.views import require_model
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.convert import replica_ref
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.identity import server_name
from localmesh.store.mirror import Mirror
from localmesh.v1 import worker_service_pb2, worker_service_pb2_grpc

logger = logging.getLogger(__name__)

Write = Callable[[ReplicaId, str], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSelection:
    """Whose lines, and how many."""

    model: ModelName
    index: int | None
    node: str
    """Empty for any."""
    tail_lines: int
    follow: bool

    def replicas(self, snapshot: Snapshot) -> list[ReplicaRecord]:
        """Return the selected replicas on nodes that are there, in the order of their names."""
        return [
            replica
            for replica in sorted(snapshot.replicas_of(self.model), key=lambda r: r.id)
            if self.index in (None, replica.id.index)
            and self.node in ("", replica.id.node)
            and replica.id.node in snapshot.nodes
        ]


class LogRelay:
    """Reads lines from workers and hands them on, one at a time."""

    def __init__(self, mirror: Mirror, channels: ChannelPool) -> None:
        self._mirror = mirror
        self._channels = channels

    async def relay(self, selection: LogSelection, write: Write) -> None:
        """Write the selected lines; with `follow` until cancelled.

        Raises:
            ModelNotFound: The model is not declared.
            ReplicaNotFound: Nothing is selected, and nothing to come is asked for.
            ComponentUnreachable: Not one of the workers answers, and nothing to come is asked for.
        """
        snapshot = self._mirror.snapshot
        require_model(snapshot, selection.model)
        if selection.follow:
            await self._follow(selection, write)
            return
        replicas = selection.replicas(snapshot)
        if not replicas:
            raise ReplicaNotFound(
                f"the model {selection.model!r} has no such replica now; `localmesh replicas` lists those there are",
                replica=selection.model,
            )
        failures = []
        for replica in replicas:
            try:
                await self._copy(replica.id, selection, write)
            except MeshError as error:
                failures.append(error)
        if len(failures) == len(replicas):
            raise failures[0]

    async def _follow(self, selection: LogSelection, write: Write) -> None:
        one_at_a_time = asyncio.Lock()

        async def write_one(replica: ReplicaId, line: str) -> None:
            async with one_at_a_time:
                await write(replica, line)

        joined: set[tuple[ReplicaId, int]] = set()
        tasks: list[asyncio.Task[None]] = []
        async with asyncio.TaskGroup() as streams:
            async for snapshot in self._mirror.changes():
                if selection.model not in snapshot.models:
                    break
                for replica in selection.replicas(snapshot):
                    life = (replica.id, replica.create_revision)
                    if life not in joined:
                        joined.add(life)
                        tasks.append(streams.create_task(self._copy_quietly(replica.id, selection, write_one)))
            for task in tasks:
                task.cancel()
        require_model(snapshot, selection.model)

    async def _copy_quietly(self, replica: ReplicaId, selection: LogSelection, write: Write) -> None:
        try:
            await self._copy(replica, selection, write)
        except MeshError as error:
            logger.info("the lines of %s end: %s", replica, error)

    async def _copy(self, replica: ReplicaId, selection: LogSelection, write: Write) -> None:
        node = self._mirror.snapshot.nodes.get(replica.node)
        if node is None:
            raise ComponentUnreachable(f"the node {replica.node!r} has left", endpoint="")
        channel = self._channels.get(node.endpoint, server_name=server_name("node", replica.node))
        request = worker_service_pb2.StreamReplicaLogsRequest(
            ref=replica_ref(replica),
            follow=selection.follow,
            tail_lines=selection.tail_lines,
        )
        call = worker_service_pb2_grpc.WorkerServiceStub(channel).StreamReplicaLogs(request)
        try:
            async for response in call:
                await write(replica, response.line)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, endpoint=node.endpoint) from error
        finally:
            call.cancel()
