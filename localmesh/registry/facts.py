"""What a worker sends, as values. Everything in it is checked here: a worker is not trusted with more than its node."""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from types import MappingProxyType

from localmesh.core.errors import InvalidRequest
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName
from localmesh.core.records import EngineInfo, MeasuredRecord, ReplicaState, SourceRecord
from localmesh.registry.reports import Exit, Loading, Report, Serving
from localmesh.rpc.addresses import split_host_port
from localmesh.rpc.convert import (
    engine_from_proto,
    model_name_of,
    node_name_of,
    progress_from_proto,
    replica_id,
    state_from_proto,
)
from localmesh.rpc.errors import ConfigError
from localmesh.store.keys import device_id
from localmesh.store.registration import DeviceFacts, Registration, RunningReplica
from localmesh.v1 import registry_service_pb2 as pb

_MAX_KEY_BYTES = 4096
_MAX_ITEMS = 256
_MAX_NAME = 256
_MAX_TEXT = 4096
_MAX_LOAD = 1e6


def registration(
    request: pb.RegisterRequest,
    *,
    fingerprint: str,
    auto_approve: bool,
    budget_part: float,
    vouched: bool = False,
    remember: bool = True,
) -> Registration:
    """Return what a worker tells when it registers.

    Args:
        request: What it sent.
        fingerprint: Of the key that it holds.
        auto_approve: Whether to approve a node that nobody knows.
        budget_part: Part of a device's memory that may be claimed where the worker does not say.
        vouched: Whether it has shown the mesh's join token.
        remember: Whether to keep that it waits, if it does.

    Raises:
        InvalidRequest: A field is not acceptable.
    """
    node, facts = node_name_of(request.node), request.facts
    if facts.max_replicas_per_model < 0:
        raise InvalidRequest("max_replicas_per_model must not be negative", field="facts.max_replicas_per_model")
    return Registration(
        node=node,
        key_fingerprint=fingerprint,
        endpoint=_endpoint(facts.endpoint, "facts.endpoint"),
        devices=_devices(facts.devices, budget_part),
        labels=checked_labels(facts.labels, "facts.labels"),
        engines=engines(facts),
        max_replicas_per_model=facts.max_replicas_per_model or 1,
        running=tuple(_running(node, request.running)),
        disk_total_bytes=max(0, facts.disk_total_bytes),
        version=_text(facts.version, "facts.version", most=_MAX_NAME),
        auto_approve=auto_approve,
        vouched=vouched,
        remember=remember,
    )


def fingerprint_of(public_key: bytes) -> str:
    """Return the fingerprint of a public key, DER: SHA-256 in hexadecimal.

    Raises:
        InvalidRequest: It is none by its size.
    """
    if not 16 <= len(public_key) <= _MAX_KEY_BYTES:
        raise InvalidRequest(
            f"public_key must be the node's public key, DER, of 16 to {_MAX_KEY_BYTES} bytes, not {len(public_key)}",
            field="public_key",
        )
    return sha256(public_key).hexdigest()


def report(message: pb.ReplicaReport, node: NodeName) -> Report:
    """Return a worker's report of one replica.

    Raises:
        InvalidRequest: A field is not acceptable, or the replica is on another node.
    """
    replica = replica_id(message.ref)
    if replica.node != node:
        raise InvalidRequest(f"{node} reports on {replica}, which is another node's", field="replicas.ref")
    observed: Loading | Serving | Exit
    match message.WhichOneof("observed"):
        case "loading":
            state = state_from_proto(message.loading.state)
            if state not in (ReplicaState.STAGING, ReplicaState.LOADING):
                raise InvalidRequest(f"{replica} loads in the state {state.name}", field="replicas.loading.state")
            told = message.loading.HasField("progress")
            progress = progress_from_proto(message.loading.progress) if told else None
            observed = Loading(state=state, progress=progress)
        case "serving":
            observed = Serving(
                endpoint=_endpoint(message.serving.endpoint, "replicas.serving.endpoint"),
                limit=max(1, message.serving.limit),
                measured=_sizes(message.serving.measured_bytes, "replicas.serving.measured_bytes"),
                reported=max(0, message.serving.in_flight),
            )
        case "exited":
            observed = Exit(
                reason=message.exited.reason[:_MAX_NAME],
                message=message.exited.message[:_MAX_TEXT],
                while_loading=message.exited.while_loading,
            )
        case _:
            raise InvalidRequest(f"the report on {replica} says nothing", field="replicas.observed")
    return Report(id=replica, revision=message.revision, placement=message.placement, observed=observed)


def measurement(message: pb.NodeMeasurement) -> MeasuredRecord:
    """Return a node's measurement.

    Raises:
        InvalidRequest: A device's name cannot be one.
    """
    return MeasuredRecord(
        free_bytes=_sizes(message.free_bytes, "measurement.free_bytes"),
        cpu_load=min(max(0.0, message.cpu_load), _MAX_LOAD),
        disk_free_bytes=max(0, message.disk_free_bytes),
    )


def sources(messages: Iterable[pb.SourceFacts]) -> Mapping[ModelName, SourceRecord]:
    """Return what a node knows of models' files.

    Raises:
        InvalidRequest: A model's name cannot be one.
    """
    return MappingProxyType(
        {
            model_name_of(m.model, field="sources.model"): SourceRecord(
                revision=m.revision[:_MAX_NAME],
                present=m.present,
                path=m.path[:_MAX_TEXT],
                weights_bytes=max(0, m.weights_bytes),
                memory_bytes=max(0, m.memory_bytes),
                problem=m.problem[:_MAX_TEXT],
            )
            for m in messages
        }
    )


def _devices(messages: Iterable[pb.DeviceFacts], budget_part: float) -> tuple[DeviceFacts, ...]:
    found: dict[DeviceId, DeviceFacts] = {}
    for m in messages:
        name = _device(m.id, "facts.devices.id")
        if name in found:
            raise InvalidRequest(f"the device {name} is given twice", field="facts.devices.id")
        if m.kind not in ("cpu", "gpu") or (m.kind == "cpu") != (name == CPU):
            raise InvalidRequest(f"the device {name} cannot be of the kind {m.kind!r}", field="facts.devices.kind")
        if m.total_bytes <= 0 or m.budget_bytes < 0:
            raise InvalidRequest(f"the device {name} has no memory", field="facts.devices.total_bytes")
        found[name] = DeviceFacts(
            id=name,
            kind=m.kind,
            total_bytes=m.total_bytes,
            budget_bytes=min(m.budget_bytes or int(m.total_bytes * budget_part), m.total_bytes),
            name=m.name[:_MAX_NAME],
            unified=m.unified,
        )
    if CPU not in found:
        raise InvalidRequest("the device 'cpu', the node's RAM, is missing", field="facts.devices")
    return tuple(found.values())


def engines(facts: pb.NodeFacts) -> tuple[EngineInfo, ...]:
    """Return a node's engines.

    Raises:
        InvalidRequest: One is not described well, or there are too many.
    """
    if len(facts.engines) > _MAX_ITEMS:
        raise InvalidRequest(f"a node has at most {_MAX_ITEMS} engines", field="facts.engines")
    for engine in facts.engines:
        _text(engine.name, "facts.engines.name", most=_MAX_NAME)
        if not engine.name or len(engine.device_kinds) > 8 or len(engine.detail) > _MAX_TEXT:
            raise InvalidRequest(f"the engine {engine.name!r} is not described well", field="facts.engines")
    return tuple(engine_from_proto(engine) for engine in facts.engines)


def _running(node: NodeName, messages: Iterable[pb.ReplicaReport]) -> Iterable[RunningReplica]:
    for message in messages:
        seen = report(message, node)
        if isinstance(seen.observed, Loading):
            yield RunningReplica(id=seen.id, revision=seen.revision, state=seen.observed.state)
        elif isinstance(seen.observed, Serving):
            yield RunningReplica(
                id=seen.id,
                revision=seen.revision,
                state=ReplicaState.READY,
                endpoint=seen.observed.endpoint,
                limit=seen.observed.limit,
                devices=seen.observed.measured,
            )


def checked_labels(labels: Mapping[str, str], field: str) -> Mapping[str, str]:
    """Return labels from outside, sorted.

    Raises:
        InvalidRequest: There are too many, or a name or value is not acceptable.
    """
    if len(labels) > _MAX_ITEMS:
        raise InvalidRequest(f"a node has at most {_MAX_ITEMS} labels", field=field)
    for key, value in labels.items():
        label_name(key, field)
        _text(value, field, most=_MAX_TEXT)
    return MappingProxyType(dict(sorted(labels.items())))


def label_name(key: str, field: str) -> str:
    """Return the name of a label from outside.

    Raises:
        InvalidRequest: It cannot be one.
    """
    if not key:
        raise InvalidRequest("a label has no name", field=field)
    return _text(key, field, most=_MAX_NAME)


def _sizes(sizes: Mapping[str, int], field: str) -> Mapping[DeviceId, int]:
    if len(sizes) > _MAX_ITEMS:
        raise InvalidRequest(f"{field} names more than {_MAX_ITEMS} devices", field=field)
    return MappingProxyType({_device(name, field): max(0, size) for name, size in sizes.items()})


def _device(text: str, field: str) -> DeviceId:
    try:
        return device_id(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field=field) from error


def _endpoint(text: str, field: str) -> str:
    """Return an address that routers may dial: host and port, nothing else that gRPC would take as a target."""
    try:
        _, port = split_host_port(_text(text, field, most=_MAX_NAME))
    except ConfigError as error:
        raise InvalidRequest(f"{field} must be HOST:PORT, not {text[:100]!r}", field=field) from error
    if not port or "/" in text:
        raise InvalidRequest(f"{field} must be HOST:PORT, not {text[:100]!r}", field=field)
    return text


def _text(text: str, field: str, *, most: int) -> str:
    if len(text) > most or any(c < " " or c == "\x7f" for c in text):
        raise InvalidRequest(f"{field} is longer than {most} characters or has a control character", field=field)
    return text
