"""T4, T5 and the schema against a real etcd."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from localmesh.core.errors import Conflict, InternalError, SchemaUnsupported
from localmesh.core.ids import ModelName
from localmesh.core.records import ApprovalRecord, ModelSpec, Policy
from localmesh.store.v1 import records_pb2 as pb
from tests.integration.store_kit import Kit, M, N, store_kit

SPEC = ModelSpec(name=M, backend="llama", source="a.gguf")
UNKNOWN = b"\x9a\x06\x03new"


@pytest.fixture
async def kit(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[Kit]:
    async with store_kit(etcd_endpoint, mesh_name) as opened:
        yield opened


async def revision(kit: Kit) -> int:
    return (await kit.load()).revision


async def test_a_model_is_created_changed_and_left_as_it_is(kit: Kit) -> None:
    """F40."""
    first, policy, outcome = await kit.store.put_model(SPEC, None)
    assert (outcome, policy) == ("created", Policy())
    second, _, outcome = await kit.store.put_model(replace(SPEC, slots=2), Policy(min_replicas=1))
    assert outcome == "changed"
    assert second.revision != first.revision
    snapshot = await kit.load()
    assert snapshot.models[M] == second
    assert snapshot.policy(M).min_replicas == 1


async def test_the_same_model_again_writes_nothing(kit: Kit) -> None:
    """F40."""
    created, _, _ = await kit.store.put_model(SPEC, Policy(max_replicas=2))
    before = (await kit.etcd.get_prefix(kit.store.keys.prefix)).kvs
    again, policy, outcome = await kit.store.put_model(SPEC, None)
    assert (again, policy, outcome) == (created, Policy(max_replicas=2), "unchanged")
    assert (await kit.etcd.get_prefix(kit.store.keys.prefix)).kvs == before


async def test_an_edit_of_the_policy_alone_leaves_the_model_at_its_revision(kit: Kit) -> None:
    created, _, _ = await kit.store.put_model(SPEC, None)
    record, policy, outcome = await kit.store.put_model(SPEC, Policy(max_replicas=3))
    assert (record, policy.max_replicas, outcome) == (created, 3, "changed")
    assert (await kit.load()).models[M] == created


async def test_fields_of_a_newer_version_survive_an_edit(kit: Kit) -> None:
    """F64."""
    await kit.store.put_model(SPEC, None)
    key = kit.store.keys.model(M)
    stored = await kit.etcd.get(key)
    assert stored is not None
    await kit.etcd.put(key, stored.value + UNKNOWN)
    await kit.store.put_model(replace(SPEC, slots=5), None)
    edited = await kit.etcd.get(key)
    assert edited is not None
    assert UNKNOWN in edited.value


async def test_edits_at_the_same_time_all_arrive_one_after_the_other(kit: Kit) -> None:
    specs = [replace(SPEC, slots=n) for n in range(1, 6)]
    await asyncio.gather(*(kit.store.put_model(spec, None) for spec in specs))
    stored = await kit.etcd.get(kit.store.keys.model(M))
    assert stored is not None
    assert stored.version == 5
    assert (await kit.load()).models[M].spec in specs


async def test_a_deleted_model_takes_its_policy_along(kit: Kit) -> None:
    await kit.store.put_model(SPEC, Policy(max_replicas=1))
    assert await kit.store.delete_model(M)
    assert not await kit.store.delete_model(M)
    snapshot = await kit.load()
    assert not snapshot.models
    assert not snapshot.policies


async def test_a_model_that_cannot_be_read_is_not_overwritten_but_can_be_deleted(kit: Kit) -> None:
    await kit.etcd.put(kit.store.keys.model(M), b"\xff\xff")
    with pytest.raises(InternalError, match="cannot be read"):
        await kit.store.put_model(SPEC, None)
    assert await kit.store.delete_model(M)


async def test_an_approval_is_put_only_over_what_was_expected(kit: Kit) -> None:
    """F3."""
    new = ApprovalRecord(key_fingerprint="k")
    first = await kit.store.put_approval(N, expected=None, new=new)
    with pytest.raises(Conflict):
        await kit.store.put_approval(N, expected=None, new=new)
    second = await kit.store.put_approval(N, expected=first, new=replace(first, cordoned=True))
    with pytest.raises(Conflict):
        await kit.store.put_approval(N, expected=first, new=replace(first, labels={"a": "b"}))
    assert (await kit.load()).approvals[N] == second


@pytest.mark.parametrize("losses", [["applied"], ["not applied"], ["not applied", "applied"]])
async def test_an_answer_that_was_lost_is_settled(kit: Kit, losses: list[str | None]) -> None:
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    record, _, outcome = await kit.store.put_model(SPEC, None)
    assert outcome == "created"
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    approval = await kit.store.put_approval(N, expected=None, new=ApprovalRecord(key_fingerprint="k"))
    snapshot = await kit.load()
    assert snapshot.models[M] == record
    assert snapshot.approvals[N] == approval
    kit.etcd.losses = list(losses)  # type: ignore[attr-defined]
    await kit.store.delete_model(M)
    assert not (await kit.load()).models


async def test_an_empty_store_gets_the_schema_and_one_of_this_version_is_accepted(kit: Kit) -> None:
    """F64."""
    await asyncio.gather(*(kit.store.check_schema() for _ in range(4)))
    stored = await kit.etcd.get(kit.store.keys.schema())
    assert stored is not None
    assert stored.version == 1


@pytest.mark.parametrize(
    ("schema", "accepted"),
    [
        (pb.Schema(version=2, oldest_compatible=1), True),
        (pb.Schema(version=3, oldest_compatible=2), False),
        (pb.Schema(version=0, oldest_compatible=0), False),
    ],
)
async def test_a_newer_schema_is_accepted_only_where_it_says_so(kit: Kit, schema: pb.Schema, accepted: bool) -> None:
    """F64."""
    await kit.etcd.put(kit.store.keys.schema(), schema.SerializeToString())
    if accepted:
        await kit.store.check_schema()
    else:
        with pytest.raises(SchemaUnsupported):
            await kit.store.check_schema()


async def test_a_schema_that_cannot_be_read_is_refused(kit: Kit) -> None:
    await kit.etcd.put(kit.store.keys.schema(), b"\xff")
    with pytest.raises(SchemaUnsupported):
        await kit.store.check_schema()


async def test_a_mesh_larger_than_a_page_is_loaded_as_of_one_revision(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmesh.store.mesh._PAGE_KEYS", 3)
    names = [ModelName(f"m{n}") for n in range(8)]
    for name in names:
        await kit.store.put_model(replace(SPEC, name=name), None)
    snapshot = await kit.load()
    assert sorted(snapshot.models) == names
    assert snapshot.revision >= max(m.mod_revision for m in snapshot.models.values())
