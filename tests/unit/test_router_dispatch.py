"""Who gets which replica, and who waits."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from localmesh.balancing import Chooser, Ejections, LocalLoad
from localmesh.core.clock import SystemClock
from localmesh.core.errors import LoadFailed, Overloaded
from localmesh.core.ids import HolderId, ModelName, NodeName, ReplicaId
from localmesh.core.pick import candidates, pick_best_replica
from localmesh.core.records import (
    ApprovalRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
)
from localmesh.core.snapshot import Snapshot
from localmesh.router.dispatch import Attempts, Dispatcher, Slot

MODEL = ModelName("m")
CLOCK = SystemClock()


def _id(node: str) -> ReplicaId:
    return ReplicaId(MODEL, NodeName(node), 0)


def _mesh(nodes: str, *, limit: int = 1, mod_revision: int = 1) -> Snapshot:
    names = [NodeName(n) for n in nodes]
    return Snapshot(
        revision=mod_revision,
        models={MODEL: ModelRecord(spec=ModelSpec(name=MODEL, backend="llama", source="s"), revision="r")},
        approvals={n: ApprovalRecord(key_fingerprint="k") for n in names},
        nodes={n: NodeRecord(name=n, incarnation=1, record_lease=2, endpoint="e") for n in names},
        replicas={
            MODEL: {
                _id(n): ReplicaRecord(
                    id=_id(n),
                    state=ReplicaState.READY,
                    revision="r",
                    incarnation=1,
                    devices={},
                    limit=limit,
                    mod_revision=mod_revision,
                )
                for n in names
            }
        },
    )


class Mesh:
    """A dispatcher and the view that it looks at."""

    def __init__(self, snapshot: Snapshot, *, max_waiting: int = 100) -> None:
        self.snapshot = snapshot
        self.load = LocalLoad()
        self.needed: list[ModelName] = []
        ejections = Ejections()
        self.dispatcher = Dispatcher(
            snapshot=lambda: self.snapshot,
            chooser=Chooser(
                holder=HolderId("me"), load=self.load, ejections=ejections, salt=b"s", dice=random.Random(1)
            ),
            load=self.load,
            ejections=ejections,
            clock=CLOCK,
            need=self.needed.append,
            max_waiting=max_waiting,
        )

    async def assign(self, *, within: float = 5.0, attempts: Attempts | None = None) -> Slot:
        return await self.dispatcher.assign(MODEL, attempts or Attempts(), deadline=CLOCK.monotonic() + within)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_a_burst_of_32_on_four_idle_replicas_gives_each_eight() -> None:
    """F12."""
    mesh = Mesh(_mesh("abcd", limit=16))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(mesh.assign()) for _ in range(32)]
    assert [mesh.load.in_flight(_id(n)) for n in "abcd"] == [8, 8, 8, 8]
    for task in tasks:
        task.result().release()
    assert mesh.dispatcher.in_flight == 0


async def test_who_waits_longest_gets_the_slot_that_frees() -> None:
    mesh = Mesh(_mesh("a"))
    first = await mesh.assign()
    order: list[int] = []

    async def wait(number: int) -> None:
        slot = await mesh.assign()
        order.append(number)
        slot.release()

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(wait(number))
            await _until(lambda n=number: mesh.dispatcher.waiting(MODEL) == n + 1)
        first.release()
    assert order == [0, 1, 2, 3]
    assert mesh.needed == []


async def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    mesh = Mesh(_mesh("a"))
    first = await mesh.assign()
    order: list[str] = []

    async def wait(name: str) -> None:
        slot = await mesh.assign()
        order.append(name)
        await asyncio.sleep(0)
        slot.release()

    async with asyncio.TaskGroup() as group:
        group.create_task(wait("old"))
        await _until(lambda: mesh.dispatcher.waiting(MODEL) == 1)
        first.release()
        await wait("new")
    assert order == ["old", "new"]


async def test_nobody_waits_past_the_deadline() -> None:
    mesh = Mesh(_mesh("a"))
    slot = await mesh.assign()
    with pytest.raises(TimeoutError):
        await mesh.assign(within=0.005)
    assert mesh.dispatcher.waiting(MODEL) == 0
    slot.release()
    assert mesh.dispatcher.in_flight == 0


async def test_a_slot_that_was_given_to_a_caller_who_left_is_given_on() -> None:
    """F17: nothing leaks when the gift and the leaving cross."""
    mesh = Mesh(_mesh("a"))
    first = await mesh.assign()
    async with asyncio.TaskGroup() as group:
        leaver = group.create_task(mesh.assign())
        await _until(lambda: mesh.dispatcher.waiting(MODEL) == 1)
        first.release()  # the slot is the leaver's now ...
        leaver.cancel()  # ... who has not run since
    assert leaver.cancelled()
    assert mesh.dispatcher.in_flight == 0
    (await mesh.assign()).release()


async def test_a_slot_is_counted_out_once_however_often_it_is_released() -> None:
    mesh = Mesh(_mesh("a", limit=2))
    one, two = await mesh.assign(), await mesh.assign()
    one.release()
    one.release()
    assert mesh.dispatcher.in_flight == 1
    two.release()


async def test_a_model_without_a_replica_is_asked_for_and_served_when_it_has_come() -> None:
    """F24."""
    mesh = Mesh(_mesh(""))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(mesh.assign())
        await _until(lambda: bool(mesh.needed))
        mesh.snapshot = _mesh("a", mod_revision=2)
        mesh.dispatcher.pump_all()
    assert task.result().replica.id == _id("a")
    assert set(mesh.needed) == {MODEL}


async def test_a_load_that_failed_ends_the_wait_of_all() -> None:
    mesh = Mesh(_mesh(""))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_error_of(mesh)) for _ in range(3)]
        await _until(lambda: mesh.dispatcher.waiting(MODEL) == 3)
        mesh.dispatcher.fail(MODEL, LoadFailed("no such tensor", model=MODEL))
    errors = [task.result() for task in tasks]
    assert [str(e) for e in errors] == ["no such tensor"] * 3
    assert len({id(e) for e in errors}) == 3
    assert errors[0].metadata == {"model": "m"}


async def _error_of(mesh: Mesh) -> LoadFailed:
    with pytest.raises(LoadFailed) as caught:
        await mesh.assign()
    return caught.value


async def test_too_many_who_wait_are_refused_at_once() -> None:
    mesh = Mesh(_mesh("a"), max_waiting=1)
    slot = await mesh.assign()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(mesh.assign())
        await _until(lambda: mesh.dispatcher.waiting(MODEL) == 1)
        with pytest.raises(Overloaded) as caught:
            await mesh.assign()
        assert caught.value.retry_after_seconds is not None
        slot.release()
    waiting.result().release()


async def test_an_ejected_replica_is_used_again_when_its_time_is_over() -> None:
    """F5."""
    mesh = Mesh(_mesh("a"))
    mesh.dispatcher.eject(mesh.snapshot.replicas[MODEL][_id("a")], seconds=0.005)
    (await mesh.assign()).release()
    assert mesh.needed == []


async def test_a_replica_that_refused_is_asked_again_after_a_pause_and_others_do_not_wait_for_that() -> None:
    """F19."""
    mesh = Mesh(_mesh("a"))
    attempts = Attempts()
    attempts.refused_by(_id("a"), CLOCK.monotonic())
    async with asyncio.TaskGroup() as group:
        refused = group.create_task(mesh.assign(attempts=attempts))
        await _until(lambda: mesh.dispatcher.waiting(MODEL) == 1)
        (await mesh.assign()).release()
        assert not refused.done()
    refused.result().release()


def test_a_refused_request_stays_away_for_longer_each_time_up_to_a_second() -> None:
    attempts = Attempts()
    pauses = []
    for _ in range(8):
        attempts.refused_by(_id("a"), 100.0)
        pauses.append(attempts.avoid_until[_id("a")] - 100.0)
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert pauses[-1] == 1.0
    assert attempts.avoided(100.5) == {_id("a")}
    assert attempts.next_end(101.5) is None


async def test_a_changed_record_ends_an_ejection() -> None:
    mesh = Mesh(_mesh("a"))
    mesh.dispatcher.eject(mesh.snapshot.replicas[MODEL][_id("a")], seconds=60.0)
    mesh.snapshot = replace(_mesh("a", mod_revision=2))
    (await mesh.assign(within=1.0)).release()


@pytest.mark.parametrize("seed", range(5))
async def test_what_is_assigned_is_what_the_pick_would_pick_at_that_moment(seed: int) -> None:
    """F11: the mirror test of the one pick function against the path that counts and locks."""
    chance = random.Random(seed)
    mesh = Mesh(_mesh("abcde", limit=3))
    slots: list[Slot] = []
    for _ in range(80):
        if slots and (len(slots) == 15 or chance.random() < 0.45):
            slots.pop(chance.randrange(len(slots))).release()
            continue
        found = candidates(
            mesh.snapshot,
            MODEL,
            holder=HolderId("me"),
            own_in_flight=mesh.load.in_flight,
            last_used=mesh.load.last_used,
            ejected=lambda _: False,
        )
        expected = pick_best_replica(found, salt=b"s")
        assert expected is not None
        slot = await mesh.assign()
        assert slot.replica == expected.replica
        slots.append(slot)
    for slot in slots:
        slot.release()
    assert mesh.dispatcher.in_flight == 0
