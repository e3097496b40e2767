"""A model that nobody has loaded yet: who asks first is held, and asks for all. Real etcd, real gRPC, no engine."""

import asyncio

import grpc
import pytest

from localmesh.core.errors import LoadFailed, ModelLoading, ModelNotFound, NoCapacity, NoNodes, SourceMissing
from localmesh.core.records import Policy, ProgressRecord, ReplicaState
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.metadata import MODEL
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import router_service_pb2_grpc, types_pb2
from tests.integration.router_kit import MIB, declare, eventually, ready, router_mesh, unary


async def test_many_first_requests_make_one_load_and_all_are_answered(etcd_endpoint: str, mesh_name: str) -> None:
    """F24, F38."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        nodes = [await mesh.node(name, limit=16) for name in ("a", "b")]
        for node in nodes:
            node.may_load.clear()
        router = await mesh.router()
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(router, "tiny", timeout=30.0)) for _ in range(12)]
            await eventually(mesh.mirror, lambda s: any(r.state.coming for r in s.replicas_of(model)))
            async with asyncio.timeout(10):
                while router.waiting(model) < 12:
                    await asyncio.sleep(0.01)
            for node in nodes:
                node.may_load.set()
        assert len({call.result() for call in calls}) == 1
        assert sum(node.loads["tiny"] for node in nodes) == 1


async def test_two_routers_that_are_asked_at_once_make_one_load(etcd_endpoint: str, mesh_name: str) -> None:
    """F38."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        nodes = [await mesh.node(name, limit=16) for name in ("a", "b")]
        routers = [await mesh.router(name) for name in ("r1", "r2")]
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(mesh.call(r, "tiny", timeout=30.0)) for r in routers for _ in range(4)]
        assert len({call.result() for call in calls}) == 1
        assert sum(node.loads["tiny"] for node in nodes) == 1


async def test_the_load_goes_on_when_its_caller_leaves(etcd_endpoint: str, mesh_name: str) -> None:
    """F24."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        node = await mesh.node("a")
        node.may_load.clear()
        router = await mesh.router()
        call = unary(mesh.channel(router))(b"x", metadata=((MODEL, "tiny"),))
        await eventually(mesh.mirror, lambda s: any(r.state.coming for r in s.replicas_of(model)))
        call.cancel()
        async with asyncio.timeout(10):
            while router.waiting(model):
                await asyncio.sleep(0.01)
        node.may_load.set()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))


async def test_a_caller_is_held_so_long_and_then_told_the_progress(etcd_endpoint: str, mesh_name: str) -> None:
    """F24."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        node = await mesh.node("a")
        node.may_load.clear()
        router = await mesh.router(hold_seconds=1.0)
        call = unary(mesh.channel(router))(b"x", metadata=((MODEL, "tiny"),))
        snapshot = await eventually(
            mesh.mirror, lambda s: any(r.state is ReplicaState.LOADING for r in s.replicas_of(model))
        )
        (replica,) = snapshot.replicas_of(model)
        progress = ProgressRecord(phase="loading", done_bytes=10, total_bytes=40, eta_seconds=7.0)
        await mesh.store.put_progress(replica, progress, record_lease=snapshot.nodes[node.name].record_lease)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = from_rpc_error(caught.value)
        assert isinstance(error, ModelLoading)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.retry_after_seconds == 7.0
        assert dict(error.metadata) == {
            "model": "tiny",
            "state": "LOADING",
            "phase": "loading",
            "done_bytes": "10",
            "total_bytes": "40",
        }
        node.may_load.set()
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        assert await mesh.call(router, "tiny") == str(replica.id)


async def test_a_caller_with_a_short_deadline_is_told_before_it_passes(etcd_endpoint: str, mesh_name: str) -> None:
    """F24."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        node = await mesh.node("a")
        node.may_load.clear()
        router = await mesh.router()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.call(router, "tiny", timeout=6.0)
        assert isinstance(from_rpc_error(caught.value), ModelLoading)
        node.may_load.set()


async def test_a_load_that_fails_is_tried_on_another_node(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        bad, good = await mesh.node("a", memory_mib=2000), await mesh.node("b", memory_mib=1000)
        bad.fails["tiny"] = "bad magic"
        router = await mesh.router()
        assert await mesh.call(router, "tiny", timeout=30.0) == "tiny/b/0"
        assert (bad.loads["tiny"], good.loads["tiny"]) == (1, 1)


async def test_a_load_that_fails_everywhere_is_reported_in_the_words_of_the_engine(
    etcd_endpoint: str, mesh_name: str
) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        node = await mesh.node("a")
        node.fails["tiny"] = "tensor 'x' has wrong shape"
        router = await mesh.router()
        for _ in range(2):  # the second one is answered from memory, without another load
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await mesh.call(router, "tiny", timeout=30.0)
            error = from_rpc_error(caught.value)
            assert isinstance(error, LoadFailed)
            assert "wrong shape" in error.message
            assert error.metadata["node"] == "a"
            assert error.retry_after_seconds
        assert node.loads["tiny"] == 1
        assert mesh.mirror.snapshot.devices[node.name]["cpu"].claimed_bytes == 0


async def test_a_model_that_fits_nowhere_is_refused_at_once_with_the_reason(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        router = await mesh.router()
        big = await declare(mesh.store, "big", memory_bytes=5000 * MIB)
        gone = await declare(mesh.store, "gone")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.call(router, big)
        assert isinstance(from_rpc_error(caught.value), NoNodes)
        node = await mesh.node("a", lacks=("gone",))
        await eventually(mesh.mirror, lambda s: big in s.sources.get(node.name, {}))
        with pytest.raises(grpc.aio.AioRpcError, match="lacks memory") as caught:
            await mesh.call(router, big)
        assert isinstance(from_rpc_error(caught.value), NoCapacity)
        with pytest.raises(grpc.aio.AioRpcError, match=r"has no /models/gone.gguf") as caught:
            await mesh.call(router, gone)
        assert isinstance(from_rpc_error(caught.value), SourceMissing)


async def test_a_node_that_dies_while_it_loads_is_replaced_by_another(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        dying = await mesh.node("a", memory_mib=2000, presence_seconds=2)
        await mesh.node("b", memory_mib=1000)
        dying.may_load.clear()
        router = await mesh.router()
        async with asyncio.TaskGroup() as group:
            call = group.create_task(mesh.call(router, "tiny", timeout=60.0))
            await eventually(mesh.mirror, lambda s: any(r.state.coming for r in s.replicas_of(model)))
            await mesh.kill_node(dying)
        assert call.result() == "tiny/b/0"


async def test_a_node_that_is_silent_for_a_moment_is_waited_for(etcd_endpoint: str, mesh_name: str) -> None:
    """F4: after etcd or the registry was away, what ran is taken over, and no second copy was loaded meanwhile."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        nodes = {f"tiny/{name}/0": await mesh.node(name) for name in ("a", "b")}
        router = await mesh.router(return_seconds=30.0)
        served = await mesh.call(router, "tiny")
        await nodes[served].fall_silent()
        await eventually(mesh.mirror, lambda s: nodes[served].name not in s.nodes)
        async with asyncio.TaskGroup() as group:
            call = group.create_task(mesh.call(router, "tiny", timeout=60.0))
            async with asyncio.timeout(10):
                while not router.waiting(model):
                    await asyncio.sleep(0.01)
            await nodes[served].register()
        assert call.result() == served
        assert [str(r.id) for r in mesh.mirror.snapshot.replicas_of(model)] == [served]


async def test_a_node_that_stays_silent_is_not_waited_for_long(etcd_endpoint: str, mesh_name: str) -> None:
    """F5: a request is served by another node, long before the reconciler takes the silent one for dead."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        nodes = {f"tiny/{name}/0": await mesh.node(name) for name in ("a", "b")}
        router = await mesh.router(return_seconds=0.2)
        served = await mesh.call(router, "tiny")
        await nodes[served].fall_silent()
        await eventually(mesh.mirror, lambda s: nodes[served].name not in s.nodes)
        assert await mesh.call(router, "tiny", timeout=60.0) in nodes.keys() - {served}


async def test_ensure_loaded_tells_how_the_load_goes_and_ends_when_it_serves(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F24."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        node = await mesh.node("a")
        node.may_load.clear()
        router = await mesh.router()
        stub = router_service_pb2_grpc.RouterServiceStub(mesh.channel(router))
        stream = stub.EnsureLoaded(pb.EnsureLoadedRequest(model=model), timeout=30)
        first = await stream.read()
        assert not first.ready
        while (message := await stream.read()).replica.state != types_pb2.REPLICA_STATE_LOADING:
            assert not message.ready
        node.may_load.set()
        while not message.ready:
            message = await stream.read()
        assert message.replica.ref.node == "a"
        assert message.replica.limit == 4
        assert await stream.read() is grpc.aio.EOF


async def test_ensure_loaded_fails_as_the_load_does(etcd_endpoint: str, mesh_name: str) -> None:
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny")
        node = await mesh.node("a")
        node.fails["tiny"] = "bad magic"
        router = await mesh.router()
        stub = router_service_pb2_grpc.RouterServiceStub(mesh.channel(router))
        for name, kind in ((model, LoadFailed), ("nope", ModelNotFound)):
            stream = stub.EnsureLoaded(pb.EnsureLoadedRequest(model=name), timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                assert not [message async for message in stream if message.ready]
            assert isinstance(from_rpc_error(caught.value), kind)


async def test_a_model_that_is_edited_at_once_is_loaded_anew_for_the_first_request(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F24: the old revision's memory comes free while the caller is held."""
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny", Policy(immediate=True), memory_bytes=700 * MIB)
        node = await mesh.node("a", memory_mib=1000)
        router = await mesh.router()
        await mesh.call(router, "tiny", timeout=30.0)
        await declare(mesh.store, "tiny", Policy(immediate=True), memory_bytes=700 * MIB, context_tokens=64)
        await mesh.call(router, "tiny", timeout=30.0)
        snapshot = mesh.mirror.snapshot
        (replica,) = node.replicas.values()
        assert replica.revision == snapshot.models[model].revision
        assert node.loads["tiny"] == 2
