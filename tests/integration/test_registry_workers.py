"""The registry towards workers: a fake worker speaks the real protocol to real registries over a real etcd."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.errors import (
    IncarnationLost,
    InvalidRequest,
    MeshError,
    NodeNameTaken,
    NodePending,
    StoreUnavailable,
)
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EtcdBinary, EtcdClient, EtcdConfig, EtcdServer
from localmesh.registry.config import RegistryConfig
from localmesh.registry.service import SERVICE, RegistryServicer
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.scheduling.placement import plan_placement
from localmesh.store import LeaseTimes, MeshStore, Mirror, Placement
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

    def __init__(self, etcd: str, mesh: str, config: RegistryConfig) -> None:
        self._etcd = EtcdClient(EtcdConfig(endpoints=(etcd,)), CLOCK)
        self.store = MeshStore(self._etcd, mesh, CLOCK)
        self.mirror = Mirror(self.store)
        self._config = config
        self._stop = asyncio.Event()
        self.endpoint = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Registry"]:
        async with self._etcd, asyncio.TaskGroup() as group:
            await self.store.check_schema()
            mirror = group.create_task(self.mirror.run())
            await self.mirror.loaded()
            servicer = RegistryServicer(self.store, self.mirror, self._config, CLOCK)
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


@pytest.fixture
def config() -> RegistryConfig:
    return RegistryConfig(
        progress_seconds=0.05, write_seen_seconds=5.0, leases=LeaseTimes(presence_seconds=2, record_seconds=60)
    )


@pytest.fixture
async def registry(etcd_endpoint: str, mesh_name: str, config: RegistryConfig) -> AsyncIterator[Registry]:
    async with Registry(etcd_endpoint, mesh_name, config).running() as registry:
        yield registry


@pytest.fixture
async def channel(registry: Registry) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(registry.endpoint) as channel:
        yield channel


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


async def test_a_worker_registers_is_told_and_serves(registry: Registry, channel: grpc.aio.Channel) -> None:
    """F1, F27: from registration over the wanted set to READY, with the claim raised to what was measured."""
    worker = FakeWorker()
    registered = await worker.register(channel, labels={"zone": "a"})
    assert registered.presence_ttl.ToSeconds() == 2
    node = registry.mirror.snapshot.nodes[NodeName("n1")]
    assert (node.incarnation, node.labels) == (registered.incarnation, {"zone": "a"})
    assert registry.mirror.snapshot.devices[NodeName("n1")][CPU].budget_bytes == 9 * GIB
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        assert (wanted.spec.source, wanted.devices) == ("m", {"cpu": GIB})
        await stream.say(worker.report(wanted, loading=loading()))
        await registry.replica(ReplicaState.LOADING)
        progress = await registry.until(lambda s: s.progress.get(ReplicaId(M, NodeName("n1"), 0)))
        assert (progress.done_bytes, progress.total_bytes) == (5, 10)
        await stream.say(worker.report(wanted, serving=serving()))
        record = await registry.replica(ReplicaState.READY)
        assert record is not None
        assert (record.endpoint, record.limit, dict(record.devices)) == ("127.0.0.1:7", 4, {CPU: 2 * GIB})
        assert registry.mirror.snapshot.devices[NodeName("n1")][CPU].claimed_bytes == 2 * GIB
        assert (await worker.wants(types_pb2.REPLICA_STATE_READY)).placement == wanted.placement


async def test_each_message_is_answered_with_its_sequence(registry: Registry, channel: grpc.aio.Channel) -> None:
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        await worker.told(lambda w: w.wanted and w.catalog)
        sequence = await stream.say()
        await worker.told(lambda w: w.acknowledged >= sequence)


async def test_a_confirmed_exit_gives_the_memory_back_and_a_failed_load_is_remembered(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F42, F46."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        exited = pb.ReplicaExited(reason="LOAD_FAILED", message="bad magic", while_loading=True)
        await stream.say(worker.report(wanted, exited=exited))
        await registry.replica(None)
        await worker.told(lambda w: "m/n1/0" in w.taken)
        snapshot = registry.mirror.snapshot
        assert snapshot.devices[NodeName("n1")][CPU].claimed_bytes == 0
        failure = await registry.until(lambda s: s.failures.get(M, {}).get(NodeName("n1")))
        assert (failure.reason, failure.message, failure.revision) == ("LOAD_FAILED", "bad magic", wanted.revision)


async def test_an_unloading_replica_is_told_to_stop_and_leaves_no_failure(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        await stream.say(worker.report(wanted, serving=serving()))
        record = await registry.replica(ReplicaState.READY)
        assert record is not None
        assert await registry.store.unload_replica(record)
        await worker.wants(types_pb2.REPLICA_STATE_UNLOADING)
        await stream.say(worker.report(wanted, exited=pb.ReplicaExited()))
        await registry.replica(None)
        assert not registry.mirror.snapshot.failures


async def test_a_cut_stream_is_opened_again_under_the_same_incarnation(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F4."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        await stream.say(worker.report(wanted, loading=loading()))
        await registry.replica(ReplicaState.LOADING)
    worker.wanted.clear()
    async with worker.stream(channel) as stream:
        again = await worker.wants(types_pb2.REPLICA_STATE_LOADING)
        assert again.placement == wanted.placement
        await stream.say(worker.report(wanted, serving=serving()))
        await registry.replica(ReplicaState.READY)
    assert worker.wanted[-1].incarnation == worker.incarnation


async def test_a_node_whose_presence_ended_is_told_so_and_its_replicas_are_adopted(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F4, F5: gone within the lease; back without a reload."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        await stream.say(worker.report(wanted, serving=serving()))
        await registry.replica(ReplicaState.READY)
    await registry.until(lambda s: NodeName("n1") not in s.nodes)
    assert registry.mirror.snapshot.replica(ReplicaId(M, NodeName("n1"), 0)) is not None
    before = worker.incarnation
    async with worker.stream(channel) as stream:
        assert isinstance(await stream.ended(), IncarnationLost)
    again = await worker.register(channel, worker.report(wanted, serving=serving()))
    assert [r.model for r in again.adopted] == ["m"]
    assert not again.stop
    assert worker.incarnation != before
    async with worker.stream(channel):
        assert (await worker.wants(types_pb2.REPLICA_STATE_READY)).revision == wanted.revision
    record = registry.mirror.snapshot.replica(ReplicaId(M, NodeName("n1"), 0))
    assert record is not None
    assert record.incarnation == worker.incarnation
    assert registry.mirror.snapshot.devices[NodeName("n1")][CPU].claimed_bytes == 2 * GIB


async def test_a_running_replica_whose_model_is_gone_is_to_be_stopped(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F43."""
    worker = FakeWorker()
    report = pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="other", node="n1"), revision="0" * 16, serving=serving())
    answer = await worker.register(channel, report)
    assert [r.model for r in answer.stop] == ["other"]
    async with worker.stream(channel) as stream:
        await stream.say(pb.ReplicaReport(ref=report.ref, revision=report.revision, exited=pb.ReplicaExited()))
        await worker.told(lambda w: "other/n1/0" in w.taken)


async def test_a_late_exit_of_an_earlier_placement_hits_no_later_one(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        first = await place_on(registry, worker, stream)
        await stream.say(worker.report(first, exited=pb.ReplicaExited()))
        await registry.replica(None)
        await place(registry)
        second = await worker.told(
            lambda w: next((r for r in w.wanted[-1].replicas if r.placement != first.placement), None)
        )
        worker.taken.clear()
        await stream.say(worker.report(first, exited=pb.ReplicaExited()))
        await worker.told(lambda w: "m/n1/0" in w.taken)
        assert await registry.replica(ReplicaState.PLACED)
        await stream.say(worker.report(second, serving=serving()))
        await registry.replica(ReplicaState.READY)


async def test_a_second_machine_with_the_same_name_is_refused(registry: Registry, channel: grpc.aio.Channel) -> None:
    """F3."""
    await FakeWorker().register(channel)
    before = registry.mirror.snapshot.nodes[NodeName("n1")]
    with pytest.raises(NodeNameTaken):
        await FakeWorker(key=b"x" * 40).register(channel)
    assert registry.mirror.snapshot.nodes[NodeName("n1")] == before


async def test_calls_that_no_holder_sees_count_as_the_replicas_own(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F17."""
    name = ReplicaId(M, NodeName("n1"), 0)
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        await stream.say(worker.report(wanted, serving=serving(in_flight=3)))
        await registry.until(lambda s: s.in_flight(name) == 3 or None)
        record = await registry.replica(ReplicaState.READY)
        assert record is not None
        assert await registry.store.unload_replica(record) is False
        await stream.say(worker.report(wanted, serving=serving(in_flight=0)))
        await registry.until(lambda s: name not in s.inflight or None)


async def test_measurements_are_published(registry: Registry, channel: grpc.aio.Channel) -> None:
    """F9."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        measurement = pb.NodeMeasurement(free_bytes={"cpu": 5 * GIB}, cpu_load=0.5, disk_free_bytes=7)
        await stream.say(measurement=measurement)
        seen = await registry.until(lambda s: s.measured.get(NodeName("n1")))
        assert (seen.free_bytes[CPU], seen.cpu_load, seen.disk_free_bytes) == (5 * GIB, 0.5, 7)


async def test_another_registry_takes_over_under_a_live_worker(
    etcd_endpoint: str, mesh_name: str, config: RegistryConfig
) -> None:
    """F4: registries are stateless."""
    worker = FakeWorker()
    async with Registry(etcd_endpoint, mesh_name, config).running() as first:
        async with grpc.aio.insecure_channel(first.endpoint) as channel:
            await worker.register(channel)
            async with worker.stream(channel) as stream:
                wanted = await place_on(first, worker, stream)
                await stream.say(worker.report(wanted, loading=loading()))
                await first.replica(ReplicaState.LOADING)
    async with Registry(etcd_endpoint, mesh_name, config).running() as second:
        async with grpc.aio.insecure_channel(second.endpoint) as channel, worker.stream(channel) as stream:
            await stream.say(worker.report(wanted, serving=serving()))
            await second.replica(ReplicaState.READY)


async def test_a_closing_registry_lets_its_workers_go_at_once(
    etcd_endpoint: str, mesh_name: str, config: RegistryConfig
) -> None:
    worker = FakeWorker()
    async with contextlib.AsyncExitStack() as stack:
        async with Registry(etcd_endpoint, mesh_name, config).running() as registry:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(registry.endpoint))
            await worker.register(channel)
            stream = await stack.enter_async_context(worker.stream(channel))
            await worker.told(lambda w: w.wanted)
        # The stream ended of its own accord, not because the server's time for running calls was over.
        assert await stream.ended() is None


async def test_a_node_that_nobody_approved_waits(etcd_endpoint: str, mesh_name: str) -> None:
    """F3."""
    async with Registry(etcd_endpoint, mesh_name, RegistryConfig(auto_approve=False)).running() as registry:
        async with grpc.aio.insecure_channel(registry.endpoint) as channel:
            with pytest.raises(NodePending):
                await FakeWorker().register(channel)
            assert not registry.mirror.snapshot.nodes


async def test_a_deregistered_node_is_gone_with_its_records(registry: Registry, channel: grpc.aio.Channel) -> None:
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        await place_on(registry, worker, stream)
        await rpc.RegistryServiceStub(channel).Deregister(
            pb.DeregisterRequest(node="n1", incarnation=worker.incarnation), timeout=PATIENCE
        )
        assert NodeName("n1") not in registry.mirror.snapshot.nodes
        assert isinstance(await stream.ended(), IncarnationLost)
    await registry.replica(None)


@pytest.mark.parametrize(
    "report",
    [
        pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m", node="n2"), serving=serving()),
        pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m", node="n1")),
        pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m", node="n1"), serving=pb.ReplicaServing(endpoint="dns:x")),
        pb.ReplicaReport(ref=types_pb2.ReplicaRef(model="m/..", node="n1"), serving=serving()),
        pb.ReplicaReport(
            ref=types_pb2.ReplicaRef(model="m", node="n1"),
            loading=pb.ReplicaLoading(state=types_pb2.REPLICA_STATE_UNLOADING),
        ),
    ],
)
async def test_a_report_that_a_worker_may_not_make_ends_its_stream(
    registry: Registry, channel: grpc.aio.Channel, report: pb.ReplicaReport
) -> None:
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        await worker.told(lambda w: w.wanted)
        await stream.say(report)
        assert isinstance(await stream.ended(), InvalidRequest)


async def test_a_worker_that_reads_nothing_delays_no_other(registry: Registry, channel: grpc.aio.Channel) -> None:
    deaf, worker = FakeWorker("n2"), FakeWorker("n1")
    await deaf.register(channel)
    await worker.register(channel)
    call = rpc.RegistryServiceStub(channel).Heartbeat()
    for sequence in range(200):
        await call.write(pb.HeartbeatRequest(node="n2", incarnation=deaf.incarnation, sequence=sequence + 1))
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        await stream.say(worker.report(wanted, serving=serving()))
        await registry.replica(ReplicaState.READY)
    call.cancel()


async def test_a_first_message_of_a_node_that_never_registered_is_refused(etcd_endpoint: str, mesh_name: str) -> None:
    async with Registry(etcd_endpoint, mesh_name, RegistryConfig()).running() as registry:
        async with grpc.aio.insecure_channel(registry.endpoint) as channel:
            worker = FakeWorker()
            worker.incarnation = 12345
            async with worker.stream(channel) as stream:
                assert isinstance(await stream.ended(), IncarnationLost)


def test_device_ids_are_what_the_tests_think() -> None:
    assert DeviceId("cpu") == CPU


async def test_while_etcd_is_away_the_stream_ends_with_a_word_and_afterwards_the_registration_holds(
    etcd_binary: EtcdBinary, mesh_name: str
) -> None:
    """F4: nothing is lost, and the worker knows that it should ask elsewhere."""
    config = RegistryConfig(leases=LeaseTimes(presence_seconds=60, record_seconds=600), write_seen_seconds=5.0)
    worker = FakeWorker()
    async with EtcdServer(etcd_binary) as etcd, Registry(etcd.endpoint, mesh_name, config).running() as registry:
        async with grpc.aio.insecure_channel(registry.endpoint) as channel:
            await worker.register(channel)
            async with worker.stream(channel) as stream:
                wanted = await place_on(registry, worker, stream)
                await stream.say(worker.report(wanted, serving=serving()))
                await registry.replica(ReplicaState.READY)
                etcd.process.send_signal(signal.SIGSTOP)
                try:
                    assert isinstance(await stream.ended(), StoreUnavailable)
                    listed = await rpc.RegistryServiceStub(channel).ListNodes(pb.ListNodesRequest(), timeout=PATIENCE)
                    assert [n.name for n in listed.nodes] == ["n1"]
                finally:
                    etcd.process.send_signal(signal.SIGCONT)
            worker.acknowledged = 0
            async with worker.stream(channel) as stream:
                await worker.told(lambda w: w.acknowledged)
                await registry.replica(ReplicaState.READY)
