"""Keys, ranges and transactions against a real etcd, and the traps among them."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from localmesh.etcd import (
    DeleteResult,
    EtcdClient,
    EtcdConfig,
    LeaseExpired,
    PreconditionFailedError,
    PutResult,
    RangeResult,
    RequestRefused,
    RevisionCompactedError,
    TxnResult,
)
from localmesh.etcd import transactions as t


@pytest.fixture
async def client(etcd_endpoint: str) -> AsyncIterator[EtcdClient]:
    async with EtcdClient(EtcdConfig(endpoints=(etcd_endpoint,))) as opened:
        yield opened


@pytest.fixture
def base(mesh_name: str) -> str:
    return f"/localmesh/{mesh_name}/"


async def test_put_get_and_delete_report_revisions_and_previous_values(client: EtcdClient, base: str) -> None:
    key = base + "k"
    first = await client.put(key, "one")
    second = await client.put(key, b"two", prev_kv=True)
    assert second.revision > first.revision
    assert second.prev is not None
    assert second.prev.value == b"one"
    found = await client.get(key)
    assert found is not None
    assert (found.value, found.create_revision, found.mod_revision, found.version, found.lease) == (
        b"two",
        first.revision,
        second.revision,
        2,
        0,
    )
    past = await client.get(key, revision=first.revision)
    assert past is not None
    assert past.value == b"one"
    assert await client.delete(key)
    assert not await client.delete(key)
    assert await client.get(key) is None


async def test_a_prefix_is_read_in_order_with_the_revision_to_watch_from(client: EtcdClient, base: str) -> None:
    for name in ("b", "a", "c"):
        last = await client.put(f"{base}p/{name}", name)
    await client.put(base + "q", "outside")
    result = await client.get_prefix(base + "p/")
    assert [kv.value for kv in result.kvs] == [b"a", b"b", b"c"]
    assert result.revision >= last.revision
    assert result.count == 3
    cut = await client.get_prefix(base + "p/", limit=2, keys_only=True)
    assert cut.more
    assert [kv.value for kv in cut.kvs] == [b"", b""]
    assert await client.delete_prefix(base + "p/") == 3
    assert (await client.get_prefix(base, count_only=True)).count == 1


async def test_a_prefix_that_ends_in_the_highest_byte_has_the_right_end(client: EtcdClient, base: str) -> None:
    prefix = base.encode() + b"x\xff"
    await client.put(prefix + b"\xff\x01", "in")
    await client.put(base.encode() + b"y", "out")
    assert [kv.value for kv in (await client.get_prefix(prefix)).kvs] == [b"in"]


async def test_put_if_not_exists_and_replace_are_atomic(client: EtcdClient, base: str) -> None:
    key = base + "k"
    won = await asyncio.gather(*(client.put_if_not_exists(key, str(i)) for i in range(10)))
    assert won.count(True) == 1
    value = str(won.index(True))
    assert not await client.replace(key, "no", "new")
    assert await client.replace(key, value, "new")
    found = await client.get(key)
    assert found is not None
    assert found.value == b"new"


async def test_a_put_with_ignore_lease_keeps_the_lease_and_one_without_loses_it(client: EtcdClient, base: str) -> None:
    """Trap 4: a put without lease on a leased key makes it live for ever."""
    lease = await client.lease_grant(30)
    key = base + "k"
    await client.put(key, "1", lease=lease.id)
    await client.put(key, "2", ignore_lease=True)
    assert await client.replace(key, "2", "3")
    kept = await client.get(key)
    assert kept is not None
    assert (kept.value, kept.lease) == (b"3", lease.id)
    await client.put(key, "4")
    detached = await client.get(key)
    assert detached is not None
    assert detached.lease == 0
    await client.lease_revoke(lease.id)


async def test_ignore_lease_on_a_key_that_is_gone_is_refused(client: EtcdClient, base: str) -> None:
    with pytest.raises(RequestRefused, match="key not found"):
        await client.put(base + "gone", "x", ignore_lease=True)
    with pytest.raises(ValueError, match="not both"):
        await client.put(base + "gone", "x", lease=1, ignore_lease=True)


async def test_a_put_with_an_expired_lease_says_which_lease(client: EtcdClient, base: str) -> None:
    """Trap 7, first half."""
    lease = await client.lease_grant(30)
    assert await client.lease_revoke(lease.id)
    with pytest.raises(LeaseExpired) as expired:
        await client.put(base + "k", "x", lease=lease.id)
    assert expired.value.lease_id == lease.id
    with pytest.raises(LeaseExpired):
        await client.put_if_not_exists(base + "k", "x", lease=lease.id)
    assert not await client.lease_revoke(lease.id)


async def test_a_lease_id_in_use_is_a_failed_precondition(client: EtcdClient) -> None:
    """Trap 7, second half."""
    lease = await client.lease_grant(30)
    with pytest.raises(PreconditionFailedError, match="lease already exists"):
        await client.lease_grant(30, lease_id=lease.id)
    await client.lease_revoke(lease.id)


async def test_leases_tell_what_is_left_of_them_and_their_keys(client: EtcdClient, base: str) -> None:
    lease = await client.lease_grant(30)
    await client.put(base + "k", "x", lease=lease.id)
    info = await client.lease_time_to_live(lease.id, keys=True)
    assert info.granted_ttl_seconds == 30
    assert 0 < info.ttl_seconds <= 30
    assert info.keys == ((base + "k").encode(),)
    assert lease.id in await client.leases()
    await client.lease_revoke(lease.id)
    with pytest.raises(LeaseExpired):
        await client.lease_time_to_live(lease.id)
    assert await client.get(base + "k") is None


async def test_all_five_targets_can_be_compared(client: EtcdClient, base: str) -> None:
    lease = await client.lease_grant(30)
    key = base + "k"
    first = await client.put(key, "a")
    second = await client.put(key, "b", lease=lease.id)
    holds = [
        t.value(key) == "b",
        t.value(key) != b"a",
        t.value(key) > b"a",
        t.version(key) == 2,
        t.version(key) < 3,
        t.create(key) == first.revision,
        t.mod(key) == second.revision,
        t.mod(key) > first.revision,
        t.lease(key) == lease.id,
        t.lease(key) != 0,
    ]
    assert (await client.transaction(holds)).succeeded
    for wrong in (t.value(key) == "a", t.version(key) > 2, t.create(key) != first.revision, t.lease(key) == 0):
        assert not (await client.transaction([*holds, wrong])).succeeded
    await client.lease_revoke(lease.id)


async def test_a_missing_key_has_no_value_to_compare_but_create_revision_zero(client: EtcdClient, base: str) -> None:
    """Trap 5: == and != on the value of a missing key are both false."""
    key = base + "missing"
    assert not (await client.transaction([t.value(key) == b"x"])).succeeded
    assert not (await client.transaction([t.value(key) != b"x"])).succeeded
    assert (await client.transaction([t.create(key) == 0])).succeeded
    assert (await client.transaction([t.lease(key) == 0])).succeeded


async def test_a_range_compare_tells_whether_a_range_is_empty_or_old(client: EtcdClient, base: str) -> None:
    """Trap 5: version == 0 over an empty range holds, version > 0 does not. T1 and T3 stand on this."""
    empty = base + "range/"
    assert (await client.transaction([t.version(empty, prefix=True) == 0])).succeeded
    assert not (await client.transaction([t.version(empty, prefix=True) > 0])).succeeded
    assert (await client.transaction([t.create(empty, prefix=True) < 1])).succeeded
    put = await client.put(empty + "1", "x")
    assert not (await client.transaction([t.version(empty, prefix=True) == 0])).succeeded
    assert (await client.transaction([t.create(empty, prefix=True) < put.revision + 1])).succeeded
    assert not (await client.transaction([t.create(empty, prefix=True) < put.revision])).succeeded
    bounded = t.version(empty + "2", range_end=empty + "9") == 0
    assert (await client.transaction([bounded])).succeeded


async def test_a_transaction_answers_every_operation_of_the_branch_that_ran(client: EtcdClient, base: str) -> None:
    key, other = base + "k", base + "other"
    await client.put(other, "2")
    result = await client.transaction(
        [t.create(key) == 0], [t.put(key, "1"), t.get(base, prefix=True), t.delete(other, prev_kv=True)]
    )
    assert result.succeeded
    put, seen, deleted = result.responses
    assert isinstance(put, PutResult)
    assert isinstance(seen, RangeResult)
    assert [kv.value for kv in seen.kvs] == [b"1", b"2"]
    assert isinstance(deleted, DeleteResult)
    assert [kv.value for kv in deleted.prev_kvs] == [b"2"]
    again = await client.transaction([t.create(key) == 0], [t.put(key, "9")], [t.get(key)])
    assert not again.succeeded
    found = again.responses[0]
    assert isinstance(found, RangeResult)
    assert found.kvs[0].value == b"1"
    assert again.revision >= result.revision


async def test_transactions_nest(client: EtcdClient, base: str) -> None:
    inner = t.txn([t.create(base + "a") == 0], [t.put(base + "a", "1")], [t.put(base + "b", "2")])
    first = await client.transaction([], [inner])
    second = await client.transaction([], [inner])
    one, two = first.responses[0], second.responses[0]
    assert isinstance(one, TxnResult)
    assert isinstance(two, TxnResult)
    assert (one.succeeded, two.succeeded) == (True, False)
    assert [kv.value for kv in (await client.get_prefix(base)).kvs] == [b"1", b"2"]


async def test_too_many_operations_are_refused_with_etcds_words_and_change_nothing(
    client: EtcdClient, base: str
) -> None:
    """Trap 6: 128 operations is the limit."""
    puts = [t.put(f"{base}{i:03}", "x") for i in range(129)]
    with pytest.raises(RequestRefused, match="too many operations in txn request"):
        await client.transaction([], puts)
    assert (await client.get_prefix(base, count_only=True)).count == 0
    await client.transaction([], puts[:128])
    assert (await client.get_prefix(base, count_only=True)).count == 128


async def test_a_key_written_twice_in_a_transaction_is_refused(client: EtcdClient, base: str) -> None:
    """Trap 6: also where one of the two is a delete of a range."""
    for other in (t.put(base + "k", "2"), t.delete(base, prefix=True)):
        with pytest.raises(RequestRefused, match="duplicate key given in txn request"):
            await client.transaction([], [t.put(base + "k", "1"), other])
    assert await client.get(base + "k") is None


async def test_a_value_that_is_too_large_is_refused_and_not_an_unknown_outcome(client: EtcdClient, base: str) -> None:
    """Trap 6: etcd's limit, and that of its gRPC server."""
    for size in (2_000_000, 3_000_000):
        with pytest.raises(RequestRefused, match=r"request is too large|larger than max|trying to send message"):
            await client.put(base + "big", b"x" * size)
    assert await client.get(base + "big") is None


async def test_a_compacted_revision_cannot_be_read(client: EtcdClient, base: str) -> None:
    old = await client.put(base + "k", "1")
    new = await client.put(base + "k", "2")
    await client.compact(new.revision)
    with pytest.raises(RevisionCompactedError):
        await client.get(base + "k", revision=old.revision)
    with pytest.raises(RevisionCompactedError):
        await client.compact(old.revision)


async def test_a_future_revision_is_refused(client: EtcdClient, base: str) -> None:
    with pytest.raises(RequestRefused, match="future revision"):
        await client.get(base + "k", revision=1 << 40)


async def test_status_and_members_describe_the_server(client: EtcdClient, etcd_endpoint: str) -> None:
    status = await client.status()
    assert status.endpoint == etcd_endpoint
    assert status.leader == status.member_id
    assert status.version.startswith("3.")
    members = await client.members()
    assert [member.id for member in members] == [status.member_id]
    assert client.statistics().calls == 2


async def test_a_lock_excludes_and_is_handed_on_at_release(client: EtcdClient, mesh_name: str) -> None:
    one, two = client.lock(mesh_name, ttl=10), client.lock(mesh_name, ttl=10)
    assert await one.acquire()
    assert one.is_held()
    assert not await two.acquire(timeout=0.1)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(two.acquire())
        assert await one.release()
    assert waiting.result()
    assert not one.is_held()
    assert two.is_held()
    assert await two.release()
    assert not await two.release()
    assert await client.get(f"/locks/{mesh_name}") is None
