"""The replica's last word."""

import asyncio

import pytest

from localmesh.core.errors import ModelLoading, ReplicaDraining, ReplicaFull, ReplicaStale
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.replica.admission import Admission

REPLICA = ReplicaId(ModelName("m"), NodeName("n"), 0)


def admission(limit: int = 2) -> Admission:
    made = Admission(REPLICA, "rev1", limit)
    made.open()
    return made


def test_requests_are_counted_while_they_run() -> None:
    door = admission()
    changes: list[int] = []
    door.on_change(lambda: changes.append(door.in_flight))
    with door.admit(()):
        with door.admit(None):
            assert door.in_flight == 2
        assert door.in_flight == 1
    assert changes == [1, 2, 1, 0]


def test_a_request_that_fails_is_no_longer_counted() -> None:
    door = admission()
    with pytest.raises(ZeroDivisionError), door.admit(()):
        raise ZeroDivisionError
    assert door.in_flight == 0


def test_above_the_limit_is_refused_with_the_limit_and_when_to_come_back() -> None:
    door = admission(1)
    with door.admit(()), pytest.raises(ReplicaFull) as caught, door.admit(()):
        pass
    assert caught.value.metadata == {"replica": "m/n/0", "limit": "1"}
    assert caught.value.retry_after_seconds
    assert door.in_flight == 0


def test_nobody_is_let_in_before_the_model_is_loaded() -> None:
    door = Admission(REPLICA, "rev1", 1)
    with pytest.raises(ModelLoading), door.admit(()):
        pass


def test_nobody_is_let_in_while_draining_and_who_is_in_stays() -> None:
    door = admission()
    with door.admit(()):
        door.drain()
        with pytest.raises(ReplicaDraining), door.admit(()):
            pass
        assert door.in_flight == 1


async def test_idle_comes_when_the_last_one_has_left() -> None:
    door = admission()
    async with asyncio.timeout(5):
        await door.idle()
    with door.admit(()):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await door.idle()
    await door.idle()


@pytest.mark.parametrize(
    ("key", "value"),
    [("localmesh-replica", "m/n/1"), ("localmesh-revision", "rev2"), ("localmesh-model", "x")],
)
def test_a_request_meant_for_another_one_is_stale_before_anything_else(key: str, value: str) -> None:
    door = admission(1)
    door.drain()
    with pytest.raises(ReplicaStale) as caught, door.admit(((key, value),)):
        pass
    assert caught.value.metadata == {"replica": "m/n/0"}


def test_a_request_that_names_this_replica_is_let_in() -> None:
    metadata = (("localmesh-replica", "m/n/0"), ("localmesh-revision", "rev1"), ("localmesh-model", "m"), ("x", "y"))
    with admission().admit(metadata):
        pass


def test_a_model_named_in_the_message_must_be_this_one() -> None:
    door = admission()
    door.check_model("")
    door.check_model("m")
    with pytest.raises(ReplicaStale):
        door.check_model("other")
