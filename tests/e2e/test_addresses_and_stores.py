"""Safe by default: what a component refuses to listen on; IPv6; an etcd with TLS, users and rights."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.etcd import EtcdBinary, EtcdServer, ServerTls, prefix_end
from localmesh.thirdparty import etcd_pb2 as pb
from tests.integration.pki_kit import OtherCa

MODEL = "apiVersion: localmesh/v1\nkind: Model\nname: tiny\nengine: llama\nsource: tiny.gguf\n"
OPEN = "0.0.0.0:0"


@pytest.mark.parametrize(
    "words",
    [
        ("registry", "--listen", OPEN),
        ("router", "--listen", OPEN),
        ("worker", "--listen", OPEN),
        ("worker", "--listen", "[::]:0"),
        ("up", "--worker-listen", OPEN, "--router-listen", "127.0.0.1:0", "--registry-listen", "127.0.0.1:0"),
    ],
)
def test_nothing_is_open_to_others_without_tls_unless_that_is_said(sandbox: Any, words: tuple[str, ...]) -> None:
    """F61: on every component, before it does anything else."""
    done = sandbox.run(*words)
    assert done.returncode == 2, done.stderr
    assert "can be reached by other machines" in done.stderr
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr
    if words[0] != "up":
        assert not sandbox.state.exists()
    sandbox.assert_nothing_left()


def test_up_says_what_it_can_listen_on(sandbox: Any) -> None:
    for given, words in (
        ("127.0.0.2:9500", "without a port"),
        ("a b", "no address of this machine"),
        ("198.18.200.200", "is not an address of this machine"),
    ):
        done = sandbox.run("up", "--listen", given)
        assert done.returncode in (2, 7), done.stderr
        assert words in done.stderr
    done = sandbox.run("up", env={"LOCALMESH_TLS_CERT": "x"})
    assert done.returncode == 2
    assert "--listen it makes its own" in done.stderr
    sandbox.assert_nothing_left()


def test_a_whole_mesh_on_ipv6_with_tls(sandbox: Any) -> None:
    """F53 F60: registry, router, enrolment, worker and replica; the address may stand in brackets."""
    up = sandbox.up("--listen", "[::1]", "--registry-enrolment-listen", "[::1]:0")
    assert "worker --join [::1]:" in sandbox.said(up)
    assert sandbox.run("apply", "-f", "-", text=MODEL).returncode == 0
    said = sandbox.run("generate", "tiny", "The function", "-n", "2")
    assert said.returncode == 0, said.stderr
    shown = sandbox.json("replicas")["replicas"]
    assert [replica["endpoint"].rpartition(":")[0] for replica in shown] == ["[::1]"]


class Guarded:
    """An etcd with mutual TLS, and a user who may write below /localmesh/ only."""

    def __init__(self, server: EtcdServer, ca: OtherCa, folder: Path) -> None:
        self.endpoint = f"127.0.0.1:{server.port}"
        self.client = ca.issue("", "etcd-client")
        self.password = folder / "password"
        self.password.write_text("of the mesh\n")

    def flags(self, **other: object) -> list[str]:
        given = {
            "endpoints": self.endpoint,
            "ca": self.client.ca,
            "cert": self.client.cert,
            "key": self.client.key,
            "user": "localmesh",
            "password-file": self.password,
        } | {name.replace("_", "-"): value for name, value in other.items()}
        return [word for name, value in given.items() if value for word in (f"--etcd-{name}", str(value))]

    async def administer(self, *calls: tuple[str, bytes]) -> None:
        files = (path.read_bytes() for path in (self.client.ca, self.client.key, self.client.cert))
        async with grpc.aio.secure_channel(self.endpoint, grpc.ssl_channel_credentials(*files)) as channel:
            for method, request in calls:
                await channel.unary_unary(f"/etcdserverpb.Auth/{method}")(request, timeout=20)


def two(name: str, value: str = "") -> bytes:
    """The requests of etcd's Auth service that are needed here all have two texts."""
    return pb.AuthenticateRequest(name=name, password=value).SerializeToString()


def read_and_write(role: str, prefix: str) -> bytes:
    """RoleGrantPermission: permission 2 (both) on a prefix, as the second field."""
    key, end = prefix.encode(), prefix_end(prefix.encode())
    permission = b"\x08\x02\x12" + bytes([len(key)]) + key + b"\x1a" + bytes([len(end)]) + end
    return two(role, permission.decode())


@pytest.fixture
async def guarded(etcd_binary: EtcdBinary, tmp_path: Path) -> AsyncIterator[Guarded]:
    ca = await asyncio.to_thread(OtherCa, tmp_path / "pki", "any")
    files = ca.issue("", "etcd")
    tls = ServerTls(ca=files.ca, certificate=files.cert, key=files.key)
    async with EtcdServer(etcd_binary, tls=tls, extra_args=("--bcrypt-cost", "4")) as server:
        etcd = Guarded(server, ca, tmp_path)
        await etcd.administer(
            ("UserAdd", two("root", "secret")),
            ("RoleAdd", two("root")),
            ("UserGrantRole", two("root", "root")),
            ("UserAdd", two("localmesh", "of the mesh")),
            ("RoleAdd", two("mesh")),
            ("RoleGrantPermission", read_and_write("mesh", "/localmesh/")),
            ("UserGrantRole", two("localmesh", "mesh")),
            ("AuthEnable", b""),
        )
        yield etcd


async def test_a_store_with_tls_users_and_rights_serves_the_whole_mesh(guarded: Guarded, sandbox: Any) -> None:
    """F42: `up` with an etcd of one's own, by flags; its user may touch nothing but /localmesh/."""
    await asyncio.to_thread(sandbox.up, *guarded.flags())
    applied = await asyncio.to_thread(sandbox.run, "apply", "-f", "-", text=MODEL)
    assert applied.returncode == 0, applied.stderr
    said = await asyncio.to_thread(sandbox.run, "generate", "tiny", "The function", "-n", "2")
    assert said.returncode == 0, said.stderr


async def test_a_store_that_refuses_is_explained(guarded: Guarded, sandbox: Any, tmp_path: Path) -> None:
    """F42: wrong password, no user, another CA, plain text, files that are none."""
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong")
    others = OtherCa(tmp_path / "others", "any")
    listen = ("--listen", "127.0.0.1:0")
    cases = (
        (guarded.flags(password_file=wrong), 3, "Give --etcd-user and --etcd-password-file"),
        (guarded.flags(user="", password_file=""), 3, "--etcd-user"),
        (guarded.flags(ca=others.ca), 3, "not signed by the given CA"),
        (guarded.flags(ca="", cert="", key=""), 3, "TLS to etcd is set by"),
        (guarded.flags(ca=wrong), 2, "is not PEM"),
        (guarded.flags(key=""), 2, "together"),
    )
    # at once: most of it is waiting for connections that do not come about
    runs = (asyncio.to_thread(sandbox.run, "registry", *listen, *flags) for flags, _, _ in cases)
    for done, (_, code, words) in zip(await asyncio.gather(*runs), cases, strict=True):
        assert done.returncode == code, done.stderr
        assert words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
