"""Addresses that servers listen on and tell others."""

import ipaddress
import socket
from dataclasses import dataclass

from localmesh.rpc.errors import ConfigError

_LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "localhost.localdomain"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """An address to listen on: host and port, or the path of a unix socket."""

    host: str = ""
    port: int = 0
    """0 lets the system choose."""
    path: str = ""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.path or self.host in _LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def wildcard(self) -> bool:
        """Whether it stands for every address of the machine."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def __str__(self) -> str:
        """Return it as gRPC takes it."""
        return f"unix:{self.path}" if self.path else join_host_port(self.host, self.port)


def parse_listen(text: str) -> Listen:
    """Read "127.0.0.1:0", "[::1]:9500", "localhost:9500" or "unix:/path".

    Raises:
        ConfigError: It is none of these.
    """
    if text.startswith("unix:"):
        path = "/" + text.removeprefix("unix:").lstrip("/")
        if len(path.encode()) > 107 or path == "/":
            raise ConfigError(f"not a path for a unix socket: {path!r} (1 to 107 bytes)", field="listen")
        return Listen(path=path)
    host, port = split_host_port(text)
    return Listen(host=host, port=port)


def split_host_port(text: str) -> tuple[str, int]:
    """Split "host:port"; an IPv6 address stands in brackets.

    Raises:
        ConfigError: It is no such thing.
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    well_formed = separator and host and (":" in host) == bracketed and port.isascii() and port.isdigit()
    if not well_formed or int(port) > 65535:
        raise ConfigError(
            f"not an address: {text!r} (expected HOST:PORT with an IPv6 address in brackets, or unix:/PATH)",
            field="listen",
        )
    return host, int(port)


def join_host_port(host: str, port: int) -> str:
    """Return "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised(listen: Listen, port: int, advertise: str) -> str:
    """Return the address under which others reach a server.

    Args:
        listen: What it listens on.
        port: The port it got.
        advertise: What the operator says others shall use: a host, or host:port; may be empty.

    Raises:
        ConfigError: `advertise` is neither.
    """
    if listen.path:
        return str(listen)
    if advertise:
        if is_address(advertise) or ":" not in advertise:
            return join_host_port(advertise.strip("[]"), port)
        if advertise.startswith("[") and advertise.endswith("]"):
            return f"{advertise}:{port}"
        host, told = split_host_port(advertise)
        return join_host_port(host, told or port)
    return join_host_port(own_address(listen.host) if listen.wildcard else listen.host, port)


def host_of(advertise: str) -> str:
    """Return the host of what an operator says others shall use (a host, or host:port), without brackets; may be empty.

    Raises:
        ConfigError: It is neither.
    """
    if is_address(advertise) or ":" not in advertise:
        return advertise
    if advertise.startswith("[") and advertise.endswith("]"):
        return advertise[1:-1]
    return split_host_port(advertise)[0]


def is_address(text: str) -> bool:
    """Whether the text is a bare IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def own_address(wildcard: str) -> str:
    """Return the address by which this machine would reach others, loopback where it has no other.

    Nothing is sent: connecting a datagram socket only asks the routing table.
    """
    family, target, fallback = (
        (socket.AF_INET6, "2001:db8::1", "::1") if ":" in wildcard else (socket.AF_INET, "192.0.2.1", "127.0.0.1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return fallback
        return str(probe.getsockname()[0])
