"""T0, decided: what a registration changes, as a pure function of what the node says and what the store shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from localmesh.core.budgets import with_budget
from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.memory import left_bytes
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.store.admission import admit

_NO_TEXT: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """A device as its worker sees it. Sizes in bytes."""

    id: DeviceId
    kind: str
    total_bytes: int
    budget_bytes: int
    """What replicas may claim by the worker's own word."""
    name: str = ""
    unified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningReplica:
    """A replica whose process runs now, as its worker sees it."""

    id: ReplicaId
    revision: str
    """Revision of the model that it was started with."""
    state: ReplicaState
    """STAGING, LOADING or READY."""
    endpoint: str = ""
    limit: int = 0
    devices: Mapping[DeviceId, int] = field(default_factory=dict)
    """Bytes that it uses, or was told to use, on each device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """All that a worker tells when it registers."""

    node: NodeName
    key_fingerprint: str
    """SHA-256 of its public key, hexadecimal: the caller has checked that the worker holds the key."""
    endpoint: str
    devices: tuple[DeviceFacts, ...]
    labels: Mapping[str, str] = field(default_factory=lambda: _NO_TEXT)
    engines: tuple[EngineInfo, ...] = ()
    max_replicas_per_model: int = 1
    running: tuple[RunningReplica, ...] = ()
    disk_total_bytes: int = 0
    version: str = ""
    auto_approve: bool = False
    """Approve the node in the same transaction if nobody has said yet whether it may come in."""
    vouched: bool = False
    """It has shown the mesh's join token: approve it in the same transaction also if it waits."""
    remember: bool = True
    """Keep, for operators to see, that it waits if it is pending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """What came of a registration."""

    incarnation: int
    record_lease: int
    presence_ttl_seconds: float
    adopted: tuple[ReplicaId, ...]
    """Running replicas that are taken over."""
    stop: tuple[ReplicaId, ...]
    """Running replicas that are to be stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationPlan:
    """What the transaction writes. Records in it have no revisions of their own yet."""

    approval: ApprovalRecord | None
    """To be created or rewritten; None leaves it."""
    kept: tuple[ReplicaRecord, ...]
    created: tuple[ReplicaRecord, ...]
    deleted: tuple[ReplicaId, ...]
    devices: tuple[DeviceRecord, ...]
    gone_devices: tuple[DeviceId, ...]
    adopted: tuple[ReplicaId, ...]
    stop: tuple[ReplicaId, ...]


def plan_registration(reg: Registration, view: Snapshot, *, incarnation: int, token: str) -> RegistrationPlan:
    """Decide T0. `view` needs the node's approval and devices, and all replicas, models and policies.

    Afterwards the node's records are exactly those of the processes that it reports and that are still wanted, and
    the claims on its devices are exactly theirs:

    * a process whose record exists, in the same revision of the model, goes on: its record is written again with the
      new incarnation and the state reported, or, if it was leaving, in the state that it had;
    * one whose record says UNLOADING keeps record and claim until its exit is reported, and is to be stopped;
    * one without a record gets one if its model is declared in that revision and there is room by every limit that a
      placement obeys (it was lost with the record lease); otherwise it is to be stopped;
    * a record without a process is deleted.

    Raises:
        NodePending: Nobody has approved the node.
        NodeNameTaken: The name belongs to another key.
    """
    known_approval = view.approvals.get(reg.node)
    approval = admit(reg.node, reg.key_fingerprint, known_approval, auto_approve=reg.auto_approve, vouched=reg.vouched)
    running = {r.id: r for r in reg.running if r.id.node == reg.node}
    records = {record.id: record for record in view.all_replicas() if record.id.node == reg.node}
    kept = tuple(
        _continued(record, running[record.id], incarnation)
        for record in records.values()
        if record.id in running and record.revision == running[record.id].revision
    )
    kept_ids = {record.id for record in kept}
    deleted = tuple(replica for replica in records if replica not in kept_ids)
    room = _Room(reg, approval, view, kept, deleted)
    created = []
    for replica in running.values():
        if replica.id in records:
            continue  # kept, or a process of another revision than its record: that one ends
        record = _recreated(replica, incarnation, token)
        if room.take(record):
            created.append(record)
    known = (*kept, *created)
    adopted = tuple(r.id for r in known if r.state is not ReplicaState.UNLOADING)
    facts = {device.id: device for device in reg.devices}
    return RegistrationPlan(
        approval=approval if approval != known_approval else None,
        kept=kept,
        created=tuple(created),
        deleted=deleted,
        devices=tuple(_device(reg.node, device, known, approval.memory_budgets) for device in facts.values()),
        gone_devices=tuple(device for device in view.devices.get(reg.node, {}) if device not in facts),
        adopted=adopted,
        stop=tuple(r.id for r in reg.running if r.id not in set(adopted)),
    )


def _continued(record: ReplicaRecord, process: RunningReplica, incarnation: int) -> ReplicaRecord:
    """Return the record of a replica that goes on, under the new incarnation."""
    state = record.state if record.state.leaving else process.state
    devices = record.devices
    if record.state.coming and process.state is ReplicaState.READY:
        devices = raised_claims(record.devices, process.devices)
    return replace(
        record,
        state=state,
        incarnation=incarnation,
        endpoint=process.endpoint or record.endpoint,
        limit=process.limit or record.limit,
        devices=devices,
    )


def raised_claims(claims: Mapping[DeviceId, int], measured: Mapping[DeviceId, int]) -> Mapping[DeviceId, int]:
    """Return the claims of a replica that became READY: on each of its devices the larger of estimate and truth."""
    return MappingProxyType({device: max(size, measured.get(device, 0)) for device, size in claims.items()})


def _recreated(process: RunningReplica, incarnation: int, token: str) -> ReplicaRecord:
    return ReplicaRecord(
        id=process.id,
        state=process.state,
        revision=process.revision,
        incarnation=incarnation,
        devices=MappingProxyType(dict(process.devices)),
        endpoint=process.endpoint,
        limit=process.limit,
        token=token,
    )


class _Room:
    """What there is left for records that are made again, by the same limits as for a placement."""

    def __init__(
        self,
        reg: Registration,
        approval: ApprovalRecord,
        view: Snapshot,
        kept: tuple[ReplicaRecord, ...],
        deleted: tuple[ReplicaId, ...],
    ) -> None:
        self._view = view
        self._slots = approval.max_replicas_per_model or reg.max_replicas_per_model
        self._budgets = approval.memory_budgets
        self._node = reg.node
        self._facts = reg.devices
        self._known = kept
        self._members: dict[ModelName, frozenset[ModelName]] = {}
        self._here = Counter(record.id.model for record in kept)
        self._everywhere = Counter(record.id.model for record in view.all_replicas())
        self._everywhere.subtract(Counter(replica.model for replica in deleted))

    def take(self, record: ReplicaRecord) -> bool:
        """Reserve the room for a record if there is enough."""
        name = record.id.model
        model = self._view.models.get(name)
        most = self._view.policy(name).max_replicas
        if model is None or model.revision != record.revision or record.state.leaving or not record.devices:
            return False
        if self._here[name] >= self._slots or (most and self._everywhere[name] >= most):
            return False
        if any(self._here[member] for member in self._group_members(name)):
            return False
        devices = {facts.id: _device(self._node, facts, self._known, self._budgets) for facts in self._facts}
        if any(device not in devices or size < 0 for device, size in record.devices.items()):
            return False
        if min(left_bytes(devices, record.devices).values()) < 0:
            return False
        self._known = (*self._known, record)
        self._here[name] += 1
        self._everywhere[name] += 1
        return True

    def _group_members(self, model: ModelName) -> frozenset[ModelName]:
        if model not in self._members:
            self._members[model] = self._view.group_members(model)
        return self._members[model]


def _device(
    node: NodeName, facts: DeviceFacts, replicas: tuple[ReplicaRecord, ...], budgets: Mapping[str, str]
) -> DeviceRecord:
    device = DeviceRecord(
        node=node,
        id=facts.id,
        kind=facts.kind,
        total_bytes=facts.total_bytes,
        budget_bytes=facts.budget_bytes,
        name=facts.name,
        unified=facts.unified,
        worker_budget_bytes=facts.budget_bytes,
        claims=MappingProxyType({r.id: r.devices[facts.id] for r in replicas if facts.id in r.devices}),
    )
    return with_budget(device, budgets)
