"""The store's mirror and holder while etcd freezes, dies, loses its data, and while a holder is killed."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from localmesh.core.ids import ModelName
from localmesh.etcd import EtcdBinary, EtcdServer
from localmesh.store import HolderConfig
from localmesh.store.registration import RunningReplica
from tests.integration.store_kit import (
    CLOCK,
    GIB,
    M0,
    Kit,
    M,
    N,
    eventually,
    holding,
    mirrored,
    soon,
    store_kit,
)

CONFIG = HolderConfig(patience_seconds=0.3, linger_seconds=600.0)

Restart = Callable[[], Awaitable[None]]


class Etcd:
    """An etcd of the test's own, to be broken."""

    def __init__(self, binary: EtcdBinary, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self.server = EtcdServer(binary, data_dir=folder)

    async def kill(self) -> None:
        self.server.process.kill()
        await self.server.process.wait()
        await self.server.stop()

    async def start_again(self, *, folder: Path | None = None) -> None:
        self.server = EtcdServer(self._binary, data_dir=folder or self._folder, port=self.server.port)
        await self.server.start()

    def freeze(self) -> None:
        self.server.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.server.process.send_signal(signal.SIGCONT)


@pytest.fixture
async def etcd(etcd_binary: EtcdBinary, tmp_path: Path) -> AsyncIterator[Etcd]:
    if not etcd_binary.durable:
        pytest.skip(f"a restart needs an etcd that keeps its data: {etcd_binary.warning}")
    opened = Etcd(etcd_binary, tmp_path / "data")
    await opened.server.start()
    try:
        yield opened
    finally:
        if opened.server.process.returncode is None:
            opened.thaw()
        await opened.server.stop()


@pytest.fixture
async def kit(etcd: Etcd) -> AsyncIterator[Kit]:
    async with store_kit(etcd.server.endpoint, "broken") as opened:
        yield opened


async def test_a_mirror_goes_on_after_a_restart_of_etcd_without_a_gap(etcd: Etcd, kit: Kit) -> None:
    """F4; invariant 7."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit) as mirror, holding(kit, CONFIG) as holder:
        before = await kit.seen(record.mod_revision)
        hold = await holder.acquire(record, before, soon())
        for number in range(2):
            await etcd.kill()
            assert mirror.snapshot.replica(M0) == record
            assert mirror.snapshot.routable(record)
            more = await holder.acquire(record, mirror.snapshot, CLOCK.monotonic() + 0.5)
            await etcd.start_again()
            changed = await kit.model(ModelName(f"later{number}"))
            assert (await kit.seen(changed.mod_revision)).models[changed.spec.name] == changed
            await eventually(lambda: hold.protected)
            more.release()
        assert mirror.snapshot.replica(M0) == record
        assert not await kit.store.unload_replica(record)


async def test_a_frozen_etcd_is_noticed_and_requests_go_on(etcd: Etcd, kit: Kit) -> None:
    """F4; invariant 7: and locks that were lost meanwhile are taken anew."""
    record = await kit.mesh_with_a_ready_replica()
    async with mirrored(kit) as mirror, holding(kit, CONFIG) as holder:
        hold = await holder.acquire(record, await kit.seen(record.mod_revision), soon())
        assert mirror.connected
        etcd.freeze()
        await eventually(lambda: not mirror.connected)
        await eventually(lambda: not hold.protected)  # its lease must not be relied upon any more
        began = CLOCK.monotonic()
        late = await holder.acquire(record, mirror.snapshot, soon())
        assert CLOCK.monotonic() - began < 5
        assert not late.protected
        etcd.thaw()
        await eventually(lambda: mirror.connected and hold.protected and late.protected)
        changed = await kit.model(ModelName("later"))
        await kit.seen(changed.mod_revision)
        assert not await kit.store.unload_replica(record)


async def test_a_store_that_lost_everything_is_read_anew(etcd: Etcd, kit: Kit, tmp_path: Path) -> None:
    """F63: an embedded etcd begins empty at each start."""
    await kit.mesh_with_a_ready_replica()
    for number in range(20):
        await kit.model(ModelName(f"m{number}"))
    async with mirrored(kit) as mirror:
        assert len(mirror.snapshot.models) == 21
        await etcd.kill()
        await etcd.start_again(folder=tmp_path / "empty")
        fresh = await kit.model(ModelName("fresh"))
        snapshot = await kit.until(lambda s: ModelName("fresh") in s.models and len(s.models) == 1)
        assert snapshot.revision < 20 or snapshot.models[ModelName("fresh")] == fresh
        assert not snapshot.nodes
        assert mirror.connected


async def test_a_node_is_gone_when_its_lease_is_and_adopted_when_it_is_back(etcd: Etcd, kit: Kit) -> None:
    """F4, F5; invariant 7."""
    await kit.model()
    await kit.node(presence_seconds=2)
    record = await kit.ready()
    async with mirrored(kit):
        snapshot = await kit.until(lambda s: N not in s.nodes)  # nobody renews it
        assert not snapshot.routable(record)
        assert snapshot.devices[N]
        running = RunningReplica(
            id=M0,
            revision=record.revision,
            state=record.state,
            endpoint="e:9",
            limit=8,
            devices={next(iter(record.devices)): GIB},
        )
        back = await kit.node(running=[running])
        assert back.adopted == (M0,)
        snapshot = await kit.until(lambda s: N in s.nodes)
        adopted = snapshot.replica(M0)
        assert adopted is not None
        assert snapshot.routable(adopted)


_CRASHING = """
import asyncio, sys
from localmesh.store import HolderConfig
from tests.integration.store_kit import M0, holding, mirrored, soon, store_kit

async def main():
    async with store_kit(sys.argv[1], sys.argv[2]) as kit, mirrored(kit):
        async with holding(kit, HolderConfig(ttl_seconds=2)) as holder:
            record = kit.mirror.snapshot.replica(M0)
            hold = await holder.acquire(record, kit.mirror.snapshot, soon())
            print("held" if hold.protected else "unprotected", flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_the_locks_of_a_killed_holder_vanish_with_its_lease(etcd_endpoint: str, mesh_name: str) -> None:
    """F17; invariant 6."""
    async with store_kit(etcd_endpoint, mesh_name) as kit, mirrored(kit):
        record = await kit.mesh_with_a_ready_replica()
        root = Path(__file__).parents[2]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _CRASHING,
            etcd_endpoint,
            mesh_name,
            cwd=root,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), 30) == b"held\n"
            await kit.until(lambda s: M0 in s.inflight)
            assert not await kit.store.unload_replica(record)
        finally:
            process.kill()
            await process.wait()
        await kit.until(lambda s: M0 not in s.inflight)
        assert await kit.store.unload_replica(record)
        assert M in kit.mirror.snapshot.models
