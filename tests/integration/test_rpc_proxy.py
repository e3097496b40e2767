"""The byte proxy between a real caller and real targets on loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.errors import (
    InvalidRequest,
    ModelNotFound,
    NoCapacity,
    ReplicaFull,
)
from localmesh.rpc import relay
from localmesh.rpc.errors import from_rpc_error
from tests.integration.proxy_kit import (
    KINDS,
    WAIT,
    Service,
    World,
    echo_service,
    eventually,
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
