"""The node's key: made at the first start, kept in the state folder. The mesh knows a node by its name and this key."""

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from localmesh.rpc.errors import ConfigError
from localmesh.rpc.identity import key_fingerprint

KEY_FILE = "node-key.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeIdentity:
    """A node's public key, and where the private one is."""

    key_path: Path
    public_key: bytes
    """DER, SubjectPublicKeyInfo."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, in hexadecimal."""
        return key_fingerprint(self.public_key)


def load_or_create(state_dir: Path) -> NodeIdentity:
    """Return the identity kept in a folder; the first time, make one.

    The private key is an EC P-256 key in PEM, readable by its owner only. Two workers that start at once on the same
    folder get the same key.

    Raises:
        ConfigError: The file is there, but is no such key.
        OSError: The folder cannot be used.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state_dir / KEY_FILE
    if not path.exists():
        _create(path)
    return NodeIdentity(key_path=path, public_key=_public_der(_load(path)))


def certificate_identity(cert: Path, key: Path) -> NodeIdentity:
    """Return the identity of a node that was given a certificate: with TLS the mesh sees that one.

    Raises:
        ConfigError: The file is no certificate.
        OSError: It cannot be read.
    """
    try:
        public = x509.load_pem_x509_certificate(cert.read_bytes()).public_key()
    except ValueError as error:
        raise ConfigError(f"{cert} is not a PEM certificate", field="tls.cert") from error
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return NodeIdentity(key_path=key, public_key=der)


def certificate_request(identity: NodeIdentity, *, node: str) -> bytes:
    """Return a certificate signing request, DER, for the node's name, signed with its key."""
    key = _load(identity.key_path)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def _create(path: Path) -> None:
    text = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    temporary = path.with_name(f"{KEY_FILE}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # a link, not a rename: whoever comes second must not replace the key of the first
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is not a private key: restore it, or delete it to give the node a new identity (which the mesh"
            " refuses under the old name until an operator approves it)",
            field="state_dir",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an EC key", field="state_dir")
    return key


def _public_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
