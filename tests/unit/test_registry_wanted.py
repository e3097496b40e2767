"""What a node is told."""

from dataclasses import replace

from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelRecord, ModelSpec, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.registry.wanted import ViewCache
from localmesh.v1 import types_pb2

N1, N2 = NodeName("n1"), NodeName("n2")


def model(name: str, revision: str = "r1") -> ModelRecord:
    return ModelRecord(spec=ModelSpec(name=ModelName(name), backend="llama", source="f"), revision=revision)


def replica(name: str, node: NodeName = N1, *, incarnation: int = 7, revision: str = "r1") -> ReplicaRecord:
    return ReplicaRecord(
        id=ReplicaId(ModelName(name), node, 0),
        state=ReplicaState.PLACED,
        revision=revision,
        incarnation=incarnation,
        devices={CPU: 5},
        create_revision=40,
        mod_revision=40,
    )


def snapshot(*replicas: ReplicaRecord, models: tuple[ModelRecord, ...] = (model("m"),), revision: int = 50) -> Snapshot:
    by_model: dict[ModelName, dict[ReplicaId, ReplicaRecord]] = {}
    for record in replicas:
        by_model.setdefault(record.id.model, {})[record.id] = record
    return Snapshot(revision=revision, models={m.spec.name: m for m in models}, replicas=by_model)


def test_a_wanted_set_has_all_replicas_of_the_node_in_its_incarnation() -> None:
    state = snapshot(replica("m"), replica("a"), replica("m", N2), models=(model("m"), model("a")))
    told = ViewCache().view(state).wanted_set(N1, 7)
    assert [(w.ref.model, w.revision, w.placement, dict(w.devices)) for w in told.replicas] == [
        ("a", "r1", 40, {"cpu": 5}),
        ("m", "r1", 40, {"cpu": 5}),
    ]
    assert (told.incarnation, told.store_revision) == (7, 50)
    assert told.replicas[0].state == types_pb2.REPLICA_STATE_PLACED


def test_records_of_another_incarnation_are_not_for_this_one() -> None:
    assert not ViewCache().view(snapshot(replica("m", incarnation=6))).wanted_set(N1, 7).replicas


def test_a_replica_of_an_edited_or_deleted_model_has_no_spec() -> None:
    edited = snapshot(replica("m"), models=(model("m", "r2"),))
    assert not ViewCache().view(edited).wanted_set(N1, 7).replicas[0].HasField("spec")
    deleted = snapshot(replica("m"), models=())
    assert not ViewCache().view(deleted).wanted_set(N1, 7).replicas[0].HasField("spec")
    assert ViewCache().view(snapshot(replica("m"))).wanted_set(N1, 7).replicas[0].spec.source == "f"


def test_a_change_elsewhere_is_no_reason_to_send_anything() -> None:
    views = ViewCache()
    before = views.view(snapshot(replica("m")))
    after = views.view(snapshot(replica("m"), replica("m", N2), revision=51))
    assert before.wanted_key(N1, 7) == after.wanted_key(N1, 7)
    assert before.catalog is after.catalog


def test_an_edit_of_the_model_changes_what_its_replicas_are_told() -> None:
    views = ViewCache()
    before = views.view(snapshot(replica("m")))
    after = views.view(snapshot(replica("m"), models=(model("m", "r2"),), revision=51))
    assert before.wanted_key(N1, 7) != after.wanted_key(N1, 7)
    assert [entry.revision for entry in after.catalog.entries] == ["r2"]


def test_a_change_of_a_record_is_told() -> None:
    views = ViewCache()
    before = views.view(snapshot(replica("m")))
    after = views.view(snapshot(replace(replica("m"), state=ReplicaState.UNLOADING, mod_revision=51), revision=51))
    assert before.wanted_key(N1, 7) != after.wanted_key(N1, 7)


def test_each_snapshot_is_arranged_once() -> None:
    views, state = ViewCache(), snapshot(replica("m"))
    assert views.view(state) is views.view(state)
