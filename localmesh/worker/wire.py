"""The worker's values as messages of localmesh.v1, and back."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import localmesh
from localmesh.core.errors import MeshError
from localmesh.core.ids import DeviceId, ModelName
from localmesh.core.records import EngineInfo, MeasuredRecord, ModelSpec, SourceRecord
from localmesh.rpc import convert
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import LoadingReport, Outcome, ReplicaReport, ServingReport, Wanted, WantedArrived
from localmesh.worker.hardware import Device, hardware_labels
from localmesh.worker.sources import CatalogItem

_log = logging.getLogger(__name__)


def node_facts(
    config: WorkerConfig,
    *,
    endpoint: str,
    devices: Sequence[Device],
    engines: Iterable[EngineInfo],
    disk_total_bytes: int,
) -> pb.NodeFacts:
    """Return what a worker tells of itself once."""
    return pb.NodeFacts(
        endpoint=endpoint,
        devices=[
            pb.DeviceFacts(
                id=d.id,
                kind=d.kind,
                name=d.name,
                total_bytes=d.total_bytes,
                budget_bytes=d.budget_bytes,
                unified=d.unified,
            )
            for d in devices
        ],
        engines=[convert.engine_to_proto(e) for e in engines],
        labels={**config.labels, **hardware_labels(devices)},
        max_replicas_per_model=config.max_replicas_per_model,
        disk_total_bytes=disk_total_bytes,
        version=localmesh.__version__,
    )


def report(value: ReplicaReport) -> pb.ReplicaReport:
    """Return a report as a message."""
    message = pb.ReplicaReport(ref=convert.replica_ref(value.id), revision=value.revision, placement=value.placement)
    match value.observed:
        case LoadingReport(state=state, progress=progress):
            message.loading.state = convert.state_to_proto(state)
            message.loading.progress.CopyFrom(convert.progress_to_proto(progress))
        case ServingReport() as serving:
            message.serving.CopyFrom(
                pb.ReplicaServing(
                    endpoint=serving.endpoint,
                    limit=serving.limit,
                    measured_bytes=_by_name(serving.measured),
                    in_flight=serving.in_flight,
                )
            )
        case Outcome() as outcome:
            message.exited.CopyFrom(
                pb.ReplicaExited(
                    reason=outcome.reason, message=_text(outcome.message), while_loading=outcome.while_loading
                )
            )
    return message


def measurement(value: MeasuredRecord) -> pb.NodeMeasurement:
    """Return a measurement as a message."""
    return pb.NodeMeasurement(
        free_bytes=_by_name(value.free_bytes), cpu_load=value.cpu_load, disk_free_bytes=value.disk_free_bytes
    )


def source(model: ModelName, value: SourceRecord) -> pb.SourceFacts:
    """Return what the node knows of a model's files as a message."""
    return pb.SourceFacts(
        model=model,
        revision=value.revision,
        present=value.present,
        path=_text(value.path),
        weights_bytes=value.weights_bytes,
        memory_bytes=value.memory_bytes,
        problem=_text(value.problem),
    )


def wanted_set(message: pb.WantedSet) -> WantedArrived:
    """Return the wanted set in a message. A spec that this version does not understand becomes a problem of its own."""
    return WantedArrived(
        incarnation=message.incarnation,
        store_revision=message.store_revision,
        replicas=tuple(w for m in message.replicas if (w := _wanted(m)) is not None),
    )


def catalog(message: pb.Catalog) -> tuple[CatalogItem, ...]:
    """Return the catalog in a message, without models that this version does not understand."""
    found = []
    for entry in message.entries:
        try:
            found.append(CatalogItem(revision=entry.revision, spec=convert.spec_from_proto(entry.spec)))
        except MeshError as error:
            _log.warning("the catalog has a model that cannot be read: %s", error)
    return tuple(found)


def _by_name(sizes: Mapping[DeviceId, int]) -> dict[str, int]:
    return {str(device): size for device, size in sizes.items()}


def _text(text: str) -> str:
    # paths may hold bytes that are no UTF-8, which a message cannot carry
    return text.encode("utf-8", "replace").decode()


def _wanted(message: pb.WantedReplica) -> Wanted | None:
    spec: ModelSpec | None = None
    problem = ""
    try:
        replica, state = convert.replica_id(message.ref), convert.state_from_proto(message.state)
    except MeshError as error:
        _log.warning("the wanted set has a replica that cannot be read: %s", error)
        return None
    if message.HasField("spec"):
        try:
            spec = convert.spec_from_proto(message.spec)
        except MeshError as error:
            problem = error.message
    devices: Mapping[DeviceId, int] = MappingProxyType({DeviceId(k): v for k, v in message.devices.items()})
    return Wanted(
        id=replica,
        state=state,
        revision=message.revision,
        spec=spec,
        problem=problem,
        devices=devices,
        placement=message.placement,
    )
