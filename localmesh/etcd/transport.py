"""Channels to the endpoints: one each, with rotation, bounded tries and the auth token.

Decides nothing about meaning: verdict.py does. A call goes to the current endpoint; a failure moves everybody
to the next one, and nobody moves back before that one fails.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from localmesh.core.clock import Clock
from localmesh.etcd.config import EtcdConfig, Target, parse_endpoint
from localmesh.etcd.errors import (
    AuthenticationFailed,
    ConnectionFailedError,
    ConnectionTimeoutError,
    EtcdError,
    PreconditionFailedError,
    RequestRefused,
)
from localmesh.etcd.verdict import Action, Verdict, judge
from localmesh.thirdparty import etcd_pb2 as pb

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_SECONDS = 0.05
_MAX_BACKOFF_SECONDS = 1.0
_MAX_REAUTHENTICATIONS = 3


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC of etcd; the paths are written out because our messages live in a package of our own."""

    path: str
    request_type: Any
    response_type: Any


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
PUT = Method("/etcdserverpb.KV/Put", pb.PutRequest, pb.PutResponse)
DELETE_RANGE = Method("/etcdserverpb.KV/DeleteRange", pb.DeleteRangeRequest, pb.DeleteRangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse)
LEASE_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
LEASE_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
LEASE_TIME_TO_LIVE = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse
)
LEASE_LEASES = Method("/etcdserverpb.Lease/LeaseLeases", pb.LeaseLeasesRequest, pb.LeaseLeasesResponse)
LEASE_KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse)
STATUS = Method("/etcdserverpb.Maintenance/Status", pb.StatusRequest, pb.StatusResponse)
MEMBER_LIST = Method("/etcdserverpb.Cluster/MemberList", pb.MemberListRequest, pb.MemberListResponse)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)

# Asked of a silent peer: any answer to it, a refusal included, shows that the peer lives.
_PROBE = pb.RangeRequest(key=b"\0", serializable=True, count_only=True)


class StreamLost(Exception):
    """A stream ended for a reason that taking it up again, perhaps elsewhere, can heal."""


def channel_options(config: EtcdConfig) -> list[tuple[str, int]]:
    """Return the options of every channel: one dict, because gRPC takes the first of two equal names."""
    options = {
        # etcd allows a ping every 5 s, and only while a call is open; faster ones cost the connection.
        "grpc.keepalive_time_ms": 6000,
        "grpc.keepalive_timeout_ms": 2000,
        # Without this one a frozen peer is noticed after 63 s whatever the time-out above says.
        "grpc.http2.ping_timeout_ms": 2000,
        "grpc.keepalive_permit_without_calls": 0,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 1000,
        "grpc.min_reconnect_backoff_ms": 2000,  # in truth the time-out of one attempt to connect
        "grpc.max_receive_message_length": config.max_message_bytes,
        "grpc.max_send_message_length": config.max_message_bytes,
        "grpc.use_local_subchannel_pool": 1,  # a connection is not shared with other clients' settings
        "grpc.service_config_disable_resolution": 1,
        "grpc.enable_http_proxy": 0,  # the store is never behind the web proxy of the environment
    }
    return list(options.items())


class Endpoint:
    """One member of the cluster, and the channel to it."""

    def __init__(self, config: EtcdConfig, target: Target, clock: Clock) -> None:
        self.address = target.address
        self.version = ""  # learned by watches; forgotten when a stream breaks
        self._clock = clock
        self._channel = _open_channel(config, target)
        self._calls: dict[str, Any] = {}
        self._probing = asyncio.Lock()
        self._heard_at = clock.monotonic()

    @property
    def heard_at(self) -> float:
        """When anything arrived from this peer, on the monotonic clock."""
        return self._heard_at

    def heard(self) -> None:
        """Note that something arrived from this peer."""
        self._heard_at = self._clock.monotonic()

    def unary(self, method: Method) -> Any:
        """Return the callable of a unary method."""
        if (call := self._calls.get(method.path)) is None:
            call = self._calls[method.path] = self._channel.unary_unary(
                method.path, method.request_type.SerializeToString, method.response_type.FromString
            )
        return call

    def stream(self, method: Method, metadata: tuple[tuple[str, str], ...]) -> Any:
        """Open a bidirectional stream."""
        opened = self._channel.stream_stream(
            method.path, method.request_type.SerializeToString, method.response_type.FromString
        )
        return opened(metadata=metadata)

    async def is_connected(self, timeout: float) -> bool:
        """Return whether there is a connection, or comes to be one in time. Proof that a write can leave us."""
        try:
            async with asyncio.timeout(timeout):
                while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        return False
                    await self._channel.wait_for_state_change(state)
        except TimeoutError:
            return False
        return True

    async def answers(self, silence: float, timeout: float, metadata: tuple[tuple[str, str], ...]) -> bool:
        """Return whether the peer lives: it was heard within `silence` seconds, or answers a probe in time."""
        async with self._probing:  # all streams to this peer share one probe
            if self._clock.monotonic() - self._heard_at < silence:
                return True
            try:
                await self.unary(RANGE)(_PROBE, timeout=timeout, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    return False
            self.heard()
            return True

    async def close(self) -> None:
        """Close the channel and every call on it."""
        await self._channel.close()


def _open_channel(config: EtcdConfig, target: Target) -> Any:
    if not target.tls:
        return grpc.aio.insecure_channel(target.address, channel_options(config))
    credentials = grpc.ssl_channel_credentials(config.ca_pem, config.key_pem, config.cert_pem)
    return grpc.aio.secure_channel(target.address, credentials, channel_options(config))


@dataclass(slots=True)
class Counters:
    """See messages.Statistics."""

    calls: int = 0
    retries: int = 0
    rotations: int = 0
    unknown_outcomes: int = 0
    authentications: int = 0
    watch_resumes: int = 0
    keep_alive_streams: int = 0


class Transport:
    """All endpoints together. Create it in a running loop, and close it in the same one."""

    def __init__(self, config: EtcdConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.counters = Counters()
        self.cluster_id = 0  # of the last unary answer
        tls = config.ca_pem is not None
        self._endpoints = [
            Endpoint(config, parse_endpoint(endpoint, tls_configured=tls), clock) for endpoint in config.endpoints
        ]
        self._current = 0
        self._token: str | None = None
        self._authenticating = asyncio.Lock()
        self._closed = False

    @property
    def current(self) -> Endpoint:
        """The endpoint that new calls and streams are opened on."""
        return self._endpoints[self._current]

    @property
    def endpoint_count(self) -> int:
        """How many endpoints there are to rotate through."""
        return len(self._endpoints)

    def failed(self, endpoint: Endpoint) -> None:
        """Move on from an endpoint that failed, unless somebody else has already."""
        if endpoint is self.current and len(self._endpoints) > 1:
            self._current = (self._current + 1) % len(self._endpoints)
            self.counters.rotations += 1
            logger.info("etcd endpoint %s failed, going on with %s", endpoint.address, self.current.address)

    async def call(
        self,
        method: Method,
        request: Any,
        *,
        may_repeat: bool,
        deadline: float | None = None,
        needs_leader: bool = True,
        lease_id: int = 0,
    ) -> Any:
        """Make a unary call, trying other endpoints as long as that is safe and the deadline has not come.

        Raises what verdict.judge() says; for a write anything but UnknownOutcome means that it was not applied.
        """
        if deadline is None:
            deadline = self.clock.monotonic() + self.config.deadline_seconds
        self.counters.calls += 1
        error: EtcdError | None = None
        tries = reauthentications = 0
        while True:
            endpoint = self.current
            left = deadline - self.clock.monotonic()
            if left <= 0:
                raise error or ConnectionTimeoutError("the deadline has passed before the call was made")
            limit = min(left, self.config.try_timeout_seconds * 2 ** min(tries // len(self._endpoints), 8))
            verdict = await self._try(endpoint, method, request, may_repeat, limit, left, needs_leader, lease_id)
            if not isinstance(verdict, Verdict):
                return verdict
            error = verdict.error
            if verdict.action is Action.GIVE_UP:
                raise error
            if verdict.action is Action.REAUTHENTICATE:
                reauthentications += 1
                if reauthentications > _MAX_REAUTHENTICATIONS:
                    raise error
                continue
            self.failed(endpoint)
            tries += 1
            self.counters.retries += 1
            if tries % len(self._endpoints) == 0:
                await self._pause(tries // len(self._endpoints), deadline)

    async def _try(
        self,
        endpoint: Endpoint,
        method: Method,
        request: Any,
        may_repeat: bool,
        limit: float,
        left: float,
        needs_leader: bool,
        lease_id: int,
    ) -> Any:
        """Return the answer of one try, or the Verdict on its failure."""
        if self._closed:
            raise ConnectionFailedError("the etcd client is closed")
        if not may_repeat:
            if not await endpoint.is_connected(limit):
                error = ConnectionFailedError(f"no connection to etcd at {endpoint.address}")
                return Verdict(Action.TRY_ELSEWHERE, error)
            limit = min(left, self.config.write_timeout_seconds)
        token = await self.token(self.clock.monotonic() + left) if method is not AUTHENTICATE else ""
        try:
            answer = await endpoint.unary(method)(
                request, timeout=limit, metadata=_metadata(token, needs_leader=needs_leader)
            )
        except grpc.aio.AioRpcError as failure:
            has_user = bool(self.config.user)
            verdict = judge(
                failure.code(), failure.details() or "", may_repeat=may_repeat, has_user=has_user, lease_id=lease_id
            )
            if verdict.action is Action.REAUTHENTICATE:
                self.token_refused(token)
            elif verdict.action is Action.GIVE_UP and failure.code() in _SUSPICIOUS:
                self.failed(endpoint)
                self.counters.unknown_outcomes += 1
            return verdict
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                # Closing a channel cancels its calls, which must not look as if somebody cancelled the caller.
                raise ConnectionFailedError("the etcd client was closed during a call") from None
            raise
        endpoint.heard()
        self.cluster_id = answer.header.cluster_id
        return answer

    async def _pause(self, round_: int, deadline: float) -> None:
        backoff = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(round_ - 1, 10), _MAX_BACKOFF_SECONDS)
        left = deadline - self.clock.monotonic()
        await asyncio.sleep(max(0.0, min(jittered(backoff), left)))

    async def token(self, deadline: float | None = None) -> str:
        """Return the auth token, "" where no user is configured or etcd wants none."""
        if not self.config.user:
            return ""
        if self._token is not None:
            return self._token
        async with self._authenticating:
            if self._token is None:
                self._token = await self._authenticate(deadline)
            return self._token

    def token_refused(self, token: str) -> None:
        """Forget a token that etcd did not take, unless there is a newer one already."""
        if self._token == token:
            self._token = None

    def forget_token(self) -> None:
        """Get a new token before the next call or stream."""
        self._token = None

    def stream_lost(self, error: Exception) -> StreamLost:
        """Return the loss that a failed operation on a stream means; a token that etcd refused is forgotten."""
        if not isinstance(error, grpc.aio.AioRpcError):
            return StreamLost(str(error) or type(error).__name__)
        details = error.details() or ""
        if judge(error.code(), details, may_repeat=True, has_user=True).action is Action.REAUTHENTICATE:
            self.forget_token()
        return StreamLost(f"{details} ({error.code().name})")

    async def _authenticate(self, deadline: float | None) -> str:
        request = pb.AuthenticateRequest(name=self.config.user, password=self.config.password)
        try:
            answer = await self.call(AUTHENTICATE, request, may_repeat=True, deadline=deadline)
        except PreconditionFailedError as error:
            if "authentication is not enabled" in error.details:
                return ""
            raise
        except RequestRefused as error:
            raise AuthenticationFailed(error.details) from error
        self.counters.authentications += 1
        return str(answer.token)

    async def open_stream(self, endpoint: Endpoint, method: Method) -> Any:
        """Open a stream; etcd ends it when the member loses its leader. Raises EtcdError if no token is to be had."""
        return endpoint.stream(method, _metadata(await self.token(), needs_leader=True))

    async def is_alive(self, endpoint: Endpoint) -> bool:
        """Return whether the peer was heard within the probe interval, or answers one of two probes."""
        metadata = _metadata(self._token or "", needs_leader=False)
        silence, timeout = self.config.probe_interval_seconds, self.config.try_timeout_seconds
        return await endpoint.answers(silence, timeout, metadata) or await endpoint.answers(
            silence, 2 * timeout, metadata
        )

    async def close(self) -> None:
        """Close all channels; calls that are under way fail."""
        self._closed = True
        for endpoint in self._endpoints:
            await endpoint.close()


_SUSPICIOUS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def _metadata(token: str, *, needs_leader: bool) -> tuple[tuple[str, str], ...]:
    metadata: tuple[tuple[str, str], ...] = (("hasleader", "true"),) if needs_leader else ()
    return (*metadata, ("token", token)) if token else metadata


def jittered(seconds: float) -> float:
    """Return between half and all of it, so that many clients do not come back at once."""
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


def backoff_steps() -> Callable[[], float]:
    """Return a function that gives the next pause between tries of a stream."""
    pause = _FIRST_BACKOFF_SECONDS / 2

    def following() -> float:
        nonlocal pause
        pause = min(pause * 2, _MAX_BACKOFF_SECONDS)
        return jittered(pause)

    return following
