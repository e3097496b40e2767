"""What the store holds, as immutable values.

Records that come from the store carry the `mod_revision` of their key: the transactions compare it. Sizes are bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from types import MappingProxyType

from localmesh.core.ids import DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.labels import SelectorTerm


def _nothing() -> Mapping[str, str]:
    # A factory, because Python 3.11 takes an unhashable default for a mutable one.
    return MappingProxyType({})


@unique
class ReplicaState(Enum):
    """Where a replica stands in its life, in the order of that life."""

    PLACED = 1
    STAGING = 2
    LOADING = 3
    READY = 4
    DRAINING = 5
    UNLOADING = 6

    @property
    def coming(self) -> bool:
        """Whether it will be READY if nothing goes wrong."""
        return self in (ReplicaState.PLACED, ReplicaState.STAGING, ReplicaState.LOADING)

    @property
    def leaving(self) -> bool:
        """Whether it will never take a new request."""
        return self in (ReplicaState.DRAINING, ReplicaState.UNLOADING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """How a model is loaded. Its revision is a hash over all of it: see localmesh.store.codec."""

    name: ModelName
    backend: str
    """Engine: "llama", "minilm" or "process:NAME"."""
    source: str
    """Path below the models folder, or "pip:PACKAGE[/PATH]"."""
    context_tokens: int = 0
    """Tokens for each slot; 0 is the model's own length, at most 4096."""
    slots: int = 0
    """Requests computed at once; 0 is 1."""
    threads: int = 0
    """CPU threads; 0 is 1."""
    gpu_layers: int | None = None
    cache_type: str = ""
    """"f16" (also when empty), "q8_0" or "q4_0"."""
    embeddings: bool = False
    max_concurrent_requests: int = 0
    """Requests accepted at once; 0 is 16 for each slot."""
    options: Mapping[str, str] = field(default_factory=_nothing)
    memory_bytes: int = 0
    """Device memory of a replica; 0 means that the node estimates it."""
    device_kind: str = ""
    """"cpu", "gpu", or empty for the best that the engine can use."""
    device_count: int = 0
    """GPUs that one replica spreads over, all or none of them; 0 is one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Where replicas of a model may be, and how many."""

    node_selector: Mapping[str, str] = field(default_factory=_nothing)
    min_replicas: int = 0
    max_replicas: int = 0
    """0 is no limit."""
    immediate: bool = False
    """Rollout: replace at once instead of overlapping."""
    selector_terms: tuple[SelectorTerm, ...] = ()
    """Further conditions on a node's labels, all of which must hold."""
    groups: tuple[str, ...] = ()
    """Concurrency groups: models that have one in common never share a node."""
    spread_all: bool = False
    """One replica on every node that matches, now and later, instead of a minimum and a maximum."""
    pinned: bool = False
    """No replica is evicted to make room for another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A declared model."""

    spec: ModelSpec
    revision: str
    mod_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRecord:
    """A model's policy."""

    policy: Policy
    mod_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRecord:
    """What the operator says of a node. Survives the node."""

    key_fingerprint: str
    approved: bool = True
    cordoned: bool = False
    draining: bool = False
    labels: Mapping[str, str] = field(default_factory=_nothing)
    max_replicas_per_model: int = 0
    """In place of what the worker says; 0 leaves it at that."""
    memory_budgets: Mapping[str, str] = field(default_factory=_nothing)
    """In place of what the worker says, by device id, or "*" for every other device: "80%", "12GiB" or bytes. See
    localmesh.core.budgets."""
    mod_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """An engine of a node."""

    name: str
    available: bool
    device_kinds: tuple[str, ...] = ("cpu",)
    detail: str = ""
    """Version, or what to do to get (more of) it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A present node; it is there as long as its presence lease."""

    name: NodeName
    incarnation: int
    """Id of the presence lease."""
    record_lease: int
    endpoint: str
    labels: Mapping[str, str] = field(default_factory=_nothing)
    engines: tuple[EngineInfo, ...] = ()
    max_replicas_per_model: int = 1
    key_fingerprint: str = ""
    disk_total_bytes: int = 0
    version: str = ""
    mod_revision: int = 0

    def engine(self, name: str) -> EngineInfo | None:
        """Return the engine of that name."""
        return next((e for e in self.engines if e.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRecord:
    """A node's last measurement. Never compared in a transaction."""

    free_bytes: Mapping[DeviceId, int]
    cpu_load: float = 0.0
    """Load of the last minute divided by the number of cores."""
    disk_free_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """What a node knows of one model's files."""

    revision: str
    present: bool
    path: str
    weights_bytes: int = 0
    memory_bytes: int = 0
    """Device memory that a replica will take."""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """A device and the claims on its memory."""

    node: NodeName
    id: DeviceId
    kind: str
    """"cpu" or "gpu"."""
    total_bytes: int
    """All of it, whatever the budget."""
    budget_bytes: int
    """What may be claimed: the operator's override where there is one, else what the worker says."""
    name: str = ""
    unified: bool = False
    worker_budget_bytes: int = 0
    """What the worker says that may be claimed; 0 in a record of a version that did not keep it."""
    claims: Mapping[ReplicaId, int] = field(default_factory=lambda: MappingProxyType({}))
    mod_revision: int = 0

    @property
    def claimed_bytes(self) -> int:
        """Bytes claimed in all."""
        return sum(self.claims.values())

    @property
    def unclaimed_bytes(self) -> int:
        """Bytes of the budget that can be claimed; negative after the budget was lowered."""
        return self.budget_bytes - self.claimed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRecord:
    """A replica, from its placement to the confirmed exit of its process."""

    id: ReplicaId
    state: ReplicaState
    revision: str
    """Revision of the model that it was placed for."""
    incarnation: int
    """Incarnation of its node."""
    devices: Mapping[DeviceId, int]
    """Bytes claimed on each device."""
    endpoint: str = ""
    limit: int = 0
    """Requests that it accepts at once; 0 until READY."""
    memory_for: ReplicaId | None = None
    """With UNLOADING: who gets the memory."""
    token: str = ""
    mod_revision: int = 0
    create_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRecord:
    """What a replica that is coming does."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    eta_seconds: float = 0.0
    """0 when it cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRecord:
    """A load that failed, or replicas that died: the model is not placed on that node before the record expires."""

    model: ModelName
    node: NodeName
    reason: str
    """Name of an error reason, as in localmesh.core.errors."""
    message: str
    revision: str = ""
    """Revision that failed: another one may be tried at once."""
    attempts: int = 1
    """How often in a row, this time included. The record lives longer each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryRecord:
    """What went wrong with a model on a node lately. It outlives the failure, and is forgotten when all goes well."""

    revision: str
    failed_loads: int = 0
    """Since the last one that did not fail."""
    deaths: int = 0
    """Replicas that died after they were ready."""
