"""How a new machine gets its certificate: a join token, shown once by the operator, typed once on that machine.

A token is "HOST:PORT/SECRET.PIN". The pin is the SHA-256 of the listener's certificate, so the newcomer knows whom it
talks to before the mesh's authority means anything to it; the secret says that it may come in.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import secrets
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import unquote

import grpc

from localmesh.core.clock import Clock
from localmesh.core.errors import ComponentUnreachable, JoinTokenInvalid
from localmesh.rpc.addresses import join_host_port, split_host_port
from localmesh.rpc.authority import CertificateAuthority, self_signed, write_files
from localmesh.rpc.channels import channel_options
from localmesh.rpc.convert import node_name_of
from localmesh.rpc.errors import ConfigError, from_rpc_error
from localmesh.rpc.tls import TlsFiles
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc

LISTENER_NAME: Final = "enrollment.localmesh.internal"
SERVICE: Final = "localmesh.v1.EnrollmentService"
DEFAULT_TTL_SECONDS: Final = 24 * 3600.0
_SECRET_BYTES: Final = 24
_CONNECT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """What a newcomer needs to know."""

    host: str
    port: int
    secret: str
    pin: str
    """SHA-256 of the listener's certificate (DER), base64url without padding."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str()` wrote.

        Raises:
            JoinTokenInvalid: It is no token; the text itself is not repeated, it is a secret.
        """
        address, _, rest = text.strip().partition("/")
        secret, _, pin = rest.partition(".")
        try:
            host, port = split_host_port(address)
            well_formed = len(_decode(secret)) >= 16 and len(_decode(pin)) == sha256().digest_size and port > 0
        except (ConfigError, ValueError, binascii.Error):
            well_formed = False
        if not well_formed:
            raise JoinTokenInvalid("that is no join token: expected HOST:PORT/SECRET.PIN, as `up --listen` prints it")
        return cls(host=host, port=port, secret=secret, pin=pin)

    def __str__(self) -> str:
        """Return the token as the operator passes it on. It is a secret."""
        return f"{join_host_port(self.host, self.port)}/{self.secret}.{self.pin}"

    def __repr__(self) -> str:
        """Show where it leads, not the secret."""
        return f"<JoinToken {join_host_port(self.host, self.port)}>"


class JoinSecrets:
    """The secrets that let newcomers in, each until it expires. Kept in memory: they end with the listener."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._expiry: dict[str, float] = {}

    def issue(self, *, ttl_seconds: float = DEFAULT_TTL_SECONDS) -> str:
        """Return a new secret that may be used, any number of times, until it expires."""
        secret = _encode(secrets.token_bytes(_SECRET_BYTES))
        self._expiry[secret] = self._clock.monotonic() + ttl_seconds
        return secret

    def check(self, secret: str) -> None:
        """Accept a secret that was issued and has not expired. Takes as long for a wrong one as for a right one.

        Raises:
            JoinTokenInvalid: It is not one.
        """
        now, given, accepted = self._clock.monotonic(), secret.encode("utf-8", "replace"), False
        for known, expiry in self._expiry.items():
            accepted |= hmac.compare_digest(known.encode(), given) and now < expiry
        if not accepted:
            raise JoinTokenInvalid("the join token is wrong or has expired: get a new one where the mesh runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """What the enrolment listener shows."""

    tls: TlsFiles
    """For ServerConfig, with client_auth=False."""
    pin: str


def make_listener(folder: Path, *, clock: Clock | None = None) -> Listener:
    """Make the listener's certificate, one that vouches for itself, in a folder of its own.

    Raises:
        OSError: The folder cannot be written.
    """
    certificate, key = self_signed(LISTENER_NAME, clock=clock)
    files = write_files(folder, certificate=certificate, key=key, ca=certificate)
    return Listener(tls=files, pin=_pin(ssl.PEM_cert_to_DER_cert(certificate.decode())))


class EnrollmentServicer(registry_service_pb2_grpc.EnrollmentServiceServicer):
    """Exchanges a join token for a certificate.

    Args:
        authority: Signs.
        join_secrets: Says who may come in.
        registries: Addresses that the newcomer shall use.
        admit: Called with the node's name and the DER public key before anything is handed out; raises NodeNameTaken
            where the name belongs to another key.
    """

    def __init__(
        self,
        authority: CertificateAuthority,
        join_secrets: JoinSecrets,
        *,
        registries: Sequence[str],
        admit: Callable[[str, bytes], Awaitable[None]],
    ) -> None:
        self._authority = authority
        self._secrets = join_secrets
        self._registries = tuple(registries)
        self._admit = admit

    async def Enroll(self, request: pb.EnrollRequest, context: Any) -> pb.EnrollResponse:
        """See the protocol."""
        self._secrets.check(request.token)
        node = node_name_of(request.node)
        peer = peer_host(context.peer())
        certificate = self._authority.sign(request.certificate_request, "node", node, [peer] if peer else [])
        await self._admit(node, _public_key(certificate))
        return pb.EnrollResponse(
            certificate=certificate,
            ca_certificate=self._authority.ca_pem,
            registries=self._registries,
            mesh=self._authority.mesh,
        )


async def enroll(
    token: JoinToken, *, node: str, certificate_request: bytes, timeout_seconds: float = 30.0
) -> pb.EnrollResponse:
    """Exchange a token for a certificate.

    Args:
        token: As the operator gave it.
        node: Name that the node wants.
        certificate_request: DER, signed with the node's own key.
        timeout_seconds: For the whole exchange.

    Raises:
        JoinTokenInvalid: The listener is not the one that the token was made for, or does not take the token.
        NodeNameTaken: The name belongs to another key.
        ComponentUnreachable: There is nobody at the token's address.
    """
    endpoint = join_host_port(token.host, token.port)
    shown = await _certificate_shown_at(token.host, token.port)
    if not hmac.compare_digest(_pin(shown), token.pin):
        raise JoinTokenInvalid(
            f"{endpoint} does not show the certificate that the join token was made for: somebody else answers there,"
            " or the mesh was started anew since. Get a new token where the mesh runs."
        )
    credentials = grpc.ssl_channel_credentials(root_certificates=ssl.DER_cert_to_PEM_cert(shown).encode())
    options = channel_options(extra={"grpc.ssl_target_name_override": LISTENER_NAME})
    async with grpc.aio.secure_channel(endpoint, credentials, options=options) as channel:
        stub = registry_service_pb2_grpc.EnrollmentServiceStub(channel)
        request = pb.EnrollRequest(token=token.secret, node=node, certificate_request=certificate_request)
        try:
            response: pb.EnrollResponse = await stub.Enroll(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, endpoint=endpoint) from error
    return response


async def _certificate_shown_at(host: str, port: int) -> bytes:
    """Return the certificate, DER, that a listener shows. It is not trusted yet: its pin is compared next."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    endpoint = join_host_port(host, port)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise ComponentUnreachable(
            f"nobody enrols workers at {endpoint}. Is `up --listen` running there, and is the port open?",
            endpoint=endpoint,
        ) from error
    shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    if shown is None:
        raise JoinTokenInvalid(f"{endpoint} shows no certificate")
    return shown


def peer_host(peer: str) -> str:
    """Return the IP address in a context's peer(), or an empty string: "ipv4:10.0.0.7:4711", "ipv6:%5B::1%5D:4711"."""
    kind, _, address = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""


def _public_key(certificate_pem: bytes) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = x509.load_pem_x509_certificate(certificate_pem).public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _pin(der: bytes) -> str:
    return _encode(sha256(der).digest())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
