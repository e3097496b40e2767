"""Certificates as another tool makes them: an RSA root, an intermediate CA, the chain in the file, P-384 keys."""

import datetime
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from localmesh.rpc.tls import TlsFiles

_PEM = serialization.Encoding.PEM


class OtherCa:
    """A root that signs an intermediate, which signs what is asked for."""

    def __init__(self, folder: Path, mesh: str) -> None:
        self._folder = folder
        self._mesh = mesh
        folder.mkdir(parents=True, exist_ok=True)
        root_key, self._key = _new_key(), _new_key()
        root_name, self._name = _name("Example Root"), _name("Example Issuing CA")
        root = _authority(_draft(root_name, root_name, root_key, hours=24)).sign(root_key, hashes.SHA256())
        issuing = _authority(_draft(self._name, root_name, self._key, hours=24)).sign(root_key, hashes.SHA256())
        self.ca = folder / "root.pem"
        self.ca.write_bytes(root.public_bytes(_PEM))
        self._chain = issuing.public_bytes(_PEM)

    def issue(
        self, role: str, name: str, *, hosts: Iterable[str] = ("127.0.0.1", "::1"), hours: float = 1.0, mesh: str = ""
    ) -> TlsFiles:
        """Write a certificate that is valid since two hours and for so many more, its chain and its key.

        Issued again under the same name the files are replaced.
        """
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(host)) for host in hosts]
        if role:
            names.append(x509.UniformResourceIdentifier(f"localmesh://{mesh or self._mesh}/{role}/{name}"))
            names.append(x509.DNSName(f"{name}.{role}.localmesh.internal"))
        key = ec.generate_private_key(ec.SECP384R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        leaf = (
            _draft(_name(name), self._name, key, hours=hours)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = TlsFiles(cert=self._folder / f"{role}-{name}.pem", key=self._folder / f"{role}-{name}.key", ca=self.ca)
        files.key.write_bytes(
            key.private_bytes(_PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
        )
        files.cert.write_bytes(leaf.public_bytes(_PEM) + self._chain)
        return files


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _draft(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, *, hours: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=2))
        .not_valid_after(now + datetime.timedelta(hours=hours))
    )


def _authority(draft: x509.CertificateBuilder) -> x509.CertificateBuilder:
    return draft.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
