"""The worker's state machine, by example and as a property: any order of events keeps what must always hold."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec, ReplicaState
from localmesh.core.replica_process import FailedEvent, ListeningEvent, LoadEvent, PhaseEvent, ReadyEvent, StatusEvent
from localmesh.worker.events import (
    Event,
    Exited,
    ExitsTaken,
    LoadingReport,
    Outcome,
    Registered,
    Report,
    Said,
    ServingReport,
    ShutDown,
    Spawned,
    Stage,
    Start,
    StartFailed,
    Stop,
    Ticked,
    Wanted,
    WantedArrived,
)
from localmesh.worker.machine import Machine, MachineConfig, describe_exit

A = ReplicaId(ModelName("m"), NodeName("n1"), 0)
B = ReplicaId(ModelName("m"), NodeName("n1"), 1)
SPEC = ModelSpec(name=ModelName("m"), backend="llama", source="m.gguf")
READY = ReadyEvent(endpoint="h:1", limit=4, memory_bytes=5)
S = ReplicaState


def wanted(replica: ReplicaId = A, state: ReplicaState = S.PLACED, **changes: Any) -> Wanted:
    known: dict[str, Any] = {"revision": "r1", "spec": SPEC, "devices": {CPU: 10}, "placement": 3}
    return Wanted(id=replica, state=state, **{**known, **changes})


class Driven:
    """A machine at a time of its own, in incarnation 1."""

    def __init__(self) -> None:
        self.machine = Machine(MachineConfig(load_seconds=300, load_seconds_per_gib=20, install_seconds=900))
        self.now = 1000.0
        self.revision = 3
        self.tell(Registered(incarnation=1))

    def tell(self, event: Event) -> list[Start | Stop]:
        commands = self.machine.handle(event, now=self.now)
        self.machine.validate()
        return [c for c in commands if not isinstance(c, Report)]

    def want(self, *replicas: Wanted) -> list[Start | Stop]:
        self.revision += 1
        return self.tell(WantedArrived(incarnation=1, store_revision=self.revision, replicas=replicas))

    def say(self, event: StatusEvent, replica: ReplicaId = A) -> list[Start | Stop]:
        return self.tell(Said(id=replica, event=event, measured={CPU: 5}))

    def ready(self) -> None:
        self.want(wanted())
        self.tell(Spawned(id=A, pid=7))
        self.say(READY)

    def observed(self, replica: ReplicaId = A) -> Any:
        report = self.machine.report(replica, now=self.now)
        return report.observed if report is not None else None


def test_a_placed_replica_is_started_once() -> None:
    """F39."""
    d = Driven()
    assert d.want(wanted()) == [Start(id=A, revision="r1", spec=SPEC, devices={CPU: 10})]
    assert d.want(wanted()) == []
    observed = d.observed()
    assert isinstance(observed, LoadingReport)
    assert observed.state is S.STAGING


def test_a_load_is_reported_with_progress_and_eta() -> None:
    """F39."""
    d = Driven()
    d.want(wanted())
    d.tell(Spawned(id=A, pid=7))
    d.say(PhaseEvent(phase="loading", done_bytes=0, total_bytes=100))
    d.now += 10
    d.say(PhaseEvent(phase="loading", done_bytes=25, total_bytes=100))
    observed = d.observed()
    assert isinstance(observed, LoadingReport)
    assert observed.state is S.LOADING
    assert (observed.progress.done_bytes, observed.progress.eta_seconds) == (25, 30)


def test_converting_counts_as_staging() -> None:
    """F39."""
    d = Driven()
    d.want(wanted())
    d.tell(Spawned(id=A, pid=7))
    d.say(PhaseEvent(phase="converting"))
    assert d.observed().state is S.STAGING


def test_a_ready_replica_serves_with_what_it_measured() -> None:
    """F39."""
    d = Driven()
    d.ready()
    assert d.observed() == ServingReport(endpoint="h:1", limit=4, measured={CPU: 5}, in_flight=0)
    d.say(LoadEvent(in_flight=3, memory_bytes=9))
    assert d.observed().in_flight == 3


def test_absence_from_the_wanted_set_stops_nothing() -> None:
    """F4."""
    d = Driven()
    d.ready()
    assert d.want() == []
    assert d.machine.held[A].stage is Stage.READY


def test_unloading_drains_what_serves() -> None:
    """F46."""
    d = Driven()
    d.ready()
    assert d.want(wanted(state=S.UNLOADING)) == [Stop(id=A, drain=True)]
    assert isinstance(d.observed(), ServingReport)
    d.tell(Exited(id=A, returncode=0, last_lines="bye"))
    assert d.observed() == Outcome()


def test_unloading_ends_what_loads_at_once() -> None:
    """F46."""
    d = Driven()
    d.want(wanted())
    assert d.want(wanted(state=S.UNLOADING)) == [Stop(id=A, drain=False)]


def test_unloading_what_does_not_run_is_reported_as_gone() -> None:
    """F43."""
    d = Driven()
    assert d.want(wanted(state=S.UNLOADING)) == []
    assert d.observed().reason == ""


@pytest.mark.parametrize("state", [S.READY, S.DRAINING])
def test_a_record_without_a_process_is_reported_as_lost(state: ReplicaState) -> None:
    """F43."""
    d = Driven()
    assert d.want(wanted(state=state)) == []
    assert d.observed().reason == "REPLICA_LOST"
    assert not d.observed().while_loading


def test_a_placement_whose_spec_is_gone_is_given_back_without_blame() -> None:
    """F43."""
    d = Driven()
    assert d.want(wanted(spec=None)) == []
    assert (d.observed().reason, d.observed().while_loading) == ("", False)


def test_a_spec_that_cannot_be_read_is_a_failed_load() -> None:
    """F43."""
    d = Driven()
    assert d.want(wanted(spec=None, problem="no such backend")) == []
    assert d.observed() == Outcome(reason="INVALID_SPEC", message="no such backend", while_loading=True)


def test_a_process_that_dies_is_not_started_again_for_the_same_placement() -> None:
    """F43."""
    d = Driven()
    d.ready()
    assert d.tell(Exited(id=A, returncode=-9, last_lines="x")) == []
    assert d.observed().reason == "REPLICA_LOST"
    assert d.observed().message.endswith("memory runs out\nx")
    assert d.want(wanted(state=S.READY)) == []
    d.tell(ExitsTaken(ids=frozenset({A})))
    assert d.observed() is None
    # a registry whose view lags shows it still
    assert d.want(wanted(state=S.READY)) == []
    assert d.want() == []
    assert A not in d.machine.held


def test_a_new_placement_of_the_same_name_begins_a_new_life() -> None:
    """F43."""
    d = Driven()
    d.ready()
    d.tell(Exited(id=A, returncode=1))
    assert [type(c) for c in d.want(wanted(placement=9))] == [Start]
    assert d.machine.held[A].placement == 9


def test_a_new_placement_waits_for_the_end_of_the_old_process() -> None:
    """F43."""
    d = Driven()
    d.ready()
    assert d.want(wanted(placement=9, revision="r2")) == [Stop(id=A, drain=True)]
    assert [type(c) for c in d.tell(Exited(id=A, returncode=0))] == [Start]
    report = d.machine.report(A, now=d.now)
    assert report is not None
    assert (report.placement, report.revision) == (9, "r2")


def test_a_placement_on_other_devices_is_another_life() -> None:
    """F43."""
    d = Driven()
    d.ready()
    assert d.want(wanted(placement=9, devices={DeviceId("GPU-1"): 4})) == [Stop(id=A, drain=True)]


def test_a_record_made_anew_is_served_by_the_process_that_runs() -> None:
    """F4."""
    d = Driven()
    d.ready()
    assert d.want(wanted(placement=9, state=S.READY)) == []
    report = d.machine.report(A, now=d.now)
    assert report is not None
    assert report.placement == 9


def test_an_older_set_or_one_of_another_incarnation_is_ignored() -> None:
    """F4."""
    d = Driven()
    d.ready()
    stop = (wanted(state=S.UNLOADING),)
    assert d.tell(WantedArrived(incarnation=2, store_revision=99, replicas=stop)) == []
    assert d.tell(WantedArrived(incarnation=1, store_revision=d.revision - 1, replicas=stop)) == []
    assert d.machine.held[A].stage is Stage.READY


def test_after_a_registration_the_revisions_of_a_new_store_count() -> None:
    """F4: the store may have been a throw-away one."""
    d = Driven()
    d.ready()
    d.tell(Registered(incarnation=2))
    assert d.tell(WantedArrived(incarnation=2, store_revision=1, replicas=(wanted(state=S.UNLOADING),))) == [
        Stop(id=A, drain=True)
    ]


def test_a_registration_stops_what_it_names_and_nothing_else() -> None:
    """F4."""
    d = Driven()
    d.want(wanted(), wanted(B))
    assert [r.id for r in d.machine.running(now=d.now)] == [A, B]
    assert d.tell(Registered(incarnation=2, stop=frozenset({B}))) == [Stop(id=B, drain=False)]


def test_an_exit_that_is_taken_but_shown_on_and_on_is_reported_again() -> None:
    """F43."""
    d = Driven()
    d.ready()
    d.tell(Exited(id=A, returncode=1))
    d.tell(ExitsTaken(ids=frozenset({A})))
    d.tell(Ticked())
    assert d.observed() is None
    d.now += 6
    d.tell(Ticked())
    assert d.observed().reason == "REPLICA_LOST"


def test_a_load_without_progress_is_stopped_and_reported() -> None:
    """F39."""
    d = Driven()
    d.want(wanted())
    d.tell(Spawned(id=A, pid=7, weights_bytes=1 << 30))
    d.now += 319
    assert d.tell(Ticked()) == []
    d.now += 1
    assert d.tell(Ticked()) == [Stop(id=A, drain=False)]
    d.tell(Exited(id=A, returncode=-15, last_lines="reading"))
    assert d.observed() == Outcome(
        reason="LOAD_FAILED",
        message="made no progress for 320 s while starting, and was stopped\nreading",
        while_loading=True,
    )


def test_progress_extends_the_deadline_and_repetition_does_not() -> None:
    """F39."""
    d = Driven()
    d.want(wanted())
    d.tell(Spawned(id=A, pid=7))
    d.now += 299
    d.say(PhaseEvent(phase="loading", done_bytes=1, total_bytes=9))
    d.now += 299
    d.say(PhaseEvent(phase="loading", done_bytes=1, total_bytes=9))
    assert d.tell(Ticked()) == []
    d.now += 2
    assert d.tell(Ticked()) == [Stop(id=A, drain=False)]


def test_converting_has_the_time_of_an_installation() -> None:
    """F39."""
    d = Driven()
    d.want(wanted())
    d.tell(Spawned(id=A, pid=7))
    d.say(PhaseEvent(phase="converting"))
    d.now += 899
    assert d.tell(Ticked()) == []
    d.now += 1
    assert d.tell(Ticked()) == [Stop(id=A, drain=False)]


def test_a_replica_that_gives_up_is_stopped_and_reported_in_its_words() -> None:
    """F46."""
    d = Driven()
    d.want(wanted())
    d.tell(Spawned(id=A, pid=7))
    assert d.say(FailedEvent(reason="ENGINE_UNAVAILABLE", message="no AVX2")) == [Stop(id=A, drain=False)]
    d.tell(Exited(id=A, returncode=1))
    assert d.observed() == Outcome(reason="ENGINE_UNAVAILABLE", message="no AVX2", while_loading=True)


def test_a_start_that_fails_is_reported() -> None:
    """F46."""
    d = Driven()
    d.want(wanted())
    d.tell(StartFailed(id=A, reason="SOURCE_MISSING", message="no file"))
    assert d.observed() == Outcome(reason="SOURCE_MISSING", message="no file", while_loading=True)


def test_a_port_in_use_is_a_failed_load_to_others() -> None:
    """F46."""
    d = Driven()
    d.want(wanted())
    d.tell(StartFailed(id=A, reason="PORT_IN_USE", message="9600"))
    assert d.observed().reason == "LOAD_FAILED"


def test_the_worker_s_end_stops_all_and_starts_nothing() -> None:
    """F46."""
    d = Driven()
    d.ready()
    assert d.tell(ShutDown()) == [Stop(id=A, drain=True)]
    assert d.want(wanted(), wanted(B)) == []
    assert not d.machine.idle
    d.tell(Exited(id=A, returncode=0))
    assert d.machine.idle


def test_reports_are_repeated_until_the_store_shows_them() -> None:
    """F43."""
    d = Driven()
    d.ready()
    assert d.machine.unsettled() == {A}
    d.want(wanted(state=S.READY))
    assert d.machine.unsettled() == frozenset()
    d.tell(Exited(id=A, returncode=1))
    assert d.machine.unsettled() == {A}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed (SIGKILL); the system does that when memory runs out"),
        (137, "was killed (SIGKILL); the system does that when memory runs out"),
        (-6, "crashed (SIGABRT)"),
        (139, "crashed (SIGSEGV)"),
        (-4, "crashed (SIGILL; this CPU may lack instructions that the engine needs)"),
        (-15, "was ended by SIGTERM"),
        (2, "ended with exit code 2"),
        (250, "ended with exit code 250"),
    ],
)
def test_how_a_process_ended_is_said_in_words(code: int, words: str) -> None:
    """F46."""
    assert describe_exit(code) == words


class WorkerLife(RuleBasedStateMachine):
    """Every order of events a world can produce. The model beside the machine: which processes there are."""

    ids = st.sampled_from([A, B])

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(MachineConfig())
        self.now = 0.0
        self.incarnation = 0
        self.revision = 0
        self.alive: dict[ReplicaId, int] = {}
        self.started: set[tuple[ReplicaId, str]] = set()
        self.pid = 1
        self.ending = False

    def tell(self, event: Event) -> None:
        before = {i: h.stage for i, h in self.machine.held.items()}
        for command in self.machine.handle(event, now=self.now):
            match command:
                case Start(id=replica):
                    assert replica not in self.alive, "two processes under one name"
                    assert not self.ending
                    self.alive[replica] = 0
                case Stop(id=replica):
                    assert replica in self.alive, "stops what is not there"
                    assert before[replica] is not Stage.STOPPING
                case Report():
                    pass

    @rule(stop=st.frozensets(ids))
    def registers(self, stop: frozenset[ReplicaId]) -> None:
        self.incarnation += 1
        self.tell(Registered(incarnation=self.incarnation, stop=stop))

    @rule(
        entries=st.dictionaries(
            ids,
            st.tuples(st.sampled_from(S), st.sampled_from(["r1", "r2"]), st.integers(0, 3), st.booleans()),
        ),
        back=st.integers(0, 1),
    )
    def wanted_arrives(self, entries: dict[ReplicaId, tuple[ReplicaState, str, int, bool]], back: int) -> None:
        self.revision += 1
        replicas = tuple(
            wanted(i, state, revision=revision, placement=placement, spec=SPEC if known else None)
            for i, (state, revision, placement, known) in entries.items()
        )
        before = dict(self.machine.held)
        self.tell(WantedArrived(incarnation=self.incarnation, store_revision=self.revision - back, replicas=replicas))
        for replica, held in before.items():
            now = self.machine.held.get(replica)
            if replica not in entries and held.stage.has_process:
                assert now == held, "absence changed a replica that has a process"

    @precondition(lambda self: any(pid == 0 for pid in self.alive.values()))
    @rule(data=st.data(), works=st.booleans())
    def start_ends(self, data: st.DataObject, works: bool) -> None:
        replica = data.draw(st.sampled_from(sorted(i for i, pid in self.alive.items() if pid == 0)))
        if works:
            self.pid += 1
            self.alive[replica] = self.pid
            self.tell(Spawned(id=replica, pid=self.pid))
        else:
            del self.alive[replica]
            self.tell(StartFailed(id=replica, reason="LOAD_FAILED", message="no"))

    @precondition(lambda self: any(self.alive.values()))
    @rule(
        data=st.data(),
        event=st.sampled_from(
            [
                READY,
                PhaseEvent(phase="loading", done_bytes=1),
                ListeningEvent(endpoint="h:1"),
                LoadEvent(in_flight=1, memory_bytes=1),
                FailedEvent(reason="LOAD_FAILED", message="no"),
            ]
        ),
    )
    def says(self, data: st.DataObject, event: StatusEvent) -> None:
        replica = data.draw(st.sampled_from(sorted(i for i, pid in self.alive.items() if pid)))
        self.tell(Said(id=replica, event=event))

    @precondition(lambda self: any(self.alive.values()))
    @rule(data=st.data(), code=st.sampled_from([0, 1, -9]))
    def exits(self, data: st.DataObject, code: int) -> None:
        replica = data.draw(st.sampled_from(sorted(i for i, pid in self.alive.items() if pid)))
        del self.alive[replica]
        self.tell(Exited(id=replica, returncode=code))

    @rule(ids=st.frozensets(ids))
    def exits_are_taken(self, ids: frozenset[ReplicaId]) -> None:
        self.tell(ExitsTaken(ids=ids))

    @rule(seconds=st.sampled_from([0.5, 6.0, 400.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Ticked())

    @rule()
    def worker_ends(self) -> None:
        self.ending = True
        self.tell(ShutDown())

    @invariant()
    def holds(self) -> None:
        self.machine.validate()
        with_process = {i for i, h in self.machine.held.items() if h.stage.has_process}
        assert with_process == set(self.alive)
        assert {r.id for r in self.machine.running(now=self.now)} == with_process
        assert self.machine.idle == (not self.alive)
        for replica, pid in self.alive.items():
            assert self.machine.held[replica].pid == pid


WorkerLife.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestWorkerLife = WorkerLife.TestCase
