"""Certificates that `up --listen` issues to its own components."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from localmesh.app.config import TlsSection
from localmesh.rpc.authority import CertificateAuthority, write_private
from localmesh.worker.identity import certificate_request, load_or_create


class Certificates:
    """The mesh's authority and where it puts what it issues. Blocking: short file operations."""

    def __init__(self, authority: CertificateAuthority, folder: Path) -> None:
        self._authority = authority
        self._folder = folder

    @classmethod
    def open(cls, state_dir: Path, mesh: str) -> Self:
        """Return the authority in the state folder; the first time, make it.

        Raises:
            ConfigError: What is there is no authority of this mesh.
            OSError: The folder cannot be used.
        """
        return cls(CertificateAuthority.load_or_create(state_dir / "ca", mesh), state_dir / "tls")

    def issue(self, role: str, name: str, hosts: Iterable[str]) -> TlsSection:
        """Issue a certificate with a new key to a component of this machine."""
        files = self._authority.issue_files(self._folder / f"{role}-{name}", role, name, hosts)
        return TlsSection(cert=files.cert, key=files.key, ca=files.ca)

    def issue_node(self, node_folder: Path, name: str, hosts: Iterable[str]) -> TlsSection:
        """Issue a certificate for the key that a node has, or gets now: the mesh knows the node by it."""
        identity = load_or_create(node_folder)
        request = certificate_request(identity, node=name)
        return keep(
            node_folder,
            key=identity.key_path,
            certificate=self._authority.sign(request, "node", name, hosts),
            ca=self._authority.ca_pem,
        )


def keep(node_folder: Path, *, key: Path, certificate: bytes, ca: bytes) -> TlsSection:
    """Put a node's certificate beside its key."""
    folder = node_folder / "tls"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(folder / "ca.pem", ca)
    write_private(folder / "cert.pem", certificate)
    return TlsSection(cert=folder / "cert.pem", key=key, ca=folder / "ca.pem")
