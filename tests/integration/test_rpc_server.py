"""A server as every component has it, met by real callers and by strangers."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from localmesh.core.errors import (
    InternalError,
    InvalidRequest,
    MethodUnknown,
    ModelNotFound,
    ReplicaFull,
)
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import ConfigError, ListenFailed, from_rpc_error
from localmesh.rpc.interceptors import ErrorInterceptor
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc as stubs

WAIT = 10.0
SERVICE = "localmesh.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Inference(stubs.InferenceServiceServicer):
    """Does what the model's name says."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        match request.model:
            case "missing":
                raise ModelNotFound("no model missing", model="missing")
            case "bug":
                raise ZeroDivisionError("secret")
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "own words")
            case "wait":
                self.begun.set()
                try:
                    await self.go_on.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        return pb.GenerateResponse()

    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any) -> AsyncIterator[Any]:
        yield pb.StreamGenerateResponse()
        if request.model == "full":
            raise ReplicaFull("full", replica="m/n/0")
        if request.model == "bug":
            raise ZeroDivisionError("secret")
        if request.model == "wait":
            self.begun.set()
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise


class Streams(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The two kinds of call that InferenceService does not have."""

    def service(self, details: Any) -> Any:
        async def fail_with_one(requests: Any, context: Any) -> bytes:
            async for _ in requests:
                pass
            raise ModelNotFound("after reading")

        async def fail_with_many(requests: Any, context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request
            raise ModelNotFound("after reading")

        decode = pb.GenerateRequest.FromString
        if details.method == "/t.T/One":
            return grpc.stream_unary_rpc_method_handler(fail_with_one, request_deserializer=decode)
        if details.method == "/t.T/Many":
            return grpc.stream_stream_rpc_method_handler(
                fail_with_many, request_deserializer=decode, response_serializer=pb.GenerateRequest.SerializeToString
            )
        return None


def inference_server(servicer: Inference, **config: Any) -> GrpcServer:
    server = GrpcServer(ServerConfig(**config), name="test server", generic_handlers=[Streams()])
    server.add(stubs.add_InferenceServiceServicer_to_server, servicer, SERVICE)
    return server


@pytest.fixture
async def servicer() -> Inference:
    return Inference()


@pytest.fixture
async def server(servicer: Inference) -> AsyncIterator[GrpcServer]:
    async with inference_server(servicer, drain_seconds=2.0, max_message_bytes=1 << 20) as started:
        yield started


@pytest.fixture
async def pool() -> AsyncIterator[ChannelPool]:
    async with ChannelPool() as made:
        yield made


def stub(pool: ChannelPool, server: GrpcServer) -> Any:
    return stubs.InferenceServiceStub(pool.get(server.endpoint))


async def failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def drain(call: Any) -> int:
    return len([message async for message in call])


async def still_up(pool: ChannelPool, server: GrpcServer) -> None:
    await stub(pool, server).Generate(pb.GenerateRequest(), timeout=WAIT)


# errors


async def test_an_error_arrives_as_itself_from_each_of_the_four_kinds_of_call(
    pool: ChannelPool, server: GrpcServer
) -> None:
    generate = from_rpc_error(await failed(stub(pool, server).Generate(pb.GenerateRequest(model="missing"))))
    assert isinstance(generate, ModelNotFound)
    assert generate.metadata == {"model": "missing"}
    streamed = stub(pool, server).StreamGenerate(pb.StreamGenerateRequest(model="full"))
    assert isinstance(from_rpc_error(await failed(drain(streamed))), ReplicaFull)
    channel = pool.get(server.endpoint)
    one = channel.stream_unary("/t.T/One")(iter([b"", b""]))
    assert isinstance(from_rpc_error(await failed(one)), ModelNotFound)
    many = channel.stream_stream("/t.T/Many")(iter([b"", b""]))
    assert isinstance(from_rpc_error(await failed(drain(many))), ModelNotFound)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_bug_is_an_internal_error_without_its_text_and_logged_once(
    pool: ChannelPool, server: GrpcServer, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.ERROR)
    inference = stub(pool, server)
    call = inference.Generate if kind == "unary" else lambda r: drain(inference.StreamGenerate(r))
    request = pb.GenerateRequest(model="bug") if kind == "unary" else pb.StreamGenerateRequest(model="bug")
    error = await failed(call(request))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert isinstance(from_rpc_error(error), InternalError)
    assert "secret" not in error.details()
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    assert "secret" in str(logged[0].exc_info[1])


async def test_a_servicers_own_abort_passes_unchanged(pool: ChannelPool, server: GrpcServer) -> None:
    error = await failed(stub(pool, server).Generate(pb.GenerateRequest(model="abort")))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "own words")


async def test_a_caller_that_leaves_cancels_the_servicer_and_is_no_error(
    pool: ChannelPool, server: GrpcServer, servicer: Inference, caplog: pytest.LogCaptureFixture
) -> None:
    inference = stub(pool, server)
    for start in (
        lambda: inference.Generate(pb.GenerateRequest(model="wait")),
        lambda: inference.StreamGenerate(pb.StreamGenerateRequest(model="wait")),
    ):
        call = start()
        async with asyncio.timeout(WAIT):
            if isinstance(call, grpc.aio.UnaryStreamCall):
                await call.read()
            await servicer.begun.wait()
            call.cancel()
            await servicer.cancelled.wait()
        servicer.begun.clear()
        servicer.cancelled.clear()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_servicer_that_is_not_asyncio_is_refused_instead_of_run_unchecked(pool: ChannelPool) -> None:
    ran = []

    class Threaded(stubs.InferenceServiceServicer):
        def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:  # type: ignore[override]
            ran.append(request)
            return pb.GenerateResponse()

    server = GrpcServer(ServerConfig(), name="threaded")
    server.add(stubs.add_InferenceServiceServicer_to_server, Threaded(), SERVICE)
    async with server:
        await failed(stub(pool, server).Generate(pb.GenerateRequest(), timeout=WAIT))
    assert not ran


async def test_an_unknown_method_is_refused_with_a_reason(pool: ChannelPool, server: GrpcServer) -> None:
    error = from_rpc_error(await failed(pool.get(server.endpoint).unary_unary("/no.Such/Method")(b"")))
    assert isinstance(error, MethodUnknown)
    assert error.metadata == {"method": "/no.Such/Method"}


async def test_a_method_that_a_servicer_leaves_out_is_refused_like_an_unknown_one(
    pool: ChannelPool, server: GrpcServer, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a component is older than the protocol of its caller."""
    error = from_rpc_error(await failed(stub(pool, server).Rerank(pb.RerankRequest(), timeout=WAIT)))
    assert isinstance(error, MethodUnknown)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_failure_that_nobody_waits_for_any_more_is_a_cancellation() -> None:
    """grpc would log the failed attempt to tell it with a traceback, for each caller with a short deadline."""

    class LeftContext:
        aborted = False

        def trailing_metadata(self) -> tuple[()]:
            return ()

        async def abort(self, *_: object) -> None:
            if self.aborted:
                raise grpc.aio.UsageError("Abort already called!")
            self.aborted = True
            raise grpc.aio.InternalError("execute_batch")

    with pytest.raises(asyncio.CancelledError):
        async with ErrorInterceptor().around("/s/M", LeftContext()):
            raise ModelNotFound("no model missing", model="missing")
    context = LeftContext()
    with pytest.raises(asyncio.CancelledError):
        async with ErrorInterceptor().around("/s/M", context):
            await context.abort()


async def test_bytes_that_are_no_message_are_refused_without_noise_in_the_log(
    pool: ChannelPool, server: GrpcServer, caplog: pytest.LogCaptureFixture
) -> None:
    channel = pool.get(server.endpoint)
    rubbish = b"\xff\xff\xff\xff"
    calls = [
        channel.unary_unary(f"/{SERVICE}/Generate")(rubbish),
        drain(channel.unary_stream(f"/{SERVICE}/StreamGenerate")(rubbish)),
        channel.stream_unary("/t.T/One")(iter([rubbish])),
        drain(channel.stream_stream("/t.T/Many")(iter([rubbish]))),
    ]
    for call in calls:
        error = await failed(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(from_rpc_error(error), InvalidRequest)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    await still_up(pool, server)


async def test_a_message_over_the_limit_names_the_setting(pool: ChannelPool, server: GrpcServer) -> None:
    call = stub(pool, server).Generate(pb.GenerateRequest(model="x" * (2 << 20)))
    assert "max_message_bytes" in from_rpc_error(await failed(call)).message
    await still_up(pool, server)


# health and reflection


async def test_health_is_told_for_the_server_and_each_service(pool: ChannelPool, server: GrpcServer) -> None:
    """F53."""
    health = health_pb2_grpc.HealthStub(pool.get(server.endpoint))
    for service in ("", SERVICE):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT)).status == SERVING
    error = await failed(health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    watched = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=WAIT)
    assert (await watched.read()).status == SERVING
    server.health.set_serving(SERVICE, False)
    assert (await watched.read()).status == NOT_SERVING
    server.health.set_serving(SERVICE, True)
    assert (await watched.read()).status == SERVING


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
async def test_reflection_tells_services_and_their_messages(
    pool: ChannelPool, server: GrpcServer, version: str
) -> None:
    """F53."""
    call = pool.get(server.endpoint).stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"{SERVICE}.Generate"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"{SERVICE}.Generte"),
    ]
    listed, described, unknown = [answer async for answer in call(iter(requests), timeout=WAIT)]
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto
    assert b"InferenceService" in described.file_descriptor_response.file_descriptor_proto[0]
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


# stopping


async def test_stopping_says_not_serving_first_lets_calls_finish_and_takes_no_new_ones(
    pool: ChannelPool, servicer: Inference
) -> None:
    """F53."""
    server = inference_server(servicer)
    await server.start()
    health = health_pb2_grpc.HealthStub(pool.get(server.endpoint))
    watched = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=WAIT)
    assert (await watched.read()).status == SERVING
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(call_of(stub(pool, server), "wait"))
        async with asyncio.timeout(WAIT):
            await servicer.begun.wait()
        stopping = tasks.create_task(server.stop(WAIT))
        assert (await watched.read()).status == NOT_SERVING
        assert await watched.read() is grpc.aio.EOF
        async with ChannelPool() as newcomer:
            error = await failed(stub(newcomer, server).Generate(pb.GenerateRequest(), timeout=WAIT))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        servicer.go_on.set()
    assert running.result() == pb.GenerateResponse()
    await server.stop()


async def call_of(inference: Any, model: str) -> Any:
    return await inference.Generate(pb.GenerateRequest(model=model), timeout=WAIT)


async def test_calls_that_outlast_the_grace_are_cancelled(pool: ChannelPool, servicer: Inference) -> None:
    server = inference_server(servicer, drain_seconds=0.2)
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(failed(call_of(stub(pool, server), "wait")))
        async with asyncio.timeout(WAIT):
            await servicer.begun.wait()
            await server.stop()
            await servicer.cancelled.wait()
    assert running.result().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


# addresses


async def test_a_unix_socket_and_ipv6_serve_as_well(pool: ChannelPool, servicer: Inference, tmp_path: Path) -> None:
    async with inference_server(servicer, listen=f"unix:{tmp_path}/s.sock") as server:
        assert server.endpoint == f"unix:{tmp_path}/s.sock"
        await still_up(pool, server)
    if not ipv6():
        pytest.skip("no IPv6 here")
    async with inference_server(servicer, listen="[::1]:0") as server:
        assert server.endpoint == f"[::1]:{server.port}"
        await still_up(pool, server)


def ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_others_are_told_the_advertised_address(servicer: Inference) -> None:
    async with inference_server(servicer, advertise="gpu1.lan") as server:
        assert server.endpoint == f"gpu1.lan:{server.port}"


async def test_a_port_in_use_is_named(server: GrpcServer, servicer: Inference) -> None:
    second = inference_server(servicer, listen=f"127.0.0.1:{server.port}")
    with pytest.raises(ListenFailed, match=f"port {server.port} of 127.0.0.1 is in use") as caught:
        await second.start()
    assert caught.value.metadata["port"] == str(server.port)
    await second.stop()


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ("192.0.2.1:0", "not an address of this machine"),
        ("no-such-host.invalid:0", "names no address"),
        ("unix:/no/such/folder/s.sock", "folder must exist"),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_explained(servicer: Inference, listen: str, says: str) -> None:
    server = inference_server(servicer, listen=listen, insecure=True)
    with pytest.raises(ListenFailed, match=says):
        await server.start()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.1.2.3:0", "gpu1.lan:0"])
async def test_an_open_address_without_tls_is_refused_unless_that_is_said(servicer: Inference, listen: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        inference_server(servicer, listen=listen)
    inference_server(servicer, listen=listen, insecure=True)


# strangers


@pytest.fixture
def strangers(server: GrpcServer) -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for one in opened:
        one.close()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512),
        os.urandom(100_000),
        PREFACE,
        PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1 << 20),  # a frame of 16 MiB, begun
        PREFACE + SETTINGS + b"\x00\x00\x05\x01\x04\x00\x00\x00\x01\xff\xff\xff\xff\xff",  # headers that are no HPACK
        PREFACE + SETTINGS + b"\x00\x00\x04\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00",  # a reset of stream 0
        PREFACE + SETTINGS * 10_000,
        PREFACE + SETTINGS + os.urandom(50_000),
    ],
    ids=["nothing", "http1", "tls", "random", "preface", "huge", "hpack", "reset", "settings", "frames"],
)
async def test_any_bytes_leave_the_server_up(
    pool: ChannelPool, server: GrpcServer, strangers: list[socket.socket], sent: bytes
) -> None:
    for _ in range(3):
        stranger = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
        stranger.settimeout(WAIT)
        strangers.append(stranger)  # stays half open
        with contextlib.suppress(ConnectionError):
            await asyncio.to_thread(stranger.sendall, sent)
    await still_up(pool, server)


async def test_a_hundred_connections_that_say_nothing_do_not_keep_others_out(
    pool: ChannelPool, server: GrpcServer, strangers: list[socket.socket]
) -> None:
    for _ in range(100):
        strangers.append(socket.create_connection(("127.0.0.1", server.port), timeout=WAIT))
    await still_up(pool, server)
