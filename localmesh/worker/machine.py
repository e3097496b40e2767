"""The worker's state machine: events in, commands out. Pure: no I/O, no clock, no tasks.

It drives the replicas of the node to the wanted set, by these rules:

* Only the state UNLOADING, the answer of a registration, a load that makes no progress, a change of its backend, or the
  worker's own end stops a process. Absence from the wanted set never does.
* A placement gets at most one process. One that died is reported, not started again: the mesh places anew.
* Nothing starts under a name while the process of an earlier placement of that name is there.
* Reports are levels. An exit is reported until it is taken, and again if the store goes on showing the replica.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from signal import Signals
from typing import assert_never

from localmesh.core.ids import ReplicaId
from localmesh.core.records import ProgressRecord, ReplicaState
from localmesh.core.replica_process import FailedEvent, ListeningEvent, LoadEvent, PhaseEvent, ReadyEvent
from localmesh.worker.events import (
    Command,
    Event,
    Exited,
    ExitsTaken,
    Held,
    LoadingReport,
    Outcome,
    Registered,
    ReplicaReport,
    Report,
    Said,
    ServingReport,
    ShutDown,
    Spawned,
    Stage,
    Start,
    StartFailed,
    Stop,
    StopAsked,
    Ticked,
    Wanted,
    WantedArrived,
)

_GIB = 1 << 30
_LONG_PHASES = frozenset({"staging", "converting"})
_TAKEN_BUT_SHOWN_SECONDS = 5.0
"""An exit that was taken may be shown by a lagging store this long before it is reported again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """How long a load may go without progress, in seconds."""

    load_seconds: float = 300.0
    load_seconds_per_gib: float = 20.0
    """On top, for each GiB of weights."""
    install_seconds: float = 900.0
    """While files are staged or converted."""


class Machine:
    """The replicas of one node. Changed by `handle` only."""

    def __init__(self, config: MachineConfig) -> None:
        self._config = config
        self._held: dict[ReplicaId, Held] = {}
        self._wanted: Mapping[ReplicaId, Wanted] = {}
        self._wanted_revision = 0
        self._incarnation = 0
        self._shutting_down = False

    @property
    def held(self) -> Mapping[ReplicaId, Held]:
        """What is known of each replica. A live view: not to be kept across `handle`."""
        return self._held

    @property
    def idle(self) -> bool:
        """Whether there is no process."""
        return not any(h.stage.has_process for h in self._held.values())

    def handle(self, event: Event, *, now: float) -> tuple[Command, ...]:
        """Take one event in and return what is to be done about it, in this order.

        Args:
            event: What happened.
            now: Seconds on a monotonic clock.
        """
        return tuple(self._dispatch(event, now))

    def report(self, replica: ReplicaId, *, now: float) -> ReplicaReport | None:
        """Return what the registry is to know of a replica; None when there is nothing to tell."""
        held = self._held.get(replica)
        if held is None or held.taken_at is not None:
            return None
        return ReplicaReport(
            id=held.id, revision=held.revision, placement=held.placement, observed=_observed(held, now)
        )

    def reports(self, *, now: float) -> tuple[ReplicaReport, ...]:
        """Return all reports, in a stable order."""
        found = (self.report(i, now=now) for i in sorted(self._held))
        return tuple(r for r in found if r is not None)

    def running(self, *, now: float) -> tuple[ReplicaReport, ...]:
        """Return the reports of replicas that have a process: what a registration tells."""
        return tuple(r for r in self.reports(now=now) if self._held[r.id].stage.has_process)

    def unsettled(self) -> frozenset[ReplicaId]:
        """Return the replicas whose report the store does not show yet: worth telling again."""
        return frozenset(h.id for h in self._held.values() if _is_unsettled(h, self._wanted.get(h.id)))

    def validate(self) -> None:
        """Check what must always hold.

        Raises:
            AssertionError: It does not; the message names the replica.
        """
        for replica, held in self._held.items():
            where = f"{replica}: {held}"
            assert replica == held.id, where  # noqa: S101 - this function is made of assertions
            assert (held.deadline is not None) == (held.stage in (Stage.STARTING, Stage.LOADING)), where  # noqa: S101
            assert held.stage is not Stage.STARTING or held.pid == 0, where  # noqa: S101
            assert held.stage not in (Stage.LOADING, Stage.READY) or held.pid > 0, where  # noqa: S101
            assert held.stage is not Stage.READY or (held.endpoint and held.limit > 0 and held.was_ready), where  # noqa: S101
            assert held.stage not in (Stage.STOPPING, Stage.EXITED) or held.outcome is not None, where  # noqa: S101
            assert held.stage is Stage.EXITED or held.taken_at is None, where  # noqa: S101
            assert not (self._shutting_down and held.stage in (Stage.STARTING, Stage.LOADING, Stage.READY)), where  # noqa: S101

    def _dispatch(self, event: Event, now: float) -> Iterator[Command]:
        match event:
            case Registered():
                yield from self._registered(event)
            case WantedArrived():
                yield from self._wanted_arrived(event, now)
            case ExitsTaken():
                yield from self._exits_taken(event, now)
            case Spawned():
                yield from self._spawned(event, now)
            case StartFailed():
                yield from self._start_failed(event, now)
            case Said():
                yield from self._said(event, now)
            case Exited():
                yield from self._exited(event, now)
            case Ticked():
                yield from self._ticked(now)
            case StopAsked():
                for held in [h for h in self._held.values() if h.id in event.ids]:
                    yield from self._stop(held, Outcome(message=event.message))
            case ShutDown():
                self._shutting_down = True
                for held in list(self._held.values()):
                    yield from self._stop(held, Outcome(message="the worker stops"))
            case _:
                assert_never(event)

    def _registered(self, event: Registered) -> Iterator[Command]:
        # a new incarnation may be of another store: revisions of the old one mean nothing in it
        self._incarnation = event.incarnation
        self._wanted, self._wanted_revision = {}, 0
        for held in list(self._held.values()):
            if held.id in event.stop:
                yield from self._stop(held, Outcome(message="not wanted any more"))
            elif held.taken_at is not None:
                del self._held[held.id]

    def _wanted_arrived(self, event: WantedArrived, now: float) -> Iterator[Command]:
        if event.incarnation != self._incarnation or event.store_revision < self._wanted_revision:
            return
        self._wanted_revision = event.store_revision
        self._wanted = {w.id: w for w in event.replicas}
        yield from self._reconcile(now)

    def _exits_taken(self, event: ExitsTaken, now: float) -> Iterator[Command]:
        for held in [h for h in self._held.values() if h.id in event.ids and h.stage is Stage.EXITED]:
            self._held[held.id] = replace(held, taken_at=now)
        yield from self._reconcile(now)

    def _reconcile(self, now: float) -> Iterator[Command]:
        for held in list(self._held.values()):
            if held.taken_at is not None and held.id not in self._wanted:
                del self._held[held.id]
        for replica in sorted(self._wanted):
            wanted, known = self._wanted[replica], self._held.get(replica)
            if known is None or (known.stage is Stage.EXITED and known.placement != wanted.placement):
                yield from self._begin(wanted, now)
            elif known.stage not in (Stage.EXITED, Stage.STOPPING):
                yield from self._continue(known, wanted)

    def _begin(self, wanted: Wanted, now: float) -> Iterator[Command]:
        """Take a placement in that has no process."""
        outcome: Outcome | None = None
        if wanted.state is ReplicaState.UNLOADING:
            outcome = Outcome(message="it was not running")
        elif not wanted.state.coming:
            outcome = Outcome(reason="REPLICA_LOST", message="the node does not run it (any more)")
        elif self._shutting_down:
            outcome = Outcome(message="the worker stops")
        elif wanted.problem:
            outcome = Outcome(reason="INVALID_SPEC", message=wanted.problem, while_loading=True)
        elif wanted.spec is None:
            outcome = Outcome(message="the model was changed or deleted before its load began")
        held = Held(
            id=wanted.id,
            revision=wanted.revision,
            placement=wanted.placement,
            devices=wanted.devices,
            stage=Stage.EXITED if outcome else Stage.STARTING,
            phase_since=now,
            deadline=None if outcome else now + self._config.install_seconds,
            outcome=outcome,
        )
        self._held[wanted.id] = held
        if wanted.spec is not None and outcome is None:
            yield Start(id=wanted.id, revision=wanted.revision, spec=wanted.spec, devices=wanted.devices)
        yield Report(id=wanted.id)

    def _continue(self, held: Held, wanted: Wanted) -> Iterator[Command]:
        """Compare a replica that has a process with what is wanted of it."""
        if wanted.state is ReplicaState.UNLOADING:
            self._held[held.id] = held = replace(held, placement=wanted.placement)
            yield from self._stop(held, Outcome())
        elif wanted.revision != held.revision or wanted.devices.keys() != held.devices.keys():
            # the name was given away meanwhile: that life begins when this one has ended
            yield from self._stop(held, Outcome(message="the node was given another placement of this name"))
        elif wanted.placement != held.placement:
            self._held[held.id] = replace(held, placement=wanted.placement)
            yield Report(id=held.id)

    def _spawned(self, event: Spawned, now: float) -> Iterator[Command]:
        held = self._held.get(event.id)
        if held is None or held.stage is Stage.EXITED:
            return
        held = replace(held, pid=event.pid, weights_bytes=event.weights_bytes)
        if held.stage is Stage.STARTING:
            held = replace(held, stage=Stage.LOADING, phase="starting", phase_since=now)
            held = replace(held, deadline=now + self._patience(held))
        self._held[held.id] = held
        yield Report(id=held.id)

    def _said(self, event: Said, now: float) -> Iterator[Command]:
        held = self._held.get(event.id)
        if held is None or not held.pid or held.stage is Stage.EXITED:
            return
        match event.event:
            case LoadEvent(in_flight=in_flight):
                self._held[held.id] = replace(held, in_flight=in_flight, measured=event.measured or held.measured)
            case _ if held.stage is not Stage.LOADING:
                return
            case PhaseEvent() as said:
                moved = said.phase != held.phase or said.done_bytes > held.done_bytes
                held = replace(
                    held,
                    phase=said.phase,
                    phase_since=now if said.phase != held.phase else held.phase_since,
                    done_bytes=said.done_bytes,
                    total_bytes=said.total_bytes,
                )
                if moved:
                    held = replace(held, deadline=now + self._patience(held))
                self._held[held.id] = held
            case ListeningEvent(endpoint=endpoint):
                self._held[held.id] = replace(held, endpoint=endpoint)
            case ReadyEvent() as ready:
                self._held[held.id] = replace(
                    held,
                    stage=Stage.READY,
                    deadline=None,
                    endpoint=ready.endpoint,
                    limit=max(1, ready.limit),
                    measured=event.measured,
                    was_ready=True,
                )
            case FailedEvent() as failed:
                outcome = Outcome(reason=_load_reason(failed.reason), message=failed.message, while_loading=True)
                yield from self._stop(held, outcome)
                return
            case _:
                assert_never(event.event)
        yield Report(id=held.id)

    def _exited(self, event: Exited, now: float) -> Iterator[Command]:
        held = self._held.get(event.id)
        if held is None or held.stage is Stage.EXITED:
            return
        outcome = held.outcome or _unasked_exit(held, event.returncode)
        if outcome.reason and event.last_lines:
            outcome = replace(outcome, message=f"{outcome.message}\n{event.last_lines}")
        yield from self._gone(held, outcome, now)

    def _start_failed(self, event: StartFailed, now: float) -> Iterator[Command]:
        held = self._held.get(event.id)
        if held is None or held.stage is Stage.EXITED:
            return
        failure = Outcome(reason=_load_reason(event.reason), message=event.message, while_loading=True)
        yield from self._gone(held, held.outcome or failure, now)

    def _gone(self, held: Held, outcome: Outcome, now: float) -> Iterator[Command]:
        self._held[held.id] = replace(held, stage=Stage.EXITED, deadline=None, pid=0, in_flight=0, outcome=outcome)
        yield Report(id=held.id)
        yield from self._reconcile(now)

    def _ticked(self, now: float) -> Iterator[Command]:
        for held in list(self._held.values()):
            if held.deadline is not None and now >= held.deadline:
                outcome = Outcome(
                    reason="LOAD_FAILED",
                    message=f"made no progress for {self._patience(held):.0f} s while {held.phase}, and was stopped",
                    while_loading=True,
                )
                yield from self._stop(held, outcome)
            elif held.taken_at is not None and now - held.taken_at >= _TAKEN_BUT_SHOWN_SECONDS:
                # taken, they say, but the store still shows it
                self._held[held.id] = replace(held, taken_at=None)
                yield Report(id=held.id)

    def _stop(self, held: Held, outcome: Outcome) -> Iterator[Command]:
        if held.stage in (Stage.EXITED, Stage.STOPPING):
            return
        self._held[held.id] = replace(held, stage=Stage.STOPPING, deadline=None, outcome=outcome)
        # what never served has nothing to finish
        yield Stop(id=held.id, drain=held.was_ready)

    def _patience(self, held: Held) -> float:
        if held.stage is Stage.STARTING or held.phase in _LONG_PHASES:
            return self._config.install_seconds
        size = max(held.weights_bytes, held.total_bytes)
        return self._config.load_seconds + self._config.load_seconds_per_gib * size / _GIB


def describe_exit(returncode: int) -> str:
    """Return how a process ended, as the predicate of a sentence."""
    number = -returncode if returncode < 0 else returncode - 128 if returncode > 128 else 0
    try:
        name = Signals(number).name if number else ""
    except ValueError:
        name = ""
    if name == "SIGKILL":
        return "was killed (SIGKILL); the system does that when memory runs out"
    if name in ("SIGABRT", "SIGSEGV", "SIGILL", "SIGBUS", "SIGFPE"):
        hint = "; this CPU may lack instructions that the engine needs" if name == "SIGILL" else ""
        return f"crashed ({name}{hint})"
    if name:
        return f"was ended by {name}"
    return f"ended with exit code {returncode}"


def _observed(held: Held, now: float) -> LoadingReport | ServingReport | Outcome:
    if held.stage is Stage.EXITED:
        return held.outcome or Outcome()
    if held.was_ready:
        return ServingReport(endpoint=held.endpoint, limit=held.limit, measured=held.measured, in_flight=held.in_flight)
    state = ReplicaState.LOADING if held.pid and held.phase not in _LONG_PHASES else ReplicaState.STAGING
    progress = ProgressRecord(
        phase=held.phase,
        done_bytes=held.done_bytes,
        total_bytes=held.total_bytes,
        eta_seconds=_eta_seconds(held, now),
    )
    return LoadingReport(state=state, progress=progress)


def _eta_seconds(held: Held, now: float) -> float:
    elapsed, left = now - held.phase_since, held.total_bytes - held.done_bytes
    if held.done_bytes <= 0 or left <= 0 or elapsed <= 0:
        return 0.0
    return left * elapsed / held.done_bytes


def _is_unsettled(held: Held, wanted: Wanted | None) -> bool:
    if held.stage is Stage.EXITED:
        return held.taken_at is None
    if wanted is None:
        return False
    if held.was_ready:
        return wanted.state.coming
    return wanted.state is ReplicaState.PLACED


def _load_reason(reason: str) -> str:
    # PORT_IN_USE is between the worker and its replica; callers know it as a load that failed
    return "LOAD_FAILED" if reason in ("", "PORT_IN_USE") else reason


def _unasked_exit(held: Held, returncode: int) -> Outcome:
    how = describe_exit(returncode)
    if held.was_ready:
        return Outcome(reason="REPLICA_LOST", message=f"its process {how}")
    return Outcome(reason="LOAD_FAILED", message=f"its process {how} while loading", while_loading=True)
