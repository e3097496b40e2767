"""Workers for tests: real ones, with fake replicas, and registries that keep nothing but what the test says."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration

from localmesh.core.errors import IncarnationLost
from localmesh.core.ids import NodeName
from localmesh.rpc.errors import abort_with
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc as pb_grpc
from localmesh.v1 import types_pb2
from localmesh.worker.agent import Worker
from localmesh.worker.config import WorkerConfig

FAKE = (sys.executable, str(Path(__file__).with_name("fake_replica.py")))
PLACED, LOADING, READY, UNLOADING = (
    types_pb2.REPLICA_STATE_PLACED,
    types_pb2.REPLICA_STATE_LOADING,
    types_pb2.REPLICA_STATE_READY,
    types_pb2.REPLICA_STATE_UNLOADING,
)


@dataclass
class Mesh:
    """What the stand-in registries share, as real ones share etcd."""

    revision: int = 10
    incarnation: int = 0
    ttl_seconds: float = 5.0
    wanted: dict[str, pb.WantedReplica] = field(default_factory=dict)
    catalog: list[pb.CatalogEntry] = field(default_factory=list)
    stop: list[types_pb2.ReplicaRef] = field(default_factory=list)
    registrations: list[pb.RegisterRequest] = field(default_factory=list)
    reports: dict[str, pb.ReplicaReport] = field(default_factory=dict)
    sources: dict[str, pb.SourceFacts] = field(default_factory=dict)
    measurements: list[pb.NodeMeasurement] = field(default_factory=list)
    facts: list[pb.NodeFacts] = field(default_factory=list)
    exits: list[pb.ReplicaReport] = field(default_factory=list)
    deregistered: list[int] = field(default_factory=list)
    beats: dict[str, int] = field(default_factory=dict)
    refuse: list[Exception] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def change(self) -> None:
        self.revision += 1
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(40), self.changed:
            await self.changed.wait_for(condition)
        return condition()

    async def place(self, index: int = 0, revision: str = "r1", state: Any = PLACED, **options: str) -> str:
        spec = types_pb2.ModelSpec(
            name="m", backend="process:fake", parameters=types_pb2.LoadParameters(options=options)
        )
        ref = types_pb2.ReplicaRef(model="m", node="n1", index=index)
        key = f"m/n1/{index}"
        self.wanted[key] = pb.WantedReplica(
            ref=ref, state=state, revision=revision, spec=spec, devices={"cpu": 100}, placement=self.revision
        )
        await self.change()
        return key

    async def unload(self, key: str) -> None:
        self.wanted[key].state = UNLOADING
        await self.change()

    async def serving(self, key: str = "m/n1/0") -> pb.ReplicaReport:
        await self.until(lambda: key in self.reports and self.reports[key].HasField("serving"))
        return self.reports[key]


class Registry(pb_grpc.RegistryServiceServicer):
    """A registry that keeps nothing but what the mesh has."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self._mesh = mesh
        self.name = name
        self.frozen = asyncio.Event()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        mesh = self._mesh
        if self.frozen.is_set():
            await asyncio.Event().wait()
        if mesh.refuse:
            await abort_with(context, mesh.refuse.pop(0))  # type: ignore[arg-type]
        mesh.incarnation += 1
        mesh.registrations.append(request)
        for report in request.running:
            mesh.reports[f"m/n1/{report.ref.index}"] = report
        await mesh.change()
        ttl = Duration()
        ttl.FromMilliseconds(int(mesh.ttl_seconds * 1000))
        stop = [r.ref for r in request.running if r.ref in mesh.stop]
        adopted = [r.ref for r in request.running if r.ref not in mesh.stop]
        return pb.RegisterResponse(incarnation=mesh.incarnation, presence_ttl=ttl, adopted=adopted, stop=stop)

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:
        self._mesh.deregistered.append(request.incarnation)
        await self._mesh.change()
        return pb.DeregisterResponse()

    async def Heartbeat(self, requests: AsyncIterator[pb.HeartbeatRequest], context: Any) -> None:
        mesh, incarnation = self._mesh, 0
        pusher: asyncio.Task[None] | None = None
        try:
            async for request in requests:
                if self.frozen.is_set():
                    await asyncio.Event().wait()
                first, incarnation = not incarnation, incarnation or request.incarnation
                if incarnation != mesh.incarnation:
                    await abort_with(context, IncarnationLost("register again", node="n1"))
                answer = pb.HeartbeatResponse(sequence=request.sequence, exits_taken=self._take(request))
                if first:
                    answer.wanted.CopyFrom(self._wanted_set())
                    answer.catalog.CopyFrom(pb.Catalog(entries=mesh.catalog))
                    pusher = asyncio.get_running_loop().create_task(self._push(context, mesh.revision))
                await context.write(answer)
                async with mesh.changed:
                    mesh.changed.notify_all()
        finally:
            if pusher is not None:
                pusher.cancel()

    async def _push(self, context: Any, sent: int) -> None:
        while True:
            async with self._mesh.changed:
                while self._mesh.revision <= sent:
                    await self._mesh.changed.wait()
            sent = self._mesh.revision
            catalog = pb.Catalog(entries=self._mesh.catalog)
            await context.write(pb.HeartbeatResponse(wanted=self._wanted_set(), catalog=catalog))

    def _wanted_set(self) -> pb.WantedSet:
        mesh = self._mesh
        return pb.WantedSet(incarnation=mesh.incarnation, store_revision=mesh.revision, replicas=mesh.wanted.values())

    def _take(self, request: pb.HeartbeatRequest) -> list[types_pb2.ReplicaRef]:
        mesh, taken = self._mesh, []
        mesh.beats[self.name] = mesh.beats.get(self.name, 0) + 1
        mesh.sources.update({s.model: s for s in request.sources})
        if request.HasField("facts"):
            mesh.facts.append(request.facts)
        if request.HasField("measurement"):
            mesh.measurements.append(request.measurement)
        for report in request.replicas:
            key = f"m/n1/{report.ref.index}"
            mesh.reports[key] = report
            wanted = mesh.wanted.get(key)
            if report.HasField("exited"):
                taken.append(report.ref)
                if wanted is None or wanted.placement == report.placement:
                    mesh.exits.append(report)
                    mesh.wanted.pop(key, None)
                    mesh.revision += 1
            elif wanted is not None and wanted.state != UNLOADING:
                wanted.state = READY if report.HasField("serving") else LOADING
        return taken


@asynccontextmanager
async def serving_registry(mesh: Mesh, name: str, port: int = 0) -> AsyncIterator[tuple[Registry, str]]:
    registry = Registry(mesh, name)
    server = GrpcServer(ServerConfig(listen=f"127.0.0.1:{port}", drain_seconds=0), name=name)
    server.add(pb_grpc.add_RegistryServiceServicer_to_server, registry, "localmesh.v1.RegistryService")
    async with server:
        yield registry, server.endpoint


@asynccontextmanager
async def working(tmp_path: Path, *registries: str, **changes: Any) -> AsyncIterator[Worker]:
    config: dict[str, Any] = {
        "mesh": "test",
        "node": NodeName("n1"),
        "registries": registries,
        "models_dir": tmp_path / "models",
        "backends_dir": tmp_path / "backends",
        "state_dir": tmp_path / "state",
        "cache_dir": tmp_path / "cache",
        "run_dir": tmp_path / "run",
        "replica_command": FAKE,
        "drain_seconds": 1.0,
        "heartbeat_seconds": 0.2,
        "ack_seconds": 1.0,
        "call_seconds": 1.0,
        "labels": {"zone": "a"},
        "environment": {"PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[2])},
    }
    worker = Worker(WorkerConfig(**{**config, **changes}))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(worker.run())
        try:
            await worker.listening()
            yield worker
        finally:
            task.cancel()


async def finished(worker: Worker, mesh: Mesh) -> None:
    worker.stop()
    await mesh.until(lambda: mesh.deregistered)
