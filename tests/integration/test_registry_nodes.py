"""Operators and nodes: what an operator says holds, whatever the worker does."""

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.errors import (
    Conflict,
    IncarnationLost,
    InvalidRequest,
    JoinTokenInvalid,
    MeshError,
    NodeInUse,
    NodeNameTaken,
    NodeNotFound,
    NodePending,
)
from localmesh.core.ids import CPU, NodeName, ReplicaId
from localmesh.core.records import ReplicaState
from localmesh.registry.config import RegistryConfig
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.registry.service import fill_from_folder
from localmesh.rpc.errors import from_rpc_error
from localmesh.store import LeaseTimes
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc as rpc
from localmesh.v1 import types_pb2 as types
from tests.integration.registry_kit import (
    GIB,
    PATIENCE,
    FakeWorker,
    M,
    Registry,
    answer_catalog,
    place,
    place_on,
    serving,
)

N = NodeName("n1")
LEASES = LeaseTimes(presence_seconds=2, record_seconds=60)


class Operator:
    """Calls the registry as an operator does, and checks that saying it again changes nothing."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.RegistryServiceStub(channel)

    async def __call__(self, verb: str, node: str = "n1", **fields: Any) -> Any:
        request = getattr(pb, f"{verb}Request")(node=node, **fields)
        try:
            return await getattr(self._stub, verb)(request, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def node(self, name: str = "n1") -> types.Node:
        response = await self._stub.ListNodes(pb.ListNodesRequest(), timeout=PATIENCE)
        return next(n for n in response.nodes if n.name == name)


@pytest.fixture
async def registry(etcd_endpoint: str, mesh_name: str, request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    settings = getattr(request, "param", {})
    config = RegistryConfig(write_seen_seconds=5.0, leases=LEASES, **settings)
    async with Registry(etcd_endpoint, mesh_name, config).running() as registry:
        yield registry


@pytest.fixture
async def channel(registry: Registry) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(registry.endpoint) as channel:
        yield channel


@pytest.fixture
def operator(channel: grpc.aio.Channel) -> Operator:
    return Operator(channel)


manual = pytest.mark.parametrize("registry", [{"auto_approve": False}], indirect=True)
with_token = pytest.mark.parametrize("registry", [{"join_token": "open sesame 1234"}], indirect=True)


@manual
async def test_a_node_waits_until_an_operator_approves_it(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F2, F3: it is listed with its key meanwhile, and registers at its next try."""
    worker = FakeWorker()
    with pytest.raises(NodePending, match="localmesh node approve n1") as told:
        await worker.register(channel)
    assert told.value.retry_after_seconds is not None
    assert told.value.retry_after_seconds <= 2
    seen = await operator.node()
    assert (seen.state, seen.key_fingerprint) == (types.NODE_STATE_PENDING, sha256(worker.key).hexdigest())
    approved = await operator("ApproveNode")
    assert approved.node.state == types.NODE_STATE_GONE
    await worker.register(channel)
    assert (await operator.node()).state == types.NODE_STATE_LIVE
    revision = registry.mirror.snapshot.approvals[N].mod_revision
    await operator("ApproveNode")
    assert (await registry.store.load()).approvals[N].mod_revision == revision


@manual
async def test_no_call_of_a_pending_worker_approves_it(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F3: elsewhere resuming, leaving and coming again, or being silent for a while did."""
    worker = FakeWorker()
    for _ in range(3):
        with pytest.raises(NodePending):
            await worker.register(channel)
        with pytest.raises(IncarnationLost):
            await operator("Deregister", incarnation=7)
    for verb in ("CordonNode", "UncordonNode", "DrainNode", "ResumeNode"):
        assert (await operator(verb)).node.state == types.NODE_STATE_PENDING
        with pytest.raises(NodePending):
            await worker.register(channel)
    assert not registry.mirror.snapshot.nodes
    assert not registry.mirror.snapshot.devices


@manual
async def test_who_waits_first_is_who_is_approved(registry: Registry, channel: grpc.aio.Channel) -> None:
    """F3: nobody can take the place of the one that the operator looks at."""
    operator = Operator(channel)
    first, second = FakeWorker(key=b"1" * 40), FakeWorker(key=b"2" * 40)
    with pytest.raises(NodePending):
        await first.register(channel)
    with pytest.raises(NodeNameTaken):
        await second.register(channel)
    with pytest.raises(InvalidRequest) as told:
        await operator("ApproveNode", key_fingerprint=sha256(second.key).hexdigest())
    assert told.value.metadata["field"] == "key_fingerprint"
    await operator("ApproveNode", key_fingerprint=sha256(first.key).hexdigest().upper())
    await first.register(channel)
    assert registry.mirror.snapshot.nodes[N].key_fingerprint == sha256(first.key).hexdigest()


@manual
async def test_a_node_that_has_not_come_yet_is_approved_by_its_key(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F3."""
    with pytest.raises(NodeNotFound):
        await operator("ApproveNode")
    worker = FakeWorker()
    await operator("ApproveNode", key_fingerprint=sha256(worker.key).hexdigest())
    with pytest.raises(NodeNameTaken):
        await FakeWorker(key=b"x" * 40).register(channel)
    await worker.register(channel)
    assert N in registry.mirror.snapshot.nodes


@pytest.mark.parametrize("registry", [{"auto_approve": False, "max_pending": 2}], indirect=True)
async def test_made_up_names_do_not_fill_the_store(registry: Registry, channel: grpc.aio.Channel) -> None:
    """F3: whoever reaches the registry may ask; only so many are remembered."""
    for number in range(5):
        with pytest.raises(NodePending):
            await FakeWorker(f"made-up-{number}").register(channel)
        if number < 2:
            await registry.until(lambda s, known=number + 1: len(s.approvals) >= known or None)
    assert len((await registry.store.load()).approvals) == 2


@with_token
async def test_a_join_token_approves_and_nothing_else_does(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F3: with a token in force nobody is approved automatically, and an empty one opens nothing."""
    worker = FakeWorker()
    with pytest.raises(NodePending):
        await worker.register(channel)
    worker.join_token = "open sesame 12345"
    with pytest.raises(JoinTokenInvalid):
        await worker.register(channel)
    assert registry.mirror.snapshot.nodes == {}
    await operator("CordonNode")
    worker.join_token = "open sesame 1234"
    await worker.register(channel)
    assert (await operator.node()).state == types.NODE_STATE_CORDONED
    worker.join_token = "one of last year"
    await worker.register(channel)  # what is approved needs no token any more
    stranger = FakeWorker("n1", key=b"x" * 40)
    stranger.join_token = "open sesame 1234"
    with pytest.raises(NodeNameTaken):
        await stranger.register(channel)


async def test_what_an_operator_said_survives_registration_absence_and_the_key_of_another(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F2, F3, F6, F30, F32: elsewhere a re-registration undid drains, labels and budgets."""
    worker = FakeWorker()
    await worker.register(channel, labels={"zone": "a", "tier": "worker"}, max_replicas_per_model=4)
    await operator("CordonNode")
    await operator("DrainNode")
    await operator("SetNodeLabels", set={"zone": "b", "disk": "fast"})
    overrides = types.NodeOverrides(max_replicas_per_model=2, memory_budgets={"cpu": "50%"})
    await operator("SetNodeOverrides", overrides=overrides)
    said = registry.mirror.snapshot.approvals[N]
    await worker.register(channel, labels={"zone": "c", "tier": "changed"}, max_replicas_per_model=8)
    assert registry.mirror.snapshot.approvals[N] == said
    node = await operator.node()
    assert (node.state, node.cordoned, node.draining) == (types.NODE_STATE_DRAINING, True, True)
    assert {k: node.labels[k] for k in ("zone", "disk", "tier")} == {"zone": "b", "disk": "fast", "tier": "changed"}
    assert dict(node.worker_labels) == {"zone": "c", "tier": "changed"}
    assert (node.max_replicas_per_model, node.worker_max_replicas_per_model) == (2, 8)
    assert (node.labels["node.name"], node.labels["node.replica-slots"]) == ("n1", "2")
    assert [(d.total_bytes, d.budget_bytes, d.worker_budget_bytes) for d in node.devices] == [
        (10 * GIB, 5 * GIB, 9 * GIB)
    ]
    await operator("Deregister", incarnation=worker.incarnation)
    gone = await operator.node()
    assert (gone.state, gone.draining, gone.overrides) == (types.NODE_STATE_GONE, True, overrides)
    with pytest.raises(NodeNameTaken):
        await FakeWorker(key=b"x" * 40).register(channel)
    await worker.register(channel)
    assert registry.mirror.snapshot.approvals[N] == said


async def test_a_budget_holds_at_once_and_is_a_part_of_the_whole_each_time(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F30: claims stay, and the worker's word comes back with a reset."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        await place_on(registry, worker, stream)

        def device() -> tuple[int, int]:
            record = registry.mirror.snapshot.devices[N][CPU]
            return record.budget_bytes, record.claimed_bytes

        for _ in range(2):
            answer = await operator("SetNodeOverrides", overrides=types.NodeOverrides(memory_budgets={"*": "80%"}))
            assert answer.node.devices[0].budget_bytes == 8 * GIB
            assert device() == (8 * GIB, GIB)
        await operator("SetNodeOverrides", overrides=types.NodeOverrides(memory_budgets={"cpu": "512MiB"}))
        assert device() == (GIB // 2, GIB)
        assert registry.mirror.snapshot.devices[N][CPU].unclaimed_bytes < 0
        record = registry.mirror.snapshot.replica(ReplicaId(M, N, 0))
        assert record is not None
        assert record.state is ReplicaState.PLACED
        await operator("ResetNodeOverrides", max_replicas_per_model=True)
        assert device() == (GIB // 2, GIB)
        await operator("ResetNodeOverrides")
        assert device() == (9 * GIB, GIB)
    assert not (await operator.node()).HasField("overrides")


async def test_overrides_raced_by_placements_are_both_kept(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F30: neither loses the other's write to the device; the placement plans again."""
    worker = FakeWorker()
    await worker.register(channel)

    async def place_until_it_holds() -> None:
        while True:
            try:
                await place(registry)
            except Conflict:
                continue
            return

    async with worker.stream(channel) as stream, asyncio.TaskGroup() as group:
        group.create_task(answer_catalog(worker, stream))
        placing = group.create_task(place_until_it_holds())
        for part in range(50, 60):
            await operator("SetNodeOverrides", overrides=types.NodeOverrides(memory_budgets={"*": f"{part}%"}))
        await placing
        device = (await registry.store.load()).devices[N][CPU]
        assert (device.budget_bytes, device.claimed_bytes) == (10 * GIB * 59 // 100, GIB)


async def test_fewer_slots_and_reset(registry: Registry, channel: grpc.aio.Channel, operator: Operator) -> None:
    """F32: the effective number is the one that placements obey, and the label mirrors it."""
    await FakeWorker().register(channel, max_replicas_per_model=3)
    assert registry.mirror.snapshot.max_replicas_on(N) == 3
    await operator("SetNodeOverrides", overrides=types.NodeOverrides(max_replicas_per_model=1))
    assert registry.mirror.snapshot.max_replicas_on(N) == 1
    assert (await operator.node()).labels["node.replica-slots"] == "1"
    reset = await operator("ResetNodeOverrides", memory_budgets=True)
    assert reset.node.max_replicas_per_model == 1
    reset = await operator("ResetNodeOverrides", max_replicas_per_model=True)
    assert (reset.node.max_replicas_per_model, reset.node.labels["node.replica-slots"]) == (3, "3")


async def test_cordon_and_drain_are_undone_by_their_own_words_only(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F2, F7: resume gives a drained node back as it was before."""
    await FakeWorker().register(channel)
    assert (await operator("CordonNode")).node.state == types.NODE_STATE_CORDONED
    assert not registry.mirror.snapshot.usable(N)
    drained = await operator("DrainNode")
    assert (drained.node.state, drained.replicas) == (types.NODE_STATE_DRAINING, 0)
    assert (await operator("UncordonNode")).node.state == types.NODE_STATE_DRAINING
    assert (await operator("ResumeNode")).node.state == types.NODE_STATE_LIVE
    assert registry.mirror.snapshot.usable(N)
    await operator("CordonNode")
    await operator("DrainNode")
    assert (await operator("ResumeNode")).node.state == types.NODE_STATE_CORDONED


async def test_saying_it_again_writes_nothing(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F2, F6, F30."""
    await FakeWorker().register(channel)
    overrides = types.NodeOverrides(max_replicas_per_model=2, memory_budgets={"*": "50%"})
    calls: list[tuple[str, dict[str, Any]]] = [
        ("ApproveNode", {}),
        ("CordonNode", {}),
        ("DrainNode", {}),
        ("SetNodeLabels", {"set": {"a": "b"}, "remove": ["c"]}),
        ("SetNodeOverrides", {"overrides": overrides}),
        ("ResetNodeOverrides", {}),
        ("ResumeNode", {}),
        ("UncordonNode", {}),
    ]
    for verb, fields in calls:
        await operator(verb, **fields)
        before = (await registry.store.load()).approvals[N].mod_revision
        await operator(verb, **fields)
        assert (await registry.store.load()).approvals[N].mod_revision == before, verb


async def test_a_node_that_has_replicas_is_removed_by_force_only(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F8: the worker learns of it, and is a new node when it comes again."""
    worker = FakeWorker()
    await worker.register(channel)
    async with worker.stream(channel) as stream:
        wanted = await place_on(registry, worker, stream)
        await stream.say(worker.report(wanted, serving=serving()))
        await registry.replica(ReplicaState.READY)
        await operator("SetNodeLabels", set={"a": "b"})
        with pytest.raises(NodeInUse) as told:
            await operator("RemoveNode")
        assert dict(told.value.metadata) == {"node": "n1", "replicas": "1"}
        assert N in registry.mirror.snapshot.nodes
        assert (await operator("RemoveNode", force=True)).replicas == 1
        assert isinstance(await stream.ended(), IncarnationLost)
    await registry.until(lambda s: not (s.approvals or s.nodes or s.devices or s.replicas or s.sources) or None)
    with pytest.raises(NodeNotFound):
        await operator("RemoveNode")
    await FakeWorker(key=b"x" * 40).register(channel)  # the name is free for another machine
    assert not registry.mirror.snapshot.approvals[N].labels


@manual
async def test_a_removed_node_is_unknown_again(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F3, F8: also one that is idle, gone or pending; its approval goes with it."""
    worker = FakeWorker()
    with pytest.raises(NodePending):
        await worker.register(channel)
    await operator("RemoveNode")
    with pytest.raises(NodePending):
        await worker.register(channel)
    await operator("ApproveNode")
    await worker.register(channel)
    await operator("RemoveNode")
    assert N not in registry.mirror.snapshot.nodes
    with pytest.raises(NodePending):
        await worker.register(channel)


@pytest.mark.parametrize(
    ("verb", "fields", "error", "field"),
    [
        ("CordonNode", {"node": "no such"}, InvalidRequest, "node"),
        ("CordonNode", {"node": "unheard-of"}, NodeNotFound, None),
        ("SetNodeLabels", {"node": "unheard-of", "set": {"a": "b"}}, NodeNotFound, None),
        ("SetNodeOverrides", {"overrides": types.NodeOverrides()}, InvalidRequest, "overrides"),
        (
            "SetNodeOverrides",
            {"overrides": types.NodeOverrides(max_replicas_per_model=-1)},
            InvalidRequest,
            "overrides.max_replicas_per_model",
        ),
        *(
            ("SetNodeOverrides", {"overrides": types.NodeOverrides(memory_budgets=budgets)}, InvalidRequest, name)
            for name in ["overrides.memory_budgets"]
            for budgets in ({"*": "101%"}, {"*": "much"}, {"GPU-7": "1GiB"}, {"": "1GiB"}, {"a/b": "1GiB"})
        ),
        ("SetNodeLabels", {"set": {"": "x"}}, InvalidRequest, "set"),
        ("SetNodeLabels", {"set": {"a": "x" * 5000}}, InvalidRequest, "set"),
        ("SetNodeLabels", {"set": {str(i): "" for i in range(300)}}, InvalidRequest, "set"),
        ("SetNodeLabels", {"set": {"node.replica-slots": "99"}}, InvalidRequest, "set"),
        ("SetNodeLabels", {"set": {"a": "b"}, "remove": ["a"]}, InvalidRequest, "remove"),
        ("SetNodeLabels", {"remove": ["\n"]}, InvalidRequest, "remove"),
        ("ApproveNode", {"key_fingerprint": "abc"}, InvalidRequest, "key_fingerprint"),
    ],
)
async def test_what_cannot_be_is_refused_and_named(
    channel: grpc.aio.Channel,
    operator: Operator,
    verb: str,
    fields: dict[str, Any],
    error: type[MeshError],
    field: str | None,
) -> None:
    """F6, F30, F32."""
    await FakeWorker().register(channel)
    with pytest.raises(error) as told:
        await operator(verb, **fields)
    assert told.value.metadata.get("field") == field


async def test_a_budget_of_a_device_that_is_away_waits_for_it(
    registry: Registry, channel: grpc.aio.Channel, operator: Operator
) -> None:
    """F30: nothing is known of the devices of a node that is gone, so that nothing about them is wrong."""
    worker = FakeWorker()
    await worker.register(channel)
    await operator("Deregister", incarnation=worker.incarnation)
    await registry.until(lambda s: N not in s.devices or None)
    await operator("SetNodeOverrides", overrides=types.NodeOverrides(memory_budgets={"cpu": "10%"}))
    await worker.register(channel)
    assert registry.mirror.snapshot.devices[N][CPU].budget_bytes == GIB


async def test_the_folder_keeps_what_operators_said(etcd_endpoint: str, mesh_name: str, tmp_path: Path) -> None:
    """F2, F6, F30, F32: for an etcd that does not survive."""
    folder = DesiredFolder(tmp_path)
    folder.open()
    config = RegistryConfig(write_seen_seconds=5.0, leases=LEASES)
    async with Registry(etcd_endpoint, mesh_name, config, folder).running() as registry:
        async with grpc.aio.insecure_channel(registry.endpoint) as channel:
            operator = Operator(channel)
            for name in ("n1", "n2"):
                await FakeWorker(name).register(channel)
            await operator("DrainNode")
            await operator("SetNodeLabels", set={"a": "b"})
            overrides = types.NodeOverrides(max_replicas_per_model=2, memory_budgets={"cpu": "50%"})
            await operator("SetNodeOverrides", overrides=overrides)
            said = registry.mirror.snapshot.approvals[N]
            await operator("RemoveNode", "n2")
            assert [name for name, _ in folder.approvals()] == ["n1"]
            await registry.store.forget_node(N, force=True)
            assert await fill_from_folder(registry.store, folder) == 1
            again = (await registry.store.load()).approvals[N]
            assert (again.key_fingerprint, again.draining) == (said.key_fingerprint, True)
            assert dict(again.labels) == {"a": "b"}
            assert (again.max_replicas_per_model, dict(again.memory_budgets)) == (2, {"cpu": "50%"})
    folder.close()
