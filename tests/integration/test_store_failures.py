"""What is remembered of loads that failed and replicas that died, in a real etcd."""

from collections.abc import AsyncIterator

import pytest

from localmesh.core.records import FailureRecord, ReplicaRecord
from localmesh.etcd import KeyValue
from localmesh.scheduling.failures import FailurePolicy
from tests.integration.store_kit import M0, Kit, M, N, store_kit

POLICY = FailurePolicy(first_seconds=100, longest_seconds=250, deaths=2, remembered_seconds=1000)


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        await opened.model()
        await opened.node()
        yield opened


def failure_of(record: ReplicaRecord, reason: str = "LOAD_FAILED") -> FailureRecord:
    return FailureRecord(model=M, node=N, reason=reason, message="no", revision=record.revision)


async def fail(kit: Kit) -> None:
    record = await kit.place()
    await kit.store.exited(record, failure=failure_of(record), policy=POLICY)


async def die(kit: Kit) -> None:
    record = await kit.ready()
    await kit.store.exited(record, failure=failure_of(record, "REPLICA_LOST"), died=True, policy=POLICY)


async def seconds_left(kit: Kit, kv: KeyValue | None) -> int:
    assert kv is not None
    return (await kit.etcd.lease_time_to_live(kv.lease)).granted_ttl_seconds


async def pause(kit: Kit) -> int:
    return await seconds_left(kit, await kit.etcd.get(kit.store.keys.failure(M, N)))


async def test_each_failed_load_keeps_the_model_away_for_longer(kit: Kit) -> None:
    """F42."""
    for seconds, attempts in ((100, 1), (200, 2), (250, 3)):
        await fail(kit)
        assert await pause(kit) == seconds
        assert (await kit.load()).failures[M][N].attempts == attempts
    history = await kit.etcd.get(kit.store.keys.history(M, N))
    assert await seconds_left(kit, history) == 1250


async def test_the_count_outlives_the_pause(kit: Kit) -> None:
    """F42."""
    await fail(kit)
    stored = await kit.etcd.get(kit.store.keys.failure(M, N))
    assert stored is not None
    await kit.etcd.lease_revoke(stored.lease)  # the pause is over
    assert not (await kit.load()).failures
    await fail(kit)
    assert await pause(kit) == 200


async def test_a_load_that_succeeds_forgets_those_that_failed(kit: Kit) -> None:
    """F42."""
    await fail(kit)
    await fail(kit)
    ready = await kit.ready()
    assert not (await kit.load()).failures
    assert await kit.etcd.get(kit.store.keys.history(M, N)) is None
    await kit.store.exited(ready)
    await fail(kit)
    assert await pause(kit) == 100


async def test_an_edit_begins_anew(kit: Kit) -> None:
    """F42."""
    await fail(kit)
    await fail(kit)
    await kit.model(slots=2)
    await fail(kit)
    assert await pause(kit) == 100
    assert (await kit.load()).failures[M][N].attempts == 1


async def test_what_dies_again_and_again_after_it_was_ready_is_kept_away(kit: Kit) -> None:
    """F42: the circuit."""
    await die(kit)
    assert not (await kit.load()).failures
    await die(kit)
    shown = (await kit.load()).failures[M][N]
    assert (shown.reason, shown.attempts) == ("REPLICA_LOST", 2)
    assert "it died 2 times" in shown.message
    assert await pause(kit) == 100
    await die(kit)  # to be ready in between is no success
    assert await pause(kit) == 200


async def test_an_exit_as_told_is_remembered_by_nobody(kit: Kit) -> None:
    await kit.store.exited(await kit.ready())
    assert await kit.etcd.get(kit.store.keys.history(M, N)) is None
    assert (await kit.load()).replica(M0) is None
