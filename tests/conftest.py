"""Fixtures for every kind of test: one real etcd for the whole run, and a mesh name of its own for each test."""

import asyncio
import os
import secrets
from collections.abc import Iterator

import grpc
import psutil
import pytest

from localmesh.etcd import EtcdBinary, EtcdServer, find_etcd, prefix_end
from localmesh.thirdparty import etcd_pb2 as pb


@pytest.fixture(scope="session")
def etcd_binary() -> EtcdBinary:
    """The best etcd of this machine: $LOCALMESH_ETCD_BIN, else `etcd` on PATH, else the one from pip."""
    return find_etcd(os.environ.get("LOCALMESH_ETCD_BIN"))  # noqa: TID251 - tests are configured by it


@pytest.fixture(scope="session")
def etcd_server(etcd_binary: EtcdBinary) -> Iterator[EtcdServer]:
    """One etcd that all tests share, each under its own mesh name. Never stop or restart this one."""
    server = EtcdServer(etcd_binary)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(server.start())
        try:
            yield server
        finally:
            loop.run_until_complete(server.stop())
    finally:
        loop.close()


@pytest.fixture
def etcd_endpoint(etcd_server: EtcdServer) -> Iterator[str]:
    """host:port of the shared etcd, which must still run when the test is over."""
    yield etcd_server.endpoint
    process = psutil.Process(etcd_server.process.pid)
    assert process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED}, "the test broke the shared etcd"


@pytest.fixture
def mesh_name(etcd_endpoint: str) -> Iterator[str]:
    """A mesh name that no other test uses. What the test leaves under /localmesh/<name>/ is deleted."""
    name = f"t{secrets.token_hex(6)}"
    yield name
    prefix = f"/localmesh/{name}/".encode()
    with grpc.insecure_channel(etcd_endpoint, [("grpc.enable_http_proxy", 0)]) as channel:
        delete = channel.unary_unary(
            "/etcdserverpb.KV/DeleteRange",
            pb.DeleteRangeRequest.SerializeToString,
            pb.DeleteRangeResponse.FromString,
        )
        delete(pb.DeleteRangeRequest(key=prefix, range_end=prefix_end(prefix)), timeout=10, wait_for_ready=True)
