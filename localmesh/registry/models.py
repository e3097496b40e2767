"""Declaring models, and what the mesh says of them."""

import asyncio

from localmesh.core.clock import Clock
from localmesh.core.errors import InvalidSpec, ModelNotFound
from localmesh.core.ids import ModelName
from localmesh.core.records import ModelRecord, ModelSpec, Policy, ReplicaRecord
from localmesh.core.snapshot import Snapshot
from localmesh.registry.config import RegistryConfig
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.registry.written import Predicate, shown
from localmesh.rpc.convert import (
    failure_to_proto,
    model_name_of,
    model_to_proto,
    node_name_of,
    policy_from_proto,
    replica_to_proto,
    spec_from_proto,
)
from localmesh.rpc.paging import page
from localmesh.store.codec import revision_of
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2 as pb

_OUTCOMES = {
    "created": pb.APPLY_OUTCOME_CREATED,
    "changed": pb.APPLY_OUTCOME_CHANGED,
    "unchanged": pb.APPLY_OUTCOME_UNCHANGED,
}


class Models:
    """The calls of operators about models and replicas. What is read comes from the mirror's snapshot."""

    def __init__(
        self, *, store: MeshStore, mirror: Mirror, config: RegistryConfig, clock: Clock, folder: DesiredFolder | None
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._config = config
        self._clock = clock
        self._folder = folder
        # Store and folder must see changes in the same order.
        self._one_at_a_time = asyncio.Lock()

    async def apply(self, request: pb.ApplyModelRequest) -> pb.ApplyModelResponse:
        """Declare or change a model (T4).

        Raises:
            InvalidSpec: A field is not acceptable.
            InternalError: The change could not be kept in the folder of desired state.
            Conflict: Others changed it all the time.
            StoreUnavailable: etcd does not answer.
        """
        if not request.HasField("spec"):
            raise InvalidSpec("the request has no spec", field="spec")
        spec = spec_from_proto(request.spec)
        policy = policy_from_proto(request.policy, model=spec.name) if request.HasField("policy") else None
        if request.dry_run:
            return self._would(spec, policy)
        if self._folder is None:
            record, kept, outcome = await self._store.put_model(spec, policy)
        else:
            async with self._one_at_a_time:
                record, kept, outcome = await self._store.put_model(spec, policy)
                await self._folder.in_order(self._folder.save_model, record.spec, kept)
        await self._shown(lambda snapshot: _shows(snapshot, record, kept))
        return pb.ApplyModelResponse(model=model_to_proto(record, kept), outcome=_OUTCOMES[outcome])

    async def delete(self, request: pb.DeleteModelRequest) -> pb.DeleteModelResponse:
        """Remove a model.

        Raises:
            InvalidRequest: The name cannot be one.
            ModelNotFound: There is none.
            InternalError: The change could not be kept in the folder of desired state.
            StoreUnavailable: etcd does not answer.
        """
        name = model_name_of(request.name, field="name")
        if self._folder is None:
            existed = await self._store.delete_model(name)
        else:
            async with self._one_at_a_time:
                existed = await self._store.delete_model(name)
                # Also when it was not there: a try before this one may have died between the two.
                await self._folder.in_order(self._folder.remove_model, name)
        if not existed:
            raise _not_found(name)
        await self._shown(lambda snapshot: name not in snapshot.models)
        replicas = sum(1 for _ in self._mirror.snapshot.replicas_of(name))
        return pb.DeleteModelResponse(replicas=replicas)

    def get(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """Return a model with its replicas and failures.

        Raises:
            InvalidRequest: The name cannot be one.
            ModelNotFound: There is none.
        """
        name, snapshot = model_name_of(request.name, field="name"), self._mirror.snapshot
        record = snapshot.models.get(name)
        if record is None:
            raise _not_found(name)
        replicas = sorted(snapshot.replicas_of(name), key=lambda r: r.id)
        failures = sorted(snapshot.failures.get(name, {}).items())
        return pb.GetModelResponse(
            model=model_to_proto(record, snapshot.policy(name)),
            replicas=[replica_to_proto(snapshot, replica) for replica in replicas],
            failures=[failure_to_proto(failure) for _, failure in failures],
        )

    def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Return a page of models by name.

        Raises:
            InvalidRequest: Page size or token are not acceptable.
        """
        snapshot = self._mirror.snapshot
        found, token = page(
            snapshot.models.values(),
            key=lambda record: record.spec.name,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        models = [model_to_proto(record, snapshot.policy(record.spec.name)) for record in found]
        return pb.ListModelsResponse(models=models, next_page_token=token)

    def list_replicas(self, request: pb.ListReplicasRequest) -> pb.ListReplicasResponse:
        """Return a page of replicas by model, node and index.

        Raises:
            InvalidRequest: A name, page size or token is not acceptable.
        """
        snapshot = self._mirror.snapshot
        replicas = snapshot.replicas_of(model_name_of(request.model)) if request.model else snapshot.all_replicas()
        if request.node:
            node = node_name_of(request.node)
            replicas = (replica for replica in replicas if replica.id.node == node)
        found, token = page(replicas, key=_order, page_size=request.page_size, page_token=request.page_token)
        return pb.ListReplicasResponse(
            replicas=[replica_to_proto(snapshot, replica) for replica in found], next_page_token=token
        )

    def _would(self, spec: ModelSpec, policy: Policy | None) -> pb.ApplyModelResponse:
        snapshot = self._mirror.snapshot
        present, kept = snapshot.models.get(spec.name), snapshot.policy(spec.name)
        after = kept if policy is None else policy
        if present is None:
            outcome = pb.APPLY_OUTCOME_CREATED
        else:
            same = present.spec == spec and after == kept
            outcome = pb.APPLY_OUTCOME_UNCHANGED if same else pb.APPLY_OUTCOME_CHANGED
        record = ModelRecord(spec=spec, revision=revision_of(spec))
        return pb.ApplyModelResponse(model=model_to_proto(record, after), outcome=outcome)

    async def _shown(self, predicate: Predicate) -> None:
        await shown(self._mirror, predicate, within_seconds=self._config.write_seen_seconds, clock=self._clock)


def _shows(snapshot: Snapshot, record: ModelRecord, policy: Policy) -> bool:
    """Whether a snapshot has what was written, or something later."""
    seen = snapshot.models.get(record.spec.name)
    if seen is None or seen.mod_revision < record.mod_revision:
        return False
    return seen.mod_revision > record.mod_revision or snapshot.policy(record.spec.name) == policy


def _order(replica: ReplicaRecord) -> str:
    return f"{replica.id.model}/{replica.id.node}/{replica.id.index:010}"


def _not_found(name: ModelName) -> ModelNotFound:
    return ModelNotFound(f"there is no model {name!r}. `localmesh models` lists those that there are.", model=name)
