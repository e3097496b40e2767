"""A router with mutual TLS: to its callers, and to replicas, which must be who they are said to be."""

from pathlib import Path

import grpc

from localmesh.core.errors import MeshError, ReplicaLost
from localmesh.core.records import Policy
from localmesh.rpc.authority import CertificateAuthority
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.metadata import MODEL
from localmesh.rpc.tls import TlsFiles
from tests.integration.router_kit import declare, eventually, ready, router_mesh, unary

TINY = ((MODEL, "tiny"),)


async def _call(endpoint: str, tls: TlsFiles) -> MeshError | None:
    async with ChannelPool(tls) as channels:
        try:
            assert await unary(channels.get(endpoint))(b"x", metadata=TINY, timeout=15) == b"x"
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
    return None


async def test_callers_and_replicas_prove_who_they_are(etcd_endpoint: str, mesh_name: str, tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca", mesh_name)
    other = CertificateAuthority.create(tmp_path / "other", "another-mesh")

    def files(role: str, name: str, by: CertificateAuthority = authority) -> TlsFiles:
        return by.issue_files(tmp_path / f"{role}-{name}", role, name, ["127.0.0.1"])

    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        await mesh.node("a", tls=files("node", "a"))
        router = await mesh.router(tls=files("router", "router"))
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        assert await _call(router.endpoint, files("client", "me")) is None
        assert await _call(router.endpoint, files("client", "stranger", other)) is not None


async def test_a_request_is_not_given_to_whoever_has_taken_the_place_of_a_node(
    etcd_endpoint: str, mesh_name: str, tmp_path: Path
) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca", mesh_name)

    def files(role: str, name: str) -> TlsFiles:
        return authority.issue_files(tmp_path / f"{role}-{name}", role, name, ["127.0.0.1"])

    async with router_mesh(etcd_endpoint, mesh_name) as mesh:
        await declare(mesh.store, "tiny", Policy(min_replicas=1))
        node = await mesh.node("a", tls=files("node", "b"))  # a key of the mesh, but of another node
        router = await mesh.router(tls=files("router", "router"), hold_seconds=2.0)
        await eventually(mesh.mirror, lambda s: ready(s, "tiny"))
        error = await _call(router.endpoint, files("client", "me"))
        assert isinstance(error, ReplicaLost)
        assert error.retry_after_seconds
        assert [replica.served for replica in node.replicas.values()] == [0]
