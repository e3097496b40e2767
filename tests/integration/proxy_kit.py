"""A proxy with real targets and a caller, for the tests of the proxy."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.rpc.channels import ChannelPool
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


@contextlib.asynccontextmanager
async def proxied() -> AsyncIterator[World]:
    """A world in which the proxy serves."""
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
        while not condition():
            await asyncio.sleep(0.005)


async def failed(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def refusing(error: Exception) -> Service:
    service = Service()

    async def refuse(request: Any, context: Any) -> None:
        raise error

    for method in ("/t.T/Echo", "/t.T/Repeat", "/t.T/Any", "/t.T/Chat"):
        service.methods[method] = (KINDS.get(method, (True, True)), refuse)
    return service


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
