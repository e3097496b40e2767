"""What the worker's state machine is told, and what it tells others to do. Pure values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from types import MappingProxyType

from localmesh.core.ids import DeviceId, ReplicaId
from localmesh.core.records import ModelSpec, ProgressRecord, ReplicaState
from localmesh.core.replica_process import StatusEvent

_NO_DEVICES: Mapping[DeviceId, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One replica of the wanted set."""

    id: ReplicaId
    state: ReplicaState
    """State in the store: UNLOADING means stop it."""
    revision: str
    spec: ModelSpec | None
    """None when the model was deleted or edited meanwhile."""
    problem: str = ""
    """Why `spec` is None although there is one."""
    devices: Mapping[DeviceId, int] = field(default_factory=lambda: _NO_DEVICES)
    placement: int = 0
    """Numbers the lives of the name `id`; one process at most for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """The registry made the worker a node, under a new incarnation."""

    incarnation: int
    stop: frozenset[ReplicaId] = frozenset()
    """Running replicas that are not wanted any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedArrived:
    """The whole wanted set as of a revision of the store."""

    incarnation: int
    store_revision: int
    replicas: tuple[Wanted, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitsTaken:
    """The registry knows of these exits."""

    ids: frozenset[ReplicaId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """The process runs."""

    id: ReplicaId
    pid: int
    weights_bytes: int = 0
    """Size of what it loads, 0 when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailed:
    """No process could be started, and none is left."""

    id: ReplicaId
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The process wrote a status event."""

    id: ReplicaId
    event: StatusEvent
    measured: Mapping[DeviceId, int] = field(default_factory=lambda: _NO_DEVICES)
    """Bytes that the process uses on each of its devices, with events that tell its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The process and everything in its group are gone."""

    id: ReplicaId
    returncode: int
    """Exit code, or minus the signal."""
    last_lines: str = ""
    """The end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """These are to finish what they do and stop; the mesh starts others if it wants them."""

    ids: frozenset[ReplicaId]
    message: str
    """Why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutDown:
    """Stop everything and start nothing any more."""


Event = Registered | WantedArrived | ExitsTaken | Spawned | StartFailed | Said | Exited | Ticked | StopAsked | ShutDown


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Prepare and start a process. Answered by Spawned and later Exited, or by StartFailed."""

    id: ReplicaId
    revision: str
    spec: ModelSpec
    devices: Mapping[DeviceId, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End a process, or the start of one. Answered by Exited or StartFailed."""

    id: ReplicaId
    drain: bool
    """Let it finish what runs; otherwise it has a few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell the registry soon: the report of this replica has changed."""

    id: ReplicaId


Command = Start | Stop | Report


@unique
class Stage(Enum):
    """Where a replica stands on this node."""

    STARTING = "starting"
    """Files are being looked up; there is no process yet."""
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    EXITED = "exited"
    """No process; kept until the registry has taken the exit and shows it no more."""

    @property
    def has_process(self) -> bool:
        """Whether there is a process, or will be one unless the start fails."""
        return self is not Stage.EXITED


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Why a replica ended, or is made to."""

    reason: str = ""
    """ErrorReason by name; empty when it stopped as told."""
    message: str = ""
    while_loading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReport:
    """On its way."""

    state: ReplicaState
    """STAGING or LOADING."""
    progress: ProgressRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """It serves."""

    endpoint: str
    limit: int
    measured: Mapping[DeviceId, int]
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """What is to be told of one replica: a level, not an event."""

    id: ReplicaId
    revision: str
    placement: int
    observed: LoadingReport | ServingReport | Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """All that the machine knows of one replica."""

    id: ReplicaId
    revision: str
    placement: int
    devices: Mapping[DeviceId, int]
    stage: Stage
    deadline: float | None = None
    """When a load without progress is given up."""
    pid: int = 0
    weights_bytes: int = 0
    phase: str = "staging"
    phase_since: float = 0.0
    done_bytes: int = 0
    total_bytes: int = 0
    endpoint: str = ""
    limit: int = 0
    in_flight: int = 0
    measured: Mapping[DeviceId, int] = field(default_factory=lambda: _NO_DEVICES)
    was_ready: bool = False
    outcome: Outcome | None = None
    """Why it is stopped, or how it ended."""
    taken_at: float | None = None
    """When the registry said that it knows of the exit."""
