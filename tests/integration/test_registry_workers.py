"""The registry towards workers: a fake worker speaks the real protocol to real registries over a real etcd."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from localmesh.core.errors import IncarnationLost, InvalidRequest, NodeNameTaken, NodePending, StoreUnavailable
from localmesh.core.ids import CPU, NodeName, ReplicaId
from localmesh.core.records import ReplicaRecord, ReplicaState
from localmesh.etcd import EtcdBinary, EtcdServer
from localmesh.registry.config import RegistryConfig
from localmesh.store import LeaseTimes
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc as rpc
from localmesh.v1 import types_pb2
from tests.integration.registry_kit import GIB, PATIENCE, FakeWorker, M, Registry, loading, place, place_on, serving


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


async def test_what_dies_again_and_again_is_kept_away_and_the_model_says_why(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F42: the circuit of a crash loop, with the reason in GetModel."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        for deaths in (1, 2, 3):
            await stream.say(worker.report(wanted, serving=serving()))
            await registry.replica(ReplicaState.READY)
            await stream.say(worker.report(wanted, exited=pb.ReplicaExited(reason="REPLICA_LOST", message="SIGSEGV")))
            await registry.replica(None)
            if deaths < 3:
                assert not registry.mirror.snapshot.failures
                placed = (await place(registry)).create_revision
                wanted = await worker.told(lambda w, p=placed: _placement(w, p))
        await registry.until(lambda s: s.failures.get(M, {}).get(NodeName("n1")))
    found = await rpc.RegistryServiceStub(channel).GetModel(pb.GetModelRequest(name=M))
    [failure] = found.failures
    assert (failure.reason, failure.attempts) == ("REPLICA_LOST", 3)
    assert failure.message == "it died 3 times soon after it was ready, the last time so: SIGSEGV"


def _placement(worker: FakeWorker, placement: int) -> pb.WantedReplica | None:
    latest = worker.wanted[-1].replicas if worker.wanted else []
    return next((r for r in latest if r.placement == placement), None)


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


@pytest.mark.parametrize("fails", [False, True])
async def test_a_name_that_is_given_anew_while_its_exit_is_written_loses_no_report(
    registry: Registry, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    written, go_on, exited = asyncio.Event(), asyncio.Event(), registry.store.exited

    async def slowly(replica: ReplicaRecord, **how: Any) -> None:
        await exited(replica, **how)
        written.set()
        await go_on.wait()

    monkeypatch.setattr(registry.store, "exited", slowly)
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        first = await place_on(registry, worker, stream)
        await stream.say(worker.report(first, exited=pb.ReplicaExited()))
        await written.wait()
        await place(registry)
        second = await worker.told(
            lambda w: next((r for r in w.wanted[-1].replicas if r.placement != first.placement), None)
        )
        observed = {"exited": pb.ReplicaExited()} if fails else {"loading": loading()}
        sequence = await stream.say(worker.report(second, **observed))
        await worker.told(lambda w: w.acknowledged >= sequence)
        go_on.set()
        await registry.replica(None if fails else ReplicaState.LOADING)


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


async def test_engines_that_changed_are_taken_over_without_a_new_registration(
    registry: Registry, channel: grpc.aio.Channel
) -> None:
    """F48: a backend that was just installed can be placed on at once; all else of the node stays."""
    worker, name = FakeWorker(), NodeName("n1")
    registered = await worker.register(channel, labels={"zone": "a"})
    async with worker.stream(channel) as stream:
        engine = types_pb2.Engine(name="process:echo", available=True, device_kinds=["cpu"])
        await stream.say(facts=pb.NodeFacts(endpoint="127.0.0.1:9", engines=[engine]))
        node = await registry.until(
            lambda s: s.nodes[name] if [e.name for e in s.nodes[name].engines] == ["process:echo"] else None
        )
        assert (node.incarnation, node.labels) == (registered.incarnation, {"zone": "a"})
        assert node.endpoint != "127.0.0.1:9"
        await stream.say(facts=pb.NodeFacts())
        await registry.until(lambda s: not s.nodes[name].engines)
