"""How to reach etcd: endpoints, credentials and time-outs."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """`endpoints` are `host:port`, `[v6]:port` or `http(s)://` URLs; the first that answers is kept.

    TLS is used when `ca_pem` is set or an endpoint says https (then with the system's CAs). Times in seconds:
    `try_timeout_seconds` bounds one try of a call that may be repeated, `write_timeout_seconds` the wait for
    the answer to a write (then it is an UnknownOutcome), `deadline_seconds` a call with all its tries.
    """

    endpoints: tuple[str, ...]
    user: str = ""
    password: str = ""
    ca_pem: bytes | None = None
    cert_pem: bytes | None = None
    key_pem: bytes | None = None
    try_timeout_seconds: float = 0.5
    write_timeout_seconds: float = 2.0
    deadline_seconds: float = 5.0
    # A stream that was silent for this long has its peer asked whether it is still there.
    probe_interval_seconds: float = 1.0
    max_message_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("no etcd endpoint given")
        if (self.cert_pem is None) != (self.key_pem is None):
            raise ValueError("a client certificate and its key are given together or not at all")
        if self.cert_pem is not None and self.ca_pem is None:
            raise ValueError("a client certificate needs the CA that etcd's certificate is checked against")
        if self.password and not self.user:
            raise ValueError("an etcd password without a user")
        for name in ("try_timeout_seconds", "write_timeout_seconds", "deadline_seconds", "probe_interval_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        for endpoint in self.endpoints:
            parse_endpoint(endpoint, tls_configured=self.ca_pem is not None)

    def __repr__(self) -> str:
        secret = " password=***" if self.password else ""
        tls = "mtls" if self.cert_pem else "tls" if self.ca_pem else "plain"
        return f"EtcdConfig({','.join(self.endpoints)} {tls} user={self.user!r}{secret})"


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint as gRPC wants it."""

    address: str
    tls: bool


def parse_endpoint(endpoint: str, *, tls_configured: bool) -> Target:
    """Return where to connect to. Raises ValueError with a sentence that names the endpoint."""
    if "://" not in endpoint:
        return Target(_checked(endpoint, endpoint), tls_configured)
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https"):
        raise ValueError(f"etcd endpoint {endpoint!r}: only http and https URLs are known")
    if url.path not in ("", "/") or url.query or url.fragment or url.username:
        raise ValueError(f"etcd endpoint {endpoint!r}: give scheme, host and port only")
    if url.scheme == "http" and tls_configured:
        raise ValueError(f"etcd endpoint {endpoint!r} says http, but a CA is configured: say https")
    return Target(_checked(url.netloc, endpoint), url.scheme == "https")


def _checked(netloc: str, endpoint: str) -> str:
    host, colon, port = netloc.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"etcd endpoint {endpoint!r} is not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"etcd endpoint {endpoint!r}: write an IPv6 address in brackets, as [::1]:2379")
    return netloc
