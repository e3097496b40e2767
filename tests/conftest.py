"""Fixtures for every kind of test: one real etcd for the whole run, and a mesh name of its own for each test."""

import asyncio
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from localmesh.etcd import EtcdBinary, EtcdServer, find_etcd, prefix_end
from localmesh.thirdparty import etcd_pb2 as pb


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Check, when all tests are over, that no process (and so no port) and no temporary file of theirs is left.

    Temporary files of the whole run go into one folder. What the tests start inherits its name, by which it is found.
    """
    folder = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))  # short, because unix sockets lie below it
    before = tempfile.tempdir, os.environ.get("TMPDIR")  # noqa: TID251 - children must inherit it
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)  # noqa: TID251 - as above
    try:
        yield
        deadline = time.monotonic() + 20  # noqa: TID251 - a test's own deadline
        while (processes := _processes_of(folder)) and time.monotonic() < deadline:  # noqa: TID251 - as above
            time.sleep(0.1)
        files = [p.name for p in folder.iterdir() if not p.name.startswith("pytest-of-")]
        assert not processes, f"left behind: {processes}"
        assert not files, f"left behind in the temporary folder: {files}"
    finally:
        tempfile.tempdir = before[0]
        os.environ.pop("TMPDIR") if before[1] is None else os.environ.update(TMPDIR=before[1])  # noqa: TID251 - as above
        shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> dict[int, str]:
    marker = f"TMPDIR={folder}".encode()
    found = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if any(v.startswith(marker) for v in (process / "environ").read_bytes().split(b"\0")):
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has ended meanwhile
    return found


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
            assert not _keys(server.endpoint), "keys left behind in the shared etcd"
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
    with _channel(etcd_endpoint) as channel:
        delete = channel.unary_unary(
            "/etcdserverpb.KV/DeleteRange",
            pb.DeleteRangeRequest.SerializeToString,
            pb.DeleteRangeResponse.FromString,
        )
        delete(pb.DeleteRangeRequest(key=prefix, range_end=prefix_end(prefix)), timeout=10, wait_for_ready=True)


def _keys(endpoint: str) -> list[bytes]:
    with _channel(endpoint) as channel:
        read = channel.unary_unary(
            "/etcdserverpb.KV/Range", pb.RangeRequest.SerializeToString, pb.RangeResponse.FromString
        )
        everything = pb.RangeRequest(key=b"\0", range_end=b"\0", keys_only=True)
        return [kv.key for kv in read(everything, timeout=10, wait_for_ready=True).kvs]


def _channel(endpoint: str) -> grpc.Channel:
    return grpc.insecure_channel(endpoint, [("grpc.enable_http_proxy", 0)])
