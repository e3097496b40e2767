"""Certificates of the mesh at work: who gets in, as whom, and what happens when the files change."""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from localmesh.core.errors import (
    ComponentUnreachable,
    InvalidRequest,
    JoinTokenInvalid,
    NodeNameTaken,
    PermissionDenied,
    Unauthenticated,
)
from localmesh.rpc import enrollment
from localmesh.rpc.authority import CertificateAuthority, write_files
from localmesh.rpc.channels import ChannelPool, open_channel
from localmesh.rpc.enrollment import EnrollmentServicer, JoinSecrets, JoinToken
from localmesh.rpc.errors import ConfigError, from_rpc_error
from localmesh.rpc.identity import Identity, IdentityPolicy, key_fingerprint, mesh_policy, peer_identity, server_name
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.rpc.tls import ChannelTls, TlsConfigError, TlsFiles
from localmesh.v1 import registry_service_pb2_grpc

WAIT = 10.0


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.wall = 1_900_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall


class WhoAmI(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Tells callers who they are."""

    def __init__(self) -> None:
        self.callers: list[Identity | None] = []

    def service(self, details: Any) -> Any:
        async def answer(request: bytes, context: Any) -> bytes:
            self.callers.append(peer_identity(context))
            return b"ok"

        return grpc.unary_unary_rpc_method_handler(answer) if details.method == "/t.T/Who" else None


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "home")


@pytest.fixture
def files(authority: CertificateAuthority, tmp_path: Path) -> Any:
    def make(role: str, name: str, *, of: CertificateAuthority | None = None) -> TlsFiles:
        return (of or authority).issue_files(tmp_path / f"{(of or authority).mesh}-{role}-{name}", role, name)

    return make


@contextlib.asynccontextmanager
async def serving(tls: TlsFiles, *, policy: IdentityPolicy | None = None) -> AsyncIterator[tuple[GrpcServer, WhoAmI]]:
    who = WhoAmI()
    config = ServerConfig(tls=tls, drain_seconds=1.0)
    async with GrpcServer(config, name="tls server", identity_policy=policy, generic_handlers=[who]) as server:
        yield server, who


async def ask(channel: Any) -> bytes:
    answer: bytes = await channel.unary_unary("/t.T/Who")(b"", timeout=WAIT)
    return answer


async def failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# identities


async def test_a_caller_is_known_by_its_certificate(files: Any) -> None:
    """F60."""
    mine = files("node", "n1")
    async with serving(files("registry", "r")) as (server, who), ChannelPool(mine) as pool:
        assert await ask(pool.get(server.endpoint)) == b"ok"
    public = x509.load_pem_x509_certificate(mine.cert.read_bytes()).public_key()
    fingerprint = key_fingerprint(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    assert who.callers == [Identity(mesh="home", role="node", name="n1", key_fingerprint=fingerprint)]


async def test_without_a_certificate_of_the_mesh_nobody_gets_in(files: Any, tmp_path: Path) -> None:
    """F60."""
    other = CertificateAuthority.create(tmp_path / "other-ca", "other")
    foreign = files("operator", "eve", of=other)
    ours = files("operator", "alice")
    mixed = TlsFiles(cert=foreign.cert, key=foreign.key, ca=ours.ca)
    async with serving(files("registry", "r")) as (server, who):
        anonymous = grpc.ssl_channel_credentials(root_certificates=ours.ca.read_bytes())
        async with grpc.aio.secure_channel(server.endpoint, anonymous) as channel:
            assert (await failed(ask(channel))).code() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(server.endpoint) as channel:
            assert (await failed(ask(channel))).code() is grpc.StatusCode.UNAVAILABLE
        for stranger in (foreign, mixed):
            async with ChannelPool(stranger) as pool:
                assert (await failed(ask(pool.get(server.endpoint)))).code() is grpc.StatusCode.UNAVAILABLE
        async with ChannelPool(ours) as pool:
            assert await ask(pool.get(server.endpoint)) == b"ok"
    assert [caller and caller.name for caller in who.callers] == ["alice"]


async def test_a_policy_decides_who_may_call_what(files: Any) -> None:
    """F60."""
    policy = mesh_policy("home", {"/t.T/Who": frozenset({"operator"})})
    async with serving(files("registry", "r"), policy=policy) as (server, who):
        async with ChannelPool(files("operator", "alice")) as pool:
            assert await ask(pool.get(server.endpoint)) == b"ok"
        async with ChannelPool(files("node", "n1")) as pool:
            assert isinstance(from_rpc_error(await failed(ask(pool.get(server.endpoint)))), PermissionDenied)
            unknown = pool.get(server.endpoint).unary_unary("/t.T/Other")(b"", timeout=WAIT)
            assert (await failed(unknown)).code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(who.callers) == 1
    async with serving(files("registry", "r"), policy=mesh_policy("elsewhere")) as (server, who):
        async with ChannelPool(files("operator", "alice")) as pool:
            assert isinstance(from_rpc_error(await failed(ask(pool.get(server.endpoint)))), Unauthenticated)


async def test_a_caller_that_names_whom_it_wants_is_not_served_by_another(files: Any) -> None:
    """F60."""
    async with serving(files("node", "n1")) as (server, _), ChannelPool(files("router", "r")) as pool:
        assert await ask(pool.get(server.endpoint, server_name=server_name("node", "n1"))) == b"ok"
        error = await failed(ask(pool.get(server.endpoint, server_name=server_name("node", "n2"))))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_tls_nobody_has_a_name_and_the_policy_is_not_asked() -> None:
    who = WhoAmI()
    server = GrpcServer(ServerConfig(), name="plain", identity_policy=mesh_policy("home"), generic_handlers=[who])
    async with server, ChannelPool() as pool:
        assert await ask(pool.get(server.endpoint)) == b"ok"
    assert who.callers == [None]


# files that change


def renew(files: TlsFiles, authority: CertificateAuthority, name: str) -> None:
    certificate, key = authority.issue("operator", name)
    write_files(files.cert.parent, certificate=certificate, key=key, ca=authority.ca_pem)


async def shown_name(server: GrpcServer) -> str:
    der = await enrollment._certificate_shown_at("127.0.0.1", server.port)
    subject = x509.load_der_x509_certificate(der).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


async def test_a_server_shows_a_new_certificate_without_restart(files: Any, authority: CertificateAuthority) -> None:
    """F60."""
    tls = files("operator", "old")
    async with serving(tls) as (server, _), ChannelPool(files("client", "c")) as pool:
        running = pool.get(server.endpoint)
        assert await ask(running) == b"ok"
        assert await shown_name(server) == "old"
        renew(tls, authority, "new")
        assert await shown_name(server) == "new"
        assert await ask(running) == b"ok"
        tls.cert.write_text("half of a certi")
        assert await shown_name(server) == "new"
        tls.cert.unlink()
        assert await shown_name(server) == "new"
        renew(tls, authority, "newer")
        assert await shown_name(server) == "newer"


async def test_a_server_follows_a_new_authority_without_restart(files: Any, tmp_path: Path) -> None:
    """F60."""
    tls, other = files("registry", "r"), CertificateAuthority.create(tmp_path / "ca2", "home")
    caller = files("operator", "alice")
    newcomer = other.issue_files(tmp_path / "newcomer", "operator", "bob")
    async with serving(tls) as (server, _):
        async with ChannelPool(newcomer) as pool:
            assert (await failed(ask(pool.get(server.endpoint)))).code() is grpc.StatusCode.UNAVAILABLE
        certificate, key = other.issue("registry", "r")
        write_files(tls.cert.parent, certificate=certificate, key=key, ca=other.ca_pem)
        async with ChannelPool(newcomer) as pool:
            assert await ask(pool.get(server.endpoint)) == b"ok"
        async with ChannelPool(caller) as pool:
            assert (await failed(ask(pool.get(server.endpoint)))).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_channel_pool_uses_new_files_for_new_channels_and_keeps_running_calls(
    files: Any, authority: CertificateAuthority
) -> None:
    """F60."""
    mine, clock = files("operator", "old"), ManualClock()
    async with serving(files("registry", "r")) as (server, who), ChannelPool(mine, clock=clock) as pool:
        old = pool.get(server.endpoint)
        assert await ask(old) == b"ok"
        renew(mine, authority, "new")
        assert pool.get(server.endpoint) is old, "looks at the files once a second at most"
        clock.now += 2
        new = pool.get(server.endpoint)
        assert new is not old
        assert await ask(new) == b"ok"
        assert await ask(old) == b"ok"
        assert len(pool) == 2
        await pool.release(server.endpoint)
        assert len(pool) == 0
    assert [caller and caller.name for caller in who.callers] == ["old", "new", "old"]


async def test_files_that_cannot_be_used_are_named_at_the_start(files: Any, tmp_path: Path) -> None:
    good, another = files("operator", "a"), files("operator", "b")
    missing = TlsFiles(cert=tmp_path / "no.pem", key=good.key, ca=good.ca)
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("rubbish")
    for tls, says in (
        (missing, "no.pem"),
        (TlsFiles(cert=good.cert, key=good.key, ca=rubbish), "rubbish.pem"),
        (TlsFiles(cert=good.cert, key=another.key, ca=good.ca), "private key"),
    ):
        with pytest.raises(TlsConfigError, match=says):
            ChannelTls(tls)
        server = GrpcServer(ServerConfig(tls=tls), name="x")
        with pytest.raises(TlsConfigError, match=says):
            await server.start()


# the authority


def test_an_authority_is_kept_where_only_its_owner_reads(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "ca"
    made = CertificateAuthority.load_or_create(folder, "home")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert CertificateAuthority.load_or_create(folder, "home").ca_pem == made.ca_pem
    assert CertificateAuthority.load(folder).mesh == "home"
    assert os.listdir(folder.parent) == ["ca"]  # noqa: PTH208 - nothing is left beside it
    with pytest.raises(ConfigError, match="not of 'other'"):
        CertificateAuthority.load_or_create(folder, "other")
    with pytest.raises(ConfigError, match="not empty"):
        CertificateAuthority.create(folder, "home")
    with pytest.raises(ConfigError, match="holds no certificate authority"):
        CertificateAuthority.load(tmp_path)
    for name in ("", "a/b", "a b", "x" * 64):
        with pytest.raises(ConfigError):
            CertificateAuthority.create(tmp_path / "x", name)


def test_an_identity_is_kept_where_only_its_owner_reads(authority: CertificateAuthority, tmp_path: Path) -> None:
    files = authority.issue_files(tmp_path / "me", "node", "n1", ["10.0.0.7", "gpu1.lan", "::1", ""])
    assert stat.S_IMODE(files.cert.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (files.cert, files.key, files.ca)} == {0o600}
    certificate = x509.load_pem_x509_certificate(files.cert.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["localmesh://home/node/n1"]
    assert set(names.get_values_for_type(x509.DNSName)) == {"n1.node.localmesh.internal", "localhost", "gpu1.lan"}
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1", "10.0.0.7"}


def request_for(key: Any, *, claims: str = "n1") -> bytes:
    builder = x509.CertificateSigningRequestBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, claims)])
    )
    uri = x509.UniformResourceIdentifier("localmesh://home/operator/root")
    builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_of_a_signing_request_only_the_public_key_counts(authority: CertificateAuthority) -> None:
    """F3."""
    key = ec.generate_private_key(ec.SECP256R1())
    signed = x509.load_pem_x509_certificate(authority.sign(request_for(key, claims="root"), "node", "n1"))
    names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["localmesh://home/node/n1"]
    assert signed.subject.rfc4514_string() == "CN=n1"
    assert not signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert signed.public_key() == key.public_key()


def test_requests_that_prove_nothing_are_refused(authority: CertificateAuthority) -> None:
    """F3."""
    good = request_for(ec.generate_private_key(ec.SECP256R1()))
    broken = good[:-1] + bytes([good[-1] ^ 1])
    weak = request_for(rsa.generate_private_key(public_exponent=65537, key_size=1024))  # noqa: S505 - that is the point
    for bad in (b"", b"rubbish", broken, weak):
        with pytest.raises(InvalidRequest):
            authority.sign(bad, "node", "n1")
    for role, name in (("root", "n1"), ("node", "../n1"), ("node", "")):
        with pytest.raises(ConfigError):
            authority.sign(good, role, name)


# enrolment


@contextlib.asynccontextmanager
async def enrolling(
    authority: CertificateAuthority, folder: Path, clock: ManualClock
) -> AsyncIterator[tuple[JoinToken, dict[str, bytes]]]:
    listener, join_secrets, known = enrollment.make_listener(folder), JoinSecrets(clock), {}

    async def admit(node: str, public_key: bytes) -> None:
        if known.setdefault(node, public_key) != public_key:
            raise NodeNameTaken(f"the name {node} belongs to another key", node=node)

    server = GrpcServer(ServerConfig(tls=listener.tls, client_auth=False), name="enrolment")
    server.add(
        registry_service_pb2_grpc.add_EnrollmentServiceServicer_to_server,
        EnrollmentServicer(authority, join_secrets, registries=["127.0.0.1:9501"], admit=admit),
        enrollment.SERVICE,
    )
    async with server:
        yield JoinToken(host="127.0.0.1", port=server.port, secret=join_secrets.issue(), pin=listener.pin), known


async def test_a_join_token_buys_a_certificate_that_opens_the_mesh(
    authority: CertificateAuthority, files: Any, tmp_path: Path
) -> None:
    """F3."""
    key = ec.generate_private_key(ec.SECP256R1())
    async with enrolling(authority, tmp_path / "listener", ManualClock()) as (token, known):
        token = JoinToken.parse(str(token))
        answer = await enrollment.enroll(token, node="n1", certificate_request=request_for(key))
    assert (answer.mesh, list(answer.registries), answer.ca_certificate) == (
        "home",
        ["127.0.0.1:9501"],
        authority.ca_pem,
    )
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert known == {"n1": der}
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    mine = write_files(tmp_path / "n1", certificate=answer.certificate, key=pem, ca=answer.ca_certificate)
    async with serving(files("registry", "r")) as (server, who), ChannelPool(mine) as pool:
        assert await ask(pool.get(server.endpoint)) == b"ok"
    assert [(c.role, c.name, c.key_fingerprint) for c in who.callers if c] == [("node", "n1", key_fingerprint(der))]


async def test_a_wrong_token_a_taken_name_and_a_false_listener_are_refused(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    """F3."""
    clock = ManualClock()
    csr = request_for(ec.generate_private_key(ec.SECP256R1()))
    async with enrolling(authority, tmp_path / "listener", clock) as (token, known):
        await enrollment.enroll(token, node="n1", certificate_request=csr)
        other_key = request_for(ec.generate_private_key(ec.SECP256R1()))
        with pytest.raises(NodeNameTaken):
            await enrollment.enroll(token, node="n1", certificate_request=other_key)
        with pytest.raises(InvalidRequest):
            await enrollment.enroll(token, node="../n1", certificate_request=csr)
        wrong = JoinToken(host=token.host, port=token.port, secret="A" * 32, pin=token.pin)
        with pytest.raises(JoinTokenInvalid, match="wrong or has expired"):
            await enrollment.enroll(wrong, node="n2", certificate_request=csr)
        false_pin = JoinToken(host=token.host, port=token.port, secret=token.secret, pin="A" * 43)
        with pytest.raises(JoinTokenInvalid, match="does not show the certificate"):
            await enrollment.enroll(false_pin, node="n2", certificate_request=csr)
        clock.now += 25 * 3600
        with pytest.raises(JoinTokenInvalid, match="wrong or has expired"):
            await enrollment.enroll(token, node="n1", certificate_request=csr)
    assert set(known) == {"n1"}
    with pytest.raises(ComponentUnreachable, match="nobody enrols"):
        await enrollment.enroll(token, node="n1", certificate_request=csr)


async def test_an_enrolment_listener_that_speaks_no_tls_is_explained(tmp_path: Path) -> None:
    """F3."""
    async with GrpcServer(ServerConfig(), name="plain") as server:
        token = JoinToken(host="127.0.0.1", port=server.port, secret="A" * 32, pin="A" * 43)
        with pytest.raises(ComponentUnreachable, match="nobody enrols"):
            await enrollment.enroll(token, node="n1", certificate_request=b"")


async def test_one_channel_can_be_opened_without_a_pool(files: Any) -> None:
    async with serving(files("registry", "r")) as (server, _):
        channel = open_channel(server.endpoint, tls=ChannelTls(files("client", "c")))
        async with asyncio.timeout(WAIT), channel:
            assert await ask(channel) == b"ok"
