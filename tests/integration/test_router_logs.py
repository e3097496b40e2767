"""Lines of a model's replicas through the router: merged, chosen, followed over restarts, losses and late comers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from localmesh.core.errors import ModelNotFound, NodeNotFound, ReplicaNotFound
from localmesh.core.records import Policy
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.v1 import router_service_pb2 as pb
from localmesh.v1 import router_service_pb2_grpc, types_pb2, worker_service_pb2, worker_service_pb2_grpc
from tests.integration.router_kit import RouterMesh, declare, eventually, ready, router_mesh


class _Worker(worker_service_pb2_grpc.WorkerServiceServicer):  # type: ignore[misc]
    """Has lines of the model "tiny", each with the time that the test gives it, and streams them as a worker does."""

    def __init__(self, name: str, *lines: tuple[float, str], life: int = 1) -> None:
        self.name = name
        self.requests: list[Any] = []
        self._more = asyncio.Condition()
        self._lines = [(life, n, time, text) for n, (time, text) in enumerate(lines, 1)]
        self._broken = 0

    async def say(self, text: str, *, life: int = 1, time: float = 100.0) -> None:
        async with self._more:
            number = 1 + sum(1 for known, *_ in self._lines if known == life)
            self._lines.append((life, number, time, text))
            self._more.notify_all()

    async def break_streams(self) -> None:
        async with self._more:
            self._broken += 1
            self._more.notify_all()

    async def StreamModelLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        broken, told = self._broken, False
        position = {p.life: p.sequence for p in request.seen} if request.resume else {}
        if request.index or request.model != "tiny":
            position = dict.fromkeys(range(10), 1 << 60)
        while True:
            for life, number, time, text in list(self._lines):
                if number > position.get(life, 0):
                    position[life] = number
                    stamp = Timestamp()
                    stamp.FromMilliseconds(int(time * 1000))
                    ref = types_pb2.ReplicaRef(model="tiny", node=self.name, index=0)
                    yield worker_service_pb2.StreamModelLogsResponse(
                        ref=ref, line=text, time=stamp, life=life, sequence=number
                    )
            if not told:
                told = True
                positions = [worker_service_pb2.LogPosition(life=k, sequence=v) for k, v in position.items()]
                yield worker_service_pb2.StreamModelLogsResponse(caught_up=True, positions=positions)
            if not request.follow:
                return
            async with self._more:
                await self._more.wait_for(
                    lambda: self._broken > broken or any(n > position.get(k, 0) for k, n, *_ in self._lines)
                )
            if self._broken > broken:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable was pulled")


def _server(worker: _Worker, listen: str = "127.0.0.1:0") -> GrpcServer:
    server = GrpcServer(ServerConfig(listen=listen, drain_seconds=0.0), name="worker")
    server.add(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, worker, "localmesh.v1.WorkerService")
    return server


async def _stub(mesh: RouterMesh) -> Any:
    return router_service_pb2_grpc.RouterServiceStub(mesh.channel(await mesh.router()))


async def test_lines_of_all_nodes_are_merged_by_time_and_can_be_chosen(etcd_endpoint: str, mesh_name: str) -> None:
    """F50, F49: a name that fits nothing is told, not taken for silence."""
    worker_a = _Worker("a", (1.0, "first"), (3.0, "third"))
    worker_b = _Worker("b", (2.0, "second"), (4.0, "fourth"))
    async with _server(worker_a) as a, _server(worker_b) as b, router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=2))
        await declare(mesh.store, "cold")
        await mesh.node("a", endpoint=a.endpoint)
        await mesh.node("b", endpoint=b.endpoint)
        stub = await _stub(mesh)
        await eventually(mesh.mirror, lambda s: len(ready(s, "tiny")) == 2)

        async def lines(**request: Any) -> list[str]:
            call = stub.StreamLogs(pb.StreamLogsRequest(**request), timeout=20)
            return [response.line async for response in call]

        assert await lines(model="tiny") == ["first", "second", "third", "fourth"]
        assert await lines(model="tiny", node="b") == ["second", "fourth"]
        for request, kind in (
            ({"model": "nope"}, ModelNotFound),
            ({"model": "nope", "follow": True}, ModelNotFound),
            ({"model": "cold"}, ReplicaNotFound),
            ({"model": "tiny", "index": 7}, ReplicaNotFound),
            ({"model": "tiny", "node": "nowhere"}, NodeNotFound),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lines(**request)
            assert isinstance(from_rpc_error(caught.value), kind)


async def test_lines_of_a_node_that_does_not_answer_do_not_hide_those_of_others(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F50."""
    async with _server(_Worker("a", (1.0, "alone"))) as a, router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny")
        await mesh.node("a", endpoint=a.endpoint)
        await mesh.node("b", endpoint="127.0.0.1:1")
        stub = await _stub(mesh)
        call = stub.StreamLogs(pb.StreamLogsRequest(model="tiny"), timeout=20)
        assert [response.line async for response in call] == ["alone"]


async def test_a_follower_goes_on_over_new_processes_lost_connections_and_late_nodes(
    etcd_endpoint: str, mesh_name: str
) -> None:
    """F50."""
    worker_a, worker_b = _Worker("a", (1.0, "one"), (2.0, "two")), _Worker("b", (3.0, "of b"))
    async with _server(worker_a) as a, _server(worker_b) as b, router_mesh(etcd_endpoint, mesh_name) as mesh:
        model = await declare(mesh.store, "tiny", Policy(min_replicas=2))
        await mesh.node("a", endpoint=a.endpoint)
        stub = await _stub(mesh)
        call = stub.StreamLogs(pb.StreamLogsRequest(model="tiny", follow=True), timeout=60)

        async def read() -> tuple[str, int, int, str]:
            found = await call.read()
            return found.ref.node, found.life, found.sequence, found.line

        assert [await read() for _ in range(2)] == [("a", 1, 1, "one"), ("a", 1, 2, "two")]
        await worker_a.say("three")
        assert await read() == ("a", 1, 3, "three")
        await worker_a.say("anew", life=2)
        assert await read() == ("a", 2, 1, "anew")
        await worker_a.break_streams()
        await worker_a.say("said meanwhile", life=2)
        assert await read() == ("a", 2, 2, "said meanwhile")
        assert worker_a.requests[-1].resume
        await mesh.node("b", endpoint=b.endpoint)
        assert await read() == ("b", 1, 1, "of b")
        await mesh.store.delete_model(model)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(from_rpc_error(caught.value), ModelNotFound)


async def test_a_follower_comes_back_to_a_worker_that_was_started_anew(etcd_endpoint: str, mesh_name: str) -> None:
    """F50."""
    worker = _Worker("a", (1.0, "before"))
    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        first = _server(worker)
        await first.start()
        await mesh.node("a", endpoint=first.endpoint)
        stub = await _stub(mesh)
        call = stub.StreamLogs(pb.StreamLogsRequest(model="tiny", follow=True), timeout=60)
        assert (await call.read()).line == "before"
        await first.stop(0.0)
        await worker.say("after", life=2)
        async with _server(worker, listen=first.endpoint):
            assert (await call.read()).line == "after"
        call.cancel()
