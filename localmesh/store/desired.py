"""T4 and T5: what operators want. Only the registry calls these."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from localmesh.core.errors import Conflict, InternalError, SchemaUnsupported
from localmesh.core.ids import ModelName, NodeName
from localmesh.core.records import ApprovalRecord, ModelRecord, ModelSpec, Policy, PolicyRecord
from localmesh.etcd import RangeResult
from localmesh.etcd import transactions as t
from localmesh.store import codec
from localmesh.store.access import StoreAccess, unsettled
from localmesh.store.errors import readable
from localmesh.store.v1 import records_pb2 as pb

Applied = Literal["created", "changed", "unchanged"]

_TRIES = 8


class Desired(StoreAccess):
    """Transactions of desired state."""

    async def check_schema(self) -> None:
        """Make sure that this version may use the store; write the version into an empty one.

        IF `meta/schema` does not exist THEN put it. Sent again after an unknown outcome.

        Raises:
            SchemaUnsupported: A version that this one does not understand has written the store.
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.schema()
        kv = await self.read_key(key)
        if kv is None:
            await self.commit([t.create(key) == 0], [t.put(key, codec.encode_schema())], settle=unsettled)
            kv = await self.read_key(key)
        if kv is None:
            raise Conflict("The schema of the store was deleted while it was being checked.")
        try:
            version, oldest = codec.decode_schema(kv.value)
        except ValueError as problem:
            raise SchemaUnsupported(f"The mesh's schema in etcd cannot be read: {problem}.") from problem
        if not version >= codec.OLDEST_COMPATIBLE or oldest > codec.SCHEMA_VERSION:
            raise SchemaUnsupported(
                f"The mesh's store has schema {version}, which is open to versions from {oldest} on; this localmesh "
                f"knows {codec.OLDEST_COMPATIBLE} to {codec.SCHEMA_VERSION}. Upgrade it, or use another mesh name.",
                stored=version,
                oldest=oldest,
            )

    async def put_model(self, spec: ModelSpec, policy: Policy | None) -> tuple[ModelRecord, Policy, Applied]:
        """T4: declare a model or change it. The last writer wins; the same again writes nothing.

        IF spec and policy are as just read THEN put those that differ. On a conflict it reads and tries again. An
        unknown outcome is settled by the value of what was written.

        Args:
            spec: The whole spec.
            policy: The whole policy; None keeps the present one, or the default for a new model.

        Returns:
            The model and its policy as they are now, and what was done.

        Raises:
            Conflict: Others changed it all the time.
            InternalError: What is stored cannot be read by this version.
            StoreUnavailable: etcd does not answer. The model may have been changed: apply it again.
        """
        keys = self.keys
        for _ in range(_TRIES):
            spec_read, policy_read = await self.read(t.get(keys.model(spec.name)), t.get(keys.policy(spec.name)))
            known, known_policy = _known(spec.name, spec_read, policy_read)
            present = known_policy.policy if known_policy is not None else Policy()
            wanted = present if policy is None else policy
            puts: list[t.Put] = []
            if known is None or known.spec != spec:
                message = codec.fresh(pb.Model, _value(spec_read))
                codec.fill_model(message, spec)
                puts.append(t.put(keys.model(spec.name), codec.encode(message)))
            if wanted != present or (policy is not None and known_policy is None):
                policy_message = codec.fresh(pb.Policy, _value(policy_read))
                codec.fill_policy(policy_message, wanted)
                puts.append(t.put(keys.policy(spec.name), codec.encode(policy_message)))
            if not puts and known is not None:
                return known, present, "unchanged"
            compare = [
                t.mod(keys.model(spec.name)) == (known.mod_revision if known is not None else 0),
                t.mod(keys.policy(spec.name)) == (known_policy.mod_revision if known_policy is not None else 0),
            ]
            outcome = await self.commit(compare, puts, settle=self.settle_by_value(puts[0]))
            if outcome.succeeded:
                record = _written(spec, known, outcome.revision)
                return record, wanted, "created" if known is None else "changed"
        raise Conflict(f"The model {spec.name} is being changed by others all the time.", model=spec.name)

    async def delete_model(self, model: ModelName) -> bool:
        """Remove a model and its policy; its replicas are for the reconciler to end.

        IF the model exists THEN delete both. Sent again after an unknown outcome.

        Returns:
            False if there was none. After a lost answer it may be this call that deleted it.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.model(model)
        outcome = await self.commit(
            [t.version(key) > 0], [t.delete(key), t.delete(self.keys.policy(model))], settle=unsettled
        )
        return outcome.succeeded

    async def put_approval(
        self, node: NodeName, *, expected: ApprovalRecord | None, new: ApprovalRecord
    ) -> ApprovalRecord:
        """T5: approve, cordon, drain or label a node; from the revision of a cordon on there is no new lock there.

        IF the approval has the mod-revision of `expected`, or None and does not exist, THEN put the new one. An unknown
        outcome is settled by the value.

        Returns:
            The new one, with its revision.

        Raises:
            Conflict: It is not as expected.
            StoreUnavailable: etcd does not answer.
        """
        key = self.keys.approval(node)
        kv = await self.read_key(key)
        expected_revision = expected.mod_revision if expected is not None else 0
        if (kv.mod_revision if kv is not None else 0) != expected_revision:
            raise _approval_conflict(node)
        with readable(f"the node {node}"):
            message = codec.fresh(pb.Approval, kv.value if kv is not None else None)
        codec.fill_approval(message, new)
        put = t.put(key, codec.encode(message))
        outcome = await self.commit([t.mod(key) == expected_revision], [put], settle=self.settle_by_value(put))
        if not outcome.succeeded:
            raise _approval_conflict(node)
        return replace(new, mod_revision=outcome.revision)


def _value(read: RangeResult) -> bytes | None:
    return read.kvs[0].value if read.kvs else None


def _known(
    model: ModelName, spec_read: RangeResult, policy_read: RangeResult
) -> tuple[ModelRecord | None, PolicyRecord | None]:
    """Decode what is stored of a model.

    Raises:
        InternalError: It cannot be read.
    """
    try:
        spec = [codec.decode_model(model, kv.value, kv.mod_revision) for kv in spec_read.kvs]
        policy = [codec.decode_policy(kv.value, kv.mod_revision) for kv in policy_read.kvs]
    except ValueError as problem:
        raise InternalError(f"The stored model {model} cannot be read: {problem}. Delete it.", model=model) from problem
    return (spec[0] if spec else None), (policy[0] if policy else None)


def _written(spec: ModelSpec, known: ModelRecord | None, revision: int) -> ModelRecord:
    """Return the record after a put that may have been one of the policy only."""
    if known is not None and known.spec == spec:
        return known
    return ModelRecord(spec=spec, revision=codec.revision_of(spec), mod_revision=revision)


def _approval_conflict(node: NodeName) -> Conflict:
    return Conflict(f"What is said of the node {node} was changed meanwhile. Read it again.", node=node)
