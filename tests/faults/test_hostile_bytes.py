"""Strangers at every port: nothing that they send ends a process, makes it grow for ever, or keeps others waiting.

The noise of test_any_bytes.py is shorter and blinder. Here the bytes know HTTP/2 and gRPC well enough to get past the
first checks, connections are kept, and what each process holds is counted.
"""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import psutil
import pytest
from google.protobuf.descriptor_pool import Default
from grpc_health.v1 import health_pb2, health_pb2_grpc

from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.testing import LocalMesh, for_model
from localmesh.v1 import inference_service_pb2 as pb

pytestmark = pytest.mark.timeout(240)

COMPONENTS = ("router", "registry", "alpha", "beta")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
# The first record of a TLS 1.2 handshake: a ClientHello that offers one cipher.
CLIENT_HELLO = bytes.fromhex("160301002d010000290303") + bytes(32) + bytes.fromhex("000002c02f0100")
CONNECTIONS = 60
MIB = 1 << 20
MAX_GROWTH_BYTES = 96 * MIB
SPARE_FDS = 12
"""Connections that come and go by themselves: pings of peers, a channel more or less."""


@dataclass(frozen=True)
class Port:
    """Somebody who listens."""

    name: str
    endpoint: str
    pid: int


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """Encode a header for HPACK, as a literal that no table knows."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < 127:
        return bytes([size])
    size -= 127
    encoded = b"\x7f"
    while size >= 128:
        encoded += bytes([size % 128 + 128])
        size //= 128
    return encoded + bytes([size])


def call(path: bytes, *more: tuple[bytes, bytes], stream: int = 1) -> bytes:
    """Return the headers of a gRPC call."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"mesh"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    ]
    return frame(HEADERS, END_HEADERS, stream, b"".join(header(n, v) for n, v in headers))


def message(size: int, body: bytes, *, compressed: int = 0) -> bytes:
    """Return a gRPC message whose prefix says what it likes."""
    return bytes([compressed]) + struct.pack(">I", size) + body


GREETING = PREFACE + frame(SETTINGS, 0, 0, b"")
GENERATE = b"/localmesh.v1.InferenceService/Generate"
MODEL = (b"localmesh-model", b"tiny")


def hostile(dice: random.Random) -> Iterator[bytes]:
    """Yield what a connection begins with; after it nothing more comes, or the end."""
    junk = dice.randbytes(dice.choice([1, 40, 3000]))
    opened = GREETING + call(GENERATE, MODEL)
    yield b""
    yield junk
    yield (
        b"GET /" + junk[:20].hex().encode() + b" HTTP/1.1\r\nHost: mesh\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n"
    )
    yield b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n" + junk
    yield CLIENT_HELLO
    yield CLIENT_HELLO[: dice.randrange(len(CLIENT_HELLO))] + junk
    yield GREETING[: dice.randrange(len(GREETING))]
    yield GREETING + junk
    yield opened[: dice.randrange(len(GREETING), len(opened))]
    yield opened + frame(DATA, END_STREAM, 1, message(len(junk), junk))
    yield opened + frame(DATA, END_STREAM, 1, message(0xFFFFFFFF, junk))
    yield opened + frame(DATA, 0, 1, message(0x7FFFFFFF, b""))
    yield opened + frame(DATA, END_STREAM, 1, message(len(junk), junk, compressed=1))
    yield opened + frame(DATA, END_STREAM, 1, message(len(junk), junk, compressed=0x80))
    yield opened + frame(DATA, END_STREAM, 1, b"\x00\x00\x00")
    yield opened + frame(DATA, 0, 77, junk) + frame(DATA, 0, 2, junk)
    yield opened + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2
    yield opened + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0xFFFFFFFF) + struct.pack(">HI", 5, 1))
    yield opened + frame(CONTINUATION, 0, 1, junk) * 20
    yield GREETING + frame(HEADERS, 0, 1, junk) + frame(CONTINUATION, 0, 1, junk) * 20
    yield GREETING + frame(PING, 0, 0, bytes(8)) * 500
    yield GREETING + b"".join(
        call(GENERATE, MODEL, stream=n) + frame(RST_STREAM, 0, n, b"\x00\x00\x00\x08") for n in range(1, 400, 2)
    )
    yield GREETING + b"".join(call(b"/" + dice.randbytes(8).hex().encode() + b"/M", MODEL, stream=n) for n in (1, 3, 5))
    yield GREETING + call(GENERATE, MODEL, (b"grpc-timeout", b"99999999H"), (b"grpc-encoding", b"no-such"))
    yield GREETING + call(GENERATE, MODEL, (b"grpc-timeout", b"-1S"), (b"x-junk-bin", b"!!! no base64 !!!"))
    yield GREETING + call(GENERATE, (b"localmesh-model", b"x" * 7000), (b"localmesh-replica", b"//" * 1000))
    yield GREETING + call(b"x" * 4000, MODEL) + call(b"", stream=3) + call(b"//", stream=5)


async def say(endpoint: str, data: bytes, *, linger: float = 0.05) -> None:
    """Say something, listen for a moment, and leave without a word."""
    host, _, port = endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(linger):
            while await reader.read(65536):
                pass
    except (ConnectionError, TimeoutError):
        pass  # it hung up on us, or waits for more, as it may
    finally:
        writer.transport.abort()


async def ports(mesh: LocalMesh) -> list[Port]:
    """Return everybody who listens but etcd."""
    found = [
        Port("router", mesh.router_endpoint, mesh.pid("router")),
        Port("registry", mesh.registry_endpoint, mesh.pid("registry")),
    ]
    for worker in mesh.household.workers:
        assert worker.address is not None
        found.append(Port(worker.spec.config.worker.name, worker.address.endpoint, worker.pid))
    for replica in await mesh.replicas():
        name = ReplicaId(ModelName(replica.ref.model), NodeName(replica.ref.node), replica.ref.index)
        found.append(Port(str(name), replica.endpoint, await mesh.replica_pid(name)))
    return found


async def is_well(mesh: LocalMesh, port: Port) -> bool:
    """Whether health says so, quickly."""
    stub = health_pb2_grpc.HealthStub(mesh.channel(port.endpoint))
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def answers(mesh: LocalMesh) -> bool:
    request = pb.GenerateRequest(prompt="The", sampling=pb.SamplingOptions(max_tokens=4, temperature=0))
    answer = await mesh.inference.Generate(request, metadata=for_model("tiny"), timeout=20)
    return answer.usage.completion_tokens == 4


@asynccontextmanager
async def unharmed(mesh: LocalMesh) -> AsyncIterator[list[Port]]:
    """Yield who listens; check afterwards that they are the same, well, and hold no more than before."""
    before = await ports(mesh)
    assert len(before) == 6
    processes = {port.name: psutil.Process(port.pid) for port in before}
    fds = {name: process.num_fds() for name, process in processes.items()}
    memory = {name: process.memory_info().rss for name, process in processes.items()}
    yield before
    assert [mesh.starts(name) for name in COMPONENTS] == [1, 1, 1, 1]
    assert await ports(mesh) == before
    for port in before:
        assert await is_well(mesh, port), port
    for _ in range(4):
        assert await answers(mesh)

    async def gone() -> bool:
        return all(process.num_fds() <= fds[name] + SPARE_FDS for name, process in processes.items())

    try:
        await mesh.until(gone, seconds=60)
    except TimeoutError:
        pytest.fail(f"files stay open: { {n: (fds[n], p.num_fds()) for n, p in processes.items()} }")
    grown = {name: process.memory_info().rss - memory[name] for name, process in processes.items()}
    assert all(size < MAX_GROWTH_BYTES for size in grown.values()), grown
    for name in COMPONENTS:
        assert "Traceback" not in mesh.log(name), mesh.log(name)[-3000:]


async def test_bytes_that_know_the_protocol_harm_nobody(serving_mesh, etcd_environment) -> None:
    dice = random.Random(20261121)
    async with serving_mesh(etcd_environment) as mesh, unharmed(mesh) as targets:
        for _ in range(4):
            for data in hostile(dice):
                await asyncio.gather(*(say(target.endpoint, data) for target in targets))


async def test_connections_that_are_never_used_keep_nobody_waiting(serving_mesh, etcd_environment) -> None:
    dice = random.Random(3)
    async with serving_mesh(etcd_environment) as mesh, unharmed(mesh) as targets:
        writers = []
        try:
            for target in targets:
                host, _, port = target.endpoint.rpartition(":")
                for _ in range(CONNECTIONS):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writers.append(writer)
                    writer.write(dice.choice([b"", PREFACE[:9], PREFACE, GREETING, GREETING + call(GENERATE, MODEL)]))
            for target in targets:
                assert await is_well(mesh, target)
            assert await answers(mesh)
        finally:
            for writer in writers:
                writer.transport.abort()


def methods() -> Iterator[str]:
    """Yield every method that somebody serves, and some that nobody does."""
    services = [f"localmesh.v1.{name}Service" for name in ("Registry", "Router", "Worker", "Inference")]
    for service in [*services, "backend.Backend", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]:
        for method in Default().FindServiceByName(service).methods:
            yield f"/{service}/{method.name}"
    yield from ("/no.such.Service/Nothing", "/", "//", "no-slash", "/localmesh.v1.RouterService/Nothing")


def bodies(dice: random.Random) -> Iterator[bytes]:
    """Yield messages that are none of any type, or of every type."""
    yield b""
    yield dice.randbytes(dice.choice([1, 30, 2000]))
    yield b"\x0a" + bytes([100]) + dice.randbytes(100)  # field 1: 100 bytes that are no UTF-8, or no message
    yield b"\x0a\xff\xff\xff\xff\x0f"  # field 1: 4 GiB, they say
    yield b"\x08" + b"\xff" * 9 + b"\x01" + b"\x12\x00" + b"\x18\x01" + b"\x22\x00"  # numbers at their ends, empty ones
    yield b"\x0a\x00" * 5000  # field 1 five thousand times
    yield b"\x0b" * 300  # groups in groups


async def one_call(mesh: LocalMesh, target: Port, method: str, body: bytes, dice: random.Random) -> grpc.StatusCode:
    """Make a call with metadata and a deadline that make no sense; return how it ended, cancelled if it did not."""
    metadata = [
        *for_model("tiny"),
        ("x-junk-bin", dice.randbytes(50)),
        (
            "localmesh-" + dice.choice(["replica", "revision", "nothing"]),
            dice.choice(["", "////", "a/b/-1", "~" * 500]),
        ),
    ]
    timeout = dice.choice([1e-6, 0.02, 0.3, 1e9, None])
    stream = mesh.channel(target.endpoint).stream_stream(method)(metadata=metadata, timeout=timeout)
    try:
        async with asyncio.timeout(0.5):
            await stream.write(body)
            await stream.done_writing()
            async for _ in stream:
                pass
            return await stream.code()
    except TimeoutError:
        return grpc.StatusCode.CANCELLED
    except grpc.aio.AioRpcError as error:
        return error.code()
    except (grpc.aio.InternalError, asyncio.InvalidStateError):  # it was ended while we wrote
        return await stream.code()
    finally:
        stream.cancel()


async def test_every_method_bears_every_message(serving_mesh, etcd_environment) -> None:
    from grpc_reflection.v1alpha import reflection_pb2  # noqa: F401 - registers its descriptors, for `methods`

    from localmesh.thirdparty import backend_pb2  # noqa: F401 - as above
    from localmesh.v1 import registry_service_pb2, router_service_pb2, worker_service_pb2  # noqa: F401 - as above

    dice = random.Random(11)
    async with serving_mesh(etcd_environment) as mesh, unharmed(mesh) as targets:
        codes: dict[grpc.StatusCode, list[str]] = {}
        for method in methods():
            for target in targets:
                ended = await asyncio.gather(*(one_call(mesh, target, method, b, dice) for b in bodies(dice)))
                for code in ended:
                    codes.setdefault(code, []).append(f"{target.name} {method}")
        assert grpc.StatusCode.UNKNOWN not in codes, codes[grpc.StatusCode.UNKNOWN]
