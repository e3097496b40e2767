"""RouterService: loading on purpose, the mesh at a glance, logs, and backends of nodes."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.duration_pb2 import Duration

from localmesh.core.clock import Clock
from localmesh.core.ids import ModelName
from localmesh.core.records import ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.router.backends import BackendRelay
from localmesh.router.cold import ColdLoader, Load
from localmesh.router.config import RouterConfig
from localmesh.router.explain import explain_placement
from localmesh.router.logs import LogRelay, LogSelection
from localmesh.router.views import coming, require_model
from localmesh.router.warnings import warnings_of
from localmesh.rpc.convert import model_name_of, node_name_of, replica_to_proto
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import router_service_pb2_grpc

_TELL_EVERY_SECONDS = 1.0


class RouterServicer(router_service_pb2_grpc.RouterServiceServicer):
    """Serves RouterService.

    Args:
        config: Of the router.
        store: The transactions.
        mirror: The view of the mesh.
        clock: The time.
        cold: Loads models.
        logs: Reads lines from workers.
        backends: Asks workers about their backends.
        worries: Returns sentences that only this router knows, of the mesh or of one model.
    """

    def __init__(
        self,
        config: RouterConfig,
        store: MeshStore,
        mirror: Mirror,
        clock: Clock,
        cold: ColdLoader,
        logs: LogRelay,
        backends: BackendRelay,
        worries: Callable[[ModelName | None], list[str]],
    ) -> None:
        self._config = config
        self._store = store
        self._mirror = mirror
        self._clock = clock
        self._cold = cold
        self._logs = logs
        self._backends = backends
        self._worries = worries

    async def EnsureLoaded(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002 - grpc's signature
        """See the proto."""
        model = model_name_of(request.model)
        load: Load | None = None
        while True:
            snapshot = self._mirror.snapshot
            require_model(snapshot, model)
            response = _loaded(snapshot, model)
            yield response
            if response.ready:
                return
            if load is not None and load.done():
                load.result()  # raises why it failed
                load = None
            if load is None:
                load = self._cold.want(model)
            await self._news(model, response, load)

    async def _news(self, model: ModelName, told: Any, load: Load) -> None:
        """Wait until there is something else to tell, or a second has passed."""

        async def change() -> None:
            deadline = self._clock.monotonic() + _TELL_EVERY_SECONDS
            try:
                await self._mirror.wait_for(lambda s: s if _loaded(s, model) != told else None, deadline)
            except TimeoutError:
                return

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(change())

            def stop(_: Load) -> None:
                watching.cancel()

            load.add_done_callback(stop)
        load.remove_done_callback(stop)

    async def GetStatus(self, request: Any, context: Any) -> Any:  # noqa: ARG002 - grpc's signature
        """See the proto."""
        snapshot = self._mirror.snapshot
        silence = self._mirror.silence(self._clock.monotonic())
        since = Duration()
        if math.isfinite(silence):  # it was heard at least once
            since.FromMicroseconds(int(silence * 1e6))
        replicas = list(snapshot.all_replicas())
        return pb.GetStatusResponse(
            mesh=self._config.mesh,
            store_revision=snapshot.revision,
            store_connected=self._mirror.connected,
            store_silence=since,
            version=self._config.version,
            reconciler=snapshot.leader,
            router=self._config.name,
            live_nodes=sum(1 for node in snapshot.nodes if snapshot.usable(node)),
            nodes=len(snapshot.approvals.keys() | snapshot.nodes.keys()),
            models=len(snapshot.models),
            ready_replicas=sum(1 for r in replicas if r.state is ReplicaState.READY and snapshot.present(r)),
            replicas=len(replicas),
            warnings=[
                *warnings_of(snapshot, connected=self._mirror.connected, silence_seconds=silence),
                *self._worries(None),
            ],
        )

    async def ExplainPlacement(self, request: Any, context: Any) -> Any:  # noqa: ARG002 - grpc's signature
        """See the proto."""
        response = explain_placement(self._mirror.snapshot, request, connected=self._mirror.connected)
        if not response.dry_run:
            response.notes.extend(self._worries(ModelName(response.model)))
        return response

    async def ReleaseGuard(self, request: Any, context: Any) -> Any:  # noqa: ARG002 - grpc's signature
        """See the proto."""
        nodes = self._mirror.snapshot.guarded_nodes
        released = await self._store.clear_guard()
        return pb.ReleaseGuardResponse(released=released, nodes=sorted(nodes) if released else [])

    async def StreamLogs(self, request: Any, context: Any) -> None:
        """See the proto."""
        selection = LogSelection(
            model=model_name_of(request.model),
            index=request.index if request.HasField("index") else None,
            node=node_name_of(request.node) if request.node else None,
            tail_lines=request.tail_lines,
            follow=request.follow,
        )
        await self._logs.relay(selection, context.write)

    async def InstallNodeBackend(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """See the proto."""
        await self._backends.install(request_iterator, context.write)

    async def UpgradeNodeBackend(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """See the proto."""
        await self._backends.upgrade(request_iterator, context.write)

    async def DeleteNodeBackend(self, request: Any, context: Any) -> Any:
        """See the proto."""
        return await self._backends.delete(request, context.time_remaining())

    async def ListNodeBackends(self, request: Any, context: Any) -> Any:  # noqa: ARG002 - grpc's signature
        """See the proto."""
        return await self._backends.list_all(request)


def _loaded(snapshot: Snapshot, model: ModelName) -> Any:
    ready = sorted((r for r in snapshot.replicas_of(model) if snapshot.routable(r)), key=lambda r: r.id)
    nearest = next(iter(ready or coming(snapshot, model)), None)
    replica = replica_to_proto(snapshot, nearest) if nearest is not None else None
    return pb.EnsureLoadedResponse(replica=replica, ready=bool(ready))
