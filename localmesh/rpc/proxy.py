"""Forwards any method of any service as bytes, to where `route` says.

Nothing is decoded. Metadata, the remaining deadline, cancellation, flow control, status, details and trailers pass both
ways. Methods whose kind is known (by their descriptors) and that take one request are forwarded as such, which costs
half; all others, of whatever kind, as two streams of messages, which is the same on the wire.

Until the first byte of an answer has gone to the caller, a call that a replica refused or that was lost with its
connection may be sent elsewhere: `route` is asked again.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import grpc

from localmesh.core.clock import Clock
from localmesh.core.errors import MeshError, ReplicaLost, ReplicaRefused
from localmesh.rpc.errors import from_parts
from localmesh.rpc.metadata import Metadata, of_request, of_response
from localmesh.rpc.relay import Ended, Relay

DEFAULT_BUFFER_BYTES: Final = 1 << 20
DEFAULT_MAX_ATTEMPTS: Final = 4


@dataclass(slots=True, kw_only=True, eq=False)
class ProxyCall:
    """A call to forward. The same object is handed to `route` at each attempt."""

    method: str
    """Full name, "/package.Service/Method"."""
    metadata: Metadata
    """As received."""
    deadline: float | None
    """Point on the clock's monotonic time, None where the caller set none."""
    context: Any
    """The grpc.aio.ServicerContext, for peer() and identity."""
    first_message: bytes | None = None
    """The request, where the method is known to take exactly one; else None."""
    attempt: int = 0
    """Counts from 1."""
    state: Any = None
    """For `route`'s own use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How an attempt failed, for whoever decides what follows."""

    error: MeshError
    """What the target answered, or ReplicaLost where its connection broke."""
    lost: bool
    """The connection was refused or broke. A time-out is not that: it means busy or unknown."""
    answered: bool
    """A byte of the answer has gone to the caller: no other target can answer any more."""
    replayable: bool
    """The whole request so far is still at hand."""
    attempt: int
    """Counts from 1."""

    @property
    def refused(self) -> bool:
        """Whether the target did nothing, by its own word."""
        return isinstance(self.error, ReplicaRefused)


def retry_elsewhere(failure: Failure) -> bool:
    """Return whether to ask `route` again: what `Target.on_failure` does unless told otherwise."""
    return failure.attempt < DEFAULT_MAX_ATTEMPTS and (failure.lost or failure.refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a call goes."""

    channel: Any
    """A grpc.aio.Channel."""
    extra_metadata: Metadata = ()
    """Sent with the request, in place of what the caller sent under these keys."""
    name: str = ""
    """Who it is, for errors: "model/node/index"."""
    on_first_byte: Callable[[], None] | None = None
    """Called when the first message of the answer, or its OK, has arrived."""
    on_failure: Callable[[Failure], bool] = retry_elsewhere
    """Called when the attempt failed; says whether to ask `route` again. Heeded only where that is possible."""


Route = Callable[[ProxyCall], AbstractAsyncContextManager[Target]]
"""Finds a target and keeps it until the context is left. May raise a MeshError, which becomes the call's status."""


def kinds_of(services: Iterable[Any]) -> dict[str, tuple[bool, bool]]:
    """Return (takes a stream, answers with a stream) by full method name, from service descriptors."""
    return {
        f"/{service.full_name}/{method.name}": (method.client_streaming, method.server_streaming)
        for service in services
        for method in service.methods
    }


class ProxyHandler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """Serves every method that nobody else on the server does, by forwarding it. For use in a GrpcServer.

    The services of gRPC itself (health, reflection) are never forwarded: they are about this server.

    Not kept: whether a message was compressed. gRPC decompresses on arrival and does not tell Python that it did, so
    each hop is compressed, or not, as its own channel and server are set up; the messages are the same.
    """

    def __init__(
        self,
        route: Route,
        *,
        clock: Clock,
        kinds: Mapping[str, tuple[bool, bool]],
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
    ) -> None:
        """Prepare a proxy.

        Args:
            route: Finds the target of a call.
            clock: The time, for deadlines.
            kinds: What is known of methods, as `kinds_of` returns it.
            buffer_bytes: Bytes of a stream of requests that are kept to be sent again; beyond it the call is not
                retried.
        """
        self._route = route
        self._clock = clock
        self._kinds = kinds
        self._buffer_bytes = buffer_bytes
        # Callers may invent method names: bounded.
        self._handler = lru_cache(maxsize=1024)(self._make_handler)

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a method, None for gRPC's own services."""
        method: str = handler_call_details.method
        return None if method.startswith("/grpc.") else self._handler(method)

    def _make_handler(self, method: str) -> Any:
        takes_stream, answers_stream = self._kinds.get(method, (True, True))
        if not takes_stream and not answers_stream:

            async def unary(request: bytes, context: Any) -> bytes:
                return await self._forward_unary(self._call(method, context, request), request, context)

            return grpc.unary_unary_rpc_method_handler(unary)

        if not takes_stream:

            async def answer_stream(request: bytes, context: Any) -> None:
                await self._forward_stream(self._call(method, context, request), Relay(context, request=request))

            return grpc.unary_stream_rpc_method_handler(answer_stream)

        async def streams(_: Any, context: Any) -> None:
            relay = Relay(context, buffer_bytes=self._buffer_bytes)
            await self._forward_stream(self._call(method, context, None), relay)

        return grpc.stream_stream_rpc_method_handler(streams)

    def _call(self, method: str, context: Any, request: bytes | None) -> ProxyCall:
        remaining = context.time_remaining()
        return ProxyCall(
            method=method,
            metadata=context.invocation_metadata() or (),
            deadline=None if remaining is None else self._clock.monotonic() + remaining,
            context=context,
            first_message=request,
        )

    def _remaining(self, call: ProxyCall) -> float | None:
        return None if call.deadline is None else max(0.001, call.deadline - self._clock.monotonic())

    async def _forward_unary(self, call: ProxyCall, request: bytes, context: Any) -> bytes:
        while True:
            call.attempt += 1
            async with self._route(call) as target:
                upstream = target.channel.unary_unary(call.method)(
                    request,
                    metadata=of_request(call.metadata, target.extra_metadata),
                    timeout=self._remaining(call),
                )
                try:
                    response: bytes = await upstream
                except grpc.aio.AioRpcError as error:
                    ended = Ended.of_error(error)
                    failure = _judge(call, target, ended, answered=False, replayable=True)
                    again = failure is not None and target.on_failure(failure)
                else:
                    if target.on_first_byte is not None:
                        target.on_first_byte()
                    await _adorn(context, await Ended.of_call(upstream))
                    return response
            if not again:
                await _finish(context, ended, failure, headers_sent=False)

    async def _forward_stream(self, call: ProxyCall, relay: Relay) -> None:
        refusal: MeshError | None = None
        ended: Ended | None = None
        failure: Failure | None = None
        async with relay:
            try:
                ended, failure = await self._attempts(call, relay)
            except MeshError as error:  # passed out of the relay's task group by hand: it would be wrapped
                refusal = error
        if refusal is not None:
            raise refusal
        if ended is not None:
            await _finish(relay.context, ended, failure, headers_sent=relay.answered)

    async def _attempts(self, call: ProxyCall, relay: Relay) -> tuple[Ended | None, Failure | None]:
        """Ask one target after another. Returns how the last one ended, None where the caller has left."""
        while True:
            call.attempt += 1
            async with self._route(call) as target:
                start = target.channel.stream_stream if relay.takes_stream else target.channel.unary_stream
                ended = await relay.run(
                    start(call.method),
                    metadata=of_request(call.metadata, target.extra_metadata),
                    timeout=self._remaining(call),
                    on_first_byte=target.on_first_byte,
                )
                if ended is None:
                    return None, None
                failure = _judge(call, target, ended, answered=relay.answered, replayable=relay.replayable)
                again = failure is not None and target.on_failure(failure) and relay.replayable
            if not again:
                return ended, failure


# What gRPC's core says, in its own words, when it is the connection that failed. A peer's UNAVAILABLE looks the same
# but for the text (grpcio 1.85 tells no other difference).
_CONNECTION_LOST: Final = re.compile(
    r"failed to connect|connections to all|connection (refused|reset|aborted|timed out)|socket closed|broken pipe"
    r"|recvmsg|sendmsg|endpoint clos|transport (closed|is closing)|goaway|keepalive|ping timeout|handshak"
    r"|no route to host|network is unreachable|dns resolution|empty address list|cancelling all calls",
    re.IGNORECASE,
)


def connection_lost(code: Any, details: str, trailers: Iterable[Any]) -> bool:
    """Whether a status means that the connection was refused or broke, not that the peer answered so."""
    if tuple(trailers):
        return False
    if code is grpc.StatusCode.CANCELLED:
        # A server that stops resets the calls that outlast its patience, with no other word. What this side cancels
        # itself reads otherwise.
        return details == "CANCELLED"
    return code is grpc.StatusCode.UNAVAILABLE and bool(_CONNECTION_LOST.search(details))


def _judge(call: ProxyCall, target: Target, ended: Ended, *, answered: bool, replayable: bool) -> Failure | None:
    """Return what an attempt's end means for the target, or None where it is the caller's own doing."""
    lost = connection_lost(ended.code, ended.details, ended.trailers)
    if not lost and ended.code in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
        return None
    if lost:
        who = f"the replica {target.name}" if target.name else "the replica"
        when = "while it answered" if answered else "before it answered"
        error: MeshError = ReplicaLost(f"{who} was lost {when}: {ended.details}", replica=target.name)
    else:
        error = from_parts(ended.code, ended.details, ended.trailers)
    return Failure(error=error, lost=lost, answered=answered, replayable=replayable, attempt=call.attempt)


async def _adorn(context: Any, ended: Ended) -> None:
    """Pass on what came with an OK besides the message."""
    initial, trailers = of_response(ended.initial), of_response(ended.trailers)
    if initial:
        await context.send_initial_metadata(initial)
    if trailers:
        context.set_trailing_metadata(trailers)
    if ended.details:
        context.set_details(ended.details)


async def _finish(context: Any, ended: Ended, failure: Failure | None, *, headers_sent: bool) -> None:
    """End the call as the target ended it; a lost one with our own words and details."""
    if failure is not None and failure.lost:
        raise failure.error
    if not headers_sent and (initial := of_response(ended.initial)):
        await context.send_initial_metadata(initial)
    trailers = of_response(ended.trailers)
    if ended.code is grpc.StatusCode.OK:
        context.set_trailing_metadata(trailers)
        context.set_details(ended.details)
        return
    await context.abort(ended.code, ended.details, trailers)
