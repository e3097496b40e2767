"""TLS from files: what a server and a channel show, read again when the files change."""

import logging
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from localmesh.core.clock import Clock, SystemClock
from localmesh.rpc.errors import ConfigError

_log = logging.getLogger(__name__)
_WARN_SECONDS = 14 * 24 * 3600.0
_WARN_PART = 0.2
"""A certificate that never was valid for long is no surprise until little of its time is left."""
_DAY = "%Y-%m-%d %H:%M UTC"


class TlsConfigError(ConfigError):
    """A certificate, key or CA file cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files by which a component shows who it is and knows whom to trust."""

    cert: Path
    """Own certificate, with the chain below the CA if there is one."""
    key: Path
    """Its private key."""
    ca: Path
    """Certificates that sign those of the mesh."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Material:
    cert: bytes
    key: bytes
    ca: bytes


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Return what changes when one of the files is replaced or rewritten."""
    stamps = []
    for path in (files.cert, files.key, files.ca):
        try:
            stat = path.stat()
        except OSError:
            stamps.append((0, 0, 0))
        else:
            stamps.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(stamps)


def _read(files: TlsFiles) -> _Material:
    parts = {}
    for name, path in (("cert", files.cert), ("key", files.key), ("ca", files.ca)):
        try:
            parts[name] = path.read_bytes()
        except OSError as error:
            raise TlsConfigError(
                f"cannot read the TLS {name} file {path}: {error.strerror}. Give certificate, key and CA as PEM files.",
                field=f"tls.{name}",
            ) from error
        if b"-----BEGIN " not in parts[name]:
            raise TlsConfigError(f"the TLS {name} file {path} is not PEM", field=f"tls.{name}")
    return _Material(**parts)


class _Reloader:
    """Reads the files again when they change, and keeps what it has while they cannot be read."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()  # gRPC asks from its own threads
        self._stamp = self._refused = _stamp(files)
        self._material = _read(files)

    def current(self) -> tuple[_Material, bool]:
        """Return the material, and whether it is new since the last call."""
        with self._lock:
            stamp = _stamp(self._files)
            if stamp in (self._stamp, self._refused):
                return self._material, False
            try:
                material = _checked(_read(self._files), self._files)
            except TlsConfigError as error:
                # Half-written: certificate and key are two files. The next change is looked at again.
                _log.warning("keeping the TLS files read before: %s", error)
                self._refused = stamp
                return self._material, False
            self._stamp = stamp
            changed = material != self._material
            self._material = material
            return material, changed


def _consistent(material: _Material) -> tuple[datetime, datetime]:
    """Check that key and certificate belong together, and return the times between which the certificate is valid.

    Raises:
        ValueError: They do not, or one of them is no PEM of its kind.
    """
    from cryptography import x509  # here, because it takes long to load and is for TLS only
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    certificate = x509.load_pem_x509_certificate(material.cert)
    key = load_pem_private_key(material.key, password=None)
    if key.public_key() != certificate.public_key():
        raise ValueError("the private key is not that of the certificate")
    x509.load_pem_x509_certificates(material.ca)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _check_validity(begin: datetime, end: datetime, path: Path, clock: Clock) -> None:
    """Refuse a certificate that nobody would accept, and warn of one that is about to become such.

    Raises:
        TlsConfigError: It is not valid now.
    """
    now = clock.time()
    if now >= end.timestamp():
        raise TlsConfigError(
            f"the TLS certificate {path} has expired on {end:{_DAY}}: nobody accepts it. Renew it; a worker that joined"
            " joins again with a new token, and `up` issues new ones when it starts.",
            field="tls.cert",
        )
    if now < begin.timestamp():
        raise TlsConfigError(
            f"the TLS certificate {path} is not valid before {begin:{_DAY}}, and here it is"
            f" {datetime.fromtimestamp(now, UTC):{_DAY}}: is this machine's clock right?",
            field="tls.cert",
        )
    if end.timestamp() - now < min(_WARN_SECONDS, _WARN_PART * (end - begin).total_seconds()):
        _log.warning("the TLS certificate %s expires on %s: renew it", path, format(end, _DAY))


def server_credentials(files: TlsFiles, *, client_auth: bool = True) -> Any:
    """Return grpc.ServerCredentials that follow the files: each new connection sees what is in them at that time.

    Args:
        files: What to show and whom to trust.
        client_auth: Ask callers for a certificate of the mesh, and refuse those without. Only the enrolment listener
            does not.

    Raises:
        TlsConfigError: A file cannot be read or used.
    """
    reloader = _Reloader(files)
    material, _ = reloader.current()
    _checked(material, files)

    def configuration(material: _Material) -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(material.key, material.cert)], root_certificates=material.ca if client_auth else None
        )

    def fetch() -> Any:
        material, changed = reloader.current()
        return configuration(material) if changed else None

    return grpc.dynamic_ssl_server_credentials(
        configuration(material), fetch, require_client_authentication=client_auth
    )


class ChannelTls:
    """Channel credentials made from files, made anew when the files change."""

    def __init__(self, files: TlsFiles) -> None:
        self._reloader = _Reloader(files)
        self._credentials = self._make(_checked(self._reloader.current()[0], files))

    def changed(self) -> bool:
        """Whether the files have changed since the last call; `credentials` returns new ones then."""
        material, changed = self._reloader.current()
        if changed:
            self._credentials = self._make(material)
        return changed

    def credentials(self) -> Any:
        """Return the grpc.ChannelCredentials."""
        return self._credentials

    @staticmethod
    def _make(material: _Material) -> Any:
        return grpc.ssl_channel_credentials(
            root_certificates=material.ca, private_key=material.key, certificate_chain=material.cert
        )


def _checked(material: _Material, files: TlsFiles) -> _Material:
    try:
        begin, end = _consistent(material)
    except (ValueError, TypeError) as error:
        raise TlsConfigError(
            f"the TLS certificate {files.cert} cannot be used with the key {files.key}: {error}", field="tls.cert"
        ) from error
    _check_validity(begin, end, files.cert, SystemClock())
    return material
