"""Who is calling, and who may call what.

A certificate of the mesh names its holder by a URI, "localmesh://MESH/ROLE/NAME". What a role may do is in the tables
below; a servicer checks what only the request shows (that a node speaks for itself) with `require_node`.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, Literal, get_args

from localmesh.core.errors import PermissionDenied, Unauthenticated

Role = Literal["operator", "node", "router", "registry", "client"]
ROLES: Final[frozenset[str]] = frozenset(get_args(Role))

SCHEME: Final = "localmesh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The holder of a certificate."""

    mesh: str
    role: str
    """One of ROLES."""
    name: str
    key_fingerprint: str = ""
    """SHA-256 of the public key (DER, SubjectPublicKeyInfo), in hexadecimal."""

    @property
    def uri(self) -> str:
        """The name in the certificate."""
        return f"{SCHEME}://{self.mesh}/{self.role}/{self.name}"

    def __str__(self) -> str:
        """Return role and name, for messages."""
        return f"{self.role}/{self.name}"


IdentityPolicy = Callable[[str, Identity | None], None]
"""Called with the full method name and the caller; returns, or raises Unauthenticated or PermissionDenied."""


def parse_uri(uri: str, *, key_fingerprint: str = "") -> Identity | None:
    """Return the identity that a URI names, or None where it names none."""
    scheme, separator, rest = uri.partition("://")
    parts = rest.split("/")
    if scheme != SCHEME or not separator or len(parts) != 3 or not all(parts) or parts[1] not in ROLES:
        return None
    return Identity(mesh=parts[0], role=parts[1], name=parts[2], key_fingerprint=key_fingerprint)


def server_name(role: str, name: str) -> str:
    """Return the DNS name that every certificate of the mesh carries for its holder.

    A caller that knows whom it wants asks for this name instead of the address, so that a stolen key of another node
    does not pass, whatever addresses change hands. The role is fixed by the suffix: no name can pose as another role.
    """
    return f"{name}.{role}.{SCHEME}.internal".lower()


def key_fingerprint(public_key_der: bytes) -> str:
    """Return the SHA-256 of a public key (DER, SubjectPublicKeyInfo), in hexadecimal."""
    return sha256(public_key_der).hexdigest()


def same_secret(given: str, expected: str) -> bool:
    """Whether a secret is the expected one. Takes as long for a wrong one as for a right one; an empty one never is."""
    digests = (sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, expected))
    return hmac.compare_digest(*digests) and bool(expected)


def peer_identity(context: Any) -> Identity | None:
    """Return who calls, from the certificate of the connection; None without TLS or without a name of a mesh."""
    auth = context.auth_context()
    pems = auth.get("x509_pem_cert")
    return _identity_of(bytes(next(iter(pems)))) if pems else None


@lru_cache(maxsize=256)
def _identity_of(pem: bytes) -> Identity | None:
    from cryptography import x509  # here, because it takes long to load and is for TLS only
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    certificate = x509.load_pem_x509_certificate(pem)
    der = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    found = (
        parse_uri(uri, key_fingerprint=key_fingerprint(der))
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier)
    )
    return next((identity for identity in found if identity is not None), None)


def require_node(identity: Identity | None, node: str) -> None:
    """Check that a caller speaks for the node that its request names. Without TLS (None) everybody may.

    Raises:
        PermissionDenied: It is another node, or no node.
    """
    if identity is None:
        return
    if identity.role != "node" or identity.name != node:
        raise PermissionDenied(
            f"{identity} may not speak for the node {node}: use that node's certificate", identity=str(identity)
        )


_EVERY_ROLE: Final = ROLES
_READERS: Final = frozenset({"operator", "client", "router", "node", "registry"})

_NODE_METHODS: Final = ("Register", "Heartbeat", "Deregister")
_OPERATOR_METHODS: Final = (
    *("ApplyModel", "DeleteModel", "ApproveNode", "CordonNode", "UncordonNode", "DrainNode", "ResumeNode"),
    *("RemoveNode", "SetNodeLabels", "SetNodeOverrides", "ResetNodeOverrides"),
)
_REGISTRY: Final = "/localmesh.v1.RegistryService/"

REGISTRY_METHODS: Final[Mapping[str, frozenset[str]]] = {
    **{_REGISTRY + method: frozenset({"node"}) for method in _NODE_METHODS},
    **{_REGISTRY + method: frozenset({"operator"}) for method in _OPERATOR_METHODS},
    **{_REGISTRY + method: _READERS for method in ("GetModel", "ListModels", "ListNodes", "ListReplicas")},
}
"""Roles that may call each method of the registry. A method without a row is for operators only."""

_BACKEND_CHANGES: Final = ("Install", "Upgrade", "Delete")

ROUTER_METHODS: Final[Mapping[str, frozenset[str]]] = {
    "/localmesh.v1.RouterService/ReleaseGuard": frozenset({"operator"}),
    **{f"/localmesh.v1.RouterService/{verb}NodeBackend": frozenset({"operator"}) for verb in _BACKEND_CHANGES},
}
"""Methods of the router that are not for every identity of the mesh."""

WORKER_METHODS: Final[Mapping[str, frozenset[str]]] = {
    f"/localmesh.v1.WorkerService/{verb}Backend": frozenset({"operator", "router"}) for verb in _BACKEND_CHANGES
}
"""Methods of a worker that are not for every identity of the mesh. A router has checked whom it asks for."""

OPEN_PREFIXES: Final = ("/grpc.health.v1.", "/grpc.reflection.")
"""Services that every identity of the mesh may call on every component."""


def mesh_policy(
    mesh: str, methods: Mapping[str, frozenset[str]] | None = None, *, default: frozenset[str] = _EVERY_ROLE
) -> IdentityPolicy:
    """Return a policy: callers are of this mesh, and have one of the roles that the table gives a method.

    Args:
        mesh: Name of the mesh.
        methods: Roles by full method name.
        default: Roles for methods without a row.
    """
    table = dict(methods or {})

    def check(method: str, identity: Identity | None) -> None:
        if identity is None or identity.mesh != mesh:
            raise Unauthenticated(
                f"this is a component of the mesh {mesh!r}: call it with a certificate that its CA has issued"
            )
        allowed = ROLES if method.startswith(OPEN_PREFIXES) else table.get(method, default)
        if identity.role not in allowed:
            who = ", ".join(sorted(allowed))
            raise PermissionDenied(f"{identity} may not call {method}: it is for {who}", identity=str(identity))

    return check


def registry_policy(mesh: str) -> IdentityPolicy:
    """Return the registry's policy: nodes register themselves, operators change, everybody of the mesh reads."""
    return mesh_policy(mesh, REGISTRY_METHODS, default=frozenset({"operator"}))


def router_policy(mesh: str) -> IdentityPolicy:
    """Return the router's policy: every identity of the mesh may call it, operators change what nodes have."""
    return mesh_policy(mesh, ROUTER_METHODS)


def worker_policy(mesh: str) -> IdentityPolicy:
    """Return the worker's policy: every identity of the mesh may look, operators change what it has."""
    return mesh_policy(mesh, WORKER_METHODS)


def replica_policy(mesh: str) -> IdentityPolicy:
    """Return a replica's policy: every identity of the mesh may use it."""
    return mesh_policy(mesh)
