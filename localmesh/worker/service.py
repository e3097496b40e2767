"""WorkerService: what runs on this node, and what it prints. It takes no orders."""

from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

from localmesh.core.errors import InvalidRequest, ReplicaNotFound
from localmesh.core.ids import NodeName, ReplicaId
from localmesh.core.records import ReplicaState
from localmesh.rpc import convert
from localmesh.v1 import worker_service_pb2 as pb
from localmesh.v1 import worker_service_pb2_grpc as pb_grpc
from localmesh.worker.events import Held, Stage
from localmesh.worker.logs import ReplicaLog

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

    def log(self, replica: ReplicaId) -> ReplicaLog | None:
        """Return the output of a replica's present or last process."""
        ...


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    """Shows a worker."""

    def __init__(self, view: WorkerView) -> None:
        self._view = view

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
        if request.tail_lines < 0:
            raise InvalidRequest(f"tail_lines is negative: {request.tail_lines}", field="tail_lines")
        replica = convert.replica_id(request.ref)
        log = self._view.log(replica)
        if log is None:
            raise ReplicaNotFound(f"{self._view.node} has no output of a replica {replica}", replica=replica)
        tail = min(request.tail_lines or _DEFAULT_LINES, _MOST_LINES)
        async for line in log.lines(tail=tail, follow=request.follow):
            yield pb.StreamReplicaLogsResponse(line=line)
