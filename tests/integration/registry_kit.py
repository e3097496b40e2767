"""A registry as the mesh sees one, and a worker that says what the test wants said, over the real protocol."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

from localmesh.core.clock import SystemClock
from localmesh.core.errors import MeshError
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EtcdClient, EtcdConfig
from localmesh.registry.config import RegistryConfig
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.registry.service import SERVICE, RegistryServicer
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.scheduling.placement import plan_placement
from localmesh.store import MeshStore, Mirror, Placement
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc as rpc
from localmesh.v1 import types_pb2

CLOCK = SystemClock()
GIB = 1 << 30
M = ModelName("m")
PATIENCE = 20.0

T = TypeVar("T")


class Registry:
    """One registry process, as far as the mesh can tell."""

    def __init__(self, etcd: str, mesh: str, config: RegistryConfig, folder: DesiredFolder | None = None) -> None:
        self._etcd = EtcdClient(EtcdConfig(endpoints=(etcd,)), CLOCK)
        self.store = MeshStore(self._etcd, mesh, CLOCK)
        self.mirror = Mirror(self.store)
        self._config = config
        self._folder = folder
        self._stop = asyncio.Event()
        self.endpoint = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Registry"]:
        async with self._etcd, asyncio.TaskGroup() as group:
            await self.store.check_schema()
            mirror = group.create_task(self.mirror.run())
            await self.mirror.loaded()
            servicer = RegistryServicer(self.store, self.mirror, self._config, CLOCK, folder=self._folder)
            server = GrpcServer(ServerConfig(drain_seconds=5), name="registry")
            server.add(rpc.add_RegistryServiceServicer_to_server, servicer, SERVICE)
            async with server:
                self.endpoint = server.endpoint
                try:
                    yield self
                finally:
                    servicer.close()
            mirror.cancel()

    async def until(self, predicate: Callable[[Snapshot], T | None]) -> T:
        return await self.mirror.wait_for(predicate, CLOCK.monotonic() + PATIENCE)

    async def replica(self, state: ReplicaState | None, index: int = 0) -> ReplicaRecord | None:
        """Wait until the replica m/n1/index is in that state, or gone where it is None."""
        name = ReplicaId(M, NodeName("n1"), index)

        def there(snapshot: Snapshot) -> tuple[ReplicaRecord | None] | None:
            record = snapshot.replica(name)
            return (record,) if (record.state if record else None) is state else None

        return (await self.until(there))[0]


class FakeWorker:
    """Says what a worker would say, when the test says so."""

    def __init__(self, name: str = "n1", *, key: bytes = b"k" * 40) -> None:
        self.name = name
        self.key = key
        self.join_token = ""
        self.incarnation = 0
        self.sequence = 0
        self.wanted: list[pb.WantedSet] = []
        self.catalog: list[pb.Catalog] = []
        self.taken: list[str] = []
        self.acknowledged = 0
        self._said = asyncio.Condition()

    async def register(
        self, channel: grpc.aio.Channel, *running: pb.ReplicaReport, **facts: Any
    ) -> pb.RegisterResponse:
        request = pb.RegisterRequest(
            node=self.name,
            public_key=self.key,
            facts=pb.NodeFacts(
                endpoint="127.0.0.1:4",
                devices=[pb.DeviceFacts(id="cpu", kind="cpu", total_bytes=10 * GIB)],
                engines=[types_pb2.Engine(name="llama", available=True, device_kinds=["cpu"])],
                **facts,
            ),
            running=running,
            join_token=self.join_token,
        )
        try:
            response = await rpc.RegistryServiceStub(channel).Register(request, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        self.incarnation = response.incarnation
        return response

    @contextlib.asynccontextmanager
    async def stream(self, channel: grpc.aio.Channel) -> AsyncIterator["Stream"]:
        call = rpc.RegistryServiceStub(channel).Heartbeat()
        stream = Stream(self, call)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(stream.read())
            beat = group.create_task(stream.beat())
            try:
                yield stream
            finally:
                call.cancel()
                beat.cancel()
                reader.cancel()

    async def told(self, predicate: Callable[["FakeWorker"], T | None]) -> T:
        """Wait until what the registry said satisfies a predicate."""
        async with asyncio.timeout(PATIENCE), self._said:
            while not (found := predicate(self)):
                await self._said.wait()
            return found

    async def wants(self, state: int, index: int = 0) -> pb.WantedReplica:
        def shown(worker: "FakeWorker") -> pb.WantedReplica | None:
            latest = worker.wanted[-1].replicas if worker.wanted else []
            return next((r for r in latest if r.ref.index == index and r.state == state), None)

        return await self.told(shown)

    async def hear(self, response: pb.HeartbeatResponse) -> None:
        async with self._said:
            if response.HasField("wanted"):
                self.wanted.append(response.wanted)
            if response.HasField("catalog"):
                self.catalog.append(response.catalog)
            self.taken += [f"{r.model}/{r.node}/{r.index}" for r in response.exits_taken]
            self.acknowledged = max(self.acknowledged, response.sequence)
            self._said.notify_all()

    def report(self, wanted: pb.WantedReplica, **observed: Any) -> pb.ReplicaReport:
        return pb.ReplicaReport(ref=wanted.ref, revision=wanted.revision, placement=wanted.placement, **observed)


class Stream:
    """One Heartbeat call."""

    def __init__(self, worker: FakeWorker, call: Any) -> None:
        self._worker = worker
        self._call = call
        self._writing = asyncio.Lock()
        self.error: asyncio.Future[MeshError | None] = asyncio.get_running_loop().create_future()

    async def say(self, *replicas: pb.ReplicaReport, **fields: Any) -> int:
        """Send a message; return its sequence."""
        async with self._writing:
            self._worker.sequence += 1
            request = pb.HeartbeatRequest(
                node=self._worker.name,
                incarnation=self._worker.incarnation,
                sequence=self._worker.sequence,
                replicas=replicas,
                **fields,
            )
            await self._call.write(request)
            return request.sequence

    async def beat(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self.say()
                await asyncio.sleep(0.2)

    async def read(self) -> None:
        try:
            async for response in self._call:
                await self._worker.hear(response)
            self.error.set_result(None)
        except grpc.aio.AioRpcError as error:
            self.error.set_result(from_rpc_error(error))

    async def ended(self) -> MeshError | None:
        async with asyncio.timeout(PATIENCE):
            return await self.error


def sources(model: str, revision: str, *, present: bool = True) -> list[pb.SourceFacts]:
    return [pb.SourceFacts(model=model, revision=revision, present=present, path="/m", memory_bytes=GIB)]


def serving(port: int = 7, **more: Any) -> pb.ReplicaServing:
    return pb.ReplicaServing(endpoint=f"127.0.0.1:{port}", limit=4, measured_bytes={"cpu": 2 * GIB}, **more)


def loading() -> pb.ReplicaLoading:
    progress = types_pb2.LoadProgress(phase="loading", done_bytes=5, total_bytes=10)
    return pb.ReplicaLoading(state=types_pb2.REPLICA_STATE_LOADING, progress=progress)


async def place(registry: Registry) -> ReplicaRecord:
    """T1 as a router does it, once the node has said that it has the file."""
    revision = (await registry.store.put_model(ModelSpec(name=M, backend="llama", source="m"), None))[0].revision

    def ready(snapshot: Snapshot) -> bool:
        told = snapshot.sources.get(NodeName("n1"), {}).get(M)
        return told is not None and told.revision == revision

    await registry.until(ready)
    snapshot = registry.mirror.snapshot
    plan = plan_placement(snapshot, M)
    return await registry.store.place(
        Placement(
            replica=plan.replica,
            revision=plan.revision,
            devices=plan.devices,
            incarnation=plan.incarnation,
            snapshot=snapshot,
        )
    )


async def answer_catalog(worker: FakeWorker, stream: Stream) -> None:
    """Look for the files that the registry asks for: they are all there."""
    catalog = await worker.told(lambda w: w.catalog[-1] if w.catalog and w.catalog[-1].entries else None)
    await stream.say(sources=[s for e in catalog.entries for s in sources(e.spec.name, e.revision)])


async def place_on(registry: Registry, worker: FakeWorker, stream: Stream) -> pb.WantedReplica:
    async with asyncio.TaskGroup() as group:
        group.create_task(answer_catalog(worker, stream))
        group.create_task(place(registry))
    return await worker.wants(types_pb2.REPLICA_STATE_PLACED)
