"""WorkerService: what runs on this node, what it prints, and which backends it has."""

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from localmesh.core.errors import InvalidRequest, ReplicaNotFound
from localmesh.core.ids import NodeName
from localmesh.core.records import ReplicaState
from localmesh.rpc import convert
from localmesh.v1 import worker_service_pb2 as pb
from localmesh.v1 import worker_service_pb2_grpc as pb_grpc
from localmesh.worker.backend_service import BackendCalls
from localmesh.worker.events import Held, Stage
from localmesh.worker.logbook import CaughtUp, LogBook
from localmesh.worker.logs import LogLine

SERVICE = "localmesh.v1.WorkerService"
_DEFAULT_LINES = 100
_MOST_LINES = 100_000
_STATES = {
    Stage.STARTING: ReplicaState.STAGING,
    Stage.LOADING: ReplicaState.LOADING,
    Stage.READY: ReplicaState.READY,
    Stage.STOPPING: ReplicaState.UNLOADING,
}


class WorkerView(Protocol):
    """What the service shows."""

    @property
    def node(self) -> NodeName:
        """Name of the node."""
        ...

    @property
    def registered(self) -> bool:
        """Whether it is registered now."""
        ...

    def replicas(self) -> Iterable[Held]:
        """Return all that is known of its replicas."""
        ...

    @property
    def logs(self) -> LogBook:
        """What the node's replicas print."""
        ...


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    """Serves WorkerService."""

    def __init__(self, view: WorkerView, backends: BackendCalls) -> None:
        self._view = view
        self._backends = backends

    async def ListProcesses(
        self,
        request: pb.ListProcessesRequest,  # noqa: ARG002 - grpc's signature
        context: Any,  # noqa: ARG002
    ) -> pb.ListProcessesResponse:
        """Return what runs."""
        processes = [
            pb.Process(
                ref=convert.replica_ref(held.id),
                pid=held.pid,
                state=convert.state_to_proto(_STATES[held.stage]),
                endpoint=held.endpoint,
            )
            for held in sorted(self._view.replicas(), key=lambda h: h.id)
            if held.pid and held.stage in _STATES
        ]
        return pb.ListProcessesResponse(node=self._view.node, processes=processes, registered=self._view.registered)

    async def StreamReplicaLogs(
        self,
        request: pb.StreamReplicaLogsRequest,
        context: Any,  # noqa: ARG002 - grpc's signature
    ) -> AsyncIterator[pb.StreamReplicaLogsResponse]:
        """Stream lines of output.

        Raises:
            InvalidRequest: The request names no replica.
            ReplicaNotFound: This node has not had such a replica since it started.
        """
        tail = _tail(request.tail_lines)
        replica = convert.replica_id(request.ref)
        logs = self._view.logs
        log = logs.latest(replica)
        if log is None:
            raise ReplicaNotFound(f"{self._view.node} has no output of a replica {replica}", replica=replica)
        async with aclosing(logs.stream_life(log, follow=request.follow, tail=tail)) as lines:
            async for line in lines:
                yield pb.StreamReplicaLogsResponse(line=line.text, time=_timestamp(line.time), sequence=line.number)

    async def StreamModelLogs(
        self,
        request: pb.StreamModelLogsRequest,
        context: Any,  # noqa: ARG002 - grpc's signature
    ) -> AsyncIterator[pb.StreamModelLogsResponse]:
        """Stream lines of all replicas of a model.

        Raises:
            InvalidRequest: A field is not acceptable.
        """
        tail, model = _tail(request.tail_lines), convert.model_name_of(request.model)
        index = request.index if request.HasField("index") else None
        seen = {position.life: position.sequence for position in request.seen}
        found = self._view.logs.stream(
            lambda log: log.replica.model == model and index in (None, log.replica.index),
            follow=request.follow,
            tail=tail,
            seen=seen if request.resume else None,
        )
        async with aclosing(found) as lines:
            async for line in lines:
                yield _model_log(line)

    async def InstallBackend(self, request_iterator: AsyncIterator[pb.InstallBackendRequest], context: Any) -> None:
        """See the protocol."""
        await self._backends.install(request_iterator, context.write)

    async def UpgradeBackend(self, request_iterator: AsyncIterator[pb.UpgradeBackendRequest], context: Any) -> None:
        """See the protocol."""
        await self._backends.upgrade(request_iterator, context.write)

    async def DeleteBackend(
        self,
        request: pb.DeleteBackendRequest,
        context: Any,  # noqa: ARG002 - grpc's signature
    ) -> pb.DeleteBackendResponse:
        """See the protocol."""
        return await self._backends.delete(request)

    async def ListBackends(
        self,
        request: pb.ListBackendsRequest,  # noqa: ARG002 - grpc's signature
        context: Any,  # noqa: ARG002
    ) -> pb.ListBackendsResponse:
        """See the protocol."""
        return await self._backends.list_all()


def _tail(lines: int) -> int:
    if lines < 0:
        raise InvalidRequest(f"tail_lines is negative: {lines}", field="tail_lines")
    return min(lines or _DEFAULT_LINES, _MOST_LINES)


def _model_log(line: LogLine | CaughtUp) -> pb.StreamModelLogsResponse:
    if isinstance(line, CaughtUp):
        positions = [pb.LogPosition(life=life, sequence=number) for life, number in line.positions.items()]
        return pb.StreamModelLogsResponse(caught_up=True, positions=positions)
    return pb.StreamModelLogsResponse(
        ref=convert.replica_ref(line.replica),
        line=line.text,
        time=_timestamp(line.time),
        life=line.life,
        sequence=line.number,
        lost_bytes=line.lost_bytes,
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(int(seconds * 1e6))
    return stamp
