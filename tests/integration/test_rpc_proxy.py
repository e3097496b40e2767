"""The byte proxy between a real caller and real targets on loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.errors import (
    InvalidRequest,
    ModelNotFound,
    NoCapacity,
    ReplicaFull,
    ReplicaLost,
    ReplicaStale,
)
from localmesh.rpc import relay
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.proxy import Failure, ProxyCall, ProxyHandler, Target, retry_elsewhere
from localmesh.rpc.server import GrpcServer, ServerConfig

KINDS = {
    "/t.T/Echo": (False, False),
    "/t.T/Repeat": (False, True),
}
WAIT = 10.0


@dataclass
class Service:
    """A target whose behaviour a test chooses, by method name. All of its methods take and give bytes."""

    methods: dict[str, tuple[tuple[bool, bool], Any]] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    remaining: list[float | None] = field(default_factory=list)

    def service(self, details: Any) -> Any:
        if details.method not in self.methods:
            return None
        (takes_stream, answers_stream), behaviour = self.methods[details.method]
        self.seen.append((details.method, dict(details.invocation_metadata)))
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[takes_stream, answers_stream]
        return make(behaviour)

    def on(self, method: str, *, streams: tuple[bool, bool]) -> Callable[[Any], Any]:
        def add(behaviour: Any) -> Any:
            self.methods[method] = (streams, behaviour)
            return behaviour

        return add


def echo_service() -> Service:
    service = Service()

    @service.on("/t.T/Echo", streams=(False, False))
    async def echo(request: bytes, context: Any) -> bytes:
        service.remaining.append(context.time_remaining())
        return request

    @service.on("/t.T/Repeat", streams=(False, True))
    async def repeat(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(5):
            yield request

    @service.on("/t.T/Join", streams=(True, False))
    async def join(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"+".join([request async for request in requests])

    @service.on("/t.T/Chat", streams=(True, True))
    async def chat(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield b"re:" + request

    return service


@dataclass
class World:
    """A proxy, the targets behind it in the order in which `route` offers them, and a caller's channel."""

    pool: ChannelPool
    servers: contextlib.AsyncExitStack
    targets: list[Any] = field(default_factory=list)
    calls: list[ProxyCall] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    open_targets: int = 0
    first_bytes: int = 0
    extra: tuple[tuple[str, str], ...] = ()
    endpoint: str = ""

    async def serve(self, service: Any, **config: Any) -> GrpcServer:
        server = GrpcServer(ServerConfig(**config), name="target", generic_handlers=[service])
        await self.servers.enter_async_context(server)
        self.targets.append(self.pool.get(server.endpoint))
        return server

    @contextlib.asynccontextmanager
    async def route(self, call: ProxyCall) -> AsyncIterator[Target]:
        self.calls.append(call)
        offered = self.targets[min(call.attempt, len(self.targets)) - 1]
        if isinstance(offered, Exception):
            raise offered
        self.open_targets += 1
        try:
            yield Target(
                channel=offered,
                extra_metadata=self.extra,
                name=f"m/n{call.attempt}/0",
                on_first_byte=self.count_first_byte,
                on_failure=self.on_failure,
            )
        finally:
            self.open_targets -= 1

    def count_first_byte(self) -> None:
        self.first_bytes += 1

    def on_failure(self, failure: Failure) -> bool:
        self.failures.append(failure)
        return retry_elsewhere(failure)

    @property
    def caller(self) -> Any:
        return self.pool.get(self.endpoint)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with ChannelPool() as pool, contextlib.AsyncExitStack() as servers:
        made = World(pool, servers)
        handler = ProxyHandler(made.route, clock=SystemClock(), kinds=KINDS, buffer_bytes=1 << 16)
        proxy = GrpcServer(ServerConfig(drain_seconds=1.0), name="proxy", generic_handlers=[handler])
        await servers.enter_async_context(proxy)
        made.endpoint = proxy.endpoint
        yield made
        await eventually(lambda: made.open_targets == 0)  # every target was let go


async def stream_of(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 - what is waited for is inside grpc
            await asyncio.sleep(0.005)


async def failed(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_each_of_the_four_kinds_of_call_passes_unchanged(world: World) -> None:
    await world.serve(echo_service())
    channel = world.caller
    assert await channel.unary_unary("/t.T/Echo")(b"\x00\xff hello", timeout=WAIT) == b"\x00\xff hello"
    assert [m async for m in channel.unary_stream("/t.T/Repeat")(b"x", timeout=WAIT)] == [b"x"] * 5
    assert await channel.stream_unary("/t.T/Join")(stream_of(b"a", b"b", b""), timeout=WAIT) == b"a+b+"
    answers = channel.stream_stream("/t.T/Chat")(stream_of(b"1", b"2"), timeout=WAIT)
    assert [m async for m in answers] == [b"re:1", b"re:2"]
    assert world.first_bytes == 4


async def test_methods_that_nobody_described_pass_too(world: World) -> None:
    service = echo_service()
    service.methods["/other.S/Echo"] = service.methods["/t.T/Echo"]
    service.methods["/other.S/Repeat"] = service.methods["/t.T/Repeat"]
    await world.serve(service)
    assert await world.caller.unary_unary("/other.S/Echo")(b"x", timeout=WAIT) == b"x"
    answers = world.caller.unary_stream("/other.S/Repeat")(b"y", timeout=WAIT)
    assert [m async for m in answers] == [b"y"] * 5


async def test_a_conversation_alternates_message_by_message(world: World) -> None:
    await world.serve(echo_service())
    call = world.caller.stream_stream("/t.T/Chat")(timeout=WAIT)
    for n in range(20):
        await call.write(b"%d" % n)
        assert await call.read() == b"re:%d" % n
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_an_empty_stream_of_requests_is_half_closed_at_the_target(world: World) -> None:
    await world.serve(echo_service())
    assert await world.caller.stream_unary("/t.T/Join")(stream_of(), timeout=WAIT) == b""


@pytest.mark.parametrize("method", ["/t.T/Echo", "/t.T/Repeat", "/t.T/Any"])
async def test_metadata_passes_both_ways_but_what_is_the_transports_or_ours(world: World, method: str) -> None:
    service = Service()

    async def answer(request: Any, context: Any) -> Any:
        await context.send_initial_metadata((("up-text", "a"), ("up-bin", b"\x01\x02"), ("up-text", "b")))
        context.set_trailing_metadata((("end-text", "z"), ("end-bin", b"\xfe"), ("localmesh-served-by-node", "n1")))
        if method == "/t.T/Echo":
            return b""
        await context.write(b"")
        return None

    service.methods[method] = (KINDS.get(method, (True, True)), answer)
    await world.serve(service)
    world.extra = (("localmesh-replica", "m/n/0"), ("replaced", "new"))
    sent = (
        ("text", "one"),
        ("raw-bin", b"\x00\x01\xff"),
        ("replaced", "old"),
        ("localmesh-model", "m"),
        ("localmesh-secret", "not for targets"),
    )
    start = world.caller.unary_stream if method == "/t.T/Repeat" else world.caller.unary_unary
    call = start(method)(b"", metadata=sent, timeout=WAIT)
    initial = await call.initial_metadata()
    assert (await call.read() if method == "/t.T/Repeat" else await call) == b""
    trailing = await call.trailing_metadata()
    _, got = service.seen[0]
    assert got["text"] == "one"
    assert got["raw-bin"] == b"\x00\x01\xff"
    assert got["replaced"] == "new"
    assert got["localmesh-model"] == "m"
    assert got["localmesh-replica"] == "m/n/0"
    assert "localmesh-secret" not in got
    assert initial.get_all("up-text") == ["a", "b"]
    assert initial["up-bin"] == b"\x01\x02"
    assert dict(trailing) == {"end-text": "z", "end-bin": b"\xfe", "localmesh-served-by-node": "n1"}


async def test_headers_arrive_before_the_first_message(world: World) -> None:
    service = Service()
    go_on = asyncio.Event()

    @service.on("/t.T/Any", streams=(True, True))
    async def early(requests: Any, context: Any) -> None:
        await context.send_initial_metadata((("accepted", "yes"),))
        await go_on.wait()
        await context.write(b"done")

    @service.on("/t.T/Repeat", streams=(False, True))
    async def early_and_empty(request: bytes, context: Any) -> None:
        await context.send_initial_metadata(())
        await go_on.wait()
        await context.write(b"done")

    await world.serve(service)
    for call in (
        world.caller.stream_stream("/t.T/Any")(timeout=WAIT),
        world.caller.unary_stream("/t.T/Repeat")(b"", timeout=WAIT),
    ):
        async with asyncio.timeout(WAIT / 2):
            headers = await call.initial_metadata()
        assert not call.done()
        go_on.set()
        assert await call.read() == b"done"
        go_on.clear()
    assert tuple(headers) == ()


async def test_the_deadline_passes_as_what_is_left_of_it(world: World) -> None:
    service = echo_service()
    await world.serve(service)
    await world.caller.unary_unary("/t.T/Echo")(b"", timeout=30)
    await world.caller.unary_unary("/t.T/Echo")(b"")
    first, second = service.remaining
    assert first is not None
    assert 15 < first < 33  # the header that carries it has two or three digits: rounded up at each hop
    assert second is None
    deadline = world.calls[0].deadline
    assert deadline is not None
    assert deadline - SystemClock().monotonic() < 33


@pytest.mark.parametrize("method", ["/t.T/Echo", "/t.T/Repeat", "/t.T/Any"])
async def test_a_deadline_that_passes_ends_the_call_at_the_target(world: World, method: str) -> None:
    cancelled = asyncio.Event()
    service = hanging(method, asyncio.Event(), cancelled)
    await world.serve(service)
    error = await failed(world.caller.unary_unary(method)(b"", timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(WAIT):
        await cancelled.wait()


def hanging(method: str, begun: asyncio.Event, cancelled: asyncio.Event) -> Service:
    service = Service()

    async def hang(request: Any, context: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    service.methods[method] = (KINDS.get(method, (True, True)), hang)
    return service


@pytest.mark.parametrize("method", ["/t.T/Echo", "/t.T/Repeat", "/t.T/Any"])
async def test_a_caller_that_leaves_cancels_the_call_at_the_target_at_once(world: World, method: str) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()
    await world.serve(hanging(method, begun, cancelled))
    start = world.caller.stream_stream if method == "/t.T/Any" else world.caller.unary_stream
    call = start(method)() if method == "/t.T/Any" else start(method)(b"")
    async with asyncio.timeout(WAIT):
        await begun.wait()
    assert world.open_targets == 1
    call.cancel()
    async with asyncio.timeout(WAIT):
        await cancelled.wait()
    await eventually(lambda: world.open_targets == 0)
    assert world.failures == []


async def test_a_caller_that_leaves_while_messages_flow_cancels_the_call_at_the_target(world: World) -> None:
    service, cancelled = Service(), asyncio.Event()

    @service.on("/t.T/Repeat", streams=(False, True))
    async def endless(request: bytes, context: Any) -> None:
        try:
            while True:
                await context.write(b"x" * 1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    await world.serve(service)
    call = world.caller.unary_stream("/t.T/Repeat")(b"")
    for _ in range(10):
        assert await call.read() == b"x" * 1000
    call.cancel()
    async with asyncio.timeout(WAIT):
        await cancelled.wait()
    await eventually(lambda: world.open_targets == 0)


async def test_a_slow_caller_slows_the_target_down(world: World) -> None:
    service, sent = Service(), [0]

    @service.on("/t.T/Repeat", streams=(False, True))
    async def flood(request: bytes, context: Any) -> None:
        for _ in range(400):
            await context.write(b"x" * 100_000)
            sent[0] += 1

    await world.serve(service)
    call = world.caller.unary_stream("/t.T/Repeat")(b"", timeout=60)
    assert await call.read() == b"x" * 100_000
    settled = -1
    while settled != sent[0]:
        settled = sent[0]
        await asyncio.sleep(0.2)  # long against the time that 40 MB take when nothing holds them up
    assert settled < 400
    count = 1
    while await call.read() is not grpc.aio.EOF:
        count += 1
    assert count == 400


async def test_status_text_details_and_trailers_pass_intact(world: World) -> None:
    service = Service()

    async def fail(request: Any, context: Any) -> None:
        trailers = (("grpc-status-details-bin", b"\x08\x05\x12\x03abc"), ("why", "because"), ("why-bin", b"\x00"))
        await context.abort(grpc.StatusCode.DATA_LOSS, "lost: 50 % of ünits\n", trailers)

    for method in ("/t.T/Echo", "/t.T/Repeat", "/t.T/Any"):
        service.methods[method] = (KINDS.get(method, (True, True)), fail)
    await world.serve(service)
    for method in service.methods:
        error = await failed(world.caller.unary_unary(method)(b"", timeout=WAIT))
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert error.details() == "lost: 50 % of ünits\n"
        trailers = error.trailing_metadata()
        assert trailers["grpc-status-details-bin"] == b"\x08\x05\x12\x03abc"
        assert trailers["why"] == "because"
        assert trailers["why-bin"] == b"\x00"
    assert len(world.calls) == 3, "an error that is no refusal is not tried again"


async def test_a_failure_after_messages_comes_after_these_messages(world: World) -> None:
    service = Service()

    @service.on("/t.T/Repeat", streams=(False, True))
    async def two_then_fail(request: bytes, context: Any) -> None:
        await context.write(b"1")
        await context.write(b"2")
        await context.abort(grpc.StatusCode.ABORTED, "enough")

    await world.serve(service)
    call = world.caller.unary_stream("/t.T/Repeat")(b"", timeout=WAIT)
    assert [await call.read(), await call.read()] == [b"1", b"2"]
    assert (await failed(call.read())).code() is grpc.StatusCode.ABORTED


async def test_a_target_may_end_a_call_well_while_the_caller_still_sends(world: World) -> None:
    service = Service()

    @service.on("/t.T/Any", streams=(True, True))
    async def enough(requests: Any, context: Any) -> None:
        await context.read()
        for n in range(50):
            await context.write(b"%d" % n)
        context.set_trailing_metadata((("end", "early"),))

    await world.serve(service)
    call = world.caller.stream_stream("/t.T/Any")(timeout=WAIT)

    async def send_on() -> None:
        await call.wait_for_connection()
        with contextlib.suppress(grpc.aio.InternalError):
            while True:
                await relay._send(call, b"x" * 10_000)  # call.write() would spoil the status, see there

    async with asyncio.TaskGroup() as tasks:
        sender = tasks.create_task(send_on())
        got = []
        while (message := await call.read()) is not grpc.aio.EOF:
            got.append(message)
        sender.cancel()
    assert got == [b"%d" % n for n in range(50)]
    assert await call.code() is grpc.StatusCode.OK
    assert dict(await call.trailing_metadata()) == {"end": "early"}


async def test_a_large_message_passes_and_one_beyond_the_limit_is_refused_with_the_setting_named(world: World) -> None:
    await world.serve(echo_service())
    big = bytes(10 << 20)
    assert await world.caller.unary_unary("/t.T/Echo")(big, timeout=60) == big
    answers = world.caller.stream_stream("/t.T/Chat")(stream_of(big, big), timeout=60)
    assert [len(m) async for m in answers] == [len(big) + 3] * 2
    error = from_rpc_error(await failed(world.caller.unary_unary("/t.T/Echo")(bytes(65 << 20), timeout=60)))
    assert isinstance(error, InvalidRequest)
    assert "max_message_bytes" in error.message


async def test_compressed_messages_are_accepted_from_both_sides(world: World) -> None:
    service = Service()

    @service.on("/t.T/Echo", streams=(False, False))
    async def echo(request: bytes, context: Any) -> bytes:
        context.set_compression(grpc.Compression.Deflate)
        await context.send_initial_metadata(())
        return request

    await world.serve(service)
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate, grpc.Compression.NoCompression):
        call = world.caller.unary_unary("/t.T/Echo")
        assert await call(b"a" * 100_000, compression=compression, timeout=WAIT) == b"a" * 100_000


def refusing(error: Exception) -> Service:
    service = Service()

    async def refuse(request: Any, context: Any) -> None:
        raise error

    for method in ("/t.T/Echo", "/t.T/Repeat", "/t.T/Any", "/t.T/Chat"):
        service.methods[method] = (KINDS.get(method, (True, True)), refuse)
    return service


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


async def test_what_route_raises_becomes_the_status(world: World) -> None:
    await world.serve(refusing(ReplicaFull("at its limit", replica="m/n1/0")))
    world.targets.append(NoCapacity("no room", retry_after_seconds=3.0, model="m"))
    for method in ("/t.T/Echo", "/t.T/Repeat", "/t.T/Any"):
        error = from_rpc_error(await failed(world.caller.unary_unary(method)(b"x", timeout=WAIT)))
        assert isinstance(error, NoCapacity)
        assert error.retry_after_seconds == 3.0
    world.targets[:] = [ModelNotFound("no model m", model="m")]
    error = from_rpc_error(await failed(world.caller.unary_unary("/t.T/Any")(b"x", timeout=WAIT)))
    assert isinstance(error, ModelNotFound)


async def test_a_bug_in_route_is_an_internal_error_without_its_text(world: World) -> None:
    world.targets.append(ZeroDivisionError("secret"))
    for method in ("/t.T/Echo", "/t.T/Any"):
        error = await failed(world.caller.unary_unary(method)(b"x", timeout=WAIT))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()


async def test_grpcs_own_services_are_not_forwarded(world: World) -> None:
    await world.serve(echo_service())
    error = await failed(world.caller.unary_unary("/grpc.other.v1.Thing/Do")(b"", timeout=WAIT))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert world.calls == []


async def test_the_request_is_shown_to_route_where_the_method_takes_one(world: World) -> None:
    await world.serve(echo_service())
    await world.caller.unary_unary("/t.T/Echo")(b"peek at me", timeout=WAIT)
    await world.caller.stream_unary("/t.T/Join")(stream_of(b"a"), timeout=WAIT)
    assert [call.first_message for call in world.calls] == [b"peek at me", None]


async def test_many_calls_at_once_do_not_mix(world: World) -> None:
    await world.serve(echo_service())

    async def one(n: int) -> None:
        text = b"%d" % n
        if n % 3 == 0:
            assert await world.caller.unary_unary("/t.T/Echo")(text, timeout=60) == text
        elif n % 3 == 1:
            answers = world.caller.unary_stream("/t.T/Repeat")(text, timeout=60)
            assert [m async for m in answers] == [text] * 5
        else:
            answers = world.caller.stream_stream("/t.T/Chat")(stream_of(text, text), timeout=60)
            assert [m async for m in answers] == [b"re:" + text] * 2

    async with asyncio.TaskGroup() as tasks:
        for n in range(90):
            tasks.create_task(one(n))


@pytest.fixture
def unused_port() -> Any:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening: connections to it are refused
        yield held.getsockname()[1]
