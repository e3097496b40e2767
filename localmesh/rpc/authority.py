"""The mesh's own certificate authority: EC P-256, kept in a folder that only its owner may read."""

import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from localmesh.core.clock import Clock, SystemClock
from localmesh.core.errors import InvalidRequest
from localmesh.rpc.errors import ConfigError
from localmesh.rpc.identity import ROLES, Identity, server_name
from localmesh.rpc.tls import TlsFiles

CA_FILE: Final = "ca.pem"
CA_KEY_FILE: Final = "ca-key.pem"

_CA_DAYS: Final = 3650
_LEAF_DAYS: Final = 730
_SKEW: Final = timedelta(minutes=10)  # machines whose clocks differ a little must not refuse a new certificate
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


class CertificateAuthority:
    """Signs the certificates by which components of one mesh know each other."""

    def __init__(self, certificate: x509.Certificate, key: Any, clock: Clock | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._clock = clock or SystemClock()
        self.mesh = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        """Name of the mesh."""

    @classmethod
    def create(cls, folder: Path, mesh: str, *, clock: Clock | None = None) -> Self:
        """Make an authority and keep it in a new folder (mode 0700, files 0600).

        Raises:
            ConfigError: The folder is there and not empty, or the mesh's name cannot stand in a certificate.
            OSError: The folder cannot be written.
        """
        _check_name("mesh", mesh)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(mesh, key, clock or SystemClock(), days=_CA_DAYS, authority=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made aside and moved in whole, so that nobody ever sees half an authority.
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            write_private(aside / CA_KEY_FILE, _key_pem(key))
            write_private(aside / CA_FILE, _pem(certificate))
            aside.replace(folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if folder.is_dir() and any(folder.iterdir()):
                raise ConfigError(f"{folder} is not empty: an authority is not made over it", field="ca_dir") from error
            raise
        return cls(certificate, key, clock)

    @classmethod
    def load(cls, folder: Path, *, clock: Clock | None = None) -> Self:
        """Return the authority that a folder holds.

        Raises:
            ConfigError: It holds none.
        """
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
            key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder} holds no certificate authority: it needs {CA_FILE} and {CA_KEY_FILE} in PEM", field="ca_dir"
            ) from error
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{CA_KEY_FILE} in {folder} is not the key of {CA_FILE}", field="ca_dir")
        return cls(certificate, key, clock)

    @classmethod
    def load_or_create(cls, folder: Path, mesh: str, *, clock: Clock | None = None) -> Self:
        """Return the authority that a folder holds; the first time, make it. Two that do so at once get the same.

        Raises:
            ConfigError: The folder holds something else, or the authority of another mesh.
        """
        if not (folder / CA_FILE).exists():
            try:
                return cls.create(folder, mesh, clock=clock)
            except ConfigError:
                if not (folder / CA_FILE).exists():
                    raise
        loaded = cls.load(folder, clock=clock)
        if loaded.mesh != mesh:
            raise ConfigError(
                f"{folder} holds the certificate authority of the mesh {loaded.mesh!r}, not of {mesh!r}", field="ca_dir"
            )
        return loaded

    @property
    def ca_pem(self) -> bytes:
        """The authority's certificate, PEM."""
        return _pem(self._certificate)

    def issue(self, role: str, name: str, hosts: Iterable[str] = ()) -> tuple[bytes, bytes]:
        """Return a new certificate and its new private key, both PEM.

        Args:
            role: One of localmesh.rpc.identity.ROLES.
            name: Who it is for.
            hosts: Addresses and host names at which it listens, besides loopback.

        Raises:
            ConfigError: Role or name are not acceptable.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        return self._certify(key.public_key(), role, name, hosts), _key_pem(key)

    def issue_files(self, folder: Path, role: str, name: str, hosts: Iterable[str] = ()) -> TlsFiles:
        """Issue a certificate and write it, its key and the authority's certificate into a folder, as `write_files`."""
        certificate, key = self.issue(role, name, hosts)
        return write_files(folder, certificate=certificate, key=key, ca=self.ca_pem)

    def sign(self, request_der: bytes, role: str, name: str, hosts: Iterable[str] = ()) -> bytes:
        """Return a certificate, PEM, for the public key of a signing request.

        Nothing else of the request counts: who the holder is, the caller of this says.

        Raises:
            InvalidRequest: It is no request, is not signed with its own key, or the key is too weak.
            ConfigError: Role or name are not acceptable.
        """
        try:
            request = x509.load_der_x509_csr(request_der)
            proven = request.is_signature_valid
            public = request.public_key()
        except (ValueError, TypeError) as error:
            raise InvalidRequest(
                "the certificate signing request cannot be read (expected DER)", field="certificate_request"
            ) from error
        if not proven or not _strong(public):
            raise InvalidRequest(
                "the certificate signing request is not signed with its own key, or the key is too weak (expected EC"
                " P-256 or better, Ed25519, or RSA of 2048 bits or more)",
                field="certificate_request",
            )
        return self._certify(public, role, name, hosts)

    def _certify(self, public: Any, role: str, name: str, hosts: Iterable[str]) -> bytes:
        _check_name("name", name)
        if role not in ROLES:
            raise ConfigError(f"no such role: {role!r} (expected one of {', '.join(sorted(ROLES))})", field="role")
        identity = Identity(mesh=self.mesh, role=role, name=name)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(identity.uri),
            x509.DNSName(server_name(role, name)),
        ]
        names += [_general_name(host) for host in dict.fromkeys([*_LOOPBACK, *hosts]) if host]
        authority = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        now = _now(self._clock)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(min(now + timedelta(days=_LEAF_DAYS), self._certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate)


def self_signed(name: str, *, clock: Clock | None = None) -> tuple[bytes, bytes]:
    """Return a certificate that vouches for itself, and its key, both PEM: for the enrolment listener."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(name, key, clock or SystemClock(), days=_LEAF_DAYS, authority=False)
    return _pem(certificate), _key_pem(key)


def write_files(folder: Path, *, certificate: bytes, key: bytes, ca: bytes) -> TlsFiles:
    """Write an identity into a folder (mode 0700, files 0600), each file whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = TlsFiles(cert=folder / "cert.pem", key=folder / "key.pem", ca=folder / CA_FILE)
    write_private(files.ca, ca)
    write_private(files.key, key)
    write_private(files.cert, certificate)
    return files


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read; a reader sees the old content or the new, and a crash loses neither.

    Raises:
        OSError: It cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _self_signed(
    name: str, key: ec.EllipticCurvePrivateKey, clock: Clock, *, days: int, authority: bool
) -> x509.Certificate:
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "localmesh"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    now, public = _now(clock), key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(_usage(signs_certificates=authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    if not authority:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(key, hashes.SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _strong(public: Any) -> bool:
    if isinstance(public, ec.EllipticCurvePublicKey):
        return public.curve.name in ("secp256r1", "secp384r1", "secp521r1")
    if isinstance(public, rsa.RSAPublicKey):
        return public.key_size >= 2048
    return isinstance(public, ed25519.Ed25519PublicKey)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"not a {what} that a certificate can carry: {name!r} (1 to 63 of letters, digits, '.', '_', '-', the first"
            " a letter or digit)",
            field=what,
        )


def _now(clock: Clock) -> datetime:
    return datetime.fromtimestamp(int(clock.time()), UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
