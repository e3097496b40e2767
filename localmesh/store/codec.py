"""Between records and the bytes of their values.

`decode_*` read bytes that anybody who may write to etcd may have made: they raise ValueError and nothing else.
`fill_*` write a record over a message, in place: a message that was parsed from the stored value keeps the fields that
a newer version put there. `fresh` parses it, or makes an empty one where there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId, model_name, node_name
from localmesh.core.labels import Operator, SelectorTerm
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    FailureRecord,
    MeasuredRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.store.keys import MAX_INDEX, device_id
from localmesh.store.v1 import records_pb2 as pb

M = TypeVar("M", bound=Message)
K = TypeVar("K")
V = TypeVar("V")

SCHEMA_VERSION = 1
OLDEST_COMPATIBLE = 1
_REVISION_DIGITS = 16


def fresh(kind: type[M], value: bytes | None) -> M:
    """Return a message to write a record over: the stored one, or an empty one where nothing is stored.

    Raises:
        ValueError: What is stored is no such message.
    """
    message = kind()
    if value:
        try:
            message.ParseFromString(value)
        except DecodeError as error:
            raise ValueError(f"not a {kind.DESCRIPTOR.name}: {error}") from None
    return message


def encode(message: Message) -> bytes:
    """Return the value to store. The same message gives the same bytes, so that values can be compared."""
    return message.SerializeToString(deterministic=True)


def revision_of(spec: ModelSpec) -> str:
    """Return the revision of a spec: 16 hexadecimal digits over all of it but the name.

    Fields that have their default do not count, so that a version of localmesh that adds a field does not change the
    revision of a model that does not use it: that would load every model of the mesh anew.
    """
    stored: dict[str, object] = {}
    default = ModelSpec(name=spec.name, backend="", source="")
    for each in fields(ModelSpec):
        value = getattr(spec, each.name)
        if each.name != "name" and value != getattr(default, each.name):
            stored[each.name] = dict(value) if isinstance(value, Mapping) else value
    canonical = json.dumps(stored, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_REVISION_DIGITS]


# models, policies, approvals


def fill_model(message: pb.Model, spec: ModelSpec) -> str:
    """Write a spec over a message; return its revision."""
    message.backend = spec.backend
    message.source = spec.source
    message.context_tokens = spec.context_tokens
    message.slots = spec.slots
    message.threads = spec.threads
    if spec.gpu_layers is None:
        message.ClearField("gpu_layers")
    else:
        message.gpu_layers = spec.gpu_layers
    message.cache_type = spec.cache_type
    message.embeddings = spec.embeddings
    message.max_concurrent_requests = spec.max_concurrent_requests
    _replace(message.options, spec.options)
    message.memory_bytes = spec.memory_bytes
    message.device_kind = spec.device_kind
    message.device_count = spec.device_count
    message.revision = revision_of(spec)
    return message.revision


def decode_model(model: ModelName, value: bytes, mod_revision: int) -> ModelRecord:
    """Read a model."""
    message = fresh(pb.Model, value)
    spec = ModelSpec(
        name=model,
        backend=message.backend,
        source=message.source,
        context_tokens=message.context_tokens,
        slots=message.slots,
        threads=message.threads,
        gpu_layers=message.gpu_layers if message.HasField("gpu_layers") else None,
        cache_type=message.cache_type,
        embeddings=message.embeddings,
        max_concurrent_requests=message.max_concurrent_requests,
        options=_frozen(message.options),
        memory_bytes=_size(message.memory_bytes),
        device_kind=message.device_kind,
        device_count=_size(message.device_count),
    )
    if not message.revision:
        raise ValueError("a model without a revision")
    return ModelRecord(spec=spec, revision=message.revision, mod_revision=mod_revision)


def fill_policy(message: pb.Policy, policy: Policy) -> None:
    """Write a policy over a message."""
    _replace(message.node_selector, policy.node_selector)
    message.min_replicas = policy.min_replicas
    message.max_replicas = policy.max_replicas
    message.immediate = policy.immediate
    del message.selector_terms[:]
    for term in policy.selector_terms:
        message.selector_terms.add(key=term.key, operator=_OPERATOR_TO_WIRE[term.operator], values=term.values)
    message.groups[:] = policy.groups
    message.spread_all = policy.spread_all
    message.pinned = policy.pinned


def decode_policy(value: bytes, mod_revision: int) -> PolicyRecord:
    """Read a policy."""
    message = fresh(pb.Policy, value)
    policy = Policy(
        node_selector=_frozen(message.node_selector),
        min_replicas=_size(message.min_replicas),
        max_replicas=_size(message.max_replicas),
        immediate=message.immediate,
        selector_terms=tuple(_decode_term(term) for term in message.selector_terms),
        groups=tuple(message.groups),
        spread_all=message.spread_all,
        pinned=message.pinned,
    )
    return PolicyRecord(policy=policy, mod_revision=mod_revision)


def _decode_term(message: pb.SelectorTerm) -> SelectorTerm:
    operator = _OPERATOR_FROM_WIRE.get(message.operator)
    if operator is None:  # a guess would place replicas where they must not be
        raise ValueError(f"unknown operator of a selector: {message.operator}")
    return SelectorTerm(key=message.key, operator=operator, values=tuple(message.values))


_OPERATOR_TO_WIRE: Mapping[Operator, pb.SelectorOperator.ValueType] = {
    Operator.IN: pb.SELECTOR_OPERATOR_IN,
    Operator.NOT_IN: pb.SELECTOR_OPERATOR_NOT_IN,
    Operator.EXISTS: pb.SELECTOR_OPERATOR_EXISTS,
    Operator.DOES_NOT_EXIST: pb.SELECTOR_OPERATOR_DOES_NOT_EXIST,
}
_OPERATOR_FROM_WIRE = {wire: operator for operator, wire in _OPERATOR_TO_WIRE.items()}


def fill_approval(message: pb.Approval, approval: ApprovalRecord) -> None:
    """Write an approval over a message."""
    message.key_fingerprint = approval.key_fingerprint
    message.approved = approval.approved
    message.cordoned = approval.cordoned
    message.draining = approval.draining
    _replace(message.labels, approval.labels)
    message.max_replicas_per_model = approval.max_replicas_per_model
    _replace(message.memory_budgets, approval.memory_budgets)


def decode_approval(value: bytes, mod_revision: int) -> ApprovalRecord:
    """Read an approval."""
    message = fresh(pb.Approval, value)
    return ApprovalRecord(
        key_fingerprint=message.key_fingerprint,
        approved=message.approved,
        cordoned=message.cordoned,
        draining=message.draining,
        labels=_frozen(message.labels),
        max_replicas_per_model=_size(message.max_replicas_per_model),
        memory_budgets=_frozen(message.memory_budgets),
        mod_revision=mod_revision,
    )


# nodes, devices, measurements


def fill_node(message: pb.Node, node: NodeRecord) -> None:
    """Write a node over a message. The incarnation is not in it: it is the key's lease."""
    message.endpoint = node.endpoint
    _replace(message.labels, node.labels)
    del message.engines[:]
    for engine in node.engines:
        message.engines.add(
            name=engine.name, available=engine.available, device_kinds=engine.device_kinds, detail=engine.detail
        )
    message.max_replicas_per_model = node.max_replicas_per_model
    message.record_lease = node.record_lease
    message.key_fingerprint = node.key_fingerprint
    message.disk_total_bytes = node.disk_total_bytes
    message.version = node.version


def decode_node(node: NodeName, value: bytes, lease: int, mod_revision: int) -> NodeRecord:
    """Read a node; `lease` is the lease of its key: the incarnation."""
    message = fresh(pb.Node, value)
    if not lease:
        raise ValueError("a node without a presence lease")
    engines = tuple(
        EngineInfo(name=e.name, available=e.available, device_kinds=tuple(e.device_kinds), detail=e.detail)
        for e in message.engines
    )
    return NodeRecord(
        name=node,
        incarnation=lease,
        record_lease=message.record_lease,
        endpoint=message.endpoint,
        labels=_frozen(message.labels),
        engines=engines,
        max_replicas_per_model=_size(message.max_replicas_per_model),
        key_fingerprint=message.key_fingerprint,
        disk_total_bytes=_size(message.disk_total_bytes),
        version=message.version,
        mod_revision=mod_revision,
    )


def fill_device(message: pb.Device, device: DeviceRecord) -> None:
    """Write a device and its claims over a message."""
    message.kind = device.kind
    message.name = device.name
    message.total_bytes = device.total_bytes
    message.budget_bytes = device.budget_bytes
    message.worker_budget_bytes = device.worker_budget_bytes
    message.unified = device.unified
    _replace(message.claims, {_claim_key(replica): size for replica, size in device.claims.items()})


def decode_device(node: NodeName, device: DeviceId, value: bytes, mod_revision: int) -> DeviceRecord:
    """Read a device."""
    message = fresh(pb.Device, value)
    claims = {_claimant(key, node): _size(size) for key, size in message.claims.items()}
    return DeviceRecord(
        node=node,
        id=device,
        kind=message.kind,
        total_bytes=_size(message.total_bytes),
        budget_bytes=_size(message.budget_bytes),
        name=message.name,
        unified=message.unified,
        worker_budget_bytes=_size(message.worker_budget_bytes),
        claims=MappingProxyType(claims),
        mod_revision=mod_revision,
    )


def set_claim(message: pb.Device, replica: ReplicaId, size: int) -> None:
    """Claim bytes for a replica, in place of what it has claimed."""
    message.claims[_claim_key(replica)] = size


def drop_claim(message: pb.Device, replica: ReplicaId, *, heir: ReplicaId | None = None) -> None:
    """Give a replica's claim back, or add it to that of another one."""
    size = message.claims.pop(_claim_key(replica), 0)
    if heir is not None and size:
        message.claims[_claim_key(heir)] += size


def _claim_key(replica: ReplicaId) -> str:
    return f"{replica.model}/{replica.index}"


def _claimant(text: str, node: NodeName) -> ReplicaId:
    model, slash, index = text.rpartition("/")
    if (
        not slash
        or not index.isascii()
        or not index.isdigit()
        or str(int(index[:5])) != index
        or int(index) > MAX_INDEX
    ):
        raise ValueError(f"not a claim: {text[:80]!r}")
    return ReplicaId(model_name(model), node, int(index))


def fill_measured(message: pb.Measured, measured: MeasuredRecord) -> None:
    """Write a measurement over a message."""
    _replace(message.free_bytes, measured.free_bytes)
    message.cpu_load = measured.cpu_load
    message.disk_free_bytes = measured.disk_free_bytes


def decode_measured(value: bytes) -> MeasuredRecord:
    """Read a measurement."""
    message = fresh(pb.Measured, value)
    return MeasuredRecord(
        free_bytes=MappingProxyType({device_id(d): _size(n) for d, n in message.free_bytes.items()}),
        cpu_load=message.cpu_load,
        disk_free_bytes=_size(message.disk_free_bytes),
    )


def decode_guard(value: bytes) -> frozenset[NodeName]:
    """Read the nodes that the guard is set for; none where it cannot be read: it is a guard all the same."""
    try:
        return frozenset(node_name(n) for n in fresh(pb.Guard, value).nodes)
    except ValueError:
        return frozenset()


def fill_sources(message: pb.Sources, sources: Mapping[ModelName, SourceRecord]) -> None:
    """Write all that a node knows of files over a message."""
    message.models.clear()
    for model, source in sources.items():
        entry = message.models[model]
        entry.revision = source.revision
        entry.present = source.present
        entry.path = source.path
        entry.weights_bytes = source.weights_bytes
        entry.memory_bytes = source.memory_bytes
        entry.problem = source.problem


def decode_sources(value: bytes) -> Mapping[ModelName, SourceRecord]:
    """Read what a node knows of files."""
    message = fresh(pb.Sources, value)
    sources = {
        model_name(model): SourceRecord(
            revision=source.revision,
            present=source.present,
            path=source.path,
            weights_bytes=_size(source.weights_bytes),
            memory_bytes=_size(source.memory_bytes),
            problem=source.problem,
        )
        for model, source in message.models.items()
    }
    return MappingProxyType(sources)


# replicas and what belongs to them


def fill_replica(message: pb.Replica, replica: ReplicaRecord) -> None:
    """Write a replica over a message."""
    message.state = _STATE_TO_WIRE[replica.state]
    message.revision = replica.revision
    message.incarnation = replica.incarnation
    message.endpoint = replica.endpoint
    _replace(message.devices, replica.devices)
    message.limit = replica.limit
    message.memory_for = "" if replica.memory_for is None else str(replica.memory_for)
    message.token = replica.token


def decode_replica(replica: ReplicaId, value: bytes, mod_revision: int, create_revision: int) -> ReplicaRecord:
    """Read a replica. A state that this version does not know is a ValueError: nobody here may act on it."""
    message = fresh(pb.Replica, value)
    state = _STATE_FROM_WIRE.get(message.state)
    if state is None:
        raise ValueError(f"unknown state of a replica: {message.state}")
    return ReplicaRecord(
        id=replica,
        state=state,
        revision=message.revision,
        incarnation=message.incarnation,
        devices=MappingProxyType({device_id(d): _size(n) for d, n in message.devices.items()}),
        endpoint=message.endpoint,
        limit=_size(message.limit),
        memory_for=ReplicaId.parse(message.memory_for) if message.memory_for else None,
        token=message.token,
        mod_revision=mod_revision,
        create_revision=create_revision,
    )


def wire_state(state: ReplicaState) -> pb.ReplicaState.ValueType:
    """Return the state as it is stored."""
    return _STATE_TO_WIRE[state]


_STATE_TO_WIRE: Mapping[ReplicaState, pb.ReplicaState.ValueType] = {
    ReplicaState.PLACED: pb.REPLICA_STATE_PLACED,
    ReplicaState.STAGING: pb.REPLICA_STATE_STAGING,
    ReplicaState.LOADING: pb.REPLICA_STATE_LOADING,
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.UNLOADING: pb.REPLICA_STATE_UNLOADING,
}
_STATE_FROM_WIRE = {wire: state for state, wire in _STATE_TO_WIRE.items()}


def encode_progress(progress: ProgressRecord) -> bytes:
    """Return the value of a progress. It is overwritten every second by its only writer: nothing is preserved."""
    message = pb.Progress(
        phase=progress.phase,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        eta_seconds=progress.eta_seconds,
    )
    return encode(message)


def decode_progress(value: bytes) -> ProgressRecord:
    """Read a progress."""
    message = fresh(pb.Progress, value)
    return ProgressRecord(
        phase=message.phase,
        done_bytes=_size(message.done_bytes),
        total_bytes=_size(message.total_bytes),
        eta_seconds=message.eta_seconds,
    )


def encode_inflight(count: int, token: str) -> bytes:
    """Return the value of a presence. Its holder is its only writer."""
    return encode(pb.Inflight(count=count, token=token))


def decode_inflight(value: bytes) -> tuple[int, str]:
    """Read the count and the token of a presence."""
    message = fresh(pb.Inflight, value)
    return _size(message.count), message.token


def encode_failure(failure: FailureRecord) -> bytes:
    """Return the value of the memory of a failed load."""
    message = pb.Failure(reason=failure.reason, message=failure.message, revision=failure.revision)
    message.attempts = failure.attempts
    return encode(message)


def decode_failure(model: ModelName, node: NodeName, value: bytes) -> FailureRecord:
    """Read the memory of a failed load."""
    message = fresh(pb.Failure, value)
    return FailureRecord(
        model=model,
        node=node,
        reason=message.reason,
        message=message.message,
        revision=message.revision,
        attempts=_size(message.attempts) or 1,
    )


def encode_schema() -> bytes:
    """Return the value of the schema's key as this version writes it."""
    return encode(pb.Schema(version=SCHEMA_VERSION, oldest_compatible=OLDEST_COMPATIBLE))


def decode_schema(value: bytes) -> tuple[int, int]:
    """Read the version of the schema and the oldest one that may join."""
    message = fresh(pb.Schema, value)
    return message.version, message.oldest_compatible


def _size(number: int) -> int:
    """Sizes and counts are never negative: a negative claim would be memory made of nothing."""
    if number < 0:
        raise ValueError(f"a negative size or count: {number}")
    return number


def _frozen(mapping: Mapping[K, V]) -> Mapping[K, V]:
    return MappingProxyType(dict(mapping))


def _replace(target: Mapping[str, V], source: Mapping[K, V]) -> None:
    target.clear()  # type: ignore[attr-defined]
    target.update(source)  # type: ignore[attr-defined]
