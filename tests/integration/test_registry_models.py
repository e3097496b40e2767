"""The registry towards operators: models declared, listed, deleted; desired state kept in a folder; who may do what."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.core.errors import (
    InvalidRequest,
    InvalidSpec,
    MeshError,
    ModelNotFound,
    NodeNameTaken,
    PermissionDenied,
)
from localmesh.core.ids import ModelName, NodeName
from localmesh.core.records import ApprovalRecord, ModelSpec, Policy
from localmesh.etcd import EtcdClient, EtcdConfig
from localmesh.registry.config import RegistryConfig
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.registry.service import SERVICE, RegistryServicer, fill_from_folder
from localmesh.rpc.authority import CertificateAuthority
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.identity import registry_policy
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.rpc.tls import TlsFiles
from localmesh.store import MeshStore, Mirror
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import registry_service_pb2_grpc as rpc
from localmesh.v1 import types_pb2

CLOCK = SystemClock()
CONFIG = RegistryConfig(write_seen_seconds=10.0)
GIB = 1 << 30


@contextlib.asynccontextmanager
async def mesh_store(etcd: str, mesh: str) -> AsyncIterator[MeshStore]:
    async with EtcdClient(EtcdConfig(endpoints=(etcd,)), CLOCK) as client:
        store = MeshStore(client, mesh, CLOCK)
        await store.check_schema()
        yield store


@contextlib.asynccontextmanager
async def registry(
    store: MeshStore, *, folder: DesiredFolder | None = None, tls: TlsFiles | None = None
) -> AsyncIterator[GrpcServer]:
    mirror = Mirror(store)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(mirror.run())
        await mirror.loaded()
        servicer = RegistryServicer(store, mirror, CONFIG, CLOCK, folder=folder)
        policy = registry_policy(store.keys.mesh)
        server = GrpcServer(ServerConfig(tls=tls, drain_seconds=5), name="registry", identity_policy=policy)
        server.add(rpc.add_RegistryServiceServicer_to_server, servicer, SERVICE)
        async with server:
            try:
                yield server
            finally:
                servicer.close()
        running.cancel()


class Operator:
    """Calls the registry; failures come as MeshErrors."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.RegistryServiceStub(channel)

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def apply(self, name: str, *, source: str = "m.gguf", dry_run: bool = False, **policy: Any) -> Any:
        spec = types_pb2.ModelSpec(name=name, backend="llama", source=source)
        kept = types_pb2.PlacementPolicy(**policy) if policy else None
        return await self.call("ApplyModel", pb.ApplyModelRequest(spec=spec, policy=kept, dry_run=dry_run))

    async def beat(self, node: str, incarnation: int) -> pb.HeartbeatResponse:
        call = self._stub.Heartbeat(iter([pb.HeartbeatRequest(node=node, incarnation=incarnation, sequence=1)]))
        try:
            return await call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def names(self) -> list[str]:
        return [m.spec.name for m in (await self.call("ListModels", pb.ListModelsRequest())).models]


@pytest.fixture
async def store(etcd_endpoint: str, mesh_name: str) -> AsyncIterator[MeshStore]:
    async with mesh_store(etcd_endpoint, mesh_name) as store:
        yield store


@pytest.fixture
async def operator(store: MeshStore) -> AsyncIterator[Operator]:
    async with registry(store) as server, grpc.aio.insecure_channel(server.endpoint) as channel:
        yield Operator(channel)


async def test_a_model_is_created_changed_and_left_alone(operator: Operator) -> None:
    created = await operator.apply("a")
    assert created.outcome == pb.APPLY_OUTCOME_CREATED
    same = await operator.apply("a")
    assert (same.outcome, same.model) == (pb.APPLY_OUTCOME_UNCHANGED, created.model)
    changed = await operator.apply("a", source="other.gguf")
    assert changed.outcome == pb.APPLY_OUTCOME_CHANGED
    assert changed.model.revision != created.model.revision


async def test_a_policy_that_is_not_given_stays(operator: Operator) -> None:
    await operator.apply("a", min_replicas=2)
    assert (await operator.apply("a")).model.policy.min_replicas == 2
    changed = await operator.apply("a", min_replicas=3)
    assert (changed.outcome, changed.model.policy.min_replicas) == (pb.APPLY_OUTCOME_CHANGED, 3)


async def test_what_was_applied_is_seen_by_the_next_call(operator: Operator) -> None:
    for i in range(10):
        name = f"m{i}"
        await operator.apply(name, min_replicas=i)
        got = await operator.call("GetModel", pb.GetModelRequest(name=name))
        assert got.model.policy.min_replicas == i
        await operator.call("DeleteModel", pb.DeleteModelRequest(name=name))
        with pytest.raises(ModelNotFound):
            await operator.call("GetModel", pb.GetModelRequest(name=name))


async def test_a_dry_run_says_what_would_be_and_changes_nothing(operator: Operator, store: MeshStore) -> None:
    """F44."""
    dry = await operator.apply("a", min_replicas=1, dry_run=True)
    assert dry.outcome == pb.APPLY_OUTCOME_CREATED
    assert not (await store.load()).models
    assert (await operator.apply("a", min_replicas=1)).model == dry.model
    assert (await operator.apply("a", dry_run=True)).outcome == pb.APPLY_OUTCOME_UNCHANGED
    assert (await operator.apply("a", source="x", dry_run=True)).outcome == pb.APPLY_OUTCOME_CHANGED
    assert (await operator.apply("a", min_replicas=2, dry_run=True)).outcome == pb.APPLY_OUTCOME_CHANGED
    with pytest.raises(InvalidSpec):
        await operator.apply("a", source="../x", dry_run=True)


async def test_what_is_not_acceptable_is_refused_by_its_field(operator: Operator) -> None:
    with pytest.raises(InvalidSpec) as caught:
        await operator.apply("a", source="/etc/passwd")
    assert caught.value.metadata["field"] == "source"
    with pytest.raises(InvalidSpec):
        await operator.call("ApplyModel", pb.ApplyModelRequest())
    with pytest.raises(InvalidSpec):
        await operator.apply("a", min_replicas=3, max_replicas=2)
    with pytest.raises(InvalidRequest):
        await operator.call("DeleteModel", pb.DeleteModelRequest(name="a/b"))


async def test_a_model_that_is_not_there_cannot_be_deleted(operator: Operator) -> None:
    with pytest.raises(ModelNotFound, match="localmesh models"):
        await operator.call("DeleteModel", pb.DeleteModelRequest(name="a"))


async def test_lists_come_in_pages_that_do_not_shift(operator: Operator) -> None:
    for name in ("c", "a", "e", "b", "d"):
        await operator.apply(name)
    first = await operator.call("ListModels", pb.ListModelsRequest(page_size=2))
    assert [m.spec.name for m in first.models] == ["a", "b"]
    await operator.call("DeleteModel", pb.DeleteModelRequest(name="a"))
    request = pb.ListModelsRequest(page_size=2, page_token=first.next_page_token)
    second = await operator.call("ListModels", request)
    assert [m.spec.name for m in second.models] == ["c", "d"]
    request = pb.ListModelsRequest(page_size=2, page_token=second.next_page_token)
    last = await operator.call("ListModels", request)
    assert ([m.spec.name for m in last.models], last.next_page_token) == (["e"], "")
    with pytest.raises(InvalidRequest):
        await operator.call("ListModels", pb.ListModelsRequest(page_token="?"))
    with pytest.raises(InvalidRequest):
        await operator.call("ListNodes", pb.ListNodesRequest(page_size=-1))


async def test_many_writers_of_one_model_all_get_an_answer(operator: Operator) -> None:
    answers = await asyncio.gather(*(operator.apply("a", source=f"{i}.gguf") for i in range(8)))
    assert sum(a.outcome == pb.APPLY_OUTCOME_CREATED for a in answers) == 1
    stored = await operator.call("GetModel", pb.GetModelRequest(name="a"))
    assert stored.model.revision in {a.model.revision for a in answers}


def registration(node: str, key: bytes) -> pb.RegisterRequest:
    facts = pb.NodeFacts(endpoint="h:1", devices=[pb.DeviceFacts(id="cpu", kind="cpu", total_bytes=GIB)])
    return pb.RegisterRequest(node=node, public_key=key, facts=facts)


async def test_replicas_and_nodes_are_listed_with_filters(operator: Operator) -> None:
    """F2: a node that left is gone, not forgotten."""
    answer = await operator.call("Register", registration("n1", b"k" * 40))
    listed = await operator.call("ListNodes", pb.ListNodesRequest())
    assert [(n.name, n.state) for n in listed.nodes] == [("n1", types_pb2.NODE_STATE_LIVE)]
    await operator.call("Deregister", pb.DeregisterRequest(node="n1", incarnation=answer.incarnation))
    listed = await operator.call("ListNodes", pb.ListNodesRequest())
    assert [(n.name, n.state) for n in listed.nodes] == [("n1", types_pb2.NODE_STATE_GONE)]
    for request in (pb.ListReplicasRequest(), pb.ListReplicasRequest(model="m", node="n1")):
        assert not (await operator.call("ListReplicas", request)).replicas
    with pytest.raises(InvalidRequest):
        await operator.call("ListReplicas", pb.ListReplicasRequest(model="a b"))


# The folder of desired state.


async def test_each_accepted_change_is_in_the_folder_before_it_is_answered(store: MeshStore, tmp_path: Path) -> None:
    folder = DesiredFolder(tmp_path)
    await fill_from_folder(store, folder)
    async with registry(store, folder=folder) as server, grpc.aio.insecure_channel(server.endpoint) as channel:
        operator = Operator(channel)
        await operator.apply("a:1", min_replicas=2)
        assert folder.models() == [
            (ModelSpec(name=ModelName("a:1"), backend="llama", source="m.gguf"), Policy(min_replicas=2))
        ]
        await operator.apply("b", dry_run=True)
        await operator.call("Register", registration("n1", b"k" * 40))
        assert [(node, approval.approved) for node, approval in folder.approvals()] == [("n1", True)]
        await operator.call("DeleteModel", pb.DeleteModelRequest(name="a:1"))
        assert folder.models() == []
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["n1.yaml"]
    folder.close()


async def test_an_empty_store_is_filled_from_the_folder(store: MeshStore, tmp_path: Path) -> None:
    """F41: what was declared, and which key a name belongs to, outlive a store that does not."""
    folder = DesiredFolder(tmp_path)
    folder.open()
    folder.save_model(ModelSpec(name=ModelName("a"), backend="llama", source="m"), Policy(min_replicas=1))
    folder.save_approval(NodeName("n1"), ApprovalRecord(key_fingerprint="00", cordoned=True, labels={"zone": "a"}))
    assert await fill_from_folder(store, folder) == 2
    assert await fill_from_folder(store, folder) == 0
    async with registry(store, folder=folder) as server, grpc.aio.insecure_channel(server.endpoint) as channel:
        operator = Operator(channel)
        assert await operator.names() == ["a"]
        with pytest.raises(NodeNameTaken):
            await operator.call("Register", registration("n1", b"k" * 40))
    approval = (await store.load()).approvals[NodeName("n1")]
    assert (approval.cordoned, approval.labels) == (True, {"zone": "a"})
    folder.close()


async def test_the_folder_does_not_overwrite_what_the_store_knows(store: MeshStore, tmp_path: Path) -> None:
    folder = DesiredFolder(tmp_path)
    folder.open()
    folder.save_model(ModelSpec(name=ModelName("a"), backend="llama", source="old"), Policy())
    await store.put_model(ModelSpec(name=ModelName("a"), backend="llama", source="new"), None)
    assert await fill_from_folder(store, folder) == 0
    assert (await store.load()).models[ModelName("a")].spec.source == "new"
    folder.close()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("models/a.yaml", "apiVersion: localmesh/v1\nkind: Model\nname: a\n"),
        ("models/a.yaml", "apiVersion: localmesh/v1\nkind: Model\nname: b\nengine: llama\nsource: m\n"),
        ("models/a.yaml", ""),
        ("nodes/n.yaml", "{"),
        ("nodes/n.yaml", "[]"),
        ("nodes/n.yaml", "apiVersion: localmesh/v1\nkind: Approval\nnode: other\nkey_fingerprint: ''\n"),
        ("nodes/n.yaml", "apiVersion: localmesh/v1\nkind: Approval\nnode: n\nkey_fingerprint: ''\ncordoned: 3\n"),
        ("nodes/n.yaml", "apiVersion: localmesh/v1\nkind: Approval\nnode: n\nkey_fingerprint: ''\nlabels: [a]\n"),
        ("nodes/n.yaml", "!!python/object/apply:os.getcwd []\n"),
    ],
)
async def test_a_damaged_file_is_named_and_nothing_is_put(
    store: MeshStore, tmp_path: Path, path: str, text: str
) -> None:
    folder = DesiredFolder(tmp_path)
    folder.open()
    (tmp_path / path).write_text(text)
    with pytest.raises(InvalidSpec, match=path):
        await fill_from_folder(store, folder)
    assert not (await store.load()).models
    folder.close()


async def test_what_a_crash_left_half_written_is_removed_and_not_read(store: MeshStore, tmp_path: Path) -> None:
    folder = DesiredFolder(tmp_path)
    folder.open()
    half = tmp_path / "models" / ".a.yaml.writing"
    half.write_text("apiVersion: loc")
    assert await fill_from_folder(store, folder) == 0
    assert not half.exists()
    folder.close()


async def test_a_folder_that_cannot_be_written_refuses_the_change(store: MeshStore, tmp_path: Path) -> None:
    folder = DesiredFolder(tmp_path)
    await fill_from_folder(store, folder)
    (tmp_path / "models" / ".a.yaml.writing").mkdir()  # stands for a full disk: also for root it cannot be written
    async with registry(store, folder=folder) as server, grpc.aio.insecure_channel(server.endpoint) as channel:
        with pytest.raises(MeshError, match="cannot write to the folder"):
            await Operator(channel).apply("a")
        (tmp_path / "models" / ".a.yaml.writing").rmdir()
        assert (await Operator(channel).apply("a")).outcome == pb.APPLY_OUTCOME_UNCHANGED
        assert len(folder.models()) == 1
    folder.close()


# Who may do what, once there is TLS.


@contextlib.asynccontextmanager
async def calling(server: GrpcServer, files: TlsFiles) -> AsyncIterator[Operator]:
    credentials = grpc.ssl_channel_credentials(
        files.ca.read_bytes(), private_key=files.key.read_bytes(), certificate_chain=files.cert.read_bytes()
    )
    async with grpc.aio.secure_channel(server.endpoint, credentials) as channel:
        yield Operator(channel)


def public_key(files: TlsFiles) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    certificate = x509.load_pem_x509_certificate(files.cert.read_bytes())
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


async def test_with_tls_a_node_speaks_for_itself_only_and_changes_no_model(store: MeshStore, tmp_path: Path) -> None:
    """F60."""
    mesh = store.keys.mesh
    authority = CertificateAuthority.create(tmp_path / "ca", mesh)
    own = authority.issue_files(tmp_path / "registry", "registry", "r1")
    node = authority.issue_files(tmp_path / "n1", "node", "n1")
    boss = authority.issue_files(tmp_path / "boss", "operator", "boss")
    async with registry(store, tls=own) as server:
        async with calling(server, node) as caller:
            with pytest.raises(PermissionDenied, match="may not call"):
                await caller.apply("a")
            with pytest.raises(PermissionDenied, match="may not speak for the node n2"):
                await caller.call("Register", registration("n2", public_key(node)))
            with pytest.raises(PermissionDenied, match="not that of the certificate"):
                await caller.call("Register", registration("n1", b"k" * 91))
            answer = await caller.call("Register", registration("n1", public_key(node)))
            with pytest.raises(PermissionDenied):
                await caller.call("Deregister", pb.DeregisterRequest(node="n2", incarnation=answer.incarnation))
            with pytest.raises(PermissionDenied):
                await caller.beat("n2", answer.incarnation)
            assert await caller.names() == []
        async with calling(server, boss) as caller:
            await caller.apply("a")
            with pytest.raises(PermissionDenied):
                await caller.call("Register", registration("boss", public_key(boss)))
