"""Health of a server and of each of its services, as grpc.health.v1 tells it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "grpc.health.v1.Health"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthBook:
    """What is serving. The name "" stands for the server as a whole.

    grpcio-health-checking's own asyncio servicer is not used: when one watcher of a service leaves, the others hear
    nothing more, and one that reads slowly blocks whoever changes the state (1.81).
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {"": False}
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def serving(self) -> Mapping[str, bool]:
        """The present state, by service."""
        return MappingProxyType(self._serving)

    @property
    def closed(self) -> bool:
        """Whether the server is stopping."""
        return self._closed

    def set_serving(self, service: str, serving: bool) -> None:
        """Say whether a service serves, and tell those who watch it. Without effect once the server is stopping."""
        if not self._closed and self._serving.get(service) is not serving:
            self._serving[service] = serving
            self._wake()

    def forget(self, service: str) -> None:
        """Make a service unknown. "" stays."""
        if service and self._serving.pop(service, None) is not None:
            self._wake()

    def close(self) -> None:
        """Set everything to not serving, for good."""
        self._closed = True
        self._serving = dict.fromkeys(self._serving, False)
        self._wake()

    async def follow(self, service: str) -> AsyncIterator[bool | None]:
        """Yield a service's state now and whenever it has changed; None while it is unknown. Ends when closed.

        Who is slow sees the last state only.
        """
        last: object = self
        while True:
            changed, closed, state = self._changed, self._closed, self._serving.get(service)
            if state is not last:
                last = state
                yield state
            if closed:
                return
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc ships no types
    """Serves a HealthBook."""

    def __init__(self, book: HealthBook) -> None:
        self._book = book

    async def Check(self, request: Any, context: Any) -> Any:
        """Return the state of a service. NOT_FOUND where there is none of that name."""
        state = self._book.serving.get(request.service)
        if state is None:
            # The protocol asks for this code; no reason of ours has it for a service.
            await context.abort(grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service[:200]!r}")
        return _response(state)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: ARG002 - grpc's signature
        """Stream the state of a service. Ends after NOT_SERVING when the server stops."""
        async for state in self._book.follow(request.service):
            yield _response(state)


def _response(state: bool | None) -> Any:
    status = _SERVICE_UNKNOWN if state is None else _SERVING if state else _NOT_SERVING
    return health_pb2.HealthCheckResponse(status=status)
