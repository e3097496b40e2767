"""When the byte proxy asks another target, and when it must not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from localmesh.core.errors import (
    ReplicaFull,
    ReplicaLost,
    ReplicaStale,
)
from localmesh.rpc.errors import from_rpc_error
from tests.integration.proxy_kit import (
    WAIT,
    Service,
    World,
    echo_service,
    failed,
    hanging,
    proxied,
    refusing,
    stream_of,
)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with proxied() as made:
        yield made


async def test_a_refused_call_is_sent_elsewhere_and_the_caller_sees_nothing(world: World) -> None:
    await world.serve(refusing(ReplicaFull("at its limit", replica="m/n1/0", limit=1)))
    await world.serve(refusing(ReplicaStale("another revision", replica="m/n2/0")))
    await world.serve(echo_service())
    assert await world.caller.unary_unary("/t.T/Echo")(b"x", timeout=WAIT) == b"x"
    assert [call.attempt for call in world.calls] == [3, 3, 3]
    assert [type(f.error) for f in world.failures] == [ReplicaFull, ReplicaStale]
    assert all(f.refused and not f.lost and not f.answered and f.replayable for f in world.failures)
    answers = world.caller.unary_stream("/t.T/Repeat")(b"y", timeout=WAIT)
    assert [m async for m in answers] == [b"y"] * 5


async def test_a_refused_stream_is_replayed_from_its_first_message(world: World) -> None:
    await world.serve(refusing(ReplicaFull("at its limit", replica="m/n1/0")))
    await world.serve(echo_service())
    call = world.caller.stream_stream("/t.T/Chat")(timeout=WAIT)
    await call.write(b"1")
    await call.write(b"2")
    assert await call.read() == b"re:1"
    assert await call.read() == b"re:2"
    await call.write(b"3")
    await call.done_writing()
    assert await call.read() == b"re:3"
    assert await call.read() is grpc.aio.EOF
    assert len(world.calls) == 2


async def test_when_every_target_refuses_the_last_refusal_passes_intact(world: World) -> None:
    await world.serve(refusing(ReplicaFull("at its limit", replica="m/n1/0", limit=3)))
    for method in ("/t.T/Echo", "/t.T/Repeat", "/t.T/Any"):
        error = from_rpc_error(await failed(world.caller.unary_unary(method)(b"x", timeout=WAIT)))
        assert isinstance(error, ReplicaFull)
        assert error.metadata == {"replica": "m/n1/0", "limit": "3"}
    assert len(world.calls) == 12


async def test_a_connection_that_is_refused_sends_the_call_elsewhere(world: World, unused_port: int) -> None:
    world.targets.append(world.pool.get(f"127.0.0.1:{unused_port}"))
    await world.serve(echo_service())
    for method, start in (("/t.T/Echo", "unary_unary"), ("/t.T/Repeat", "unary_stream")):
        call = getattr(world.caller, start)(method)(b"x", timeout=WAIT)
        assert (await call if start == "unary_unary" else await call.read()) == b"x"
    assert await world.caller.stream_unary("/t.T/Join")(stream_of(b"a", b"b"), timeout=WAIT) == b"a+b"
    assert [f.lost for f in world.failures] == [True] * 3


async def test_a_connection_refused_everywhere_is_a_replica_lost(world: World, unused_port: int) -> None:
    world.targets.append(world.pool.get(f"127.0.0.1:{unused_port}"))
    for method in ("/t.T/Echo", "/t.T/Repeat", "/t.T/Any"):
        error = from_rpc_error(await failed(world.caller.unary_unary(method)(b"x", timeout=WAIT)))
        assert isinstance(error, ReplicaLost)
        assert error.metadata["replica"] == "m/n4/0"


async def test_a_stream_beyond_the_buffer_is_not_replayed(world: World) -> None:
    service = Service()

    @service.on("/t.T/Chat", streams=(True, True))
    async def read_much_then_refuse(requests: Any, context: Any) -> None:
        for _ in range(4):
            await context.read()
        raise ReplicaFull("at its limit after all", replica="m/n1/0")

    await world.serve(service)
    await world.serve(echo_service())
    call = world.caller.stream_stream("/t.T/Chat")(stream_of(*[bytes(40_000)] * 4), timeout=WAIT)
    error = from_rpc_error(await failed(call.read()))
    assert isinstance(error, ReplicaFull)
    assert [f.replayable for f in world.failures] == [False]
    assert len(world.calls) == 1


async def test_nothing_is_sent_elsewhere_after_the_first_message_of_the_answer(world: World) -> None:
    service = Service()

    @service.on("/t.T/Repeat", streams=(False, True))
    async def one_then_refuse(request: bytes, context: Any) -> None:
        await context.write(b"1")
        raise ReplicaFull("too late", replica="m/n1/0")

    await world.serve(service)
    await world.serve(echo_service())
    call = world.caller.unary_stream("/t.T/Repeat")(b"x", timeout=WAIT)
    assert await call.read() == b"1"
    error = from_rpc_error(await failed(call.read()))
    assert isinstance(error, ReplicaFull)
    assert [f.answered for f in world.failures] == [True]
    assert len(world.calls) == 1


async def test_a_connection_that_breaks_after_the_first_message_is_a_replica_lost(world: World) -> None:
    cut: list[asyncio.StreamWriter] = []
    service = Service()

    @service.on("/t.T/Repeat", streams=(False, True))
    async def one_then_hang(request: bytes, context: Any) -> None:
        await context.write(b"1")
        await asyncio.Event().wait()

    server = await world.serve(service, drain_seconds=0.0)
    async with cable(server.port, cut) as port:
        world.targets[:] = [world.pool.get(f"127.0.0.1:{port}")]
        call = world.caller.unary_stream("/t.T/Repeat")(b"x", timeout=WAIT)
        assert await call.read() == b"1"
        for writer in cut:
            writer.transport.abort()
        error = from_rpc_error(await failed(call.read()))
    assert isinstance(error, ReplicaLost)
    assert error.metadata == {"replica": "m/n1/0"}
    assert [(f.lost, f.answered) for f in world.failures] == [(True, True)]


@pytest.mark.parametrize("method", ["/t.T/Echo", "/t.T/Repeat", "/t.T/Any"])
async def test_a_call_that_outlasts_the_patience_of_a_stopping_target_is_sent_elsewhere(
    world: World, method: str
) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()
    stopping = await world.serve(hanging(method, begun, cancelled))
    service = echo_service()
    service.methods["/t.T/Any"] = service.methods["/t.T/Echo"]
    await world.serve(service)
    async with asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(first_answer(world, method))
        async with asyncio.timeout(WAIT):
            await begun.wait()
        await stopping.stop(0.05)
    assert answer.result() == b"x"
    assert [(type(f.error), f.lost, f.answered) for f in world.failures] == [(ReplicaLost, True, False)]


async def first_answer(world: World, method: str) -> bytes:
    if method == "/t.T/Echo":
        answer: bytes = await world.caller.unary_unary(method)(b"x", timeout=WAIT)
        return answer
    messages = [message async for message in world.caller.unary_stream(method)(b"x", timeout=WAIT)]
    return messages[0]


@pytest.mark.parametrize("grace", [0.0, 0.05])
async def test_a_stream_that_a_stopping_target_cuts_off_is_a_replica_lost(world: World, grace: float) -> None:
    service = Service()

    @service.on("/t.T/Repeat", streams=(False, True))
    async def one_then_hang(request: bytes, context: Any) -> None:
        await context.write(b"1")
        await asyncio.Event().wait()

    stopping = await world.serve(service)
    call = world.caller.unary_stream("/t.T/Repeat")(b"x", timeout=WAIT)
    assert await call.read() == b"1"
    await stopping.stop(grace)
    error = from_rpc_error(await failed(call.read()))
    assert isinstance(error, ReplicaLost)
    assert [(f.lost, f.answered) for f in world.failures] == [(True, True)]


async def test_a_target_that_says_cancelled_is_not_taken_for_lost(world: World) -> None:
    service = Service()

    @service.on("/t.T/Echo", streams=(False, False))
    async def cancelled(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.CANCELLED, "the operator cancelled this job")
        return b""

    await world.serve(service)
    error = await failed(world.caller.unary_unary("/t.T/Echo")(b"x", timeout=WAIT))
    assert (error.code(), error.details()) == (grpc.StatusCode.CANCELLED, "the operator cancelled this job")
    assert len(world.calls) == 1


@contextlib.asynccontextmanager
async def cable(port: int, writers: list[asyncio.StreamWriter]) -> AsyncIterator[int]:
    """A TCP connection that a test can cut."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.extend([writer, there_writer])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pump(reader, there_writer))
            tasks.create_task(pump(there_reader, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@pytest.fixture
def unused_port() -> Any:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening: connections to it are refused
        yield held.getsockname()[1]
