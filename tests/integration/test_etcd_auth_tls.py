"""User and password, tokens that expire, and mutual TLS, each against a real etcd."""

import asyncio
import datetime
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from localmesh.core.clock import SystemClock
from localmesh.etcd import (
    AuthenticationFailed,
    ConnectionFailedError,
    EtcdBinary,
    EtcdClient,
    EtcdConfig,
    EtcdServer,
    PermissionDenied,
    ServerTls,
)
from localmesh.thirdparty import etcd_pb2 as pb

SECONDS = 20.0
CLOCK = SystemClock()


async def administer(server: EtcdServer, *calls: tuple[str, str, str]) -> None:
    """Make (method, name, value) calls of etcd's Auth service; their requests all have the same two fields."""
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        for method, name, value in calls:
            call = channel.unary_unary(
                f"/etcdserverpb.Auth/{method}",
                pb.AuthenticateRequest.SerializeToString,
                pb.AuthEnableResponse.FromString,
            )
            await call(pb.AuthenticateRequest(name=name, password=value), timeout=SECONDS)


ENABLE = (
    ("UserAdd", "root", "secret"),
    ("UserAdd", "guest", "guest"),
    ("RoleAdd", "root", ""),
    ("UserGrantRole", "root", "root"),
    ("AuthEnable", "", ""),
)


@pytest.fixture
async def guarded(etcd_binary: EtcdBinary) -> AsyncIterator[EtcdServer]:
    """An etcd that asks for a user."""
    async with EtcdServer(etcd_binary, extra_args=("--bcrypt-cost", "4")) as server:
        await administer(server, *ENABLE)
        yield server


def as_user(server: EtcdServer, user: str, password: str) -> EtcdConfig:
    return replace(server.config(), user=user, password=password)


def spoil_token(client: EtcdClient) -> None:
    """Make the token one that etcd does not know (any more), as after its time to live."""
    client._parts.transport._token = "expired.1"


async def test_user_and_password_work_without_tls_for_calls_watches_and_leases(guarded: EtcdServer) -> None:
    async with EtcdClient(as_user(guarded, "root", "secret")) as client, asyncio.timeout(SECONDS):
        async with client.session(2) as session, client.watch("k") as watcher:
            await watcher.established(SECONDS)
            await client.put("k", "v", lease=session.lease_id)
            while not (await anext(watcher)).events:
                pass
            assert await client.keep_alive_once(session.lease_id) == 2
        assert client.statistics().authentications == 1


async def test_an_expired_token_is_renewed_once_for_all_calls_and_the_calls_go_through(guarded: EtcdServer) -> None:
    """Trap 8: also for writes, which etcd has refused before it looked at them."""
    async with EtcdClient(as_user(guarded, "root", "secret")) as client:
        await client.put("k", "v")
        spoil_token(client)
        results = await asyncio.gather(*(client.put(f"k{i}", "v") for i in range(20)), client.get("k"))
        assert len(results) == 21
        assert client.statistics().authentications == 2
        assert client.statistics().unknown_outcomes == 0


async def test_watches_and_keep_alives_survive_an_expired_token(guarded: EtcdServer) -> None:
    async with EtcdClient(as_user(guarded, "root", "secret")) as client, asyncio.timeout(SECONDS):
        lease = await client.lease_grant(30)
        spoil_token(client)
        async with client.watch("k") as watcher:
            await watcher.established(SECONDS)
            spoil_token(client)
            assert await client.keep_alive_once(lease.id, deadline=CLOCK.monotonic() + SECONDS) == 30
            await client.put("k", "v")
            while not (await anext(watcher)).events:
                pass


async def test_a_client_with_a_user_goes_on_after_a_restart(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    if not etcd_binary.durable:
        pytest.skip(etcd_binary.warning)
    flags = ("--bcrypt-cost", "4")
    async with EtcdServer(etcd_binary, data_dir=tmp_path / "data", extra_args=flags) as server:
        await administer(server, *ENABLE)
        client = EtcdClient(as_user(server, "root", "secret"))
        await client.__aenter__()
        watcher = client.watch("k")
        await watcher.established(SECONDS)
        server.process.kill()
    try:
        restarted = GuardedServer(etcd_binary, data_dir=tmp_path / "data", extra_args=flags, port=server.port)
        async with restarted, asyncio.timeout(SECONDS):
            await client.put("k", "v", deadline=CLOCK.monotonic() + SECONDS)
            while not (await anext(watcher)).events:
                pass
    finally:
        await client.__aexit__(None, None, None)


class GuardedServer(EtcdServer):
    """Its readiness check knows the password."""

    def config(self) -> EtcdConfig:
        return as_user(super(), "root", "secret")  # type: ignore[arg-type]


async def test_authentication_that_is_switched_on_later_is_noticed(etcd_binary: EtcdBinary) -> None:
    async with EtcdServer(etcd_binary, extra_args=("--bcrypt-cost", "4")) as server:
        async with EtcdClient(as_user(server, "root", "secret")) as client:
            await client.put("k", "before")
            assert client.statistics().authentications == 0
            await administer(server, *ENABLE)
            await client.put("k", "after")
            assert client.statistics().authentications == 1


async def test_a_wrong_password_and_a_missing_user_fail_at_once(guarded: EtcdServer) -> None:
    for user, password in (("root", "wrong"), ("nobody", "x"), ("", "")):
        async with EtcdClient(as_user(guarded, user, password)) as client:
            with pytest.raises(AuthenticationFailed):
                await client.get("k")
            with pytest.raises(AuthenticationFailed):
                await client.put("k", "v")
            if user:
                with pytest.raises(AuthenticationFailed):
                    await client.watch("k").established(SECONDS)


async def test_a_user_without_the_right_is_denied_also_on_a_watch(guarded: EtcdServer) -> None:
    async with EtcdClient(as_user(guarded, "guest", "guest")) as client:
        with pytest.raises(PermissionDenied):
            await client.get("k")
        with pytest.raises(PermissionDenied):
            await client.put("k", "v")
        with pytest.raises(PermissionDenied):
            await client.watch("k").established(SECONDS)


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(EtcdConfig(endpoints=("h:1",), user="root", password="secret"))


class Authority:
    """A CA that signs for 127.0.0.1."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.ca = folder / f"{name}-ca.pem"
        self.ca.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    def issue(self, name: str) -> ServerTls:
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(x509.ExtendedKeyUsage(usages), False)
            .sign(self._key, hashes.SHA256())
        )
        files = ServerTls(ca=self.ca, certificate=self.folder / f"{name}.pem", key=self.folder / f"{name}-key.pem")
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


async def test_mutual_tls_carries_calls_watches_and_leases_and_refuses_everybody_else(
    etcd_binary: EtcdBinary, tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    async with EtcdServer(etcd_binary, tls=ours.issue("etcd")) as server, asyncio.timeout(SECONDS):
        assert server.endpoint.startswith("https://")
        mine = ours.issue("client")
        good = EtcdConfig(
            endpoints=(f"127.0.0.1:{server.port}",),
            ca_pem=ours.ca.read_bytes(),
            cert_pem=mine.certificate.read_bytes(),
            key_pem=mine.key.read_bytes(),
        )
        async with EtcdClient(good) as client, client.session(2) as session, client.watch("k") as watcher:
            await watcher.established(SECONDS)
            await client.put("k", "v", lease=session.lease_id)
            while not (await anext(watcher)).events:
                pass
        stranger = theirs.issue("stranger")
        bad = (
            replace(good, cert_pem=None, key_pem=None),
            replace(good, cert_pem=stranger.certificate.read_bytes(), key_pem=stranger.key.read_bytes()),
            replace(good, ca_pem=theirs.ca.read_bytes()),
            EtcdConfig(endpoints=good.endpoints),
        )
        for config in bad:
            async with EtcdClient(config) as client:
                with pytest.raises(ConnectionFailedError):
                    await client.get("k", deadline=soon())
                with pytest.raises(ConnectionFailedError):
                    await client.put("k", "v", deadline=soon())


def soon() -> float:
    return CLOCK.monotonic() + 0.4
