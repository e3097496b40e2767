"""The names of keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.ids import DeviceId, HolderId, ModelName, NodeName, ReplicaId
from localmesh.store.keys import (
    DeviceKey,
    FailureKey,
    HistoryKey,
    InflightKey,
    Keys,
    ModelKey,
    NodeKey,
    ParsedKey,
    ReplicaKey,
    SingleKey,
    Table,
)

KEYS = Keys("m1")
REPLICA = ReplicaId(ModelName("qwen:0.5b"), NodeName("node-1"), 3)
GPU = DeviceId("GPU-5c2b-11")


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        (KEYS.schema(), SingleKey(Table.META)),
        (KEYS.guard(), SingleKey(Table.GUARD)),
        (KEYS.leader(), SingleKey(Table.LEADER)),
        (KEYS.model(REPLICA.model), ModelKey(Table.MODELS, REPLICA.model)),
        (KEYS.policy(REPLICA.model), ModelKey(Table.POLICIES, REPLICA.model)),
        (KEYS.approval(REPLICA.node), NodeKey(Table.APPROVALS, REPLICA.node)),
        (KEYS.node(REPLICA.node), NodeKey(Table.NODES, REPLICA.node)),
        (KEYS.measured(REPLICA.node), NodeKey(Table.MEASURED, REPLICA.node)),
        (KEYS.sources(REPLICA.node), NodeKey(Table.SOURCES, REPLICA.node)),
        (KEYS.device(REPLICA.node, GPU), DeviceKey(REPLICA.node, GPU)),
        (KEYS.replica(REPLICA), ReplicaKey(Table.REPLICAS, REPLICA)),
        (KEYS.progress(REPLICA), ReplicaKey(Table.PROGRESS, REPLICA)),
        (KEYS.inflight(REPLICA, HolderId("router-1a")), InflightKey(REPLICA, HolderId("router-1a"))),
        (KEYS.failure(REPLICA.model, REPLICA.node), FailureKey(REPLICA.model, REPLICA.node)),
        (KEYS.history(REPLICA.model, REPLICA.node), HistoryKey(REPLICA.model, REPLICA.node)),
    ],
)
def test_every_key_that_is_built_is_read_back(key: bytes, parsed: ParsedKey) -> None:
    assert KEYS.parse(key) == parsed
    assert key.startswith(KEYS.prefix)


def test_a_table_and_its_parts_are_prefixes_of_its_keys() -> None:
    assert KEYS.replica(REPLICA).startswith(KEYS.replicas(REPLICA.model))
    assert KEYS.replica(REPLICA).startswith(KEYS.table(Table.REPLICAS))
    assert KEYS.inflight(REPLICA, HolderId("h")).startswith(KEYS.holders(REPLICA))
    assert KEYS.device(REPLICA.node, GPU).startswith(KEYS.devices(REPLICA.node))


def test_the_prefix_of_one_replica_covers_no_other_one() -> None:
    """An empty range of holders must mean that nobody holds this replica, and say nothing of its neighbours."""
    eleven = ReplicaId(REPLICA.model, REPLICA.node, 31)
    assert not KEYS.inflight(eleven, HolderId("h")).startswith(KEYS.holders(REPLICA))
    longer = ReplicaId(ModelName("qwen:0.5b-x"), REPLICA.node, 0)
    assert not KEYS.replica(longer).startswith(KEYS.replicas(REPLICA.model))


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"models",
        b"models/",
        b"models/a/b",
        b"models/-a",
        b"Models/a",
        b"nonsense/a",
        b"nodes/a b",
        b"devices/n",
        b"devices/n/..",
        b"replicas/m/n",
        b"replicas/m/n/",
        b"replicas/m/n/01",
        b"replicas/m/n/-1",
        b"replicas/m/n/+1",
        b"replicas/m/n/10000",
        b"replicas/m/n/\xd9\xa3",
        b"replicas/m/n/0/x",
        b"inflight/m/n/0",
        b"inflight/m/n/0/",
        b"inflight/m/n/0/h/x",
        b"failures/m",
        b"meta/other",
        b"guard/x",
        b"leader/x",
        b"models/\xff\xfe",
        b"models/" + b"a" * 2000,
    ],
)
def test_a_key_that_is_none_of_ours_is_refused(tail: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        KEYS.parse(KEYS.prefix + tail)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_key_or_a_value_error(tail: bytes) -> None:
    try:
        KEYS.parse(KEYS.prefix + tail)
    except ValueError:
        return
    tail.decode("ascii")


def test_a_key_of_another_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="not a key of the mesh m1"):
        KEYS.parse(Keys("m10").model(ModelName("a")))


@pytest.mark.parametrize("mesh", ["", "a/b", "-a", "a b", "a" * 64, "ä"])
def test_a_mesh_name_that_cannot_be_part_of_a_key_is_refused(mesh: str) -> None:
    with pytest.raises(ValueError, match="not a mesh name"):
        Keys(mesh)
