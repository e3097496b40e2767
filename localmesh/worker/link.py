"""The worker's link to the registry: registers, heartbeats, and comes back after every loss.

What runs on the node goes on whatever happens here.
"""

import asyncio
import logging
from random import Random
from typing import Any, Protocol

import grpc

from localmesh.core.clock import Clock
from localmesh.core.errors import (
    IncarnationLost,
    InvalidRequest,
    MeshError,
    NodeNameTaken,
    NodePending,
    PermissionDenied,
    SchemaUnsupported,
    Unauthenticated,
)
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import CallTimedOut, from_rpc_error
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc as pb_grpc
from localmesh.worker.config import WorkerConfig
from localmesh.worker.presence import Presence, Rotation

_log = logging.getLogger(__name__)
_NUDGE_GAP_SECONDS = 0.05
_PENDING_SECONDS = 2.0
_REFUSED_SECONDS = 10.0
_REFUSALS = (NodeNameTaken, PermissionDenied, Unauthenticated, SchemaUnsupported, InvalidRequest)
"""What asking again, or another registry, does not change: an operator must act."""


class LinkHost(Protocol):
    """What the link carries. None of these may block."""

    def registration(self) -> pb.RegisterRequest:
        """Return what the worker says of itself, and what runs."""
        ...

    def registered(self, response: pb.RegisterResponse) -> None:
        """Take in the answer."""
        ...

    def heartbeat(self, *, first: bool) -> pb.HeartbeatRequest:
        """Return what there is to tell: all of it in the first of a stream, else what changed since the last."""
        ...

    def heard(self, response: pb.HeartbeatResponse) -> None:
        """Take in what the registry says."""
        ...


class RegistryLink:
    """Keeps a worker registered.

    Args:
        config: Node, registries and times.
        host: What is carried.
        channels: Connections.
        clock: Time.
        chance: Spreads attempts.
    """

    def __init__(
        self, config: WorkerConfig, *, host: LinkHost, channels: ChannelPool, clock: Clock, chance: Random
    ) -> None:
        self._config = config
        self._host = host
        self._channels = channels
        self._clock = clock
        self._presence = Presence()
        self._rotation = Rotation(config.registries, chance=chance)
        self._nudge = asyncio.Event()
        self._said = ""

    @property
    def registered(self) -> bool:
        """Whether the node is surely registered at this moment."""
        return self._presence.alive(now=self._clock.monotonic())

    def nudge(self) -> None:
        """Have the next heartbeat sent at once."""
        self._nudge.set()

    async def run(self) -> None:
        """Register and heartbeat until cancelled."""
        while True:
            endpoint = self._rotation.endpoint
            try:
                error = await self._serve(endpoint)
            except grpc.RpcError as failure:
                error = from_rpc_error(failure, endpoint=endpoint)
            except Exception:  # noqa: BLE001 - a fault here must not end the replicas that this worker keeps
                _log.exception("the link to the registry failed; it is made anew")
                error = MeshError("a fault of the worker itself")
            self._say(error, endpoint)
            await asyncio.sleep(self._after(error))

    async def deregister(self) -> None:
        """End the registration at once, if there is one. Gives up after a while: the lease ends it then."""
        if not self._presence.incarnation:
            return
        request = pb.DeregisterRequest(node=self._config.node, incarnation=self._presence.incarnation)
        for _ in self._config.registries[:3]:
            stub: Any = pb_grpc.RegistryServiceStub(self._channels.get(self._rotation.endpoint))
            try:
                await stub.Deregister(request, timeout=min(2.0, self._config.call_seconds))
            except grpc.RpcError as failure:
                _log.info("not deregistered: %s", from_rpc_error(failure, endpoint=self._rotation.endpoint))
                self._rotation.failed(rotate=True)
            else:
                break
        self._presence.lost()

    async def _serve(self, endpoint: str) -> MeshError:
        """Use one registry until it fails, and return how."""
        stub: Any = pb_grpc.RegistryServiceStub(self._channels.get(endpoint))
        if not self.registered:
            await self._register(stub)
        return await self._beat(stub, endpoint)

    async def _register(self, stub: Any) -> None:
        sent_at = self._clock.monotonic()
        response: pb.RegisterResponse = await stub.Register(
            self._host.registration(), timeout=self._config.call_seconds
        )
        ttl = response.presence_ttl.ToMicroseconds() / 1e6
        self._presence.registered(response.incarnation, ttl_seconds=ttl, sent_at=sent_at)
        self._host.registered(response)
        _log.info(
            "registered as %s, incarnation %x; %d replicas taken over, %d to stop",
            self._config.node,
            response.incarnation,
            len(response.adopted),
            len(response.stop),
        )

    async def _beat(self, stub: Any, endpoint: str) -> MeshError:
        self._presence.new_stream()
        call = stub.Heartbeat()
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(call), name="heartbeats")
                try:
                    return await self._read(call, endpoint)
                finally:
                    writer.cancel()
        finally:
            call.cancel()

    async def _write(self, call: Any) -> None:
        sequence = 0
        try:
            while True:
                self._nudge.clear()
                message = self._host.heartbeat(first=sequence == 0)
                if sequence == 0:
                    message.node, message.incarnation = self._config.node, self._presence.incarnation
                sequence += 1
                message.sequence = sequence
                self._presence.sent(sequence, now=self._clock.monotonic())
                await call.write(message)
                await self._next_beat()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why

    async def _next_beat(self) -> None:
        """Return when the next heartbeat is due: in time, or soon after a nudge, but not in bursts."""
        await asyncio.sleep(_NUDGE_GAP_SECONDS)
        try:
            async with asyncio.timeout(max(0.0, self._config.heartbeat_seconds - _NUDGE_GAP_SECONDS)):
                await self._nudge.wait()
        except TimeoutError:
            return

    async def _read(self, call: Any, endpoint: str) -> MeshError:
        """Take in what comes until the stream fails, and return how."""
        while True:
            try:
                # every heartbeat is answered, so silence means that nobody is there or that it is frozen
                async with asyncio.timeout(self._config.ack_seconds):
                    response = await call.read()
            except TimeoutError:
                return CallTimedOut(
                    f"{endpoint}: no answer to heartbeats for {self._config.ack_seconds:g} s", endpoint=endpoint
                )
            except grpc.RpcError as failure:
                return from_rpc_error(failure, endpoint=endpoint)
            if response is grpc.aio.EOF:
                return MeshError(f"{endpoint}: the registry ended the stream: it stops")
            self._works(endpoint)
            if response.sequence:
                self._presence.acknowledged(response.sequence)
            self._host.heard(response)

    def _after(self, error: MeshError) -> float:
        """Draw the consequences of a failure, and return how many seconds to wait."""
        if isinstance(error, IncarnationLost):
            self._presence.lost()
            return self._rotation.failed(rotate=False)
        if isinstance(error, NodePending):
            return error.retry_after_seconds or _PENDING_SECONDS
        pause = self._rotation.failed(rotate=True)
        return max(pause, _REFUSED_SECONDS) if isinstance(error, _REFUSALS) else pause

    def _works(self, endpoint: str) -> None:
        self._rotation.worked()
        if self._said:
            self._said = ""
            _log.info("the registry %s answers", endpoint)

    def _say(self, error: MeshError, endpoint: str) -> None:
        """Log a failure, once for as long as it stays the same."""
        text = f"{type(error).__name__} {error.message}"
        if text != self._said:
            self._said = text
            level = logging.ERROR if isinstance(error, _REFUSALS) else logging.WARNING
            told = error.message if endpoint in error.message else f"{endpoint}: {error.message}"
            _log.log(level, "no link to the registry %s", told)
