"""A router forwards calls to replicas: picks, locks, counts, retries. Real etcd, real gRPC, no engine."""

import asyncio
from collections import Counter

import grpc
import pytest

from localmesh.core.errors import (
    InvalidRequest,
    MethodUnknown,
    ModelNotFound,
    ModelNotNamed,
    Overloaded,
)
from localmesh.core.ids import ModelName
from localmesh.core.records import Policy, ReplicaState
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.metadata import MODEL
from localmesh.v1 import inference_service_pb2, inference_service_pb2_grpc
from tests.integration.router_kit import declare, eventually, ready, router_mesh, unary

TINY = ((MODEL, "tiny"),)


async def test_calls_that_do_not_overlap_go_round(etcd_endpoint: str, mesh_name: str) -> None:
    """F11, F13, F14; who served is told by the replica's trailers, passed on (F25)."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=3))
        for name, memory in (("a", 24000), ("b", 16000), ("c", 8000)):
            await mesh.node(name, memory_mib=memory)
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 3)
        served = Counter([await mesh.call(router, "tiny") for _ in range(9)])
        assert len(served) == 3
        assert min(served.values()) >= 2


async def test_a_burst_spreads_over_the_replicas_and_is_counted_until_it_ends(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F12, F17."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=4))
        nodes = [await mesh.node(name, limit=16) for name in "abcd"]
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 4)
        for node in nodes:
            node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(router, "tiny", timeout=30.0)) for _ in range(32)]
            await eventually(mesh.mirror, lambda s: sum(s.in_flight(r.id) for r in ready(s, "tiny")) == 32)
            assert router.in_flight == 32
            for node in nodes:
                node.open_gate.set()
        assert sorted(Counter(call.result() for call in calls).values()) == [8, 8, 8, 8]
        assert router.in_flight == 0
        assert {fake.refused for node in nodes for fake in node.replicas.values()} == {0}


async def test_all_four_kinds_of_call_are_forwarded_and_counted_until_they_end(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F17, F55."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        channel = mesh.channel(router)

        stream = channel.unary_stream("/any.Service/ServerStream")(b"s", metadata=TINY)
        node.open_gate.clear()
        assert await stream.read() == b"s"
        assert router.in_flight == 1
        node.open_gate.set()
        assert await stream.read() == b"s"
        assert await stream.read() is grpc.aio.EOF

        up = channel.stream_unary("/any.Service/ClientStream")(iter([b"a", b"b", b"c"]), metadata=TINY)
        assert await up == b"abc"

        both = channel.stream_stream("/any.Service/Both")(metadata=TINY)
        for message in (b"1", b"2"):
            await both.write(message)
            assert await both.read() == message
        assert router.in_flight == 1
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF
        assert await mesh.call(router, "tiny") == "tiny/a/0"
        async with asyncio.timeout(5):
            while router.in_flight:
                await asyncio.sleep(0.01)


async def test_a_call_that_is_cancelled_is_counted_out_everywhere(etcd_endpoint: str, mesh_name: str) -> None:
    """F17."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        node.open_gate.clear()
        call = unary(mesh.channel(router))(b"x", metadata=TINY)
        replica = next(iter(node.replicas.values()))
        async with asyncio.timeout(5):
            while not replica.running:
                await asyncio.sleep(0.01)
        call.cancel()
        async with asyncio.timeout(5):
            while replica.running or router.in_flight:
                await asyncio.sleep(0.01)


async def test_a_presence_stands_in_the_store_while_requests_run_and_vanishes_after_a_linger(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F12: and it keeps the replica from being unloaded."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a")
        router = await mesh.router()
        (replica,) = ready(await eventually(mesh.mirror, lambda s: ready(s, "tiny")), "tiny")
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(mesh.call(router, "tiny"))
            await eventually(mesh.mirror, lambda s: s.in_flight(replica.id) == 1)
            assert await mesh.store.unload_replica(replica) is False
            node.open_gate.set()
        await eventually(mesh.mirror, lambda s: not s.inflight.get(replica.id))
        assert await mesh.inflight_keys("tiny") == 0
        assert await mesh.store.unload_replica(replica) is True


async def test_a_replica_that_drains_gets_no_new_request_and_ends_when_it_is_idle(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F12."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        for name in ("a", "b"):
            await mesh.node(name)
        router = await mesh.router()
        found = ready(await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2), "tiny")
        leaving = await mesh.store.drain_replica(found[0])
        served = {await mesh.call(router, "tiny") for _ in range(4)}
        assert str(leaving.id) not in served
        await eventually(
            mesh.mirror,
            lambda s: all(r.create_revision != leaving.create_revision for r in s.replicas_of(ModelName("tiny"))),
        )


async def test_a_replica_that_is_full_by_its_own_count_sends_the_request_elsewhere(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F19: callers that no router sees have filled it."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        nodes = [await mesh.node("a"), await mesh.node("b")]
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        full, free = (fake for node in nodes for fake in node.replicas.values())
        full.limit = 0
        served = {await mesh.call(router, "tiny") for _ in range(4)}
        assert served == {str(free.id)}
        assert full.refused > 0
        full.limit = 4
        assert len({await mesh.call(router, "tiny") for _ in range(4)}) == 2


async def test_who_finds_every_replica_full_waits_for_a_slot(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a", limit=2)
        router = await mesh.router(hold_seconds=20.0)
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        node.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(router, "tiny", timeout=30.0)) for _ in range(6)]
            async with asyncio.timeout(10):
                while router.waiting(model) < 4:
                    await asyncio.sleep(0.01)
            node.open_gate.set()
        assert {call.result() for call in calls} == {"tiny/a/0"}
        (replica,) = node.replicas.values()
        assert replica.most == 2
        assert replica.refused == 0


async def test_who_has_waited_long_enough_is_told_when_to_come_back(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a", limit=1)
        router = await mesh.router(hold_seconds=0.3)
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        node.open_gate.clear()
        running = unary(mesh.channel(router))(b"x", metadata=TINY)
        await eventually(mesh.mirror, lambda s: s.in_flight(ready(s, "tiny")[0].id) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.call(router, "tiny")
        error = from_rpc_error(caught.value)
        assert isinstance(error, Overloaded)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_seconds
        node.open_gate.set()
        assert await running == b"x"


async def test_a_replica_that_is_killed_under_traffic_costs_no_request_that_was_not_answered(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F5, F19: what waited for its first byte is answered by the other replica."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        victim, survivor = await mesh.node("a"), await mesh.node("b")
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        victim.open_gate.clear()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(router, "tiny", timeout=20.0)) for _ in range(4)]
            (dying,) = victim.replicas.values()
            async with asyncio.timeout(10):
                while dying.running < 2:
                    await asyncio.sleep(0.01)
            await mesh.kill_node(victim)
        (alive,) = survivor.replicas.values()
        assert {call.result() for call in calls} == {str(alive.id)}
        assert [await mesh.call(router, "tiny") for _ in range(3)] == [str(alive.id)] * 3


@pytest.mark.parametrize(
    ("method", "metadata", "kind", "code"),
    [
        ("/any.Service/Unary", ((MODEL, "tinny"),), ModelNotFound, grpc.StatusCode.NOT_FOUND),
        ("/any.Service/Unary", (), ModelNotNamed, grpc.StatusCode.INVALID_ARGUMENT),
        ("/any.Service/Unary", ((MODEL, "a/b"),), InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
        ("/localmesh.v1.RouterService/Nope", (), MethodUnknown, grpc.StatusCode.UNIMPLEMENTED),
    ],
)
async def test_a_call_that_cannot_be_routed_is_told_why(
    etcd_endpoint: str,
    mesh_name: str,
    method: str,
    metadata: tuple[tuple[str, str], ...],
    kind: type[Exception],
    code: grpc.StatusCode,
) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        router = await mesh.router()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(mesh.channel(router), method)(b"x", metadata=metadata, timeout=10)
        assert isinstance(from_rpc_error(caught.value), kind)
        assert caught.value.code() is code


async def test_a_typed_request_names_its_model_itself(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        await mesh.node("a")
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        stub = inference_service_pb2_grpc.InferenceServiceStub(mesh.channel(router))
        request = inference_service_pb2.TokenizeRequest(model="tiny")
        await stub.Tokenize(request, timeout=10)  # the double echoes; the bytes are a valid, if odd, response
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(request, metadata=((MODEL, "other"),), timeout=10)
        assert isinstance(from_rpc_error(caught.value), InvalidRequest)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(inference_service_pb2.TokenizeRequest(text="x"), timeout=10)
        assert isinstance(from_rpc_error(caught.value), ModelNotNamed)


async def test_a_replica_that_refuses_because_it_drains_is_not_asked_again(etcd_endpoint: str, mesh_name: str) -> None:
    """F19: the record does not show it yet; nobody notices."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        nodes = [await mesh.node("a"), await mesh.node("b")]
        router = await mesh.router()
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)
        replicas = [fake for node in nodes for fake in node.replicas.values()]
        replicas[0].draining = True
        served = {await mesh.call(router, "tiny") for _ in range(6)}
        assert served == {str(replicas[1].id)}
        assert replicas[0].refused == 1
        assert mesh.mirror.snapshot.replica(replicas[0].id).state is ReplicaState.READY
