"""A gRPC server as every component has it: one port, health, reflection, error mapping, graceful stop."""

import errno
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import grpc
from grpc_health.v1 import health_pb2_grpc

from localmesh.rpc import health, interceptors, reflection
from localmesh.rpc.addresses import Listen, advertised, join_host_port, parse_listen
from localmesh.rpc.errors import ConfigError, ListenFailed
from localmesh.rpc.health import HealthBook, HealthServicer
from localmesh.rpc.identity import IdentityPolicy
from localmesh.rpc.tls import TlsFiles, server_credentials

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How a server listens."""

    listen: str = "127.0.0.1:0"
    """HOST:PORT, [IPV6]:PORT or unix:/PATH. Port 0 lets the system choose."""
    tls: TlsFiles | None = None
    client_auth: bool = True
    """With TLS: callers must show a certificate of the mesh."""
    insecure: bool = False
    """Allow an address that other machines reach without TLS."""
    max_message_bytes: int = 64 << 20
    """Largest message, either way."""
    drain_seconds: float = 10.0
    """How long running calls may go on when the server stops."""
    advertise: str = ""
    """Host, or HOST:PORT, that others shall use; the address listened on where empty."""


def server_options(max_message_bytes: int) -> dict[str, int]:
    """Return the options of a server, by name."""
    return {
        # Two processes must not share a port unseen.
        "grpc.so_reuseport": 0,
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": max_message_bytes,
        # Our channels ping every 5 s, also when idle. Never answer that with GOAWAY too_many_pings.
        "grpc.http2.min_ping_interval_without_data_ms": 1_000,
        "grpc.http2.max_ping_strikes": 0,
        "grpc.keepalive_permit_without_calls": 1,
        # A caller that is frozen or gone without a word is cut off, and its calls are cancelled.
        "grpc.keepalive_time_ms": 10_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.ping_timeout_ms": 10_000,
        # Who connects and says nothing does not stay.
        "grpc.server_handshake_timeout_ms": 10_000,
    }


class GrpcServer:
    """A server on one address. An async context manager: entered it serves, left it has stopped gracefully.

    Add services, then start. Health says NOT_SERVING for the server ("") and for each service until the component calls
    `health.set_serving`; `start` does it for all of them unless told otherwise.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        name: str,
        interceptors: Iterable[Any] = (),
        identity_policy: IdentityPolicy | None = None,
        generic_handlers: Iterable[Any] = (),
    ) -> None:
        """Prepare a server.

        Args:
            config: How it listens.
            name: What it is, for messages and logs: "router", "replica tiny/n1/0".
            interceptors: The component's own, called inside ours.
            identity_policy: Who may call what. In force only where callers must show a certificate.
            generic_handlers: Asked for methods that no added service has, e.g. a proxy.

        Raises:
            ConfigError: The address cannot be read, or would be open to other machines without TLS.
        """
        self._config = config
        self._name = name
        self._listen = check_listen(config)
        guarded = config.tls is not None and config.client_auth
        self._interceptors = (identity_policy if guarded else None, tuple(interceptors))
        self._generic_handlers = tuple(generic_handlers)
        self._added: list[tuple[Callable[[Any, Any], None], Any]] = []
        self._services: list[str] = []
        self._server: Any = None
        self._port = 0
        self.health = HealthBook()

    def add(self, register: Callable[[Any, Any], None], servicer: Any, service: str) -> None:
        """Add a service.

        Args:
            register: The generated `add_..._to_server`.
            servicer: Its asyncio implementation.
            service: Full name, e.g. "localmesh.v1.RouterService".
        """
        self._added.append((register, servicer))
        self.announce(service)

    def announce(self, service: str) -> None:
        """Have reflection and health name a service that a generic handler serves."""
        if service not in self._services:
            self._services.append(service)
            self.health.set_serving(service, False)

    @property
    def port(self) -> int:
        """The port, once started; 0 for a unix socket."""
        return self._port

    @property
    def endpoint(self) -> str:
        """The address that others shall use, once started."""
        return advertised(self._listen, self._port, self._config.advertise)

    async def start(self, *, serving: bool = True) -> None:
        """Listen and serve.

        Args:
            serving: Say SERVING for the server and all services at once.

        Raises:
            ListenFailed: The address is in use, or not one of this machine, or not allowed.
            TlsConfigError: The TLS files cannot be used.
        """
        policy, own = self._interceptors
        server = grpc.aio.server(
            interceptors=interceptors.chain(policy, own),
            options=list(server_options(self._config.max_message_bytes).items()),
        )
        registrar = _Registrar(server)
        for register, servicer in self._added:
            register(servicer, registrar)
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(self.health), registrar)
        server.add_generic_rpc_handlers(reflection.handlers([*self._services, health.SERVICE]))
        server.add_generic_rpc_handlers(self._generic_handlers)
        self._port = self._bind(server)
        await server.start()
        self._server = server
        if serving:
            for service in ("", *self._services):
                self.health.set_serving(service, True)
        _log.info("%s listens on %s", self._name, self._listen if self._listen.path else self.endpoint)

    async def stop(self, grace: float | None = None) -> None:
        """Stop gracefully: say NOT_SERVING, take no new call, let running ones finish, then cancel what is left.

        Args:
            grace: Seconds that running calls get; the configured time where None.
        """
        self.health.close()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(self._config.drain_seconds if grace is None else grace)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        await self.stop()

    def __repr__(self) -> str:
        """Show name, address and state."""
        return f"<GrpcServer {self._name} {self._listen} {'up' if self._server is not None else 'down'}>"

    def _bind(self, server: Any) -> int:
        tls = self._config.tls
        credentials = server_credentials(tls, client_auth=self._config.client_auth) if tls is not None else None
        address = str(self._listen)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise _listen_failed(self._name, self._listen) from error
        return 0 if self._listen.path else int(port)


class _Registrar:
    """Stands in for the server towards generated code: adds services by their generic handlers only.

    What generated code also does, registering each method by itself, makes grpc.aio wait for one future per method at
    every call (1.85): 5 % more CPU for each call of a server with nine methods.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Do nothing."""


def check_listen(config: ServerConfig) -> Listen:
    """Return where a server would listen; for components that do something else first.

    Raises:
        ConfigError: The address cannot be read, or would be open to other machines without TLS.
    """
    listen = parse_listen(config.listen)
    if config.tls is None and not listen.loopback and not config.insecure:
        raise ConfigError(
            f"{listen} can be reached by other machines, and there is no TLS. Give a certificate, key and CA, or listen"
            " on 127.0.0.1 or [::1], or say --insecure where everybody on that network may use the mesh.",
            field="listen",
        )
    return listen


_SAID: Final = {
    errno.EADDRINUSE: "is in use. Stop what listens there, or choose another port (0 lets the system choose).",
    errno.EADDRNOTAVAIL: "is not an address of this machine.",
    errno.EACCES: "may not be used by this user: ports below 1024 are for root.",
}


def _listen_failed(name: str, listen: Listen) -> ListenFailed:
    """Return the error for an address that gRPC could not bind; gRPC does not tell why, the system does."""
    if listen.path:
        return ListenFailed(
            f"{name} cannot listen on the unix socket {listen.path}: its folder must exist and be writable",
            field="listen",
        )
    where = join_host_port(listen.host, listen.port)
    said = "cannot be listened on."
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror:
        said = "names no address."
    except OSError as error:
        said = _SAID.get(error.errno or 0, f"cannot be listened on: {error.strerror}.")
    what = f"port {listen.port} of {listen.host}" if said == _SAID[errno.EADDRINUSE] else where
    return ListenFailed(f"{name} cannot start: {what} {said}", field="listen", port=listen.port)
