"""The public messages to core's values and back. What comes from outside is checked here, field by field."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from localmesh.core.errors import InvalidRequest, InvalidSpec
from localmesh.core.ids import ModelName, NodeName, ReplicaId, model_name, node_name
from localmesh.core.labels import Operator, SelectorTerm
from localmesh.core.records import (
    DeviceRecord,
    EngineInfo,
    FailureRecord,
    ModelRecord,
    ModelSpec,
    Policy,
    ProgressRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.v1 import types_pb2 as pb

_BACKEND: Final = re.compile(r"llama|minilm|process:[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_GROUP: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CACHE_TYPES: Final = ("", "f16", "q8_0", "q4_0")
_DEVICE_KINDS: Final = ("", "cpu", "gpu")
_MAX_PAIRS: Final = 256
_MAX_TEXT: Final = 4096

# Far above anything real, and far below what would overflow a sum.
_MAX_CONTEXT_TOKENS: Final = 1 << 24
_MAX_SLOTS: Final = 1024
_MAX_THREADS: Final = 1024
_MAX_LAYERS: Final = 10_000
_MAX_REQUESTS: Final = 100_000
_MAX_MEMORY_BYTES: Final = 1 << 50
_MAX_REPLICAS: Final = 10_000
_MAX_DEVICES: Final = 64
_MAX_TERMS: Final = 64
_MAX_GROUPS: Final = 16

OPERATORS: Final[Mapping["pb.SelectorOperator.ValueType", Operator]] = MappingProxyType(
    {
        pb.SELECTOR_OPERATOR_IN: Operator.IN,
        pb.SELECTOR_OPERATOR_NOT_IN: Operator.NOT_IN,
        pb.SELECTOR_OPERATOR_EXISTS: Operator.EXISTS,
        pb.SELECTOR_OPERATOR_DOES_NOT_EXIST: Operator.DOES_NOT_EXIST,
    }
)
_OPERATOR_TO_PROTO = {operator: number for number, operator in OPERATORS.items()}


def replica_ref(replica: ReplicaId) -> pb.ReplicaRef:
    """Return the id as a message."""
    return pb.ReplicaRef(model=replica.model, node=replica.node, index=replica.index)


def replica_id(ref: pb.ReplicaRef) -> ReplicaId:
    """Return the id in a message.

    Raises:
        InvalidRequest: It names no replica.
    """
    if ref.index < 0:
        raise InvalidRequest(f"a replica's index is not negative: {ref.index}", field="ref.index")
    return ReplicaId(
        model=model_name_of(ref.model, field="ref.model"),
        node=node_name_of(ref.node, field="ref.node"),
        index=ref.index,
    )


def model_name_of(text: str, *, field: str = "model") -> ModelName:
    """Return the name of a model from a request.

    Raises:
        InvalidRequest: It cannot be one.
    """
    try:
        return model_name(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field=field) from error


def node_name_of(text: str, *, field: str = "node") -> NodeName:
    """Return the name of a node from a request.

    Raises:
        InvalidRequest: It cannot be one.
    """
    try:
        return node_name(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field=field) from error


def state_to_proto(state: ReplicaState) -> "pb.ReplicaState.ValueType":
    """Return a replica's state as the protocol names it."""
    return pb.ReplicaState.Value(f"REPLICA_STATE_{state.name}")


def state_from_proto(state: "pb.ReplicaState.ValueType") -> ReplicaState:
    """Return a replica's state.

    Raises:
        InvalidRequest: It is unset, or one that this version does not know.
    """
    try:
        return ReplicaState(state)
    except ValueError as error:
        raise InvalidRequest(f"no state of a replica: {state}", field="state") from error


def spec_to_proto(spec: ModelSpec) -> pb.ModelSpec:
    """Return a spec as a message."""
    return pb.ModelSpec(
        name=spec.name,
        backend=spec.backend,
        source=spec.source,
        parameters=pb.LoadParameters(
            context_tokens=spec.context_tokens,
            slots=spec.slots,
            threads=spec.threads,
            gpu_layers=spec.gpu_layers,
            cache_type=spec.cache_type,
            embeddings=spec.embeddings,
            max_concurrent_requests=spec.max_concurrent_requests,
            options=spec.options,
        ),
        resources=pb.Resources(
            memory_bytes=spec.memory_bytes, device_kind=spec.device_kind, device_count=spec.device_count
        ),
    )


def spec_from_proto(spec: pb.ModelSpec) -> ModelSpec:
    """Return a spec from outside, checked.

    Raises:
        InvalidSpec: A field is not acceptable; the metadata "field" names it by its path in the message.
    """
    try:
        name = model_name(spec.name)
    except ValueError as error:
        raise InvalidSpec(str(error), field="name") from error
    if not _BACKEND.fullmatch(spec.backend):
        raise InvalidSpec(
            f'model {name}: no such backend: {spec.backend!r} (expected "llama", "minilm" or "process:NAME")',
            field="backend",
        )
    _check_source(name, spec)
    p = spec.parameters
    for field, value, most in (
        ("parameters.context_tokens", p.context_tokens, _MAX_CONTEXT_TOKENS),
        ("parameters.slots", p.slots, _MAX_SLOTS),
        ("parameters.threads", p.threads, _MAX_THREADS),
        ("parameters.gpu_layers", p.gpu_layers, _MAX_LAYERS),
        ("parameters.max_concurrent_requests", p.max_concurrent_requests, _MAX_REQUESTS),
        ("resources.memory_bytes", spec.resources.memory_bytes, _MAX_MEMORY_BYTES),
        ("resources.device_count", spec.resources.device_count, _MAX_DEVICES),
    ):
        _check_range(name, field, value, most)
    _check_choice(name, "parameters.cache_type", p.cache_type, _CACHE_TYPES)
    _check_choice(name, "resources.device_kind", spec.resources.device_kind, _DEVICE_KINDS)
    devices = spec.resources.device_count
    if devices > 1 and spec.resources.device_kind == "cpu":
        raise InvalidSpec(
            f"model {name}: a node has one device of the kind 'cpu', not {devices}", field="resources.device_count"
        )
    return ModelSpec(
        name=name,
        backend=spec.backend,
        source=spec.source,
        context_tokens=p.context_tokens,
        slots=p.slots,
        threads=p.threads,
        gpu_layers=p.gpu_layers if p.HasField("gpu_layers") else None,
        cache_type=p.cache_type,
        embeddings=p.embeddings,
        max_concurrent_requests=p.max_concurrent_requests,
        options=_pairs(name, "parameters.options", p.options, without=":"),
        memory_bytes=spec.resources.memory_bytes,
        device_kind=spec.resources.device_kind,
        device_count=devices if devices > 1 else 0,  # one spelling of the same, or the revision would change
    )


def policy_to_proto(policy: Policy) -> pb.PlacementPolicy:
    """Return a policy as a message."""
    return pb.PlacementPolicy(
        node_selector=policy.node_selector,
        min_replicas=policy.min_replicas,
        max_replicas=policy.max_replicas,
        rollout=pb.ROLLOUT_IMMEDIATE if policy.immediate else pb.ROLLOUT_OVERLAP,
        selector_terms=[
            pb.SelectorTerm(key=t.key, operator=_OPERATOR_TO_PROTO[t.operator], values=t.values)
            for t in policy.selector_terms
        ],
        groups=policy.groups,
        spread_all=policy.spread_all,
        pinned=policy.pinned,
    )


def policy_from_proto(policy: pb.PlacementPolicy, *, model: str = "") -> Policy:
    """Return a policy from outside, checked.

    Raises:
        InvalidSpec: A field is not acceptable; the metadata "field" names it, after "policy.".
    """
    _check_range(model, "policy.min_replicas", policy.min_replicas, _MAX_REPLICAS)
    _check_range(model, "policy.max_replicas", policy.max_replicas, _MAX_REPLICAS)
    if policy.max_replicas and policy.min_replicas > policy.max_replicas:
        raise InvalidSpec(
            f"model {model}: min_replicas ({policy.min_replicas}) is above max_replicas ({policy.max_replicas})",
            field="policy.min_replicas",
        )
    if policy.rollout not in (pb.ROLLOUT_UNSPECIFIED, pb.ROLLOUT_OVERLAP, pb.ROLLOUT_IMMEDIATE):
        raise InvalidSpec(f"model {model}: no such rollout: {policy.rollout}", field="policy.rollout")
    if policy.spread_all and (policy.min_replicas or policy.max_replicas):
        raise InvalidSpec(
            f"model {model}: spread_all is one replica on every node that matches: leave out min_replicas and"
            " max_replicas",
            field="policy.spread_all",
        )
    return Policy(
        node_selector=_pairs(model, "policy.node_selector", policy.node_selector),
        min_replicas=policy.min_replicas,
        max_replicas=policy.max_replicas,
        immediate=policy.rollout == pb.ROLLOUT_IMMEDIATE,
        selector_terms=_terms(model, policy),
        groups=_groups(model, policy),
        spread_all=policy.spread_all,
        pinned=policy.pinned,
    )


def _terms(model: str, policy: pb.PlacementPolicy) -> tuple[SelectorTerm, ...]:
    field = "policy.selector_terms"
    if len(policy.selector_terms) > _MAX_TERMS:
        raise InvalidSpec(f"model {model}: {field} has more than {_MAX_TERMS} entries", field=field)
    return tuple(_term(model, field, message) for message in policy.selector_terms)


def _term(model: str, field: str, message: pb.SelectorTerm) -> SelectorTerm:
    operator = OPERATORS.get(message.operator)
    if operator is None:
        names = ", ".join(o.value for o in Operator)
        raise InvalidSpec(f"model {model}: a term of the selector has no operator: one of {names}", field=field)
    if operator.takes_values != bool(message.values):
        wants = "at least one value" if operator.takes_values else "no values"
        raise InvalidSpec(f"model {model}: {operator.value} takes {wants} (label {message.key[:100]!r})", field=field)
    # The same limits as for labels.
    _pairs(model, field, {message.key: ""})
    for value in message.values:
        _pairs(model, field, {message.key: value})
    if len(message.values) > _MAX_PAIRS:
        raise InvalidSpec(f"model {model}: {field} has more than {_MAX_PAIRS} values", field=field)
    return SelectorTerm(key=message.key, operator=operator, values=tuple(message.values))


def _groups(model: str, policy: pb.PlacementPolicy) -> tuple[str, ...]:
    if len(policy.groups) > _MAX_GROUPS:
        raise InvalidSpec(f"model {model}: groups has more than {_MAX_GROUPS} entries", field="policy.groups")
    for group in policy.groups:
        if not _GROUP.fullmatch(group):
            raise InvalidSpec(
                f"model {model}: not a name of a group: {group[:100]!r} (1 to 63 of letters, digits, '.', '_', '-', the"
                " first a letter or digit)",
                field="policy.groups",
            )
    return tuple(sorted(set(policy.groups)))


def model_to_proto(record: ModelRecord, policy: Policy) -> pb.Model:
    """Return a model with its policy."""
    return pb.Model(spec=spec_to_proto(record.spec), policy=policy_to_proto(policy), revision=record.revision)


def progress_to_proto(progress: ProgressRecord) -> pb.LoadProgress:
    """Return how far a load is."""
    message = pb.LoadProgress(phase=progress.phase, done_bytes=progress.done_bytes, total_bytes=progress.total_bytes)
    if progress.eta_seconds > 0:
        message.eta.FromMicroseconds(int(progress.eta_seconds * 1e6))
    return message


def progress_from_proto(message: pb.LoadProgress) -> ProgressRecord:
    """Return how far a worker says that a load is. Negative numbers are read as 0."""
    return ProgressRecord(
        phase=message.phase[:64],
        done_bytes=max(0, message.done_bytes),
        total_bytes=max(0, message.total_bytes),
        eta_seconds=max(0.0, message.eta.ToMicroseconds() / 1e6),
    )


def replica_to_proto(snapshot: Snapshot, record: ReplicaRecord) -> pb.Replica:
    """Return a replica as a snapshot shows it."""
    message = pb.Replica(
        ref=replica_ref(record.id),
        state=state_to_proto(record.state),
        revision=record.revision,
        endpoint=record.endpoint,
        devices={str(device): claimed for device, claimed in record.devices.items()},
        limit=record.limit,
        in_flight=snapshot.in_flight(record.id),
        routable=snapshot.routable(record),
    )
    progress = snapshot.progress.get(record.id)
    if progress is not None and record.state is not ReplicaState.READY:
        message.progress.CopyFrom(progress_to_proto(progress))
    return message


def engine_to_proto(engine: EngineInfo) -> pb.Engine:
    """Return an engine as a message."""
    return pb.Engine(
        name=engine.name, available=engine.available, device_kinds=engine.device_kinds, detail=engine.detail
    )


def engine_from_proto(engine: pb.Engine) -> EngineInfo:
    """Return an engine that a worker tells of."""
    return EngineInfo(
        name=engine.name, available=engine.available, device_kinds=tuple(engine.device_kinds), detail=engine.detail
    )


def failure_to_proto(failure: FailureRecord) -> pb.LoadFailure:
    """Return a failed load as a message."""
    return pb.LoadFailure(
        model=failure.model,
        node=failure.node,
        reason=failure.reason,
        message=failure.message,
        attempts=failure.attempts,
        revision=failure.revision,
    )


def node_names(snapshot: Snapshot) -> set[NodeName]:
    """Return the names of all nodes that are known: present, pending or gone."""
    return {*snapshot.nodes, *snapshot.approvals}


def node_state(snapshot: Snapshot, name: NodeName) -> "pb.NodeState.ValueType":
    """Return how a node stands: what the operator has not approved is pending, what is not there is gone."""
    approval = snapshot.approvals.get(name)
    if approval is None or not approval.approved:
        return pb.NODE_STATE_PENDING
    if name not in snapshot.nodes:
        return pb.NODE_STATE_GONE
    if approval.draining:
        return pb.NODE_STATE_DRAINING
    return pb.NODE_STATE_CORDONED if approval.cordoned else pb.NODE_STATE_LIVE


def node_to_proto(snapshot: Snapshot, name: NodeName) -> pb.Node:
    """Return a node as a snapshot shows it, also one that is gone or pending."""
    node, approval, measured = snapshot.nodes.get(name), snapshot.approvals.get(name), snapshot.measured.get(name)
    message = pb.Node(name=name, state=node_state(snapshot, name), labels=snapshot.labels(name))
    if node is not None:
        message.endpoint = node.endpoint
        message.engines.extend(engine_to_proto(engine) for engine in node.engines)
        message.max_replicas_per_model = snapshot.max_replicas_on(name)
        message.worker_max_replicas_per_model = node.max_replicas_per_model
        message.worker_labels.update(node.labels)
        message.incarnation = f"{node.incarnation:x}"
        message.key_fingerprint = node.key_fingerprint
    if approval is not None:
        message.key_fingerprint = approval.key_fingerprint
        message.cordoned, message.draining = approval.cordoned, approval.draining
        message.operator_labels.update(approval.labels)
        if approval.max_replicas_per_model or approval.memory_budgets:
            message.overrides.max_replicas_per_model = approval.max_replicas_per_model
            message.overrides.memory_budgets.update(approval.memory_budgets)
    free: Mapping[Any, int] = measured.free_bytes if measured is not None else {}
    for device in sorted(snapshot.devices.get(name, {}).values(), key=lambda d: (d.kind, d.id)):
        message.devices.append(_device_to_proto(device, free.get(device.id)))
    if measured is not None:
        message.cpu_load = measured.cpu_load
        message.disk_free_bytes = measured.disk_free_bytes
    return message


def _device_to_proto(device: DeviceRecord, free: int | None) -> pb.Device:
    return pb.Device(
        id=device.id,
        kind=device.kind,
        name=device.name,
        total_bytes=device.total_bytes,
        budget_bytes=device.budget_bytes,
        claimed_bytes=device.claimed_bytes,
        free_bytes=free,
        unified=device.unified,
        worker_budget_bytes=device.worker_budget_bytes,
    )


def _check_source(model: str, spec: pb.ModelSpec) -> None:
    source, foreign = spec.source, spec.backend.startswith("process:")
    problem = ""
    if not source and not foreign:
        problem = "it is empty"
    elif len(source) > _MAX_TEXT:
        problem = f"it is longer than {_MAX_TEXT} characters"
    elif any(c < " " or c == "\x7f" for c in source):
        problem = "it has a control character in it"
    elif source.startswith(("/", "~", "\\")):
        problem = "it is absolute"
    elif ".." in re.split(r"[/\\]", source.removeprefix("pip:")):
        problem = 'it has ".." in it'
    elif source == "pip:" or source.startswith("pip:/"):
        problem = "it names no package"
    if problem:
        raise InvalidSpec(
            f"model {model}: source {source[:200]!r} cannot be used: {problem}. Expected a path below each node's"
            ' models folder, or "pip:PACKAGE[/PATH]".',
            field="source",
        )


def _check_range(model: str, field: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise InvalidSpec(f"model {model}: {field} must be between 0 and {most}, not {value}", field=field)


def _check_choice(model: str, field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed if a)
        raise InvalidSpec(f"model {model}: {field} must be one of {names}, not {value[:100]!r}", field=field)


def _pairs(model: str, field: str, pairs: Mapping[str, str], *, without: str = "") -> Mapping[str, str]:
    if len(pairs) > _MAX_PAIRS:
        raise InvalidSpec(f"model {model}: {field} has more than {_MAX_PAIRS} entries", field=field)
    for key, value in pairs.items():
        if not key or len(key) > _MAX_TEXT or len(value) > _MAX_TEXT or "\0" in key + value:
            raise InvalidSpec(f"model {model}: {field} has an entry that is empty, too long or has a NUL", field=field)
        if without and without in key:
            raise InvalidSpec(f"model {model}: {field} has a key with {without!r} in it: {key[:100]!r}", field=field)
    return MappingProxyType(dict(sorted(pairs.items())))
