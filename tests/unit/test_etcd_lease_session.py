"""When a session may be acted upon: decided by its clock, whatever etcd says or does not say."""

from dataclasses import dataclass, field

import pytest

from localmesh.etcd import ConnectionTimeoutError, Lease, LeaseExpired, LeaseSession, Refresh
from localmesh.etcd.tasks import TaskOwner


@dataclass
class ManualClock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@dataclass
class FakeService:
    """Answers refreshes as scripted; each takes `seconds` of the clock between sending and acknowledgement."""

    clock: ManualClock
    script: list[int | Exception] = field(default_factory=list)
    seconds: float = 0.0
    revoked: list[int] = field(default_factory=list)

    async def lease_grant(self, ttl_seconds: int, *, deadline: float | None = None) -> Lease:
        self.clock.now += 1.5  # the grant's answer is slow
        return Lease(77, ttl_seconds)

    async def lease_revoke(self, lease_id: int, *, deadline: float | None = None) -> bool:
        self.revoked.append(lease_id)
        return True

    async def refresh(self, lease_id: int, *, ack_timeout: float, deadline: float) -> Refresh:
        step = self.script.pop(0)
        sent_at = self.clock.now
        self.clock.now += self.seconds
        if isinstance(step, Exception):
            raise step
        return Refresh(lease_id, step, sent_at)


async def finished(session: LeaseSession) -> None:
    assert session._task is not None
    await session._task


async def test_the_ttl_counts_from_before_the_grant_was_sent() -> None:
    clock, tasks = ManualClock(), TaskOwner()
    session = LeaseSession(FakeService(clock), tasks, clock, 10)
    assert not session.alive()
    await session.open()
    assert session.fence == 1010.0
    assert session.alive(1009.9)
    assert not session.alive(1010.0)
    await session.close()
    await tasks.close()


async def test_a_refresh_counts_from_its_sending_and_an_old_one_never_shortens_the_fence() -> None:
    clock, tasks = ManualClock(), TaskOwner()
    service = FakeService(clock, [10, LeaseExpired(77)], seconds=3.0)
    session = LeaseSession(service, tasks, clock, 10)
    await session.open()
    clock.now = 1005.0  # the refresh is due
    await finished(session)
    assert session.fence == 1015.0, "sent at 1005, acknowledged at 1008"
    assert session.lost.is_set()
    await tasks.close()


async def test_a_lease_that_etcd_does_not_know_is_lost_at_once_and_not_revoked() -> None:
    clock, tasks, losses = ManualClock(), TaskOwner(), []
    service = FakeService(clock, [LeaseExpired(77)])
    session = LeaseSession(service, tasks, clock, 10, losses.append)
    await session.open()
    clock.now = 1003.0
    await finished(session)
    assert losses == [session]
    assert not session.alive(1003.0), "although its fence has not come"
    await session.close()
    assert service.revoked == []
    await tasks.close()


async def test_without_any_acknowledgement_it_is_lost_at_the_fence_and_revoked_for_good_measure() -> None:
    clock, tasks, losses = ManualClock(), TaskOwner(), []
    service = FakeService(clock, [ConnectionTimeoutError("silence")], seconds=8.0)
    session = LeaseSession(service, tasks, clock, 10, losses.append)
    await session.open()
    clock.now = 1003.0
    await finished(session)
    assert losses == [session]
    assert "within its TTL" in session.lost_reason
    await session.close()
    assert service.revoked == [77]
    assert losses == [session]
    await tasks.close()


async def test_a_process_that_was_frozen_itself_does_not_refresh_a_lease_it_has_outlived() -> None:
    clock, tasks = ManualClock(), TaskOwner()
    service = FakeService(clock, [10])
    session = LeaseSession(service, tasks, clock, 10)
    await session.open()
    clock.now = 2000.0
    await finished(session)
    assert session.lost.is_set()
    assert service.script == [10], "it was not even tried: others may have acted on the loss"
    await tasks.close()


async def test_a_ttl_below_a_second_is_refused() -> None:
    clock = ManualClock()
    with pytest.raises(ValueError, match="at least 1"):
        LeaseSession(FakeService(clock), TaskOwner(), clock, 0)
