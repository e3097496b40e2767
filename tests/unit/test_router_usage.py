"""When replicas were last used, and which of them somebody is about to use."""

from dataclasses import replace

from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.snapshot import Snapshot
from localmesh.router.usage import UsageLog
from tests.unit.scheduling_kit import LOADING, M, hold, mesh, serve, set_state

R = ReplicaId(M, NodeName("n0"), 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.waiting: dict[ModelName, int] = {}
        self.mine: dict[ReplicaId, int] = {}
        self.log = UsageLog(
            self.clock, waiting=lambda m: self.waiting.get(m, 0), in_flight=lambda r: self.mine.get(r, 0)
        )


def served(revision: int = 1) -> Snapshot:
    return replace(serve(mesh(1), 1), revision=revision)


def test_what_nobody_was_seen_to_use_is_as_old_as_its_record() -> None:
    """F36."""
    world, now = World(), served()
    world.log.observe(now)
    assert world.log.last_used(replace(now.replicas[M][R], mod_revision=7)) == 7


def test_a_replica_was_last_used_when_the_last_hold_on_it_ended() -> None:
    """F36: whoever held it, this router or another one."""
    world = World()
    world.log.observe(hold(served(5), R, 0))
    world.log.observe(replace(served(8)))
    world.log.observe(replace(served(20)))
    assert world.log.last_used(served().replicas[M][R]) == 8


def test_what_is_gone_is_forgotten() -> None:
    world = World()
    record = served().replicas[M][R]
    world.log.observe(hold(served(5), R))
    world.log.observe(replace(mesh(1), revision=6))
    assert world.log.last_used(record) == record.mod_revision


def test_who_had_it_loaded_gets_it_first() -> None:
    """F36: a replica that has just become ready, or that requests wait for, is not stopped for others."""
    world, now = World(), served()
    world.log.observe(set_state(now, R, LOADING))
    assert not world.log.needed(set_state(now, R, LOADING))
    world.log.observe(now)
    assert world.log.needed(now) == {R}
    world.clock.now += 5.0
    assert not world.log.needed(now)
    world.waiting[M] = 1
    assert world.log.needed(now) == {R}
    world.waiting.clear()
    world.mine[R] = 1
    assert world.log.needed(now) == {R}
