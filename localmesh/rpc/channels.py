"""Channels to the rest of the mesh: one for each endpoint, shared, that notices a dead or frozen peer in seconds."""

from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import grpc

from localmesh.core.clock import Clock, SystemClock
from localmesh.rpc.tls import ChannelTls, TlsFiles

DEFAULT_MAX_MESSAGE_BYTES: Final = 64 << 20

_LOOK_EVERY_SECONDS: Final = 1.0

DEFAULT_CHANNEL_OPTIONS: Final[Mapping[str, int]] = MappingProxyType(
    {
        # A ping every 5 s, also on an idle connection. keepalive_timeout alone does not end a connection whose peer is
        # frozen (63 s were measured); ping_timeout does, so it is set too. It is 5 s because a machine that loads a
        # model may be slow to answer, and a busy peer must not be taken for a dead one.
        "grpc.keepalive_time_ms": 5_000,
        "grpc.keepalive_timeout_ms": 5_000,
        "grpc.http2.ping_timeout_ms": 5_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        # A replica that comes back is used within a second.
        "grpc.initial_reconnect_backoff_ms": 100,
        # Also how long an attempt to connect may take: a busy peer is not a dead one.
        "grpc.min_reconnect_backoff_ms": 1_000,
        "grpc.max_reconnect_backoff_ms": 1_000,
        # What is retried, and where, is decided by us: see localmesh.rpc.proxy.
        "grpc.enable_retries": 0,
        # Endpoints are host:port; a lookup of "_grpc_config" TXT records would only delay them.
        "grpc.service_config_disable_resolution": 1,
        # An http_proxy of the environment is for the web, not for the mesh.
        "grpc.enable_http_proxy": 0,
        # Two pools of one process must not share a connection unseen: closing one would not close it.
        "grpc.use_local_subchannel_pool": 1,
    }
)


def channel_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, extra: Mapping[str, int | str] | None = None
) -> list[tuple[str, int | str]]:
    """Return the options of a channel as grpc takes them, each named once (of two, the first would win)."""
    merged: dict[str, int | str] = dict(DEFAULT_CHANNEL_OPTIONS)
    merged["grpc.max_receive_message_length"] = max_message_bytes
    merged["grpc.max_send_message_length"] = max_message_bytes
    merged.update(extra or {})
    return list(merged.items())


def open_channel(
    endpoint: str,
    *,
    tls: ChannelTls | None = None,
    server_name: str = "",
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
) -> Any:
    """Return a new grpc.aio.Channel.

    Args:
        endpoint: host:port, [ipv6]:port, or unix:/path.
        tls: Credentials, or None for plain text.
        server_name: Name that the server's certificate must carry; the endpoint's host where empty. See
            localmesh.rpc.identity.server_name.
        max_message_bytes: Largest message either way.
    """
    if tls is None:
        return grpc.aio.insecure_channel(endpoint, options=channel_options(max_message_bytes))
    extra = {"grpc.ssl_target_name_override": server_name} if server_name else None
    return grpc.aio.secure_channel(endpoint, tls.credentials(), options=channel_options(max_message_bytes, extra))


class ChannelPool:
    """Keeps one channel for each endpoint. An async context manager; closing it ends its channels.

    When the TLS files change, a `get` at most a second later opens a new channel with them. Calls that run go on with
    the old one, which is closed with the pool or when its endpoint is released.
    """

    def __init__(
        self,
        tls: TlsFiles | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        clock: Clock | None = None,
    ) -> None:
        self._tls = ChannelTls(tls) if tls is not None else None
        self._clock = clock or SystemClock()
        self._look_again = 0.0
        self._max_message_bytes = max_message_bytes
        self._channels: dict[tuple[str, str], Any] = {}
        self._outdated: list[tuple[str, Any]] = []

    def get(self, endpoint: str, *, server_name: str = "") -> Any:
        """Return the grpc.aio.Channel to an endpoint. It connects when it is first used, and again when it must.

        Args:
            endpoint: host:port, [ipv6]:port, or unix:/path.
            server_name: With TLS, the name that the server must prove: see localmesh.rpc.identity.server_name.
        """
        if self._tls is not None:
            self._follow_files(self._tls)
        key = (endpoint, server_name)
        channel = self._channels.get(key)
        if channel is None:
            channel = open_channel(
                endpoint, tls=self._tls, server_name=server_name, max_message_bytes=self._max_message_bytes
            )
            self._channels[key] = channel
        return channel

    def _follow_files(self, tls: ChannelTls) -> None:
        now = self._clock.monotonic()
        if now < self._look_again:  # get() is on the path of every request; three stat() calls are not for each
            return
        self._look_again = now + _LOOK_EVERY_SECONDS
        if tls.changed():
            self._outdated += [(key[0], channel) for key, channel in self._channels.items()]
            self._channels.clear()

    async def release(self, endpoint: str) -> None:
        """Close the channels to an endpoint that is gone for good. Calls that run on them fail."""
        gone = [self._channels.pop(key) for key in list(self._channels) if key[0] == endpoint]
        gone += [channel for found, channel in self._outdated if found == endpoint]
        self._outdated = [pair for pair in self._outdated if pair[0] != endpoint]
        for channel in gone:
            await channel.close()

    async def close(self) -> None:
        """Close every channel. Calls that run on them fail."""
        channels = [*self._channels.values(), *(channel for _, channel in self._outdated)]
        self._channels.clear()
        self._outdated.clear()
        for channel in channels:
            await channel.close()

    def __len__(self) -> int:
        """Return the number of open channels."""
        return len(self._channels) + len(self._outdated)

    def __repr__(self) -> str:
        """Name the endpoints."""
        return f"<ChannelPool {' '.join(sorted(endpoint for endpoint, _ in self._channels))}>"

    async def __aenter__(self) -> Self:
        """Return the pool."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every channel."""
        await self.close()
